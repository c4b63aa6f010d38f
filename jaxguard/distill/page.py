"""A trace store as one HTML page: what failed, how long the traces are, and the traces themselves.

The page is a file that loads nothing. What a model wrote is escaped and stays hidden until it is opened: much of it is offensive.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxguard.distill.filters import CHECKS, words
from jaxguard.distill.store import attempts_file, read_attempts
from jaxguard.report import Beside, Cell, Code, Details, Drawing, Page, Paragraph, Section, Table, Tiles, write_page
from jaxguard.report.figures import COLOURS, inline_svg, style
from jaxguard.report.text import DASH, count, share
from jaxguard.utils.store import read_settings

TEMPLATE = Path(__file__).with_name("page.html.j2")
BINS = 40
MOST_ATTEMPTS = 2000
"""Attempts whose text is on the page."""


def write_store_page(store: Path, path: Path, most: int = MOST_ATTEMPTS) -> None:
    """Write what a store holds as a page, with the text of at most `most` attempts; another process may be appending to it."""
    settings = read_settings(attempts_file(store))
    numbers = read_numbers(store)
    shown = sample(numbers, most)
    stored = enumerate(itertools.islice(read_attempts(store), len(numbers)))
    attempts = sorted((each for i, each in stored if i in shown.index), key=lambda attempt: attempt.key)
    page = _page(settings, numbers, shown)
    checks = sorted({check for failed in numbers.failed for check in failed}, key=_position)
    numbered = sorted(set(numbers["round"]))
    write_page(path, page, TEMPLATE, attempts=attempts, words=words, checks=checks, rounds=numbered)


def read_numbers(store: Path) -> pd.DataFrame:
    """Read the numbers of all attempts, a row each: `example` is a hash, `failed` are the checks in the order of Filters."""
    columns = ("example", "round", "candidate", "failed", "words", "tokens", "prompt_tokens", "seconds", "time")
    rows = (
        (
            int.from_bytes(hashlib.sha256(each.example_id.encode("utf-8", "surrogatepass")).digest()[:8]),
            each.round, each.candidate, tuple(sorted(each.failures, key=_position)), len(words(each.trace)),
            each.completion_tokens, each.prompt_tokens, round(each.seconds, 1), each.time,
        )
        for each in read_attempts(store)
    )  # fmt: skip
    numbers = pd.DataFrame(rows, columns=columns)
    return numbers.assign(accepted=numbers.failed.map(len) == 0)


def sample(numbers: pd.DataFrame, most: int) -> pd.DataFrame:
    """Choose at most `most` attempts, half of them accepted if possible; those about one example are chosen together."""
    ranked = numbers.sort_values(["example", "round", "candidate"])
    accepted, failed = ranked[ranked.accepted], ranked[~ranked.accepted]
    good = min(len(accepted), max(most // 2, most - len(failed)))
    return pd.concat([accepted[:good], failed[: most - good]])


def _page(settings: Mapping[str, Any], numbers: pd.DataFrame, shown: pd.DataFrame) -> Page:
    title = f"Traces of {settings.get('teacher', 'a teacher')}"
    details = Details("Settings", [Code(json.dumps(settings, indent=2))])
    if not len(numbers):
        return Page(title, [details, "The store holds no attempts yet."])
    total, accepted, good = len(numbers), int(numbers.accepted.sum()), int(shown.accepted.sum())
    examples, traced = numbers.example.nunique(), numbers[numbers.accepted].example.nunique()
    median, slowest = _quantiles(numbers.seconds)
    start, end = (moment[:16].replace("T", " ") for moment in (numbers.time.min(), numbers.time.max()))
    chosen = f"All {count(total, 'attempt')}."
    if len(shown) < total:
        chosen = (
            f"{len(shown):,} of {total:,} attempts, chosen by a hash of the example: {good:,} of {accepted:,} accepted and "
            f"{len(shown) - good:,} of {total - accepted:,} failed."
        )
    return Page(title, [
        details,
        Tiles([
            ("Examples with a trace", f"{traced:,}", f"{share(traced, examples)} of {examples:,}"),
            ("Accepted attempts", f"{accepted:,}", f"{share(accepted, total)} of {total:,}"),
            ("Completion tokens", f"{numbers.tokens.sum():,}", f"and {numbers.prompt_tokens.sum():,} of prompts"),
            ("Seconds to a response", f"{median:,.1f}", f"median; 95 % within {slowest:,.1f}"),
        ]),
        _faint(f"Requested from {start} to {end} UTC."),
        Section("From examples to traces", [
            _faint("An attempt stops at the first check that it fails; the last column counts it for every check that it fails."),
            funnel(numbers),
        ]),
        Section("Lengths", [Beside([
            _lengths("Words of the trace", "words", numbers),
            _lengths("Tokens of the completion", "tokens", numbers),
        ])]),
        Section("Failed checks by round", [_faint("Attempts; bars are shares of the round."), rounds(numbers)]),
        Section("Attempts", [
            chosen,
            "Much of what the teacher read and wrote is offensive; it is shown one attempt at a time, when you open it.",
        ]),
    ])  # fmt: skip


def funnel(numbers: pd.DataFrame) -> Table:
    """Tabulate attempts by check: those left after it, those that it is the first to fail, those that fail it."""
    total, accepted = len(numbers), int(numbers.accepted.sum())
    first, failed = numbers.failed.str[0].value_counts(), numbers.failed.explode().value_counts()
    table = Table(("", "left", "stop here", "fail it"), "From examples to traces")
    table.add("examples", numbers.example.nunique(), "", "", kind="strong")
    table.add("attempts", Cell(f"{total:,}", bar=1.0), "", "", kind="strong")
    left = total
    for check in sorted({*CHECKS, *failed.index}, key=_position):
        stopped, failing = first.get(check, 0), failed.get(check, 0)
        left -= stopped
        counts = (f"{stopped:,}" if stopped else DASH, f"{failing:,}" if failing else DASH)
        table.add(check, Cell(f"{left:,}", bar=left / total), *counts, kind="" if failing else "faint")
    table.add("accepted attempts", accepted, total - accepted, "", kind="strong")
    table.add("examples with a trace", numbers[numbers.accepted].example.nunique(), "", "", kind="strong")
    return table


def rounds(numbers: pd.DataFrame) -> Table:
    """Tabulate the failed checks of each round."""
    sizes = numbers["round"].value_counts().sort_index()
    table = Table(("", *(f"round {i}" for i in sizes.index)), "Failed checks by round")
    table.add("attempts", *map(int, sizes), kind="strong")
    outcomes = numbers.assign(failed=numbers.failed.map(lambda checks: checks or ("accepted",))).explode("failed")
    counts = pd.crosstab(outcomes["failed"], outcomes["round"])
    checks = sorted(set(counts.index) - {"accepted"}, key=_position)
    for outcome, row in counts.reindex(["accepted", *checks], fill_value=0).iterrows():
        shares = [Cell(f"{n:,}", bar=n / size) for n, size in zip(row, sizes, strict=True)]
        table.add(str(outcome), *shares, kind="strong" if outcome == "accepted" else "")
    return table


def _lengths(title: str, unit: str, numbers: pd.DataFrame) -> Section:
    """Draw histograms of the accepted and of the failed attempts."""
    medians = []
    for kind, attempts in (("accepted", numbers[numbers.accepted]), ("failed", numbers[~numbers.accepted])):
        if len(attempts):
            median, most = _quantiles(attempts[unit])
            medians.append(f"{kind}: median {median:,}, 95 % up to {most:,}")
    svg = inline_svg(_histograms(numbers, unit), unit, f"Histogram: {title.lower()}")
    return Section(title, [Drawing("", svg), _faint("; ".join(medians))])


@style()
def _histograms(numbers: pd.DataFrame, unit: str) -> Figure:
    """Draw both in at most BINS bins of whole numbers; the last one holds what lies beyond the 99th percentile."""
    top = int(np.quantile(numbers[unit], 0.99, method="inverted_cdf"))
    width = -(-(top + 1) // BINS)
    edges = list(range(0, top + width + 1, width))
    figure = Figure(figsize=(4.9, 2.8))
    for i, kind in enumerate(("accepted", "failed")):
        values = numbers[unit][numbers.accepted == (kind == "accepted")]
        axes = figure.add_subplot(2, 1, i + 1)
        axes.hist(values.clip(upper=top), edges, histtype="stepfilled", color=COLOURS[i])
        axes.set_ylabel(kind)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_xlabel(unit)
    return figure


def _quantiles(values: pd.Series) -> np.ndarray:
    """Return the median and the 95th percentile, both of them one of the values."""
    return np.quantile(values, [0.5, 0.95], method="inverted_cdf")


def _faint(text: str) -> Paragraph:
    return Paragraph([text], faint=True)


def _position(check: str) -> tuple[int, str]:
    """Order checks as Filters does; others, such as the judge, follow."""
    return CHECKS.index(check) if check in CHECKS else len(CHECKS), check
