"""A trace store as one HTML page: what was asked, what failed, how long the traces are, and the traces themselves.

The page is a file that asks no network for anything. Everything that a model wrote is data on it, never markup, and stays
hidden until it is clicked: much of it is offensive.
"""

import base64
import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxguard.config import Config
from jaxguard.distill.filters import CHECKS, words
from jaxguard.distill.store import Attempt, read_attempts, store_settings
from jaxguard.report.html import page_template
from jaxguard.utils.files import write_atomically

TEMPLATE = Path(__file__).with_name("page.html.j2")
BINS = 40


@dataclass
class Numbers:
    """What a page says of all attempts. Grows by 8 bytes an attempt, for counting distinct examples.

    Attributes:
        attempts, accepted: round -> how many.
        failed: (check, round) -> attempts that failed it; one attempt may fail several.
        first: check -> attempts that failed it and none before it.
        words, tokens: accepted or not -> length of the trace in words, of the answer in tokens -> attempts.
        seconds: from request to answer, to a tenth -> attempts.
        prompt_tokens, completion_tokens: of all attempts.
        start, end: when the first and the last was answered.
    """

    attempts: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    failed: Counter[tuple[str, int]] = field(default_factory=Counter)
    first: Counter[str] = field(default_factory=Counter)
    words: dict[bool, Counter[int]] = field(default_factory=lambda: {True: Counter(), False: Counter()})
    tokens: dict[bool, Counter[int]] = field(default_factory=lambda: {True: Counter(), False: Counter()})
    seconds: Counter[float] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    start: str = ""
    end: str = ""
    _examples: dict[bool, "array[int]"] = field(default_factory=lambda: {True: array("Q"), False: array("Q")})

    def add(self, attempt: Attempt) -> None:
        """Count an attempt."""
        self.attempts[attempt.round] += 1
        self.accepted[attempt.round] += attempt.accepted
        self.failed.update((check, attempt.round) for check in attempt.failures)
        if not attempt.accepted:
            self.first[min(attempt.failures, key=_position)] += 1
        self.words[attempt.accepted][len(words(attempt.trace))] += 1
        self.tokens[attempt.accepted][attempt.completion_tokens] += 1
        self.seconds[round(attempt.seconds, 1)] += 1
        self.prompt_tokens += attempt.prompt_tokens
        self.completion_tokens += attempt.completion_tokens
        self.start = min(self.start or attempt.time, attempt.time)
        self.end = max(self.end, attempt.time)
        self._examples[attempt.accepted].append(_hash(attempt.example_id))

    @property
    def checks(self) -> list[str]:
        """Every check, in the order of Filters; others, such as the judge, only if something failed them."""
        return sorted({*CHECKS, *self.first, *(check for check, _ in self.failed)}, key=_position)

    @property
    def traced(self) -> int:
        """Examples with an accepted trace."""
        return len(np.unique(np.asarray(self._examples[True], np.uint64)))

    @property
    def examples(self) -> int:
        """Examples that were asked about."""
        return len(np.unique(np.concatenate([np.asarray(ids, np.uint64) for ids in self._examples.values()])))


@dataclass
class Sample:
    """The attempts that a page shows: all of them, or half accepted and half failed as far as there are as many.

    Which ones depends on a hash of their example only, so those about one example are chosen together, in whatever order
    they come.
    """

    most: int
    _kept: dict[bool, list[Any]] = field(default_factory=lambda: {True: [], False: []})
    _seen: int = 0

    def add(self, attempt: Attempt) -> None:
        """Take an attempt, and let another one go where there are too many."""
        self._seen += 1
        rank = (-_hash(attempt.example_id), -attempt.round, -attempt.candidate, self._seen)
        heappush(self._kept[attempt.accepted], (rank, attempt))
        if sum(map(len, self._kept.values())) > self.most:
            heappop(max(self._kept.values(), key=len))  # the larger half never grows again, so nothing lost is missed

    def attempts(self) -> list[Attempt]:
        """By example, round and candidate."""
        return sorted((attempt for kept in self._kept.values() for _, attempt in kept), key=lambda attempt: attempt.key)


@dataclass(frozen=True)
class Bin:
    """A column of a histogram: values from `low` up to `high`, which is None in one that has no end."""

    low: int
    high: int | None
    accepted: int
    failed: int


def inspect(config: Config, store: str = "traces") -> int:
    """Write the page of one of a run's trace stores beside it.

    Raises:
        JaxguardError: there is no store, or the page cannot be written.
    """
    output = config.folder / f"{store}.html"
    shown = write_page(config.folder / store, output)
    Console(soft_wrap=True).print(Text(f"{shown:,} attempts to read: {output}"))
    return 0


def write_page(store: Path, output: Path, most: int = 2000) -> int:
    """Write what a store holds as a page; it may be empty, and another process may be writing to it.

    Args:
        store: the trace store's folder.
        output: the page.
        most: attempts to show; the numbers are of all.

    Returns:
        how many attempts are shown.

    Raises:
        JaxguardError: there is no store, or the page cannot be written.
    """
    settings = store_settings(store)
    numbers, sample = Numbers(), Sample(most)
    for attempt in read_attempts(store):
        numbers.add(attempt)
        sample.add(attempt)
    shown = sample.attempts()
    template = page_template(TEMPLATE, number="{:,}".format, percent="{:.1%}".format, csp=_csp)
    page = template.render(
        settings=settings,
        flat=flattened(settings),
        numbers=numbers,
        funnel=funnel(numbers),
        histograms={"Words of the trace": histogram(numbers.words), "Tokens of the answer": histogram(numbers.tokens)},
        quantile=quantile,
        shown=shown,
        rows=[_row(attempt) for attempt in shown],
    )
    write_atomically(output, page.encode("utf-8", "replace").decode())  # lone surrogates are no text
    return len(shown)


def funnel(numbers: Numbers) -> list[tuple[str, int, int, int]]:
    """(check, attempts that are left after it, attempts that it is the first to fail, attempts that fail it), in order."""
    rows, left = [], numbers.attempts.total()
    for check in numbers.checks:
        left -= numbers.first[check]
        failed = sum(numbers.failed[check, number] for number in numbers.attempts)
        rows.append((check, left, numbers.first[check], failed))
    return rows


def histogram(counts: Mapping[bool, Counter[int]]) -> list[Bin]:
    """At most BINS + 1 columns of a round width; the last one takes what lies beyond the 99th percentile."""
    both = counts[True] + counts[False]
    if not both:
        return []
    step = _step(quantile(both, 0.99) / BINS)
    last = int(quantile(both, 0.99) // step)
    binned = {kind: Counter[int]() for kind in counts}
    for kind, values in counts.items():
        for value, count in values.items():
            binned[kind][min(value // step, last)] += count
    return [
        Bin(
            i * step,
            (i + 1) * step if i < last or max(both) // step == last else None,
            binned[True][i],
            binned[False][i],
        )
        for i in range(last + 1)
    ]


def quantile(counts: Mapping[Any, int], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 without any."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 1e-9:
            return value
    return 0


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= least:
                return digit * scale
        scale *= 10


def _position(check: str) -> tuple[int, str]:
    return CHECKS.index(check) if check in CHECKS else len(CHECKS), check


def _hash(example: str) -> int:
    return int.from_bytes(hashlib.sha256(example.encode("utf-8", "surrogatepass")).digest()[:8])


def _row(attempt: Attempt) -> dict[str, Any]:
    """An attempt as the page's script reads it."""
    return {
        "example": attempt.example_id,
        "round": attempt.round,
        "candidate": attempt.candidate,
        "failures": [(check, attempt.failures[check]) for check in sorted(attempt.failures, key=_position)],
        "trace": attempt.trace,
        "answer": attempt.answer,
        "finish": attempt.finish_reason,
        "words": len(words(attempt.trace)),
        "tokens": attempt.completion_tokens,
        "seconds": round(attempt.seconds, 1),
        "time": attempt.time,
    }


def _csp(text: str) -> str:
    """What lets exactly this script or style pass a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
