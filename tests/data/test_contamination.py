"""Training prompts that a benchmark also holds."""

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxguard.data import contamination
from jaxguard.data.contamination import SHORTEST, Match, find_matches, jaccard, normalise
from jaxguard.data.examples import Example
from jaxguard.utils.errors import JaxguardError

RECIPE = (
    "Mix four cups of rye flour with warm water, knead for ten minutes and let the dough rest until it has doubled."
)
CHANGED = RECIPE.replace("warm", "cold")
OTHER = "Which of the trains from the old harbour to the mountain village still run on a Sunday in the winter months?"
WORDS = (RECIPE + OTHER).replace(",", "").split()


def examples(*prompts, name="t"):
    return [Example(f"{name}{i}", "test", prompt, prompt_label="unharmful") for i, prompt in enumerate(prompts)]


def matches(prompts, held, similarity=0.8):
    return find_matches(examples(*prompts), {"bench": examples(*held, name="b")}, similarity)


def pairs(contaminated):
    return [(match.example_id, match.benchmark_id) for match in contaminated]


# --- normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("Bake bread!", "  bake\n\tBREAD"),
        ("well-known: bread", "well known bread"),
        ("\uff22\uff41\uff4b\uff45 bread", "bake bread"),
        ("bake\u3000bread\u3002", "bake bread"),
        ("stra\u00dfe", "STRASSE"),
        ("cafe\u0301", "CAF\u00c9"),
        ("br\u200bead \u00adbaker", "bread baker"),
        ("cafe\u200d\u0301", "caf\u00e9"),
        ("\u2764\ufe0f bread", "\u2764 bread"),
    ],
)
def test_texts_that_are_the_same(one, two):
    assert normalise(one) == normalise(two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("bread \U0001f600", "bread \U0001f621"),
        ("five + four", "five - four"),
        ("\u0939\u093f", "\u0939\u0940"),
        ("bread", "breads"),
    ],
)
def test_texts_that_are_not(one, two):
    assert normalise(one) != normalise(two)


@given(st.text())
def test_a_normalised_text_stays_as_it_is(text):
    assert normalise(normalise(text)) == normalise(text)


# --- matches ----------------------------------------------------------------------------------------------------------


def test_an_equal_prompt_is_found_whatever_its_spelling():
    assert matches([f"  {RECIPE.upper()}\u200b!!"], [OTHER, RECIPE]) == [Match("t0", "bench", "b1", 1.0, True)]


def test_one_changed_word_is_nearly_equal():
    (match,) = matches([OTHER, CHANGED], [RECIPE])
    assert (match.example_id, match.benchmark_id, match.exact) == ("t1", "b0", False)
    assert match.similarity == jaccard(shingled(normalise(CHANGED)), shingled(normalise(RECIPE)))
    assert 0.8 < match.similarity < 1
    assert matches([CHANGED], [RECIPE], similarity=0.95) == []


def test_other_prompts_are_not_found():
    assert matches([OTHER, "A third text about neither of the two of them."], [RECIPE], 0.5) == []


def test_equal_texts_come_before_similar_ones_and_every_holder_is_listed():
    benchmarks = {"one": examples(CHANGED, RECIPE, name="o"), "two": examples(RECIPE, RECIPE, name="w")}
    contaminated = find_matches(iter(examples(OTHER, RECIPE)), benchmarks, 0.8)
    assert [(m.benchmark, m.benchmark_id, m.exact) for m in contaminated] == [
        ("one", "o1", True),
        ("two", "w0", True),
        ("two", "w1", True),
        ("one", "o0", False),
    ]
    assert {m.example_id for m in contaminated} == {"t1"}


def test_the_same_shingles_in_another_order_are_similar_but_not_equal():
    text = "bake the bread " * 4
    (match,) = matches([text], [text + text], similarity=1)
    assert (match.similarity, match.exact) == (1.0, False)


@pytest.mark.parametrize("text", ["", " ", "?!", "\u200b", "...---..."])
def test_a_text_without_content_matches_nothing(text):
    assert matches([text, "", "?!"], [text, RECIPE, "hello", ""]) == []


def test_a_short_text_matches_only_its_equal():
    short = "a" + "b" * (SHORTEST - 2)
    assert pairs(matches([short, short.upper(), short + "b"], [short])) == [("t0", "b0"), ("t1", "b0")]
    long = short + "b"
    assert pairs(matches([long, long + "b"], [long])) == [("t0", "b0"), ("t1", "b0")]


def test_half_a_surrogate_pair_is_text_like_any_other():
    assert pairs(matches([f"{RECIPE} \ud83d"], [f"{RECIPE} \ud83d", RECIPE])) == [("t0", "b0"), ("t0", "b1")]


def test_nothing_to_compare_with():
    assert find_matches(examples(RECIPE), {}, 0.8) == []
    assert find_matches([], {"bench": examples(RECIPE)}, 0.8) == []


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(JaxguardError, match=r"pip install .*datasketch"):
        matches([RECIPE], [RECIPE])


# --- against comparing all with all -----------------------------------------------------------------------------------


@functools.cache
def shingled(text):
    return frozenset(text[i : i + 5] for i in range(len(text) - 4))


def changed(text, draw):
    """The text with a few of its words replaced, dropped or added."""
    words = text.split()
    for _ in range(draw.randint(0, 5)):
        place = draw.randrange(len(words))
        words[place : place + draw.randint(0, 1)] = draw.choice([[], [draw.choice(WORDS)], [str(draw.random())[2:9]]])
        words = words or ["bread"]
    return " ".join(words)


def mutated(seed, number):
    """Benchmark prompts, and training prompts that are made of them."""
    draw = random.Random(seed)
    held = [" ".join(draw.choices(WORDS, k=draw.randint(2, 40))) for _ in range(number)]
    return held, [changed(draw.choice(held), draw) for _ in range(number)]


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.8, 0.9])
def test_it_finds_what_comparing_all_with_all_finds(similarity):
    held, prompts = mutated(7, 400)
    contaminated = {pair: match for match in matches(prompts, held, similarity) for pair in pairs([match])}
    want = {}
    ours, theirs = ([(text, shingled(text)) for text in map(normalise, texts)] for texts in (prompts, held))
    for i, (one, one_shingles) in enumerate(ours):
        for j, (two, two_shingles) in enumerate(theirs):
            likeness = jaccard(one_shingles, two_shingles)
            if one == two or (min(len(one), len(two)) >= SHORTEST and likeness >= similarity):
                want[f"t{i}", f"b{j}"] = (1.0 if one == two else likeness, one == two)
    assert {pair: (match.similarity, match.exact) for pair, match in contaminated.items()} == want
    assert sum(not match.exact for match in contaminated.values()) >= 20


@pytest.mark.parametrize("similarity", [0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.9, 0.99, 1])
def test_a_pair_at_the_threshold_is_hardly_ever_missed(similarity):
    bands, rows = contamination._bands(similarity)
    assert bands * rows <= contamination._PERMUTATIONS
    assert bands >= 2
    assert (1 - similarity**rows) ** bands <= contamination._MISSED


def test_long_texts_are_taken_in_pieces(monkeypatch):
    held, prompts = mutated(8, 50)
    whole = matches(prompts, held)
    monkeypatch.setattr(contamination, "_CHUNK", 7)
    assert matches(prompts, held) == whole
    assert whole


def test_every_process_lists_the_same():
    code = "import test_contamination as t; held, prompts = t.mutated(9, 100); print(t.matches(prompts, held, 0.5))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([".", "tests/data"])},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    held, prompts = mutated(9, 100)
    assert other == f"{matches(prompts, held, 0.5)}\n"
    assert other.count("exact=False") > 20
