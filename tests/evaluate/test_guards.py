"""Guards by config: which modes, which weights, which server."""

import asyncio

import pytest
from faulty_sglang import serve

from jaxguard.config import load
from jaxguard.data.dialogue import Mode
from jaxguard.data.examples import Example
from jaxguard.errors import JaxguardError
from jaxguard.evaluate.guards import checkpoint_of, identity, modes_of, open_guard
from jaxguard.evaluate.judging import Ask
from jaxguard.evaluate_sections import EvaluateConfig, GuardConfig

BREAD = Example("bread", "made up", "How do I bake bread?")


@pytest.fixture
def config(tiny_config):
    return load(str(tiny_config))


@pytest.mark.parametrize(
    ("guard", "modes"),
    [
        ({}, (Mode.REASONING, Mode.DIRECT)),
        ({"modes": ["direct"]}, (Mode.DIRECT,)),
        ({"format": "tfidf"}, (Mode.DIRECT,)),
        ({"format": "gpt_oss_safeguard"}, (Mode.REASONING,)),
    ],
)
def test_modes(config, guard, modes):
    assert modes_of(GuardConfig(**guard), config) == modes


def test_a_format_has_its_own_mode(config):
    with pytest.raises(JaxguardError, match="answers in direct mode only"):
        modes_of(GuardConfig(format="llama_guard", modes=("reasoning",)), config)


def test_a_runs_folder_stands_for_its_export(config, tiny_checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/export").symlink_to(tiny_checkpoint)
    guard = GuardConfig(checkpoint=str(tmp_path / "run"))
    assert checkpoint_of(guard, config) == str(tmp_path / "run/export")
    assert (
        identity(guard, config)["weights"] == identity(GuardConfig(checkpoint=str(tiny_checkpoint)), config)["weights"]
    )


def test_other_weights_are_another_guard(config, tmp_path):
    def weights(content):
        (tmp_path / "model.safetensors").write_bytes(content)
        return identity(GuardConfig(checkpoint=str(tmp_path)), config)["weights"]

    first = weights(b"a" * 4 * 2**20)
    assert weights(b"a" * 2 * 2**20 + b"b" + b"a" * (2 * 2**20 - 1)) != first


@pytest.mark.parametrize("swaps", [True, False])
def test_a_swapped_guard_answers_with_its_own_weights(config, tiny_checkpoint, swaps):
    async def run():
        async with serve(lambda i: "", swaps=swaps) as server:
            guard = GuardConfig(checkpoint=str(tiny_checkpoint), endpoint=server.url, swap=True, model="student")
            async with open_guard(guard, config, EvaluateConfig(generations=1)) as judge:
                answers = [answer async for answer in judge([Ask(BREAD, "prompt_harm", Mode.DIRECT)])]
            return server, answers

    if not swaps:
        with pytest.raises(JaxguardError, match="answered with weights 'default'"):
            asyncio.run(run())
        return
    server, (answer,) = asyncio.run(run())
    assert "/update_weights_from_disk" in server.paths
    assert identity(GuardConfig(checkpoint=str(tiny_checkpoint)), config)["weights"].startswith(server.version)
    assert answer.probability == pytest.approx(1 / (1 + 2.718281828 ** (-1.5)))


def test_a_swap_needs_a_server():
    with pytest.raises(ValueError, match="swap needs an endpoint"):
        GuardConfig(swap=True)
