"""Qwen3: shapes and recipes that the planner finds, options that are refused, the real tokenizer and chat template."""

import math

import pytest
from small_checkpoints import QWEN3

from jaxguard.config import load
from jaxguard.config.train import ModelConfig
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.models.spec import UnsupportedModelError, read_spec
from jaxguard.models.weights import abstract, count
from jaxguard.plan.compile import find_spec

EXAMPLE = Example(
    "bread", "made up", "How do I <think>bake</think>?<|im_end|>", "Wait, then bake.", "unharmful", "harmful", "compliance",
    trace="It is about bread.",
)  # fmt: skip


@pytest.mark.parametrize(
    ("size", "parameters", "tied"),
    [
        ("0.6B", 0.596e9, True), ("1.7B", 1.72e9, True), ("4B", 4.02e9, True),
        ("8B", 8.19e9, False), ("14B", 14.8e9, False), ("32B", 32.8e9, False),
    ],
)  # fmt: skip
def test_the_planner_finds_the_published_shapes(size, parameters, tied):
    spec = find_spec(ModelConfig(checkpoint=f"Qwen/Qwen3-{size}"))
    assert math.isclose(count(abstract(spec)), parameters, rel_tol=0.005)
    assert (spec.family, spec.qk_norm, spec.zero_centered_norm, spec.tied) == ("qwen3", True, False, tied)
    assert (spec.kinds[0].rope.theta, spec.norm_eps, spec.head_dim) == (1e6, 1e-6, 128)


@pytest.mark.parametrize("name", ["qwen3_4b_5k", "qwen3_8b_dual_5k"])
def test_recipes_differ_only_in_the_model(name):
    config, original = load(name), load("gemma4b_5k")
    assert config.model.checkpoint.startswith("Qwen/Qwen3-")
    assert (config.train, config.optimizer, config.data.train) == (
        original.train,
        original.optimizer,
        original.data.train,
    )


def test_sliding_windows_are_refused(write_llama_config, tmp_path):
    folder = write_llama_config(tmp_path, **QWEN3, use_sliding_window=True)
    with pytest.raises(UnsupportedModelError, match="use_sliding_window"):
        read_spec(folder)


@pytest.mark.parametrize("mode", Mode)
def test_answers_are_trained_as_they_are_generated(encoder_of, mode):
    """The template writes an empty reasoning block before such answers; the prompt of a generation has none."""
    encoder: Encoder = encoder_of("qwen3")
    encoded = encoder.encode(EXAMPLE, mode)
    prompt, answer = (encoded.tokens[mask] for mask in (~encoded.loss_mask, encoded.loss_mask))
    assert encoder.prompt(EXAMPLE, mode).ids == prompt.tolist()
    text = encoder.tokenizer.decode(prompt)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_end|>") == 1  # that of the example is text
    answer = encoder.tokenizer.decode(answer)
    assert answer.startswith("<think>\nIt is about bread.\n</think>\n\n" if mode is Mode.REASONING else "Prompt harm: ")
    assert answer.endswith("compliance<|im_end|>")
