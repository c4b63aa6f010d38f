"""Guards by config: which modes, which weights, which server."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from faulty_sglang import serve

from jaxguard.config import load
from jaxguard.config.evaluate import EvaluateConfig, GuardConfig
from jaxguard.data import policies
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.data.prepare import select
from jaxguard.guards.loading import cache_key, checkpoint_of, examples_key, fingerprint, modes_of, open_guard
from jaxguard.guards.protocol import Request
from jaxguard.utils.errors import JaxguardError

BREAD = Example("bread", "made up", "How do I bake bread?")


@pytest.fixture
def config(tiny_config):
    return load(str(tiny_config))


def known_as(guard, config, **settings):
    return asyncio.run(fingerprint(guard, config, EvaluateConfig(**settings)))


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
    with pytest.raises(JaxguardError, match="direct"):
        modes_of(GuardConfig(format="llama_guard", modes=("reasoning",)), config)


def test_a_runs_folder_stands_for_its_export(config, tiny_checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/export").symlink_to(tiny_checkpoint)
    guard = GuardConfig(checkpoint=str(tmp_path / "run"))
    assert checkpoint_of(guard, config) == str(tmp_path / "run/export")
    assert (
        known_as(guard, config)["weights"] == known_as(GuardConfig(checkpoint=str(tiny_checkpoint)), config)["weights"]
    )


def test_other_weights_are_another_guard(config, tmp_path):
    def weights(content):
        (tmp_path / "model.safetensors").write_bytes(content)
        return known_as(GuardConfig(checkpoint=str(tmp_path)), config)["weights"]

    first = weights(b"a" * 4 * 2**20)
    assert weights(b"a" * 2 * 2**20 + b"b" + b"a" * (2 * 2**20 - 1)) != first


@pytest.mark.parametrize("swaps", [True, False])
def test_a_swapped_guard_answers_with_its_own_weights(config, tiny_checkpoint, swaps):
    async def run():
        async with serve(lambda i: "", swaps=swaps) as server:
            guard = GuardConfig(checkpoint=str(tiny_checkpoint), endpoint=server.url, swap=True, model="student")
            async with open_guard(guard, config, EvaluateConfig(generations=1)) as predict:
                answers = [answer async for answer in predict([Request(BREAD, ("prompt_harm",), Mode.DIRECT)])]
            return server, answers

    if not swaps:
        with pytest.raises(JaxguardError, match="'default'"):
            asyncio.run(run())
        return
    server, (answer,) = asyncio.run(run())
    assert "/update_weights_from_disk" in server.paths
    assert known_as(GuardConfig(checkpoint=str(tiny_checkpoint)), config)["weights"].startswith(server.version)
    assert answer.probabilities["prompt_harm"] == pytest.approx(1 / (1 + 2.718281828 ** (-1.5)))


def test_a_model_that_jax_does_not_have_is_to_be_served(config, tiny_checkpoint, tmp_path):
    """WildGuard is a Mistral, for example."""
    folder = tmp_path / "wildguard"
    shutil.copytree(tiny_checkpoint, folder)
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**tree, "model_type": "mistral"}), encoding="utf-8")

    async def run():
        async with open_guard(GuardConfig(checkpoint=str(folder)), config, EvaluateConfig()):
            pass

    with pytest.raises(JaxguardError, match=r"'mistral'.*evaluate\.backend=sglang.*endpoint"):
        asyncio.run(run())


def test_a_swap_needs_a_server():
    with pytest.raises(ValueError, match=r"swap.*endpoint"):
        GuardConfig(swap=True)


def test_who_computes_is_part_of_a_guards_answers(config, tiny_checkpoint):
    guard = GuardConfig(checkpoint=str(tiny_checkpoint))
    found = [
        known_as(guard, config),
        known_as(guard, config, backend="sglang"),
        known_as(guard, config, backend="sglang", server={"arguments": ["--dtype=float32"]}),
    ]
    assert all(found.count(one) == 1 for one in found)


@pytest.mark.parametrize(("platform", "computed_in"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_the_precision_is_part_of_a_guards_answers(config, tiny_checkpoint, monkeypatch, platform, computed_in):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    rounded = config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": "bfloat16"})})
    assert known_as(GuardConfig(checkpoint=str(tiny_checkpoint)), rounded)["compute_dtype"] == computed_in


def test_a_server_is_known_by_what_it_serves(config, tiny_checkpoint):
    async def run(**says):
        async with serve(lambda i: "") as server:
            for name, value in says.items():
                setattr(server, name, value)
            guard = GuardConfig(checkpoint=str(tiny_checkpoint), endpoint=server.url)
            return await fingerprint(guard, config, EvaluateConfig())

    first, moved = (asyncio.run(run(model_path=str(tiny_checkpoint))) for _ in range(2))
    assert first == moved
    assert first["weights"] is not None
    assert asyncio.run(run(model_path="/elsewhere")) != first
    assert asyncio.run(run(model_path=str(tiny_checkpoint), version="2")) != first
    assert asyncio.run(run())["models"] == ["guard"]


def test_a_server_whose_weights_are_swapped_meanwhile_is_noticed(config, tiny_checkpoint):
    async def run():
        async with serve(lambda i: "") as server:
            server.model_path = str(tiny_checkpoint)
            guard = GuardConfig(checkpoint=str(tiny_checkpoint), endpoint=server.url)
            async with open_guard(guard, config, EvaluateConfig(generations=1)) as predict:
                server.version = "another"
                return [answer async for answer in predict([Request(BREAD, ("prompt_harm",), Mode.DIRECT)])]

    with pytest.raises(JaxguardError, match="'another'"):
        asyncio.run(run())


def test_floors_are_known_by_their_data_and_seed(config):
    baseline = GuardConfig(format="tfidf")
    first = known_as(baseline, config)
    assert known_as(baseline, config.model_copy(update={"seed": config.seed + 1})) != first
    path = Path(str(config.data.train[0].path))
    path.write_text(path.read_text(encoding="utf-8").replace("tell me", "say", 1), encoding="utf-8")
    assert known_as(baseline, config) != first


def test_floors_see_what_the_guard_trains_on(config):
    """Its subset, without the held-out examples: the majority's probability is the share of harmful prompts among them."""

    def share(**data):
        changed = config.model_copy(update={"data": config.data.model_copy(update=data)})

        async def ask():
            async with open_guard(GuardConfig(format="majority"), changed, EvaluateConfig()) as predict:
                return [answer async for answer in predict([Request(BREAD, ("prompt_harm",), Mode.DIRECT)])]

        labels = [example.prompt_label for example, _ in select(changed).train]
        (prediction,) = asyncio.run(ask())
        assert prediction.probabilities["prompt_harm"] == labels.count("harmful") / len(labels)
        return len(labels), known_as(GuardConfig(format="tfidf"), changed)["fitted_to"]

    known = [share(**data) for data in ({}, {"subset": 9}, {"subset": 9, "subset_seed": 1}, {"validation_size": 1})]
    assert [count for count, _ in known] == [40, 9, 9, 47]
    assert len({digest for _, digest in known}) == 4


def test_an_edited_policy_is_another_one(tmp_path, monkeypatch):
    """Also one that examples name only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/policies").mkdir(parents=True)
    named = tmp_path / "configs/policies/bakery.yaml"

    def head(rules):
        named.write_text(f"name: bakery\nrules: {rules}\n", encoding="utf-8")
        policies._cached.cache_clear()
        return examples_key(
            [replace(BREAD, policy="bakery"), replace(BREAD, policy="No bread.")], Policy("run", rules="x")
        )

    assert head("No rye.") == head("No rye.")
    assert head("No rye.") != head("No wheat.")
    policies._cached.cache_clear()
    assert examples_key([BREAD], Policy("run", rules="x")) != examples_key([BREAD], Policy("run", rules="y"))


def test_sampling_decides_and_room_in_training_does_not(config, tiny_checkpoint):
    guard = GuardConfig(checkpoint=str(tiny_checkpoint))

    def head(config=config, **settings):
        return asyncio.run(cache_key(guard, config, EvaluateConfig(**settings)))

    assert head(seed=1) != head()
    assert head(unparsable="wrong") == head()
    shorter = config.model_copy(update={"data": config.data.model_copy(update={"max_seq_len": 300})})
    assert head(shorter) == head()
