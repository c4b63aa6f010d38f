"""The search, and what the door makes of it, with a compiler of arithmetic in place of XLA."""

import json
from dataclasses import replace

import pytest
from plan_examples import plan_of

from jaxguard.config import load
from jaxguard.plan import __main__ as door
from jaxguard.plan import search as searching
from jaxguard.plan.compile import OutOfMemoryError, find_spec
from jaxguard.plan.estimate import estimate
from jaxguard.plan.search import meshes, search
from jaxguard.plan.targets import find_cluster

LLAMA = find_spec(load("llama8b_5k").model)
PEAK = {"none": 90, "dots": 64, "full": 40}
SLOWER = {"none": 1.0, "dots": 1.1, "full": 1.3}


def compile_step(config, spec, cluster, rows, targets=None, largest=None):
    """Micro-batches halve what exceeds 30 GiB and gather the weights anew; cut heads cost time."""
    parts = config.train.accumulation
    peak = 30 + (PEAK[config.model.remat] - 30) // parts
    if peak > 79:
        raise OutOfMemoryError("too small")
    mesh = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    flops = 312e12 * SLOWER[config.model.remat] * (1 + 0.2 * parts) * (1 + 0.5 * (config.mesh.tensor - 1))
    compute = replace(plan_of(1).compute, remat=config.model.remat)
    return plan_of(peak, cluster=cluster, mesh=mesh, compute=compute, matmul_flops=flops)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(searching, "compile_step", compile_step)
    monkeypatch.setattr(door, "compile_step", compile_step)


def vary(overrides):
    return load("llama8b_5k", overrides)


def test_the_fastest_that_fits_comes_first():
    told = []
    best = search(vary, LLAMA, find_cluster("a100-80gb:8"), 32, None, told.append)
    assert all(choice.fits for choice in best)
    steps = [estimate(choice.plan).step for choice in best]
    assert steps == sorted(steps)
    # None in halves is 1.4, full at once 1.56; cut heads cost more than either.
    assert best[0].overrides[2:] == ("mesh.tensor=1", "model.remat=none", "train.accumulation=2")
    assert len(told) > len(best)
    assert told[0].plan is None, "what the compiler refuses is told too"


def test_nothing_more_is_tried_once_nothing_has_to_be_computed_twice():
    told = []
    search(vary, LLAMA, find_cluster("a100-80gb:8"), 32, None, told.append)
    alone = [choice.overrides[3:] for choice in told if "mesh.tensor=1" in choice.overrides]
    # none peaks at 90, then 60 in halves: that fits.
    assert alone == [
        ("model.remat=none", "train.accumulation=1"),
        ("model.remat=dots", "train.accumulation=1"),
        ("model.remat=full", "train.accumulation=1"),
        ("model.remat=none", "train.accumulation=2"),
    ]


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("a100-80gb:8", {(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)}),
        ("a100-80gb:2x8", {(1, 16, 1), (2, 8, 1), (1, 8, 2), (2, 4, 2), (1, 4, 4), (2, 2, 4), (1, 2, 8), (2, 1, 8)}),
        ("v5e:128", {(1, 32, 4), (1, 16, 8)}),
        ("v5e:2*8", {(2, 8, 1), (2, 4, 2), (2, 2, 4), (2, 1, 8)}),
    ],
)
def test_meshes_have_no_more_parts_than_the_batch_has_examples(target, found):
    made = {(m["data"], m["fsdp"], m["tensor"]) for m in meshes(LLAMA, find_cluster(target), 32)}
    assert made == found


def test_the_door_plans_the_best_it_found(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert door.main(["--config", "llama8b_5k", "--target", "a100-80gb:8", "--search", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "train.accumulation" in said
    (plan,) = json.loads(path.read_text())
    assert plan["fits"]


def test_plans_lie_side_by_side(capsys, tmp_path):
    path = tmp_path / "plan.html"
    arguments = ["--config", "llama8b_5k", "--target", "a100-80gb:8", "--compare", "model.remat=dots mesh.tensor=2"]
    assert door.main([*arguments, "--html", str(path)]) == door.DOES_NOT_FIT
    said = " ".join(capsys.readouterr().out.split())
    assert "model.remat=dots" in said
    assert "64.00 GiB" in said
    assert "40.00 GiB" in said
    assert "model.remat=dots mesh.tensor=2" in path.read_text()


def test_a_change_that_is_no_field_is_named(capsys):
    assert door.main(["--config", "llama8b_5k", "--target", "h100", "--compare", "model.rematt=dots"]) == 2
    assert "did you mean 'remat'" in capsys.readouterr().err


def test_where_nothing_fits_that_is_what_is_said(capsys, monkeypatch):
    def refuse(config, spec, cluster, *rest):
        if cluster.name == "h100":
            raise OutOfMemoryError("too small")
        return compile_step(config, spec, cluster, *rest)

    monkeypatch.setattr(searching, "compile_step", refuse)
    targets = ["--target", "h100", "--target", "a100-80gb:8"]
    assert door.main(["--config", "llama8b_5k", *targets, "--search"]) == door.DOES_NOT_FIT
    said = " ".join(capsys.readouterr().out.split())
    assert "llama8b_5k on h100 does not fit: nothing that was tried does; take more devices" in said
    assert "llama8b_5k on a100-80gb:8" in said, "the other target is ranked all the same"
