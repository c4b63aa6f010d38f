"""How preferences and reinforcement trained, from the metrics.jsonl of their runs: it shows why a method helped, or did not."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from jaxguard.report import Table
from jaxguard.report.text import DASH, number
from jaxguard.utils.parse import ROWS_BYTES, Fields, T, parse_json, read_text

ABOUT_TRAINING = (
    "What metrics.jsonl logs: the mean of the first tenth of the steps, and of the last, over the runs of a row."
)


def training_table(folders: Mapping[str, Sequence[Path]]) -> Table:
    """A line for each metric of a group but `validation/`, and a column for each row of the study that has any.

    `folders` are the run folders by row. A metric of a group is one whose name has a slash, such as rollouts/right.

    JaxguardError: a line of a metrics.jsonl is no record.
    """
    found = {row: metrics for row, runs in folders.items() if len((metrics := _first_and_last(runs)).columns)}
    names = dict.fromkeys(name for metrics in found.values() for name in metrics)
    table = Table(("", *found))
    for name in names:
        ends = [metrics.get(name) for metrics in found.values()]
        table.add(name, *(DASH if each is None else " to ".join(map(number, each)) for each in ends))
    return table


def read_metrics(folder: Path, kind: type[T]) -> list[T]:
    """Read the complete lines of a run's metrics.jsonl; JaxguardError: one is no `kind`."""
    path = folder / "metrics.jsonl"
    lines = read_text(path, ROWS_BYTES).split("\n")[:-1] if path.is_file() else []  # the last one may be cut
    return [parse_json(line, kind, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _first_and_last(folders: Sequence[Path]) -> pd.DataFrame:
    """Two rows, the first tenth of the steps and the last, each the mean over runs; a column for each metric."""
    tables = []
    for folder in folders:
        records = pd.DataFrame(read_metrics(folder, Fields))
        names = [name for name in records if "/" in name and not name.startswith("validation/")]
        steps = records[names].apply(pd.to_numeric, errors="coerce").dropna(how="all")
        tenth = max(1, len(steps) // 10)
        tables.append(pd.DataFrame([steps.head(tenth).mean(), steps.tail(tenth).mean()]))
    return pd.concat(tables).groupby(level=0).mean() if tables else pd.DataFrame()
