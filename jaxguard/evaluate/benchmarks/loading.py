"""Benchmarks: labelled examples that a guard is scored on, each described by a YAML file in configs/benchmarks.

rows -> where -> sample -> examples with the label of one question -> slices, and counts beside the published ones
"""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxguard.config.lookup import names, nearest
from jaxguard.data.cells import Skip, objects, text, transcript
from jaxguard.data.examples import Example
from jaxguard.data.files import Row, Table
from jaxguard.data.format.dialogue import CHOICES, LABEL
from jaxguard.data.policies import Question, load_policy
from jaxguard.data.sources import digest, unique_ids
from jaxguard.evaluate.benchmarks.rows import read_rows
from jaxguard.evaluate.benchmarks.schema import (
    BENCHMARK_FOLDER,
    BenchmarkDefinition,
    BenchmarkPolicy,
    ExampleColumns,
    Group,
    plain,
    read_benchmark,
)
from jaxguard.utils.errors import JaxguardError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """Labelled examples and their description.

    Attributes:
        name, title, group, question: as in the YAML file.
        examples: with the label of `question` and no other; ids are unique, and the same at every loading.
        slices: slice -> value -> ids of the examples that have it.
        counts, expected: "positive", "negative" and "total", as read and as published (None: unknown).
        skipped: reason -> how many rows, or parts of rows, became no example.
        origin: where the rows were read, with hashes; for manifests.
        license, citation, url: of the data.
    """

    name: str
    title: str
    group: Group
    question: Question
    examples: tuple[Example, ...]
    slices: dict[str, dict[str, frozenset[str]]]
    counts: dict[str, int]
    expected: dict[str, int | None]
    skipped: Counter[str]
    origin: dict[str, Any]
    license: str
    citation: str
    url: str


def load_benchmark(name_or_path: str, local: Path | None = None, folder: Path = BENCHMARK_FOLDER) -> Benchmark:
    """Read a benchmark by name (a file in `folder`) or by the path of its YAML file.

    Counts other than the published ones are logged as a warning.

    Args:
        name_or_path: which.
        local: a file or folder with the source's columns, read instead of the source.
        folder: where names are looked up.

    Raises:
        JaxguardError: the YAML or the rows are malformed, a column is absent, a row is neither positive nor negative, or
            no example is left.
    """
    definition = read_benchmark(name_or_path, folder)
    table, skipped = read_rows(definition.source, definition.name, local)
    source = str(local or definition.source.name)
    _check_columns(definition, table, source)
    _check_policy(definition)
    pairs = [
        (example, row)
        for location, row in _select(definition, table, skipped)
        for example in _examples(definition, row, location, skipped)
    ]
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "it is empty"
        raise JaxguardError(f"{source}: no example for benchmark {definition.name!r} ({reasons})")
    examples = unique_ids([example for example, _ in pairs])
    counts = _counts(definition.question, examples)
    expected = definition.expected.model_dump()
    _compare(definition.name, CHOICES[definition.question], counts, expected)
    return Benchmark(
        name=definition.name,
        title=definition.title,
        group=definition.group,
        question=definition.question,
        examples=tuple(examples),
        slices=_slices(definition, zip(examples, (row for _, row in pairs), strict=True)),
        counts=counts,
        expected=expected,
        skipped=skipped,
        origin={**table.origin, "examples_sha256": digest(examples)},
        license=definition.license,
        citation=definition.citation,
        url=definition.url,
    )


def list_benchmarks(folder: Path = BENCHMARK_FOLDER) -> tuple[str, ...]:
    """The names that `load_benchmark` knows in a folder."""
    return tuple(name for name in names(folder) if "/" not in name)


def _check_columns(definition: BenchmarkDefinition, table: Table, source: str) -> None:
    if not table.rows:
        raise JaxguardError(f"{source}: no row for benchmark {definition.name!r}")
    for field, column in _columns(definition):
        if column not in table.columns:
            hint = nearest(column, table.columns)
            if column == "split" and len(definition.source.splits) > 1:
                hint = f"give a folder with a file for each of {', '.join(definition.source.splits)}; "
            raise JaxguardError(
                f"benchmark {definition.name!r}: {field}: {source} has no column {column!r}; {hint}"
                f"it has: {', '.join(table.columns)}"
            )


def _columns(definition: BenchmarkDefinition) -> Iterator[tuple[str, str]]:
    """(field, column that it names), for every column that is named."""
    if definition.id:
        yield "id", definition.id
    for i, condition in enumerate(definition.where):
        yield from ((f"where.{i}", column) for column in condition.names)
    for i, part in enumerate(definition.examples):
        yield f"examples.{i}.prompt", part.prompt
        if part.response:
            yield f"examples.{i}.response", part.response
        yield from ((f"examples.{i}.positive", column) for column in part.positive.names)
        yield from ((f"examples.{i}.negative", column) for column in (part.negative.names if part.negative else ()))
    if definition.policy and definition.policy.column and not definition.policy.optional:
        yield "policy.column", definition.policy.column
    for i, part_of in enumerate(definition.slices):
        yield from ((f"slices.{i}", column) for column in part_of.names)


def _check_policy(definition: BenchmarkDefinition) -> None:
    """A policy that is named for all examples must exist, and ask the benchmark's question."""
    if definition.policy is None or definition.policy.name is None:
        return
    policy = load_policy(definition.policy.name)
    if definition.question not in policy.asks:
        raise JaxguardError(
            f"benchmark {definition.name!r} asks {definition.question}, but its policy {policy.name!r} asks only "
            f"{', '.join(policy.asks)}"
        )


def _select(definition: BenchmarkDefinition, table: Table, skipped: Counter[str]) -> list[tuple[str, Row]]:
    """The rows that count. Of one that fails several conditions the first is the reason."""
    rows = []
    for location, row in table.rows:
        failed = next((condition for condition in definition.where if not condition.holds(row)), None)
        if failed is None:
            rows.append((location, row))
        else:
            skipped[f"not where {failed}"] += 1
    if definition.sample is None or len(rows) <= definition.sample.size:
        return rows
    skipped["not in the sample"] += len(rows) - definition.sample.size
    chosen = random.Random(definition.sample.seed).sample(range(len(rows)), definition.sample.size)  # noqa: S311
    return [rows[i] for i in chosen]


def _examples(definition: BenchmarkDefinition, row: Row, location: str, skipped: Counter[str]) -> Iterator[Example]:
    for part in definition.examples:
        try:
            yield _example(definition, part, row, location)
        except Skip as reason:
            skipped[str(reason)] += 1


def _example(definition: BenchmarkDefinition, part: ExampleColumns, row: Row, location: str) -> Example:
    question = definition.question
    prompt = _prompt(row, part.prompt, location)
    if prompt is None or not prompt.strip():
        raise Skip("empty prompt")
    response = text(row, part.response, location) if part.response else None
    if question != "prompt_harm" and response is None:
        raise Skip("no response")
    labels: dict[str, Any] = {LABEL[question]: CHOICES[question][0 if _is_positive(part, row, location) else 1]}
    policy = _policy(definition.policy, row, location) if definition.policy else None
    id_ = row.get(definition.id) if definition.id else None
    if id_ in (None, ""):
        texts = json.dumps([prompt, response, policy])
        id_ = f"{definition.name}:{hashlib.sha256(texts.encode()).hexdigest()[:16]}"
    return Example(id=str(id_), source=definition.name, prompt=prompt, response=response, policy=policy, **labels)


def _prompt(row: Row, column: str, location: str) -> str | None:
    """A cell with a text, or with a conversation whose last message is classified."""
    if not isinstance(row.get(column), list):
        return text(row, column, location)
    turns = objects(row, column, ("role", "content"), location)
    if not turns or turns[-1][0] != "user":
        raise JaxguardError(f"{location}: {column} is a list of turns that does not end with the user's")
    history = [{"role": role, "content": content} for role, content in turns[:-1]]
    return transcript(history, turns[-1][1], location)


def _is_positive(part: ExampleColumns, row: Row, location: str) -> bool:
    """What the label says.

    Raises:
        Skip: its column is null.
        JaxguardError: the row is neither positive nor negative, or both.
    """
    if part.positive.column and not plain(row.get(part.positive.column)):
        raise Skip("no label")
    positive = part.positive.holds(row)
    if part.negative is not None and positive == part.negative.holds(row):
        columns = dict.fromkeys((*part.positive.names, *part.negative.names))
        values = ", ".join(f"{name}={row.get(name)!r}" for name in columns)
        raise JaxguardError(
            f"{location}: {values}; expected either {part.positive} or {part.negative} "
            f"({'both hold' if positive else 'neither holds'})"
        )
    return positive


def _policy(policy: BenchmarkPolicy, row: Row, location: str) -> str | None:
    if policy.column is None:
        return policy.name
    value = (text(row, policy.column, location) or "").strip() if policy.column in row else ""
    if not value and policy.optional:
        return None
    if not value and not policy.rules:
        raise Skip("no policy")
    if policy.rules and value not in policy.rules:
        raise JaxguardError(
            f"{location}: {policy.column} is {value!r}, which is not in policy.rules; "
            f"{nearest(value, policy.rules)}known: {', '.join(policy.rules)}"
        )
    return policy.rules.get(value, value)


def _slices(
    definition: BenchmarkDefinition, pairs: Iterable[tuple[Example, Row]]
) -> dict[str, dict[str, frozenset[str]]]:
    slices: dict[str, dict[str, set[str]]] = {part.name: {} for part in definition.slices}
    for example, row in pairs:
        for part in definition.slices:
            for value in part.values(row):
                slices[part.name].setdefault(value, set()).add(example.id)
    return {name: {v: frozenset(ids) for v, ids in sorted(values.items())} for name, values in slices.items()}


def _counts(question: Question, examples: list[Example]) -> dict[str, int]:
    positive = sum(getattr(example, LABEL[question]) == CHOICES[question][0] for example in examples)
    return {"positive": positive, "negative": len(examples) - positive, "total": len(examples)}


def _compare(name: str, words: tuple[str, str], counts: dict[str, int], expected: dict[str, int | None]) -> None:
    known = {what: number for what, number in expected.items() if number is not None}
    if any(number != counts[what] for what, number in known.items()):
        nouns = {"positive": words[0], "negative": words[1], "total": "in all"}
        published, actual = (
            ", ".join(f"{numbers[what]:,} {nouns[what]}" for what in known) for numbers in (known, counts)
        )
        logger.warning("benchmark %s: expected %s; found %s", name, published, actual)
