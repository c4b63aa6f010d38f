"""Public data sets and our JSON lines, each turned into examples.

A source is described by one row of `_KINDS`: where it lies on the hub, which columns it must have, and the function
that turns one of its rows into an Example or says why the row is skipped. Column facts: the data sets' own cards.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jaxguard.data.examples import Example
from jaxguard.data.files import Row, Table, read_hub, read_local
from jaxguard.errors import JaxguardError
from jaxguard.fields import nearest
from jaxguard.sections import SourceConfig

HARM = {"harmful": "harmful", "unharmful": "unharmful"}
SAFETY = {"unsafe": "harmful", "safe": "unharmful"}
REFUSAL = {"refusal": "refusal", "compliance": "compliance"}
TOPIC = {"off-topic": "harmful", "on-topic": "unharmful"}
LABELS = ("prompt_label", "response_label", "refusal_label")


@dataclass(frozen=True)
class Loaded:
    """A source's examples, the rows that were skipped (reason -> count), and what the manifest says of it."""

    examples: list[Example]
    skipped: Counter[str]
    origin: dict[str, Any]


class _Skip(Exception):  # noqa: N818 (not an error)
    """This row is not trained on; the message is the reason under which it is counted."""


def load_examples(source: SourceConfig) -> list[Example]:
    """The examples of a source, in its own order; see `load` for the errors."""
    return load(source).examples


def load(source: SourceConfig) -> Loaded:
    """Read a source and turn its rows into examples with unique ids.

    Raises:
        JaxguardError: it cannot be read, lacks a column, has a label outside its set, or holds no usable row.
    """
    kind = _KINDS[source.kind]
    table = _read(source, kind)
    where = source.path or kind.repository
    if not table.rows:
        raise JaxguardError(f"{where}: split {source.split!r} is empty")
    _check_columns(table, kind.columns(source), where)
    if source.kind == "jsonl":
        _check_jsonl_columns(table, where)
    examples, skipped = [], Counter[str]()
    for place, row in table.rows:
        try:
            examples.append(kind.example(row, source, place))
        except _Skip as reason:
            skipped[str(reason)] += 1
    if not examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise JaxguardError(f"{where}: split {source.split!r} has no row to train on ({reasons})")
    if source.kind == "jsonl":
        _check_ids(examples, where)
    examples = unique_ids(examples)
    origin = {"kind": source.kind, **table.origin, "examples_sha256": digest(examples)}
    return Loaded(examples, skipped, origin)


def digest(examples: Iterable[Example]) -> str:
    """Hash of the examples' contents, in order."""
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps(example.to_json(), sort_keys=True).encode())
    return total.hexdigest()


def unique_ids(examples: list[Example]) -> list[Example]:
    """Ids made unique: the second example with an id X is called X#2, and so on."""
    taken = {example.id for example in examples}
    seen, result = set[str](), []
    for example in examples:
        name, number = example.id, 1
        while name in seen or (number > 1 and name in taken):
            number += 1
            name = f"{example.id}#{number}"
        seen.add(name)
        result.append(example if name == example.id else replace(example, id=name))
    return result


def _wildguardmix(row: Row, source: SourceConfig, place: str) -> Example:
    category = _text(row, "subcategory", place)
    return _build(
        source,
        place,
        prompt=_text(row, "prompt", place),
        response=_text(row, "response", place),
        prompt_label=_label(row, "prompt_harm_label", HARM, place),
        response_label=_label(row, "response_harm_label", HARM, place),
        refusal_label=_label(row, "response_refusal_label", REFUSAL, place),
        categories=() if category in {None, "", "benign"} else (category,),
    )


def _aegis2(row: Row, source: SourceConfig, place: str) -> Example:
    return _aegis_row(row, source, place, ("prompt_label", "response_label"), SAFETY)


def _nemotron_safety(row: Row, source: SourceConfig, place: str) -> Example:
    example = _aegis_row(row, source, place, ("prompt_harm_label", "response_harm_label"), HARM)
    return replace(example, trace=_trace(row, source, place))


def _aegis_row(
    row: Row, source: SourceConfig, place: str, labels: tuple[str, str], meaning: Mapping[str, str]
) -> Example:
    prompt = _text(row, "prompt", place)
    if prompt is not None and prompt.strip() == "REDACTED":
        raise _Skip("redacted prompt")
    return _build(
        source,
        place,
        id=row.get("id"),
        prompt=prompt,
        response=_text(row, "response", place),
        prompt_label=_label(row, labels[0], meaning, place),
        response_label=_label(row, labels[1], meaning, place),
        categories=_words(row.get("violated_categories"), place),
    )


def _nemotron_topics(row: Row, source: SourceConfig, place: str) -> Example:
    return _build(
        source,
        place,
        prompt=_transcript(row.get("conversation_history"), _text(row, "last_user_message", place), place),
        prompt_label=_label(row, "gt_topic_classification", TOPIC, place),
        policy=_text(row, "system_instruction", place),
        trace=_trace(row, source, place),
    )


def _jsonl(row: Row, source: SourceConfig, place: str) -> Example:
    known = {f.name: row[f.name] for f in fields(Example) if row.get(f.name) is not None}
    for name, meaning in zip(LABELS, (HARM, HARM, REFUSAL), strict=True):
        known[name] = _label(row, name, meaning, place)
    for name in ("prompt", "response", "policy", "trace", "source"):
        known[name] = _text(row, name, place)
    known["categories"] = _words(row.get("categories"), place)
    known["mode"] = row.get("mode")
    return _build(source, place, **known)


def _build(source: SourceConfig, place: str, /, **known: Any) -> Example:
    """An example from what a row says; rows that cannot be trained on are skipped."""
    name = known.pop("source", None) or (Path(source.path or "").name.split(".")[0] if source.kind == "jsonl" else "")
    if not (known["prompt"] or "").strip():
        raise _Skip("empty prompt")
    if not any(known.get(label) for label in LABELS):
        raise _Skip("no label")
    # Aegis has empty responses with a label: the assistant said nothing. Without a label there is no response.
    if not (known.get("response") or "").strip() and not (known.get("response_label") or known.get("refusal_label")):
        known["response"] = None
    known["trace"] = (known.get("trace") or "").strip() or None
    known["policy"] = (known.get("policy") or "").strip() or None
    identity = known.pop("id", None)
    if identity is None or str(identity) == "":
        identity = f"{source.kind}:{_content_hash(known)}"
    try:
        return Example(id=str(identity), source=name or source.kind, **known)
    except JaxguardError as error:
        raise JaxguardError(f"{place}: {error}") from None


def _content_hash(known: Mapping[str, Any]) -> str:
    parts = [known["prompt"], known.get("response"), known.get("policy")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _text(row: Row, column: str, place: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise JaxguardError(f"{place}: {column} is {value!r}; expected text or null")
    if value is None or value.isascii():
        return value
    # JSON can spell half of a surrogate pair, which is not a character: no tokenizer takes it.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _label(row: Row, column: str, meaning: Mapping[str, str], place: str) -> str | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    known = meaning.get(str(value).strip().casefold())
    if known is None:
        name = f" (id {row['id']!r})" if row.get("id") is not None else ""
        raise JaxguardError(f"{place}{name}: {column} is {value!r}; expected {', '.join(meaning)} or null")
    return known


def _words(value: Any, place: str) -> tuple[str, ...]:
    """Categories, as a list or separated by commas."""
    parts = value.split(",") if isinstance(value, str) else (value or [])
    if not all(isinstance(part, str) for part in parts):
        raise JaxguardError(f"{place}: categories are {value!r}; expected a list of texts")
    return tuple(part.strip() for part in parts if part.strip())


def _trace(row: Row, source: SourceConfig, place: str) -> str:
    if str(row.get(f"prediction_gt_mismatch_{source.teacher}")).casefold() in {"true", "1"}:
        raise _Skip("teacher disagrees with the label")
    trace = (_text(row, _trace_column(source), place) or "").strip()
    if not trace:
        raise _Skip("no trace of this teacher")
    return trace


def _trace_column(source: SourceConfig) -> str:
    names = {
        ("nemotron_safety", "full"): "safety_reasoning_{}",
        ("nemotron_safety", "one_sentence"): "efficient_safety_reasoning_trace_{}",
        ("nemotron_topics", "full"): "safety_reasoning_trace_{}",
        ("nemotron_topics", "one_sentence"): "efficient_reasoning_trace_{}",
    }
    return names[source.kind, source.trace].format(source.teacher)


def _transcript(history: Any, last: str | None, place: str) -> str | None:
    """A dialogue as one prompt: earlier turns first, then the message under judgement.

    Further lines of a turn are indented, so that no text inside a turn can pass for another turn.
    """
    if not history or last is None:
        return last
    try:
        turns = [(str(turn["role"]), str(turn["content"])) for turn in history]
    except (TypeError, KeyError):
        raise JaxguardError(
            f"{place}: conversation_history is {history!r}; expected a list of role and content"
        ) from None
    lines = [f"[{role}] {_indent(content)}" for role, content in turns]
    return "\n".join(["Earlier in the conversation:", *lines, "Message to judge:", f"[user] {_indent(last)}"])


def _indent(text: str) -> str:
    return "\n    ".join(text.strip().splitlines())


@dataclass(frozen=True)
class _Kind:
    """What is particular to a kind of source."""

    repository: str
    columns: Callable[[SourceConfig], tuple[str, ...]]
    example: Callable[[Row, SourceConfig, str], Example]
    file: str | None = None


def _nemotron_columns(*columns: str) -> Callable[[SourceConfig], tuple[str, ...]]:
    return lambda source: (*columns, _trace_column(source), f"prediction_gt_mismatch_{source.teacher}")


_NEMOTRON = "nvidia/Nemotron-Content-Safety-Reasoning-Dataset"
_KINDS = {
    "wildguardmix": _Kind(
        "allenai/wildguardmix",
        lambda _: ("prompt", "response", "prompt_harm_label", "response_harm_label", "response_refusal_label"),
        _wildguardmix,
    ),
    "aegis2": _Kind(
        "nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
        lambda _: ("id", "prompt", "response", "prompt_label", "response_label"),
        _aegis2,
    ),
    "nemotron_safety": _Kind(
        _NEMOTRON,
        _nemotron_columns("id", "prompt", "response", "prompt_harm_label", "response_harm_label"),
        _nemotron_safety,
        "aegis_v2_efficient_reasoning.jsonl",
    ),
    "nemotron_topics": _Kind(
        _NEMOTRON,
        _nemotron_columns("system_instruction", "conversation_history", "last_user_message", "gt_topic_classification"),
        _nemotron_topics,
        "tf_efficient_reasoning.jsonl",
    ),
    "jsonl": _Kind("", lambda _: ("prompt",), _jsonl),
}


def _read(source: SourceConfig, kind: _Kind) -> Table:
    if source.path is not None:
        # A clone of the hub's repository names its files in its own way.
        named = [kind.file.removesuffix(".jsonl")] if kind.file else [f"wildguard_{source.split}"]
        return read_local(Path(source.path), [source.split, *named])
    if kind.file and source.split != "train":
        raise JaxguardError(f"{source.kind} has one split, train, not {source.split!r}")
    # WildGuardMix keeps its splits in configurations of their own: wildguardtrain/train and wildguardtest/test.
    config = f"wildguard{source.split}" if source.kind == "wildguardmix" else None
    return read_hub(kind.repository, config, source.split, kind.file)


def _check_columns(table: Table, columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        if column not in table.columns:
            hint = nearest(column, table.columns)
            raise JaxguardError(f"{where}: no column {column!r}; {hint}found: {', '.join(table.columns)}")


def _check_jsonl_columns(table: Table, where: str) -> None:
    if not any(label in table.columns for label in LABELS):
        hint = " Rename `label`, or write its meaning into one of them." if "label" in table.columns else ""
        raise JaxguardError(
            f"{where}: no label column; expected one of {', '.join(LABELS)}, found: {', '.join(table.columns)}.{hint}"
        )
    place = next((place for place, row in table.rows if "prompt" not in row), None)
    if place is not None:
        raise JaxguardError(f"{place}: no field 'prompt'")


def _check_ids(examples: list[Example], where: str) -> None:
    counts = Counter(example.id for example in examples)
    name, count = counts.most_common(1)[0]
    if count > 1 and not name.startswith("jsonl:"):
        raise JaxguardError(f"{where}: id {name!r} is given to {count} examples; make ids unique, or leave them out")
