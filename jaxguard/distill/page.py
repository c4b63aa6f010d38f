"""A trace store as one HTML page: what failed, how long the traces are, and the traces themselves.

The page is a file that loads nothing. What a model wrote is data on it, never markup, and stays hidden until it is clicked:
much of it is offensive.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxguard.config import Config
from jaxguard.distill.filters import CHECKS, words
from jaxguard.distill.store import Attempt, read_attempts, store_settings
from jaxguard.report import (
    Beside,
    Cell,
    Content,
    Details,
    Drawing,
    Facts,
    Page,
    Paragraph,
    Section,
    Table,
    Tiles,
    write_page,
)
from jaxguard.report.figures import COLOURS, inline_svg, style
from jaxguard.report.text import DASH, count, share

TEMPLATE = Path(__file__).with_name("page.html.j2")
BINS = 40
MOST_ATTEMPTS = 2000
"""Attempts whose text is on the page."""


@dataclass
class Numbers:
    """Counts over all attempts. Grows by 8 bytes an attempt, for counting distinct examples.

    Attributes:
        attempts, accepted: round -> how many.
        failed: (check, round) -> attempts that failed it; one attempt may fail several.
        first: check -> attempts that failed it and none before it.
        words, tokens: accepted or not -> length of the trace in words, of the completion in tokens -> attempts.
        seconds: from request to response, to a tenth -> attempts.
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
        """Examples with an attempt."""
        return len(np.unique(np.concatenate([np.asarray(ids, np.uint64) for ids in self._examples.values()])))


@dataclass
class Sample:
    """The attempts that a page shows: all of them, or half accepted and half failed as far as there are as many.

    Which ones depends on a hash of their example only, so those about one example are chosen together, in whatever order
    they come.
    """

    most: int
    _attempts: dict[bool, list[Any]] = field(default_factory=lambda: {True: [], False: []})
    _seen: int = 0

    def add(self, attempt: Attempt) -> None:
        """Take an attempt, and let another one go where there are too many."""
        self._seen += 1
        rank = (-_hash(attempt.example_id), -attempt.round, -attempt.candidate, self._seen)
        heappush(self._attempts[attempt.accepted], (rank, attempt))
        if sum(map(len, self._attempts.values())) > self.most:
            # The larger half never grows again, so no attempt that is dropped is missed.
            heappop(max(self._attempts.values(), key=len))

    def attempts(self) -> list[Attempt]:
        """By example, round and candidate."""
        attempts = [attempt for half in self._attempts.values() for _, attempt in half]
        return sorted(attempts, key=lambda attempt: attempt.key)


@dataclass(frozen=True)
class Bin:
    """A column of a histogram: values from `low` up to `high`, which is None in one that has no end."""

    low: int
    high: int | None
    accepted: int
    failed: int


def inspect(config: Config, store: str = "traces") -> Path:
    """Write the page of one of a run's trace stores beside it.

    Raises:
        JaxguardError: there is no store, or the page cannot be written.
    """
    path = config.folder / f"{store}.html"
    write_store_page(config.folder / store, path)
    return path


def write_store_page(store: Path, path: Path, most: int = MOST_ATTEMPTS) -> None:
    """Write what a store holds as a page; it may be empty, and another process may be appending to it.

    Args:
        store: the trace store's folder.
        path: the page.
        most: attempts whose text is on the page; the numbers are of all.

    Raises:
        JaxguardError: there is no store, or the page cannot be written.
    """
    settings = flattened(store_settings(store))
    numbers, sample = Numbers(), Sample(most)
    for attempt in read_attempts(store):
        numbers.add(attempt)
        sample.add(attempt)
    attempts = sample.attempts()
    page = Page(f"Traces of {settings.get('teacher', 'a teacher')}", [
        Facts([(name, _short(value)) for name, value in settings.items() if name in _SHOWN or name.startswith("sampling.")]),
        Details("All settings", [Facts([(name, "none" if value is None else value) for name, value in settings.items()])]),
        *(_blocks(numbers, attempts) if numbers.attempts else ["The store holds no attempts yet."]),
    ])  # fmt: skip
    rows = [_row(attempt) for attempt in attempts]
    failed = [check for check in numbers.checks if any(numbers.failed[check, n] for n in numbers.attempts)]
    write_page(path, page, TEMPLATE, rows=rows, checks=failed, rounds=sorted(numbers.attempts))


_SHOWN = ("version", "prompt", "policy")
"""Settings at the head of the page, with those of sampling."""


def _blocks(numbers: Numbers, attempts: Sequence[Attempt]) -> list[Content]:
    total, accepted, examples = numbers.attempts.total(), numbers.accepted.total(), numbers.examples
    slowest = quantile(numbers.seconds, 0.95)
    good = sum(attempt.accepted for attempt in attempts)
    chosen = f"All {count(total, 'attempt')}."
    if len(attempts) < total:
        chosen = (
            f"{len(attempts):,} of {total:,} attempts, chosen by a hash of the example: {good:,} of {accepted:,} accepted and "
            f"{len(attempts) - good:,} of {total - accepted:,} failed."
        )
    return [
        Tiles([
            ("Examples with a trace", f"{numbers.traced:,}", f"{share(numbers.traced, examples)} of {examples:,}"),
            ("Accepted attempts", f"{accepted:,}", f"{share(accepted, total)} of {total:,}"),
            ("Completion tokens", f"{numbers.completion_tokens:,}", f"and {numbers.prompt_tokens:,} of prompts"),
            ("Seconds to a response", f"{quantile(numbers.seconds, 0.5):,.1f}", f"median; 95 % within {slowest:,.1f}"),
        ]),
        _faint(f"Requested from {_moment(numbers.start)} to {_moment(numbers.end)} UTC."),
        Section("From examples to traces", [
            _faint("An attempt stops at the first check that it fails; the last column counts it for every check that it fails."),
            _funnel_table(numbers),
        ]),
        Section("Lengths", [Beside([
            _lengths("Words of the trace", "words", numbers.words),
            _lengths("Tokens of the completion", "tokens", numbers.tokens),
        ])]),
        Section("Failed checks by round", [_faint("Attempts; bars are shares of the round."), _rounds_table(numbers)]),
        Section("Attempts", [
            chosen,
            "Much of what the teacher read and wrote is offensive; it is shown one attempt at a time, when you open it.",
        ]),
    ]  # fmt: skip


def _funnel_table(numbers: Numbers) -> Table:
    total, accepted = numbers.attempts.total(), numbers.accepted.total()
    table = Table(("", "left", "stop here", "fail it"), "From examples to traces")
    table.add("examples", numbers.examples, "", "", kind="strong")
    table.add("attempts", Cell(f"{total:,}", bar=1.0), "", "", kind="strong")
    for check, left, first, failed in funnel(numbers):
        counts = (f"{first:,}" if first else DASH, f"{failed:,}" if failed else DASH)
        table.add(check, Cell(f"{left:,}", bar=left / total), *counts, kind="" if failed else "faint")
    table.add("accepted attempts", accepted, total - accepted, "", kind="strong")
    table.add("examples with a trace", numbers.traced, "", "", kind="strong")
    return table


def _rounds_table(numbers: Numbers) -> Table:
    rounds = sorted(numbers.attempts)
    table = Table(("", *(f"round {i}" for i in rounds)), "Failed checks by round")

    def cells(counts: Mapping[int, int]) -> list[Cell]:
        return [Cell(f"{counts[i]:,}", bar=counts[i] / numbers.attempts[i]) for i in rounds]

    table.add("attempts", *(numbers.attempts[i] for i in rounds), kind="strong")
    table.add("accepted", *cells(numbers.accepted), kind="strong")
    for check in numbers.checks:
        failed = {i: numbers.failed[check, i] for i in rounds}
        if any(failed.values()):
            table.add(check, *cells(failed))
    return table


def _lengths(title: str, unit: str, counts: Mapping[bool, Counter[int]]) -> Section:
    """Histograms of the accepted and of the failed attempts, and their numbers."""
    bins = histogram(counts)
    table = Table((unit, "accepted", "failed"), title)
    for each in bins:
        high = each.high - 1 if each.high is not None else None
        values = (
            f"{each.low:,} and more" if high is None else f"{each.low:,}–{high:,}" if high > each.low else f"{high:,}"
        )
        table.add(values, each.accepted, each.failed)
    medians = [
        f"{kind}: median {quantile(counts[good], 0.5):,}, 95 % up to {quantile(counts[good], 0.95):,}"
        for kind, good in (("accepted", True), ("failed", False))
        if counts[good]
    ]
    svg = inline_svg(
        _histogram_figure(bins, unit), unit, f"Histogram: {title.lower()}; the table below has the numbers"
    )
    return Section(title, [Drawing("", svg), _faint("; ".join(medians)), Details("As a table", [table])])


@style()
def _histogram_figure(bins: Sequence[Bin], unit: str) -> Figure:
    figure = Figure(figsize=(4.9, 2.8))
    edges = [each.low for each in bins] + [bins[-1].low + bins[0].high if bins[0].high else bins[-1].low + 1]
    for i, kind in enumerate(("accepted", "failed")):
        axes = figure.add_subplot(2, 1, i + 1)
        axes.stairs([getattr(each, kind) for each in bins], edges, fill=True, color=COLOURS[i])
        axes.set_ylabel(kind)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_xlabel(unit)
    return figure


def funnel(numbers: Numbers) -> list[tuple[str, int, int, int]]:
    """(check, attempts that are left after it, attempts that it is the first to fail, attempts that fail it), in order."""
    rows, left = [], numbers.attempts.total()
    for check in numbers.checks:
        left -= numbers.first[check]
        failed = sum(numbers.failed[check, i] for i in numbers.attempts)
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
        for value, attempts in values.items():
            binned[kind][min(value // step, last)] += attempts
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


def _faint(text: str) -> Paragraph:
    return Paragraph([text], faint=True)


def _short(value: object) -> object:
    """A hash by its first digits."""
    if value is None:
        return "any"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 and value.isalnum() else value


def _moment(time: str) -> str:
    return time[:16].replace("T", " ")


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
