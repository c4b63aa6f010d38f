"""Select and encode a run's training and validation examples, and describe them in a manifest.

    load sources -> drop what the mode cannot use -> hold out -> subset -> assign modes -> encode

Selections are by a hash of an example's id, so they depend neither on the platform nor on the order of files.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxguard.config import Config
from jaxguard.config.data import SourceConfig
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.config.train import ObjectiveConfig
from jaxguard.data.contamination import normalise
from jaxguard.data.encoded_cache import Branches, EncodedCache
from jaxguard.data.encoding import EncodedExample, Encoder
from jaxguard.data.examples import LABELS, Example
from jaxguard.data.format.dialogue import ABSENT, Mode, answers, questions
from jaxguard.data.policies import Policy, load_policy, policy_for
from jaxguard.data.questions import QuestionSet, question_sets, trained_together
from jaxguard.data.sources import digest, load, unique_ids
from jaxguard.utils.errors import JaxguardError

ExampleAndMode = tuple[Example, Mode]


class Selection(NamedTuple):
    """The selected examples with their modes, before encoding.

    Attributes:
        validation: held-out examples; once for each mode.
        sources: the manifest entries of the sources.
        dropped: reason -> number of examples dropped after loading.
    """

    train: list[ExampleAndMode]
    validation: list[ExampleAndMode]
    sources: list[dict[str, Any]]
    dropped: Counter[str]


class Prepared(NamedTuple):
    """The encoded data of a run.

    Attributes:
        validation: (held-out example, mode, branches): see Encoder.branches; the first branch has the labels.
        manifest: JSON: sources with hashes, counts, seeds, policy.
    """

    train: list[EncodedExample]
    validation: list[tuple[Example, Mode, tuple[EncodedExample, ...]]]
    manifest: dict[str, Any]

    @property
    def trained_together(self) -> tuple[QuestionSet, ...]:
        """Every set of questions that a training prompt asks."""
        return trained_together(self.manifest)


def prepare(config: Config, folder: Path, cache: EncodedCache | None = None) -> Prepared:
    """Load, select and encode a run's data with the tokenizer of the checkpoint in `folder`."""
    encoder = Encoder.load(folder, config.data)
    return encode_selection(config, select(config), encoder, cache)


def select(config: Config) -> Selection:
    """Load the sources and select the training and validation examples; it is an error if too few can be used."""
    data, dropped = config.data, Counter[str]()
    policy = load_policy(data.policy)
    pool, sources = load_sources(data.train, "train")
    sampled = config.train.objective.is_sampled
    pool = usable(pool, "data.train", policy, "direct" if sampled else data.mode, dropped)  # traces are sampled, too
    pool = with_preferences(pool, config.train.objective, dropped)
    candidates = pool
    if data.validation and data.validation_size:
        candidates, origins = load_sources(data.validation, "validation")
        candidates = usable(candidates, "data.validation", policy, data.mode, dropped)
        sources += origins
    elif len(pool) <= data.validation_size:
        raise JaxguardError(
            f"data.validation_size={data.validation_size} leaves nothing of the {len(pool)} training examples; lower it, or "
            "give data.validation a source of its own"
        )
    # Independent of seeds, so that all runs on the same data have the same held-out examples.
    held_out = sorted(candidates, key=lambda example: _hash("held out", 0, example.id))[: data.validation_size]
    members, prompts = {id(example) for example in held_out}, {conversation(example) for example in held_out}
    rest = [example for example in pool if id(example) not in members]
    train = [example for example in rest if conversation(example) not in prompts]
    dropped["train: same prompt as a held-out example"] += len(rest) - len(train)
    if data.subset is not None:
        train = subset(train, data.subset, data.subset_seed, data.subset_balance)
    if len(train) < config.train.batch_size:
        raise JaxguardError(
            f"{len(train)} training examples are left after {len(held_out)} were held out, fewer than "
            f"train.batch_size={config.train.batch_size}; add data, or lower data.validation_size or train.batch_size"
        )
    modes = assign_modes(train, data.mode, data.dual_reasoning_share, config.seed, traced=not sampled)
    # Every mode that is trained is validated; in dual mode, examples without a trace in direct mode only.
    dual = data.mode == "dual"
    trained = list(Mode) if dual else [Mode(data.mode)]
    held_out = [replace(example, rejected=None) for example in held_out]
    validation = [(e, mode) for mode in trained for e in held_out if not dual or mode is Mode.DIRECT or e.trace]
    return Selection(list(zip(train, modes, strict=True)), validation, sources, +dropped)


def subset(examples: Sequence[Example], size: int, seed: int, balance: float = 0.0) -> list[Example]:
    """Draw `size` examples without replacement by a hash of (seed, id): smaller subsets are inside larger ones.

    An example of a source of n is drawn in proportion to n^-balance. Each gets an exponential waiting time of that rate; the first
    are taken (Efraimidis and Spirakis 2006).
    """
    if size > len(examples):
        raise JaxguardError(f"a subset of {size} needs more than the {len(examples)} examples there are")
    count = Counter(example.source for example in examples)

    def waiting_time(example: Example) -> tuple[float, bytes]:
        drawn = _hash("subset", seed, example.id)
        return -math.log1p(-int.from_bytes(drawn[:6]) / 2**48) * count[example.source] ** balance, drawn

    return sorted(examples, key=waiting_time)[:size]


def assign_modes(examples: Sequence[Example], mode: str, share: float, seed: int, traced: bool = True) -> list[Mode]:
    """Assign each example's mode.

    In dual mode an example may have a mode of its own. Of the others, exactly round(share × number) get reasoning mode, selected
    by a hash of (seed, id), if `traced` from those with a trace; it is an error if too few have one.
    """
    if mode != "dual":
        return [Mode(mode)] * len(examples)
    free = [example for example in examples if example.mode is None]
    count = round(share * len(free))
    able = [example for example in free if example.trace or not traced]
    if len(able) < count:
        raise JaxguardError(
            f"data.mode=dual with data.dual_reasoning_share={share:g} needs a trace for {count} of {len(free)} "
            f"examples, but {len(able)} have one; lower the share, use data.mode=direct, or take a source with traces"
        )
    reasoning = {e.id for e in sorted(able, key=lambda example: _hash("mode", seed, example.id))[:count]}
    return [Mode(example.mode or ("reasoning" if example.id in reasoning else "direct")) for example in examples]


def encode_selection(
    config: Config, selection: Selection, encoder: Encoder, cache: EncodedCache | None = None
) -> Prepared:
    """Encode the selected examples, and make the manifest; it is an error if none fits, or every one was truncated."""
    max_seq_len = config.data.max_seq_len
    cache = cache or EncodedCache()
    if config.train.objective.is_sampled:
        room = (config.reinforce or ReinforceConfig()).max_tokens
        encoded: list[Branches] = [(encoder.unanswered(*each, room),) for each in selection.train]
    else:
        encoded = cache.encode("training", selection.train, encoder, 1)
    train = [(*each, first[0]) for each, first in zip(selection.train, encoded, strict=True) if first]
    held_out = cache.encode("held-out", selection.validation, encoder)
    validation = [(*each, branches) for each, branches in zip(selection.validation, held_out, strict=True) if branches]
    too_long = {
        "train: answer too long for a row": len(selection.train) - len(train),
        "validation: answer too long for a row": len(selection.validation) - len(validation),
    }
    if not train:
        raise JaxguardError(
            f"no training example fits into data.max_seq_len={max_seq_len}, even with truncated text; raise it"
        )
    if all(sequence.cut for _, _, sequence in train):
        raise JaxguardError(
            f"every training example was truncated to fit data.max_seq_len={max_seq_len}; raise it, or shorten the policy"
        )
    manifest = {
        "sources": selection.sources,
        "policy": {"name": encoder.policy.name, "sha256": encoder.policy.digest},
        "seeds": {"subset": config.data.subset_seed, "modes": config.seed},
        "train": _counts(train),
        "validation": _counts([(example, mode, branches[0]) for example, mode, branches in validation]),
        "dropped": dict(sorted((selection.dropped + Counter(too_long)).items())),
    }
    return Prepared([sequence for _, _, sequence in train], validation, manifest)


def load_sources(sources: Iterable[SourceConfig], role: str) -> tuple[list[Example], list[dict[str, Any]]]:
    """Load the examples of several sources, with unique ids, and the sources' manifest entries; errors as in `load`."""
    loaded = [load(source) for source in sources]
    origins = [
        {"role": role, **each.origin, "examples": len(each.examples), "skipped": dict(each.skipped)} for each in loaded
    ]
    return unique_ids([example for each in loaded for example in each.examples]), origins


def usable(examples: list[Example], field: str, policy: Policy, mode: str, dropped: Counter[str]) -> list[Example]:
    """Select examples with a label for a question of their policy, and with a trace if the mode needs one."""
    role = field.removeprefix("data.")
    asked = [(example, questions(example, policy_for(example, policy))) for example in examples]
    answered = [e for e, asks in asked if asks and any(word != ABSENT for _, word in answers(e, asks))]
    if not answered:
        raise JaxguardError(
            f"none of the {len(examples)} examples of {field} has a label for what their policy asks; "
            f"policy {policy.name!r} asks {', '.join(policy.asks)}"
        )
    dropped[f"{role}: no label for what the policy asks"] += len(examples) - len(answered)
    if mode != "reasoning":
        return answered
    traced = [example for example in answered if example.trace]
    if not traced:
        raise JaxguardError(
            f"data.mode=reasoning needs traces, but none of the {len(answered)} examples of {field} has one: set "
            "data.mode=direct, take a source with traces (kind nemotron_safety), or write traces with a teacher first"
        )
    dropped[f"{role}: no trace"] += len(answered) - len(traced)
    return traced


def with_preferences(examples: list[Example], objective: ObjectiveConfig, dropped: Counter[str]) -> list[Example]:
    """Select the examples with an answer to reject if the objective needs one; else leave such answers out."""
    if not objective.is_preference:
        return [replace(example, rejected=None) for example in examples]
    preferred = [example for example in examples if example.rejected]
    if not preferred:
        raise JaxguardError(
            f"train.objective.kind={objective.kind} needs examples with a field 'rejected', but none of the {len(examples)} of "
            "data.train has one: `jaxguard mine pairs` writes them from a guard's answers, into pairs.jsonl"
        )
    dropped["train: no rejected answer"] += len(examples) - len(preferred)
    return preferred


def conversation(example: Example) -> str:
    """Return what examples of one conversation share: the normalised prompt; a prompt of punctuation alone stays as it is."""
    return normalise(example.prompt) or example.prompt


def _hash(purpose: str, seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{purpose}\0{seed}\0{name}".encode()).digest()


def _counts(encoded: Sequence[tuple[Example, Mode, EncodedExample]]) -> dict[str, Any]:
    """Describe a set. `tokens_sha256` also changes with the tokenizer and the format."""
    # In dual mode a held-out example is listed once for each mode.
    examples = list({example.id: example for example, _, _ in encoded}.values())
    sequences, tokens = [sequence for _, _, sequence in encoded], hashlib.sha256()
    words = [len((example.trace or "").split()) for example, mode, _ in encoded if mode is Mode.REASONING]
    asked = ((example, mode, tuple(q for q, _ in sequence.answers)) for example, mode, sequence in encoded)
    for sequence in (each for pair in sequences for each in pair.sequences):
        tokens.update(sequence.tokens.astype("<i4").tobytes())
        tokens.update(b"" if sequence.weight == 1 else str(sequence.weight).encode())
    return {
        "examples": len(examples),
        "sequences": len(sequences),
        "by_source": dict(Counter(example.source for example in examples).most_common()),
        "by_mode": dict(Counter(str(mode) for _, mode, _ in encoded)),
        "labels": {label: dict(Counter(str(getattr(e, label)) for e in examples).most_common()) for label in LABELS},
        "questions": [each.model_dump(mode="json") for each in question_sets(asked)],
        "trace_words": round(sum(words) / len(words), 1) if words else None,
        "with_response": sum(example.response is not None for example in examples),
        "cut": sum(sequence.cut for sequence in sequences),
        "tokens": sum(len(sequence.tokens) for sequence in sequences),
        "trained_tokens": sum(int(sequence.loss_mask.sum()) for sequence in sequences),
        "examples_sha256": digest(examples),
        "tokens_sha256": tokens.hexdigest(),
    }
