"""Stop on request: SIGTERM and Ctrl-C end the run after the current step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import jax
from jax.experimental import multihost_utils

REQUEUE = 75
"""Exit code after a stop by signal with the state saved: EX_TEMPFAIL of sysexits.h, "try again later"."""


@dataclass
class StopFlag:
    """Whether a signal asked the run to stop: the name of the one that this process received, or None."""

    signal_name: str | None = None

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step; call it once a step, on every process.

        Schedulers signal the processes of a job at different moments, or only one of them. So several processes agree
        on a step through the coordinator, which watches SIGTERM by itself.
        """
        if jax.process_count() == 1:
            return self.signal_name is not None
        return bool(multihost_utils.reached_preemption_sync_point(step))


@contextmanager
def graceful_stop() -> Iterator[StopFlag]:
    """Turn SIGTERM and the first SIGINT into a flag; the second SIGINT raises KeyboardInterrupt at once.

    With several processes, enter it after jax.distributed is initialized: SIGTERM then stays with JAX's own watcher, and a
    Ctrl-C (which only some launchers pass to every process) goes to that watcher as a SIGTERM. Python allows signal handlers
    in the main thread only; in another one this does nothing. The previous handlers are restored at the end.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    alone = jax.process_count() == 1

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and flag.signal_name == "SIGINT":
            raise KeyboardInterrupt
        flag.signal_name = signal.Signals(number).name
        if not alone:
            signal.raise_signal(signal.SIGTERM)

    watched = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
