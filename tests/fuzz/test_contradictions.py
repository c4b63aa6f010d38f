# ruff: noqa: RUF001 - look-alikes are meant
"""No parser fails open: answers with an altered verdict, and answers that take their verdict back."""

import random

import pytest
from campaign import rounds
from external_templates import GUARDS, LINES
from guard_answers import ANSWERS, POLYGUARD, RESPONSES, TASKS, asked

from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import QUESTIONS
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request

CONTRADICTIONS = rounds(400, 20_000)
"""Outputs of a format that take back what they say."""
INSTEAD = [
    "",
    "harmful",
    "unsafe",
    "yes",
    "maybe",
    "not {}",
    "{}?",
    "{} or harmful",
    "un",
    "un {}",
    "{}x",
    "0",
    "ｓafe",
    "{}\nyes",
    "{} {}",
]


@pytest.mark.parametrize("kind", GUARDS)
@pytest.mark.parametrize("instead", INSTEAD)
def test_an_unharmful_answer_with_its_verdict_altered_does_not_pass(form, kind, instead):
    answer, word = ANSWERS[kind]
    ask = asked(form[kind], Mode.DIRECT)
    altered = answer[: answer.index(word)] + instead.replace("{}", word) + answer[answer.index(word) + len(word) :]
    assert form[kind].guard.parse(ask, answer) == NEGATIVE
    assert form[kind].guard.parse(ask, altered) != NEGATIVE


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    "instead", [*INSTEAD[:-1], "{}\nSo the Prompt harm: harmful", "{}\n               prompt harm: HARMFUL"]
)
def test_our_own_unharmful_answer_with_its_verdict_altered_does_not_pass(mode, instead):
    altered = instead.replace("{}\nyes", "{}|yes").replace("{}", "unharmful")
    text = f"<think>\nPrompt harm: unharmful\n</think>\n\nPrompt harm: {altered}\nResponse harm: unharmful"
    assert parse(text, QUESTIONS, mode, has_response=True).prompt_harm == "harmful"


@pytest.mark.parametrize("cut", range(1, len("unharmful")))
def test_a_verdict_that_was_cut_does_not_pass(form, cut):
    for kind, (answer, _) in ANSWERS.items():
        if kind not in ("shieldgemma", "llama_guard") or cut == 1:
            assert form[kind].guard.parse(asked(form[kind], Mode.DIRECT), answer[:-cut]) != NEGATIVE, kind


# What takes a verdict back, or reports somebody else's; none of it may stand outside the reasoning.
CLAIMS = [
    "The prompt is harmful.", "This is unsafe.", "Correction: this is unsafe.", "Wait, that is wrong: it is harmful.",
    "I take that back.", "Verdict: harmful", '"Prompt harm": "harmful"', '{"Prompt harm": "harmful"}', "Harmful request: yes",
    "Safety: Unsafe", "Prompt harm: harmful", "unsafe\nS1", "Yes", "**Harmful**", "It is not safe.",
    "On second thought, yes.", "Prompt harm \u2014 harmful", "\u0420rompt h\u0430rm: harmful", "Actually no: it violates S1.",
    "<|im_start|>assistant\nharmful", "~~That~~ was wrong.", "But it is dangerous.", "Sorry, I meant the opposite.",
    "Response harm: harmful", "Refusal: maybe, but harmful",
]  # fmt: skip
LINES_OF_OTHERS = ["Request: bad", "Categories: Violent", "Refusal: No", "Verdict follows."]
REPORTS = [
    "The user wrote:",
    "He claims:",
    "Example of an answer:",
    "If the policy allowed it:",
    "Never say this:",
    "Answer",
    "Not",
    "un",
]
ASIDES = [
    " (dangerous)", " (S1 applies)", ", but harmful", " - not really", "? Yes.", " or harmful", " unless it is meant", "-ish",
    " \u2014 no: unsafe", " [harmful]", " / harmful", "; no, harmful", " = harmful", "\u2028harmful", "\u200bharmful", "\rharmful",
]  # fmt: skip
QUOTATIONS = [
    "> {}",
    "```\n{}\n```",
    "<quote>{}</quote>",
    "~~{}~~",
    "<!-- {} -->",
    "\u201c{}\u201d",
    "({})",
    "not {}",
    "| {} |",
    ">>> {}",
]
PASSING = {
    "llama_guard": ("", "safe", "safe", "unsafe\nS1"),
    "wildguard": (
        "",
        ANSWERS["wildguard"][0],
        "no",
        "Harmful request: yes\nResponse refusal: no\nHarmful response: yes",
    ),
    "shieldgemma": ("", "No", "No", "Yes"),
    "qwen3guard": ("", "Safety: Safe\nCategories: None", "Safe", "Safety: Unsafe\nCategories: Violent"),
    "gpt_oss_safeguard": (
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>",
        "unharmful",
        "unharmful",
        "harmful",
    ),
    "nemotron_reasoning": (
        "<think>\nx\n</think>\n\n",
        "Prompt harm: unharmful\nResponse harm: unharmful",
        "unharmful",
        "Prompt harm: harmful\nResponse harm: unharmful",
    ),
    "nemotron_35": (
        "<think>\nx\n</think>\n",
        "User Safety: safe\nResponse Safety: safe",
        "safe",
        "User Safety: unsafe\nResponse Safety: safe",
    ),
    "granite_guardian": ("", "No", "No", "Yes"),
    "granite_guardian_33": ("<think>\nx\n</think>\n", "<score> no </score>", "no", "<score> yes </score>"),
    "nemoguard": (
        "",
        ANSWERS["nemoguard"][0],
        "safe",
        '{"User Safety": "unsafe", "Response Safety": "safe", "Safety Categories": "Violence"}',
    ),
    "guardreasoner": (
        TASKS,
        "Request: unharmful\nCompletion: refusal\nResponse: unharmful",
        "unharmful",
        "Request: harmful\nCompletion: refusal\nResponse: unharmful",
    ),
    "polyguard": (
        "",
        POLYGUARD,
        "no",
        POLYGUARD.replace("no\nRequest safety violations: None", "yes\nRequest safety violations: S1"),
    ),
    "dynaguard": (
        "<think>\nx\n</think>\n",
        "<answer>\nPASS\n</answer>",
        "PASS",
        "<answer>\nFAIL\n</answer>",
    ),
    "yes_no": ("", "No", "No", "Yes"),
    LINES: (
        "<reason>\nx\n</reason>\n",
        "Request: good\nRefused: no\nReply: good",
        "good",
        "Request: bad\nRefused: no\nReply: good",
    ),
    "ours": (
        "<think>\nx\n</think>\n\n",
        "Prompt harm: unharmful\nResponse harm: unharmful",
        "unharmful",
        "Prompt harm: harmful\nResponse harm: unharmful",
    ),
}
"""Format -> an answer that lets the prompt pass: reasoning, verdict, the word that lets it; and the opposite verdict."""


def contradicted(kind, draw):
    """An answer that lets the prompt pass, with what takes it back before it, after it, within it or around it."""
    reasoning, answer, word, opposite = PASSING[kind]
    # What stands before GuardReasoner's answers is reasoning: no tag opens it.
    ways = [
        "before",
        "after",
        "aside",
        "quoted",
        *(["first", "twice"] if reasoning and kind != "guardreasoner" else []),
    ]
    chosen = draw.sample(ways, draw.choice([1, 1, 2]))
    joint = draw.choice(["\n", "\n", "\n\n", " ", "\r\n", "\t"])
    if "aside" in chosen:
        at = answer.index(word) + len(word)
        answer = answer[:at] + draw.choice(ASIDES) + answer[at:]
    if "quoted" in chosen:
        answer = draw.choice(QUOTATIONS).replace("{}", answer)
    if "before" in chosen:
        answer = draw.choice([*CLAIMS, *REPORTS, *LINES_OF_OTHERS, opposite]) + joint + answer
    if "after" in chosen:
        answer += draw.choice(["\n", "\n\n", " ", ". "]) + draw.choice([*CLAIMS, opposite, *LINES_OF_OTHERS])
    if "twice" in chosen:
        answer = f"{opposite}\n{reasoning}{answer}"
    start = draw.choice([*CLAIMS, *REPORTS, *LINES_OF_OTHERS, opposite]) + joint if "first" in chosen else ""
    return start + reasoning + answer


@pytest.mark.parametrize("kind", PASSING)
def test_no_answer_passes_that_takes_its_verdict_back(form, kind):
    draw, (reasoning, answer, _, opposite) = random.Random(f"contradictions of {kind}"), PASSING[kind]
    mode = Mode.REASONING if reasoning else Mode.DIRECT
    ask = Request(RESPONSES, ("prompt_harm",), mode) if kind == "ours" else asked(form[kind], mode)

    def said(text):
        if kind != "ours":
            return form[kind].guard.parse(ask, text)
        verdict = parse(text, ["prompt_harm"], ask.mode, has_response=True)
        return UNPARSABLE if verdict.problems else NEGATIVE if verdict.prompt_harm == "unharmful" else POSITIVE

    assert (said(reasoning + answer), said(reasoning + opposite)) == (NEGATIVE, POSITIVE)
    for _ in range(CONTRADICTIONS):
        text = contradicted(kind, draw)
        assert said(text) != NEGATIVE, text
