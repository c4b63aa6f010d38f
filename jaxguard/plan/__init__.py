"""Plan a run without its hardware: compile the training step for a target, and report memory, time and cost.

jaxguard.plan("gemma4b_5k", ["a100-80gb:8"]).table() plans; `search` of jaxguard.plan.run looks for the fastest settings that fit;
`sweep` of jaxguard.plan.sweeps plans several runs over growing clusters.
"""
