"""The second round: the first one's examples as it chose them, and the hard ones once more."""

from collections import Counter

import pytest
from bakery import write_config

from jaxguard.config import load
from jaxguard.config.data import SourceConfig
from jaxguard.data.prepare import select
from jaxguard.data.sources import load_examples
from jaxguard.mine.__main__ import main

FIRST, SECOND = "first.yaml", "second.yaml"


def continual(run, **data):
    """A second round as the shipped configs write it."""
    mine = "runs/first/mine"
    data = {
        "train": [{"kind": "jsonl", "path": f"{mine}/{name}.jsonl"} for name in ("train", "hard")],
        "validation": [{"kind": "jsonl", "path": f"{mine}/held_out.jsonl"}],
        **data,
    }
    write_config(run / SECOND, data=data)
    return select(load(SECOND))


@pytest.mark.parametrize("mode", ["direct", "reasoning", "dual"])
@pytest.mark.parametrize("subset", [None, 30])
def test_hard_examples_are_trained_twice_and_nothing_else_changes(run, baker, mode, subset):
    write_config(run / FIRST, data={"mode": mode, "subset": subset}, mine={"most": 6})
    assert main(["--config", FIRST]) == 0
    first, second = select(load(FIRST)), continual(run, mode=mode)
    assert second.validation == first.validation
    taken = load_examples(SourceConfig(kind="jsonl", path="runs/first/mine/hard.jsonl"))
    assert len(taken) == 6
    modes = {example.id: mode for example, mode in first.train}
    trained = Counter((example.prompt, example.trace, mode) for example, mode in second.train)
    once = Counter((example.prompt, example.trace, mode) for example, mode in first.train)
    assert trained == once + Counter((example.prompt, example.trace, modes[example.id]) for example in taken)
    assert set(trained.values()) == {1, 2}
    assert len({example.id for example, _ in second.train}) == len(second.train)
    assert not {e.prompt for e, _ in second.train} & {e.prompt for e, _ in second.validation}


def test_a_third_round_is_mined_from_the_second(run, baker):
    assert main(["--config", FIRST]) == 0
    first = continual(run)
    (run / "runs/second").mkdir()
    (run / "runs/first/export").rename(run / "runs/second/export")
    assert main(["--config", SECOND]) == 0
    twice = load_examples(SourceConfig(kind="jsonl", path="runs/second/mine/train.jsonl"))
    assert [example.id for example in twice] == [example.id for example, _ in first.train]


def test_a_run_without_validation_has_none_to_hand_on(run, baker):
    write_config(run / FIRST, data={"validation_size": 0})
    assert main(["--config", FIRST]) == 0
    assert (run / "runs/first/mine/held_out.jsonl").read_text() == ""
    assert continual(run, validation=[], validation_size=0).validation == []


@pytest.mark.parametrize("name", ["smollm", "gemma4b", "llama8b"])
def test_shipped_second_rounds_differ_from_the_first_in_weights_and_data_alone(name):
    base = "smollm_demo" if name == "smollm" else f"{name}_5k"
    first, second = (load(config).model_dump(mode="json") for config in (base, f"{name}_continual"))
    assert second["model"].pop("checkpoint") == f"runs/{base}/export"
    first["model"].pop("checkpoint")
    paths = [source["path"] for source in second["data"].pop("train")]
    assert paths == [f"runs/{base}/mine/{part}.jsonl" for part in ("train", "hard")]
    first["data"].pop("train")
    if name != "smollm":
        assert [source["path"] for source in second["data"].pop("validation")] == [f"runs/{base}/mine/held_out.jsonl"]
        assert (first["data"].pop("validation"), first["data"].pop("subset")) == ([], 5000)
        assert second["data"].pop("subset") is None
    assert {**second, "name": base} == first
