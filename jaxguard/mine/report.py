"""What mining found, in numbers: for people, for programs, and as a picture. It quotes no example."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.text import Text

from jaxguard.config import Config
from jaxguard.config.mine import MineConfig
from jaxguard.mine.choose import Tried, categories, classes
from jaxguard.report import Cell, Drawing, Page, Section, Table, write_markdown
from jaxguard.report.figures import COLOURS, INK, save_png, style
from jaxguard.utils.files import write_atomically

PAPER_GENERATIONS, PAPER_ALWAYS_RIGHT = 4, 0.85
"""arXiv 2505.20087: so many of its training prompts are judged right in all of 4 answers."""

Counts = dict[str, list[int]]
"""Value -> examples by number of right answers, from none to all."""


@dataclass(frozen=True)
class Report:
    """All that report.md says, and the ids besides.

    Attributes:
        name: the run's.
        difficult, balance, most: of the mine section.
        examples: how many were asked about.
        generations: answers to each.
        right: examples by number of right answers, from none to all.
        unreadable: answers that could not be read, of all.
        by: "mode", "label", "source" and "category" -> value -> as `right`; an example counts for each of its categories.
        found: difficult examples.
        taken: how many of them were taken, by class (labels or category).
        paper: the share of examples that are right in all of 4 answers there.
        difficult_ids, never_right_ids: those taken, and those that were never judged right.
    """

    name: str
    difficult: tuple[int, ...]
    balance: str
    most: int | None
    examples: int
    generations: int
    right: list[int]
    unreadable: int
    by: dict[str, Counts]
    found: int
    taken: dict[str, int]
    paper: float
    difficult_ids: list[str]
    never_right_ids: list[str]


def write_report(
    folder: Path, config: Config, found: list[Tried], candidates: list[Tried], taken: list[Tried], console: Console
) -> None:
    """Write report.json, report.md and right.png into the folder, and show the counts."""
    told = summarise(config, found, candidates, taken)
    write_atomically(folder / "report.json", json.dumps(asdict(told), indent=2) + "\n")
    write_markdown(folder / "report.md", page(told))
    draw(told, folder / "right.png")
    console.print(right_table(told).rich())
    number = len(told.difficult_ids)
    console.print(Text(f"{number:,} difficult examples: {folder / 'difficult.jsonl'}"))
    console.print(Text(f"{len(told.never_right_ids):,} never right: {folder / 'never_right.jsonl'}"))
    console.print(Text(f"report: {folder / 'report.md'}"))


def summarise(config: Config, found: list[Tried], candidates: list[Tried], taken: list[Tried]) -> Report:
    """Count."""
    settings = config.mine or MineConfig()
    k = settings.generations
    views: dict[str, Callable[[Tried], Iterable[str]]] = {
        "mode": lambda one: (one.mode.value,),
        "label": lambda one: (one.labels,),
        "source": lambda one: (one.example.source,),
        "category": lambda one: categories(one.example),
    }
    # Classes are those of all candidates: which category of several is the rarest must not depend on what was taken.
    names = dict(zip((one.example.id for one in candidates), classes(candidates, settings), strict=True))
    return Report(
        name=config.name,
        difficult=settings.difficult,
        balance=settings.balance,
        most=settings.most,
        examples=len(found),
        generations=k,
        right=_by_right(found, k),
        unreadable=sum(one.unreadable for one in found),
        by={name: _table(found, view, k) for name, view in views.items()},
        found=len(candidates),
        taken=dict(sorted(Counter(names[one.example.id] for one in taken).items())),
        paper=PAPER_ALWAYS_RIGHT,
        difficult_ids=[one.example.id for one in taken],
        never_right_ids=[one.example.id for one in found if not one.right],
    )


def _by_right(some: Iterable[Tried], k: int) -> list[int]:
    counts = Counter(one.right for one in some)
    return [counts[right] for right in range(k + 1)]


def _table(found: Sequence[Tried], view: Callable[[Tried], Iterable[str]], k: int) -> Counts:
    groups: dict[str, list[Tried]] = {}
    for one in found:
        for value in view(one):
            groups.setdefault(value, []).append(one)
    largest_first = sorted(groups, key=lambda value: (-len(groups[value]), value))
    return {value: _by_right(groups[value], k) for value in largest_first}


def page(told: Report) -> Page:
    """The report as a page."""
    k = told.generations
    paper = f" In the paper it is {told.paper:.0%}, of its own data." if k == PAPER_GENERATIONS else ""
    columns = ("examples", *(f"{right} of {k}" for right in range(k + 1)), "difficult")
    numbers = " or ".join(str(right) for right in told.difficult)
    views = []
    for name, groups in told.by.items():
        rows = [[Cell(value, code=True), *_counted(right, told)] for value, right in groups.items()]
        about = "An example counts for each of its categories." if name == "category" else None
        views.append(Section(f"By {name}", [about, Table.of((name, *columns), rows)]))
    taken = [[Cell(name, code=True), count] for name, count in told.taken.items()]
    return Page(
        f"Difficult samples of {told.name}",
        [
            f"The guard answered each of its {told.examples:,} training examples {k} times. An answer is right if every label "
            "of the example is; an unparsable one is not.",
            Drawing("Examples by number of right answers", file="right.png"),
            right_table(told),
            f"Always right: {told.right[k] / told.examples:.1%}.{paper} Unparsable answers: {told.unreadable:,} of "
            f"{told.examples * k:,}.",
            Section(
                "What was taken",
                [
                    f"Difficult is what was right {numbers} times: {told.found:,} examples. Taken: "
                    f"{len(told.difficult_ids):,} (balance {told.balance}, most {told.most or 'all'}), in difficult.jsonl.",
                    Table.of(("class", "taken"), taken),
                    f"Never right: {told.right[0]:,}, in never_right.jsonl. Their labels may be wrong; look at them. They are "
                    "still in train.jsonl.",
                ],
            ),
            *views,
        ],
    )


def right_table(told: Report) -> Table:
    """Examples by number of right answers."""
    rows = [
        (f"{right} of {told.generations}", count, f"{count / told.examples:.1%}")
        for right, count in enumerate(told.right)
    ]
    return Table.of(("right answers", "examples", "share"), rows, f"{told.examples:,} training examples")


def _counted(right: Sequence[int], told: Report) -> list[int | str]:
    difficult = sum(right[number] for number in set(told.difficult))
    return [sum(right), *right, f"{difficult / sum(right):.1%}"]


@style()
def draw(told: Report, picture: Path) -> None:
    """A bar for each number of right answers, the difficult ones in another colour."""
    shares = [count / told.examples for count in told.right]
    figure = Figure(figsize=(5.6, 3.4), dpi=120)
    axes = figure.add_subplot()
    for difficult, colour, label in ((False, COLOURS[0], None), (True, COLOURS[1], "difficult")):
        numbers = [right for right in range(len(shares)) if (right in told.difficult) is difficult]
        bars = axes.bar(numbers, [shares[right] for right in numbers], color=colour, label=label)
        axes.bar_label(bars, [f"{told.right[right]:,}" for right in numbers], fontsize=8)
    if told.generations == PAPER_GENERATIONS:
        k = told.generations
        axes.hlines(told.paper, k - 0.45, k + 0.45, colors=INK, linestyles="dashed", label="paper, always right")
    axes.set_xlabel(f"right answers of {told.generations}")
    axes.set_ylabel("training examples")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks(range(len(shares)))
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left")
    save_png(figure, picture)
