"""Benchmarks: labelled examples that a guard is scored on, each described by a YAML file in configs/benchmarks.

rows -> where -> sample -> examples with the label of one question -> slices, and counts beside the published ones
"""

import dataclasses
import hashlib
import json
import logging
import random
import re
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from jaxguard.config.base import locate, names
from jaxguard.data.benchmarks.schema import (
    BENCHMARK_FOLDER,
    BenchmarkDefinition,
    BenchmarkSource,
    ExampleColumns,
    plain,
    read_benchmark,
    read_group,
)
from jaxguard.data.examples import Example
from jaxguard.data.files import Row, Skip, find_files, objects, read_hub, read_local, text
from jaxguard.data.format.dialogue import CHOICES, LABEL, transcript
from jaxguard.data.policies import load_policy
from jaxguard.data.sources import load, unique_ids
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import ROWS_BYTES, nearest, read_json

logger = logging.getLogger(__name__)

Rows = list[tuple[str, Row]]
"""Rows with their locations, as errors name these."""


@dataclass(frozen=True)
class Benchmark:
    """Labelled examples and their description."""

    definition: BenchmarkDefinition
    examples: tuple[Example, ...]
    """With the label of the benchmark's question and no other; ids are unique, and the same at every loading."""
    slices: dict[str, dict[str, frozenset[str]]]
    """Slice -> value -> ids of the examples that have it."""
    counts: dict[str, int]
    """How many are "positive" and "negative", and in "total"."""
    skipped: Counter[str]
    """Reason -> how many rows, or parts of rows, became no example."""


class NoExampleError(JaxguardError):
    """No row of a file is an example of a benchmark."""


def load_benchmarks(name_or_path: str, local: Path | None = None) -> list[Benchmark]:
    """Read a benchmark, or those of a group that have examples; see load_benchmark. JaxguardError: none has."""
    names, loaded, problems = read_group(name_or_path), list[Benchmark](), list[str]()
    for name in names:
        try:
            loaded.append(load_benchmark(name, local))
        except NoExampleError as error:
            problems.append(str(error))
    if not loaded:
        raise NoExampleError("\n".join(problems))
    return loaded


def load_benchmark(name_or_path: str, local: Path | None = None) -> Benchmark:
    """Read a benchmark by name (a file in configs/benchmarks) or by the path of its YAML file.

    `local` is a file or folder with the source's columns, read instead of the source. Counts other than the published ones are
    logged as a warning.

    Raises:
        JaxguardError: the YAML or the rows are malformed, or no example is left.
    """
    definition = read_benchmark(name_or_path)
    name, question, policy = definition.name, definition.question, definition.policy
    if policy and policy.name and question not in (asks := load_policy(policy.name).asks):
        raise JaxguardError(
            f"benchmark {name!r} asks {question}, but its policy {policy.name!r} asks only {', '.join(asks)}"
        )
    rows, columns, skipped = _read_rows(definition, local)
    source = str(local or definition.source.name)
    _check_columns(definition, columns, source)
    pairs: list[tuple[Example, Row]] = []
    for location, row in _select(definition, rows, skipped):
        for part in definition.examples:
            try:
                pairs.append((_example(definition, part, row, location), row))
            except Skip as reason:
                skipped[str(reason)] += 1
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "it is empty"
        raise NoExampleError(f"{source}: no example for benchmark {name!r} ({reasons})")
    examples = unique_ids([example for example, _ in pairs])
    slices: dict[str, dict[str, set[str]]] = {part.name: {} for part in definition.slices}
    for example, (_, row) in zip(examples, pairs, strict=True):
        for part_of in definition.slices:
            for value in part_of.values(row):
                slices[part_of.name].setdefault(value, set()).add(example.id)
    positive = sum(getattr(example, LABEL[question]) == CHOICES[question][0] for example in examples)
    counts = {"positive": positive, "negative": len(examples) - positive, "total": len(examples)}
    known = {what: number for what, number in definition.expected if number is not None}
    if any(number != counts[what] for what, number in known.items()):
        nouns = dict(zip(counts, (*CHOICES[question], "in all"), strict=True))
        published, actual = (", ".join(f"{n[what]:,} {nouns[what]}" for what in known) for n in (known, counts))
        logger.warning("benchmark %s: expected %s; found %s", name, published, actual)
    sliced = {name: {v: frozenset(ids) for v, ids in sorted(values.items())} for name, values in slices.items()}
    return Benchmark(definition, tuple(examples), sliced, counts, skipped)


def list_benchmarks() -> tuple[str, ...]:
    """The names that `load_benchmark` knows; groups of them are left out."""
    return tuple(name for name in names(BENCHMARK_FOLDER) if "/" not in name and read_group(name) == (name,))


# From rows to examples.


def _check_columns(definition: BenchmarkDefinition, columns: tuple[str, ...], source: str) -> None:
    """Check that the rows have every column that the YAML names."""
    named: dict[str, Iterable[str | None]] = {"id": (definition.id,)}
    named |= {f"where.{i}": condition.names for i, condition in enumerate(definition.where)}
    for i, part in enumerate(definition.examples):
        negative = part.negative.names if part.negative else ()
        named |= {f"examples.{i}.prompt": (part.prompt,), f"examples.{i}.response": (part.response,)}
        named |= {f"examples.{i}.positive": part.positive.names, f"examples.{i}.negative": negative}
    if definition.policy and not definition.policy.optional:
        named["policy.column"] = (definition.policy.column,)
    named |= {f"slices.{i}": part_of.names for i, part_of in enumerate(definition.slices)}
    for field, required in named.items():
        for column in (column for column in required if column and column not in columns):
            hint = nearest(column, columns)
            if column == "split" and len(definition.source.splits) > 1:
                hint = f"give a folder with a file for each of {', '.join(definition.source.splits)}; "
            raise JaxguardError(
                f"benchmark {definition.name!r}: {field}: {source} has no column {column!r}; {hint}"
                f"it has: {', '.join(columns)}"
            )


def _select(definition: BenchmarkDefinition, rows: Rows, skipped: Counter[str]) -> Rows:
    """The rows that count. Of one that fails several conditions the first is the reason."""
    chosen = []
    for location, row in rows:
        failed = next((condition for condition in definition.where if not condition.holds(row)), None)
        if failed is None:
            chosen.append((location, row))
        else:
            skipped[f"not where {failed}"] += 1
    sample = definition.sample
    if sample is None or len(chosen) <= sample.size:
        return chosen
    skipped["not in the sample"] += len(chosen) - sample.size
    return random.Random(sample.seed).sample(chosen, sample.size)  # noqa: S311


def _example(definition: BenchmarkDefinition, part: ExampleColumns, row: Row, location: str) -> Example:
    """One example of a row; raises Skip where it lacks its prompt, response, label or policy."""
    question, prompt = definition.question, row.get(part.prompt)
    if isinstance(prompt, list):  # a conversation, whose last message is classified
        turns = objects(row, part.prompt, ("role", "content"), location)
        if not turns or turns[-1][0] != "user":
            raise JaxguardError(f"{location}: {part.prompt} is a list of turns that does not end with the user's")
        history = [{"role": role, "content": content} for role, content in turns[:-1]]
        prompt = transcript(history, turns[-1][1], location)
    else:
        prompt = text(row, part.prompt, location)
        if definition.source.data is None:  # whose prompts may be transcripts of ours
            prompt = transcript(None, prompt, location)
    if prompt is None or not prompt.strip():
        raise Skip("empty prompt")
    response = text(row, part.response, location) if part.response else None
    if question != "prompt_harm" and response is None:
        raise Skip("no response")
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
    declared = definition.policy
    policy = declared.name if declared else None
    if declared and declared.column:
        policy = (text(row, declared.column, location) or "").strip() or None
        if policy is None and not declared.optional and not declared.rules:
            raise Skip("no policy")
        if declared.rules and policy not in declared.rules and (policy or not declared.optional):
            raise JaxguardError(
                f"{location}: {declared.column} is {policy!r}, which is not in policy.rules; "
                f"{nearest(policy or '', declared.rules)}known: {', '.join(declared.rules)}"
            )
        policy = declared.rules.get(policy or "", policy)
    id_ = row.get(definition.id) if definition.id else None
    if id_ in (None, ""):
        texts = json.dumps([prompt, response, policy])
        id_ = f"{definition.name}:{hashlib.sha256(texts.encode()).hexdigest()[:16]}"
    labels: dict[str, Any] = {LABEL[question]: CHOICES[question][0 if positive else 1]}
    return Example(id=str(id_), source=definition.name, prompt=prompt, response=response, policy=policy, **labels)


# Rows: from the hub, a URL, a training source, or a local copy with the same columns.


def _read_rows(definition: BenchmarkDefinition, local: Path | None) -> tuple[Rows, tuple[str, ...], Counter[str]]:
    """Read the rows of a benchmark's source, or of a local copy of it; their columns, and what was skipped (reason -> count)."""
    source, hub = definition.source, definition.source.hub or ""
    if source.data is not None:
        data = source.data if local is None else source.data.model_copy(update={"path": str(local.expanduser())})
        loaded = load(data)
        rows = [(f"{data.path or data.kind}, example {each.id!r}", each.to_json()) for each in loaded.examples]
        return rows, tuple(field.name for field in dataclasses.fields(Example)), loaded.skipped
    path = local or (locate(Path(source.path)) if source.path else None)
    if path is not None:
        path = path.expanduser()
        if source.file and (path / source.file).is_file():
            path = path / source.file
        if path.is_dir() and len(source.splits) > 1:
            rows = _joined({split: read_local(path, [split]).rows for split in source.splits})
        else:  # as a clone has it: named after the source's own file, the split, or the benchmark
            own = PurePosixPath(source.file or source.url or "").name
            stem = re.sub(r"\.(jsonl|json|parquet|csv)(\.gz|\.xz)?$", "", own)
            rows = _read_files(path, [*filter(None, [stem]), *source.splits, definition.name], source.keys_as)
    elif source.url or source.file:
        rows = _read_remote(source)
    else:
        rows = _joined(
            {split: read_hub(hub, source.config, split, None, source.revision).rows for split in source.splits}
        )
    if not rows:
        raise JaxguardError(f"{local or source.name}: no row for benchmark {definition.name!r}")
    return rows, tuple(dict.fromkeys(column for _, row in rows for column in row)), Counter()


def _read_files(path: Path, stems: list[str], keys_as: str | None) -> Rows:
    """Read a file, or the files of a folder with these names, in a format of read_local or as one object of lists of rows."""
    if keys_as is None:
        return read_local(path, stems).rows
    rows: Rows = []
    for file in find_files(path, stems):
        for key, each in read_json(file, dict[str, list[Row]], ROWS_BYTES).items():
            rows += [(f"{file}, {key!r} row {i}", {keys_as: key, **row}) for i, row in enumerate(each)]
    return rows


def _read_remote(source: BenchmarkSource) -> Rows:
    """Read the file at a source's URL, or of its repository on the hub."""
    origin = source.url or f"{source.hub}/{source.file}"
    with tempfile.TemporaryDirectory() as folder:
        # Some hubs call an array of rows .jsonl; what is called .json may be either.
        path = Path(folder) / PurePosixPath(origin).name.replace(".jsonl", ".json")
        try:
            if source.url:
                with urllib.request.urlopen(source.url, timeout=60) as response:  # noqa: S310 (https, see BenchmarkSource)
                    path.write_bytes(response.read(ROWS_BYTES + 1))
            else:
                file, revision = source.file or "", source.revision
                cached = huggingface_hub.hf_hub_download(source.hub or "", file, repo_type="dataset", revision=revision)
                path.write_bytes(Path(cached).read_bytes())
        except (OSError, HTTPException, errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
            page = f"https://huggingface.co/datasets/{source.hub}"
            gated = f"if {page} is gated, accept its terms there and run `hf auth login`; " if source.hub else ""
            copy = "with a copy on disk, give it as the benchmark's local file"
            raise JaxguardError(f"cannot fetch {origin} ({error}); {gated}{copy}") from None
        try:
            rows = _read_files(path, [], source.keys_as)
        except JaxguardError as error:
            raise JaxguardError(str(error).replace(str(path), origin)) from None
        return [(location.replace(str(path), origin), row) for location, row in rows]


def _joined(splits: dict[str, Rows]) -> Rows:
    """The rows of several splits, with each row's split as a column; those of a single one as they are."""
    if len(splits) == 1:
        return next(iter(splits.values()))
    return [(location, {"split": split, **row}) for split, rows in splits.items() for location, row in rows]
