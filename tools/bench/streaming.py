"""A response judged while it grows, beside one judged whole: what each costs, and what each finds.

    python tools/bench/streaming.py --model runs/smollm_pool/export --examples runs/pool/eval_diasafety_test.jsonl.gz

Judges every response after each so many words, as /v1/check/stream does where a client appends them, and once whole. An alarm is
a verdict harmful on the response of any piece. Wants an idle machine.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxguard import Guard
from jaxguard.config.data import SourceConfig
from jaxguard.data.examples import Example
from jaxguard.data.sources import load_examples
from jaxguard.utils.statistics import draws

QUESTION = "response_harm"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run or an export")
    parser.add_argument("--examples", required=True, help="labelled JSON lines with responses")
    parser.add_argument("--count", type=int, default=100, help="of responses, drawn at random (100)")
    parser.add_argument("--least", type=int, default=0, help="words that a response must have")
    parser.add_argument("--words", type=int, default=32, help="of a piece (32)")
    chosen = parser.parse_args(arguments)
    known = [e for e in load_examples(SourceConfig(kind="jsonl", path=chosen.examples)) if e.response_label]
    known = [e for e in known if len(str(e.response).split()) >= chosen.least]
    picked = np.random.default_rng(0).permutation(len(known))[: chosen.count]
    with Guard.load(chosen.model, mode="direct") as guard:
        rows = np.array([judged(guard, known[i], chosen.words) for i in track(picked, "responses")], float)
    report([known[i] for i in picked], rows)
    return 0


def pieces(text: str, words: int) -> list[str]:
    """A text up to every so many words, and whole."""
    split = text.split(" ")
    return [" ".join(split[:end]) for end in range(words, len(split), words)] + [text]


def judged(guard: Guard, example: Example, words: int) -> tuple[float, ...]:
    """Number of pieces, seconds of one check and of all pieces, verdicts of one check, of any piece, and of the last."""

    def alarms(responses: Sequence[str], growing: bool) -> tuple[float, list[bool]]:
        """Seconds of the checks, without those of programs that are compiled, and their verdicts."""
        seconds, found = 0.0, list[bool]()
        for response in responses:
            exchange = [(example.prompt, response)]
            started = time.perf_counter()
            [result] = asyncio.run(guard.acheck_many(exchange, growing=growing))
            seconds += time.perf_counter() - started
            found.append(result.verdict.response_harm == "harmful")
        return seconds, found

    parts = pieces(str(example.response), words)
    for _ in range(2):  # the first time compiles
        (alone, [whole]), (together, grown) = alarms(parts[-1:], False), alarms(parts, True)
    return len(parts), alone, together, whole, any(grown), grown[-1]


def report(examples: Sequence[Example], rows: np.ndarray) -> None:
    harmful = np.array([example.response_label == "harmful" for example in examples])
    count, alone, together, whole, alarmed, last = rows.T
    drawn = np.array([np.ones(len(rows)), *draws(len(rows), 0)])

    def ratio(above: np.ndarray, below: np.ndarray) -> str:
        """Of sums, with the 95 % interval of a bootstrap over the responses."""
        sums = drawn @ below
        ratios = (drawn @ above)[sums > 0] / sums[sums > 0]
        low, high = np.quantile(ratios, (0.025, 0.975))
        return f"{ratios[0]:.2f} [{low:.2f}, {high:.2f}]"

    table = Table("", "whole", "any piece", "last piece")
    for name, of in (("recall", harmful.astype(float)), ("false-positive rate", 1.0 - harmful)):
        table.add_row(name, *(ratio(each * of, of) for each in (whole, alarmed, last)))
    console = Console()
    console.print(f"{len(rows)} responses, {count.mean():.1f} pieces each, {harmful.mean():.0%} harmful", table)
    console.print(f"all pieces together take {ratio(together, alone)} of the seconds of one check")
    console.print(f"a piece takes {together.sum() / count.sum():.3f} s, one check {alone.mean():.3f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
