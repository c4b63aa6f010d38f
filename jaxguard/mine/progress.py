"""How far mining is, and what it has found."""

import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxguard.config.evaluate import MineConfig

TOLD_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""


@contextmanager
def progress(total: int, config: MineConfig, console: Console) -> Iterator[Callable[[Counter[int]], None]]:
    """A bar that takes counts by number of right answers; on no terminal, a line every half minute."""
    columns = (TextColumn("mining"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
    started = told = time.monotonic()
    first: int | None = None

    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, numbers="")

        def show(tally: Counter[int]) -> None:
            nonlocal told, first
            now, done = time.monotonic(), tally.total()
            first = done if first is None else first  # on disk before this start, so they took no time
            speed = (done - first) / max(now - started, 1e-9)
            left = datetime.timedelta(seconds=round((total - done) / speed)) if speed else "?"
            numbers = f"{_counts(tally, config)}  {speed:,.1f} examples/s  ETA {left}"
            bar.update(task, completed=done, numbers=numbers)
            if bar.disable and now - told >= TOLD_SECONDS:
                told = now
                console.print(f"mining {done:,}/{total:,}  {numbers}", highlight=False)

        yield show


def _counts(tally: Counter[int], config: MineConfig) -> str:
    done, k = tally.total(), config.generations
    always = f"{tally[k] / done:.0%}" if done else "?"
    difficult = sum(tally[right] for right in set(config.difficult))
    return f"right {k}/{k} {always}  difficult {difficult:,}  never {tally[0]:,}"
