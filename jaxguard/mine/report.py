"""The counts of mining: for people, for programs, and as a figure. They quote no example."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxguard.config.evaluate import MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.report import Cell, Drawing, Page, Section, Table, write_markdown
from jaxguard.report.figures import COLOURS, INK, save_figure, style
from jaxguard.utils.files import write_atomically

PAPER_GENERATIONS, PAPER_ALWAYS_RIGHT = 4, 0.85
"""arXiv 2505.20087: so many of its training prompts are judged right in all of 4 answers."""
NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Outcome:
    """A training example and the guard's answers to it.

    Attributes:
        example, mode: as trained.
        labels: question by question: "prompt_harm harmful, response_harm unharmful".
        texts: the answers.
        right: how many of them agree with every label.
        unparsable: how many of the others are unparsable.
    """

    example: Example
    mode: Mode
    labels: str
    texts: tuple[str, ...]
    right: int
    unparsable: int


@dataclass(frozen=True)
class MineResult:
    """What mining found.

    Attributes:
        name: the run's.
        folder: where its files are.
        settings: what is hard, and how much of it is taken.
        outcomes: of all training examples.
        hard: those that are hard.
        taken: those of them that were taken.
    """

    name: str
    folder: Path
    settings: MineConfig
    outcomes: list[Outcome]
    hard: list[Outcome]
    taken: list[Outcome]

    @property
    def never_right(self) -> list[Outcome]:
        """The examples that were right in no answer."""
        return [outcome for outcome in self.outcomes if not outcome.right]

    @property
    def unparsable(self) -> int:
        """Unparsable answers, of all."""
        return sum(outcome.unparsable for outcome in self.outcomes)

    @property
    def right(self) -> list[int]:
        """Examples by number of right answers, from none to all."""
        counts = Counter(outcome.right for outcome in self.outcomes)
        return [counts[number] for number in range(self.settings.generations + 1)]

    @property
    def by(self) -> dict[str, dict[str, list[int]]]:
        """Mode, label, source and category -> value -> as `right`; an example counts for each of its categories."""
        return {
            "mode": self.counts(lambda outcome: (outcome.mode.value,)),
            "label": self.counts(lambda outcome: (outcome.labels,)),
            "source": self.counts(lambda outcome: (outcome.example.source,)),
            "category": self.counts(lambda outcome: categories(outcome.example)),
        }

    @property
    def taken_by_class(self) -> dict[str, int]:
        """How many were taken of each class (labels or category)."""
        # Which category of several is the rarest must not depend on what was taken: classes are those of all hard examples.
        names = dict(zip((each.example.id for each in self.hard), classes(self.hard, self.settings), strict=True))
        return dict(sorted(Counter(names[each.example.id] for each in self.taken).items()))

    def counts(self, values: Callable[[Outcome], Iterable[str]]) -> dict[str, list[int]]:
        """Value -> examples that have it, by number of right answers; the most frequent value first."""
        groups: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for outcome in self.outcomes:
            for value in values(outcome):
                groups[value][outcome.right] += 1
        ordered = sorted(groups, key=lambda value: (-groups[value].total(), value))
        return {value: [groups[value][right] for right in range(self.settings.generations + 1)] for value in ordered}

    def to_json(self) -> dict[str, object]:
        """Plain JSON: examples by their ids, no path."""
        return {
            "name": self.name,
            **self.settings.model_dump(mode="json", include={"hard", "balance", "most"}),
            "examples": len(self.outcomes),
            "generations": self.settings.generations,
            "right": self.right,
            "unparsable": self.unparsable,
            "by": self.by,
            "num_hard": len(self.hard),
            "taken": self.taken_by_class,
            "paper": PAPER_ALWAYS_RIGHT,
            "hard_ids": [outcome.example.id for outcome in self.taken],
            "never_right_ids": [outcome.example.id for outcome in self.never_right],
        }


def classes(outcomes: Sequence[Outcome], config: MineConfig) -> list[str]:
    """The class of each: its labels, or its category; an example of several categories counts for the rarest of them."""
    if config.balance != "category":
        return [outcome.labels for outcome in outcomes]
    counts = Counter(category for outcome in outcomes for category in categories(outcome.example))
    return [min(categories(outcome.example), key=lambda name: (counts[name], name)) for outcome in outcomes]


def categories(example: Example) -> tuple[str, ...]:
    """Its categories, each once; having none is a category."""
    return tuple(dict.fromkeys(example.categories)) or (NO_CATEGORY,)


def write_report(result: MineResult) -> None:
    """Write report.json, report.md and right.png into the result's folder."""
    write_atomically(result.folder / "report.json", json.dumps(result.to_json(), indent=2) + "\n")
    write_markdown(result.folder / "report.md", page(result))
    draw(result, result.folder / "right.png")


def page(result: MineResult) -> Page:
    """The report as a page."""
    settings, right, examples = result.settings, result.right, len(result.outcomes)
    k = settings.generations
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
    return Page(
        f"Hard examples of {result.name}",
        [
            f"The guard answered each of its {examples:,} training examples {k} times. An answer is right if every label of "
            "the example is; an unparsable one is not.",
            Drawing("Examples by number of right answers", file="right.png"),
            right_table(result),
            f"Always right: {right[k] / examples:.1%}.{paper} Unparsable answers: {result.unparsable:,} of {examples * k:,}.",
            Section(
                "What was taken",
                [
                    f"Hard is what was right {' or '.join(map(str, settings.hard))} times: {len(result.hard):,} examples. Taken: "
                    f"{len(result.taken):,} (balance {settings.balance}, most {settings.most or 'all'}), in hard.jsonl.",
                    Table.of(("class", "taken"), taken),
                    f"Never right: {right[0]:,}, in never_right.jsonl. Their labels may be wrong; look at them. They are still in "
                    "train.jsonl.",
                ],
            ),
            *views,
        ],
    )


def right_table(result: MineResult) -> Table:
    """Examples by number of right answers."""
    k, total = result.settings.generations, len(result.outcomes)
    rows = [(f"{number} of {k}", count, f"{count / total:.1%}") for number, count in enumerate(result.right)]
    return Table.of(("right answers", "examples", "share"), rows, f"{total:,} training examples")


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
        ends = {"xmin": k - 0.45, "xmax": k + 0.45}
        axes.hlines(PAPER_ALWAYS_RIGHT, **ends, colors=INK, linestyles="dashed", label="paper, always right")
    axes.set_xlabel(f"right answers of {k}")
    axes.set_ylabel("training examples")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks(range(k + 1))
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left")
    save_figure(figure, picture)
