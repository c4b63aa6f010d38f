"""The search and its command, with arithmetic instead of XLA."""

import json
from dataclasses import replace

import pytest
from plan_examples import plan_of

from jaxguard.config import load
from jaxguard.plan import __main__ as command
from jaxguard.plan import run as run_module
from jaxguard.plan.compile import OutOfMemoryError, estimate, find_spec
from jaxguard.plan.run import meshes, search
from jaxguard.plan.run_cost import RunCost
from jaxguard.plan.targets import find_cluster

LLAMA = find_spec(load("llama8b_5k").model)
PEAK = {"none": 90, "dots": 64, "full": 40}
SLOWER = {"none": 1.0, "dots": 1.1, "full": 1.3}


def compile_step(config, spec, cluster, rows, targets=None, largest=None):
    """Micro-batches halve what exceeds 30 GiB and gather the weights anew; tensor parallelism costs time."""
    accumulation = config.train.accumulation
    peak = 30 + (PEAK[config.model.remat] - 30) // accumulation
    if peak > 79:
        raise OutOfMemoryError("too small")
    mesh = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    flops = 312e12 * SLOWER[config.model.remat] * (1 + 0.2 * accumulation) * (1 + 0.5 * (config.mesh.tensor - 1))
    compute = replace(plan_of(1).compute, remat=config.model.remat)
    return plan_of(peak, cluster=cluster, mesh=mesh, compute=compute, matmul_flops=flops)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(run_module, "compile_step", compile_step)


def test_the_fastest_that_fits_comes_first():
    reported = []
    report = search("llama8b_5k", "a100-80gb:8", rows=32, on_candidate=reported.append)
    best = report.ranking
    assert all(plan.fits for _, plan in best)
    assert replace(report.best.plans[0], cost=RunCost()) == best[0][1]
    steps = [estimate(plan)["step"] for _, plan in best]
    assert steps == sorted(steps)
    # None in halves is 1.4, full at once 1.56; tensor parallelism costs more than either.
    assert best[0][0][2:] == ("mesh.tensor=1", "model.remat=none", "train.accumulation=2")
    assert [line.partition(":")[0] for line in reported] == [" ".join(overrides) for overrides in report.candidates]
    assert len(reported) > len(best)
    assert next(iter(report.candidates.values())) is None, "what the compiler refuses is reported too"


def test_nothing_more_is_tried_once_nothing_has_to_be_computed_twice():
    report = search("llama8b_5k", "a100-80gb:8", rows=32)
    alone = [overrides[3:] for overrides in report.candidates if "mesh.tensor=1" in overrides]
    # none peaks at 90, then 60 in halves: that fits.
    assert alone == [
        ("model.remat=none", "train.accumulation=1"),
        ("model.remat=dots", "train.accumulation=1"),
        ("model.remat=full", "train.accumulation=1"),
        ("model.remat=none", "train.accumulation=2"),
    ]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("a100-80gb:8", {(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)}),
        ("a100-80gb:2x8", {(1, 16, 1), (2, 8, 1), (1, 8, 2), (2, 4, 2), (1, 4, 4), (2, 2, 4), (1, 2, 8), (2, 1, 8)}),
        ("v5e:128", {(1, 32, 4), (1, 16, 8)}),
        ("v5e:2*8", {(2, 8, 1), (2, 4, 2), (2, 2, 4), (2, 1, 8)}),
    ],
)
def test_meshes_share_no_more_rows_than_the_batch_has_examples(target, expected):
    made = {(m["data"], m["fsdp"], m["tensor"]) for m in meshes(LLAMA, find_cluster(target), 32)}
    assert made == expected


def test_the_command_plans_the_best_candidate(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert command.main(["--config", "llama8b_5k", "--target", "a100-80gb:8", "--search", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "train.accumulation" in text
    (plan,) = json.loads(path.read_text())
    assert plan["fits"]


def test_plans_are_side_by_side(capsys, tmp_path):
    path = tmp_path / "plan.html"
    arguments = ["--config", "llama8b_5k", "--target", "a100-80gb:8", "--compare", "model.remat=dots mesh.tensor=2"]
    assert command.main([*arguments, "--html", str(path)]) == command.DOES_NOT_FIT
    text = " ".join(capsys.readouterr().out.split())
    assert "model.remat=dots" in text
    assert "64.00 GiB" in text
    assert "40.00 GiB" in text
    assert "model.remat=dots mesh.tensor=2" in path.read_text()


def test_a_change_that_is_no_field_is_named(capsys):
    assert command.main(["--config", "llama8b_5k", "--target", "h100", "--compare", "model.rematt=dots"]) == 2
    assert "did you mean 'remat'" in capsys.readouterr().err


def test_a_search_without_a_fit_is_a_refusal(capsys, monkeypatch):
    def refuse(config, spec, cluster, *rest):
        if cluster.name == "h100":
            raise OutOfMemoryError("too small")
        return compile_step(config, spec, cluster, *rest)

    monkeypatch.setattr(run_module, "compile_step", refuse)
    targets = ["--target", "h100", "--target", "a100-80gb:8"]
    assert command.main(["--config", "llama8b_5k", *targets, "--search"]) == command.DOES_NOT_FIT
    text = " ".join(capsys.readouterr().out.split())
    assert "llama8b_5k on h100 does not fit: " in text
    assert "llama8b_5k on a100-80gb:8" in text, "the other target is ranked all the same"
