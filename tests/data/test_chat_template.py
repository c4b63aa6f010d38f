"""Chat templates are programs of others: rendered as transformers renders them, and stopped where they do not end."""

import json
import resource
import shutil
from pathlib import Path

import pytest
from external_examples import HOUSE
from external_templates import guard_tokenizer
from hostile_templates import HOSTILE

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.format.template import TEMPLATE_KWARGS, load_tokenizer, read_template, render_chat
from jaxguard.guards.formats.external import external_format
from jaxguard.guards.protocol import Request
from jaxguard.utils.errors import JaxguardError

SECONDS = 10
TURN = [{"role": "user", "content": "a <b> 'c' \"d\" & é\n\n  {{ e }}"}]
CHAT = [*TURN, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize("name", ["loops", "folded", "written"])  # the others in tests/fuzz
def test_a_template_that_does_not_end_is_refused(tiny_tokenizer_folder: Path, tmp_path: Path, name: str):
    """Also where only a text of somebody else sets it off: no such text is ever rendered."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = HOSTILE[name] + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    tokenizer = load_tokenizer(folder)
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(JaxguardError, match="checkpoint: its chat template"):
        read_template(tokenizer, folder)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < SECONDS


def test_an_external_guards_template_is_bounded_too(tiny_tokenizer_folder: Path):
    tokenizer = guard_tokenizer(tiny_tokenizer_folder, "llama_guard")
    own, waits = tokenizer.chat_template, "{% if 'bread' in messages[0].content %}" + HOSTILE["loops"] + "{% endif %}"
    tokenizer.chat_template = HOSTILE["folded"] + own
    with pytest.raises(JaxguardError, match=r"llama_guard.*chat template"):
        external_format("llama_guard", tokenizer, HOUSE)
    tokenizer.chat_template = waits + own
    form = external_format("llama_guard", tokenizer, HOUSE)
    prompt = form.prompt(Request(Example("1", "s", "How do I bake bread?"), ("prompt_harm",), Mode.DIRECT))
    assert "User: How do I bake bread?\n" in form.text(prompt.ids)


def test_texts_are_put_in_place_of_their_placeholders_at_once(tiny_tokenizer_folder: Path):
    """A text that spells a placeholder is not filled itself."""
    form = external_format("llama_guard", guard_tokenizer(tiny_tokenizer_folder, "llama_guard"), HOUSE)
    texts = ["jaxguardtext1x bread", "jaxguardtext0x"]
    prompt = form.prompt(Request(Example("1", "s", *texts), ("response_harm",), Mode.DIRECT))
    assert "User: jaxguardtext1x bread\n\nAgent: jaxguardtext0x\n" in form.text(prompt.ids)


FEATURES = """\
{%- for message in messages %}{% generation %}{{ message | tojson }}{% set x = 1 %}{% endgeneration %}
{%- if loop.last %}{% break %}{% endif %}{% endfor %}{{ tools }} {{ bos_token }} {{ date_string }}
    {%- if x is defined %}{{ x }}{% endif %}
{{ namespace(a=1).a }} {{ strftime_now("%Y") | length }}{% if add_generation_prompt %} go{% endif %}
"""


@pytest.mark.parametrize("name", ["tiny", "features", "smollm2", "llama3_1", "gemma3", "qwen3"])
def test_templates_render_as_transformers_renders_them(encoder_of, tiny_tokenizer_folder: Path, name: str):
    if name == "features":
        tokenizer = load_tokenizer(tiny_tokenizer_folder)
        tokenizer.chat_template = FEATURES
    else:
        tokenizer = encoder_of(name).tokenizer
    for messages, generate in ((TURN, True), (CHAT, False)):
        options = {"add_generation_prompt": generate, **TEMPLATE_KWARGS}
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert render_chat(tokenizer, messages, **options) == wanted


def test_a_template_that_raises_says_why(tiny_tokenizer_folder: Path):
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    tokenizer.chat_template = "{{ raise_exception('bread first') }}"
    with pytest.raises(JaxguardError, match="bread first"):
        render_chat(tokenizer, TURN)
