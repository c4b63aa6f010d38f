"""Public data sets and our JSON lines, each turned into examples.

A source is described by one row of `_KINDS`: where it lies on the hub, which columns it must have, and the function
that turns one of its rows into an Example or says why the row is skipped; where a row is a whole dialogue, another one
first takes it apart. Column facts: the data sets' own cards.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from jaxguard.config.data import SourceConfig
from jaxguard.config.lookup import nearest
from jaxguard.data.cells import Skip, label, objects, squeezed, text, transcript, words
from jaxguard.data.examples import Example
from jaxguard.data.files import Row, Table, read_hub, read_local
from jaxguard.utils.errors import JaxguardError

HARM = {"harmful": "harmful", "unharmful": "unharmful"}
SAFETY = {"unsafe": "harmful", "safe": "unharmful"}
REFUSAL = {"refusal": "refusal", "compliance": "compliance"}
TOPIC = {"off-topic": "harmful", "on-topic": "unharmful"}
LABELS = ("prompt_label", "response_label", "refusal_label")


@dataclass(frozen=True)
class LoadedSource:
    """A source's examples, the rows that were skipped (reason -> count), and what the manifest says of it."""

    examples: list[Example]
    skipped: Counter[str]
    origin: dict[str, Any]


def load_examples(source: SourceConfig) -> list[Example]:
    """The examples of a source, in its own order; see `load` for the errors."""
    return load(source).examples


def load(source: SourceConfig) -> LoadedSource:
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
    skipped = Counter[str]()
    examples = _examples(table, kind, source, skipped)
    if not examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise JaxguardError(f"{where}: split {source.split!r} has no row to train on ({reasons})")
    if source.kind == "jsonl":
        _check_ids(examples, where)
    examples = unique_ids(examples)
    origin = {"kind": source.kind, **table.origin, "examples_sha256": digest(examples)}
    return LoadedSource(examples, skipped, origin)


def _examples(table: Table, kind: "_Kind", source: SourceConfig, skipped: Counter[str]) -> list[Example]:
    examples = []
    for place, row in table.rows:
        parts: Iterable[Row] = ()
        with _counted(skipped):
            parts = kind.parts(row, place)
        for part in parts:
            with _counted(skipped):
                examples.append(kind.example(part, source, place))
    return examples


@contextmanager
def _counted(skipped: Counter[str]) -> Iterator[None]:
    try:
        yield
    except Skip as reason:
        skipped[str(reason)] += 1


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
    category = text(row, "subcategory", place)
    return _build(
        source,
        place,
        prompt=text(row, "prompt", place),
        response=text(row, "response", place),
        prompt_label=label(row, "prompt_harm_label", HARM, place),
        response_label=label(row, "response_harm_label", HARM, place),
        refusal_label=label(row, "response_refusal_label", REFUSAL, place),
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
    prompt = text(row, "prompt", place)
    if prompt is not None and prompt.strip() == "REDACTED":
        raise Skip("redacted prompt")
    return _build(
        source,
        place,
        id=row.get("id"),
        prompt=prompt,
        response=text(row, "response", place),
        prompt_label=label(row, labels[0], meaning, place),
        response_label=label(row, labels[1], meaning, place),
        categories=words(row.get("violated_categories"), place),
    )


def _nemotron_topics(row: Row, source: SourceConfig, place: str) -> Example:
    return _build(
        source,
        place,
        prompt=transcript(row.get("conversation_history"), text(row, "last_user_message", place), place),
        prompt_label=label(row, "gt_topic_classification", TOPIC, place),
        policy=_instruction(row, place),
        trace=_trace(row, source, place),
    )


def _dialogue_parts(row: Row, place: str) -> list[Row]:
    """The messages of a CantTalkAboutThis dialogue, each as a row with what was said before it.

    A user turn is on-topic. A distractor is an off-topic message that could have followed a turn of the bot; it is no
    part of the conversation, so that the turns after it know nothing of it.
    """
    turns = objects(row, "conversation", ("role", "content"), place)
    if not all(role and content for role, content in turns):
        raise Skip("a turn without role or text")
    history = [{"role": role, "content": content} for role, content in turns]
    parts: list[Row] = []
    bot_turns: dict[str, int] = {}
    for i, (role, content) in enumerate(turns):
        if squeezed(role) == "user":
            parts.append({**row, "history": history[:i], "message": content, "topic": "on-topic"})
        else:
            # A bot that says the same twice could have been interrupted at either place; the first is taken.
            bot_turns.setdefault(squeezed(content), i)
    for bot_turn, distractor in objects(row, "distractors", ("bot turn", "distractor"), place):
        i = bot_turns.get(squeezed(bot_turn), -1)
        past = history[: i + 1] if i >= 0 else None
        parts.append({**row, "history": past, "message": distractor, "topic": "off-topic"})
    if not parts:
        raise Skip("no user turn")
    return parts


def _canttalkaboutthis(row: Row, source: SourceConfig, place: str) -> Example:
    if row["history"] is None:
        raise Skip("bot turn not in the conversation")
    domain = text(row, "domain", place)
    return _build(
        source,
        place,
        prompt=transcript(row["history"], row["message"], place),
        prompt_label=TOPIC[row["topic"]],
        policy=_instruction(row, place),
        categories=(domain,) if domain else (),
    )


def _instruction(row: Row, place: str) -> str:
    """A dialogue's own policy; without one its labels would be read under the run's."""
    instruction = (text(row, "system_instruction", place) or "").strip()
    if not instruction:
        raise Skip("no system instruction")
    return instruction


def _jsonl(row: Row, source: SourceConfig, place: str) -> Example:
    known = {f.name: row[f.name] for f in fields(Example) if row.get(f.name) is not None}
    for name, meaning in zip(LABELS, (HARM, HARM, REFUSAL), strict=True):
        known[name] = label(row, name, meaning, place)
    for name in ("prompt", "response", "policy", "trace", "source"):
        known[name] = text(row, name, place)
    known["categories"] = words(row.get("categories"), place)
    known["mode"] = row.get("mode")
    return _build(source, place, **known)


def _build(source: SourceConfig, place: str, /, **known: Any) -> Example:
    """An example from what a row says; rows that cannot be trained on are skipped."""
    name = known.pop("source", None) or (Path(source.path or "").name.split(".")[0] if source.kind == "jsonl" else "")
    if not (known["prompt"] or "").strip():
        raise Skip("empty prompt")
    if not any(known.get(label) for label in LABELS):
        raise Skip("no label")
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


def _trace(row: Row, source: SourceConfig, place: str) -> str | None:
    if source.trace == "none":
        return None
    if str(row.get(f"prediction_gt_mismatch_{source.teacher}")).casefold() in {"true", "1"}:
        raise Skip("teacher disagrees with the label")
    trace = (text(row, _trace_column(source), place) or "").strip()
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
    """What is particular to a kind of source.

    Attributes:
        repository: where it lies on the hub.
        columns: those it must have.
        example: makes one of a row, or of a part of one.
        file: the only file of the repository that belongs to it.
        clone: split -> how a clone of the repository calls its file.
        parts: takes a row apart.
    """

    repository: str
    columns: Callable[[SourceConfig], tuple[str, ...]]
    example: Callable[[Row, SourceConfig, str], Example]
    file: str | None = None
    clone: Mapping[str, str] = field(default_factory=dict)
    parts: Callable[[Row, str], Iterable[Row]] = lambda row, _: (row,)


def _nemotron_columns(*columns: str) -> Callable[[SourceConfig], tuple[str, ...]]:
    def needed(source: SourceConfig) -> tuple[str, ...]:
        mismatch = f"prediction_gt_mismatch_{source.teacher}"
        return columns if source.trace == "none" else (*columns, _trace_column(source), mismatch)

    return needed


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
        parts=_dialogue_parts,
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
