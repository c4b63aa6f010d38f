"""Encoded examples in files of a run's folder, so that a run encodes its data once.

What is damaged or has another key is encoded again.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

import jaxguard
from jaxguard.data.encoding import EncodedExample, Encoder, Probe
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import ABSENT, CHOICES, Mode
from jaxguard.data.policies import QUESTIONS, policy_for
from jaxguard.data.sources import digest
from jaxguard.utils.arrays import read_arrays, write_arrays
from jaxguard.utils.progress import track
from jaxguard.utils.versions import code_digest

logger = logging.getLogger(__name__)

Branches = tuple[EncodedExample, ...]

_WORDS: Final = tuple(dict.fromkeys((ABSENT, *(word for words in CHOICES.values() for word in words))))
_PACKAGES: Final = ("transformers", "tokenizers", "jinja2", "numpy")


@dataclass
class EncodedCache:
    """The encoded examples that a folder holds; without a folder, none. Nothing is written before `write`."""

    folder: Path | None = None
    _unwritten: dict[Path, tuple[str, list[Branches]]] = field(default_factory=dict)

    def encode(
        self, name: str, examples: Sequence[tuple[Example, Mode]], encoder: Encoder, most: int | None = None
    ) -> list[Branches]:
        """Return what Encoder.encode_all yields, as the file of that name has it or encoded now."""
        tracked = track(examples, f"encoding {name} examples")
        if self.folder is None:
            return list(encoder.encode_all(tracked, most))
        path, key = self.folder / f"{name}.encoded", encoding_key(examples, encoder, most)
        encoded = read_encoded(path, key, examples)
        if encoded is None:
            encoded = list(encoder.encode_all(tracked, most))
            self._unwritten[path] = key, encoded
        return encoded

    def write(self) -> None:
        """Write what was encoded; in one process of a run. JaxguardError: it cannot be written."""
        for path, (key, encoded) in self._unwritten.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_encoded(path, key, encoded)
        self._unwritten.clear()


def encoding_key(examples: Sequence[tuple[Example, Mode]], encoder: Encoder, most: int | None) -> str:
    """Hash what decides the encoding of examples: contents and modes, tokenizer, format, policies, and this package's code."""
    policies = {example.policy: policy_for(example, encoder.policy) for example, _ in examples}
    facts = [
        most,
        code_digest("data"),
        [jaxguard.__version__, *map(version, _PACKAGES)],
        hashlib.sha256(encoder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        repr((encoder.tokenizer.chat_template, encoder.template, encoder.dialogue)),
        encoder.max_seq_len,
        [(name, policy.digest) for name, policy in policies.items()],
        digest(example for example, _ in examples),
        [mode.value for _, mode in examples],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_encoded(path: Path, key: str, encoded: Sequence[Branches]) -> None:
    """Write the sequences of some examples; the file appears whole or not at all."""
    # A rejected answer follows the chosen one.
    sequences = [sequence for branches in encoded for each in branches for sequence in each.sequences]
    probes = [probe for sequence in sequences for probe in sequence.probes]
    answers = [answer for sequence in sequences for answer in sequence.answers]
    arrays = {
        "branches": [len(branches) for branches in encoded],
        "lengths": [len(sequence.tokens) for sequence in sequences],
        "targets": [int(sequence.loss_mask.sum()) for sequence in sequences],
        "shared": [sequence.shared for sequence in sequences],
        "cut": [sequence.cut for sequence in sequences],
        "rejected": [sequence.rejected is not None for sequence in sequences],
        "num_probes": [len(sequence.probes) for sequence in sequences],
        "probes": [(QUESTIONS.index(p.question), p.position, p.positive_id, p.negative_id) for p in probes],
        "num_answers": [len(sequence.answers) for sequence in sequences],
        "answers": [(QUESTIONS.index(question), _WORDS.index(word)) for question, word in answers],
    }
    tokens = np.concatenate([np.zeros(0, np.int32), *(sequence.tokens for sequence in sequences)])
    weights = np.asarray([sequence.weight for sequence in sequences])
    numbers = {name: np.asarray(values, np.int32) for name, values in arrays.items()}
    write_arrays(path, key, {"tokens": tokens, "weights": weights, **numbers})


def read_encoded(path: Path, key: str, examples: Sequence[tuple[Example, Mode]]) -> list[Branches] | None:
    """Read the sequences of some examples; None where there is no file, or one that is damaged or has another key."""
    try:
        arrays = read_arrays(path, key)
        return None if arrays is None else _parse(arrays, examples)
    except (LookupError, ValueError, StopIteration) as error:
        logger.warning("%s cannot be read (%s): the data are encoded again", path, error)
        return None


def _parse(arrays: dict[str, np.ndarray], examples: Sequence[tuple[Example, Mode]]) -> list[Branches]:
    def split(name: str, lengths: str) -> list[np.ndarray]:
        counts = arrays[lengths]
        return [arrays[name][end - count : end] for count, end in zip(counts, np.cumsum(counts), strict=True)]

    sequences = zip(
        split("tokens", "lengths"),
        split("probes", "num_probes"),
        split("answers", "num_answers"),
        *(arrays[name].tolist() for name in ("targets", "shared", "cut", "weights", "rejected")),
        strict=True,
    )

    def sequence(example: Example, mode: Mode) -> EncodedExample:
        tokens, probes, answers, targets, shared, cut, weight, rejected = next(sequences)
        return EncodedExample(
            example.id,
            mode,
            tokens,
            np.arange(len(tokens)) >= len(tokens) - targets,
            tuple(Probe(QUESTIONS[question], *values) for question, *values in probes.tolist()),
            tuple((QUESTIONS[question], _WORDS[word]) for question, word in answers.tolist()),
            bool(cut),
            shared,
            weight,
            sequence(example, mode) if rejected else None,
        )

    return [
        tuple(sequence(*each) for _ in range(count))
        for each, count in zip(examples, arrays["branches"].tolist(), strict=True)
    ]
