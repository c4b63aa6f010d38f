"""Hard-example mining: the training examples as the trainer chose them, or others, the guard's answers, the hard ones.

select -> predict, storing every answer -> count the right ones -> choose -> write; reports quote no example.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig, MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import ABSENT, Mode, answers, questions
from jaxguard.data.inputs import check_inputs
from jaxguard.data.policies import Policy, Question, load_policy, policy_for
from jaxguard.data.prepare import (
    ExampleAndMode,
    Selection,
    assign_modes,
    conversation,
    load_sources,
    select,
    subset,
    usable,
)
from jaxguard.guards.loading import cache_key, checkpoint_of, examples_key, open_guard, open_predictions
from jaxguard.guards.protocol import Request
from jaxguard.report import Cell, Content, Drawing, Page, Section, Table, write_markdown
from jaxguard.report.figures import COLOURS, INK, save_figure, style
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder, write_atomically
from jaxguard.utils.progress import Progress
from jaxguard.utils.terminal import Console

PAPER_GENERATIONS, PAPER_ALWAYS_RIGHT = 4, 0.85
"""arXiv 2505.20087: so many of its training prompts are judged right in all of 4 answers."""


@dataclass(frozen=True)
class Answer:
    """A guard's answer to an example, with its tokens where they are wanted and known.

    It is right if it can be parsed and is right in every label.
    """

    text: str
    is_right: bool
    is_parsable: bool
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """An example with its mode, its labels ("prompt_harm harmful, response_harm unharmful"), and the answers to it."""

    example: Example
    mode: Mode
    labels: str
    answers: tuple[Answer, ...]

    @property
    def right(self) -> int:
        return sum(answer.is_right for answer in self.answers)

    @property
    def unparsable(self) -> int:
        return sum(not answer.is_parsable for answer in self.answers)


@dataclass(frozen=True)
class MineResult:
    """What mining a run found: the outcomes of all mined examples, those that are hard, and those of them that were taken."""

    name: str
    folder: Path
    settings: MineConfig
    outcomes: list[Outcome]
    hard: list[Outcome]
    taken: list[Outcome]

    @property
    def mined(self) -> str:
        """How many examples were mined, and of what."""
        return f"{len(self.outcomes):,} {'examples of mine.sources' if self.settings.sources else 'training examples'}"

    @property
    def never_right(self) -> list[Outcome]:
        """The examples that were right in no answer."""
        return [outcome for outcome in self.outcomes if not outcome.right]

    @property
    def right(self) -> list[int]:
        """Examples by number of right answers, from none to all."""
        counts = Counter(outcome.right for outcome in self.outcomes)
        return [counts[number] for number in range(self.settings.generations + 1)]

    @property
    def by(self) -> dict[str, dict[str, list[int]]]:
        """Mode, label, source and category -> value -> as `right`, the most frequent value first.

        An example counts for each of its categories.
        """
        views: dict[str, dict[str, list[int]]] = {"mode": {}, "label": {}, "source": {}, "category": {}}
        for outcome in self.outcomes:
            one_of_each = (outcome.mode.value,), (outcome.labels,), (outcome.example.source,)
            for groups, values in zip(views.values(), (*one_of_each, categories(outcome.example)), strict=True):
                for value in values:
                    groups.setdefault(value, [0] * (self.settings.generations + 1))[outcome.right] += 1
        by_size = {
            view: sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0])) for view, groups in views.items()
        }
        return {view: dict(groups) for view, groups in by_size.items()}

    @property
    def taken_by_class(self) -> dict[str, int]:
        """How many were taken of each class (labels or category)."""
        # Which category of several is the rarest must not depend on what was taken: classes are those of all hard examples.
        names = dict(zip((each.example.id for each in self.hard), classes(self.hard, self.settings), strict=True))
        return dict(sorted(Counter(names[each.example.id] for each in self.taken).items()))

    def to_json(self) -> dict[str, object]:
        """Plain JSON: examples by their ids, no path."""
        return {
            "name": self.name,
            **self.settings.model_dump(mode="json", include={"hard", "balance", "most"}),
            "examples": len(self.outcomes),
            "generations": self.settings.generations,
            "right": self.right,
            "unparsable": sum(outcome.unparsable for outcome in self.outcomes),
            "by": self.by,
            "num_hard": len(self.hard),
            "taken": self.taken_by_class,
            "paper": PAPER_ALWAYS_RIGHT,
            "hard_ids": [outcome.example.id for outcome in self.taken],
            "never_right_ids": [outcome.example.id for outcome in self.never_right],
        }


def check(config: Config) -> None:
    """Check what costs nothing to check: policy, local paths, and that the guard is trained."""
    check_inputs(config, "mine")
    checkpoint_of((config.mine or MineConfig()).guard, config)


def mine(config: Config) -> MineResult:
    """Find the examples that the run's guard judges right only sometimes, and write them into runs/NAME/mine.

    JaxguardError: there is no guard yet, the data cannot be read, or there are answers under other settings.
    """
    check(config)
    settings = config.mine or MineConfig()
    sampling = (config.evaluate or EvaluateConfig()).model_copy(
        # "benchmark" asks for the lines that have a label, as in training.
        update={"generations": settings.generations, "ask": "benchmark"}
    )
    key = asyncio.run(cache_key(settings.guard, config, sampling))
    policy, selection = load_policy(config.data.policy), select(config)
    folder = config.folder / "mine"
    with lock_folder(folder, "mining"):
        mined = to_mine(config, settings, policy, selection)
        outcomes = asyncio.run(predict_all(config, sampling, mined, policy, key))
        hard = [outcome for outcome in outcomes if outcome.right in settings.hard]
        result = MineResult(config.name, folder, settings, outcomes, hard, choose(hard, settings, config.seed))
        write_examples(result, selection)
        write_atomically(folder / "report.json", json.dumps(result.to_json(), indent=2) + "\n")
        write_markdown(folder / "report.md", page(result))
        draw(result, folder / "right.png")
    return result


def to_mine(config: Config, settings: MineConfig, policy: Policy, selection: Selection) -> list[ExampleAndMode]:
    """The examples that the run was trained on, or those of mine.sources, selected and with modes as in training."""
    if not settings.sources:
        return selection.train
    data = config.data
    examples = usable(load_sources(settings.sources, "mine")[0], "mine.sources", policy, data.mode, Counter())
    excluded = [*selection.validation, *(selection.train if settings.exclude_trained else ())]
    prompts = {conversation(example) for example, _ in excluded}
    examples = [example for example in examples if conversation(example) not in prompts]
    if not examples:
        raise JaxguardError("mine.sources: the run was trained on all of its prompts, or holds them out")
    if settings.subset is not None:
        examples = subset(examples, settings.subset, data.subset_seed)
    return list(zip(examples, assign_modes(examples, data.mode, data.dual_reasoning_share, config.seed), strict=True))


async def predict_all(
    config: Config, sampling: EvaluateConfig, mined: Sequence[ExampleAndMode], policy: Policy, key: dict[str, Any]
) -> list[Outcome]:
    """Every mined example with the guard's answers to it; what is on disk is not generated again."""
    settings = config.mine or MineConfig()
    tally: Counter[int] = Counter()
    outcomes: dict[str, Outcome] = {}

    def add(example: Example, mode: Mode, texts: Sequence[str]) -> None:
        outcomes[example.id] = outcome_of(example, mode, policy, texts)
        tally[outcomes[example.id].right] += 1

    with ExitStack() as stack:
        stores, requests = {}, {}
        for mode in Mode:
            if examples := [example for example, own in mined if own is mode]:
                path = config.folder / "mine/answers" / f"{mode}.jsonl"
                opened = open_predictions(path, key | examples_key(examples, policy), completions=True)
                stores[mode] = stack.enter_context(opened)
                stored = stores[mode].answers
                for example in examples:
                    if example.id in stored:
                        add(example, mode, stored[example.id].texts)
                waiting = (example for example in examples if example.id not in stored)
                requests[mode] = [Request(example, tuple(labels_of(example, policy)), mode) for example in waiting]
        if any(requests.values()):
            progress = Progress("mining", len(mined), tally.total(), Console(soft_wrap=True))
            stack.enter_context(progress)
            by_id = {example.id: example for example, _ in mined}
            logprobs = sampling.temperature == 1  # SGLang's are those after the temperature
            guard = open_guard(settings.guard, config, sampling, probabilities=False, logprobs=logprobs)
            async with guard as predict:
                for mode, unanswered in requests.items():
                    # What does not fit shows at once. Those of a batch begin alike, which is computed once, and are of like length.
                    unanswered.sort(key=lambda each: -len(each.example.prompt) - len(each.example.response or ""))
                    alike: dict[tuple[str | None, tuple[Question, ...], bool], list[Request]] = {}
                    for each in unanswered:
                        beginning = each.example.policy, each.questions, each.example.response is None
                        alike.setdefault(beginning, []).append(each)
                    async for prediction in predict(list(chain(*alike.values()))):
                        stores[mode].append(prediction)
                        add(by_id[prediction.example_id], mode, prediction.texts)
                        k, hard = settings.generations, sum(tally[right] for right in set(settings.hard))
                        share = f"right {k}/{k} {tally[k] / tally.total():.0%}"
                        progress.update(tally.total(), f"{share}  hard {hard:,}  never {tally[0]:,}")
    return [outcomes[example.id] for example, _ in mined]


def labels_of(example: Example, policy: Policy) -> dict[Question, str]:
    """The labels of an example, of all that its policy asks; a response that is not there is no label."""
    known = answers(example, questions(example, policy_for(example, policy)))
    return {question: word for question, word in known if word != ABSENT}


def outcome_of(
    example: Example,
    mode: Mode,
    policy: Policy,
    texts: Sequence[str],
    ids: Sequence[tuple[int, ...]] = (),
) -> Outcome:
    """Compare a guard's answers with the labels; an answer has a verdict line for each label, and is right if all of them are."""
    labels = labels_of(example, policy)
    answers = []
    for i, text in enumerate(texts):
        verdict = parse(text, labels, mode, example.response is not None)
        right = not verdict.problems and all(getattr(verdict, q) == word for q, word in labels.items())
        answers.append(Answer(text, right, not verdict.problems, ids[i] if ids else ()))
    joined = ", ".join(f"{question} {word}" for question, word in labels.items())
    return Outcome(example, mode, joined, tuple(answers))


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
    """Write the run's own examples, and what mining found, in our format.

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
        "never_right": (
            row(each.example, each.mode, answers=[answer.text for answer in each.answers])
            for each in result.never_right
        ),
        "examples": (row(each.example, each.mode, right=each.right) for each in result.outcomes),
    }
    for name, rows in files.items():
        write_atomically(result.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def classes(outcomes: Sequence[Outcome], config: MineConfig) -> list[str]:
    """The class of each: its labels, or its category; an example of several categories counts for the rarest of them."""
    if config.balance != "category":
        return [outcome.labels for outcome in outcomes]
    counts = Counter(category for outcome in outcomes for category in categories(outcome.example))
    return [min(categories(outcome.example), key=lambda name: (counts[name], name)) for outcome in outcomes]


def categories(example: Example) -> tuple[str, ...]:
    """Its categories, each once; having none is a category."""
    return tuple(dict.fromkeys(example.categories)) or ("(none)",)


def page(result: MineResult) -> Page:
    """The report as a page."""
    settings, right, examples = result.settings, result.right, len(result.outcomes)
    k, unparsable = settings.generations, sum(outcome.unparsable for outcome in result.outcomes)
    paper = f" In the paper it is {PAPER_ALWAYS_RIGHT:.0%}, of its own data." if k == PAPER_GENERATIONS else ""
    columns = ("examples", *(f"{number} of {k}" for number in range(k + 1)), "hard")
    views = []
    for name, groups in result.by.items():
        table = Table((name, *columns))
        for value, counts in groups.items():
            hard = sum(counts[number] for number in set(settings.hard))
            table.add(Cell(value, code=True), sum(counts), *counts, f"{hard / sum(counts):.1%}")
        about = "An example counts for each of its categories." if name == "category" else None
        views.append(Section(f"By {name}", [about, table]))
    taken = [(Cell(name, code=True), count) for name, count in result.taken_by_class.items()]
    choice: list[Content] = [
        f"Hard is what was right {' or '.join(map(str, settings.hard))} times: {len(result.hard):,} examples. Taken: "
        f"{len(result.taken):,} (balance {settings.balance}, most {settings.most or 'all'}), in hard.jsonl.",
        Table.of(("class", "taken"), taken),
        f"Never right: {right[0]:,}, in never_right.jsonl. Their labels may be wrong; look at them."
        f"{'' if settings.sources else ' They are still in train.jsonl.'}",
    ]
    parts: list[Content] = [
        f"The guard answered each of {result.mined} {k} times. An answer is right if every label of "
        "the example is; an unparsable one is not.",
        Drawing("Examples by number of right answers", file="right.png"),
        right_table(result),
        f"Always right: {right[k] / examples:.1%}.{paper} Unparsable answers: {unparsable:,} of {examples * k:,}.",
        Section("What was taken", choice),
        *views,
    ]
    return Page(f"Hard examples of {result.name}", parts)


def right_table(result: MineResult) -> Table:
    """Examples by number of right answers."""
    k, total = result.settings.generations, len(result.outcomes)
    rows = [(f"{number} of {k}", count, f"{count / total:.1%}") for number, count in enumerate(result.right)]
    return Table.of(("right answers", "examples", "share"), rows, result.mined)


@style()
def draw(result: MineResult, picture: Path) -> None:
    """A bar for each number of right answers, the hard ones in another colour."""
    k, right = result.settings.generations, result.right
    figure = Figure(figsize=(5.6, 3.4), dpi=120)
    axes = figure.add_subplot()
    for hard, colour, label in ((False, COLOURS[0], None), (True, COLOURS[1], "hard")):
        numbers = [number for number in range(k + 1) if (number in result.settings.hard) is hard]
        shares = [right[number] / len(result.outcomes) for number in numbers]
        bars = axes.bar(numbers, shares, color=colour, label=label)
        axes.bar_label(bars, [f"{right[number]:,}" for number in numbers], fontsize=8)
    if k == PAPER_GENERATIONS:
        label = "paper, always right"
        axes.hlines(PAPER_ALWAYS_RIGHT, k - 0.45, k + 0.45, colors=INK, linestyles="dashed", label=label)
    axes.set(xlabel=f"right answers of {k}", ylabel="examples", xticks=range(k + 1), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left")
    save_figure(figure, picture)
