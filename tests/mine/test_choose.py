"""What counts as right, what is hard, and which of it is taken."""

import random
from collections import Counter

import pytest

from jaxguard.config.evaluate import MineConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.mine.run import Answer, Outcome, choose, outcome_of
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.parse import check

POLICY = Policy("bread", rules="Speak of bread only.", asks=("prompt_harm", "response_harm", "response_refusal"))
LOAF = Example("loaf", "baker", "How?", "Like this.", prompt_label="harmful", response_label="unharmful")


def made(i, right, labels="prompt_harm harmful", categories=()):
    example = Example(f"x{i}", "baker", "How?", prompt_label="harmful", categories=categories)
    return Outcome(example, Mode.DIRECT, labels, (Answer("", is_right=True, is_parsable=True),) * right)


def ids(some):
    return [one.example.id for one in some]


@pytest.mark.parametrize(
    ("text", "right", "unreadable"),
    [
        ("Prompt harm: harmful\nResponse harm: unharmful", 1, 0),
        ("Prompt harm: harmful\nResponse harm: harmful", 0, 0),
        ("Prompt harm: unharmful\nResponse harm: unharmful", 0, 0),
        ("Prompt harm: harmful\nResponse harm: unharmful\nResponse refusal: refusal", 1, 0),  # nobody labelled that
        ("Prompt harm: harmful", 0, 1),  # fails closed elsewhere; here it is no answer
        ("Prompt harm: harmful\nResponse harm: None", 0, 1),
        ("I would rather not say.", 0, 1),
    ],
)
def test_an_answer_is_right_if_all_labels_are(text, right, unreadable):
    found = outcome_of(LOAF, Mode.DIRECT, POLICY, [text])
    assert (found.right, found.unparsable) == (right, unreadable)
    assert found.labels == "prompt_harm harmful, response_harm unharmful"


def test_right_in_one_line_of_each_answer_is_never_right():
    """Each label is right in 2 of 4 answers, but no answer as a whole."""
    lines = ["Prompt harm: harmful\nResponse harm: harmful", "Prompt harm: unharmful\nResponse harm: unharmful"]
    assert outcome_of(LOAF, Mode.DIRECT, POLICY, lines * 2).right == 0


def test_unreadable_is_not_right_even_where_it_counts_as_harmful():
    harmful = Example("x", "baker", "How?", prompt_label="harmful")
    assert outcome_of(harmful, Mode.DIRECT, POLICY, ["Prompt harm: harmful", "Prompt harm: ?", ""]).right == 1


def test_a_thought_is_not_read():
    harmful = Example("x", "baker", "How?", prompt_label="harmful")
    thought = "<think>\nPrompt harm: harmful\n</think>\n\nPrompt harm: unharmful"
    cut = "<think>\nPrompt harm: harmful"
    right = "<think>\nPrompt harm: unharmful\n</think>\n\nPrompt harm: harmful"
    found = outcome_of(harmful, Mode.REASONING, POLICY, [thought, cut, right])
    assert (found.right, found.unparsable) == (1, 1)


def test_a_missing_response_is_no_label():
    found = outcome_of(
        Example("x", "baker", "How?", prompt_label="unharmful"), Mode.DIRECT, POLICY, ["Prompt harm: unharmful"]
    )
    assert (found.right, found.labels) == (1, "prompt_harm unharmful")


def test_the_choice_depends_on_ids_and_seed_only():
    some = [made(i, 2) for i in range(50)]
    shuffled = random.Random(0).sample(some, 50)
    ten = MineConfig(most=10)
    assert ids(choose(some, ten, 0)) == ids(choose(shuffled, ten, 0))
    assert ids(choose(some, ten, 0)) != ids(choose(some, ten, 1))
    assert ids(choose(some, MineConfig(most=20), 0))[:10] == ids(choose(some, ten, 0))
    assert len(choose(some, MineConfig(), 0)) == len(choose(some, MineConfig(most=99), 0)) == 50


@pytest.mark.parametrize(("most", "expected"), [(None, {"a": 7, "b": 7, "c": 7}), (6, {"a": 2, "b": 2, "c": 2})])
def test_classes_are_balanced(most, expected):
    some = [made(i, 2, labels="a" if i < 40 else "b" if i < 53 else "c") for i in range(60)]
    taken = choose(some, MineConfig(balance="class", most=most), 0)
    assert Counter(one.labels for one in taken) == expected
    assert len(set(ids(taken))) == len(taken)


def test_most_cuts_classes_evenly():
    some = [made(i, 2, labels="ab"[i % 2]) for i in range(40)]
    counts = Counter(one.labels for one in choose(some, MineConfig(balance="class", most=7), 0))
    assert sorted(counts.values()) == [3, 4]


def test_categories_are_balanced_and_none_is_one():
    given = [("rye",)] * 20 + [()] * 9 + [("rye", "salt")] * 5
    some = [made(i, 3, categories=categories) for i, categories in enumerate(given)]
    taken = choose(some, MineConfig(balance="category"), 0)
    # Whoever has two categories counts for the rarer one.
    assert Counter(one.example.categories for one in taken) == {("rye",): 5, (): 5, ("rye", "salt"): 5}


@pytest.mark.parametrize("balance", ["none", "class", "category"])
def test_nothing_hard_gives_nothing(balance):
    assert choose([], MineConfig(balance=balance), 0) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"hard": [2, 5]},
        {"generations": 1},
        {"guard": {"format": "tfidf"}},
        {"guard": {"modes": ["direct"]}},
    ],
)
def test_impossible_settings_are_refused(tree):
    with pytest.raises(JaxguardError, match="mine: "):
        check(tree, MineConfig, "mine")
