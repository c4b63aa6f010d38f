"""Verdict probabilities without sampling equal those of every answer written out."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxguard.config import load
from jaxguard.data.format.dialogue import CHOICES
from jaxguard.data.prepare import prepare
from jaxguard.models.decoder import Decoder
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.sharding import make_mesh
from jaxguard.models.spec import read_spec
from jaxguard.train.step import build_program
from jaxguard.train.validation import Mode, Validation, ValidationPrediction, summary
from jaxguard.utils.errors import JaxguardError


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory, tiny_files):
    """A program, its weights, held-out examples in both modes, and what validation says of them."""
    config = load(str(tiny_files(tmp_path_factory.mktemp("validation"))))
    spec = read_spec(tiny_checkpoint)
    weights = read_weights(tiny_checkpoint, spec)
    weights = {k: x if "norm" in k else 8 * x for k, x in weights.items()}  # sharper opinions than a fresh model's
    data = prepare(config, tiny_checkpoint)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = build_program(config, spec, mesh, steps=1)
    validation = Validation(data.validation, batch_size=4, max_seq_len=config.data.max_seq_len, row_multiple=1)
    return spec, weights, data.validation, *validation.run(program, weights)


@partial(jax.jit, static_argnums=0)
def all_logprobs(spec, weights, tokens):
    decoder = Decoder(spec, weights)
    return jax.nn.log_softmax(decoder.logits(decoder(tokens[None]))[0])


def branch_probability(spec, weights, branch) -> tuple[float, float]:
    """Sum of log-probabilities of the targets, and the probability of the branch's answers, word against word."""
    tokens = np.pad(branch.tokens, (0, 512 - len(branch.tokens)))
    logprobs = np.asarray(all_logprobs(spec, weights, tokens), np.float64)
    branch_answers, probability = dict(branch.answers), 1.0
    for probe in branch.probes:
        positive, negative = np.exp(logprobs[probe.position - 1, [probe.positive_id, probe.negative_id]])
        chosen = positive if branch_answers[probe.question] == CHOICES[probe.question][0] else negative
        probability *= chosen / (positive + negative)
    targets = np.flatnonzero(branch.loss_mask)
    return float(logprobs[targets - 1, branch.tokens[targets]].sum()), float(probability)


def test_probabilities_are_marginals_over_the_earlier_answers(run):
    spec, weights, held, _, predictions = run
    result = {(p.example_id, p.mode, p.question): p for p in predictions}
    example, mode, branches = next(h for h in held if len(h[2]) == 2)
    (_, first), (_, second) = (branch_probability(spec, weights, b) for b in branches)
    # The two branches differ in the first answer and share the last one.
    last = branches[0].probes[-1].question
    same = first + second
    positive = dict(branches[0].answers)[last] == CHOICES[last][0]
    assert result[example.id, mode, last].probability == pytest.approx(same if positive else 1 - same, abs=1e-5)
    assert result[example.id, mode, last].positive == positive
    assert 0.01 < result[example.id, mode, last].probability < 0.99


def test_loss_is_the_mean_over_the_targets_of_the_labelled_answers(run):
    spec, weights, held, metrics, _ = run
    total = sum(branch_probability(spec, weights, branches[0])[0] for _, _, branches in held)
    targets = sum(branches[0].loss_mask.sum() for _, _, branches in held)
    assert metrics["validation/loss"] == pytest.approx(-total / targets, rel=1e-5)


def test_both_modes_are_reported(run):
    _, _, held, metrics, predictions = run
    assert {mode for _, mode, _ in held} == set(Mode)
    for mode in Mode:
        assert 0 <= metrics[f"validation/{mode}/harm_f1"] <= 1
    asked = {(p.example_id, p.mode, p.question) for p in predictions}
    assert len(asked) == len(predictions) == sum(len(branches[0].probes) for _, _, branches in held)


def test_f1_and_auprc():
    def predictions(*pairs):
        return [ValidationPrediction(str(i), Mode.DIRECT, "prompt_harm", y, p) for i, (y, p) in enumerate(pairs)]

    result = summary(predictions((True, 0.9), (True, 0.2), (False, 0.6), (False, 0.1)))
    assert result["prompt_harm_f1"] == result["harm_f1"] == pytest.approx(0.5)
    assert result["prompt_harm_auprc"] == pytest.approx((1 + 2 / 3) / 2)
    one_class = summary(predictions((True, 0.9), (True, 0.2)))
    assert "prompt_harm_auprc" not in one_class
    assert one_class["harm_f1"] == pytest.approx(2 / 3)
    assert not summary([])
    apart = summary(
        predictions((True, 0.9), (True, 0.2), (True, 0.9), (False, 0.4)), {"0": True, "1": True, "2": False, "3": None}
    )
    assert apart["adversarial_harm_f1"] == pytest.approx(2 / 3)
    assert apart["vanilla_harm_f1"] == 1
    assert apart["harm_f1"] == pytest.approx(0.8)
    for labels in itertools.product((True, False), repeat=3):
        perfect = summary(predictions(*((y, float(y)) for y in labels)))
        assert perfect["harm_f1"] == float(any(labels))


def test_a_probability_that_is_not_a_number_is_an_error(run, tiny_config):
    spec, weights, held, *_ = run
    config = load(str(tiny_config))
    program = build_program(config, spec, make_mesh(config.mesh, jax.devices()[:1]), steps=1)
    program = replace(program, score=lambda weights, batch, ids: np.full(ids.shape, np.nan))
    validation = Validation(held[:1], batch_size=4, max_seq_len=512, row_multiple=1)
    with pytest.raises(JaxguardError, match=rf"'{held[0][0].id}'.*not finite"):
        validation.run(program, weights)
