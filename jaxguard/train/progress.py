"""The run on the terminal: a bar that stays in place, or plain lines where there is no terminal."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 10.0
"""Least time between two plain lines."""

_RECENT = 50
"""Steps that the time of arrival is reckoned from."""


class Progress:
    """Shows the newest numbers of a run.

    On a terminal it is a bar; elsewhere one line every PLAIN_SECONDS, without control codes. Validation results are
    always printed on lines of their own.
    """

    def __init__(
        self, name: str, total_steps: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._total, self._clock = name, total_steps, clock
        self._console = console or Console()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._printed = -PLAIN_SECONDS

    def start(self, step: int) -> None:
        """Begin at `step` completed updates."""
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(self._name, total=self._total, completed=step, numbers="")
            self._bar.start()

    def show(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Show what was logged after `step` updates; see Telemetry.log for the names."""
        validation = {name: value for name, value in values.items() if name.startswith("validation")}
        if validation:
            numbers = "  ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in validation.items())
            self.say(f"step {step}/{self._total}  validation: {numbers}")
        if len(validation) == len(values):
            return
        if "seconds" in speed:
            self._seconds.append(speed["seconds"])
        numbers, now = self._numbers(step, values, speed), self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif now - self._printed >= PLAIN_SECONDS or step == self._total:
            self._printed = now
            self.say(f"step {step}/{self._total}  {numbers}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _numbers(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> str:
        formats = (
            (values, "loss", "loss {:.4f}"),
            (values, "learning_rate", "lr {:.2e}"),
            (speed, "tokens_per_second", "{:,.0f} tokens/s"),
            (speed, "examples_per_second", "{:.3g} examples/s"),
            (speed, "mfu", "MFU {:.1%}"),
        )
        parts = [text.format(source[name]) for source, name, text in formats if name in source]
        return "  ".join([*parts, self._arrival(step)])

    def _arrival(self, step: int) -> str:
        """Time left, if the updates to come take as long as most of the recent ones: compiling is done once."""
        if not self._seconds:
            return "ETA -:--:--"
        seconds = round(median(self._seconds) * max(self._total - step, 0))
        return f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
