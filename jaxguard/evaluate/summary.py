"""An evaluation in one table, for the terminal."""

from rich.table import Table
from rich.text import Text

from jaxguard.evaluate.results import Evaluation
from jaxguard.statistics import Estimate


def summary_table(evaluation: Evaluation) -> Table:
    """F1 of every guard in every mode on every benchmark, and the averages."""
    rows = list(dict.fromkeys((cell.guard, cell.mode) for cell in evaluation.cells))
    benchmarks = list(dict.fromkeys(cell.benchmark for cell in evaluation.cells))
    averages = list(dict.fromkeys(average.name for average in evaluation.averages))
    table = Table("guard", "mode", title="F1 of the harmful class (95 % interval)")
    for name in (*benchmarks, *averages):
        table.add_column(Text(name), justify="right")
    cells = {(c.guard, c.mode, c.benchmark): c for c in evaluation.cells}
    means = {(a.guard, a.mode, a.name): a.f1 for a in evaluation.averages}
    for guard, mode in rows:
        f1 = [cells[guard, mode, name].result.scores.f1 for name in benchmarks]
        mean = [means.get((guard, mode, name)) for name in averages]
        table.add_row(Text(guard), mode, *(_estimate(x) for x in (*f1, *mean)))
    return table


def _estimate(found: Estimate | None) -> str:
    if found is None or found.value is None:
        return "-"
    interval = "" if found.low is None else f" ({found.low:.3f}-{found.high:.3f})"
    return f"{found.value:.3f}{interval}"
