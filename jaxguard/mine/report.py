"""The counts of mining: for people, for programs, and as a figure. They quote no example."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxguard.config import Config
from jaxguard.config.evaluate import MineConfig
from jaxguard.data.examples import Example
from jaxguard.mine.choose import Outcome, categories, classes
from jaxguard.report import Cell, Drawing, Page, Section, Table, write_markdown
from jaxguard.report.figures import COLOURS, INK, save_figure, style
from jaxguard.utils.files import write_atomically

PAPER_GENERATIONS, PAPER_ALWAYS_RIGHT = 4, 0.85
"""arXiv 2505.20087: so many of its training prompts are judged right in all of 4 answers."""

Counts = dict[str, list[int]]
"""Value -> examples by number of right answers, from none to all."""


@dataclass(frozen=True)
class MineResult:
    """What mining found.

    Attributes:
        name: the run's.
        folder: where its files are.
        hard: numbers of right answers that make an example hard.
        balance, most: how hard examples are taken.
        examples: how many were predicted.
        generations: answers to each.
        right: examples by number of right answers, from none to all.
        unparsable: unparsable answers, of all.
        by: "mode", "label", "source" and "category" -> value -> as `right`; an example counts for each of its categories.
        found: hard examples.
        taken: how many of them were taken, by class (labels or category).
        paper: the share of examples that are right in all of 4 answers there.
        hard_examples: those taken.
        never_right: the examples that were right in no answer.
    """

    name: str
    folder: Path
    hard: tuple[int, ...]
    balance: str
    most: int | None
    examples: int
    generations: int
    right: list[int]
    unparsable: int
    by: dict[str, Counts]
    found: int
    taken: dict[str, int]
    paper: float
    hard_examples: list[Example]
    never_right: list[Example]

    def to_json(self) -> dict[str, object]:
        """Plain JSON: examples by their ids, no path."""
        tree = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "folder"}
        ids = {
            "hard_ids": [example.id for example in tree.pop("hard_examples")],
            "never_right_ids": [example.id for example in tree.pop("never_right")],
        }
        return tree | ids


def summarize(config: Config, outcomes: list[Outcome], hard: list[Outcome], taken: list[Outcome]) -> MineResult:
    """Count.

    Args:
        config: the run's.
        outcomes: all training examples.
        hard: the hard ones.
        taken: those of them that were taken.
    """
    settings = config.mine or MineConfig()
    k = settings.generations
    views: dict[str, Callable[[Outcome], Iterable[str]]] = {
        "mode": lambda outcome: (outcome.mode.value,),
        "label": lambda outcome: (outcome.labels,),
        "source": lambda outcome: (outcome.example.source,),
        "category": lambda outcome: categories(outcome.example),
    }
    # Classes are those of all hard examples: which category of several is the rarest must not depend on what was taken.
    names = dict(zip((outcome.example.id for outcome in hard), classes(hard, settings), strict=True))
    return MineResult(
        name=config.name,
        folder=config.folder / "mine",
        hard=settings.hard,
        balance=settings.balance,
        most=settings.most,
        examples=len(outcomes),
        generations=k,
        right=_by_right(outcomes, k),
        unparsable=sum(outcome.unparsable for outcome in outcomes),
        by={name: _groups(outcomes, view, k) for name, view in views.items()},
        found=len(hard),
        taken=dict(sorted(Counter(names[outcome.example.id] for outcome in taken).items())),
        paper=PAPER_ALWAYS_RIGHT,
        hard_examples=[outcome.example for outcome in taken],
        never_right=[outcome.example for outcome in outcomes if not outcome.right],
    )


def write_report(folder: Path, result: MineResult) -> None:
    """Write report.json, report.md and right.png into the folder."""
    write_atomically(folder / "report.json", json.dumps(result.to_json(), indent=2) + "\n")
    write_markdown(folder / "report.md", page(result))
    draw(result, folder / "right.png")


def _by_right(outcomes: Iterable[Outcome], k: int) -> list[int]:
    counts = Counter(outcome.right for outcome in outcomes)
    return [counts[right] for right in range(k + 1)]


def _groups(outcomes: Sequence[Outcome], view: Callable[[Outcome], Iterable[str]], k: int) -> Counts:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for value in view(outcome):
            groups.setdefault(value, []).append(outcome)
    largest_first = sorted(groups, key=lambda value: (-len(groups[value]), value))
    return {value: _by_right(groups[value], k) for value in largest_first}


def page(result: MineResult) -> Page:
    """The report as a page."""
    k = result.generations
    paper = f" In the paper it is {result.paper:.0%}, of its own data." if k == PAPER_GENERATIONS else ""
    columns = ("examples", *(f"{right} of {k}" for right in range(k + 1)), "hard")
    numbers = " or ".join(str(right) for right in result.hard)
    views = []
    for name, groups in result.by.items():
        rows = [[Cell(value, code=True), *_counted(right, result)] for value, right in groups.items()]
        about = "An example counts for each of its categories." if name == "category" else None
        views.append(Section(f"By {name}", [about, Table.of((name, *columns), rows)]))
    taken = [(Cell(name, code=True), count) for name, count in result.taken.items()]
    return Page(
        f"Hard examples of {result.name}",
        [
            f"The guard answered each of its {result.examples:,} training examples {k} times. An answer is right if every label "
            "of the example is; an unparsable one is not.",
            Drawing("Examples by number of right answers", file="right.png"),
            right_table(result),
            f"Always right: {result.right[k] / result.examples:.1%}.{paper} Unparsable answers: {result.unparsable:,} of "
            f"{result.examples * k:,}.",
            Section(
                "What was taken",
                [
                    f"Hard is what was right {numbers} times: {result.found:,} examples. Taken: "
                    f"{len(result.hard_examples):,} (balance {result.balance}, most {result.most or 'all'}), in hard.jsonl.",
                    Table.of(("class", "taken"), taken),
                    f"Never right: {result.right[0]:,}, in never_right.jsonl. Their labels may be wrong; look at them. They are "
                    "still in train.jsonl.",
                ],
            ),
            *views,
        ],
    )


def right_table(result: MineResult) -> Table:
    """Examples by number of right answers."""
    rows = [
        (f"{right} of {result.generations}", count, f"{count / result.examples:.1%}")
        for right, count in enumerate(result.right)
    ]
    return Table.of(("right answers", "examples", "share"), rows, f"{result.examples:,} training examples")


def _counted(right: Sequence[int], result: MineResult) -> list[int | str]:
    hard = sum(right[number] for number in set(result.hard))
    return [sum(right), *right, f"{hard / sum(right):.1%}"]


@style()
def draw(result: MineResult, picture: Path) -> None:
    """A bar for each number of right answers, the hard ones in another colour."""
    shares = [count / result.examples for count in result.right]
    figure = Figure(figsize=(5.6, 3.4), dpi=120)
    axes = figure.add_subplot()
    for hard, colour, label in ((False, COLOURS[0], None), (True, COLOURS[1], "hard")):
        numbers = [right for right in range(len(shares)) if (right in result.hard) is hard]
        bars = axes.bar(numbers, [shares[right] for right in numbers], color=colour, label=label)
        axes.bar_label(bars, [f"{result.right[right]:,}" for right in numbers], fontsize=8)
    if result.generations == PAPER_GENERATIONS:
        k = result.generations
        axes.hlines(result.paper, k - 0.45, k + 0.45, colors=INK, linestyles="dashed", label="paper, always right")
    axes.set_xlabel(f"right answers of {result.generations}")
    axes.set_ylabel("training examples")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks(range(len(shares)))
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left")
    save_figure(figure, picture)
