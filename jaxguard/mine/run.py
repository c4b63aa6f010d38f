"""Mining from start to end: the training examples as the trainer chose them, the guard's answers, the difficult ones.

select -> ask, keeping every answer -> count the right ones -> choose -> write
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.config.mine import MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, load_policy
from jaxguard.data.prepare import Selection, select
from jaxguard.guards.loading import cache_key, examples_key, open_guard
from jaxguard.guards.predictions import open_predictions
from jaxguard.guards.protocol import Request
from jaxguard.mine.choose import Tried, choose, difficult, labels_of, tried
from jaxguard.mine.report import write_report
from jaxguard.utils.files import lock_folder, write_atomically
from jaxguard.utils.progress import Progress


def mine(config: Config) -> int:
    """Find the training examples that the run's guard judges right only sometimes.

    Raises:
        JaxguardError: there is no guard yet, the data cannot be read, or answers are there that were got otherwise.
    """
    settings, console = config.mine or MineConfig(), Console(soft_wrap=True)
    sampling = (config.evaluate or EvaluateConfig()).model_copy(
        # "benchmark" asks for the lines that have a label, which is what training showed.
        update={"generations": settings.generations, "ask": "benchmark"}
    )
    common = asyncio.run(cache_key(settings.guard, config, sampling))
    policy, selection = load_policy(config.data.policy), select(config)
    folder = config.folder / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "mining"):
        found = asyncio.run(ask(config, sampling, selection, policy, common, console))
        candidates = difficult(found, settings)
        taken = choose(candidates, settings, config.seed)
        write_examples(folder, selection, found, taken)
        write_report(folder, config, found, candidates, taken, console)
    return 0


async def ask(
    config: Config,
    sampling: EvaluateConfig,
    selection: Selection,
    policy: Policy,
    common: dict[str, Any],
    console: Console,
) -> list[Tried]:
    """Every training example with the guard's answers to it; what is on disk is not asked for again."""
    settings = config.mine or MineConfig()
    by_mode = {mode: [example for example, own in selection.train if own is mode] for mode in Mode}
    tally: Counter[int] = Counter()
    found: dict[str, Tried] = {}

    def add(example: Example, mode: Mode, texts: Iterable[str]) -> None:
        found[example.id] = tried(example, mode, policy, tuple(texts))
        tally[found[example.id].right] += 1

    with ExitStack() as stack:
        stores = {
            mode: stack.enter_context(
                open_predictions(
                    config.folder / "mine/answers" / f"{mode}.jsonl", {**common, **examples_key(examples, policy)}
                )
            )
            for mode, examples in by_mode.items()
            if examples
        }
        asks: dict[Mode, list[Request]] = {mode: [] for mode in stores}
        for example, mode in selection.train:
            if example.id in stores[mode].answers:
                add(example, mode, stores[mode].answers[example.id].texts)
            else:
                asks[mode].append(Request(example, tuple(labels_of(example, policy)), mode))
        if any(asks.values()):
            progress = stack.enter_context(Progress("mining", len(selection.train), tally.total(), console))
            examples = {example.id: example for example, _ in selection.train}
            async with open_guard(settings.guard, config, sampling, probabilities=False) as judge:
                for mode, left in asks.items():
                    # What does not fit shows at once, and texts of like length share a batch.
                    left.sort(key=lambda ask: -len(ask.example.prompt) - len(ask.example.response or ""))
                    async for answer in judge(left):
                        stores[mode].append(answer)
                        add(examples[answer.example_id], mode, answer.texts)
                        progress.update(tally.total(), _counts(tally, settings))
    return [found[example.id] for example, _ in selection.train]


def write_examples(folder: Path, selection: Selection, found: list[Tried], taken: list[Tried]) -> None:
    """The run's own examples, and what mining found among them, in our format.

    The second round reads the first one's choice from these files: of the sources, with the difficult ones appended, it
    would hold out others, take another subset, and in dual mode let others reason.
    """
    held = {example.id: example.to_json() for example, _ in selection.validation}
    files: dict[str, Iterable[dict[str, object]]] = {
        "train": (example.to_json() | {"mode": mode.value} for example, mode in selection.train),
        "held_out": held.values(),
        "difficult": (_row(one) | {"right": one.right} for one in taken),
        "never_right": (_row(one) | {"answers": one.texts} for one in found if not one.right),
    }
    for name, rows in files.items():
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _counts(tally: Counter[int], config: MineConfig) -> str:
    k = config.generations
    hard = sum(tally[right] for right in set(config.difficult))
    return f"right {k}/{k} {tally[k] / tally.total():.0%}  hard {hard:,}  never {tally[0]:,}"


def _row(one: Tried) -> dict[str, object]:
    return one.example.to_json() | {"mode": one.mode.value}
