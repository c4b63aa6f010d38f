"""Subsets, hold-out, modes, and what becomes of every row."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxguard.config import load
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.prepare import assign_modes, prepare, select, subset
from jaxguard.utils.errors import JaxguardError

FIRST_OF_SEED_0 = ["e96", "e55", "e7", "e15", "e36"]
POLICY = "name: short\nrules: Be kind.\n"


def make(count, trace=True, prefix="e"):
    return [
        Example(
            f"{prefix}{i}",
            "test",
            f"question {prefix} {i}",
            prompt_label="harmful" if i % 3 else "unharmful",
            trace=f"because of {i}" if trace else None,
        )
        for i in range(count)
    ]


@pytest.fixture
def configure(tmp_path):
    """configure(train, validation, **data): a config over files with these examples."""
    policy = tmp_path / "short.yaml"
    policy.write_text(POLICY, encoding="utf-8")

    def write(examples, name):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(e.to_json())}\n" for e in examples), encoding="utf-8")
        return {"kind": "jsonl", "path": str(path)}

    def configure(train, validation=(), seed=0, batch_size=2, **data):
        data = {"policy": str(policy), "validation_size": 0, "max_seq_len": 512, **data}
        data["train"] = [write(train, "train.jsonl")]
        data["validation"] = [write(validation, "held.jsonl")] if validation else []
        model = {"checkpoint": "unused"}
        return load({"name": "t", "seed": seed, "model": model, "data": data, "train": {"batch_size": batch_size}})

    return configure


def ids(chosen):
    return [example.id for example, _ in chosen]


# --- subsets ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.lists(st.integers(0, 60), min_size=2, max_size=6), st.floats(0, 1))
def test_subsets_of_one_seed_are_nested(seed, sizes, balance):
    examples = make(20) + make(40, prefix="other")
    nested = [{e.id for e in subset(examples, size, seed, balance)} for size in sorted(sizes)]
    assert [len(s) for s in nested] == sorted(sizes)
    assert all(small <= large for small, large in itertools.pairwise(nested))


@given(st.permutations(make(12)))
def test_a_subset_does_not_depend_on_the_order_of_the_file(examples):
    assert subset(examples, 5, 3) == subset(make(12), 5, 3)


@pytest.mark.parametrize(("balance", "expected"), [(0.0, 10), (0.5, 25), (1.0, 50)])
def test_balance_evens_out_the_sources(balance, expected):
    small, large = (replace(make(1, prefix=source)[0], source=source) for source in ("small", "large"))
    examples = [replace(large, id=f"large{i}") for i in range(9000)] + [
        replace(small, id=f"small{i}") for i in range(1000)
    ]
    drawn = subset(examples, 100, 0, balance) + subset(examples, 100, 1, balance)
    assert sum(e.source == "small" for e in drawn) / 2 == pytest.approx(expected, abs=10)


def test_subsets_are_the_same_on_every_machine():
    assert [e.id for e in subset(make(100), 5, 0)] == FIRST_OF_SEED_0
    assert [e.id for e in subset(make(100), 5, 1)] != FIRST_OF_SEED_0


def test_a_subset_samples_evenly():
    counts = Counter(e.id for seed in range(400) for e in subset(make(20), 5, seed))
    assert all(60 < counts[f"e{i}"] < 140 for i in range(20)), counts


def test_a_subset_larger_than_the_data():
    with pytest.raises(JaxguardError, match=r"a subset of 9 .* 8 examples"):
        subset(make(8), 9, 0)


def test_configured_subsets_are_nested_whatever_else_differs(configure):
    small, large = (select(configure(make(80), subset=n, validation_size=10, seed=n)) for n in (20, 50))
    assert set(ids(small.train)) < set(ids(large.train))
    assert ids(small.validation) == ids(large.validation), "all runs on the same data are scored on the same examples"


# --- modes ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 100))
def test_dual_mode_gives_exactly_the_share(count, share, seed):
    modes = assign_modes(make(count), "dual", share, seed)
    assert modes.count(Mode.REASONING) == round(share * count)
    assert len(modes) == count


@given(st.permutations(make(12)), st.integers(0, 100))
def test_a_mode_goes_with_the_example_not_with_its_place(examples, seed):
    modes = dict(zip((e.id for e in examples), assign_modes(examples, "dual", 0.5, seed), strict=True))
    assert modes == dict(zip((e.id for e in make(12)), assign_modes(make(12), "dual", 0.5, seed), strict=True))


def test_one_mode_is_for_all():
    assert assign_modes(make(3), "direct", 0.5, 0) == [Mode.DIRECT] * 3
    assert assign_modes(make(3), "reasoning", 0.5, 0) == [Mode.REASONING] * 3


def test_modes_are_not_drawn_with_the_subset():
    chosen = subset(make(200), 100, 0)
    first = assign_modes(chosen, "dual", 0.5, 0)[:50]
    assert 15 < first.count(Mode.REASONING) < 35


def test_in_dual_mode_only_examples_with_a_trace_reason():
    examples = [*make(5), *make(5, trace=False, prefix="plain")]
    modes = assign_modes(examples, "dual", 0.5, 0)
    assert modes == [Mode.REASONING] * 5 + [Mode.DIRECT] * 5
    with pytest.raises(JaxguardError, match="needs a trace for 6 of 10 examples, but 5 have one; lower the share"):
        assign_modes(examples, "dual", 0.6, 0)


# --- what is left out -------------------------------------------------------------------------------------------------


def test_reasoning_drops_examples_without_a_trace_and_counts_them(configure):
    selection = select(configure([*make(6), *make(4, trace=False, prefix="plain")]))
    assert sorted(ids(selection.train)) == [f"e{i}" for i in range(6)]
    assert selection.dropped == {"train: no trace": 4}
    assert all(mode is Mode.REASONING for _, mode in selection.train)


def test_reasoning_without_any_trace_says_what_to_do(configure):
    with pytest.raises(JaxguardError, match=r"none of the 5 examples of data.train has one: set data.mode=direct"):
        select(configure(make(5, trace=False)))
    with pytest.raises(JaxguardError, match=r"examples of data.validation has one"):
        select(configure(make(5), make(5, trace=False, prefix="v"), validation_size=3))


def test_direct_needs_no_trace(configure):
    assert len(select(configure(make(5, trace=False), mode="direct")).train) == 5


def test_examples_without_a_label_for_the_policys_questions_are_dropped(configure):
    refusal = Example("r", "test", "q", "no", refusal_label="refusal")
    selection = select(configure([*make(4), refusal], mode="direct"))
    assert "r" not in ids(selection.train)
    assert selection.dropped == {"train: no label for what the policy asks": 1}
    with pytest.raises(JaxguardError, match="policy 'short' asks prompt_harm, response_harm"):
        select(configure([refusal], mode="direct"))


def test_fewer_examples_than_a_batch(configure):
    with pytest.raises(JaxguardError, match=r"3 training examples are left after 5 were held out.*train.batch_size=4"):
        select(configure(make(8), validation_size=5, batch_size=4))


# --- hold-out ---------------------------------------------------------------------------------------------------------


def test_held_out_examples_are_no_training_examples(configure):
    selection = select(configure(make(50), validation_size=10))
    assert len(selection.validation) == 10
    assert set(ids(selection.train)) | set(ids(selection.validation)) == {f"e{i}" for i in range(50)}
    assert not set(ids(selection.train)) & set(ids(selection.validation))


def test_held_out_examples_do_not_depend_on_seeds_and_hardly_on_the_data(configure):
    def held(count, **data):
        return set(ids(select(configure(make(count), validation_size=10, **data)).validation))

    assert held(100) == held(100, seed=5, subset_seed=7, subset=30)
    assert len(held(100) & held(105)) >= 8


def test_training_holds_no_prompt_of_the_held_out(configure):
    examples = [replace(e, prompt=f"Question  {i % 10}" + " " * i) for i, e in enumerate(make(40))]
    selection = select(configure(examples, validation_size=3))
    texts = {example.prompt.split()[1] for example, _ in selection.validation}
    assert texts.isdisjoint(example.prompt.split()[1] for example, _ in selection.train)
    assert selection.dropped["train: same prompt as a held-out example"] == 40 - 3 - len(selection.train) > 0


def test_a_prompt_is_the_same_whatever_its_case_spacing_spelling_and_response(configure):
    prompts = {"v": "ﬁne  Day", "a": "FINE day", "b": "Fine, day!", "c": "fine \u200bday", "d": "a fine day", "e": "?"}
    held, *train = (Example(id, "test", prompt, id, prompt_label="harmful") for id, prompt in prompts.items())
    selection = select(
        configure(train, [held, replace(train[-1], id="w", prompt="!")], mode="direct", validation_size=5)
    )
    assert sorted(ids(selection.train)) == ["d", "e"]
    assert selection.dropped["train: same prompt as a held-out example"] == 3


@pytest.mark.parametrize("responses", [1, 3])
def test_a_conversation_is_trained_on_or_held_out_never_both(configure, responses):
    examples = [replace(e, prompt=f"question {i // responses}", response="r" * i) for i, e in enumerate(make(60))]
    selection = select(configure(examples, validation_size=8))
    trained, held_out = ({example.prompt for example, _ in part} for part in (selection.train, selection.validation))
    assert trained.isdisjoint(held_out)
    assert len(selection.validation) == 8


def test_a_validation_source_is_sampled(configure):
    selection = select(configure(make(5), make(30, prefix="v"), validation_size=10))
    assert len(selection.train) == 5
    assert len(set(ids(selection.validation))) == 10
    assert all(name.startswith("v") for name in ids(selection.validation))
    assert [source["role"] for source in selection.sources] == ["train", "validation"]


def test_a_small_validation_source_is_taken_whole(configure):
    assert len(select(configure(make(5), make(3, prefix="v"), validation_size=10)).validation) == 3


def test_validation_can_be_turned_off(configure):
    assert select(configure(make(5), make(3, prefix="v"), validation_size=0)).validation == []
    assert len(select(configure(make(5))).train) == 5


def test_a_hold_out_of_everything(configure):
    with pytest.raises(JaxguardError, match=r"data\.validation_size=5 leaves nothing of the 5 training examples"):
        select(configure(make(5), validation_size=5))


def test_dual_mode_validates_in_both_modes(configure):
    selection = select(configure(make(40), mode="dual", validation_size=6))
    modes = Counter(mode for _, mode in selection.validation)
    assert modes == {Mode.REASONING: 6, Mode.DIRECT: 6}
    by_mode = {mode: {e.id for e, m in selection.validation if m is mode} for mode in Mode}
    assert by_mode[Mode.REASONING] == by_mode[Mode.DIRECT]


def test_ids_of_several_sources_are_made_unique(configure):
    config = configure(make(4))
    twice = config.model_copy(update={"data": config.data.model_copy(update={"train": config.data.train * 2})})
    assert sorted(ids(select(twice).train)) == sorted([f"e{i}" for i in range(4)] + [f"e{i}#2" for i in range(4)])


# --- encoding and manifest --------------------------------------------------------------------------------------------


def test_prepare_encodes_everything_and_the_manifest_adds_up(configure, tiny_tokenizer_folder):
    config = configure(make(20), mode="dual", validation_size=4)
    prepared = prepare(config, tiny_tokenizer_folder)
    train, held = prepared.manifest["train"], prepared.manifest["validation"]
    assert train["examples"] == len(prepared.train) == 16
    assert train["by_mode"] == {"reasoning": 8, "direct": 8} == Counter(s.mode for s in prepared.train)
    assert train["tokens"] == sum(len(s.tokens) for s in prepared.train)
    assert train["trained_tokens"] == sum(s.loss_mask.sum() for s in prepared.train)
    assert sum(train["labels"]["prompt_label"].values()) == 16
    assert (held["examples"], held["sequences"]) == (4, 8)
    assert {mode for _, mode, _ in prepared.validation} == set(Mode)
    (source,) = prepared.manifest["sources"]
    assert (source["examples"], source["skipped"]) == (20, {})
    (digest,) = source["files"].values()
    assert len(digest) == 64
    assert prepared.manifest["policy"]["name"] == "short"
    assert json.loads(json.dumps(prepared.manifest)) == prepared.manifest


def test_prepare_is_repeatable_and_its_hash_tells_when_tokens_change(configure, tiny_tokenizer_folder):
    first, again, other = (prepare(configure(make(n)), tiny_tokenizer_folder).manifest for n in (9, 9, 8))
    assert first == again
    assert first["train"]["tokens_sha256"] != other["train"]["tokens_sha256"]


def test_long_texts_are_cut_and_counted(configure, tiny_tokenizer_folder):
    long = Example("long", "test", "word " * 2000, prompt_label="harmful")
    prepared = prepare(configure([*make(4), long], mode="direct"), tiny_tokenizer_folder)
    assert prepared.manifest["train"]["cut"] == 1
    assert max(len(s.tokens) for s in prepared.train) <= 512


def test_a_trace_that_does_not_fit_drops_its_example(configure, tiny_tokenizer_folder):
    long = Example("long", "test", "hello", prompt_label="harmful", trace="therefore " * 500)
    prepared = prepare(configure([*make(4), long]), tiny_tokenizer_folder)
    assert "long" not in {s.example_id for s in prepared.train}
    assert prepared.manifest["dropped"] == {"train: answer too long for a row": 1}
    assert prepared.manifest["train"]["examples"] == 4
    with pytest.raises(JaxguardError, match=r"no training example fits into data.max_seq_len=512"):
        prepare(configure([long, replace(long, id="other", prompt="again")]), tiny_tokenizer_folder)


def test_all_cut_is_an_error(configure, tiny_tokenizer_folder):
    examples = [replace(e, prompt=f"{e.prompt} " * 400) for e in make(4)]
    with pytest.raises(JaxguardError, match=r"every training example .* data.max_seq_len=512"):
        prepare(configure(examples, mode="direct"), tiny_tokenizer_folder)


def test_validation_branches_begin_with_the_labels(configure, tiny_tokenizer_folder):
    whole = Example("v", "test", "hello", "hi", prompt_label="harmful", response_label="unharmful")
    prepared = prepare(
        configure(make(4, trace=False), [whole], mode="direct", validation_size=1), tiny_tokenizer_folder
    )
    ((example, mode, branches),) = prepared.validation
    assert (example.id, mode, len(branches)) == ("v", Mode.DIRECT, 2)
    assert dict(branches[0].answers) == {"prompt_harm": "harmful", "response_harm": "unharmful"}
    assert not np.array_equal(branches[0].tokens, branches[1].tokens)


def test_data_never_imports_jax():
    """Asked of the source, since grain, which batches reads with, brings jax along by itself."""
    folder = Path(__file__).parents[2] / "jaxguard" / "data"
    assert not [p.name for p in folder.glob("*.py") if "import jax\n" in p.read_text() or "from jax " in p.read_text()]
