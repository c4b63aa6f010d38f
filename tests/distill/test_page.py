"""The page of a trace store: its numbers, its sample, and what hostile text becomes in it."""

import gc
import json
import random
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from page_examples import BREAKOUTS, DIFFERS, GOOD, LEAKED, SETTINGS, STORE, hostile

from jaxguard.config import load
from jaxguard.config.distill import FilterConfig
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.distill.filters import Candidate, Filters
from jaxguard.distill.page import BINS, CHECKS, Numbers, Sample, funnel, histogram, inspect, quantile, write_store_page
from jaxguard.distill.store import attempts_file, open_traces
from jaxguard.utils.errors import JaxguardError


def rows(path):
    """What the page's script gets."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def shown(path):
    """The text of the page with single spaces, scripts and styles left out."""
    text = re.sub(r"<(script|style).*?</\1>", " ", path.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def elements(path):
    """How many elements of each name an HTML parser finds, and all attributes that name a place or a handler."""
    names, attributes = Counter(), []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            names[tag] += 1
            attributes.extend(
                (name, value) for name, value in attrs if name.startswith("on") or name in ("src", "href")
            )

    Parser().feed(path.read_text())
    return names, attributes


def counted(attempts):
    numbers = Numbers()
    for attempt in attempts:
        numbers.add(attempt)
    return numbers


def test_the_order_of_checks_is_that_of_the_filters():
    config = FilterConfig(
        min_words=99, max_words=1, max_hesitations=0, ngram=1, max_repeated_share=0, min_script_share=1
    )
    trace = "Wait. The given label is \u03b1.\nPrompt harm: harmful. Wait. Wait."
    labels = (("prompt_harm", "unharmful"), ("response_harm", "unharmful"))
    found = Filters(config, Dialogue()).failures(Candidate(trace, "Prompt harm: harmful", "length", labels, budget=1))
    assert tuple(found) == CHECKS


def test_the_funnel_counts_an_attempt_where_it_first_fails():
    rows = {check: numbers for check, *numbers in funnel(counted(STORE))}
    assert list(rows) == [*CHECKS, "judge"]
    assert rows["cut"] == [6, 0, 0]
    assert rows["verdict_differs"] == [4, 2, 2]
    assert rows["labels_leaked"] == [3, 1, 2]
    assert rows["judge"] == [2, 1, 2]


def test_examples_rounds_tokens_and_times():
    numbers = counted(STORE)
    assert (numbers.examples, numbers.traced) == (3, 2)
    assert numbers.attempts == {0: 3, 1: 2, 2: 1}
    assert numbers.accepted == {0: 1, 1: 0, 2: 1}
    assert (numbers.failed["labels_leaked", 0], numbers.failed["labels_leaked", 1]) == (1, 1)
    assert (numbers.prompt_tokens, numbers.completion_tokens) == (600, 44)
    assert (numbers.start, numbers.end) == (GOOD.time, "2026-01-02T00:00:00+00:00")
    assert numbers.words == {True: {3: 1, 4: 1}, False: {3: 4}}
    assert numbers.tokens == {True: {7: 2}, False: {7: 3, 9: 1}}


def test_two_accepted_candidates_are_one_example_with_a_trace():
    numbers = counted([GOOD, replace(GOOD, candidate=1), replace(GOOD, candidate=2, failures=LEAKED)])
    assert (numbers.examples, numbers.traced, numbers.accepted.total()) == (1, 1, 2)


@pytest.mark.parametrize("most", [0, 1, 7, 300, 801, 5000])
def test_a_histogram_loses_nothing(most):
    drawn = random.Random(most)
    counts = {kind: Counter(drawn.randint(0, most) for _ in range(500)) for kind in (True, False)}
    counts[False][100 * (most + 1)] += 1
    bins = histogram(counts)
    assert len(bins) <= BINS + 1
    assert [sum(b.accepted for b in bins), sum(b.failed for b in bins)] == [500, 501]
    assert bins[-1].high is None
    assert [b.high for b in bins[:-1]] == [b.low for b in bins[1:]]
    for b in bins[:-1]:
        assert b.accepted == sum(n for value, n in counts[True].items() if b.low <= value < b.high)


def test_quantiles():
    assert [quantile(Counter(range(1, 21)), share) for share in (0, 0.5, 0.95, 1)] == [1, 10, 19, 20]
    assert quantile(Counter(), 0.5) == 0


@pytest.mark.parametrize(
    ("good", "bad", "kept"),
    [(90, 60, (10, 10)), (90, 10, (10, 10)), (90, 3, (17, 3)), (0, 50, (0, 20)), (90, 0, (20, 0)), (4, 5, (4, 5))],
)
def test_a_sample_keeps_both_kinds_in_whatever_order_they_come(good, bad, kept):
    attempts = [replace(GOOD, example_id=f"x{i}", failures=LEAKED if i < bad else {}) for i in range(good + bad)]
    chosen = []
    for seed in (None, 1, 2):
        if seed:
            random.Random(seed).shuffle(attempts)
        sample = Sample(20)
        for attempt in attempts:
            sample.add(attempt)
        chosen.append(sample.attempts())
    assert (sum(a.accepted for a in chosen[0]), sum(not a.accepted for a in chosen[0])) == kept
    assert chosen[0] == chosen[1] == chosen[2]


def test_failed_attempts_of_an_example_are_chosen_together():
    sample = Sample(30)
    for i in range(100):
        for number in range(3):
            sample.add(replace(GOOD, example_id=f"x{i}", round=number, failures=LEAKED))
    assert set(Counter(a.example_id for a in sample.attempts()).values()) == {3}


def test_the_page_says_what_the_store_holds(page):
    path = page(STORE)
    text = shown(path)
    for words in (
        "Traces of deepseek-r1",
        "version any",
        "prompt 0123456789ab…",
        "temperature 0.6",
        "filter.min_words 8",
        "Examples with a trace 2 66.7% of 3",
        "Accepted attempts 2 33.3% of 6",
        "verdict_differs 4 2 2",
        "labels_leaked 3 1 2",
        "from 2026-01-01 00:00 to 2026-01-02 00:00",
        "round 0 round 1 round 2 attempts 3 2 1",
        "All 6 attempts.",
    ):
        assert words in text
    assert [(row["example"], row["round"]) for row in rows(path)] == [a.key[:2] for a in STORE]
    assert rows(path)[1]["failures"] == [list(item) for item in (DIFFERS | LEAKED).items()]
    assert "sourdough" not in text


def test_the_page_says_how_many_attempts_it_shows(page):
    path = page([replace(GOOD, example_id=f"x{i}", failures=LEAKED if i < 3 else {}) for i in range(1200)], most=10)
    assert "10 of 1,200 attempts, chosen by a hash of the example: 7 of 1,197 accepted and 3 of 3 failed" in shown(path)
    assert len(rows(path)) == 10


def test_an_empty_store_has_a_page(page):
    path = page([])
    assert "The store holds no attempts yet." in shown(path)
    assert elements(path)[0]["script"] == 0


def test_a_store_that_is_being_written(tmp_path, caplog):
    with open_traces(tmp_path / "store", SETTINGS) as store:
        store.append(GOOD)
        with attempts_file(tmp_path / "store").open("ab") as file:
            file.write(b'{"crc32": 1, "attempt": {"answ')
        write_store_page(tmp_path / "store", tmp_path / "page.html")
    assert "1 damaged line" in caplog.text
    assert [row["trace"] for row in rows(tmp_path / "page.html")] == [GOOD.trace]


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(JaxguardError, match="is not a trace store"):
        write_store_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_page_lies_beside_the_store(tmp_path):
    config = load("wildguard_traces", [f"run_folder={tmp_path}"])
    with open_traces(config.folder / "traces", SETTINGS) as store:
        store.append(GOOD)
    path = inspect(config)
    assert path == config.folder / "traces.html"
    assert len(rows(path)) == 1


def test_memory_does_not_grow_with_the_store(tmp_path):
    peaks = []
    for count in (10, 50, 500):  # the first loads matplotlib
        with open_traces(tmp_path / str(count), SETTINGS) as store:
            for i in range(count):
                store.append(replace(GOOD, example_id=f"x{i}", trace="salt " * 1000, failures=LEAKED if i % 2 else {}))
        gc.collect()
        tracemalloc.start()
        write_store_page(tmp_path / str(count), tmp_path / "page.html", most=20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 500_000, peaks


def test_hostile_text_is_no_markup(page):
    plain = [replace(GOOD, example_id=f"p{i}", failures={"odd": ""} if i % 2 else {}) for i in range(len(BREAKOUTS))]
    wanted = elements(page(plain))
    names, attributes = elements(page(hostile()))
    assert (names["script"], names["style"], names["img"], attributes) == (2, 1, 0, [("href", "data:,")])
    assert set(names) == set(wanted[0])
    assert attributes == wanted[1]


@pytest.mark.parametrize("text", BREAKOUTS)
def test_hostile_settings_are_no_markup(page, text):
    names, attributes = elements(
        page([GOOD], {**SETTINGS, "teacher": text, "version": text, "prompt": text, text: text})
    )
    assert (names["script"], names["img"], attributes) == (2, 0, [("href", "data:,")])


def test_text_reaches_the_script_as_it_was(page):
    found = {row["example"]: row for row in rows(page(hostile()))}
    for attempt in hostile():
        row = found[attempt.example_id]
        assert (row["trace"], row["answer"], row["finish"]) == (attempt.trace, attempt.answer, attempt.finish_reason)
        assert row["failures"] == [list(item) for item in attempt.failures.items()]
