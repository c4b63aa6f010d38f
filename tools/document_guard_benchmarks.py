"""Rewrites the table of docs/guard_benchmarks.md from configs/benchmarks: `python tools/document_guard_benchmarks.py`."""

from pathlib import Path

from generated import rewrite
from jaxguard.data.benchmarks.loading import list_benchmarks
from jaxguard.data.benchmarks.schema import BenchmarkDefinition, Condition, Expected, read_benchmark
from jaxguard.data.format.dialogue import CHOICES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "guard_benchmarks.md"
GROUPS = {
    "safety_prompt": "Safety, prompts",
    "safety_response": "Safety, responses",
    "custom_policy": "Custom policies",
    "extra": "Extra",
}


def main() -> None:
    rewrite(DOCUMENT, table())


def table() -> str:
    """A table for each group, one row for each benchmark."""
    benchmarks = [read_benchmark(name) for name in list_benchmarks()]
    parts = []
    columns = ("name", "source", "rows", "positive when", "n (positive/negative)", "slices", "licence")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    for group, title in GROUPS.items():
        rows = [row(fields) for fields in benchmarks if fields.group == group]
        parts.append(f"### {title}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def row(fields: BenchmarkDefinition) -> str:
    drawn = [f"{fields.sample.size:,} drawn, seed {fields.sample.seed}"] if fields.sample else []
    cells = (
        f"`{fields.name}`",
        source(fields),
        "; ".join([*map(code, fields.where), *drawn]),
        "; ".join(f"{CHOICES[fields.question][0]}: {code(example.positive)}" for example in fields.examples),
        counts(fields.expected),
        ", ".join(part.name for part in fields.slices) or "none",
        fields.license,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") or "all" for cell in cells) + " |"


def source(fields: BenchmarkDefinition) -> str:
    at = fields.source
    path = at.path or (at.data and at.data.path)
    if path:
        return f"`{path}`" if path.startswith("configs/") else f"[your own file]({fields.url})"
    if at.data:
        return f"[`{at.data.kind}`]({fields.url}) {at.data.split}"
    where = at.config or at.file or (", ".join(at.splits) if at.splits != ("test",) else "")
    place = at.hub or (at.url or "").removeprefix("https://raw.githubusercontent.com/").split("/data/")[0]
    name = "/".join(place.split("/")[:2])
    return f"[{name}]({fields.url})" + (f" {where}" if where else "")


def code(condition: Condition) -> str:
    return f"`{condition}`"


def counts(expected: Expected) -> str:
    total = expected.total
    if expected.positive is None or expected.negative is None:
        return "not stated" if total is None else f"{total:,}"
    return f"{expected.positive + expected.negative:,} ({expected.positive:,}/{expected.negative:,})"


if __name__ == "__main__":
    main()
