"""That one question, asked our way, brings the verdict lines of every label: what mining reads them from."""

import pytest
from bakery import row

from jaxguard.config.data import DataConfig
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode, questions
from jaxguard.data.policies import load_policy
from jaxguard.guards.formats.native import NativeFormat
from jaxguard.guards.protocol import Request
from jaxguard.mine.run import labels_of


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"response": None, "response_label": None},
        {"prompt_label": None},
        {"response_label": None, "refusal_label": "refusal"},
    ],
)
def test_a_prompt_of_mining_is_the_one_of_training(tiny_tokenizer_folder, mode, more):
    data = DataConfig(train=[{"kind": "jsonl", "path": "x"}], policy="wildguard", max_seq_len=4096)
    encoder, policy = Encoder.load(tiny_tokenizer_folder, data), load_policy("wildguard")
    example = Example(**{**row(4), "categories": (), **more})
    asked = tuple(labels_of(example, policy))
    form = NativeFormat(encoder, EvaluateConfig(ask="benchmark"))
    prompt = list(form.prompt(Request(example, asked, mode)).ids)
    trained = encoder.encode(example, mode)
    assert set(labels_of(example, policy)) <= set(questions(example, policy))
    assert prompt == trained.tokens[: len(prompt)].tolist()
    assert len(trained.tokens) - len(prompt) == trained.loss_mask.sum()
