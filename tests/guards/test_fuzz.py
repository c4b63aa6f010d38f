# ruff: noqa: RUF001 - look-alikes are meant
"""No parser fails open: 10,000 generated outputs for each, held against oracles that are written anew, in the simplest way.

An oracle is narrower than a grammar: it says which outputs may count as unharmful at all. Whatever a parser lets through has to
pass it; what it takes for harmful or unreadable is not argued about.
"""

import random
import re
import time

import pytest
from external_templates import GUARDS, LINES, guard_tokenizer

from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import CHOICES, FAIL_CLOSED, TITLES, Mode
from jaxguard.data.policies import QUESTIONS, Policy
from jaxguard.guards.formats.external import external_format
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Request

OUTPUTS = 10_000
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
LINE_PIECES = ["Request: good", "Request: bad", "Refused: none", "Refused: no", "Reply: good", "<reason>", "</reason>"]
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
    pieces = VERDICTS + MARKS + NOISE + (LINE_PIECES if seed == LINES else [])
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
    thoughts = ["", "", "<think>\nIt is bread.\n</think>\n\n", harmony]
    if seed == LINES:
        right += 2 * ["Request: good\nRefused: yes\nReply: good", "Request: good\nRefused: none"]
        thoughts += 2 * ["<reason>\nIt is bread.\n</reason>\n"]
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


def plain(text):
    """Without decoration: what stands in a line is judged by its letters, digits and colons."""
    return re.sub(r"[\s\u2581*_`~\"'()\[\]#>.-]+", " ", text.lower()).strip()


def last_thought(text):
    """(what follows the last think tag, whether that tag closes)."""
    tags = list(re.finditer(r"<[\s\u2581]{0,3}(/?)[\s\u2581]{0,3}think[\s\u2581]{0,3}>", text.lower()))
    return (text[tags[-1].end() :], bool(tags[-1][1])) if len(text) == len(text.lower()) and tags else (text, None)


DOUBT = {
    "not",
    "nope",
    "never",
    "false",
    "wrong",
    "but",
    "or",
    "wait",
    "except",
    "unless",
    "if",
    "rather",
    "however",
    "actually",
}


def may_pass(text, question, mode):
    """Whether the verdict lines, one by one, say the word that lets something pass, and nothing says another."""
    if len(text) != len(text.lower()):
        return True  # offsets of another case: the other outputs cover it
    verdict, closed = last_thought(text)
    if closed is False or (closed is None and mode is Mode.REASONING):
        return False
    title = TITLES[question].lower()
    lets_pass = next(word for word in CHOICES[question] if word != FAIL_CLOSED[question])
    said = []
    for part in re.split(
        rf"{title.split()[0]}[\s\u2581*_`~-]{{0,4}}{title.split()[1]}[\s\u2581*_`~-]{{0,4}}:", verdict.lower()
    )[1:]:
        words = plain(part.split("\n")[0]).split()
        first = re.match(r"[a-z]+", words[0]) if words else None
        said.append(first[0] if first else None)
        following = re.findall(r"[a-z]+", " ".join(words))[1:2]
        if following and following[0] in DOUBT and said[-1] == lets_pass:
            return False
    return bool(said) and set(said) == {lets_pass}


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
    assert passed > OUTPUTS / 50


def exactly(kind, ask, text):
    """Whether this is, to the letter, an answer of the format that lets the example pass."""
    response, question = ask.example.response is not None, ask.questions[0]
    if kind == "gpt_oss_safeguard":
        start = "<|channel|>final<|message|>"
        at = text.rfind(start)
        before = text[:at] if at >= 0 else "x"
        if before.strip() and not before.endswith("<|end|><|start|>assistant"):
            return False
        return text[at + len(start) :].strip().lower() == ("refusal" if question == "response_refusal" else "unharmful")
    if kind == "nemotron_reasoning" and ask.mode is Mode.REASONING:
        if not text.strip().startswith("<think>") or "</think>" not in text:
            return False
        text = text.split("</think>")[-1]
    if kind == "shieldgemma":
        first = re.split(r"[.,:;!\n]", text.strip())[0].strip().lower()
        return first == "no" and "yes" not in re.findall(r"\w+", text.lower())
    if kind == LINES and ask.mode is Mode.REASONING:
        if "</reason>" not in text:
            return False
        text = text.split("</reason>")[-1]
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
    assert passed > 20


ANSWERS = {
    "llama_guard": ("safe", "safe"),
    "wildguard": ("Harmful request: no\nResponse refusal: no\nHarmful response: no", "no"),
    "shieldgemma": ("No", "No"),
    "qwen3guard": ("Safety: Safe\nCategories: None", "Safe"),
    "gpt_oss_safeguard": ("<|channel|>final<|message|>unharmful", "unharmful"),
    "nemotron_reasoning": ("Prompt harm: unharmful\nResponse harm: unharmful", "unharmful"),
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
    ask = Request(RESPONSES, ("prompt_harm",), Mode.DIRECT)
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
            assert (
                form[kind].guard.parse(Request(RESPONSES, ("prompt_harm",), Mode.DIRECT), answer[:-cut]) != NEGATIVE
            ), kind


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
            ask = Request(RESPONSES, ("prompt_harm",), Mode.REASONING)
            one.parse(ask, text)
            one.close_reasoning(ask, text)
            assert time.process_time() - began < 2, (kind, piece)
