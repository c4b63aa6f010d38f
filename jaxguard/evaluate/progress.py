"""How far an evaluation is: a bar on a terminal, a line every half minute elsewhere."""

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxguard.guards.protocol import UNPARSABLE, Prediction

TOLD_SECONDS = 30.0


@contextmanager
def counting(title: str, total: int, done: int, console: Console) -> Iterator[Callable[[Prediction], None]]:
    """Show progress over `total` examples of which `done` were there before; call the value with each answer."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    started = last = time.monotonic()
    count = unreadable = tokens = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, completed=done, numbers="")

        def told(answer: Prediction) -> None:
            nonlocal count, unreadable, tokens, last
            count += 1
            unreadable += answer.verdicts.count(UNPARSABLE)
            tokens += answer.prompt_tokens + answer.completion_tokens
            now = time.monotonic()
            seconds = max(now - started, 1e-9)
            numbers = f"{count / seconds:,.1f} examples/s  {tokens / seconds:,.0f} tokens/s  unreadable: {unreadable}"
            progress.update(task, completed=done + count, numbers=numbers)
            if progress.disable and now - last >= TOLD_SECONDS:
                last = now
                left = datetime.timedelta(seconds=round(seconds / count * (total - done - count)))
                console.print(
                    f"{title} {done + count}/{total}  {numbers}  ETA {left}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

        yield told
    if progress.disable:
        console.print(f"{title} {done + count}/{total} done", highlight=False, markup=False, soft_wrap=True)
