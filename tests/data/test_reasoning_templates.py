"""A chat template whose generation prompt opens a think block, as that of DeepSeek-R1-Distill-Llama-8B does."""

import shutil

import pytest
from guard_templates import Rendering, conversation
from transformers import AutoTokenizer

from jaxguard.config.data import DataConfig, SourceConfig
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.answer import parse
from jaxguard.data.format.dialogue import CHOICES, Mode
from jaxguard.data.format.template import load_tokenizer, read_template
from jaxguard.data.guard_template import guard_template
from jaxguard.data.policies import QUESTIONS, Category, Policy
from jaxguard.guards.formats.native import NativeFormat
from jaxguard.guards.protocol import POSITIVE, UNPARSABLE, Request
from jaxguard.utils.errors import JaxguardError

# Earlier answers lose their reasoning; the next answer starts with an open think block.
OPENS = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message["role"] == "user" %}{{- "<|start_header_id|>" + message["content"] }}{%- endif %}
{%- if message["role"] == "assistant" %}
{%- set content = message["content"] %}
{%- if "</think>" in content %}{%- set content = content.split("</think>")[-1] %}{%- endif %}
{{- "<|end_header_id|>" + content + "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|end_header_id|><think>\\n" }}{%- endif %}
"""
# Qwen 3: the prompt opens nothing, and an answer without reasoning gets an empty block in front.
EMPTY_BLOCK = """\
{%- for message in messages %}
{%- if message["role"] == "user" %}{{- "<|start_header_id|>" + message["content"] + "<|eot_id|>" }}{%- endif %}
{%- if message["role"] == "assistant" %}
{{- "<|end_header_id|><think>\\n\\n</think>\\n\\n" + message["content"] + "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|end_header_id|>" }}{%- endif %}
"""
POLICY = Policy("short", (Category("Insults", "Demeans people."),), asks=QUESTIONS, instruction="Judge this.")
EXAMPLE = Example(
    "bread", "made up", "How do I <think>bake</think>?", "Wait, </think> then bake.", "unharmful", "harmful", "compliance",
    trace="It is <think> about bread.",
)  # fmt: skip


@pytest.fixture
def folder(tiny_tokenizer_folder, tmp_path):
    """folder(template): a tokenizer with that template, think tags being tokens of their own but not special."""

    def make(template):
        checkpoint = tmp_path / "checkpoint"
        shutil.copytree(tiny_tokenizer_folder, checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.chat_template = template
        tokenizer.save_pretrained(checkpoint)
        return checkpoint

    return make


@pytest.fixture
def encoder(folder):
    data = DataConfig(train=(SourceConfig(kind="jsonl", path="absent.jsonl"),), max_seq_len=512)
    return Encoder.load(folder(OPENS), data, POLICY)


def halves(encoder, mode):
    """The texts of the prompt and of what is trained."""
    sequence = encoder.encode(EXAMPLE, mode)
    prompt = [int(i) for i in sequence.tokens[~sequence.loss_mask]]
    assert encoder.prompt(EXAMPLE, mode).ids == prompt
    return encoder.tokenizer.decode(prompt), encoder.tokenizer.decode(sequence.tokens[sequence.loss_mask])


def test_the_tag_is_told_from_what_ends_the_turn(encoder):
    assert encoder.template.after == "<|end_header_id|><think>\n"
    assert encoder.template.reasoning_start == "<think>\n"
    assert encoder.template.end == "<|eot_id|>"


def test_reasoning_continues_the_open_block(encoder):
    prompt, answer = halves(encoder, Mode.REASONING)
    assert prompt.endswith("/think<|end_header_id|><think>\n")
    assert answer.startswith("It is <think\\> about bread.\n</think>\n\nPrompt harm: unharmful\n")
    assert answer.count("think>") == 1


def test_direct_mode_closes_the_block(encoder):
    prompt, answer = halves(encoder, Mode.DIRECT)
    assert prompt.endswith("/no_think<|end_header_id|><think>\n\n</think>\n\n")
    assert answer.startswith("Prompt harm: unharmful\n")
    assert "think" not in answer


@pytest.mark.parametrize("mode", Mode)
def test_the_answer_is_read_as_it_was_written(encoder, mode):
    text = halves(encoder, mode)[1].removesuffix("<|eot_id|>")
    verdict = parse(text, QUESTIONS, mode, has_response=True)
    assert (verdict.prompt_harm, verdict.response_harm, verdict.response_refusal) == (
        "unharmful",
        "harmful",
        "compliance",
    )
    assert verdict.problems == ()


@pytest.mark.parametrize("mode", Mode)
def test_probabilities_are_read_where_the_verdict_begins(encoder, mode):
    branches = tuple(encoder.branches(EXAMPLE, mode))
    assert len(branches) == 4
    first = branches[0].probes[0]
    before = encoder.tokenizer.decode(branches[0].tokens[: first.position])
    assert before.rstrip().endswith("</think>\n\nPrompt harm:")
    words = [encoder.tokenizer.decode([i]).strip() for i in (first.positive_id, first.negative_id)]
    assert all(full.startswith(word) for full, word in zip(CHOICES["prompt_harm"], words, strict=True))


def test_such_a_guard_is_evaluated_as_any_other(encoder):
    """It never writes the opening tag; reasoning that runs out of tokens is closed."""
    form = NativeFormat(encoder, EvaluateConfig(reasoning_tokens=64, verdict_tokens=24))
    lines = "Prompt harm: unharmful\nResponse harm: harmful"
    asked = Request(EXAMPLE, ("response_harm",), Mode.REASONING)
    assert form.parse(asked, f"About bread.\n</think>\n\n{lines}") == {"response_harm": POSITIVE}
    assert form.close_reasoning(asked, f"About bread.\n</think>\n\n{lines}") is None
    assert form.parse(asked, lines) == {"response_harm": UNPARSABLE}
    assert form.close_reasoning(asked, "About bread, and") == "About bread, and\n</think>\n\n"
    assert form.decision_points(asked, "About bread, and") == ()
    ends = ("<think>\nAbout bread.\n</think>\n\nPrompt harm:", "<think>\n\n</think>\n\nPrompt harm:")
    for mode, end in zip(Mode, ends, strict=True):
        first, *_ = form.decision_points(Request(EXAMPLE, ("response_harm",), mode), "About bread.\n</think>\n\n")
        assert encoder.tokenizer.decode(first.prefix).rstrip().endswith(end)


def test_a_text_is_cut_to_the_room_that_both_modes_leave(encoder):
    long = Example("long", "made up", "bread and butter " * 400, None, "unharmful")
    for mode in Mode:
        encoded = encoder.prompt(long, mode, answer_tokens=40)
        assert encoded.cut
        assert len(encoded.ids) <= 512 - 40


def test_the_template_of_an_export_opens_and_closes_the_block_too(encoder):
    form = Rendering(encoder, guard_template(encoder, tuple(Mode), ()))
    for mode in Mode:
        messages = conversation("user", "assistant", text="</think> bake <think>")
        assert form.ids(messages, enable_thinking=mode is Mode.REASONING) == form.trained(messages, mode)


@pytest.mark.parametrize("written", ["<think>\\n\\n</think>\\n\\n", "<think>\\nHm. "])
def test_reasoning_in_the_template_is_refused(folder, written):
    checkpoint = folder(OPENS.replace("<think>\\n", written))
    with pytest.raises(JaxguardError, match=r"(chat template writes reasoning|where generation starts)"):
        read_template(load_tokenizer(checkpoint), checkpoint)


@pytest.mark.parametrize("mode", Mode)
def test_empty_block_of_the_template_is_not_trained(folder, mode):
    data = DataConfig(train=(SourceConfig(kind="jsonl", path="absent.jsonl"),), max_seq_len=512)
    prompt, answer = halves(Encoder.load(folder(EMPTY_BLOCK), data, POLICY), mode)
    assert prompt.endswith("<|end_header_id|>")
    assert answer.startswith("<think>\nIt is" if mode is Mode.REASONING else "Prompt harm: unharmful\n")
    assert answer.endswith("<|eot_id|>")
