"""Convert public data sets and our JSON lines into examples.

Each kind of source is one row of `_KINDS`: its repository, and which column holds which field of an Example, as the data sets' own
cards say.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxguard.config.data import SourceConfig
from jaxguard.data.examples import LABELS, Example
from jaxguard.data.files import Row, Skip, label, objects, positive, read_hub, read_local, text, words
from jaxguard.data.format.dialogue import transcript
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import TokenId, check, nearest, shown

HARM = {"harmful": "harmful", "unharmful": "unharmful"}
SAFETY = {"unsafe": "harmful", "safe": "unharmful"}
REFUSAL = {"refusal": "refusal", "compliance": "compliance"}
TOPIC = {"off-topic": "harmful", "on-topic": "unharmful"}
FLAG = {"true": True, "false": False}
OPTIONAL = ("categories", "adversarial")
"""Fields whose column a public set may lack."""
_PAIR: Any = tuple[tuple[TokenId, ...], tuple[TokenId, ...]] | None


class LoadedSource(NamedTuple):
    """A source's examples, its skipped rows (reason -> count), and its manifest entry."""

    examples: list[Example]
    skipped: Counter[str]
    origin: dict[str, Any]


def load_examples(source: SourceConfig) -> list[Example]:
    """Return the examples of a source in its own order; errors as in `load`."""
    return load(source).examples


def load(source: SourceConfig) -> LoadedSource:
    """Convert the rows of a source into examples with unique ids; it is an error if it has no usable row."""
    kind = _KINDS[source.kind]
    name = source.path or kind.repository
    if source.path is not None:
        table = read_local(Path(source.path), filter(None, (source.split, kind.clone.get(source.split))))
    elif kind.file and source.split != "train":
        raise JaxguardError(f"{source.kind} has one split, train, not {source.split!r}")
    else:
        # WildGuardMix keeps its splits in configurations of their own: wildguardtrain/train and wildguardtest/test.
        config = f"wildguard{source.split}" if source.kind == "wildguardmix" else None
        table = read_hub(kind.repository, config, source.split, kind.file, source.revision)
    if not table.rows:
        raise JaxguardError(f"{name}: split {source.split!r} is empty")
    named = [column for name, column in kind.columns.items() if name not in OPTIONAL]
    for column in (*(kind.required or named), *kind.trace_columns(source)):
        if column not in table.columns:
            hint = nearest(column, table.columns)
            raise JaxguardError(f"{name}: no column {column!r}; {hint}found: {', '.join(table.columns)}")
    if source.kind == "jsonl" and not any(label in table.columns for label in LABELS):
        hint = " Rename `label`, or write its meaning into one of them." if "label" in table.columns else ""
        raise JaxguardError(
            f"{name}: no label column; expected one of {', '.join(LABELS)}, found: {', '.join(table.columns)}.{hint}"
        )
    skipped, examples = Counter[str](), list[Example]()
    for location, row in _with_labels(table.rows) if source.kind == "jsonl" else table.rows:
        for message in kind.split(row, location, skipped):
            try:
                examples.append(_convert(message, kind, source, location))
            except Skip as reason:
                skipped[str(reason)] += 1
    if not examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise JaxguardError(f"{name}: split {source.split!r} has no row to train on ({reasons})")
    repeated, count = Counter(example.id for example in examples).most_common(1)[0]
    if source.kind == "jsonl" and count > 1 and not repeated.startswith("jsonl:"):
        raise JaxguardError(f"{name}: {count} examples have the id {repeated!r}; make ids unique, or leave them out")
    examples = unique_ids(examples)
    origin = {"kind": source.kind, **table.origin, "examples_sha256": digest(examples)}
    return LoadedSource(examples, skipped, origin)


def _with_labels(rows: Iterable[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Add each row without a prompt, a reviewer's labels, to the row of its id."""
    texts, labels = list[tuple[str, Row]](), dict[str, tuple[str, Row]]()
    for location, row in rows:
        if "prompt" in row or row.get("id") is None:
            texts.append((location, row))
        elif (earlier := labels.setdefault(str(row["id"]), (location, row)))[0] != location:
            raise JaxguardError(f"{location}: {earlier[0]} labels the id {shown(row['id'])} too; leave one of them out")
    ids = {str(row.get("id")) for _, row in texts}
    for name, (location, _) in labels.items():
        if name not in ids:
            raise JaxguardError(f"{location}: no field 'prompt', and no row of the id {shown(name)} that has it")
    return [(location, row | labels.get(str(row.get("id")), ("", {}))[1]) for location, row in texts]


def digest(examples: Iterable[Example]) -> str:
    """Hash the contents of examples, in order."""
    contents = "".join(json.dumps(example.to_json(), sort_keys=True) for example in examples)
    return hashlib.sha256(contents.encode()).hexdigest()


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


@dataclass(frozen=True)
class _Kind:
    """A kind of source.

    Attributes:
        repository: on the hub.
        columns: field of Example -> its column; "history" are the turns before the prompt.
        harm: word of its harm labels -> ours.
        required: columns that it must have; default: all of `columns` but those of OPTIONAL.
        file: the repository's file, if only one belongs to this kind.
        clone: split -> file name in a clone of the repository.
        traces: source.trace -> its column, with the teacher's name.
        split: splits a row into messages; counts what is skipped.
    """

    repository: str
    columns: Mapping[str, str]
    harm: Mapping[str, str]
    required: tuple[str, ...] = ()
    file: str | None = None
    clone: Mapping[str, str] = field(default_factory=dict)
    traces: Mapping[str, str] = field(default_factory=dict)
    split: Callable[[Row, str, Counter[str]], Iterable[Row]] = lambda row, *_: (row,)

    def trace_columns(self, source: SourceConfig) -> tuple[str, ...]:
        """Return the column of the trace, and of whether it disagrees with the label; () if no traces are wanted."""
        if source.trace not in self.traces:
            return ()
        return self.traces[source.trace].format(source.teacher), f"prediction_gt_mismatch_{source.teacher}"


def _convert(row: Row, kind: _Kind, source: SourceConfig, location: str) -> Example:
    """Make an example of a row, or of a message of one; rows that cannot be trained on are skipped."""
    if source.kind == "jsonl" and "prompt" not in row:
        raise JaxguardError(f"{location}: no field 'prompt'")
    values: dict[str, Any] = {}
    for name, column in kind.columns.items():
        if name in LABELS:
            values[name] = label(row, column, REFUSAL if name == "refusal_label" else kind.harm, location)
        elif name == "categories":
            values[name] = words(row.get(column), location)
        elif name == "adversarial":
            values[name] = label(row, column, FLAG, location)
        elif name == "weight":
            values[name] = positive(row, column, location)
        elif name == "sampled":
            values[name] = check(row.get(column) or None, _PAIR, f"{location}: {column}")
        elif name in ("id", "mode", "history"):
            values[name] = row.get(column)
        else:
            values[name] = text(row, column, location)
    if values.get("categories") == ("benign",) and source.kind == "wildguardmix":
        values["categories"] = ()
    if (values["prompt"] or "").strip() == "REDACTED":
        raise Skip("redacted prompt")
    for name in ("policy", "trace", "rejected"):
        values[name] = (values.get(name) or "").strip() or None
    if kind.columns.get("policy") == "system_instruction" and values["policy"] is None:
        raise Skip("no system instruction")  # the labels mean nothing under another policy
    if source.kind != "jsonl":  # which may hold transcripts that we wrote
        values["prompt"] = transcript(values.pop("history", None), values["prompt"], location)
    if not (values["prompt"] or "").strip():
        raise Skip("empty prompt")
    if not any(values.get(label) for label in LABELS):
        raise Skip("no label")
    if columns := kind.trace_columns(source):
        trace, disagrees = columns
        if str(row.get(disagrees)).casefold() in {"true", "1"}:
            raise Skip("teacher disagrees with the label")
        values["trace"] = (text(row, trace, location) or "").strip()
        if not values["trace"]:
            raise Skip("no trace of this teacher")
    # Aegis has labels for empty responses: the assistant said nothing. Without a label there is no response.
    if not (values.get("response") or "").strip() and not (values.get("response_label") or values.get("refusal_label")):
        values["response"] = None
    identifier = values.pop("id", None)
    if identifier is None or str(identifier) == "":
        contents = json.dumps([values["prompt"], values.get("response"), values["policy"]])
        identifier = f"{source.kind}:{hashlib.sha256(contents.encode()).hexdigest()[:16]}"
    file = Path(source.path or "").name.split(".")[0] if source.kind == "jsonl" else ""
    values["source"] = values.get("source") or file or source.kind
    try:
        return Example(id=str(identifier), **values)
    except JaxguardError as error:
        raise JaxguardError(f"{location}: {error}") from None


def _split_dialogue(row: Row, location: str, skipped: Counter[str]) -> Iterator[Row]:
    """Split a CantTalkAboutThis dialogue into messages, each with the turns before it, in the columns of Nemotron's topics.

    User turns are on-topic. A distractor is an off-topic message that could follow a turn of the bot; later turns do not
    contain it.
    """

    def folded(text: str) -> str:
        return " ".join(text.split()).casefold()

    def message(i: int, text: str, topic: str) -> Row:
        history = [{"role": role, "content": content} for role, content in turns[:i]]
        return {**row, "conversation_history": history, "last_user_message": text, "gt_topic_classification": topic}

    turns = objects(row, "conversation", ("role", "content"), location)
    if not all(role and content for role, content in turns):
        skipped["a turn without role or text"] += 1
        return
    distractors = objects(row, "distractors", ("bot turn", "distractor"), location)
    if not distractors and not any(folded(role) == "user" for role, _ in turns):
        skipped["no user turn"] += 1
    after_bot_turn: dict[str, int] = {}
    for i, (role, content) in enumerate(turns):
        if folded(role) == "user":
            yield message(i, content, "on-topic")
        else:
            after_bot_turn.setdefault(folded(content), i + 1)  # of equal bot turns, a distractor follows the first
    for bot_turn, distractor in distractors:
        i = after_bot_turn.get(folded(bot_turn), 0)
        if i:
            yield message(i, distractor, "off-topic")
        else:
            skipped["bot turn not in the conversation"] += 1


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_HARM_COLUMNS = {"prompt_label": "prompt_harm_label", "response_label": "response_harm_label"}
_NEMOTRON = "nvidia/Nemotron-Content-Safety-Reasoning-Dataset"
_TOPIC_COLUMNS = {
    "policy": "system_instruction",
    "history": "conversation_history",
    "prompt": "last_user_message",
    "prompt_label": "gt_topic_classification",
}
_KINDS = {
    "wildguardmix": _Kind(
        "allenai/wildguardmix",
        {
            **_same("prompt", "response", "adversarial"),
            **_HARM_COLUMNS,
            "refusal_label": "response_refusal_label",
            "categories": "subcategory",
        },
        HARM,
        clone={"train": "wildguard_train", "test": "wildguard_test"},
    ),
    "aegis2": _Kind(
        "nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
        {**_same("id", "prompt", "response", "prompt_label", "response_label"), "categories": "violated_categories"},
        SAFETY,
    ),
    "nemotron_safety": _Kind(
        _NEMOTRON,
        {**_same("id", "prompt", "response"), **_HARM_COLUMNS, "categories": "violated_categories"},
        HARM,
        file="aegis_v2_efficient_reasoning.jsonl",
        clone={"train": "aegis_v2_efficient_reasoning"},
        traces={"full": "safety_reasoning_{}", "one_sentence": "efficient_safety_reasoning_trace_{}"},
    ),
    "nemotron_topics": _Kind(
        _NEMOTRON,
        _TOPIC_COLUMNS,
        TOPIC,
        file="tf_efficient_reasoning.jsonl",
        clone={"train": "tf_efficient_reasoning"},
        traces={"full": "safety_reasoning_trace_{}", "one_sentence": "efficient_reasoning_trace_{}"},
    ),
    "canttalkaboutthis": _Kind(
        "nvidia/CantTalkAboutThis-Topic-Control-Dataset",
        {**_TOPIC_COLUMNS, "categories": "domain"},
        TOPIC,
        required=("system_instruction", "conversation", "distractors"),
        clone={
            "train": "canttalkaboutthis_topic_control_mixtral",
            "test": "canttalkaboutthis_topic_control_human_test_set",
        },
        split=_split_dialogue,
    ),
    "jsonl": _Kind("", _same(*(f.name for f in fields(Example))), HARM, required=("prompt",)),
}
