"""The cascade of two modes: certified thresholds of `auto`, and what reasoning is worth on benchmarks."""

import itertools
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest
import yaml
from fake_guard import run
from scipy.stats import binomtest

from jaxguard.config import load
from jaxguard.config.evaluate import AutoConfig
from jaxguard.evaluate.report.page import report
from jaxguard.evaluate.report.published import read_published
from jaxguard.evaluate.run import evaluate
from jaxguard.evaluate.scores.cascade import certify, escalated
from jaxguard.evaluate.scores.escalation import Modes
from jaxguard.evaluate.scores.metrics import count_votes
from jaxguard.evaluate.scores.results import read_results
from jaxguard.guards.loading import weights_digest
from jaxguard.guards.operating_points import read_points
from jaxguard.guards.protocol import Prediction
from jaxguard.report import page_html, page_markdown

__all__ = ["run"]

BOTH = AutoConfig(miss_rate=0.1, alarm_rate=0.1)


@pytest.mark.parametrize("steps", [None, 50])
def test_rates_are_within_their_limits_in_95_percent_of_draws(steps):
    """Scores of both classes are uniform, or have ties: the true miss rate up to a threshold is the threshold."""
    random, labels, repetitions, wrong = np.random.default_rng(0), np.arange(300) < 120, 500, np.zeros(2, int)
    for _ in range(repetitions):
        drawn = random.random(300)
        drawn = drawn if steps is None else np.ceil(drawn * steps) / steps
        auto = certify(labels, drawn, None, BOTH)
        below = 1 - auto.blocks if steps is None else 1 - auto.blocks + 1 / steps
        wrong += (auto.passes or 0) > BOTH.miss_rate + 1e-9, below > BOTH.alarm_rate + 1e-9
    for count in wrong:
        assert binomtest(int(count), repetitions, 0.05, "greater").pvalue > 0.01


@pytest.mark.parametrize(("harmful", "certified"), [(299, True), (298, False), (12, False), (0, False)])
def test_zero_misses_in_n_certify_no_better_than_their_arithmetic(harmful, certified):
    """All harmful examples have a higher probability than the others."""
    labels = np.arange(harmful + 400) < harmful
    scores = np.where(labels, 0.9, 0.1)
    auto = certify(labels, scores, 0.5, AutoConfig(miss_rate=0.01, alarm_rate=0.01))
    assert auto.miss_rate == pytest.approx(1 - 0.05 ** (1 / harmful) if harmful else 1)
    assert auto.passes == (0.1 if certified else None)
    assert auto.blocks == (0.9 if harmful else None)
    assert escalated(scores, auto.passes, auto.blocks).sum() == (0 if certified else 400)


def test_by_hand():
    """With one miss of 60 harmful examples the bound is 7.7 %, with two 10.1 %; direct mode's threshold ends both."""
    labels = np.arange(120) < 60
    scores = np.concatenate([np.linspace(0.205, 0.795, 60), np.linspace(0.0, 0.59, 60)])
    auto = certify(labels, scores, None, AutoConfig(miss_rate=0.1, alarm_rate=0.05))
    assert (scores[labels] <= auto.passes).sum() == 1
    assert (auto.passes, auto.blocks) == (pytest.approx(0.21), pytest.approx(0.595))
    assert auto.miss_rate == pytest.approx(binomtest(1, 60).proportion_ci(0.9, "exact").high)
    assert auto.alarm_rate == pytest.approx(1 - 0.05 ** (1 / 60))
    early = certify(labels, scores, 0.1, BOTH)
    assert (early.passes, early.blocks > 0.5) == (0.1, True)
    assert certify(labels, scores, 0.7, BOTH).blocks == 0.7


def test_what_has_no_probability_is_neither_passed_nor_blocked():
    labels = np.arange(600) < 300
    scores = np.where(labels, 0.9, 0.1)
    scores[[0, 599]] = np.nan
    auto = certify(labels, scores, 0.5, BOTH)
    assert (auto.passes, auto.blocks) == (0.1, 0.9)
    assert np.flatnonzero(escalated(scores, auto.passes, auto.blocks)).tolist() == [0, 599]
    assert [auto.trusts(p, p == 0.9) for p in (0.1, 0.9)] == [True, True]
    assert [auto.trusts(p, positive) for p, positive in ((0.1, True), (0.9, False), (0.5, True), (None, True))] == [
        False
    ] * 4


def test_the_share_of_traffic_is_reweighted_to_its_prevalence():
    """A tenth of the harmful and nine tenths of the unharmful examples are in between."""
    labels = np.arange(2000) < 1000
    scores = np.where(labels, 0.9, 0.5)
    scores[:100], scores[1000:1100] = 0.5, 0.1
    shares = {p: certify(labels, scores, None, AutoConfig(prevalence=p, budget=0.5)) for p in (0.0, 0.05, 0.5, 1.0)}
    assert {p: auto.escalated for p, auto in shares.items()} == pytest.approx({0: 0.9, 0.05: 0.86, 0.5: 0.5, 1: 0.1})
    assert ["budget" in str(auto) for auto in shares.values()] == [True, True, False, False]


def test_random_escalation_has_the_expectation_over_all_choices():
    random, labels = np.random.default_rng(0), np.array([1, 1, 1, 0, 0, 0], bool)
    first, second = random.integers(0, 2, (6, 1)), random.integers(0, 2, (6, 2))
    votes = [count_votes(labels, each.astype(np.int8)) for each in (first, second)]
    modes = Modes(*votes, np.ones(6), np.full(6, 9.0), 0.25)
    for share in (0.0, 0.3, 1.0):
        masks = map(np.array, itertools.product((False, True), repeat=6))
        chances = ((share ** mask.sum() * (1 - share) ** (~mask).sum(), modes.f1(mask)) for mask in masks)
        assert modes.random_f1(share, np.ones(6)) == pytest.approx(sum(p * f1 for p, f1 in chances))
    assert modes.costs(0.5) == pytest.approx((0.75, 1 / 9 + 0.5))
    assert modes.costs(np.ones(6, bool)) == (1, 1)
    assert modes.costs(np.arange(6) < 2) == pytest.approx((0.25 + 1 / 3, 1 / 9 + 1 / 3))


@pytest.fixture
def evaluated(run, tmp_path, monkeypatch):
    """evaluated(right, **settings): an evaluation in both modes, in which reasoning is right where `right` says so.

    The direct probability is the example's text: right below 0.3 and above 0.7, and a coin's between.
    """
    (run / "export" / "model.safetensors").write_bytes(b"some")
    random, rows = np.random.default_rng(0), []
    for i in range(240):
        p = (
            random.uniform(0.3, 0.7)
            if i % 3 == 0
            else random.choice((random.uniform(0.0, 0.3), random.uniform(0.7, 1)))
        )
        harmful = random.random() < 0.5 if i % 3 == 0 else p > 0.5
        rows.append({"id": str(i), "prompt": f"{p:.5f}", "prompt_label": "harmful" if harmful else "unharmful"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)

    def evaluated(right, **settings):
        @asynccontextmanager
        async def open_guard(*_):
            async def predict(requests):
                for request in requests:
                    example, direct = request.example, request.mode == "direct"
                    p = float(example.prompt)
                    truth = example.prompt_label == "harmful"
                    verdicts = (p > 0.5,) if direct else tuple(truth == right(p, int(example.id) + i) for i in range(2))
                    chance = p if direct else float(np.mean(verdicts))
                    cost = {"completion_tokens": 4 if direct else 80, "seconds": 0.1 if direct else 0.8}
                    yield Prediction(example.id, {"prompt_harm": verdicts}, {"prompt_harm": chance}, **cost)

            yield predict

        monkeypatch.setattr("jaxguard.evaluate.run.open_guard", open_guard)
        tree = yaml.safe_load((run / "export" / "config.yaml").read_text())
        tree["data"]["policy"] = str(run / "export" / "policy.yaml")
        guards = [{"name": f"g{len(settings)}", "checkpoint": str(run), "modes": ["reasoning", "direct"]}]
        own = {"guards": guards, "benchmarks": [{"name": "own_prompts", "path": str(tmp_path / "rows.jsonl")}]}
        return evaluate(load(tree | {"evaluate": {**own, "resamples": 20, "generations": 2, **settings}}))

    evaluated.source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    return evaluated


def test_a_cascade_that_reasons_where_it_helps_dominates(run, evaluated):
    """Reasoning is right in between, and half the time elsewhere."""
    limits = {"miss_rate": 0.05, "alarm_rate": 0.05}
    evaluation = evaluated(lambda p, i: 0.3 < p < 0.7 or i % 2 == 0, validation=[evaluated.source], auto=limits)
    [cascade] = evaluation.cascades
    [points] = [each for each in read_points(run / "export", weights_digest(run / "export"))[0].values() if each.auto]
    assert (cascade.verdict, cascade.certified, points.asked.mode) == ("dominates", str(points.auto), "direct")
    assert points.auto.worth == "dominates", "as on the benchmark, which has the same examples"
    arms = cascade.arms
    assert list(arms) == ["direct", "reasoning", "cascade", "value", "random"]
    assert arms["cascade"].f1.value > max(arms[name].f1.value for name in ("direct", "reasoning", "random")) + 0.05
    assert arms["cascade"].escalated == arms["random"].escalated == arms["value"].escalated
    assert arms["cascade"].seconds == pytest.approx(arms["direct"].seconds + arms["cascade"].escalated)
    assert arms["direct"].tokens == pytest.approx(0.05)
    assert (arms["reasoning"].seconds, arms["cascade"].less) == (1, None)
    difference = arms["random"].less
    assert difference.low < arms["cascade"].f1.value - arms["random"].f1.value < difference.high
    assert {name: (curve[0], curve[-1]) for name, curve in cascade.curve.items()} == dict.fromkeys(
        ("cascade", "value", "random"), pytest.approx((arms["direct"].f1.value, arms["reasoning"].f1.value))
    )
    assert read_results(evaluation.folder / "results.json") == evaluation
    page = report(evaluation, read_published())
    assert f"g2, own_prompts: {cascade.certified[:12]}" in page_markdown(page)
    assert 'id="cascade' in page_html(page)


@pytest.mark.slow
def test_what_is_no_better_is_inside_the_noise_or_worse(run, evaluated):
    """Without thresholds for auto, the budget is spent on what is nearest to a half."""
    [cascade] = evaluated(lambda p, i: (p > 0.5) == (i % 2 == 0)).cascades
    assert (cascade.certified, cascade.arms["cascade"].escalated) == ("", pytest.approx(0.2))
    assert cascade.verdict != "dominates"
    limits = {"miss_rate": 0.05, "alarm_rate": 0.05}
    [cascade] = evaluated(lambda p, i: False, seed=1, validation=[evaluated.source], auto=limits).cascades
    [points] = [each for each in read_points(run / "export", weights_digest(run / "export"))[0].values() if each.auto]
    assert (cascade.verdict, points.auto.worth) == ("worse", "worse")
    assert "it is worse than" in cascade.certified
