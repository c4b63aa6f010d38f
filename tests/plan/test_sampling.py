"""The plan of what samples answers: its memory from shapes alone, how many answers run together, and when nothing is sampled."""

import json
from dataclasses import replace

import jax
import pytest
from plan_examples import plan_of

from jaxguard.config import load
from jaxguard.config.hardware import GIB
from jaxguard.data.packing import Shape
from jaxguard.models.weights import abstract, count
from jaxguard.plan import compile as compile_module
from jaxguard.plan import sampling as sampling_module
from jaxguard.plan.compile import Sampling, compile_step, find_spec
from jaxguard.plan.run import PlanReport
from jaxguard.plan.run_cost import RunCost, run_cost
from jaxguard.plan.sampling import compile_sampling
from jaxguard.plan.targets import find_cluster
from jaxguard.report import page_html

SAMPLING = Sampling(
    prompts=8, answers=64, batches=4, prompt_tokens=1536, tokens=512, state=11 * GIB, weights=15 * GIB, caches=2 * GIB,
    peak=30 * GIB, seconds={"compute": 1.0, "memory": 16.0, "network": 0.5},
)  # fmt: skip


@pytest.fixture
def planned(monkeypatch, write_llama_config, tmp_path):
    """planned(*overrides): config, spec and sampling of a tiny Llama on eight of this host's fake devices."""
    write_llama_config(tmp_path)
    for module in (compile_module, sampling_module):
        monkeypatch.setattr(module, "topology", lambda cluster: jax.devices()[: cluster.devices])

    def plan(*overrides):
        small = ("data.max_seq_len=256", "reinforce.max_tokens=64", f"model.checkpoint={tmp_path}")
        config = load("llama8b_grpo_hard", [*small, *overrides])
        spec = find_spec(config.model)
        return config, spec, compile_sampling(config, spec, find_cluster("a100-80gb:8"))

    return plan


def test_memory_is_the_state_gathered_weights_and_full_caches(planned):
    _, spec, sampling = planned()
    assert (sampling.prompts, sampling.answers, sampling.batches) == (
        8,
        64,
        4,
    )  # 32 at a time, made a prompt for each device
    assert (sampling.prompt_tokens, sampling.tokens) == (192, 64)
    token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4  # float32 on this host
    assert sampling.caches == pytest.approx(
        token * (2 * 192 + 8 * (64 + 64)), rel=0.02
    )  # of a prompt, twice, and of eight answers, with room for those that begin later
    parameters = count(abstract(spec))
    assert sampling.weights == 4 * parameters
    assert sampling.state == pytest.approx(12 * parameters / 8, rel=0.03)  # norms are whole on each
    assert sampling.peak > sampling.state + sampling.weights + sampling.caches
    bandwidth = find_cluster("a100-80gb:8").target.bandwidth
    assert sampling.seconds["memory"] >= 4 * 64 * sampling.weights / bandwidth  # every token reads all weights
    assert sampling.seconds["network"] > 0


def test_tensor_cuts_what_a_device_gathers(planned):
    whole, cut = planned()[2], planned("mesh.tensor=2")[2]
    assert cut.weights < 0.6 * whole.weights


def test_answers_that_run_together_follow_the_config(planned):
    more = planned("reinforce.batch=128", "train.batch_size=32")[2]
    assert (more.prompts, more.answers, more.batches) == (16, 128, 2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.objective.kind=sft",),
        ("data.mode=direct", "reinforce.reward.kind=probability", "reinforce.average=tokens"),
        ("reinforce.endpoint=http://127.0.0.1:30000",),
    ],
)
def test_where_nothing_is_sampled_there_is_no_plan(planned, overrides):
    assert planned(*overrides)[2] is None


def test_a_report_has_both_phases_and_counts_both():
    plan = plan_of(50, sampling=SAMPLING, cost=RunCost(100))
    report = PlanReport([plan])
    assert report.fits
    (data,) = json.loads(json.dumps(report.to_json()))
    assert data["sampling"]["peak"] == 30 * GIB
    assert data["hours"] == pytest.approx(100 * (17.5 + data["estimate"]["step"]) / 3600)
    text = page_html(report.page())
    assert text.index("sample") < text.index("update")


def test_sampling_that_does_not_fit_says_what_to_change():
    (problem,) = PlanReport([plan_of(50, sampling=replace(SAMPLING, peak=61 * GIB))]).problems
    assert "sampling needs 61.00 GiB of 60.0 usable" in str(problem)
    assert "mesh.tensor" in str(problem)


def test_rows_hold_as_many_answers_as_there_are(planned):
    config, spec, _ = planned()
    cluster = find_cluster("a100-80gb:8")
    assert compile_step(config, spec, cluster, None).shape == Shape(256, 256, 64, 8)
    config = load(config, ["train.accumulation=1", "train.batch_size=8"])
    assert compile_step(config, spec, cluster, 8).shape == Shape(8, 256, 256, 8)
    assert compile_step(config, spec, cluster, 8, targets=64).shape == Shape(8, 256, 64, 8)


def test_local_prompts_give_the_shape_of_the_longest_answers(tiny_files, tmp_path):
    config = load(
        str(tiny_files(tmp_path)),
        ["train.objective.kind=grpo", "reinforce.answers=4", "reinforce.max_tokens=32", "data.mode=direct"],
    )
    cost = run_cost(config, devices=2)
    ((shape, steps),) = cost.shapes.items()
    assert steps == cost.steps == 12
    assert shape.rows * shape.targets >= 8 * 4 * 32
    assert shape.rows * shape.pairs >= 8 * 4
    assert shape.rows % 2 == 0
    assert len(cost.layouts) > 0


def test_the_export_of_a_run_to_come_has_its_models_shape(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_spec(load("llama8b_grpo_hard").model) == find_spec(load("llama8b_5k").model)


@pytest.mark.aot
def test_reinforcement_learning_of_eight_billion_weights_fits():
    """96 rows: answers of 512 tokens, three of which share a row with a prompt of up to 512."""
    config, cluster = load("llama8b_grpo_hard"), find_cluster("a100-80gb:8")
    spec = find_spec(config.model)
    step = compile_step(config, spec, cluster, 96)
    assert step.compute.attention == "flash"
    assert step.peak <= 22 * GIB, f"{step.peak / GIB:.2f} GiB"
    rollouts = compile_sampling(config, spec, cluster)
    assert rollouts.peak <= 28 * GIB, f"{rollouts.peak / GIB:.2f} GiB"
    assert rollouts.weights == pytest.approx(2 * count(abstract(spec)), rel=0.01)
    reads = rollouts.batches * rollouts.tokens * rollouts.weights / cluster.target.bandwidth
    assert 1 <= rollouts.seconds["memory"] / reads <= 4
