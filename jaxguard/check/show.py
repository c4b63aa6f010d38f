"""Verdicts for people and for programs. Whatever a text or a model says is shown as text and never interpreted."""

import json
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jaxguard.check.checking import Checked
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import TITLES
from jaxguard.report.text import visible

_STYLES = {"harmful": "bold red", "unharmful": "bold green"}
_BEGINNING = 72


def shown(found: Checked, example: Example | None = None) -> RenderableType:
    """A line for each question, what is wrong, and the reasoning; an example puts its id and beginning above."""
    width = max(len(TITLES[question]) for question in found.asked)
    parts: list[RenderableType] = []
    if example is not None:
        line = " ".join(visible(f"{found.id}: {example.prompt}").split())
        cut = line if len(line) <= _BEGINNING else f"{line[:_BEGINNING]}…"
        parts.append(Text(cut, style="bold"))
    for question in found.asked:
        word = getattr(found.verdict, question) or "None"
        verdict = Text(f"{TITLES[question]:<{width}}  ")
        verdict.append(f"{word:<10}", style=_STYLES.get(word, "bold"))
        probability = found.probabilities[question]
        parts.append(verdict.append("" if probability is None else f"  {probability:.3f}"))
    parts += [Text(visible(problem), style="yellow") for problem in found.problems]
    if found.reasoning:
        parts.append(Text("\n".join(f"  {line}" for line in visible(found.reasoning).splitlines()), style="dim"))
    return Group(*parts)


def json_line(found: Checked) -> str:
    """One JSON object, ASCII only; a question that was not asked is null."""
    tree: dict[str, Any] = {"id": found.id}
    for question in TITLES:
        tree[question] = getattr(found.verdict, question) if question in found.asked else None
    tree |= {
        "passes": found.passes,
        "probabilities": {q: None if p is None else round(p, 6) for q, p in found.probabilities.items()},
        "reasoning": found.reasoning,
        "problems": list(found.problems),
        "seconds": round(found.seconds, 3),
    }
    return json.dumps(tree)
