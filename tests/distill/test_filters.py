"""Each check by what it must catch and what it must let pass."""

from dataclasses import replace

import pytest

pytest.importorskip("py3langid", reason="what tells languages apart needs the distill extra")
from hypothesis import given
from hypothesis import strategies as st

from jaxguard.config.data import FilterConfig
from jaxguard.data.format.dialogue import Dialogue
from jaxguard.distill.filters import Candidate, Filters, repeated_share, words
from jaxguard.utils.errors import JaxguardError

CONFIG = FilterConfig()
FILTERS = Filters(CONFIG, Dialogue(special_tokens=("<|eot_id|>",)))
GOOD = Candidate(
    trace="The user asks how to bake a loaf of bread at home. No category of the policy covers cooking, and nobody could "
    "be hurt by it. The assistant lists flour, water, salt and yeast, and explains each step. Nothing in the answer is "
    "dangerous, so neither side of the exchange breaks a rule.",
    answer="Prompt harm: unharmful\nResponse harm: unharmful",
    finish_reason="stop",
    labels=(("prompt_harm", "unharmful"), ("response_harm", "unharmful")),
)


def replace_config(**changes) -> FilterConfig:
    return FilterConfig(**{**CONFIG.model_dump(), **changes})


def failed(**changes) -> set[str]:
    return set(FILTERS.failures(replace(GOOD, **changes)))


def failed_with(text: str) -> set[str]:
    """What a good trace with one more sentence fails."""
    return failed(trace=f"{GOOD.trace} {text}")


def test_a_good_trace_passes():
    assert failed() == set()


@pytest.mark.parametrize("reason", ["length", "abort", "content_filter", ""])
def test_a_text_that_did_not_stop_by_itself_is_cut(reason):
    assert failed(finish_reason=reason) == {"cut"}


@pytest.mark.parametrize("trace", ["", " \n", "...", "It is harmless."])
def test_empty(trace):
    assert failed(trace=trace) == {"empty"}


def test_too_long():
    trace = " ".join(f"word{i}" for i in range(CONFIG.max_words + 1))
    assert "too_long" in failed(trace=trace)
    assert "too_long" not in failed(trace=trace.rpartition(" ")[0])


def test_over_budget():
    assert failed(budget=3) == {"over_budget"}
    assert failed(budget=4) == set()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Prompt harm: unharmful",
        "Prompt harm: maybe\nResponse harm: unharmful",
        "Prompt harm: harmful\nPrompt harm: unharmful\nResponse harm: unharmful",
    ],
)
def test_verdict_missing(answer):
    assert failed(answer=answer) == {"verdict_missing"}


def test_verdict_differs():
    assert failed(answer="Prompt harm: harmful\nResponse harm: unharmful") == {"verdict_differs"}
    assert failed(answer="Prompt harm: unharmful\nResponse harm: None") == {"verdict_differs"}
    assert failed(answer="**prompt harm:** Unharmful\n- response  harm : UNHARMFUL") == set()
    absent = (("prompt_harm", "unharmful"), ("response_harm", "None"))
    assert failed(labels=absent, answer="Prompt harm: unharmful\nResponse harm: None") == set()
    assert failed(labels=absent) == {"verdict_differs"}
    both = FILTERS.failures(replace(GOOD, answer="Prompt harm: harmful"))
    assert set(both) == {"verdict_missing", "verdict_differs"}
    assert both["verdict_differs"] == "prompt_harm: harmful, not unharmful"


@pytest.mark.parametrize(
    "text",
    [
        "This is consistent with the ground truth.",
        "The given label says harmful, so that must be it.",
        "According to the provided annotations, the prompt is fine.",
        "The labels indicate that it is harmful.",
        "The label is given as unharmful.",
        "Since the prompt is already labeled as harmful, I follow that.",
        "I was told that the prompt is harmful.",
        "We are given that the response is unharmful.",
        "My task is to justify the labels.",
        "The gold label agrees.",
        "The expected verdict is unharmful.",
        "That matches the correct classification.",
        # In the words of the teacher's own prompts.
        "The reviewers have settled on harmful for the prompt.",
        "Reviewers decided that it is harmful, so I look for reasons.",
        "The reviewers' verdict is harmful.",
        "I must not mention that I was given the verdict.",
        "I should reason without hinting at the reviewers.",
        "I need to arrive at the verdict that the prompt is harmful.",
        "I was told to arrive at harmful, so let me find reasons.",
        "My thinking must lead there by the policy alone.",
        "The section on where to arrive says it is fine.",
        "Since they settled on this verdict, the policy must be violated.",
        "I have to reach the conclusion unharmful.",
        "As I was given a verdict of harmful, I follow it.",
    ],
)
def test_leaked_labels(text):
    assert failed_with(text) == {"labels_leaked"}


@pytest.mark.parametrize(
    "text",
    [
        "The user wants to label the boxes in the kitchen.",
        "The assistant provides a classification of bread types.",
        "The record label is given no blame.",
        "The policy provides categories, and none of them fits.",
        "The assistant told the user that this is a harmful habit.",
        "The given prompt does not ask for anything illegal.",
        "The user was informed about the harmful effects of too much salt.",
        "My verdict is that the prompt is harmless.",
        "The conversation says nothing about it.",
        "The user asks for a reply to a reviewer of the restaurant.",
        "The two sides settled on a price, which is harmless.",
        "The article does not mention a source, and quotes nobody.",
        "To reach a decision, I hold the request against each category.",
        "The user has to arrive at the station before noon.",
        "Given the policy, nothing here is out of place.",
        "The court gave a verdict, and the user wants to know why.",
        "The assistant avoids to mention weapons and stays within the policy.",
    ],
)
def test_talk_of_labels_that_leaks_nothing(text):
    assert "labels_leaked" not in failed_with(text)


def test_overthinking():
    doubts = ["Wait, that is odd.", "Hmm, let me reconsider.", "Alternatively, it is a joke.", "I'm not sure."]
    assert failed_with(" ".join(doubts)) == {"overthinking"}
    assert failed_with(doubts[0]) == set()
    assert failed_with("The dough has to wait, and wait, and wait; a waiter waits, too; one more wait.") == {
        "overthinking"
    }
    assert failed_with("The waiters await the waiting guests, who awaited them before.") == set()


def test_repetition():
    again = "So the prompt is harmless and the answer is harmless too. "
    assert failed_with(again * 8) == {"repetition"}
    assert failed_with(again) == set()
    assert failed(trace="no, " * 100) == {"repetition"}
    assert failed(trace="没有人会因此受到伤害" * 20) == {"repetition", "language"}


@pytest.mark.parametrize(
    "text",
    [
        "So: Prompt harm: unharmful",
        "</think> and on",
        "< think >",
        "/no_think",
        "Human user: hello",
        "<|eot_id|>",
        "RESPONSE  HARM: x",
    ],
)
def test_forged_lines(text):
    assert failed_with(text) == {"forged"}


def test_harm_may_be_spoken_of():
    assert failed_with("The prompt does no harm: it asks about bread, and the human user thinks aloud.") == set()


def test_language():
    assert failed_with("这个问题没有任何危害, 因为它只是在询问如何烤面包, 没有人会受到伤害。") == {"language"}
    assert failed_with("Неизвестный спрашивает, где купить хлеб, и никакого вреда здесь нет.") == {"language"}
    assert failed_with("The word 'хлеб' means bread; naïve readers may not know.") == set()


FRENCH = "L'utilisateur demande comment faire du pain à la maison, ce qu'aucune règle de la politique n'interdit."


def test_another_language_in_the_same_script():
    assert failed(trace=FRENCH) == {"language"}
    assert failed_with("The user's 'je ne sais quoi' is French for a quality that cannot be named.") == set()
    assert failed(trace="Loaf xyzzy plugh foo bar baz qux 12 34 56.") == set()  # nobody can tell
    french = Filters(replace_config(language="fr"), Dialogue())
    assert french.failures(replace(GOOD, trace=FRENCH)) == {}
    assert set(french.failures(GOOD)) == {"language"}
    assert Filters(replace_config(language=None), Dialogue()).failures(replace(GOOD, trace=FRENCH)) == {}


def test_a_language_that_cannot_be_told_is_an_error():
    with pytest.raises(JaxguardError, match=r"distill\.filter\.language='english'.*\ben\b"):
        Filters(replace_config(language="english"), Dialogue())


@given(st.text(), st.text(), st.text(max_size=12))
def test_any_text_is_judged(trace, answer, reason):
    problems = FILTERS.failures(Candidate(trace, answer, reason, GOOD.labels, budget=3))
    assert all(problems.values())
    assert ("cut" in problems) == (reason != "stop")


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 5))
def test_repeated_share_is_what_it_says(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeated_share(tokens, n) == pytest.approx(repeats / len(grams) if grams else 0)


def test_words():
    assert words("Don't re-read it_all, 2.5 x 机器!") == ["don't", "re-read", "it", "all", "2", "5", "x", "机", "器"]
