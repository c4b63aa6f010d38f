"""The page of a trace store: its numbers, its sample, and what hostile text becomes in it."""

import gc
import html
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from page_examples import BREAKOUTS, DIFFERS, GOOD, LEAKED, SETTINGS, STORE, hostile

from jaxguard.config import load
from jaxguard.config.data import FilterConfig
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.distill.__main__ import main
from jaxguard.distill.filters import Candidate, Filters
from jaxguard.distill.page import CHECKS, _histograms, funnel, read_numbers, rounds, sample, write_store_page
from jaxguard.distill.store import attempts_file, open_traces
from jaxguard.report.text import visible
from jaxguard.utils.errors import JaxguardError


def attempts(path):
    """(example, texts) of each attempt on the page."""
    parts = re.findall(r'<details name="attempt".*?</details>', path.read_text(), re.DOTALL)

    def texts(tag, part):
        return [html.unescape(text) for text in re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", part, re.DOTALL)]

    return [(texts("bdi", part)[0], texts("pre", part)) for part in parts]


def shown(path):
    """The text of the page with single spaces, scripts and styles left out."""
    text = re.sub(r"<(script|style).*?</\1>", " ", path.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


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


@pytest.fixture
def numbers(tmp_path):
    """numbers(attempts): those of a store that holds them."""

    def write(some):
        with open_traces(tmp_path / "numbers", SETTINGS, {}) as store:
            for attempt in some:
                store.append(attempt)
        return read_numbers(tmp_path / "numbers")

    return write


def cells(table):
    return {name.text: [cell.text for cell in others] for name, *others in (row.cells for row in table.rows)}


def test_the_order_of_checks_is_that_of_the_filters():
    config = FilterConfig(
        min_words=99, max_words=1, max_hesitations=0, ngram=1, max_repeated_share=0, min_script_share=1
    )
    trace = "Wait. The given label is \u03b1.\nPrompt harm: harmful. Wait. Wait."
    labels = (("prompt_harm", "unharmful"), ("response_harm", "unharmful"))
    found = Filters(config, Dialogue()).failures(Candidate(trace, "Prompt harm: harmful", "length", labels, budget=1))
    assert tuple(found) == CHECKS


def test_the_funnel_counts_an_attempt_where_it_first_fails(numbers):
    rows = cells(funnel(numbers(STORE)))
    assert list(rows) == ["examples", "attempts", *CHECKS, "judge", "accepted attempts", "examples with a trace"]
    assert rows["cut"] == ["6", "–", "–"]
    assert rows["verdict_differs"] == ["4", "2", "2"]
    assert rows["labels_leaked"] == ["3", "1", "2"]
    assert rows["judge"] == ["2", "1", "2"]
    assert (rows["examples"][0], rows["examples with a trace"][0]) == ("3", "2")


def test_failed_checks_by_round(numbers):
    rows = cells(rounds(numbers(STORE)))
    assert rows["attempts"] == ["3", "2", "1"]
    assert rows["accepted"] == ["1", "0", "1"]
    assert rows["labels_leaked"] == ["1", "1", "0"]
    assert list(rows) == ["attempts", "accepted", "verdict_differs", "labels_leaked", "judge"]


def test_no_attempt_accepted(numbers):
    assert cells(rounds(numbers([replace(GOOD, failures=LEAKED)])))["accepted"] == ["0"]


def test_two_accepted_candidates_are_one_example_with_a_trace(numbers):
    some = numbers([GOOD, replace(GOOD, candidate=1), replace(GOOD, candidate=2, failures=LEAKED)])
    assert (cells(funnel(some))["examples with a trace"][0], some.accepted.sum()) == ("1", 2)


@pytest.mark.parametrize("lengths", [[0], [5] * 3, [0, 7, 300, 300, 9000], [*range(200), 10**6]])
def test_histograms_reach_from_nothing_to_the_longest(numbers, lengths):
    some = numbers([replace(GOOD, example_id=f"x{i}", completion_tokens=n) for i, n in enumerate(lengths)])
    accepted, failed = (axes.patches[0].get_xy() for axes in _histograms(some, "tokens").axes)
    assert accepted[:, 0].min() == 0
    assert sorted(lengths)[-2:][0] < accepted[:, 0].max()
    assert (accepted[:, 1].max() > 0, failed[:, 1].max()) == (True, 0)


@pytest.mark.parametrize(
    ("good", "bad", "kept"),
    [(90, 60, (10, 10)), (90, 10, (10, 10)), (90, 3, (17, 3)), (0, 50, (0, 20)), (90, 0, (20, 0)), (4, 5, (4, 5))],
)
def test_a_sample_keeps_both_kinds_in_whatever_order_they_come(numbers, good, bad, kept):
    some = numbers([replace(GOOD, example_id=f"x{i}", failures=LEAKED if i < bad else {}) for i in range(good + bad)])
    chosen = [sample(some.sample(frac=1, random_state=seed), 20) for seed in (0, 1)]
    assert (chosen[0].accepted.sum(), (~chosen[0].accepted).sum()) == kept
    assert list(chosen[0].example) == list(chosen[1].example)


def test_failed_attempts_of_an_example_are_chosen_together(numbers):
    some = [replace(GOOD, example_id=f"x{i}", round=n, failures=LEAKED) for i in range(100) for n in range(3)]
    assert set(Counter(sample(numbers(some), 30).example).values()) == {3}


def test_the_page_says_what_the_store_holds(page):
    path = page(STORE)
    text = shown(path)
    for words in (
        "Traces of deepseek-r1",
        '"temperature": 0.6',
        '"min_words": 8',
        "Examples with a trace 2 66.7% of 3",
        "Accepted attempts 2 33.3% of 6",
        "verdict_differs 4 2 2",
        "labels_leaked 3 1 2",
        "from 2026-01-01 00:00 to 2026-01-02 00:00",
        "round 0 round 1 round 2 attempts 3 2 1",
        "All 6 attempts.",
    ):
        assert words in text
    assert attempts(path) == [(a.example_id, [a.trace, a.answer]) for a in STORE]
    assert all(f"{check}: {reason}" in text for check, reason in (DIFFERS | LEAKED).items())


def test_the_page_says_how_many_attempts_it_shows(page):
    path = page([replace(GOOD, example_id=f"x{i}", failures=LEAKED if i < 3 else {}) for i in range(1200)], most=10)
    assert "10 of 1,200 attempts, chosen by a hash of the example: 7 of 1,197 accepted and 3 of 3 failed" in shown(path)
    assert len(attempts(path)) == 10


def test_an_empty_store_has_a_page(page):
    path = page([])
    assert "The store holds no attempts yet." in shown(path)
    assert elements(path)[0]["script"] == 0


def test_a_store_that_is_being_written(tmp_path, caplog):
    with open_traces(tmp_path / "store", SETTINGS, {}) as store:
        store.append(GOOD)
        with attempts_file(tmp_path / "store").open("ab") as file:
            file.write(b'{"crc32": 1, "attempt": {"answ')
        write_store_page(tmp_path / "store", tmp_path / "page.html")
    assert "1 damaged line" in caplog.text
    assert [texts[0] for _, texts in attempts(tmp_path / "page.html")] == [GOOD.trace]


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(JaxguardError, match=r"attempts\.jsonl"):
        write_store_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_page_lies_beside_the_store(tmp_path):
    config = load("wildguard_traces", [f"run_folder={tmp_path}"])
    with open_traces(config.folder / "traces", SETTINGS, {}) as store:
        store.append(GOOD)
    assert main(["inspect", "--config", "wildguard_traces", f"run_folder={tmp_path}"]) == 0
    assert len(attempts(config.folder / "traces.html")) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path):
    peaks = []
    for count in (10, 50, 500):  # the first loads matplotlib
        with open_traces(tmp_path / str(count), SETTINGS, {}) as store:
            for i in range(count):
                store.append(replace(GOOD, example_id=f"x{i}", trace="salt " * 1600, failures=LEAKED if i % 2 else {}))
        gc.collect()
        tracemalloc.start()
        write_store_page(tmp_path / str(count), tmp_path / "page.html", most=20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The store grows by 3.6 MB; when the garbage collector frees a figure is worth 1 MB.
    assert peaks[2] < peaks[1] + 2_000_000, peaks


def test_hostile_text_is_no_markup(page):
    plain = [replace(GOOD, example_id=f"p{i}", failures={"odd": ""} if i % 2 else {}) for i in range(len(BREAKOUTS))]
    wanted = elements(page(plain))
    names, attributes = elements(page(hostile()))
    assert (names["script"], names["style"], names["img"], attributes) == (1, 1, 0, [("href", "data:,")])
    assert set(names) == set(wanted[0])
    assert attributes == wanted[1]


@pytest.mark.parametrize("text", BREAKOUTS)
def test_hostile_settings_are_no_markup(page, text):
    names, attributes = elements(
        page([GOOD], {**SETTINGS, "teacher": text, "version": text, "prompt": text, text: text})
    )
    assert (names["script"], names["img"], attributes) == (1, 0, [("href", "data:,")])


def test_text_is_on_the_page_as_it_was(page):
    texts = [[visible(attempt.trace), visible(attempt.answer)] for attempt in hostile()]
    assert [both for _, both in attempts(page(hostile()))] == texts
