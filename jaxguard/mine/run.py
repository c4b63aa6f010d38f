"""Hard-example mining: the training examples as the trainer chose them, the guard's answers, the hard ones.

select -> predict, storing every answer -> count the right ones -> choose -> write
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
from jaxguard.config.evaluate import EvaluateConfig, MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy, load_policy
from jaxguard.data.prepare import Selection, select
from jaxguard.guards.loading import cache_key, examples_key, open_guard, open_predictions
from jaxguard.guards.protocol import Request
from jaxguard.mine.choose import Outcome, choose, hard_of, labels_of, outcome_of
from jaxguard.mine.report import MineResult, summarize, write_report
from jaxguard.utils.files import lock_folder, write_atomically
from jaxguard.utils.progress import Progress


def mine(config: Config) -> MineResult:
    """Find the training examples that the run's guard judges right only sometimes, and write them into runs/NAME/mine.

    Raises:
        JaxguardError: there is no guard yet, the data cannot be read, or there are answers under other settings.
    """
    settings = config.mine or MineConfig()
    sampling = (config.evaluate or EvaluateConfig()).model_copy(
        # "benchmark" asks for the lines that have a label, as in training.
        update={"generations": settings.generations, "ask": "benchmark"}
    )
    key = asyncio.run(cache_key(settings.guard, config, sampling))
    policy, selection = load_policy(config.data.policy), select(config)
    folder = config.folder / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "mining"):
        outcomes = asyncio.run(predict_all(config, sampling, selection, policy, key))
        hard = hard_of(outcomes, settings)
        taken = choose(hard, settings, config.seed)
        write_examples(folder, selection, outcomes, taken)
        result = summarize(config, outcomes, hard, taken)
        write_report(folder, result)
    return result


async def predict_all(
    config: Config, sampling: EvaluateConfig, selection: Selection, policy: Policy, key: dict[str, Any]
) -> list[Outcome]:
    """Every training example with the guard's answers to it; what is on disk is not generated again."""
    settings = config.mine or MineConfig()
    by_mode = {mode: [example for example, own in selection.train if own is mode] for mode in Mode}
    tally: Counter[int] = Counter()
    outcomes: dict[str, Outcome] = {}

    def add(example: Example, mode: Mode, texts: Iterable[str]) -> None:
        outcomes[example.id] = outcome_of(example, mode, policy, tuple(texts))
        tally[outcomes[example.id].right] += 1

    with ExitStack() as stack:
        stores = {
            mode: stack.enter_context(
                open_predictions(
                    config.folder / "mine/answers" / f"{mode}.jsonl", {**key, **examples_key(examples, policy)}
                )
            )
            for mode, examples in by_mode.items()
            if examples
        }
        requests: dict[Mode, list[Request]] = {mode: [] for mode in stores}
        for example, mode in selection.train:
            if example.id in stores[mode].answers:
                add(example, mode, stores[mode].answers[example.id].texts)
            else:
                requests[mode].append(Request(example, tuple(labels_of(example, policy)), mode))
        if any(requests.values()):
            console = Console(soft_wrap=True)
            progress = stack.enter_context(Progress("mining", len(selection.train), tally.total(), console))
            examples = {example.id: example for example, _ in selection.train}
            async with open_guard(settings.guard, config, sampling, probabilities=False) as predict:
                for mode, waiting in requests.items():
                    # What does not fit shows at once, and texts of like length share a batch.
                    waiting.sort(key=lambda each: -len(each.example.prompt) - len(each.example.response or ""))
                    async for prediction in predict(waiting):
                        stores[mode].append(prediction)
                        add(examples[prediction.example_id], mode, prediction.texts)
                        progress.update(tally.total(), _counts(tally, settings))
    return [outcomes[example.id] for example, _ in selection.train]


def write_examples(folder: Path, selection: Selection, outcomes: list[Outcome], taken: list[Outcome]) -> None:
    """Write the run's own examples, and what mining found among them, in our format.

    The second round reads the first one's choice from these files: of the sources, with the hard examples appended, it
    would hold out others, take another subset, and in dual mode train others to reason.
    """
    held_out = {example.id: example.to_json() for example, _ in selection.validation}
    files: dict[str, Iterable[dict[str, object]]] = {
        "train": (example.to_json() | {"mode": mode.value} for example, mode in selection.train),
        "held_out": held_out.values(),
        "hard": (_row(outcome) | {"right": outcome.right} for outcome in taken),
        "never_right": (_row(outcome) | {"answers": outcome.texts} for outcome in outcomes if not outcome.right),
    }
    for name, rows in files.items():
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _counts(tally: Counter[int], config: MineConfig) -> str:
    k = config.generations
    hard = sum(tally[right] for right in set(config.hard))
    return f"right {k}/{k} {tally[k] / tally.total():.0%}  hard {hard:,}  never {tally[0]:,}"


def _row(outcome: Outcome) -> dict[str, object]:
    return outcome.example.to_json() | {"mode": outcome.mode.value}
