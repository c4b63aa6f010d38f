"""A response judged while it grows, beside one judged whole: what each costs, and what each finds.

    python tools/bench/streaming.py --model runs/smollm_pool/export --benchmark pyrit_answers --least 100 --most 400

Judges every response of a benchmark after each so many words, as /v1/check/stream does where a client appends them, and once
whole. An alarm is a verdict harmful on the response of any piece. Wants an idle machine. With --untrained a guard that has not
learned to answer costs what a trained one does; what it finds means nothing. Ctrl-C reports what was judged so far.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxguard import Guard
from jaxguard.data.benchmarks.loading import load_benchmark
from jaxguard.data.examples import Example
from jaxguard.guards.backends.jax import JaxBackend
from jaxguard.guards.growing import Answered
from jaxguard.guards.protocol import Draft
from jaxguard.report.text import ABSENT
from jaxguard.utils.statistics import draws

QUESTION = "response_harm"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run or an export")
    parser.add_argument("--benchmark", default="own_responses", help="one of responses, by its name (own_responses)")
    parser.add_argument("--path", type=Path, help="of its rows, such as JSON lines of your own")
    parser.add_argument("--count", type=int, default=50, help="of responses of each label, drawn at random (50)")
    parser.add_argument("--least", type=int, default=0, help="words that a response must have")
    parser.add_argument(
        "--most", type=int, default=1000, help="words that it may have: some answers have ten thousand (1000)"
    )
    parser.add_argument("--words", type=int, default=32, help="of a piece (32)")
    parser.add_argument("--untrained", action="store_true", help="take a likely answer for the guard's own")
    chosen = parser.parse_args(arguments)
    if chosen.untrained:
        answer_as_if_trained()
    rows = load_benchmark(chosen.benchmark, chosen.path).examples
    known = [e for e in rows if e.response_label and chosen.least <= len(str(e.response).split()) <= chosen.most]
    drawn = [known[i] for i in np.random.default_rng(0).permutation(len(known))]
    of_each = ([e for e in drawn if e.response_label == label][: chosen.count] for label in ("harmful", "unharmful"))
    picked = [e for both in zip_longest(*of_each) for e in both if e]
    found: list[tuple[float, ...]] = []
    with Guard.load(chosen.model, mode="direct") as guard, suppress(KeyboardInterrupt):  # what is done is reported
        found.extend(judged(guard, example, chosen.words) for example in track(picked, "responses"))
    if found:
        report(picked[: len(found)], np.array(found, float))
    return 0


def answer_as_if_trained() -> None:
    """Take the first draft of an answer where the guard would write another, token by token."""
    computed = JaxBackend.score

    async def score(backend: JaxBackend, *asked: Any) -> tuple[list[float], list[bool]]:
        odds, greedy = await computed(backend, *asked)
        drafts: Sequence[Draft] = asked[2]
        for prompt in {draft.prompt for draft in drafts}:
            own = [i for i, draft in enumerate(drafts) if draft.prompt == prompt]
            greedy[own[0]] |= not any(greedy[i] for i in own)
        return odds, greedy

    JaxBackend.score = score  # type: ignore[method-assign]


def pieces(text: str, words: int) -> list[str]:
    """A text up to every so many words, and whole."""
    split = text.split(" ")
    return [" ".join(split[:end]) for end in range(words, len(split), words)] + [text]


def judged(guard: Guard, example: Example, words: int) -> tuple[float, ...]:
    """Number of pieces; seconds, then tokens computed, of one check and of all pieces; verdicts of one, any and the last."""
    backend: JaxBackend = vars(guard)["_predict"].keywords["backend"]

    def alarms(prompt: str, responses: Sequence[str], growing: Sequence[Answered]) -> tuple[float, int, list[bool]]:
        """Seconds of the checks, their tokens, and their verdicts."""
        seconds, found, before = 0.0, list[bool](), backend.prefix_cache.computed
        for response in responses:
            asked = replace(example, prompt=prompt, response=response)
            started = time.perf_counter()
            [result] = asyncio.run(guard.acheck_many([asked], growing=growing))
            seconds += time.perf_counter() - started
            found.append(result.verdict.response_harm == "harmful")
        return seconds, backend.prefix_cache.computed - before, found

    parts = pieces(str(example.response), words)
    for prompt in (
        f"1. {example.prompt}",
        example.prompt,
    ):  # the first compiles; of its texts nothing serves the second
        alone, tokens, [whole] = alarms(prompt, parts[-1:], ())
        together, of_all, grown = alarms(prompt, parts, [{}])
    return len(parts), alone, together, tokens, of_all, whole, any(grown), grown[-1]


def report(examples: Sequence[Example], rows: np.ndarray) -> None:
    harmful = np.array([example.response_label == "harmful" for example in examples])
    count, alone, together, tokens, of_all, whole, alarmed, last = rows.T
    drawn = np.array([np.ones(len(rows)), *draws(len(rows), 0)])

    def ratio(above: np.ndarray, below: np.ndarray) -> str:
        """Of sums, with the 95 % interval of a bootstrap over the responses; n/a where the lower one is 0."""
        sums = drawn @ below
        if not sums[0]:
            return ABSENT
        ratios = (drawn @ above)[sums > 0] / sums[sums > 0]
        low, high = np.quantile(ratios, (0.025, 0.975))
        return f"{ratios[0]:.2f} [{low:.2f}, {high:.2f}]"

    table = Table("", "whole", "any piece", "last piece")
    for name, of in (("recall", harmful.astype(float)), ("false-positive rate", 1.0 - harmful)):
        table.add_row(name, *(ratio(each * of, of) for each in (whole, alarmed, last)))
    console = Console()
    console.print(f"{len(rows)} responses, {count.mean():.1f} pieces each, {harmful.mean():.0%} harmful", table)
    console.print(
        f"all pieces together take {ratio(together, alone)} of the seconds of one check, {ratio(of_all, tokens)} of its tokens"
    )
    console.print(f"a piece takes {together.sum() / count.sum():.3f} s, one check {alone.mean():.3f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
