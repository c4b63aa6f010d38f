"""A run's rollouts as one HTML page: curves, and the same example's answers over time.

What a model wrote is escaped and stays hidden until it is opened: much of it is offensive.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from jaxguard.data.policies import Question
from jaxguard.reinforce.sampling import read_answers
from jaxguard.report import Content, Details, Drawing, Page, Quote, Section, Table, write_page
from jaxguard.report.figures import inline_svg
from jaxguard.report.text import DASH
from jaxguard.train.curves import curves_figure
from jaxguard.train.logging import read_metrics

SHOWN = {
    "reward": "Reward",
    "right": "Right answers",
    "no_verdict": "Answers without a verdict",
    "false_positive_rate": "False positives, of harmless labels",
    "false_negative_rate": "False negatives, of harmful labels",
    "groups_with_signal": "Groups whose rewards differ",
    "answer_tokens": "Tokens of an answer",
    "entropy": "Entropy of a token (nats)",
}
"""What is logged of rollouts, and its name on the page."""
MOST_EXAMPLES = 20
"""Examples whose answers are on the page."""


def write_rollouts_page(run: Path, name: str) -> Path:
    """Write the page of a run's folder, rollouts.html, from metrics.jsonl and rollouts/."""
    records = [record for record in read_metrics(run / "metrics.jsonl") if "rollouts/reward" in record]
    path = run / "rollouts.html"
    tenth = max(1, len(records) // 10)
    table = Table(("", "first tenth", "last tenth"), "Rollouts")
    for key, title in SHOWN.items():
        means = (_mean(part, f"rollouts/{key}") for part in (records[:tenth], records[-tenth:]))
        table.add(title, *(DASH if mean is None else mean for mean in means))
    content: list[Content] = [table]
    figure: Figure | None = curves_figure(run / "metrics.jsonl", "")
    if figure is not None:
        content.append(Drawing("", inline_svg(figure, "curves", "The run's curves")))
    content.append(Section("The same examples over time", _examples(histories(run / "rollouts"))))
    write_page(path, Page(f"Rollouts of {name}", content))
    return path


class Shown(NamedTuple):
    """What the page has of an answer."""

    right: bool
    verdict: Mapping[Question, str] | None
    reward: float
    tokens: int
    text: str


def histories(folder: Path) -> dict[str, dict[int, list[Shown]]]:
    """Read the answers to each example: id -> step -> answers."""
    found: dict[str, dict[int, list[Shown]]] = {}
    for path in sorted(folder.glob("[0-9]*.jsonl")):
        for each in read_answers(path) or []:
            shown = Shown(each.right, each.verdict, each.reward, len(each.ids), each.text)
            found.setdefault(each.example_id, {}).setdefault(int(path.stem), []).append(shown)
    return found


def hardest(found: Mapping[str, Mapping[int, Sequence[Shown]]], most: int = MOST_EXAMPLES) -> list[str]:
    """Return the examples that were answered at most moments, and of them those whose first answers were least right."""

    def rank(example_id: str) -> tuple[float, float, str]:
        answers = found[example_id]
        return -len(answers), _share_right(answers[min(answers)]), example_id

    return sorted(found, key=rank)[:most]


def _examples(found: Mapping[str, Mapping[int, Sequence[Shown]]]) -> list[Content]:
    content: list[Content] = [
        f"Of {len(found):,} examples, those that were answered most often, and of them the ones that the model got wrong first. "
        "Their texts may be offensive; they are shown when you open them."
    ]
    for example_id in hardest(found):
        steps = found[example_id]
        shares = " → ".join(f"{_share_right(answers):.0%}" for _, answers in sorted(steps.items()))
        content.append(Details(f"{example_id}: right {shares}", list(_moments(steps))))
    return content


def _moments(steps: Mapping[int, Sequence[Shown]]) -> Iterable[Content]:
    for step, answers in sorted(steps.items()):
        table = Table(("answer", "verdict", "reward", "tokens"), f"Step {step}", left=2)
        for number, answer in enumerate(answers, start=1):
            verdict = ", ".join(answer.verdict.values()) if answer.verdict else "none"
            table.add(f"{number}{' ✓' if answer.right else ''}", verdict, answer.reward, answer.tokens)
        yield f"Step {step}"
        yield table
        best = max(answers, key=lambda answer: answer.reward)
        if best.text:
            yield Quote("The best-rewarded answer", best.text)


def _share_right(answers: Sequence[Shown]) -> float:
    return sum(answer.right for answer in answers) / len(answers)


def _mean(records: Sequence[Mapping[str, float]], key: str) -> float | None:
    values = [record[key] for record in records if key in record]
    return sum(values) / len(values) if values else None
