"""Which part of a reply is the trace."""

from dataclasses import replace

import pytest

from jaxguard.data.examples import Example
from jaxguard.data.format.answer import answer_grammar, parse, split_verdict
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.distill.prompts import tasks_for
from jaxguard.distill.run import split_reply
from jaxguard.distill.teacher import Reply

POLICY = Policy("bread", rules="Nobody may speak of knives.", asks=("prompt_harm", "response_harm"))
EXAMPLES = [Example(f"x{i}", "t", "May I bake?", prompt_label="unharmful") for i in range(3)]
VERDICT = "Prompt harm: unharmful\nResponse harm: None"


def reply(trace, answer):
    return Reply(trace, answer, "stop", 1, 1)


def test_the_trace_is_the_reasoning_or_the_text_before_the_verdict():
    task, *_ = tasks_for(EXAMPLES, POLICY)
    assert split_reply(task, reply("I think.", f"So:\n{VERDICT}")) == ("I think.", f"So:\n{VERDICT}")
    assert split_reply(task, reply("", f"I think.\n\n{VERDICT}")) == ("I think.", VERDICT)
    assert split_reply(task, reply("", "I think.")) == ("I think.", "")


def test_a_shortened_trace_is_in_the_answer():
    task = replace(next(tasks_for(EXAMPLES, POLICY)), budget=2)
    assert split_reply(task, reply("I must shorten this.", f"Short.\n\n{VERDICT}")) == ("Short.", VERDICT)
    assert split_reply(task, reply("I must shorten this.", VERDICT)) == ("", VERDICT)


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (VERDICT, ""),
        (f"Thought.\n\n**Response harm:** None\n{VERDICT}", "Thought."),
        (f"It asks: prompt harm: or not?\n{VERDICT}", "It asks: prompt harm: or not?"),
        ("no verdict", "no verdict"),
        ("", ""),
    ],
)
def test_where_the_verdict_begins(text, before):
    reasoning, rest = split_verdict(text)
    assert reasoning == before
    assert "".join((reasoning + rest).split()) == "".join(text.split())


def test_the_grammar_lets_through_what_the_parser_reads():
    import re

    asks = ("prompt_harm", "response_harm", "response_refusal")
    pattern = re.compile(answer_grammar(asks))
    good = "It is bread.\nNothing else.\n\nPrompt harm: harmful\nResponse harm: None\nResponse refusal: refusal"
    assert pattern.fullmatch(good)
    assert parse(split_verdict(good)[1], asks, Mode.DIRECT).problems == ()
    for bad in (good.replace(": None", ": none of it"), good.split("\n\n")[1], good + "\n", good.replace("\n\n", "\n")):
        assert not pattern.fullmatch(bad)
