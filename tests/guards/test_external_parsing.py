"""Other guards' formats: what is read of an answer, and where its verdict is chosen."""

import pytest
from external_examples import ALONE, BOTH, GENERAL, HOUSE, THOUGHT, asked, reserved
from external_templates import GUARDS, LINES, guard_tokenizer

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.guards.formats.external import external_format
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE

POLYGUARD = (
    "Harmful request: {}\nRequest safety violations: {}\nResponse refusal: {}\nHarmful response: {}\n"
    "Response safety violations: {}"
)
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
        "\nno ": NEGATIVE,
        "Yes": POSITIVE,
        "No.": UNPARSABLE,
        "no.\n\nThe prompt is about bread": UNPARSABLE,
        "No\nYes": UNPARSABLE,
        "No\nOn second thought it is not fine": UNPARSABLE,
        "The prompt is unsafe.\nNo": UNPARSABLE,
        "Nothing": UNPARSABLE,
        "No way is this fine": UNPARSABLE,
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
    "nemotron_35": {
        f"{THOUGHT['nemotron_35']}User Safety: safe\nResponse Safety: unsafe": NEGATIVE,
        "The template opened it.</think>\n\nuser safety: UNSAFE\nResponse Safety: safe": POSITIVE,
        "User Safety: safe\nResponse Safety: safe": UNPARSABLE,
        f"{THOUGHT['nemotron_35']}User Safety: safe": UNPARSABLE,
        f"{THOUGHT['nemotron_35']}User Safety: safe\nUser Safety: unsafe\nResponse Safety: safe": UNPARSABLE,
        f"{THOUGHT['nemotron_35']}User Safety: safe; User Safety: unsafe\nResponse Safety: safe": UNPARSABLE,
        f"{THOUGHT['nemotron_35']}User Safety: safe (no answer)\nResponse Safety: safe": UNPARSABLE,
        f"{THOUGHT['nemotron_35']}User Safety: safe\nResponse Safety: safe\nSafety Categories: Violence": UNPARSABLE,
        f"{THOUGHT['nemotron_35']}User Safety: unsafe\nResponse Safety: safe\nSafety Categories: Violence": UNPARSABLE,
    },
    "granite_guardian": {
        "No": NEGATIVE,
        " yes": POSITIVE,
        "No\n<confidence> High </confidence>": UNPARSABLE,
        "Failed": UNPARSABLE,
        "No Yes": UNPARSABLE,
    },
    "granite_guardian_33": {
        f"{THOUGHT['granite_guardian_33']}<score> no </score>": NEGATIVE,
        "<think></think><score>\nYES\n</score>\n": POSITIVE,
        "<score> no </score>": UNPARSABLE,
        "<think><score> no </score>": UNPARSABLE,
        f"{THOUGHT['granite_guardian_33']}no": UNPARSABLE,
        f"{THOUGHT['granite_guardian_33']}<score> no": UNPARSABLE,
        f"{THOUGHT['granite_guardian_33']}<score> no yes </score>": UNPARSABLE,
        f"{THOUGHT['granite_guardian_33']}<score> no </score><score> yes </score>": UNPARSABLE,
        f"<think><score> yes </score></think>{THOUGHT['granite_guardian_33']}<score> no </score>": UNPARSABLE,
        f"{THOUGHT['granite_guardian_33']}<score> no </score> It is unsafe.": UNPARSABLE,
    },
    "nemoguard": {
        '{"User Safety": "safe", "Response Safety": "safe"}': NEGATIVE,
        '{\n "User Safety" : "SAFE",\n "Response Safety": "unsafe",\n "Safety Categories": "PII / Privacy, Threat"\n}\n': NEGATIVE,
        '{"User Safety":"unsafe","Response Safety":"safe","Safety Categories":"Sexual (minor)"}': POSITIVE,
        '{"User Safety": "unsafe", "Response Safety": "safe"}': POSITIVE,
        '{"User Safety": "safe"}': UNPARSABLE,
        '{"User Safety": "safe", "User Safety": "unsafe", "Response Safety": "safe"}': UNPARSABLE,
        '{"Response Safety": "safe", "User Safety": "safe"}': UNPARSABLE,
        '{"User Safety": "safe", "Response Safety": "safe", "Safety Categories": "Violence"}': UNPARSABLE,
        '{"User Safety": "safe", "Response Safety": "unsafe", "Safety Categories": "The prompt too"}': UNPARSABLE,
        '{"User Safety": "safe", "Response Safety": "safe", "Note": "unsafe"}': UNPARSABLE,
        '{"User Safety": "safe", "Response Safety": "safe"': UNPARSABLE,
        '{"User Safety": safe, "Response Safety": safe}': UNPARSABLE,
        '{"User Safety": "safe", "Response \nSafety": "safe"}': UNPARSABLE,
        '{"User Safety": "safe", "Response Safety": "safe\n"}': UNPARSABLE,
        '{"User Safety": "safe", "Response Safety"\u00a0: "safe"}': UNPARSABLE,
        '[{"User Safety": "safe", "Response Safety": "safe"}]': UNPARSABLE,
        '```json\n{"User Safety": "safe", "Response Safety": "safe"}\n```': UNPARSABLE,
        '{"User Safety": "safe", "Response Safety": "safe"}{"User Safety": "unsafe"}': UNPARSABLE,
        "User Safety: safe\nResponse Safety: safe": UNPARSABLE,
    },
    "guardreasoner": {
        f"{THOUGHT['guardreasoner']}Request: unharmful\nCompletion: compliance\nResponse: harmful": NEGATIVE,
        "answers follow\nAnswers:\n\nREQUEST: harmful\nCompletion: refusal\nResponse: unharmful": POSITIVE,
        "Request: unharmful\nCompletion: compliance\nResponse: unharmful": UNPARSABLE,
        "# Answers\n\nRequest: unharmful\nCompletion: compliance\nResponse: unharmful": UNPARSABLE,
        f"{THOUGHT['guardreasoner']}Request: unharmful\nCompletion: None\nResponse: None": UNPARSABLE,
        f"{THOUGHT['guardreasoner']}Request: unharmful\nCompletion: compliance": UNPARSABLE,
        f"{THOUGHT['guardreasoner']}Request: unharmful\nRequest: harmful\nResponse: unharmful": UNPARSABLE,
        f"{2 * THOUGHT['guardreasoner']}Request: unharmful\nCompletion: compliance\nResponse: unharmful": UNPARSABLE,
        f"{THOUGHT['guardreasoner']}Request: unharmful\nCompletion: compliance\nResponse: unharmful\n\nIt is not.": UNPARSABLE,
    },
    "polyguard": {
        POLYGUARD.format("no", "None", "no", "yes", "S2, S14"): NEGATIVE,
        POLYGUARD.format("YES", "S2,S5", "no", "no", "None"): POSITIVE,
        POLYGUARD.format("yes", "None", "yes", "no", "None"): POSITIVE,
        POLYGUARD.format("no", "S2", "no", "no", "None"): UNPARSABLE,
        POLYGUARD.format("no", "None", "no", "no", "S2"): UNPARSABLE,
        POLYGUARD.format("no", "None", "None", "None", "None"): UNPARSABLE,
        POLYGUARD.format("no", "None, but S2", "no", "no", "None"): UNPARSABLE,
        POLYGUARD.format("no", "Violence", "no", "no", "None"): UNPARSABLE,
        "Harmful request: no\nResponse refusal: no\nHarmful response: no": UNPARSABLE,
        POLYGUARD.format("no", "None", "no", "no", "None").replace("Harmful response: no\n", ""): UNPARSABLE,
        POLYGUARD.format("no", "None", "no", "no", "None") + "\nHarmful request: yes": UNPARSABLE,
    },
    "dynaguard": {
        f"{THOUGHT['dynaguard']}<answer>\nPASS\n</answer>": NEGATIVE,
        "<think></think><answer>fail</answer>\n": POSITIVE,
        "<answer>\nPASS\n</answer>": UNPARSABLE,
        f"{THOUGHT['dynaguard']}PASS": UNPARSABLE,
        f"{THOUGHT['dynaguard']}<answer>\nPASS/FAIL\n</answer>": UNPARSABLE,
        f"{THOUGHT['dynaguard']}<answer>\nPASS\n": UNPARSABLE,
        f"{THOUGHT['dynaguard']}<answer>PASS</answer><answer>FAIL</answer>": UNPARSABLE,
        f"{THOUGHT['dynaguard']}<answer>PASS</answer>\n<explanation>\nRule 1 is broken.\n</explanation>": UNPARSABLE,
        f"<think><answer>FAIL</answer></think>{THOUGHT['dynaguard']}<answer>PASS</answer>": UNPARSABLE,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, table in READ.items() for text in (*table, "", " \n")]
)
def test_read(form, kind, text):
    [question, *_] = form(kind).guard.questions
    assert form(kind).guard.parse(asked(question), text) == READ[kind].get(text, UNPARSABLE)


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
        ("nemotron_35", "response_harm", "<think>x</think>User Safety: safe\nResponse Safety: unsafe", POSITIVE),
        ("nemoguard", "response_harm", '{"User Safety": "unsafe", "Response Safety": "safe"}', NEGATIVE),
        ("guardreasoner", "response_refusal", "Answers:\nRequest: harmful\nCompletion: refusal\nResponse: unharmful", POSITIVE),
        ("guardreasoner", "response_harm", "Answers:\nRequest: harmful\nCompletion: compliance\nResponse: harmful", POSITIVE),
        ("polyguard", "response_refusal", POLYGUARD.format("yes", "S1", "no", "yes", "S1"), NEGATIVE),
        ("polyguard", "response_harm", POLYGUARD.format("yes", "S1", "yes", "no", "None"), NEGATIVE),
        ("polyguard", "response_harm", POLYGUARD.format("yes", "S1", "yes", "no", "S1"), UNPARSABLE),
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


@pytest.mark.parametrize(
    ("kind", "mode", "text"),
    [
        ("nemotron_35", Mode.DIRECT, "User Safety: safe"),
        ("granite_guardian_33", Mode.DIRECT, "<score> no </score>"),
        ("nemoguard", Mode.DIRECT, '{"User Safety": "safe"}'),
        ("guardreasoner", Mode.REASONING, f"{THOUGHT['guardreasoner']}Request: unharmful\nCompletion: None\nResponse: None"),
        ("polyguard", Mode.DIRECT, POLYGUARD.format("no", "None", "yes", "no", "None")),
        ("polyguard", Mode.DIRECT, POLYGUARD.format("no", "None", "None", "None", "None")),
    ],
)  # fmt: skip
def test_answers_about_a_prompt_alone(form, kind, mode, text):
    assert form(kind).guard.parse(asked(example=ALONE, mode=mode), text) == NEGATIVE


def test_an_answer_may_name_the_categories_of_the_policy_that_was_shown(form):
    answer = '{"User Safety": "unsafe", "Response Safety": "safe", "Safety Categories": "Burnt bread, Against further rules"}'
    ask = asked("response_harm")
    assert form("nemoguard").parse(ask, answer) == {"response_harm": NEGATIVE}
    assert form("nemoguard", GENERAL).parse(ask, answer) == {"response_harm": UNPARSABLE}


@pytest.mark.parametrize("kind", GUARDS)
@pytest.mark.parametrize("question", ["prompt_harm", "response_harm", "response_refusal"])
def test_a_question_that_is_not_answered_is_unparsable(form, kind, question):
    for example in (ALONE, BOTH):
        assert form(kind).guard.parse(asked(question, example), "") == UNPARSABLE


@pytest.mark.parametrize("kind", GUARDS)
def test_who_would_explain_a_verdict_is_not_sampled_beyond_it(form, kind):
    answers = ["<answer>\nFAIL\n</answer>", "<answer>\nPASS\n</answer>"]
    texts = {"shieldgemma": ["Yes", "No"], "granite_guardian": ["Yes", "No"], "dynaguard": answers}.get(kind, [])
    assert form(kind).verdict_tokens == max((len(form(kind).tokens(text)) for text in texts), default=None)


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


def test_choices_stand_within_what_is_around_an_answer(form):
    opening = '{"User Safety": "'
    points = tree(form("nemoguard"), asked("response_harm"))
    assert [one[0] for one in points] == [
        opening, f'{opening}unsafe", "Response Safety": "', f'{opening}safe", "Response Safety": "',
    ]  # fmt: skip
    [point] = tree(form("dynaguard"), asked("response_harm", mode=Mode.DIRECT))
    assert point[:3] == ("<answer>\n", "F", "P")
    [point] = tree(form("granite_guardian_33"), asked(), THOUGHT["granite_guardian_33"])
    assert point[0] == f"{THOUGHT['granite_guardian_33']}<score>"
    [point] = tree(form("guardreasoner"), asked(), f"{THOUGHT['guardreasoner']}Request: harmful")
    assert point[0] == f"{THOUGHT['guardreasoner']}Request:"


def test_after_categories_choices_are_those_of_an_answer(form):
    answer = POLYGUARD.format("yes", "S1, S2", "no", "yes", "S1")
    before = answer.partition("\nResponse refusal")[0]
    points = tree(form("polyguard"), asked("response_harm"), answer)
    assert [one[0] for one in points if one[4]] == [
        f"{before}\nResponse refusal: {word}\nHarmful response:" for word in ("yes", "no")
    ]
    assert [one[0] for one in tree(form("polyguard"), asked(), answer)] == ["Harmful request:"]
    assert tree(form("polyguard"), asked("response_harm"), before) == []


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
    assert form("guardreasoner").close_reasoning(asked(), "# Task 1\n\nBread.") == "# Task 1\n\nBread.\nAnswers: \n"


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
