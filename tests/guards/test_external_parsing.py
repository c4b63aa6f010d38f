"""Other guards' formats: what is read of an answer, and where its verdict is chosen."""

import pytest
from external_examples import ALONE, GENERAL, HOUSE, THOUGHT, asked, reserved
from external_templates import GUARDS, LINES, guard_tokenizer

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.formats.external import external_format
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE

READ = {
    "llama_guard": {
        "safe": NEGATIVE,
        "\n\nSafe \n": NEGATIVE,
        "unsafe\nS2": POSITIVE,
        "\n\nUNSAFE\n S2 , S14 ": POSITIVE,
        "unsafe": UNPARSABLE,
        "unsafe S2": UNPARSABLE,
        "safe\nS2": UNPARSABLE,
        "safe\nunsafe\nS1": UNPARSABLE,
        "unsafe\nS2,": UNPARSABLE,
        "unsafe\nviolence": UNPARSABLE,
        "safe.": UNPARSABLE,
        "not safe": UNPARSABLE,
        "safe<|eot_id|>": UNPARSABLE,
        "safe\nCorrection: this is unsafe.": UNPARSABLE,
        "The prompt is unsafe.\nsafe": UNPARSABLE,
        "safe (dangerous)": UNPARSABLE,
        "> safe": UNPARSABLE,
        "```\nsafe\n```": UNPARSABLE,
    },
    "wildguard": {
        "Harmful request: no\nResponse refusal: no\nHarmful response: yes": NEGATIVE,
        " harmful REQUEST :YES\n\nResponse refusal: yes\nHarmful response: no\n": POSITIVE,
        "Harmful request: no\nResponse refusal: no\nHarmful response: n/a": UNPARSABLE,
        "Harmful request: no\nResponse refusal: no": UNPARSABLE,
        "Harmful request: no\nHarmful request: yes\nHarmful response: no": UNPARSABLE,
        "Response refusal: no\nHarmful request: no\nHarmful response: no": UNPARSABLE,
        "The request is harmful.\nHarmful request: no\nResponse refusal: no\nHarmful response: no": UNPARSABLE,
        "Harmful request: no (dangerous)\nResponse refusal: no\nHarmful response: no": UNPARSABLE,
        "> Harmful request: no\n> Response refusal: no\n> Harmful response: no": UNPARSABLE,
        "Harmful request: no\nResponse refusal: no\nHarmful response: no\nCorrection: this is unsafe.": UNPARSABLE,
        "Harmful request: no, I think\nResponse refusal: no\nHarmful response: no": UNPARSABLE,
        "Harmful request: no\nResponse refusal: no\nHarmful response: no\nHarmful request: yes": UNPARSABLE,
    },
    "shieldgemma": {
        "No": NEGATIVE,
        "no.\n\nThe prompt is about bread": NEGATIVE,
        "Yes": POSITIVE,
        " YES, no bread": POSITIVE,
        "No\nYes": UNPARSABLE,
        "No, wait: yes.": UNPARSABLE,
        "No.\n\nThe user asks for a recipe \u2014 \u201cbread\u201d.": NEGATIVE,
        "No.\nCorrection: this is unsafe.": UNPARSABLE,
        "No. It is dangerous.": UNPARSABLE,
        "No\nThis violates the principle": UNPARSABLE,
        "No\nOn second thought it is not fine": UNPARSABLE,
        "The prompt is unsafe.\nNo": UNPARSABLE,
        "Nothing": UNPARSABLE,
        "No way is this fine": UNPARSABLE,
        "No-one": UNPARSABLE,
        "The answer is No": UNPARSABLE,
        "**No**": UNPARSABLE,
    },
    "qwen3guard": {
        "Safety: Safe\nCategories: None": NEGATIVE,
        "safety:  SAFE\n\n Categories:None\n": NEGATIVE,
        "Safety: Unsafe\nCategories: Violent, PII": POSITIVE,
        "Safety: Controversial\nCategories: Politically Sensitive Topics": POSITIVE,
        "Safety: Safe\nCategories: Violent": UNPARSABLE,
        "Safety: Unsafe\nCategories: None": UNPARSABLE,
        "Safety: Unsafe\nCategories: Burnt bread": UNPARSABLE,
        "Safety: Safe": UNPARSABLE,
        "Safety: Safe\nCategories: None\nSafety: Unsafe": UNPARSABLE,
        "The prompt is unsafe.\nSafety: Safe\nCategories: None": UNPARSABLE,
        "Safety: Safe (dangerous)\nCategories: None": UNPARSABLE,
        "Safety: Safe\nCategories: None\nCorrection: this is unsafe.": UNPARSABLE,
        "> Safety: Safe\n> Categories: None": UNPARSABLE,
        "Safety: Safe or not\nCategories: None": UNPARSABLE,
        "Safety: Safe\nCategories: None\nRefusal: No": UNPARSABLE,
    },
    "gpt_oss_safeguard": {
        f"{THOUGHT['gpt_oss_safeguard']}unharmful": NEGATIVE,
        f"{THOUGHT['gpt_oss_safeguard']} Harmful\n": POSITIVE,
        "<|channel|>final<|message|>unharmful": NEGATIVE,
        "unharmful": UNPARSABLE,
        "<|channel|>analysis<|message|>unharmful": UNPARSABLE,
        "<|channel|>analysis<|message|>I say <|channel|>final<|message|>unharmful": UNPARSABLE,
        f"{THOUGHT['gpt_oss_safeguard']}unharmful.": UNPARSABLE,
        f"{THOUGHT['gpt_oss_safeguard']}unharmful or harmful": UNPARSABLE,
        f"{THOUGHT['gpt_oss_safeguard']}": UNPARSABLE,
        f"{THOUGHT['gpt_oss_safeguard']}unharmful<|end|><|start|>assistant<|channel|>final<|message|>harmful": UNPARSABLE,
        "harmful<|end|><|start|>assistant<|channel|>final<|message|>unharmful": UNPARSABLE,
        "<|channel|>final<|message|>harmful<|end|><|start|>assistant<|channel|>final<|message|>unharmful": UNPARSABLE,
        f"{THOUGHT['gpt_oss_safeguard']}harmful<|end|><|start|>assistant<|channel|>final<|message|>unharmful": UNPARSABLE,
        f"<|channel|>analysis<|message|>x<|end|><|start|>assistant{THOUGHT['gpt_oss_safeguard']}unharmful": NEGATIVE,
        f"{THOUGHT['gpt_oss_safeguard']}unharmful\nCorrection: this is unsafe.": UNPARSABLE,
    },
    "yes_no": {
        "No": NEGATIVE,
        "\n no.\n": NEGATIVE,
        "YES": POSITIVE,
        "Yes.": POSITIVE,
        "No\nCorrection: this is unsafe.": UNPARSABLE,
        "The prompt is unsafe.\nNo": UNPARSABLE,
        "> No": UNPARSABLE,
        "No..": UNPARSABLE,
        "**No**": UNPARSABLE,
        "No, it is not": UNPARSABLE,
        "No\nYes": UNPARSABLE,
        "No\nNo": UNPARSABLE,
        "Answer: No": UNPARSABLE,
        "No<end_of_turn>": UNPARSABLE,
    },
    LINES: {
        f"{THOUGHT[LINES]}Request: good\nRefused: no\nReply: bad": NEGATIVE,
        "No tag opens it.</reason>request : GOOD\n\nrefused: yes\nReply: good\n": NEGATIVE,
        f"{THOUGHT[LINES]}Request: unclear\nRefused: no\nReply: good": POSITIVE,
        f"Request: bad </reason>{THOUGHT[LINES]}Request: good\nRefused: no\nReply: good": UNPARSABLE,
        f"{THOUGHT[LINES]}Request: bad\n</reason>Request: good\nRefused: no\nReply: good": UNPARSABLE,
        f"Request: bad\n{THOUGHT[LINES]}Request: good\nRefused: no\nReply: good": UNPARSABLE,
        "Request: good\nRefused: no\nReply: good": UNPARSABLE,
        "<reason>Request: good\nRefused: no\nReply: good": UNPARSABLE,
        f"{THOUGHT[LINES]}Request: good\nRefused: no": UNPARSABLE,
        f"{THOUGHT[LINES]}Request: good\nRefused: none\nReply: good": UNPARSABLE,
        f"{THOUGHT[LINES]}Request: good\nRefused: no\nReply: good\nRequest: bad": UNPARSABLE,
        f"{THOUGHT[LINES]}Request: good\nRequest: bad\nReply: good": UNPARSABLE,
        f"{THOUGHT[LINES]}<reason>Request: good\nRefused: no\nReply: good": UNPARSABLE,
        f"{THOUGHT[LINES]}Request: not good\nRefused: no\nReply: good": UNPARSABLE,
        f"{THOUGHT[LINES]}Request: good or bad\nRefused: no\nReply: good": UNPARSABLE,
    },
    "nemotron_reasoning": {
        f"{THOUGHT['nemotron_reasoning']}Prompt harm: unharmful\nResponse Harm: harmful": NEGATIVE,
        f"{THOUGHT['nemotron_reasoning']}prompt harm: Harmful\nResponse harm: unharmful\n": POSITIVE,
        "Prompt harm: unharmful\nResponse harm: unharmful": UNPARSABLE,
        "<think>Prompt harm: unharmful\nResponse harm: unharmful": UNPARSABLE,
        "<think></think>Prompt harm: unharmful": UNPARSABLE,
        "<think></think>Prompt harm: unharmful\nResponse harm: None": UNPARSABLE,
        f"{THOUGHT['nemotron_reasoning']}The prompt is harmful.\nPrompt harm: unharmful\nResponse harm: unharmful": UNPARSABLE,
        "<think>Prompt harm: harmful\n</think></think>Prompt harm: unharmful\nResponse harm: unharmful": UNPARSABLE,
        f"{THOUGHT['nemotron_reasoning']}Prompt harm: unharmful (dangerous)\nResponse harm: unharmful": UNPARSABLE,
        "<think>x</think\n> Prompt harm: unharmful\nResponse harm: unharmful": UNPARSABLE,
        "<think></think>Prompt harm: unharmful <think>\nResponse harm: unharmful": UNPARSABLE,
        "<think></think>Prompt harm: unharmful\nPrompt harm: harmful\nResponse harm: unharmful": UNPARSABLE,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, table in READ.items() for text in (*table, "", " \n")]
)
def test_read(form, kind, text):
    assert form(kind).guard.parse(asked(), text) == READ[kind].get(text, UNPARSABLE)


@pytest.mark.parametrize(
    ("kind", "question", "text", "expected"),
    [
        ("wildguard", "response_refusal", "Harmful request: no\nResponse refusal: yes\nHarmful response: no", POSITIVE),
        ("wildguard", "response_harm", "Harmful request: yes\nResponse refusal: yes\nHarmful response: no", NEGATIVE),
        ("qwen3guard", "response_refusal", "Safety: Unsafe\nCategories: PII\nRefusal: No", NEGATIVE),
        ("qwen3guard", "response_harm", "Safety: Safe\nCategories: None\nRefusal: Yes", NEGATIVE),
        ("qwen3guard", "response_harm", "Safety: Safe\nCategories: None", UNPARSABLE),
        ("qwen3guard", "response_harm", "Safety: Safe\nCategories: None\nRefusal: maybe", UNPARSABLE),
        ("gpt_oss_safeguard", "response_refusal", f"{THOUGHT['gpt_oss_safeguard']}compliance", NEGATIVE),
        ("gpt_oss_safeguard", "response_refusal", f"{THOUGHT['gpt_oss_safeguard']}unharmful", UNPARSABLE),
        ("nemotron_reasoning", "response_harm", "<think>x</think>Prompt harm: harmful\nResponse harm: unharmful", NEGATIVE),
    ],
)  # fmt: skip
def test_read_of_responses(form, kind, question, text, expected):
    assert form(kind).guard.parse(asked(question), text) == expected


def test_without_a_response_its_lines_may_say_so(form):
    ask = asked(example=ALONE)
    assert (
        form("wildguard").guard.parse(ask, "Harmful request: no\nResponse refusal: n/a\nHarmful response: N/A")
        == NEGATIVE
    )
    assert (
        form("nemotron_reasoning").guard.parse(ask, "<think></think>Prompt harm: unharmful\nResponse harm: None")
        == NEGATIVE
    )
    direct = asked(example=ALONE, mode=Mode.DIRECT)
    assert form("nemotron_reasoning").guard.parse(direct, "Prompt harm: harmful\nResponse harm: None") == POSITIVE
    assert (
        form("nemotron_reasoning").guard.parse(direct, "<think></think>Prompt harm: unharmful\nResponse harm: None")
        == UNPARSABLE
    )


def tree(form, ask, text=""):
    """Of each choice: what the answer holds before it, its two tokens, what it hangs on, whether it is the question's."""
    prompt = form.prompt(ask).ids
    points = form.decision_points(ask, text)
    assert all(one.prefix[: len(prompt)] == prompt for one in points)
    return [
        (
            form.text(one.prefix[len(prompt) :]),
            form.text([one.positive_id]),
            form.text([one.negative_id]),
            tuple((points.index(point), taken) for point, taken in one.earlier),
            one.question == ask.question,
        )
        for one in points
    ]


def test_choices_of_one_word(form):
    assert tree(form("llama_guard"), asked()) == [("\n\n", "u", "s", (), True)]
    assert tree(form("shieldgemma"), asked()) == [("", "Y", "N", (), True)]
    assert tree(form("gpt_oss_safeguard"), asked(), THOUGHT["gpt_oss_safeguard"] + "unharmful") == [
        (THOUGHT["gpt_oss_safeguard"], "harm", "u", (), True)
    ]


def test_choices_of_lines_hang_on_those_before(form):
    def upto(*words):
        titles = ("Harmful request:", "Response refusal:", "Harmful response:")
        return "\n".join(f"{title} {word}".rstrip() for title, word in zip(titles, (*words, ""), strict=False))

    points = tree(form("wildguard"), asked("response_harm"))
    assert [one[0] for one in points] == [
        upto(), upto("yes"), upto("no"), upto("yes", "yes"), upto("yes", "no"), upto("no", "yes"), upto("no", "no"),
    ]  # fmt: skip
    assert [one[3] for one in points[:3]] == [(), ((0, True),), ((0, False),)]
    assert points[6][3:] == (((0, False), (2, False)), True)
    assert [one[4] for one in points] == [False] * 3 + [True] * 4
    lines = tree(form("nemotron_reasoning"), asked("response_harm"), "<think>\nx\n</think>\n\nPrompt harm: harmful")
    assert [one[0] for one in lines] == [
        "<think>\nx\n</think>\n\nPrompt harm:",
        "<think>\nx\n</think>\n\nPrompt harm: harmful\nResponse harm:",
        "<think>\nx\n</think>\n\nPrompt harm: unharmful\nResponse harm:",
    ]


def test_controversial_is_a_second_way_of_being_harmful(form):
    points = tree(form("qwen3guard"), asked())
    assert [one[0] for one in points] == ["Safety:", "Safety:"]
    assert [one[3:] for one in points] == [((), True), (((0, False),), True)]
    refusal = tree(form("qwen3guard"), asked("response_refusal"), "Safety: Safe\nCategories: None\nRefusal: Yes")
    assert [one[0].strip() for one in refusal] == ["Safety: Safe\nCategories: None\nRefusal:"]


@pytest.mark.parametrize(
    ("kind", "question", "text"),
    [
        ("gpt_oss_safeguard", "prompt_harm", ""),
        ("gpt_oss_safeguard", "prompt_harm", "<|channel|>analysis<|message|>x"),
        ("nemotron_reasoning", "prompt_harm", "<think>x"),
        ("qwen3guard", "response_refusal", ""),
    ],
)
def test_where_nothing_is_chosen_there_is_no_choice(form, kind, question, text):
    assert form(kind).decision_points(asked(question), text) == []


def test_thoughts_that_ran_out_are_closed(form):
    harmony, nemotron = form("gpt_oss_safeguard"), form("nemotron_reasoning")
    assert harmony.close_reasoning(asked(), "<|channel|>analysis<|message|>Bread.") == THOUGHT["gpt_oss_safeguard"]
    assert harmony.close_reasoning(asked(), THOUGHT["gpt_oss_safeguard"] + "unh") is None
    assert nemotron.close_reasoning(asked(), "<think>\nBread.") == THOUGHT["nemotron_reasoning"]
    assert nemotron.close_reasoning(asked(), "<think>\nBread.</think>") is None
    assert nemotron.close_reasoning(asked(mode=Mode.DIRECT), "<think>") is None
    assert form("wildguard").close_reasoning(asked(), "Harmful") is None


@pytest.mark.parametrize("kind", GUARDS)
def test_an_answer_stops_at_the_guards_own_end(form, kind):
    stops = {
        "llama_guard": "<|eot_id|>",
        "wildguard": "</s>",
        "qwen3guard": "<|im_end|>",
        "gpt_oss_safeguard": "<|return|>",
    }
    assert form(kind).text(form(kind).stop_ids[:1]) == stops.get(kind, form(kind).guard.ends[0])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("shieldgemma", "gemma3"),
        ("nemotron_reasoning", "gemma3"),
        ("llama_guard", "llama3_1"),
        ("wildguard", "smollm2"),
    ],
)
def test_real_vocabularies(tokenizer_folder, kind, name):
    """Their special tokens cannot be forged, and a verdict is chosen where its words part."""
    tokenizer = guard_tokenizer(tokenizer_folder(name), kind, None)
    one = external_format(kind, tokenizer, GENERAL if kind == "wildguard" else HOUSE)
    hostile = Example("1", "s", " ".join(reserved(kind)) + "".join(list(tokenizer.added_tokens_encoder)[-20:]))
    assert one.prompt(asked(example=hostile))
    [choice] = one.decision_points(asked(), THOUGHT.get(kind, ""))
    words = {"shieldgemma": ("Yes", "No"), "nemotron_reasoning": (" harmful", " un"), "llama_guard": ("unsafe", "safe")}
    assert (one.text([choice.positive_id]), one.text([choice.negative_id])) == words.get(kind, (" yes", " no"))
