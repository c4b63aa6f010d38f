"""The twenty novel policies and their items: labelled soundly, and not to be solved from the surface."""

import difflib
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from benchmark_examples import HARM, ROOT, SAFE
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline

from jaxguard.config.data import SourceConfig
from jaxguard.data.benchmarks.loading import load_benchmark
from jaxguard.data.policies import POLICY_FOLDER, Policy, load_policy, policy_for
from jaxguard.data.sources import load_examples

NOVEL = ROOT / POLICY_FOLDER / "novel"
ITEMS = [json.loads(line) for line in (NOVEL / "items.jsonl").read_text(encoding="utf-8").splitlines()]
POLICIES = sorted(path.stem for path in NOVEL.glob("*.yaml"))
DEFAULT = Policy("default", rules="x")


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.chdir(ROOT)


def of(policy):
    return [item for item in ITEMS if item["policy"] == f"novel/{policy}"]


def test_there_are_twenty_and_each_has_items():
    assert len(POLICIES) == 20
    assert {item["policy"] for item in ITEMS} == {f"novel/{name}" for name in POLICIES}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_defines_allows_and_is_called_as_its_file(name):
    policy = load_policy(f"novel/{name}")
    assert policy.name == f"novel/{name}"
    assert policy.asks == ("prompt_harm", "response_harm")
    assert [len(c.description.split()) >= 12 and c.description.endswith(".") for c in policy.categories] == [True]
    assert len(policy.allowed) >= 3
    assert "declines" in policy.rules


def test_no_category_is_one_of_the_training_sets():
    trained = {c.name.casefold() for name in ("wildguard", "aegis2") for c in load_policy(name).categories}
    novel = [c.name.casefold() for name in POLICIES for c in load_policy(f"novel/{name}").categories]
    assert len(set(novel)) == 20
    assert not trained & set(novel)
    closest = {name: difflib.get_close_matches(name, trained, cutoff=0.8) for name in novel}
    assert not any(closest.values()), closest


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_broken_by_half_of_its_prompts(name):
    items = of(name)
    assert Counter(item["prompt_label"] for item in items) == {HARM: 6, SAFE: 6}
    answered = Counter(item["response_label"] for item in items if item["response"] is not None)
    assert min(answered[HARM], answered[SAFE]) >= 2
    assert sum(item["near_miss"] for item in items) >= 2


def test_items_are_examples_that_find_their_policy():
    examples = load_examples(SourceConfig(kind="jsonl", path=str(NOVEL / "items.jsonl")))
    assert len({example.id for example in examples}) == len(ITEMS) == 240
    for example in examples:
        assert policy_for(example, DEFAULT).name == example.policy
        assert example.id.startswith(f"{Path(example.policy).name}-")
        assert (example.response is None) == (example.response_label is None)


def test_only_harmless_prompts_are_near_misses():
    assert {item["prompt_label"] for item in ITEMS if item["near_miss"]} == {SAFE}


def test_twins_are_judged_one_way_and_the_other():
    by_text = defaultdict(list)
    for item in ITEMS:
        by_text[item["prompt"]].append(item)
    for same in by_text.values():
        assert all(item["twin"] == (len(same) == 2) for item in same)
        if len(same) > 1:
            assert sorted(item["prompt_label"] for item in same) == [HARM, SAFE]
    assert sum(len(same) == 2 for same in by_text.values()) == 18


@pytest.mark.slow
def test_no_two_texts_are_nearly_the_same():
    for field in ("prompt", "response"):
        texts = sorted({item[field] for item in ITEMS if item[field]})
        for a, b in itertools.combinations(texts, 2):
            matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
            assert min(matcher.real_quick_ratio(), matcher.quick_ratio()) < 0.75 or matcher.ratio() < 0.6, (a, b)


def test_texts_have_no_template():
    openings = Counter(" ".join(item["prompt"].split()[:3]) for item in ITEMS if not item["twin"])
    assert openings.most_common(1)[0][1] <= 4


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_length_tells_nothing(field):
    items = [item for item in ITEMS if item[field]]
    harmful = np.array([item[f"{field}_label"] == HARM for item in items])
    assert abs(roc_auc_score(harmful, [len(item[field].split()) for item in items]) - 0.5) < 0.1


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_words_tell_nothing_about_a_policy_that_was_not_trained_on(field):
    # Twins are left out: a classifier that has seen one under another policy would be led astray by it.
    items = [item for item in ITEMS if item[field] and not item["twin"]]
    harmful = np.array([item[f"{field}_label"] == HARM for item in items])
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, class_weight="balanced"))
    result = cross_val_predict(
        model,
        [item[field] for item in items],
        harmful,
        groups=[item["policy"] for item in items],
        cv=LeaveOneGroupOut(),
        method="predict_proba",
    )
    assert roc_auc_score(harmful, result[:, 1]) < 0.65


def test_the_benchmarks_hold_them(caplog):
    prompts, responses = load_benchmark("novel_policies"), load_benchmark("novel_policies_response")
    assert not caplog.messages
    assert (prompts.counts["total"], responses.counts["total"]) == (240, 123)
    assert len(prompts.slices["policy"]) == len(responses.slices["policy"]) == 20
    assert len(prompts.slices["near miss"]["yes"]) == 79
    assert len(prompts.slices["twin"]["yes"]) == 36
    assert all(e.response is None for e in prompts.examples)
    labels = {item["id"]: item for item in ITEMS}
    for example in (*prompts.examples, *responses.examples):
        assert policy_for(example, DEFAULT).name == labels[example.id]["policy"]
    assert all(e.prompt_label == labels[e.id]["prompt_label"] for e in prompts.examples)
    assert all(e.response_label == labels[e.id]["response_label"] for e in responses.examples)
