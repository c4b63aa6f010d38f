"""Results for people and for programs. Whatever a text or a model says is shown as text and never interpreted."""

import json
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import TITLES
from jaxguard.guards.guard import CheckResult
from jaxguard.report.text import visible

_STYLES = {"harmful": "bold red", "unharmful": "bold green"}
_BEGINNING = 72


def render(result: CheckResult, example: Example | None = None) -> RenderableType:
    """A line for each question, the problems, and the reasoning; an example puts its id and beginning above."""
    width = max(len(TITLES[question]) for question in result.questions)
    parts: list[RenderableType] = []
    if example is not None:
        line = " ".join(visible(f"{result.id}: {example.prompt}").split())
        parts.append(Text(line if len(line) <= _BEGINNING else f"{line[:_BEGINNING]}…", style="bold"))
    for question in result.questions:
        word = getattr(result.verdict, question) or "None"
        verdict = Text(f"{TITLES[question]:<{width}}  ")
        verdict.append(f"{word:<10}", style=_STYLES.get(word, "bold"))
        probability = result.probabilities[question]
        parts.append(verdict.append("" if probability is None else f"  {probability:.3f}"))
    parts += [Text(visible(problem), style="yellow") for problem in result.problems]
    if result.reasoning:
        parts.append(Text("\n".join(f"  {line}" for line in visible(result.reasoning).splitlines()), style="dim"))
    return Group(*parts)


def json_line(result: CheckResult) -> str:
    """One JSON object, ASCII only; a question that does not apply is null."""
    tree: dict[str, Any] = {"id": result.id}
    for question in TITLES:
        tree[question] = getattr(result.verdict, question) if question in result.questions else None
    tree |= {
        "passes": result.passes,
        "probabilities": {q: None if p is None else round(p, 6) for q, p in result.probabilities.items()},
        "reasoning": result.reasoning,
        "problems": list(result.problems),
        "seconds": round(result.seconds, 3),
    }
    return json.dumps(tree)
