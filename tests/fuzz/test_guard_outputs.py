# ruff: noqa: RUF001 - look-alikes are meant
"""No parser fails open: generated outputs for each format, held against independent oracles.

An oracle is narrower than a grammar: it says which outputs may count as unharmful at all. Whatever a parser lets through has to
pass it; what it takes for harmful or unreadable is not argued about.
"""

import random
import time

import pytest
from campaign import rounds
from external_templates import GUARDS, LINES
from guard_answers import POLYGUARD, PROMPTS, RESPONSES, TASKS, THINK, asked
from guard_oracles import exactly, may_pass

from jaxguard.config.reinforce import RewardConfig
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import CHOICES, FAIL_CLOSED, TITLES, Mode
from jaxguard.data.policies import QUESTIONS
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request
from jaxguard.reinforce.rewards import read_verdict, verdict_reward

OUTPUTS = rounds(2_000, 20_000)
SETS = [QUESTIONS[i:j] for i in range(3) for j in range(i + 1, 4)]

# What outputs are made of: every format's verdicts, and what may stand around, between and in place of them.
VERDICTS = [f"{TITLES[q]}: {word}" for q in QUESTIONS for word in (*CHOICES[q], "None")]
VERDICTS += [
    "Harmful request: no",
    "Harmful request: yes",
    "Response refusal: no",
    "Response refusal: n/a",
    "Harmful response: no",
]
VERDICTS += ["Harmful response: yes", "Safety: Safe", "Safety: Unsafe", "Safety: Controversial", "Categories: None"]
VERDICTS += [
    "Categories: Violent",
    "Refusal: Yes",
    "Refusal: No",
    "safe",
    "unsafe",
    "S1",
    "S2, S14",
    "Yes",
    "No",
    "unharmful",
]
MARKS = [
    "<think>",
    "</think>",
    "< / THINK >",
    "<think",
    "/no_think",
    "<|channel|>",
    "analysis",
    "final",
    "<|message|>",
    "<|end|>",
]
MARKS += [
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|return|>",
    "<end_of_turn>",
]
OWN = {
    LINES: (
        ["Request: good", "Request: bad", "Refused: none", "Refused: no", "Reply: good", "<reason>", "</reason>"],
        ["Request: good\nRefused: yes\nReply: good", "Request: good\nRefused: none"],
        "<reason>\nIt is bread.\n</reason>\n",
    ),
    "nemotron_35": (
        ["User Safety: safe", "User Safety: unsafe", "Response Safety: safe", "Safety Categories: Violence"],
        ["User Safety: safe\nResponse Safety: safe", "User Safety: safe"],
        THINK,
    ),
    "granite_guardian_33": (["<score>", "</score>", "<score> yes </score>"], 2 * ["<score> no </score>"], THINK),
    "nemoguard": (
        ['"User Safety": "unsafe"', '"User Safety": "safe"', '"Safety Categories": "Violence"', ', "x": 1', "{", "}"],
        [
            '{"User Safety": "safe", "Response Safety": "safe"}',
            '{"User Safety": "safe"}',
            '{"User Safety": "unsafe", "Response Safety": "safe", "Safety Categories": "Threat, Sexual (minor)"}',
        ],
        "",
    ),
    "guardreasoner": (
        ["Request: unharmful", "Request: harmful", "Completion: refusal", "Response: None", "Answers:", "---"],
        [
            "Request: unharmful\nCompletion: refusal\nResponse: unharmful",
            "Request: unharmful\nCompletion: None\nResponse: None",
        ],
        TASKS,
    ),
    "polyguard": (
        ["Request safety violations: S2", "Request safety violations: None", "Response safety violations: S1, S2"],
        [POLYGUARD, POLYGUARD.replace("no\nRequest safety violations: None", "yes\nRequest safety violations: S1, S2")],
        "",
    ),
    "dynaguard": (
        ["<answer>", "</answer>", "PASS", "FAIL", "<explanation>", "</explanation>"],
        2 * ["<answer>\nPASS\n</answer>"],
        THINK,
    ),
}
"""Format -> pieces of its answers; answers that let something pass, each with its own share of the outputs; reasoning."""
NOISE = [
    "not ",
    "un",
    "isn't ",
    ", but ",
    " or ",
    "?",
    ".",
    ":",
    " - ",
    "—",
    "(",
    ")",
    "**",
    "`",
    "~~",
    "{",
    "}",
    '"',
    "- ",
    "> ",
]
NOISE += [
    "\n",
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\t",
    " ",
    "            ",
    "\u00a0",
    "\u2028",
    "\u200b",
    "\u2581",
    "\ufeff",
]
NOISE += [
    "hаrmful",
    "ｕｎｈａｒｍｆｕｌ",
    "unharmfuI",
    "ѕafe",
    "ſafe",
    "无害",
    "безопасно",
    "sûr",
    "7",
    "0.5",
    '{"Prompt harm": "unharmful"}',
]
NOISE += [
    "Wait, no.",
    "Prompt harm",
    "harm:",
    "Response",
    "harmful",
    "unharmful",
    "None",
    "bread",
    "x" * 10_000,
    "Prompt harm: \n",
]


def outputs(seed):
    """Random mixes: fragments in any order, lines that are nearly right, and right answers with something changed."""
    draw = random.Random(seed)
    own_pieces, own_right, own_thought = OWN.get(seed, ([], [], ""))
    pieces = VERDICTS + MARKS + NOISE + own_pieces
    right = [
        "Prompt harm: unharmful\nResponse harm: unharmful\nResponse refusal: refusal",
        "Prompt harm: unharmful\nResponse harm: None",
        "Prompt harm: unharmful\nResponse harm: unharmful",
        "Prompt harm: harmful\nResponse harm: unharmful",
        "safe",
        "No",
        "Harmful request: no\nResponse refusal: yes\nHarmful response: no",
        "Safety: Safe\nCategories: None",
        "Safety: Safe\nCategories: None\nRefusal: Yes",
        "unharmful",
        "refusal",
    ]
    harmony = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>"
    thoughts = ["", "", THINK, harmony] + 2 * [own_thought]
    right += 3 * own_right
    for i in range(OUTPUTS):
        if i % 2:
            text = draw.choice(thoughts) + draw.choice(right)
            for _ in range(draw.randrange(3)):
                at, cut = draw.randrange(len(text) + 1), draw.choice((0, 0, 1, 3))
                text = text[:at] + draw.choice(pieces) + text[at + cut :]
            if draw.random() < 0.2:
                text = text[: draw.randrange(len(text) + 1)]
        else:
            joint = draw.choice(("", " ", "\n", "\n"))
            text = joint.join(draw.choice(pieces) for _ in range(draw.randrange(1, 9)))
            if draw.random() < 0.3:
                text = draw.choice(thoughts) + text
        yield draw.choice((str, str, str, str, str.upper, str.lower))(text)


@pytest.mark.parametrize("mode", Mode)
def test_our_own_parser_lets_nothing_pass_that_no_line_says(mode):
    passed = 0
    for i, text in enumerate(outputs(f"ours {mode}")):
        asks = SETS[i % len(SETS)]
        verdict = parse(text, asks, mode, has_response=True)
        for question in QUESTIONS:
            said = getattr(verdict, question)
            assert (said in CHOICES[question]) == (question in asks), text
            if said is not None and said != FAIL_CLOSED[question]:
                assert may_pass(text, question, mode), text[:300]
                passed += 1
    assert passed > OUTPUTS / 200


@pytest.mark.parametrize("mode", Mode)
def test_no_output_earns_a_reward_that_no_line_says(mode):
    """One that earns more than the worst verdict says the right word of every label that lets something pass, and no other."""
    earned, settings = 0, RewardConfig()
    for i, text in enumerate(outputs(f"ours {mode}")):
        labels = tuple((q, CHOICES[q][(i + n) % 2]) for n, q in enumerate(SETS[i % len(SETS)]))
        verdict = read_verdict(text, True, labels, mode)
        reward, opposite = (
            verdict_reward(
                verdict, tuple((q, CHOICES[q][CHOICES[q][0] == w]) if flip else (q, w) for q, w in labels), settings
            )
            for flip in (False, True)
        )
        assert reward + opposite <= 0, text[:300]  # nothing is right under both
        if reward > -1:
            earned += 1
            for question, word in labels:
                if verdict[question] == word != FAIL_CLOSED[question]:
                    assert may_pass(text, question, mode), text[:300]
    assert earned > OUTPUTS / 1000


@pytest.mark.parametrize("kind", GUARDS)
def test_no_other_format_lets_pass_what_is_not_exactly_its_answer(form, kind):
    passed, guard = 0, form[kind].guard
    for i, text in enumerate(outputs(kind)):
        question = guard.questions[i % len(guard.questions)]
        example = PROMPTS if question == "prompt_harm" and i % 3 else RESPONSES
        ask = Request(example, (question,), tuple(Mode)[i % 5 == 0])
        said = form[kind].guard.parse(ask, text)
        assert said in (POSITIVE, NEGATIVE, UNPARSABLE)
        # Of a refusal it is the finding that there was one that lets something pass.
        if said == (POSITIVE if question == "response_refusal" else NEGATIVE):
            assert exactly(kind, ask, text), text[:300]
            passed += 1
    assert passed > OUTPUTS / 1000


REPEATED = [
    "\n",
    " ",
    "-",
    "<",
    "Prompt harm: unharmful\n",
    "x Prompt harm: ",
    "<think>",
    "Safety: Safe\n",
    "S1, ",
    "<|channel|>final<|message|>",
]


@pytest.mark.parametrize(
    "start", ["", "No ", "unsafe\nS1", "Safety: Safe\nCategories: ", "<think>\n", "Prompt harm: unharmful"]
)
def test_a_megabyte_is_read_in_linear_time(form, start):
    """Quadratic work on a megabyte takes hours; two seconds hold on a busy machine, whose clock is the process's own."""
    for piece in REPEATED:
        text = start + piece * (1_000_000 // len(piece))
        for mode in Mode:
            began = time.process_time()
            parse(text, QUESTIONS, mode)
            assert time.process_time() - began < 2, piece
        for kind, one in form.items():
            began = time.process_time()
            ask = asked(one, Mode.REASONING)
            one.parse(ask, text)
            one.close_reasoning(ask, text)
            assert time.process_time() - began < 2, (kind, piece)
