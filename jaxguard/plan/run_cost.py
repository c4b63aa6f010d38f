"""Count a whole run: its steps, the shapes of its batches, hours and dollars."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from jaxguard.config import Config
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.packing import Schedule, Shape, assemble, bucketed, pack, total_steps
from jaxguard.data.prepare import prepare
from jaxguard.models.attention.kernels import Layout

MOST_SHAPES = 4
SAMPLED_STEPS = 8
"""Batches of a run whose blocks of attention are counted, or whose answers are packed."""


@dataclass(frozen=True)
class RunCost:
    """A whole run: steps, None where they depend on data that are not available, and dollars for a device and hour.

    `shapes` of batches, each a program to compile -> how many steps have it; empty where the data are not available. `layouts` are
    those of a few batches.
    """

    steps: int | None = None
    price: float | None = None
    shapes: Mapping[Shape, int] = field(default_factory=dict)
    layouts: Sequence[Layout] = ()

    def totals(self, seconds: float, devices: int) -> dict[str, float | None]:
        """Hours, and dollars for all devices, at so many seconds a step."""
        hours = None if self.steps is None else self.steps * seconds / 3600
        return {"hours": hours, "dollars": hours and self.price and hours * devices * self.price}

    def describe(self, seconds: float, devices: int) -> str:
        """Steps, hours and dollars in words."""
        hours, dollars = self.totals(seconds, devices).values()
        if hours is None:
            return "unknown: set data.subset or train.max_steps"
        price = "" if dollars is None else f", ${dollars:,.2f}"
        return f"{self.steps:,} steps, {hours:,.2f} h, {hours * devices:,.1f} device-hours{price}"

    @property
    def largest(self) -> Shape | None:
        """The shape that needs most memory, and so decides whether the run fits; None where the data are not available."""
        return max(self.shapes, key=_size, default=None)

    @property
    def programs(self) -> str:
        """Number and shapes of the programs, in words; a run may have dozens."""
        if not self.shapes:
            return "unknown until tokenizer and data are local"
        names = [
            f"{shape.rows} rows of {shape.tokens:,} tokens, {shape.targets:,} targets ({count:,} steps)"
            for shape, count in Counter(self.shapes).most_common(MOST_SHAPES)
        ]
        more = [f"{len(self.shapes) - MOST_SHAPES} more"] if len(self.shapes) > MOST_SHAPES else []
        return f"{len(self.shapes)}: {'; '.join([*names, *more])}"


def _size(shape: Shape) -> tuple[int, int]:
    return shape.rows * shape.tokens, shape.targets


def skipped_blocks(layouts: Sequence[Layout], windows: Sequence[int | None], queries: int, keys: int) -> float:
    """Share of the blocks with keys at or before their queries that no query of theirs needs, over layers with these windows."""
    causal = needed = 0
    for layout in layouts:
        padded = layout.padded(-layout.ends_BT.shape[1] % math.lcm(queries, keys))
        rows, tokens = padded.ends_BT.shape
        causal += rows * len(windows) * sum(-(-stop // keys) for stop in range(queries, tokens + 1, queries))
        needed += sum(n * int(padded.needed(window, queries, keys).sum()) for window, n in Counter(windows).items())
    return 1 - needed / causal


def run_cost(config: Config, devices: int, price: float | None = None) -> RunCost:
    """Count a run's steps, and its batch shapes from local tokenizer and data; JaxguardError if it cannot train on those."""
    train, data, checkpoint = config.train, config.data, Path(config.model.checkpoint)
    paths = [source.path and Path(source.path) for source in (*data.train, *data.validation)]
    if (checkpoint / "tokenizer.json").is_file() and all(path and path.exists() for path in paths):
        examples = prepare(config, checkpoint).train
        steps = total_steps(len(examples), train.batch_size, train.epochs, train.max_steps)
        multiple = max(1, devices // config.mesh.tensor) * train.accumulation
        schedule = Schedule.of(config, examples, steps, multiple)
        some = range(0, steps, -(-steps // SAMPLED_STEPS))
        if train.objective.is_sampled:
            sampled = [_longest_answers(config, [examples[i] for i in schedule.examples(step)]) for step in some]
            rows = [pack(answers, data.max_seq_len, multiple, data.share_prefixes) for answers in sampled]
            shapes = [bucketed(each, data.max_seq_len, multiple) for each in rows]
            batches = [assemble(*each) for each in zip(rows, shapes, strict=True)]
            counts = Counter({max(shapes, key=_size): steps})
        else:
            batches = [schedule.batch(step) for step in some]
            counts = Counter(schedule.shape(step) for step in range(steps))
        layouts = [Layout(batch.ends_BT, batch.positions_BT) for batch in batches]
        return RunCost(steps, price, counts, layouts)
    if data.subset is None:
        return RunCost(train.max_steps, price)
    return RunCost(total_steps(data.subset, train.batch_size, train.epochs, train.max_steps), price)


def _longest_answers(config: Config, prompts: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Answers to prompts that are as long as they may be, and have nothing in common."""
    settings, longest = config.reinforce or ReinforceConfig(), list[EncodedExample]()
    for example in prompts:
        prompt = example.tokens[~example.loss_mask]
        room = min(settings.max_tokens, config.data.max_seq_len - len(prompt))
        for answer in range(settings.answers):
            tokens = np.concatenate([prompt, np.full(room, answer, np.int32)])
            reference = np.zeros(room, np.float32)
            mask = np.arange(len(tokens)) >= len(prompt)
            longest.append(replace(example, tokens=tokens, loss_mask=mask, weight=1.0, reference=reference))
    return longest
