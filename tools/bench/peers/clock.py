"""Time the steps of a transformers Trainer."""

import time
from typing import Any

from transformers import TrainerCallback

from common import report


class Clock(TrainerCallback):
    """Report each step; its time includes the collation of its batches.

    Args:
        examples: number that each step trains.
    """

    def __init__(self, examples: list[int]) -> None:
        self.examples, self.start, self.seconds = examples, 0.0, 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.start, self.seconds = now, now - self.start

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:  # noqa: ARG002
        logs, step = values["logs"], state.global_step
        if "loss" in logs:
            report(step, self.seconds, self.examples[step - 1], logs["loss"])
