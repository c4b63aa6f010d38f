"""Plan a run without its hardware: compile the training step for a target, and report memory, time and cost.

    report = jaxguard.plan("gemma4b_5k", ["a100-80gb:8"])
    report.fits, report.table()

In jaxguard.plan.run, `search` looks for the fastest settings that fit; in jaxguard.plan.sweeps, `sweep` plans several runs over
growing clusters.
"""
