"""Plan a run without its hardware: compile the training step for a target, and report memory, time and cost.

    report = plan("gemma4b_5k", ["a100-80gb:8"])
    report.fits, report.table()

`search` looks for the fastest settings that fit, `sweep` plans several runs over growing clusters.
"""

from jaxguard.plan.report import PlanReport
from jaxguard.plan.run import SearchReport, plan, search
from jaxguard.plan.sweeps import SweepReport, sweep

__all__ = ["PlanReport", "SearchReport", "SweepReport", "plan", "search", "sweep"]
