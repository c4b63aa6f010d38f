"""The fixtures keep their promises."""

from pathlib import Path

import jax
import pytest
from transformers import AutoTokenizer

from jaxguard.models.spec import read_spec


def test_eight_fake_devices():
    assert jax.device_count() == 8


def test_tiny_tokenizer_renders_a_chat(tiny_tokenizer_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": " hi "}], tokenize=False, add_generation_prompt=True, date_string="1 Jan"
    )
    assert text.endswith("user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (512, 0, 1, 4)
    assert ids.count(0) == 1
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_both_spellings_are_one_spec(family, request, tmp_path: Path):
    write = request.getfixturevalue(f"write_{family}_config")
    specs = []
    for spelling in (4, 5):
        folder = tmp_path / str(spelling)
        folder.mkdir()
        specs.append(read_spec(write(folder, spelling=spelling)))
    assert specs[0] == specs[1]
    assert specs[0].family == family
