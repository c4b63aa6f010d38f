"""How far work is: a bar on a terminal, a plain line every half minute elsewhere."""

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from jaxguard.utils.terminal import Console

PLAIN_SECONDS = 30.0
"""Least time between two plain lines."""
SPEED_SECONDS = 600.0
"""Speed and time left are those of the last ten minutes, without what came before the first result: compiling and loading."""

Item = TypeVar("Item")


class Progress:
    """A context manager that shows the newest numbers of a loop over `total` items, of which some were done before.

    It is shown on standard output, unless a console is given. `unit` is what an item is, for the speed; None shows no speed.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        console: Console | None = None,
        unit: str | None = "examples",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unit, self._clock = unit, clock
        self._started = self._printed = self._updated = clock()
        self._skipped = 0.0
        self._console = console or Console()
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
            # Rows of a batch come within a moment: they have one time, so that a speed is between batches.
            get_time=lambda: round(clock() - self._skipped, 1),
            speed_estimate_period=SPEED_SECONDS,
        )
        self._bar.add_task(title, total=total, completed=done, numbers="")
        (self._task,) = self._bar.tasks

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, numbers: str = "", **counts: float) -> None:
        """Show that `done` items are done, those from before included, and `numbers`.

        `counts` are totals since the start of this process, shown per second: `tokens=...` as tokens/s.
        """
        task, now = self._task, self._clock()
        self._updated = now
        self._bar.update(task.id, completed=done)
        speeds = [f"{task.speed:,.1f} {self._unit}/s"] if self._unit and task.speed else []
        speeds += [f"{count / max(now - self._started, 1e-9):,.0f} {name}/s" for name, count in counts.items()]
        left = "-:--:--" if task.time_remaining is None else datetime.timedelta(seconds=int(task.time_remaining))
        text = "  ".join(filter(None, (numbers, *speeds, f"ETA {left}")))
        self._bar.update(task.id, numbers=text)
        if self._bar.disable and (now - self._printed >= PLAIN_SECONDS or done == task.total):
            self._printed = now
            self.say(f"{task.description} {done:,}/{task.total:,}  {text}")

    def skip(self) -> None:
        """Leave the time since the last update out of the time left: something was compiled, once."""
        now = self._clock()
        self._skipped += now - self._updated
        self._updated = now

    def advance(self, numbers: str = "") -> None:
        """Show that one more item is done."""
        self.update(int(self._task.completed) + 1, numbers)

    def say(self, text: str) -> None:
        """Print a line of its own, on a terminal above the bar."""
        self._console.print(text, soft_wrap=True)


def track(items: Sequence[Item], title: str, least: int = 1000) -> Iterator[Item]:
    """Yield the items, with a progress display on standard error unless they are fewer than `least`."""
    if len(items) < least:
        yield from items
        return
    with Progress(title, len(items), console=Console(stderr=True)) as progress:
        for item in items:
            yield item
            progress.advance()
