"""Find training examples whose prompt is in a benchmark too, equal or nearly equal.

Texts are nearly equal if the Jaccard similarity of their sets of five-character shingles reaches a threshold. MinHash with banding
(Broder 1997; Indyk and Motwani 1998) proposes pairs, their sketches rule most of them out, and the rest is compared exactly: there
are no false positives, and a pair at the threshold is missed with a probability of at most 2 × _MISSED.
"""

import math
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from jaxguard.data.examples import Example
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.versions import install

SHINGLE = 5
"""Characters in a shingle."""
SHORTEST = 20
"""Shorter normalised texts have too few shingles: only equal ones match."""

_PERMUTATIONS = 128
_MISSED = 5e-5
# Bound on similarity less the share of equal permutations (Hoeffding's inequality).
_SLACK = math.sqrt(math.log(1 / _MISSED) / (2 * _PERMUTATIONS))
_CHUNK = 8192  # shingles that are permuted at a time: bounds the memory for a long text


@dataclass(frozen=True)
class Match:
    """A training example and a benchmark's with matching prompts; `exact` if their normalised texts are equal."""

    example_id: str
    benchmark: str
    benchmark_id: str
    similarity: float
    exact: bool


def find_matches(
    examples: Iterable[Example], benchmarks: Mapping[str, Sequence[Example]], similarity: float
) -> list[Match]:
    """Find all pairs of a training example and a benchmark's example whose prompts match.

    `examples` are iterated over once; `similarity`, from 0.5 to 1, is the least of nearly equal texts. A prompt without words or
    symbols matches nothing. Pairs are in the order of `examples`, the most similar first.
    """
    holders: dict[str, list[tuple[str, str]]] = {}
    for benchmark, benchmark_examples in benchmarks.items():
        for example in benchmark_examples:
            holders.setdefault(normalise(example.prompt), []).append((benchmark, example.id))
    holders.pop("", None)
    near, matches = _near_texts(holders, similarity), []
    for example in examples:
        text = normalise(example.prompt)
        for other, likeness in [(text, 1.0), *near(text)]:
            matches += [Match(example.id, *holder, likeness, other == text) for holder in holders.get(other, ())]
    return matches


def normalise(text: str) -> str:
    """Normalise a text for comparison.

    Unify compatibility forms such as full-width letters (NFKC), fold case, remove invisible characters, and replace punctuation
    and white space by one space. Symbols stay: an emoji may be the message.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", "".join(map(_folded, text))).split())


@cache
def _folded(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf" or "\ufe00" <= character <= "\ufe0f":  # invisible, or a variation selector
        return ""
    return " " if category[0] in "PZ" or category == "Cc" else character


def _near_texts(texts: Iterable[str], similarity: float) -> Callable[[str], list[tuple[str, float]]]:
    """Index `texts`; return a function from a text to those that are nearly but not exactly equal, with their similarity."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise JaxguardError(
            f"the search for nearly equal prompts is not installed ({error}): {install('distill')}"
        ) from None
    # The hash is the same in every process; MinHash mixes the bits further.
    empty = MinHash(_PERMUTATIONS, seed=1, hashfunc=lambda text: zlib.crc32(text.encode("utf-8", "surrogatepass")))
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(similarity))
    known = [text for text in texts if len(text) >= SHORTEST]
    sketches = np.empty((len(known), _PERMUTATIONS), empty.hashvalues.dtype)

    def sketch(shingles: frozenset[str]) -> Any:
        result, parts = empty.copy(), list(shingles)
        for start in range(0, len(parts), _CHUNK):
            result.update_batch(parts[start : start + _CHUNK])
        return result

    def near(text: str) -> list[tuple[str, float]]:
        if len(text) < SHORTEST:
            return []
        shingles = _shingles(text)
        own = sketch(shingles)
        candidates = np.array(sorted(index.query(own)), int)  # the index returns them in any order
        agreeing = (sketches[candidates] == own.hashvalues).mean(axis=1)
        likely = [known[i] for i in candidates[agreeing >= similarity - _SLACK]]
        pairs = [(other, jaccard(shingles, _shingles(other))) for other in likely if other != text]
        return sorted((pair for pair in pairs if pair[1] >= similarity), key=lambda pair: -pair[1])

    for i, text in enumerate(known):
        own = sketch(_shingles(text))
        index.insert(i, own)
        sketches[i] = own.hashvalues
    return near


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _shingles(text: str) -> frozenset[str]:
    return frozenset(text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1))


def _bands(similarity: float) -> tuple[int, int]:
    """Return (bands, rows), with as many rows as _MISSED allows, since more rows propose fewer unrelated pairs.

    Two sets are proposed if all rows of a band agree, with probability 1 - (1 - similarity^rows)^bands.
    """
    options = [(_PERMUTATIONS // rows, rows) for rows in range(1, _PERMUTATIONS // 2 + 1)]
    return max((o for o in options if (1 - similarity ** o[1]) ** o[0] <= _MISSED), key=lambda option: option[1])
