"""Baselines: what they learn, what they answer, and when they cannot."""

import asyncio
from dataclasses import replace

import pytest

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.baselines import fit_baseline
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, Request
from jaxguard.utils.errors import JaxguardError

BURNT = ("burn the crust until it is black", "burn all of the dough", "how to burn a loaf", "the oven should burn it")
FINE = ("bake a soft loaf", "knead the dough well", "how long does rye bread rise", "the oven should be warm")
PROMPTS = [
    Example(str(i), "s", text, prompt_label="harmful" if text in BURNT else "unharmful")
    for i, text in enumerate((*BURNT, *FINE))
]
RESPONSES = [
    replace(one, prompt="Hm?", response=one.prompt, prompt_label=None, response_label=one.prompt_label)
    for one in PROMPTS
]


def answers(predict, examples, question="prompt_harm"):
    async def collect():
        return [one async for one in predict([Request(example, (question,), Mode.DIRECT) for example in examples])]

    return asyncio.run(collect())


@pytest.mark.parametrize(("examples", "question"), [(PROMPTS, "prompt_harm"), (RESPONSES, "response_harm")])
def test_words_tell_a_separable_set_apart(examples, question):
    predict = fit_baseline("tfidf", examples, 0)
    predictions = answers(predict, examples, question)
    assert [one.example_id for one in predictions] == [one.id for one in examples]
    assert [list(one.verdicts.values()) for one in predictions] == [[(POSITIVE,)]] * 4 + [[(NEGATIVE,)]] * 4
    assert all((one.probabilities[question] > 0.5) == (one.verdicts[question] == (POSITIVE,)) for one in predictions)
    new = Example("new", "s", "Hm?" if question == "response_harm" else "burn my loaf", "burn my loaf")
    assert answers(predict, [new], question)[0].verdicts[question] == (POSITIVE,)
    assert predictions == answers(fit_baseline("tfidf", examples, 0), examples, question)


def test_each_question_has_its_model():
    """The same words, labelled the other way round in responses."""
    turned = [
        replace(one, response_label="harmful" if one.response_label == "unharmful" else "unharmful")
        for one in RESPONSES
    ]
    predict = fit_baseline("tfidf", PROMPTS + turned, 0)
    both = [replace(PROMPTS[0], response=PROMPTS[0].prompt)]
    assert answers(predict, both)[0].verdicts == {"prompt_harm": (POSITIVE,)}
    assert answers(predict, both, "response_harm")[0].verdicts == {"response_harm": (NEGATIVE,)}


def test_a_question_without_labels_is_answered_by_the_other_harm_questions_model():
    predict = fit_baseline("tfidf", PROMPTS, 0)
    assert [list(one.verdicts.values()) for one in answers(predict, RESPONSES, "response_harm")] == [
        [(POSITIVE,)]
    ] * 4 + [[(NEGATIVE,)]] * 4
    with pytest.raises(JaxguardError, match=r"refusal.*compliance"):
        answers(predict, RESPONSES, "response_refusal")


def test_labels_of_one_kind_teach_nothing():
    with pytest.raises(JaxguardError, match=r"harmful.*unharmful"):
        answers(fit_baseline("tfidf", PROMPTS[:4], 0), PROMPTS)
    with pytest.raises(JaxguardError, match=r"data\.train"):
        fit_baseline("majority", [Example("1", "s", "bread")], 0)


def test_the_majority_says_what_most_labels_say():
    predictions = answers(fit_baseline("majority", PROMPTS[:6], 0), PROMPTS)
    assert {(one.verdicts["prompt_harm"], one.probabilities["prompt_harm"]) for one in predictions} == {
        ((POSITIVE,), 4 / 6)
    }
    predictions = answers(fit_baseline("majority", PROMPTS[3:], 0), RESPONSES, "response_harm")
    assert {(one.verdicts["response_harm"], one.probabilities["response_harm"]) for one in predictions} == {
        ((NEGATIVE,), 1 / 5)
    }


def test_all_questions_are_answered_at_once():
    both = [replace(PROMPTS[0], response=PROMPTS[-1].prompt)]
    predict = fit_baseline("tfidf", PROMPTS + RESPONSES, 0)

    async def collect(*questions):
        return [one async for one in predict([Request(both[0], questions, Mode.DIRECT)])]

    [predictions] = asyncio.run(collect("prompt_harm", "response_harm"))
    for question in ("prompt_harm", "response_harm"):
        assert predictions.probabilities[question] == asyncio.run(collect(question))[0].probabilities[question]
