"""Times the updates of a transformers Trainer."""

import time
from typing import Any

from transformers import TrainerCallback

from common import tell


class Clock(TrainerCallback):
    """Tells of each update; its time includes its batches' collation.

    Args:
        examples: how many each update trains.
    """

    def __init__(self, examples: list[int]) -> None:
        self.examples, self.start, self.seconds = examples, 0.0, 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.start, self.seconds = now, now - self.start

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:  # noqa: ARG002
        logs, update = values["logs"], state.global_step
        if "loss" in logs:
            tell(update, self.seconds, self.examples[update - 1], logs["loss"])
