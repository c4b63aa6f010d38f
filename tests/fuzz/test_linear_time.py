"""Patterns take linear time: what repeats a hostile piece a thousand times over is read in no time."""

import random
import time
from contextlib import suppress

import pytest
from campaign import rounds

from jaxguard.config.data import FilterConfig
from jaxguard.data.format.answer import parse, split_verdict
from jaxguard.data.format.dialogue import Dialogue, Mode, transcript
from jaxguard.data.policies import QUESTIONS
from jaxguard.distill.filters import Candidate, Filters, repeated_share, split_sentences, words
from jaxguard.distill.teacher import split_reasoning
from jaxguard.report.text import plain, visible
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import front_matter, parse_json, parse_yaml

PIECES = (
    "\n", "\n ", " ", "a", "a ", "a. ", ".", ". ", "e.g. ", "1. ", "\n1", "\n- ", "<", "</", "< / think", "<think>", "*", "* ", "#",
    "_", ">", "`", "fit", "\nfit*", "\nreason", "wait ", "label ", "given label ", "verdict that ", "I told that the ", "'", "a'",
    "![", "](", "[", "]", "{", "&", "|", "\\", "https://", "a@", "\x1b[", "---\n", "a: ", "\t", "\r\n", "\u4e00", "\ufffd",
    "Prompt harm", "Prompt\n", "according to the ", "- - ", "[1, ", '{"a": ', "&a ", "*a ", "? ", "%", "'''",
)  # fmt: skip
SIZE, SECONDS = 100_000, 3.0
"""Quadratic time would be minutes."""
FILTERS = Filters(FilterConfig(language=None, max_words=10**6), Dialogue("/think", "/no_think", ()))
LABELS = (("prompt_harm", "unharmful"),)


def card(text, folder):
    path = folder / "README.md"
    path.write_text(f"---\n{text}", encoding="utf-8")
    front_matter(path)


READERS = {
    "sentences": lambda text, _: split_sentences(text),
    "words": lambda text, _: repeated_share(words(text), 4),
    "filters": lambda text, _: FILTERS.failures(Candidate(text, text, "stop", LABELS, 3)),
    "reasoning": lambda text, _: split_reasoning(text),
    "verdict": lambda text, _: (split_verdict(text), parse(text, QUESTIONS, Mode.REASONING)),
    "transcript": lambda text, _: transcript([{"role": text, "content": text}], text, "x"),
    "page": lambda text, _: (plain(text), visible(text)),
    "json": lambda text, _: parse_json(text, object, "x"),
    "yaml": lambda text, _: parse_yaml(text, object, "x"),
    "card": card,
}


@pytest.mark.parametrize("reader", READERS)
def test_hostile_texts_take_linear_time(reader, tmp_path):
    rng = random.Random(reader)
    for piece in rng.sample(PIECES, rounds(4, len(PIECES))):
        for end in ("", "x"):
            text = (piece * (SIZE // len(piece) + 1))[:SIZE] + end
            start = time.process_time()
            with suppress(JaxguardError):
                READERS[reader](text, tmp_path)
            assert time.process_time() - start < SECONDS, (piece, end)


def test_a_long_trace_is_not_looked_at():
    filters = Filters(FilterConfig(language=None), Dialogue("/think", "/no_think", ()))
    start = time.process_time()
    failures = filters.failures(Candidate("the label says " * 3_000_000, "", "stop", LABELS))
    assert set(failures) == {"too_long"}
    assert time.process_time() - start < SECONDS
