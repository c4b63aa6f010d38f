"""Convert public data sets and our JSON lines into examples.

Each kind of source is one row of `_KINDS`: its repository, the columns that it needs, and the function that converts a row into
an Example or says why the row is skipped. A row that holds a whole dialogue is first split into its messages. Facts about
columns: the data sets' own cards.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from jaxguard.config.data import SourceConfig
from jaxguard.config.lookup import nearest
from jaxguard.data.cells import Skip, label, objects, squeezed, text, transcript, words
from jaxguard.data.examples import LABELS, Example
from jaxguard.data.files import Row, Table, read_hub, read_local
from jaxguard.utils.errors import JaxguardError

HARM = {"harmful": "harmful", "unharmful": "unharmful"}
SAFETY = {"unsafe": "harmful", "safe": "unharmful"}
REFUSAL = {"refusal": "refusal", "compliance": "compliance"}
TOPIC = {"off-topic": "harmful", "on-topic": "unharmful"}


@dataclass(frozen=True)
class LoadedSource:
    """A source's examples, its skipped rows (reason -> count), and its manifest entry."""

    examples: list[Example]
    skipped: Counter[str]
    origin: dict[str, Any]


def load_examples(source: SourceConfig) -> list[Example]:
    """Return the examples of a source in its own order; errors as in `load`."""
    return load(source).examples


def load(source: SourceConfig) -> LoadedSource:
    """Convert the rows of a source into examples with unique ids.

    Raises:
        JaxguardError: it cannot be loaded, lacks a column, has an unknown label, or no usable row.
    """
    kind = _KINDS[source.kind]
    table = _read(source, kind)
    name = source.path or kind.repository
    if not table.rows:
        raise JaxguardError(f"{name}: split {source.split!r} is empty")
    for column in kind.columns(source):
        if column not in table.columns:
            hint = nearest(column, table.columns)
            raise JaxguardError(f"{name}: no column {column!r}; {hint}found: {', '.join(table.columns)}")
    if source.kind == "jsonl":
        _check_jsonl_columns(table, name)
    skipped = Counter[str]()
    examples = list(_examples(table, kind, source, skipped))
    if not examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise JaxguardError(f"{name}: split {source.split!r} has no row to train on ({reasons})")
    if source.kind == "jsonl":
        _check_ids(examples, name)
    examples = unique_ids(examples)
    origin = {"kind": source.kind, **table.origin, "examples_sha256": digest(examples)}
    return LoadedSource(examples, skipped, origin)


def _examples(table: Table, kind: "_Kind", source: SourceConfig, skipped: Counter[str]) -> Iterator[Example]:
    for location, row in table.rows:
        try:
            messages = kind.split(row, location)
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        for message in messages:
            try:
                yield kind.example(message, source, location)
            except Skip as reason:
                skipped[str(reason)] += 1


def digest(examples: Iterable[Example]) -> str:
    """Hash the contents of examples, in order."""
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps(example.to_json(), sort_keys=True).encode())
    return total.hexdigest()


def unique_ids(examples: list[Example]) -> list[Example]:
    """Make ids unique: the second example with id X becomes X#2, and so on."""
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


def _wildguardmix(row: Row, source: SourceConfig, location: str) -> Example:
    category = text(row, "subcategory", location)
    return _example(
        source,
        location,
        prompt=text(row, "prompt", location),
        response=text(row, "response", location),
        prompt_label=label(row, "prompt_harm_label", HARM, location),
        response_label=label(row, "response_harm_label", HARM, location),
        refusal_label=label(row, "response_refusal_label", REFUSAL, location),
        categories=() if category in {None, "", "benign"} else (category,),
    )


def _aegis2(row: Row, source: SourceConfig, location: str) -> Example:
    return _aegis_row(row, source, location, ("prompt_label", "response_label"), SAFETY)


def _nemotron_safety(row: Row, source: SourceConfig, location: str) -> Example:
    example = _aegis_row(row, source, location, ("prompt_harm_label", "response_harm_label"), HARM)
    return replace(example, trace=_trace(row, source, location))


def _aegis_row(
    row: Row, source: SourceConfig, location: str, labels: tuple[str, str], meaning: Mapping[str, str]
) -> Example:
    prompt = text(row, "prompt", location)
    if prompt is not None and prompt.strip() == "REDACTED":
        raise Skip("redacted prompt")
    return _example(
        source,
        location,
        id=row.get("id"),
        prompt=prompt,
        response=text(row, "response", location),
        prompt_label=label(row, labels[0], meaning, location),
        response_label=label(row, labels[1], meaning, location),
        categories=words(row.get("violated_categories"), location),
    )


def _nemotron_topics(row: Row, source: SourceConfig, location: str) -> Example:
    return _example(
        source,
        location,
        prompt=transcript(row.get("conversation_history"), text(row, "last_user_message", location), location),
        prompt_label=label(row, "gt_topic_classification", TOPIC, location),
        policy=_instruction(row, location),
        trace=_trace(row, source, location),
    )


def _dialogue_messages(row: Row, location: str) -> list[Row]:
    """Split a CantTalkAboutThis dialogue into messages, each with the turns before it.

    User turns are on-topic. A distractor is an off-topic message that could follow a turn of the bot; later turns do not
    contain it.
    """
    turns = objects(row, "conversation", ("role", "content"), location)
    if not all(role and content for role, content in turns):
        raise Skip("a turn without role or text")
    history = [{"role": role, "content": content} for role, content in turns]
    messages: list[Row] = []
    bot_turns: dict[str, int] = {}
    for i, (role, content) in enumerate(turns):
        if squeezed(role) == "user":
            messages.append({**row, "history": history[:i], "message": content, "topic": "on-topic"})
        else:
            bot_turns.setdefault(squeezed(content), i)  # of equal bot turns, a distractor follows the first
    for bot_turn, distractor in objects(row, "distractors", ("bot turn", "distractor"), location):
        i = bot_turns.get(squeezed(bot_turn), -1)
        past = history[: i + 1] if i >= 0 else None
        messages.append({**row, "history": past, "message": distractor, "topic": "off-topic"})
    if not messages:
        raise Skip("no user turn")
    return messages


def _canttalkaboutthis(row: Row, source: SourceConfig, location: str) -> Example:
    if row["history"] is None:
        raise Skip("bot turn not in the conversation")
    domain = text(row, "domain", location)
    return _example(
        source,
        location,
        prompt=transcript(row["history"], row["message"], location),
        prompt_label=TOPIC[row["topic"]],
        policy=_instruction(row, location),
        categories=(domain,) if domain else (),
    )


def _instruction(row: Row, location: str) -> str:
    """Return a dialogue's own policy; its labels mean nothing under another one."""
    instruction = (text(row, "system_instruction", location) or "").strip()
    if not instruction:
        raise Skip("no system instruction")
    return instruction


def _jsonl(row: Row, source: SourceConfig, location: str) -> Example:
    values = {f.name: row[f.name] for f in fields(Example) if row.get(f.name) is not None}
    for name, meaning in zip(LABELS, (HARM, HARM, REFUSAL), strict=True):
        values[name] = label(row, name, meaning, location)
    for name in ("prompt", "response", "policy", "trace", "source"):
        values[name] = text(row, name, location)
    values |= {"categories": words(row.get("categories"), location), "mode": row.get("mode")}
    return _example(source, location, **values)


def _example(source: SourceConfig, location: str, /, **values: Any) -> Example:
    """Make an example from the values of a row; rows that cannot be trained on are skipped."""
    name = values.pop("source", None) or (Path(source.path or "").name.split(".")[0] if source.kind == "jsonl" else "")
    if not (values["prompt"] or "").strip():
        raise Skip("empty prompt")
    if not any(values.get(label) for label in LABELS):
        raise Skip("no label")
    # Aegis has labels for empty responses: the assistant said nothing. Without a label there is no response.
    if not (values.get("response") or "").strip() and not (values.get("response_label") or values.get("refusal_label")):
        values["response"] = None
    for optional in ("trace", "policy"):
        values[optional] = (values.get(optional) or "").strip() or None
    given_id = values.pop("id", None)
    if given_id is None or str(given_id) == "":
        contents = json.dumps([values["prompt"], values.get("response"), values["policy"]])
        given_id = f"{source.kind}:{hashlib.sha256(contents.encode()).hexdigest()[:16]}"
    try:
        return Example(id=str(given_id), source=name or source.kind, **values)
    except JaxguardError as error:
        raise JaxguardError(f"{location}: {error}") from None


def _trace(row: Row, source: SourceConfig, location: str) -> str | None:
    if source.trace == "none":
        return None
    if str(row.get(f"prediction_gt_mismatch_{source.teacher}")).casefold() in {"true", "1"}:
        raise Skip("teacher disagrees with the label")
    trace = (text(row, _trace_column(source), location) or "").strip()
    if not trace:
        raise Skip("no trace of this teacher")
    return trace


def _trace_column(source: SourceConfig) -> str:
    names = {
        ("nemotron_safety", "full"): "safety_reasoning_{}",
        ("nemotron_safety", "one_sentence"): "efficient_safety_reasoning_trace_{}",
        ("nemotron_topics", "full"): "safety_reasoning_trace_{}",
        ("nemotron_topics", "one_sentence"): "efficient_reasoning_trace_{}",
    }
    return names[source.kind, source.trace].format(source.teacher)


@dataclass(frozen=True)
class _Kind:
    """A kind of source.

    Attributes:
        repository: on the hub.
        columns: required columns.
        example: converts a row, or a message of one.
        file: the repository's file, if only one belongs to this kind.
        clone: split -> file name in a clone of the repository.
        split: splits a row into messages.
    """

    repository: str
    columns: Callable[[SourceConfig], tuple[str, ...]]
    example: Callable[[Row, SourceConfig, str], Example]
    file: str | None = None
    clone: Mapping[str, str] = field(default_factory=dict)
    split: Callable[[Row, str], Iterable[Row]] = lambda row, _: (row,)


def _nemotron_columns(*columns: str) -> Callable[[SourceConfig], tuple[str, ...]]:
    def required(source: SourceConfig) -> tuple[str, ...]:
        mismatch = f"prediction_gt_mismatch_{source.teacher}"
        return columns if source.trace == "none" else (*columns, _trace_column(source), mismatch)

    return required


_NEMOTRON = "nvidia/Nemotron-Content-Safety-Reasoning-Dataset"
_KINDS = {
    "wildguardmix": _Kind(
        "allenai/wildguardmix",
        lambda _: ("prompt", "response", "prompt_harm_label", "response_harm_label", "response_refusal_label"),
        _wildguardmix,
        clone={"train": "wildguard_train", "test": "wildguard_test"},
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
        {"train": "aegis_v2_efficient_reasoning"},
    ),
    "nemotron_topics": _Kind(
        _NEMOTRON,
        _nemotron_columns("system_instruction", "conversation_history", "last_user_message", "gt_topic_classification"),
        _nemotron_topics,
        "tf_efficient_reasoning.jsonl",
        {"train": "tf_efficient_reasoning"},
    ),
    "canttalkaboutthis": _Kind(
        "nvidia/CantTalkAboutThis-Topic-Control-Dataset",
        lambda _: ("system_instruction", "conversation", "distractors"),
        _canttalkaboutthis,
        clone={
            "train": "canttalkaboutthis_topic_control_mixtral",
            "test": "canttalkaboutthis_topic_control_human_test_set",
        },
        split=_dialogue_messages,
    ),
    "jsonl": _Kind("", lambda _: ("prompt",), _jsonl),
}


def _read(source: SourceConfig, kind: _Kind) -> Table:
    if source.path is not None:
        stems = (source.split, kind.clone.get(source.split))
        return read_local(Path(source.path), [stem for stem in stems if stem])
    if kind.file and source.split != "train":
        raise JaxguardError(f"{source.kind} has one split, train, not {source.split!r}")
    # WildGuardMix keeps its splits in configurations of their own: wildguardtrain/train and wildguardtest/test.
    config = f"wildguard{source.split}" if source.kind == "wildguardmix" else None
    return read_hub(kind.repository, config, source.split, kind.file)


def _check_jsonl_columns(table: Table, name: str) -> None:
    if not any(label in table.columns for label in LABELS):
        hint = " Rename `label`, or write its meaning into one of them." if "label" in table.columns else ""
        raise JaxguardError(
            f"{name}: no label column; expected one of {', '.join(LABELS)}, found: {', '.join(table.columns)}.{hint}"
        )
    location = next((location for location, row in table.rows if "prompt" not in row), None)
    if location is not None:
        raise JaxguardError(f"{location}: no field 'prompt'")


def _check_ids(examples: list[Example], name: str) -> None:
    counts = Counter(example.id for example in examples)
    repeated, count = counts.most_common(1)[0]
    if count > 1 and not repeated.startswith("jsonl:"):
        raise JaxguardError(f"{name}: {count} examples have the id {repeated!r}; make ids unique, or leave them out")
