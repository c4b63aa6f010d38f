# ruff: noqa: RUF001 - look-alikes are meant
"""No parser fails open: generated outputs for each format, held against independent oracles, written in the simplest way.

An oracle is narrower than a grammar: it says which outputs may count as unharmful at all. Whatever a parser lets through has to
pass it; what it takes for harmful or unreadable is not argued about.
"""

import json
import random
import re
import time

import pytest
from campaign import rounds
from external_templates import GUARDS, LINES, guard_tokenizer

from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import CHOICES, FAIL_CLOSED, TITLES, Mode
from jaxguard.data.policies import QUESTIONS, Policy
from jaxguard.guards.formats.external import external_format
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request

OUTPUTS = rounds(2_000, 20_000)
CONTRADICTIONS = rounds(400, 20_000)
"""Outputs of a format that take back what they say."""
RESPONSES = Example("1", "s", "How do I bake bread?", "Mix flour and water.")
PROMPTS = Example("2", "s", "How do I bake bread?")
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
THINK = "<think>\nIt is bread.\n</think>\n\n"
TASKS = "# Task 1\nIt is bread.\n\n---\n\nAnswers: \n"
POLYGUARD = (
    "Harmful request: no\nRequest safety violations: None\nResponse refusal: yes\nHarmful response: no\n"
    "Response safety violations: None"
)
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


def may_pass(text, question, mode):
    """Whether there is one closed think block, or none, and each line after it is a verdict line, all of the same word."""
    if len(text) != len(text.lower()):
        return True  # offsets of another case: the other outputs cover it
    tags = list(re.finditer(r"<[ \t\u2581]*(/?)[ \t\u2581]*think[ \t\u2581]*>", text.lower()))
    closing = [tag.end() for tag in tags if tag[1]]
    if len(closing) > 1 or (tags and not closing) or (mode is Mode.REASONING and not closing):
        return False
    if closing and text[: tags[0].start()].strip() and (len(tags) > 1 or mode is Mode.DIRECT):
        return False
    known = {
        f"{TITLES[q]}:{word}".lower().replace(" ", ""): (q, word) for q in QUESTIONS for word in (*CHOICES[q], "None")
    }
    lines = [line for line in text[sum(closing) :].lower().split("\n") if line.strip()]
    read = [known.get(re.sub(r"^\d+[.)]|[\s\u2581*_`\"'#\u2022.-]", "", line.strip())) for line in lines]
    lets_pass = next(word for word in CHOICES[question] if word != FAIL_CLOSED[question])
    return None not in read and {word for q, word in read if q == question} == {lets_pass}


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


def exactly(kind, ask, text):
    """Whether this is, to the letter, an answer of the format that lets the example pass."""
    response, question = ask.example.response is not None, ask.questions[0]
    if kind == "gpt_oss_safeguard":
        *thoughts, last = text.strip().split("<|end|><|start|>assistant")
        if not all(
            one.startswith("<|channel|>analysis<|message|>") and one.count("<|channel|>") == 1 for one in thoughts
        ):
            return False
        word = "refusal" if question == "response_refusal" else "unharmful"
        return re.sub(r"\s+$", "", last).lower().replace("\n", " ").split(">")[-1].strip() == word and (
            last.startswith("<|channel|>final<|message|>")
        )
    if kind in ("nemotron_reasoning", "granite_guardian_33") and ask.mode is Mode.REASONING:
        if not text.strip().startswith("<think>") or text.count("</think>") != 1:
            return False
        text = text.split("</think>")[-1]
    tag = {LINES: "reason", "nemotron_35": "think", "dynaguard": "think"}.get(kind)
    if tag is not None and ask.mode is Mode.REASONING:
        if text.count(f"</{tag}>") != 1 or f"<{tag}>" in text.strip()[1:].split(f"</{tag}>")[0]:
            return False
        text = text.split(f"</{tag}>")[-1]
    if kind == "guardreasoner":
        if text.count("Answers:") != 1:
            return False
        text = text.split("Answers:")[-1]
    if kind in ("shieldgemma", "granite_guardian"):
        return text.strip().lower() == "no"
    if kind in ("granite_guardian_33", "dynaguard"):
        exact = {"granite_guardian_33": "<score>no</score>", "dynaguard": "<answer>pass</answer>"}[kind]
        return "".join(text.lower().split()) == exact
    if kind == "nemoguard":
        try:
            pairs = json.loads(text.lower(), object_pairs_hook=list)
        except ValueError:
            return False
        (*said, last), words = [tuple(pair) for pair in pairs] or [()], {"safe", "unsafe"}
        said, named = (said, last[1]) if last[:1] == ("safety categories",) else ([*said, last], "")
        titles, values = [pair[0] for pair in said], [pair[1] for pair in said]
        return (
            titles == ["user safety", "response safety"][: 1 + response]
            and set(values) <= words
            and (not named or "unsafe" in values)
            and values[question == "response_harm"] == "safe"
        )
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if kind == "yes_no":
        return [line.lower().removesuffix(".") for line in lines] == ["yes" if question == "response_refusal" else "no"]
    fields = [tuple(part.strip().lower() for part in line.split(":", 1)) for line in lines]
    if kind == "llama_guard":
        return fields == [("safe",)]
    anything = {"yes", "no"} if response else {"yes", "no", "n/a"}
    if kind == "wildguard":
        wanted = [("harmful request", {"yes", "no"}), ("response refusal", anything), ("harmful response", anything)]
        asked = {"prompt_harm": 0, "response_refusal": 1, "response_harm": 2}[question]
        word = "yes" if question == "response_refusal" else "no"
    elif kind == LINES:
        said = {"yes", "no"} if response else {"yes", "no", "none"}
        wanted = [("request", {"bad", "unclear", "good"}), ("refused", said), ("reply", {"bad", "good"})]
        wanted = wanted if response else wanted[:2]
        asked = {"prompt_harm": 0, "response_refusal": 1, "response_harm": 2}[question]
        word = "yes" if question == "response_refusal" else "good"
    elif kind == "guardreasoner":
        harm, done = ({"harmful", "unharmful"}, {"refusal", "compliance"})
        said = set() if response else {"none"}
        wanted = [("request", harm), ("completion", done | said), ("response", harm | said)]
        asked = {"prompt_harm": 0, "response_refusal": 1, "response_harm": 2}[question]
        word = "refusal" if question == "response_refusal" else "unharmful"
    elif kind == "polyguard":
        said = {"yes", "no"} if response else {"yes", "no", "none"}
        wanted = [("harmful request", {"yes", "no"}), ("request safety violations", None), ("response refusal", said)]
        wanted += [("harmful response", said), ("response safety violations", None)]
        asked = {"prompt_harm": 0, "response_refusal": 2, "response_harm": 3}[question]
        word = "yes" if question == "response_refusal" else "no"
    elif kind == "nemotron_35":
        wanted = [("user safety", {"safe", "unsafe"}), ("response safety", {"safe", "unsafe"})][: 1 + response]
        asked, word = (0 if question == "prompt_harm" else 1), "safe"
    elif kind == "qwen3guard":
        wanted = [("safety", {"safe", "unsafe", "controversial"}), ("categories", None), ("refusal", {"yes", "no"})]
        wanted = wanted[:2] if question == "prompt_harm" else wanted
        asked, word = (2, "yes") if question == "response_refusal" else (0, "safe")
    else:
        harm = {"harmful", "unharmful"}
        wanted = [("prompt harm", harm), ("response harm", harm if response else harm | {"none"})]
        asked, word = (0 if question == "prompt_harm" else 1), "unharmful"
    if len(fields) != len(wanted) or any(len(field) != 2 for field in fields):
        return False
    if kind == "qwen3guard" and (fields[0][1] == "safe") != (fields[1][1] == "none"):
        return False
    if kind == "polyguard" and any(fields[i][1] != "yes" and fields[i + 1][1] != "none" for i in (0, 3)):
        return False
    names_fit = all(" ".join(field[0].split()) == title for field, (title, _) in zip(fields, wanted, strict=True))
    words_fit = all(words is None or field[1] in words for field, (_, words) in zip(fields, wanted, strict=True))
    return names_fit and words_fit and fields[asked][1] == word


@pytest.fixture(scope="module")
def form(tiny_tokenizer_folder):
    return {
        kind: external_format(kind, guard_tokenizer(tiny_tokenizer_folder, kind), Policy("wildguard", rules="Be kind."))
        for kind in GUARDS
    }


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


def asked(form, mode):
    """The first question that it answers, about an exchange."""
    return Request(RESPONSES, form.guard.questions[:1], mode)


ANSWERS = {
    "llama_guard": ("safe", "safe"),
    "wildguard": ("Harmful request: no\nResponse refusal: no\nHarmful response: no", "no"),
    "shieldgemma": ("No", "No"),
    "qwen3guard": ("Safety: Safe\nCategories: None", "Safe"),
    "gpt_oss_safeguard": ("<|channel|>final<|message|>unharmful", "unharmful"),
    "nemotron_reasoning": ("Prompt harm: unharmful\nResponse harm: unharmful", "unharmful"),
    "nemotron_35": ("User Safety: safe\nResponse Safety: safe", "safe"),
    "granite_guardian": ("No", "No"),
    "granite_guardian_33": ("<score> no </score>", "no"),
    "nemoguard": ('{"User Safety": "safe", "Response Safety": "safe"}', "safe"),
    "guardreasoner": (f"{TASKS}Request: unharmful\nCompletion: refusal\nResponse: unharmful", "unharmful"),
    "polyguard": (POLYGUARD, "no"),
    "dynaguard": ("<answer>\nPASS\n</answer>", "PASS"),
    "yes_no": ("No", "No"),
    LINES: ("Request: good\nRefused: no\nReply: good", "good"),
}
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
