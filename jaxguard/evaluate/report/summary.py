"""An evaluation in one table, for the terminal."""

from rich.table import Table
from rich.text import Text

from jaxguard.evaluate.scores.results import Average, Evaluation
from jaxguard.utils.statistics import Estimate


def summary_table(evaluation: Evaluation) -> Table:
    """F1 of every guard in every mode on every benchmark, and the averages; a dash where there is none."""
    rows = list(dict.fromkeys((cell.guard, cell.mode) for cell in evaluation.cells))
    names = list(dict.fromkeys(average.name for average in evaluation.averages))
    table = Table("guard", "mode", title="F1 of the harmful class (95 % interval)")
    for name in (*evaluation.benchmarks, *names):
        table.add_column(Text(name), justify="right")
    cells = {(c.guard, c.mode, c.benchmark): c.result.scores.f1 for c in evaluation.cells}
    averages = {(a.guard, a.mode, a.name): a for a in evaluation.averages}
    for guard, mode in rows:
        f1 = [_estimate(cells.get((guard, mode, name))) for name in evaluation.benchmarks]
        means = [_average(averages.get((guard, mode, name))) for name in names]
        table.add_row(Text(guard), mode, *f1, *means)
    if any(average.missing for average in evaluation.averages):
        table.caption = "* without the benchmarks that the guard did not judge"
    return table


def _average(found: Average | None) -> str:
    return "-" if found is None else _estimate(found.f1) + ("*" if found.missing else "")


def _estimate(found: Estimate | None) -> str:
    if found is None or found.value is None:
        return "-"
    interval = "" if found.low is None else f" ({found.low:.3f}-{found.high:.3f})"
    return f"{found.value:.3f}{interval}"
