"""Benchmarks: labelled examples that a guard is scored on, each described by a YAML file in configs/benchmarks.

rows -> where -> sample -> examples with the label of one question -> slices, and counts beside the published ones
"""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jaxguard.config.lookup import names, nearest
from jaxguard.data.cells import Skip, objects, text, transcript
from jaxguard.data.examples import Example
from jaxguard.data.files import Row, Table
from jaxguard.data.format.dialogue import CHOICES
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

LABEL: Final[Mapping[Question, str]] = {
    "prompt_harm": "prompt_label",
    "response_harm": "response_label",
    "response_refusal": "refusal_label",
}
"""The field of an example that answers a question."""


@dataclass(frozen=True)
class Benchmark:
    """Labelled examples and what is known of them.

    Attributes:
        name, title, group, question: as in the YAML file.
        examples: with the label of `question` and no other; ids are unique, and the same at every loading.
        slices: slice -> value -> ids of the examples that have it.
        counts, expected: "positive", "negative" and "total", as found and as published (None: nobody says).
        skipped: reason -> rows, or parts of rows, that became no example.
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
        JaxguardError: the YAML is mistaken, the rows cannot be read, a column is absent, a row is neither positive nor
            negative, or nothing is left.
    """
    fields = read_benchmark(name_or_path, folder)
    table, skipped = read_rows(fields.source, fields.name, local)
    where = str(local or fields.source.place)
    _check_columns(fields, table, where)
    _check_policy(fields)
    found = [
        (example, row)
        for place, row in _chosen(fields, table, skipped)
        for example in _examples(fields, row, place, skipped)
    ]
    if not found:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "it is empty"
        raise JaxguardError(f"{where}: benchmark {fields.name!r} finds no example there ({reasons})")
    examples = unique_ids([example for example, _ in found])
    counts = _counts(fields.question, examples)
    expected = fields.expected.model_dump()
    _compare(fields.name, CHOICES[fields.question], counts, expected)
    return Benchmark(
        name=fields.name,
        title=fields.title,
        group=fields.group,
        question=fields.question,
        examples=tuple(examples),
        slices=_slices(fields, zip(examples, (row for _, row in found), strict=True)),
        counts=counts,
        expected=expected,
        skipped=skipped,
        origin={**table.origin, "examples_sha256": digest(examples)},
        license=fields.license,
        citation=fields.citation,
        url=fields.url,
    )


def list_benchmarks(folder: Path = BENCHMARK_FOLDER) -> tuple[str, ...]:
    """The names that `load_benchmark` knows in a folder."""
    return tuple(name for name in names(folder) if "/" not in name)


def _check_columns(fields: BenchmarkDefinition, table: Table, where: str) -> None:
    if not table.rows:
        raise JaxguardError(f"{where}: benchmark {fields.name!r} finds no row there")
    for field, column in _columns(fields):
        if column not in table.columns:
            hint = nearest(column, table.columns)
            if column == "split" and len(fields.source.splits) > 1:
                hint = f"give a folder with a file for each of {', '.join(fields.source.splits)}; "
            raise JaxguardError(
                f"benchmark {fields.name!r}: {field}: {where} has no column {column!r}; {hint}"
                f"found: {', '.join(table.columns)}"
            )


def _columns(fields: BenchmarkDefinition) -> Iterator[tuple[str, str]]:
    """(field, column that it names), for every column that is named."""
    if fields.id:
        yield "id", fields.id
    for i, condition in enumerate(fields.where):
        yield from ((f"where.{i}", column) for column in condition.names)
    for i, part in enumerate(fields.examples):
        texts = [("prompt", part.prompt), *([("response", part.response)] if part.response else [])]
        labels = [("positive", part.positive), *([("negative", part.negative)] if part.negative else [])]
        texts += [(field, column) for field, condition in labels for column in condition.names]
        yield from ((f"examples.{i}.{field}", column) for field, column in texts)
    if fields.policy and fields.policy.column and not fields.policy.optional:
        yield "policy.column", fields.policy.column
    for i, part_of in enumerate(fields.slices):
        yield from ((f"slices.{i}", column) for column in part_of.names)


def _check_policy(fields: BenchmarkDefinition) -> None:
    """A policy that is named for all examples must exist, and ask the benchmark's question."""
    if fields.policy is None or fields.policy.name is None:
        return
    policy = load_policy(fields.policy.name)
    if fields.question not in policy.asks:
        raise JaxguardError(
            f"benchmark {fields.name!r} asks {fields.question}, but its policy {policy.name!r} asks only "
            f"{', '.join(policy.asks)}"
        )


def _chosen(fields: BenchmarkDefinition, table: Table, skipped: Counter[str]) -> list[tuple[str, Row]]:
    """The rows that count. Of one that fails several conditions the first is the reason."""
    rows = []
    for place, row in table.rows:
        failed = next((condition for condition in fields.where if not condition.holds(row)), None)
        if failed is None:
            rows.append((place, row))
        else:
            skipped[f"not where {failed}"] += 1
    if fields.sample is None or len(rows) <= fields.sample.size:
        return rows
    skipped["not in the sample"] += len(rows) - fields.sample.size
    chosen = random.Random(fields.sample.seed).sample(range(len(rows)), fields.sample.size)  # noqa: S311
    return [rows[i] for i in chosen]


def _examples(fields: BenchmarkDefinition, row: Row, place: str, skipped: Counter[str]) -> Iterator[Example]:
    for part in fields.examples:
        try:
            yield _example(fields, part, row, place)
        except Skip as reason:
            skipped[str(reason)] += 1


def _example(fields: BenchmarkDefinition, part: ExampleColumns, row: Row, place: str) -> Example:
    prompt = _prompt(row, part.prompt, place)
    if not (prompt or "").strip():
        raise Skip("empty prompt")
    assert prompt is not None
    response = text(row, part.response, place) if part.response else None
    if fields.question != "prompt_harm" and response is None:
        raise Skip("no response")
    label = CHOICES[fields.question][0 if _is_positive(part, row, place) else 1]
    policy = _policy(fields.policy, row, place) if fields.policy else None
    known: dict[str, Any] = {LABEL[fields.question]: label}
    fingerprint = row.get(fields.id) if fields.id else None
    if fingerprint in (None, ""):
        parts = json.dumps([prompt, response, policy])
        fingerprint = f"{fields.name}:{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
    return Example(id=str(fingerprint), source=fields.name, prompt=prompt, response=response, policy=policy, **known)


def _prompt(row: Row, column: str, place: str) -> str | None:
    """A cell with a text, or with a conversation that ends with the message under judgement."""
    if not isinstance(row.get(column), list):
        return text(row, column, place)
    turns = objects(row, column, ("role", "content"), place)
    if not turns or turns[-1][0] != "user":
        raise JaxguardError(f"{place}: {column} is a list of turns that does not end with the user's")
    history = [{"role": role, "content": content} for role, content in turns[:-1]]
    return transcript(history, turns[-1][1], place)


def _is_positive(part: ExampleColumns, row: Row, place: str) -> bool:
    """What the label says.

    Raises:
        Skip: the column that says it is null.
        JaxguardError: it says neither, or both.
    """
    if part.positive.column and not plain(row.get(part.positive.column)):
        raise Skip("no label")
    positive = part.positive.holds(row)
    if part.negative is not None and positive == part.negative.holds(row):
        names = dict.fromkeys((*part.positive.names, *part.negative.names))
        found = ", ".join(f"{name}={row.get(name)!r}" for name in names)
        raise JaxguardError(
            f"{place}: {found}; expected either {part.positive} or {part.negative} "
            f"({'both hold' if positive else 'neither holds'})"
        )
    return positive


def _policy(policy: BenchmarkPolicy, row: Row, place: str) -> str | None:
    if policy.column is None:
        return policy.name
    value = (text(row, policy.column, place) or "").strip() if policy.column in row else ""
    if not value and policy.optional:
        return None
    if not policy.rules:
        if not value:
            raise Skip("no policy")
        return value
    if value not in policy.rules:
        raise JaxguardError(
            f"{place}: {policy.column} is {value!r}, for which policy.rules has nothing; "
            f"{nearest(value, policy.rules)}there: {', '.join(policy.rules)}"
        )
    return policy.rules[value]


def _slices(fields: BenchmarkDefinition, pairs: Iterable[tuple[Example, Row]]) -> dict[str, dict[str, frozenset[str]]]:
    found: dict[str, dict[str, set[str]]] = {part.name: {} for part in fields.slices}
    for example, row in pairs:
        for part in fields.slices:
            for value in part.values(row):
                found[part.name].setdefault(value, set()).add(example.id)
    return {name: {v: frozenset(ids) for v, ids in sorted(values.items())} for name, values in found.items()}


def _counts(question: Question, examples: list[Example]) -> dict[str, int]:
    positive = sum(getattr(example, LABEL[question]) == CHOICES[question][0] for example in examples)
    return {"positive": positive, "negative": len(examples) - positive, "total": len(examples)}


def _compare(name: str, words: tuple[str, str], counts: dict[str, int], expected: dict[str, int | None]) -> None:
    if all(number is None or number == counts[what] for what, number in expected.items()):
        return
    called = {"positive": words[0], "negative": words[1], "total": "in all"}
    wanted = ", ".join(f"{number:,} {called[what]}" for what, number in expected.items() if number is not None)
    got = ", ".join(f"{counts[what]:,} {called[what]}" for what in expected if expected[what] is not None)
    logger.warning("benchmark %s: expected %s; found %s", name, wanted, got)
