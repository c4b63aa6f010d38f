"""Training examples whose prompt a benchmark also holds, equal or nearly equal.

Texts are compared without case, punctuation and spacing. Nearly equal: the Jaccard similarity of their sets of
five-character shingles reaches a threshold. MinHash with banding (Broder 1997; Indyk and Motwani 1998) proposes pairs,
the sketches themselves rule most of them out, and the rest is compared exactly. So what is listed is certain; a pair
right at the threshold is missed with a probability of at most 2 × _MISSED, a more similar one less often.
"""

import math
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxguard.data.examples import Example
from jaxguard.utils.errors import JaxguardError

SHINGLE = 5
"""Characters in a shingle."""
SHORTEST = 20
"""A normalised text of fewer characters has too few shingles to be nearly equal to another: only its equal matches."""
LEAST_SIMILARITY = 0.5
"""Below it unrelated texts are proposed in masses."""

_PERMUTATIONS = 128
_MISSED = 5e-5
# By how much the part of the permutations that agree may fall short of the similarity (Hoeffding's inequality).
_SLACK = math.sqrt(math.log(1 / _MISSED) / (2 * _PERMUTATIONS))
_SEED = 1
_AT_ONCE = 8192  # shingles that are permuted in one go: bounds the memory that a long text takes


@dataclass(frozen=True)
class Match:
    """A training example with the prompt of a benchmark's example.

    Attributes:
        example_id: the training example.
        benchmark, benchmark_id: the benchmark's.
        similarity: Jaccard similarity of their shingles.
        exact: their normalised texts are equal.
    """

    example_id: str
    benchmark: str
    benchmark_id: str
    similarity: float
    exact: bool


def find_matches(
    examples: Iterable[Example], benchmarks: Mapping[str, Sequence[Example]], similarity: float
) -> list[Match]:
    """Every pair of a training example and a benchmark's example whose prompts match.

    Only prompts are compared: the same response to another prompt is another conversation. A prompt of nothing but
    punctuation matches nothing. Pairs come in the order of `examples`, the most similar first.

    Args:
        examples: read once, one at a time; what is held in memory is the benchmarks.
        benchmarks: name -> examples.
        similarity: from which on two texts are nearly equal.

    Raises:
        JaxguardError: similarity is out of range, or datasketch is not installed.
    """
    if not LEAST_SIMILARITY <= similarity <= 1:
        raise JaxguardError(f"similarity is {similarity}; expected a number from {LEAST_SIMILARITY} to 1")
    holders: dict[str, list[tuple[str, str]]] = {}
    for benchmark, held in benchmarks.items():
        for example in held:
            holders.setdefault(normalise(example.prompt), []).append((benchmark, example.id))
    holders.pop("", None)
    near, matches = _near_texts(holders, similarity), []
    for example in examples:
        text = normalise(example.prompt)
        for other, likeness in [(text, 1.0), *near(text)]:
            matches += [Match(example.id, *holder, likeness, other == text) for holder in holders.get(other, ())]
    return matches


def normalise(text: str) -> str:
    """The text as it is compared.

    Compatibility forms such as full-width letters are unified (NFKC), case is folded, invisible characters go, and
    whatever punctuation and white space stand between words is one space. Symbols stay: an emoji may be the message.
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_FOLDED)
    return " ".join(unicodedata.normalize("NFKC", text).split())


class _Folded(dict[int, str]):
    """A table for str.translate that decides on a character when it first meets it."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        invisible = category == "Cf" or 0xFE00 <= code <= 0xFE0F  # or a variation selector
        between = category[0] in "PZ" or category == "Cc"
        self[code] = folded = "" if invisible else " " if between else chr(code)
        return folded


_FOLDED = _Folded()


def _near_texts(texts: Iterable[str], similarity: float) -> Callable[[str], list[tuple[str, float]]]:
    """A function that gives those of `texts` that are nearly but not quite a given one, with their similarity."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise JaxguardError(
            f"the search for nearly equal prompts is not installed ({error}): pip install -e '.[distill]'"
        ) from None
    empty = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=_hash)

    def sketch(shingles: frozenset[str]) -> Any:
        result, parts = empty.copy(), list(shingles)
        for start in range(0, len(parts), _AT_ONCE):
            result.update_batch(parts[start : start + _AT_ONCE])
        return result

    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(similarity))
    known = [text for text in texts if len(text) >= SHORTEST]
    sketches = np.empty((len(known), _PERMUTATIONS), empty.hashvalues.dtype)
    for place, text in enumerate(known):
        own = sketch(_shingles(text))
        index.insert(place, own)
        sketches[place] = own.hashvalues

    def near(text: str) -> list[tuple[str, float]]:
        if len(text) < SHORTEST:
            return []
        shingles = _shingles(text)
        own = sketch(shingles)
        # The index gives them in an order of its own.
        places = np.array(sorted(index.query(own)), int)
        agreeing = (sketches[places] == own.hashvalues).mean(axis=1)
        likely = [known[place] for place in places[agreeing >= similarity - _SLACK]]
        found = [(other, jaccard(shingles, _shingles(other))) for other in likely if other != text]
        return sorted((pair for pair in found if pair[1] >= similarity), key=lambda pair: -pair[1])

    return near


def jaccard(one: frozenset[str], two: frozenset[str]) -> float:
    """What two sets share, as a part of what they hold together."""
    shared = len(one & two)
    return shared / (len(one) + len(two) - shared)


def _shingles(text: str) -> frozenset[str]:
    return frozenset(text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1))


def _hash(shingle: str) -> int:
    """Equal in every process, unlike Python's own; MinHash mixes its bits further."""
    return zlib.crc32(shingle.encode("utf-8", "surrogatepass"))


def _bands(similarity: float) -> tuple[int, int]:
    """(bands, rows): two sets are proposed when all permutations of a band agree, one row for each permutation.

    That has probability 1 - (1 - similarity^rows)^bands. More rows propose fewer unrelated pairs, so as many as the
    tolerated misses allow.
    """
    choices = [(_PERMUTATIONS // rows, rows) for rows in range(1, _PERMUTATIONS // 2 + 1)]
    return max((c for c in choices if (1 - similarity ** c[1]) ** c[0] <= _MISSED), key=lambda choice: choice[1])
