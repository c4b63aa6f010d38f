import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from plan_examples import plan_of
from rich.console import Console

from jaxguard.config import load
from jaxguard.config.hardware import GIB
from jaxguard.config.train import MeshConfig, ModelConfig
from jaxguard.data.packing import Shape
from jaxguard.models.attention.attend import attend
from jaxguard.models.attention.flash import choose_tiling
from jaxguard.models.attention.kernels import Layout
from jaxguard.models.compute import Compute, choose_kernel
from jaxguard.models.sharding import PERMUTED, make_mesh
from jaxguard.models.weights import abstract, count, table
from jaxguard.plan.compile import Plan, compile_step, estimate, find_spec, ideal_sent, rate, step_flops
from jaxguard.plan.hlo import Collective
from jaxguard.plan.run import PlanReport
from jaxguard.plan.run_cost import RunCost
from jaxguard.plan.sweeps import points, read_sweep
from jaxguard.plan.targets import find_cluster, topology
from jaxguard.train.step import training_flops
from jaxguard.utils.errors import JaxguardError

LLAMA, GEMMA = "meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it"


@pytest.mark.parametrize(
    ("checkpoint", "parameters"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        (LLAMA, 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("google/gemma-3-1b-it", 999_885_952),
        (GEMMA, 3_880_263_168),
        ("google/gemma-3-12b-it", 11_766_034_176),
        ("google/gemma-3-27b-it", 27_009_346_304),
    ],
)
def test_public_facts_give_the_published_size(checkpoint, parameters):
    assert count(abstract(find_spec(ModelConfig(checkpoint=checkpoint)))) == parameters


def test_a_folder_comes_before_public_facts(tmp_path, write_llama_config):
    write_llama_config(tmp_path)
    assert find_spec(ModelConfig(checkpoint=str(tmp_path))).d_model == 32


def test_an_unknown_checkpoint_names_the_known_ones():
    with pytest.raises(JaxguardError, match=re.escape(GEMMA)):
        find_spec(ModelConfig(checkpoint="someone/something"))


def printed(plan: Plan) -> str:
    console = Console(width=150, record=True)
    console.print(PlanReport([plan]).render())
    return console.export_text()


@pytest.mark.parametrize(("peak", "verdict"), [(59, "fits"), (61, "does not fit")])
def test_the_table_says_whether_it_fits(peak, verdict):
    text = printed(plan_of(peak))
    assert f"{peak}.00 GiB of 60.0 usable: {verdict}" in text
    assert "32 rows of 2,048 tokens, 512 targets each" in text
    assert ("bf16[3,1024,1024,512]" in text) == (verdict == "does not fit"), "what to look at where it does not"


def test_a_step_takes_products_memory_and_network_one_after_another():
    result = estimate(plan_of(50))
    assert (result["compute"], result["memory"]) == (1, 1)
    assert result["network"] == pytest.approx(1, rel=1e-6)  # 300 GB at 300 GB/s
    assert (result["step"], result["bound"]) == (pytest.approx(3), 1)
    assert result["mfu"] == pytest.approx(0.5 / 3)


def test_a_vendors_kernel_is_counted_analytically():
    result = estimate(plan_of(50, compute=Compute(jnp.dtype(jnp.bfloat16), "cudnn", "full")))
    assert result["compute"] == pytest.approx((312e12 + 8e12) / 312e12)


def test_devices_that_are_not_linked_share_their_hosts_cards():
    target = find_cluster("a100-80gb:2x8").target
    far = Collective("all-gather", "fsdp", 16, 8, 1, 1, "")
    assert rate(target, far) == 8 * 25e9
    assert rate(target, replace(far, near=1)) == 25e9
    assert rate(target, replace(far, near=16)) == 300e9


def test_a_plan_as_data_has_every_figure_of_the_table():
    report = PlanReport([plan_of(61, cost=RunCost(781))])
    (figures,) = json.loads(json.dumps(report.to_json()))
    assert not figures["fits"]
    assert figures["collectives"][0]["sent"] == pytest.approx(300e9)
    assert figures["estimate"]["step"] == pytest.approx(3)
    assert figures["hours"] == pytest.approx(781 * 3 / 3600)
    assert figures["dollars"] is None
    (row,) = report.table()
    assert (row["run"], row["fits"], row["mfu"]) == ("tiny", False, figures["estimate"]["mfu"])


@pytest.mark.parametrize(("name", "targets"), [("llama8b_5k", 64), ("gemma4b_5k", 512)])
def test_counted_flops_without_recomputation_are_those_of_training(name, targets):
    """Two ways of counting: the planner's, by blocks of a row, and the loop's, by tokens that see each other."""
    spec = find_spec(load(name).model)
    compute = Compute(jnp.dtype(jnp.bfloat16), "xla", "none", query_chunk=1)
    result = step_flops(spec, Shape(8, 1024, targets), compute)
    assert result["model"] == pytest.approx(training_flops(spec, np.tile(np.arange(1024), 8), 8 * targets), rel=1e-9)


def test_the_ideal_is_three_times_the_weights_but_for_a_devices_own_part():
    spec = find_spec(load("llama8b_5k").model)
    compute = Compute(jnp.dtype(jnp.bfloat16), "cudnn", "full")
    cut = sum(2 * math.prod(w.shape(spec)) for w in table(spec) if "norm" not in w.axes)
    assert ideal_sent(spec, {"data": 1, "fsdp": 8, "tensor": 1}, compute) == pytest.approx(3 * cut * 7 / 8, rel=1e-3)
    assert ideal_sent(spec, {"data": 1, "fsdp": 1, "tensor": 1}, compute) == 0


@pytest.mark.aot
def test_a_mesh_follows_the_torus_however_its_chips_are_listed():
    """So the plan, whose topology lists chips host by host, has the mesh of the run."""
    chips = topology(find_cluster("v5e:4x4"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=8), chips)
    assert make_mesh(MeshConfig(data=2, fsdp=8), sorted(chips, key=lambda chip: chip.id)) == mesh
    for copy in mesh.devices:
        ranges = [len(set(coordinates)) for coordinates in zip(*(chip.coords for chip in copy.flat), strict=True)]
        assert math.prod(ranges) == 8  # a rectangle of chips


@pytest.mark.aot
def test_slices_lie_along_data():
    chips = topology(find_cluster("v5e:2*4x4"))
    mixed = [*chips[::2], *chips[1::2]]
    for data, fsdp, tensor in ((2, 16, 1), (4, 4, 2)):
        slices = [
            {chip.slice_index for chip in copy.flat}
            for copy in make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), mixed).devices
        ]
        assert slices == [{0}] * (data // 2) + [{1}] * (data // 2)
    with pytest.raises(JaxguardError, match=r"mesh\.data=1 must be a multiple of 2"):
        make_mesh(MeshConfig(), mixed)


@pytest.mark.aot
def test_only_gradients_go_from_slice_to_slice(tmp_path, write_llama_config):
    """Each device's part of them, at the network's rate; the compiler sends some of such small ones in float32."""
    write_llama_config(tmp_path, hidden_size=256, intermediate_size=512)
    overrides = [f"model.checkpoint={tmp_path}", "data.max_seq_len=128", "train.batch_size=8", "mesh.data=2"]
    config = load("llama8b_5k", overrides)
    spec, cluster = find_spec(config.model), find_cluster("v5e:2*2x2")
    result = compile_step(config, spec, cluster, rows=8)
    between = [collective for collective in result.collectives if collective.group != collective.near]
    assert {(c.kind, c.axes, c.group) for c in between} == {("all-reduce", "data", 2)}
    alone = ideal_sent(spec, {**result.mesh, "data": 1}, result.compute)
    assert 1 <= sum(c.sent for c in between) / (result.ideal_sent - alone) < 1.5
    assert all(rate(cluster.target, c) == cluster.target.network for c in between)


@pytest.mark.aot
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("kernel", "target", "capability"),
    [
        ("cudnn", "a100-80gb:8", 8.0),
        ("flash", "a100-80gb:8", 8.0),
        ("flash", "h100:8", 9.0),
        ("flash", "b200:8", 10.0),
        ("flash", "rtx4090:8", 8.9),
        ("flash", "v4:8", 4.0),
        ("flash", "v5e:8", 5.0),
        ("flash", "v5p:8", 5.0),
    ],
)
def test_kernels_are_cut_by_rows_and_heads_without_communication(kernel, target, capability, head_dim):
    """Packed rows and a window, forward and backward, over data, fsdp and tensor at once."""
    platform = "gpu" if find_cluster(target).target.gpu else "tpu"
    try:
        choose_kernel(kernel, platform, capability, head_dim, 4, jnp.dtype(jnp.bfloat16), 512)
    except JaxguardError as error:
        pytest.skip(str(error))
    tiling = choose_tiling(platform, capability, head_dim)
    compute = Compute(jnp.dtype(jnp.bfloat16), kernel, tiling=tiling if kernel == "flash" else None)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), topology(find_cluster(target)))
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    query = jax.ShapeDtypeStruct((4, 512, 8, head_dim), jnp.bfloat16, sharding=cut)
    key = jax.ShapeDtypeStruct((4, 512, 2, head_dim), jnp.bfloat16, sharding=cut)
    positions = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=rows)
    layout = Layout(positions, positions)

    def loss(query, key, value, layout):
        mixed = attend(query, key, value, layout, window=100, scale=0.1, compute=compute)
        return jnp.sin(mixed.astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, layout).compile().as_text()
    calls = {"cudnn": ["__cudnn$fmhaScaleBiasSoftmaxBackward"], "flash": ["flash_forward", "flash_dq", "flash_dkv"]}
    assert all(call in text for call in calls[kernel])
    own = f"bf16[1,512,4,{head_dim}]" if kernel == "cudnn" else f"bf16[1,512,{4 * head_dim}]"
    assert own in text  # a device's own rows and heads
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "target", "limit"),
    [
        ("llama8b_5k", "a100-80gb:8", 19 * GIB),
        ("gemma4b_5k", "a100-80gb:8", 12 * GIB),
        ("gemma4b_5k", "h100:8", 12 * GIB),
        ("gemma4b_5k", "v5e:16", 6.5 * GIB),
        ("gemma4b_full", "v5p:64", 6 * GIB),
    ],
)
def test_the_real_step_fits(name, target, limit):
    cluster = find_cluster(target)
    rows = 32 if cluster.devices <= 16 else 4 * cluster.devices
    config = load(name, ["data.max_seq_len=2048", f"train.batch_size={rows}"])
    result = compile_step(config, find_spec(config.model), cluster, rows)
    assert result.compute.attention == "flash"
    layers = find_spec(config.model).num_layers
    assert result.kernels == {"flash_forward": 2 * layers, "flash_dq": layers, "flash_dkv": layers}
    assert result.peak <= limit, f"{result.peak / GIB:.2f} GiB"
    parameters = count(abstract(find_spec(config.model)))
    assert result.arguments * cluster.devices >= 12 * parameters  # master weights and both moments
    # Rows, heads and weights are cut so that nothing but fsdp's own gathers and reductions is needed: a TPU's compiler makes
    # reductions over a few chips of permutations. Of the embedding, every device's part is exchanged for its rows, and back.
    kinds = {c.kind for c in result.collectives if c.sent > 0.01 * result.sent}
    assert kinds == {"all-gather", "collective-permute" if target == "v5e:16" else "reduce-scatter"}
    axes = {c.axes for c in result.collectives}
    assert axes == ({"fsdp", "line", "fsdp+line"} if cluster.devices > PERMUTED else {"fsdp"})
    assert result.sent <= 1.1 * result.ideal_sent
    counted = sum(result.flops[part] for part in ("layers", "attention", "head")) / cluster.devices
    assert result.compiled_flops == pytest.approx(counted, rel=0.05)


@pytest.mark.aot
def test_rows_that_sharing_saves_are_saved_in_products_and_memory():
    """Sixteen rows become eight, one for each device: half the products, and all that a row's forward pass keeps."""
    cluster = find_cluster("a100-80gb:8")
    config = load("gemma4b_5k")
    whole, shared = (compile_step(config, find_spec(config.model), cluster, rows, targets=256) for rows in (16, 8))
    assert shared.matmul_flops == pytest.approx(whole.matmul_flops / 2, rel=0.01)
    spec = find_spec(load("gemma4b_5k").model)
    assert whole.temporaries - shared.temporaries >= spec.num_layers * 2048 * spec.d_model * 2


@pytest.mark.aot
@pytest.mark.parametrize("series", ["8b", "8b-host"])
def test_a_device_of_many_needs_no_more_than_one_of_few(series):
    """Rows grow with the devices: nothing that a device holds or sends may."""
    series_points = [point for point in points(read_sweep("guards")) if point.series == series]
    few, many = (
        compile_step(point.config, find_spec(point.config.model), point.cluster, point.rows)
        for point in (series_points[0], series_points[-1])
    )
    assert (few.cluster.devices, many.cluster.devices) == (8, 4096)
    assert many.peak <= 1.05 * few.peak
    assert many.sent <= 1.1 * many.ideal_sent
    assert many.matmul_flops == pytest.approx(few.matmul_flops, rel=0.01)
