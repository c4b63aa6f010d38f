"""Which questions were trained together, and how a guard is asked accordingly."""

import itertools

import pytest

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import QUESTIONS, Policy
from jaxguard.data.questions import Ask, QuestionSet, ask, cautions, question_sets, unasked

PROMPT, RESPONSE, REFUSAL = QUESTIONS
BOTH = (PROMPT, RESPONSE)
POLICY = Policy("short", rules="Be kind.")


def sets(*trained, mode=Mode.DIRECT):
    """Sets of questions: ("prompt", *questions) of prompts alone, ("exchange", *questions) with a response."""
    return [
        QuestionSet(mode=mode, response=what == "exchange", questions=questions, examples=count)
        for what, *questions, count in ((*each, 100) if isinstance(each[-1], str) else each for each in trained)
    ]


POOL = sets(
    ("prompt", *BOTH, 11618), ("exchange", RESPONSE, 7230), ("exchange", PROMPT, 853), ("exchange", REFUSAL, 141)
)


@pytest.mark.parametrize(
    ("trained", "questions", "response", "prompts"),
    [
        # One label an example: a prompt for each question of an exchange.
        (POOL, BOTH, True, [(PROMPT,), (RESPONSE,)]),
        (POOL, QUESTIONS, True, [(PROMPT,), (RESPONSE,), (REFUSAL,)]),
        (POOL, (PROMPT,), False, [BOTH]),
        # Labelled together, asked together, also where one is wanted.
        (sets(("exchange", *BOTH)), BOTH, True, [BOTH]),
        (sets(("exchange", *BOTH)), (RESPONSE,), True, [BOTH]),
        (sets(("exchange", *QUESTIONS), ("exchange", *BOTH)), BOTH, True, [BOTH]),
        # Three of ten thousand were labelled together: the guard has not learnt it.
        ([*POOL, *sets(("exchange", *BOTH, 3))], BOTH, True, [(PROMPT,), (RESPONSE,)]),
        (sets(("exchange", *BOTH, 3), ("exchange", RESPONSE, 9000)), BOTH, True, [BOTH, (RESPONSE,)]),
        # Not trained, not asked.
        (sets(("exchange", RESPONSE)), BOTH, True, [(RESPONSE,)]),
        (sets(("exchange", RESPONSE)), (PROMPT,), False, []),
        (sets(("prompt", *BOTH)), (RESPONSE,), True, []),
        # Trained with responses only: the same lines, about a prompt whose response is absent.
        (sets(("exchange", *BOTH)), (PROMPT,), False, [BOTH]),
        # Nothing is known: everything at once.
        ([], BOTH, True, [BOTH]),
    ],
)
def test_a_prompt_asks_what_was_trained_together(trained, questions, response, prompts):
    asks = ask(questions, BOTH, response, Mode.DIRECT, trained)
    assert [each.lines for each in asks] == prompts
    assert all(each.response is response for each in asks)
    assert sorted(q for each in asks for q in each.questions) == sorted({*sum(prompts, ())} & {*questions})
    assert unasked(questions, response, Mode.DIRECT, trained) == tuple(
        q for q in questions if q not in sum((each.questions for each in asks), ())
    )


def test_a_training_example_is_asked_as_it_was_trained_however_rare_it_is():
    trained = [*POOL, *sets(("exchange", *BOTH, 3))]
    assert [each.lines for each in ask(BOTH, BOTH, True, Mode.DIRECT, trained, rare=0)] == [BOTH]


def test_a_prompt_that_was_trained_alone_is_asked_without_the_response():
    trained = sets(("prompt", PROMPT), ("exchange", RESPONSE))
    assert ask(BOTH, BOTH, True, Mode.DIRECT, trained) == [
        Ask((PROMPT,), (PROMPT,), response=False),
        Ask((RESPONSE,), (RESPONSE,), response=True),
    ]


def test_each_mode_has_its_own():
    trained = [*sets(("exchange", *BOTH)), *sets(("exchange", RESPONSE), mode=Mode.REASONING)]
    assert [each.lines for each in ask(BOTH, BOTH, True, Mode.DIRECT, trained)] == [BOTH]
    assert [each.lines for each in ask(BOTH, BOTH, True, Mode.REASONING, trained)] == [(RESPONSE,)]
    assert unasked(BOTH, True, Mode.REASONING, trained) == (PROMPT,)
    # A mode that was not trained is asked as the other.
    assert [each.lines for each in ask(BOTH, BOTH, True, Mode.REASONING, sets(("exchange", *BOTH)))] == [BOTH]


def test_every_prompt_is_a_trained_one():
    possible = [c for n in (1, 2, 3) for c in itertools.combinations(QUESTIONS, n)]
    for first, second, wanted in itertools.product(possible, possible, possible):
        trained = sets(("exchange", *first), ("exchange", *second))
        asks = ask(wanted, wanted, True, Mode.DIRECT, trained)
        assert {each.lines for each in asks} <= {first, second}
        asked = [q for each in asks for q in each.questions]
        assert sorted(asked) == sorted({*wanted} & {*first, *second})
        assert all({*each.questions} <= {*each.lines} for each in asks)


def test_the_sets_of_training_examples():
    bread = Example("a", "s", "bread?", prompt_label="unharmful")
    baked = Example("b", "s", "bread?", "Bake it.", response_label="unharmful")
    encoded = [(bread, Mode.DIRECT, BOTH), (baked, Mode.DIRECT, (RESPONSE,)), (baked, Mode.REASONING, (RESPONSE,))]
    assert question_sets([*encoded, encoded[0]]) == [
        *sets(("prompt", *BOTH, 2), ("exchange", RESPONSE, 1)),
        *sets(("exchange", RESPONSE, 1), mode=Mode.REASONING),
    ]


def test_what_a_user_must_know_beforehand():
    assert cautions(sets(("prompt", *BOTH), ("exchange", *BOTH)), POLICY) == []
    (split,) = cautions(sets(("prompt", *BOTH), ("exchange", RESPONSE), ("exchange", PROMPT)), POLICY)
    assert "2 prompts" in split
    (missing,) = cautions(sets(("exchange", RESPONSE)), POLICY)
    assert PROMPT in missing
    assert "short" in missing
    assert RESPONSE not in missing
    (alone,) = cautions(sets(("prompt", PROMPT), ("exchange", RESPONSE)), POLICY)
    assert "without the response" in alone
    (neither,) = cautions(sets(("prompt", PROMPT)), POLICY)
    assert RESPONSE in neither
