"""Thresholds at false-positive rates: chosen on some examples, they hold on others as their intervals say."""

import asyncio
import functools
import gzip
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_guard import run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom, binomtest

from jaxguard.config import load
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, LABEL, Mode
from jaxguard.data.policies import Policy
from jaxguard.data.sources import digest
from jaxguard.evaluate.run import evaluate
from jaxguard.evaluate.scores.metrics import FALSE_POSITIVE_RATES, exact_interval, rate_threshold
from jaxguard.evaluate.scores.scoring import PredictedExamples, choose_points
from jaxguard.guards.baselines import fit_baseline
from jaxguard.guards.loading import weights_digest
from jaxguard.guards.operating_points import F1, POINTS, read_points, write_points
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, UNPARSABLE, Prediction, Request

__all__ = ["run"]
ROOT = Path(__file__).parents[2]
POOL = Path(os.environ.get("JAXGUARD_POOL", ROOT.parent / "shared" / "data"))
POLICY, SETTINGS = Policy("bread", rules="No bread."), EvaluateConfig()
RATES = [str(rate) for rate in FALSE_POSITIVE_RATES]


def validation(labels, probabilities, question="prompt_harm", mode=Mode.DIRECT):
    """Predictions of validation examples; NaN is a missing probability, of an unparsable verdict."""
    words = CHOICES[question]
    examples = [
        Example(str(i), "bread", "a", "b", **{LABEL[question]: words[0 if positive else 1]})
        for i, positive in enumerate(labels)
    ]
    predictions = [
        Prediction(
            example.id,
            {question: (UNPARSABLE if np.isnan(p) else POSITIVE if p > 0.5 else NEGATIVE,)},
            {question: None if np.isnan(p) else float(p)},
            unscored={question: int(np.isnan(p))},
        )
        for example, p in zip(examples, probabilities, strict=True)
    ]
    return PredictedExamples("ours", mode, "validation", question, examples, None, predictions, "float32")


def chosen(labels, probabilities, **how):
    return choose_points(
        validation(np.asarray(labels, bool), np.asarray(probabilities, float), **how), POLICY, SETTINGS
    )


def above(points, probabilities, name):
    return np.array([points.calibrated(float(p)) > points.threshold(name) for p in probabilities])


def test_what_they_were_chosen_on():
    labels = np.arange(40) % 2 == 0
    held = validation(labels, np.linspace(0.9, 0.1, 40))
    points = choose_points(held, POLICY, SETTINGS)
    assert (points.positives, points.negatives, points.precision) == (20, 20, "float32")
    assert points.examples_sha256 == digest(held.examples)
    assert (points.asked.policy, points.asked.policy_digest) == (POLICY.name, POLICY.digest)
    assert (points.asked.generations, points.asked.temperature) == (None, None)
    reasoning = chosen(labels, np.linspace(0.9, 0.1, 40), mode=Mode.REASONING).asked
    assert (reasoning.generations, reasoning.temperature) == (SETTINGS.generations, SETTINGS.temperature)
    assert list(points.points) == [F1, *RATES]


def test_by_hand():
    """One of twenty negatives may be above 5 %: the threshold is the second; two of four positives are above it."""
    probabilities = [*np.linspace(0.05, 0.6, 20), 0.9, 0.58, 0.3, 0.2]
    points = chosen([0] * 20 + [1] * 4, probabilities)
    point = points.points["0.05"]
    assert point.threshold == points.calibrated(np.linspace(0.05, 0.6, 20)[18])
    assert (point.false_positive_rate.value, point.recall.value) == (0.05, 0.5)
    exact = binomtest(1, 20).proportion_ci(0.95, "exact")
    assert (point.false_positive_rate.low, point.false_positive_rate.high) == pytest.approx((exact.low, exact.high))
    assert points.points["0.01"].threshold is points.points["0.001"].threshold is None
    best = points.points[F1]
    assert (best.false_positive_rate.low, best.recall.high) == (None, None)


@settings(max_examples=12)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from((0.0, 0.2, 0.5, 0.9, 1.0, np.nan))), min_size=1, max_size=60))
def test_no_rate_is_higher_than_it_says_whatever_the_ties(rows):
    labels, probabilities = np.array([one for one, _ in rows]), np.array([p for _, p in rows])
    points = chosen(labels, probabilities)
    if np.isnan(probabilities).all():
        assert points is None
        return
    negatives = probabilities[~labels]
    for rate, name in zip(FALSE_POSITIVE_RATES, RATES, strict=True):
        point = points.points[name]
        assert point.threshold is None or len(negatives) >= 1 / rate
        if point.threshold is not None:
            known = above(points, negatives[~np.isnan(negatives)], name).sum() + np.isnan(negatives).sum()
            share = point.false_positive_rate
            assert share.value == known / len(negatives) <= rate
            assert share.low <= share.value <= share.high


def test_one_class_only():
    harmless = chosen([0] * 40, np.linspace(0.1, 0.9, 40))
    assert (harmless.platt, harmless.threshold(F1), harmless.points["0.05"].recall) == (None, None, None)
    assert harmless.points["0.05"].threshold == np.linspace(0.1, 0.9, 40)[37]
    harmful = chosen([1] * 40, np.linspace(0.1, 0.9, 40))
    assert (harmful.platt, harmful.points[F1].recall.value) == (None, 1)
    assert [harmful.threshold(name) for name in RATES] == [None] * 3


def test_missing_probabilities_fail_closed():
    """They are harmful at any threshold: two of forty may be, three are too many; a missing refusal is none."""
    labels, scores = [0] * 40 + [1] * 10, np.linspace(0.1, 0.9, 50)
    for missing, rate in ((2, 0.05), (3, None)):
        scores[:missing] = np.nan
        share = chosen(labels, scores).points["0.05"].false_positive_rate
        assert (share and share.value) == rate
    assert chosen(labels, scores, question="response_refusal").points["0.05"].false_positive_rate.value == 0.05


def test_intervals_cover_the_true_rate():
    """The lowest draws of a uniform distribution, and of one with ties, whose true rates above a threshold are known."""
    random, interval, n, rate = np.random.default_rng(0), functools.cache(exact_interval), 200, 0.05
    for steps in (None, 50):
        covered, repetitions = 0, 1000
        for _ in range(repetitions):
            drawn = random.random(n)
            drawn = drawn if steps is None else np.ceil(drawn * steps) / steps
            threshold, allowed = rate_threshold(np.zeros(n, bool), drawn, rate)
            low, high = interval(int((drawn > threshold).sum()), n, allowed)
            covered += low <= 1 - threshold <= high
        assert binomtest(covered, repetitions, 0.95, "less").pvalue > 0.01


def test_a_threshold_of_one_half_of_the_pool_holds_its_rate_on_the_other():
    """Given k of n above, the other half's count is beta-binomial: the rate is distributed as Beta(k + 1, n - k)."""
    if not (POOL / "valid.jsonl.gz").is_file():
        pytest.skip(f"no {POOL}/valid.jsonl.gz; JAXGUARD_POOL names the folder")

    def read(stem, every):
        lines = gzip.decompress((POOL / f"{stem}.jsonl.gz").read_bytes()).splitlines()
        rows = [row for row in map(json.loads, lines[::every]) if row["prompt_label"]]
        return [Example(row["id"], "pool", row["prompt"], prompt_label=row["prompt_label"]) for row in rows]

    async def predict(requests):
        return [each async for each in fit_baseline("tfidf", read("train", 12), 0)(requests)]

    requests = [Request(example, ("prompt_harm",), Mode.DIRECT) for example in read("valid", 1)]
    predictions = {each.example_id: each for each in asyncio.run(predict(requests))}
    examples = [requests[i].example for i in np.random.default_rng(0).permutation(len(requests))]
    halves = [
        PredictedExamples("words", Mode.DIRECT, "v", "prompt_harm", half, None, [predictions[e.id] for e in half])
        for half in (examples[::2], examples[1::2])
    ]
    for first, second in (halves, halves[::-1]):
        points = choose_points(first, POLICY, SETTINGS)
        others = second.probabilities[~second.labels]
        assert points.threshold("0.05") is not None
        for name in RATES:
            point = points.points[name]
            if point.threshold is None:
                assert points.negatives < 1 / float(name)
                continue
            n, k = points.negatives, round(point.false_positive_rate.value * points.negatives)
            low, high = betabinom.interval(0.95, len(others), k + 1, n - k)
            assert low <= above(points, others, name).sum() <= high


def test_an_evaluation_keeps_them_and_the_next_one_takes_them(run, tmp_path, monkeypatch):
    """The guard's probabilities are its examples' texts; the second evaluation has no validation examples."""
    export, weights = run / "export", b"some"
    (export / "model.safetensors").write_bytes(weights)
    rows = [
        {"id": str(i), "prompt": f"0.{i:02}", "prompt_label": "harmful" if i > 60 or i == 9 else "unharmful"}
        for i in range(1, 100)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @asynccontextmanager
    async def open_guard(*_):
        async def predict(requests):
            for request in requests:
                p = float(request.example.prompt)
                yield Prediction(request.example.id, {"prompt_harm": (p > 0.5,)}, {"prompt_harm": p})

        yield predict

    def evaluated(**settings):
        tree = yaml.safe_load((export / "config.yaml").read_text())
        tree["data"]["policy"] = str(export / "policy.yaml")
        benchmarks = [{"name": "own_prompts", "path": str(tmp_path / "rows.jsonl")}]
        guards = [{"name": "ours", "checkpoint": str(run)}]
        return evaluate(
            load(tree | {"evaluate": {"guards": guards, "benchmarks": benchmarks, "resamples": 2, **settings}})
        )

    monkeypatch.setattr("jaxguard.evaluate.run.open_guard", open_guard)
    monkeypatch.chdir(tmp_path)
    first = evaluated(validation=[{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}]).cells[0].thresholded
    assert (export / POINTS).read_bytes() == (tmp_path / "runs/run/evaluate/predictions/ours" / POINTS).read_bytes()
    [points] = read_points(export, weights_digest(export))[0].values()
    assert (points.threshold(F1), points.platt, points.negatives) == (first.threshold, first.platt, 59)
    assert points.points["0.05"].false_positive_rate.value == 2 / 59
    assert evaluated().cells[0].thresholded == first
    write_points(export, "other", [points])
    assert evaluated().cells[0].thresholded is None
