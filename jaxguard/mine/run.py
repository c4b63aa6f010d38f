"""Hard-example mining: the training examples as the trainer chose them, the guard's answers, the hard ones.

select -> predict, storing every answer -> count the right ones -> choose -> write
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig, MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import ABSENT, Mode, answers, questions
from jaxguard.data.policies import Policy, Question, load_policy, policy_for
from jaxguard.data.prepare import Selection, select, subset
from jaxguard.guards.loading import cache_key, examples_key, open_guard, open_predictions
from jaxguard.guards.protocol import Request
from jaxguard.mine.report import MineResult, Outcome, classes, write_report
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
        outcomes = asyncio.run(predict_all(config, settings, sampling, selection, policy, key))
        hard = [outcome for outcome in outcomes if outcome.right in settings.hard]
        result = MineResult(config.name, folder, settings, outcomes, hard, choose(hard, settings, config.seed))
        write_examples(result, selection)
        write_report(result)
    return result


async def predict_all(
    config: Config,
    settings: MineConfig,
    sampling: EvaluateConfig,
    selection: Selection,
    policy: Policy,
    key: dict[str, Any],
) -> list[Outcome]:
    """Every training example with the guard's answers to it; what is on disk is not generated again."""
    tally: Counter[int] = Counter()
    outcomes: dict[str, Outcome] = {}

    def add(example: Example, mode: Mode, texts: Iterable[str]) -> None:
        outcomes[example.id] = outcome_of(example, mode, policy, tuple(texts))
        tally[outcomes[example.id].right] += 1

    with ExitStack() as stack:
        stores, requests = {}, {}
        for mode in Mode:
            if examples := [example for example, own in selection.train if own is mode]:
                path = config.folder / "mine/answers" / f"{mode}.jsonl"
                stores[mode] = stack.enter_context(open_predictions(path, key | examples_key(examples, policy)))
                stored = stores[mode].answers
                for example in examples:
                    if example.id in stored:
                        add(example, mode, stored[example.id].texts)
                waiting = (example for example in examples if example.id not in stored)
                requests[mode] = [Request(example, tuple(labels_of(example, policy)), mode) for example in waiting]
        if any(requests.values()):
            progress = Progress("mining", len(selection.train), tally.total(), Console(soft_wrap=True))
            stack.enter_context(progress)
            by_id = {example.id: example for example, _ in selection.train}
            async with open_guard(settings.guard, config, sampling, probabilities=False) as predict:
                for mode, unanswered in requests.items():
                    # What does not fit shows at once, and texts of like length share a batch.
                    unanswered.sort(key=lambda each: -len(each.example.prompt) - len(each.example.response or ""))
                    async for prediction in predict(unanswered):
                        stores[mode].append(prediction)
                        add(by_id[prediction.example_id], mode, prediction.texts)
                        k, hard = settings.generations, sum(tally[right] for right in set(settings.hard))
                        share = f"right {k}/{k} {tally[k] / tally.total():.0%}"
                        progress.update(tally.total(), f"{share}  hard {hard:,}  never {tally[0]:,}")
    return [outcomes[example.id] for example, _ in selection.train]


def labels_of(example: Example, policy: Policy) -> dict[Question, str]:
    """The labels of an example, of all that its policy asks; a response that is not there is no label."""
    known = answers(example, questions(example, policy_for(example, policy)))
    return {question: word for question, word in known if word != ABSENT}


def outcome_of(example: Example, mode: Mode, policy: Policy, texts: Sequence[str]) -> Outcome:
    """Compare a guard's answers with the labels.

    An answer has a verdict line for each label. It is right if all of them are; an unparsable one never is.
    """
    labels = labels_of(example, policy)
    verdicts = [parse(text, labels, mode, example.response is not None) for text in texts]
    parsable = [verdict for verdict in verdicts if not verdict.problems]
    right = sum(all(getattr(verdict, q) == word for q, word in labels.items()) for verdict in parsable)
    joined = ", ".join(f"{question} {word}" for question, word in labels.items())
    return Outcome(example, mode, joined, tuple(texts), right, len(verdicts) - len(parsable))


def choose(hard: Sequence[Outcome], config: MineConfig, seed: int) -> list[Outcome]:
    """As many of the hard examples as `balance` and `most` allow, in the order of a hash of (seed, id).

    Balanced, each class gives as many as the smallest has. The classes take turns, so that `most` cuts them evenly.
    """
    by_id = {outcome.example.id: outcome for outcome in hard}
    ranked = [by_id[example.id] for example in subset([outcome.example for outcome in hard], len(hard), seed)]
    if config.balance == "none":
        return ranked[: config.most]
    groups: dict[str, list[Outcome]] = {}
    for outcome, name in zip(ranked, classes(ranked, config), strict=True):
        groups.setdefault(name, []).append(outcome)
    turns = zip(*(groups[name] for name in sorted(groups)), strict=False)
    return [outcome for turn in turns for outcome in turn][: config.most]


def write_examples(result: MineResult, selection: Selection) -> None:
    """Write the run's own examples, and what mining found among them, in our format.

    The second round reads the first one's choice from these files: of the sources, with the hard examples appended, it
    would hold out others, take another subset, and in dual mode train others to reason.
    """

    def row(example: Example, mode: Mode, **more: object) -> dict[str, object]:
        return example.to_json() | {"mode": mode.value} | more

    held_out = {example.id: example.to_json() for example, _ in selection.validation}
    files: dict[str, Iterable[dict[str, object]]] = {
        "train": (row(*pair) for pair in selection.train),
        "held_out": held_out.values(),
        "hard": (row(each.example, each.mode, right=each.right) for each in result.taken),
        "never_right": (row(each.example, each.mode, answers=each.texts) for each in result.never_right),
    }
    for name, rows in files.items():
        write_atomically(result.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
