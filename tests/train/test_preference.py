"""Preferences: the objectives' definitions, rows of pairs, the reference, and a whole run."""

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jaxguard.config.train import MeshConfig, ObjectiveConfig
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import Order, Row, assemble, bucketed, pack
from jaxguard.models.compute import Compute
from jaxguard.models.sharding import batch_sharding, make_mesh, shard_batch
from jaxguard.train import reference
from jaxguard.train.__main__ import main
from jaxguard.train.logging import read_metrics
from jaxguard.train.objectives import Preference
from jaxguard.train.step import logprobs, loss_and_gradient
from jaxguard.utils.errors import JaxguardError

ROW = 128
_gradient = jax.jit(loss_and_gradient, static_argnames=("objective", "spec", "compute", "accumulation", "loss_chunk"))
_logprobs = jax.jit(logprobs, static_argnames=("spec", "compute", "loss_chunk"))


def preferences(count: int, seed: int = 0) -> list[EncodedExample]:
    """Pairs of two answers of 2 to 9 tokens to prompts of which every second one is the one before it."""
    random = np.random.default_rng(seed)
    policy, out, prompt = random.integers(0, 512, 9), [], np.zeros(0)
    for i in range(count):
        prompt = prompt if i % 2 else random.integers(0, 512, int(random.integers(3, 20)))

        def answer(i: int = i, prompt: np.ndarray = prompt) -> EncodedExample:
            tokens = np.int32([*policy, *prompt, *random.integers(0, 512, int(random.integers(2, 10)))])
            target = np.arange(len(tokens)) >= 9 + len(prompt)
            reference = random.normal(-6, 1, target.sum()).astype(np.float32)
            weight = 1 + 0.2 * (i % 3 - 1)
            return EncodedExample(
                str(i), Mode.DIRECT, tokens, target, (), (), False, weight=weight, reference=reference
            )

        out.append(dataclasses.replace(answer(), rejected=answer()))
    return out


def batch_of(examples, row_multiple: int = 1):
    rows = pack(examples, ROW, row_multiple)
    return assemble(rows, bucketed(rows, ROW, row_multiple))


def loss_of(settings: ObjectiveConfig, spec, weights, batch, accumulation: int = 1):
    compute = Compute(attention="block_sparse", query_chunk=16)
    kwargs = {"spec": spec, "compute": compute, "accumulation": accumulation, "loss_chunk": 64}
    return _gradient(weights, batch, Preference(settings), **kwargs)


def defined(settings: ObjectiveConfig, chosen, rejected, example: EncodedExample) -> float:
    """The loss of a pair as the papers write it, from the log-probabilities of its tokens."""
    gains = chosen - example.reference, rejected - example.rejected.reference
    if settings.kind == "ipo":
        loss = (gains[0].mean() - gains[1].mean() - 1 / (2 * settings.beta)) ** 2
    else:
        margin = settings.beta * (gains[0].sum() - gains[1].sum())
        share = settings.label_smoothing
        loss = (1 - share) * math.log1p(math.exp(-margin)) + share * math.log1p(math.exp(margin))
    return example.weight * loss - settings.sft_weight * chosen.mean()


POOL = preferences(31)
SETTINGS = [
    ObjectiveConfig(kind="dpo", beta=0.3),
    ObjectiveConfig(kind="dpo", beta=0.01, sft_weight=2.0, label_smoothing=0.1),
    ObjectiveConfig(kind="ipo", beta=0.2),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_is_the_mean_of_the_pairs_losses(spec, weights, settings):
    examples = preferences(7)

    def scored(example: EncodedExample) -> np.ndarray:
        alone = batch_of([dataclasses.replace(example, rejected=None)])
        kwargs = {"spec": spec, "compute": Compute(), "loss_chunk": 64}
        found = _logprobs(weights, jax.tree.map(jnp.asarray, alone), alone.target_ids_BM[..., None], **kwargs)
        return np.asarray(found)[0, : example.loss_mask.sum(), 0].astype(np.float64)

    expected = [defined(settings, scored(each), scored(each.rejected), each) for each in examples]
    loss, _, logged = loss_of(settings, spec, weights, batch_of(examples))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)
    assert set(logged) == {f"preference/{name}" for name in ("accuracy", "margin", "chosen_gain", "rejected_gain")}
    assert 0 <= float(logged["preference/accuracy"]) <= 1


@pytest.mark.parametrize("settings", SETTINGS[1:2])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_packing_and_accumulation_change_no_gradient(spec, weights, settings, accumulation):
    examples = preferences(8)
    apart = [row for each in examples for row in pack([each], ROW, 1, share=False)]
    expected = loss_of(settings, spec, weights, assemble(apart, bucketed(apart, ROW, 1)))
    batch = batch_of(examples, accumulation)
    assert batch.tokens_BT.shape[0] < 8
    for got, want in zip(
        *map(jax.tree.leaves, (loss_of(settings, spec, weights, batch, accumulation), expected)), strict=True
    ):
        assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-6)


def test_eight_devices_compute_the_same(spec, weights):
    examples, settings = preferences(16), SETTINGS[1]
    batch = batch_of(examples, 8)
    expected = loss_of(settings, spec, weights, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices())
    with jax.set_mesh(mesh):
        found = loss_of(settings, spec, weights, shard_batch(batch, batch_sharding(mesh)))
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(np.asarray(got) - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-6)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 4), st.booleans())
def test_a_pair_is_in_one_row(seeds, multiple, share):
    """Also where an example is in the batch twice, as at the end of an epoch."""
    examples = [POOL[seed] for seed in seeds]
    rows = pack(examples, ROW, multiple, share)
    batch = assemble(rows, bucketed(rows, ROW, multiple))
    assert (batch.pair_weights_BP > 0).sum() == len(examples)
    assert sorted(batch.pair_weights_BP[batch.pair_weights_BP > 0]) == pytest.approx(sorted(e.weight for e in examples))
    pairs = []
    for row in range(len(rows)):
        for pair in range(1, int(batch.target_pairs_BM[row].max()) + 1):
            chosen, rejected = (
                batch.target_ids_BM[row, batch.target_pairs_BM[row] == sign * pair].tolist() for sign in (1, -1)
            )
            pairs.append((chosen, rejected))
    assert sorted(pairs) == sorted(
        (e.tokens[e.loss_mask].tolist(), e.rejected.tokens[e.rejected.loss_mask].tolist()) for e in examples
    )
    assert batch.target_weights_BM.sum() == pytest.approx(len(examples))


def test_a_pair_that_is_longer_than_a_row_is_named():
    [example] = preferences(1)
    longest = max(len(example.tokens), len(example.rejected.tokens))
    assert Row(Order([example]), (0, 1)).tokens > longest
    with pytest.raises(JaxguardError, match=r"example '0': its two answers take more than data\.max_seq_len"):
        pack([example], longest, 1)


@pytest.fixture
def preferring(tiny_files, tmp_path):
    """A run's config whose training examples have an answer to reject."""
    path = tiny_files(tmp_path, train={"objective": {"kind": "dpo", "sft_weight": 0.1}}, mesh={"fsdp": 4, "tensor": 2})
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"mode": "direct", "validation": config["data"]["train"]}
    config["data"]["train"] = [{"kind": "jsonl", "path": str(tmp_path / "pairs.jsonl")}]
    path.write_text(yaml.safe_dump(config))
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    words = {"harmful": "unharmful", "unharmful": "harmful"}
    pairs = [
        row
        | {"id": f"p{i}", "prompt": f"{i} {row['prompt']}", "rejected": f"Prompt harm: {words[row['prompt_label']]}"}
        for i, row in enumerate(rows)
        if row.get("prompt_label")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def run(path: Path, *overrides: str) -> list[dict]:
    assert main(["--config", str(path), *overrides]) == 0
    records = read_metrics(path.parent / "runs/tiny/metrics.jsonl")
    return [record for record in records if "loss" in record]


def test_a_run_begins_at_its_reference_and_learns_the_preference(preferring):
    records = run(preferring, "train.objective.sft_weight=0")
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # nothing is preferred to anything yet
    assert records[0]["preference/chosen_gain"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["loss"] < 0.5
    assert records[-1]["preference/accuracy"] == 1
    assert (preferring.parent / "runs/tiny/export/model.safetensors").is_file()


def test_a_resumed_run_keeps_the_reference_that_it_began_with(preferring, caplog, monkeypatch):
    expected = run(preferring)
    folder = preferring.parent / "runs/tiny"
    scored = (folder / "reference").read_bytes()
    calls = []
    score = reference.score_targets
    monkeypatch.setattr(reference, "score_targets", lambda *args: calls.append(1) or score(*args))

    def resumed(contents: bytes | None) -> list[dict]:
        """The last two steps again."""
        for step in folder.glob("checkpoints/[0-9]*"):
            if int(step.name) > 10:
                shutil.rmtree(step)
        (folder / "reference").unlink()
        if contents is not None:
            (folder / "reference").write_bytes(contents)
        return run(preferring)

    assert resumed(scored)[-1] | {"speed": 0} == expected[-1] | {"speed": 0}
    assert not calls
    with caplog.at_level(logging.WARNING):
        assert resumed(scored[:-3])[-1] | {"speed": 0} == expected[-1] | {"speed": 0}
    assert "is damaged" in caplog.text
    assert resumed(None)[-1] | {"speed": 0} == expected[-1] | {"speed": 0}
    assert len(calls) == 2
    assert (folder / "reference").read_bytes() == scored


def test_without_an_answer_to_reject_there_is_no_preference(tiny_files, tmp_path, capsys):
    path = tiny_files(tmp_path, train={"objective": {"kind": "ipo"}}, mesh={"fsdp": 8})
    assert main(["--config", str(path)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "train.objective.kind=ipo needs examples with a field 'rejected'" in error


def test_supervised_training_ignores_rejected_answers(preferring):
    records = run(preferring, "train.objective.kind=sft", "train.max_steps=2")
    assert "preference/accuracy" not in records[0]
    assert not (preferring.parent / "runs/tiny/reference").exists()
