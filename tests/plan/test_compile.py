import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jaxguard.config import Config, load, validate
from jaxguard.data.batches import Shape
from jaxguard.errors import JaxguardError
from jaxguard.models import attention_kernels
from jaxguard.models.weights import abstract, count
from jaxguard.plan.__main__ import show
from jaxguard.plan.compile import Plan, compile_step, find_spec
from jaxguard.plan.targets import GIB, topology
from jaxguard.sections import MeshConfig, ModelConfig
from jaxguard.train.sharding import make_mesh

LLAMA, GEMMA = "meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it"


@pytest.fixture
def config() -> Config:
    tree = {"name": "tiny", "model": {"checkpoint": GEMMA}, "data": {"train": [{"kind": "wildguardmix"}]}}
    return validate(tree, "test")


@pytest.mark.parametrize(("checkpoint", "parameters"), [(LLAMA, 8_030_261_248), (GEMMA, 3_880_263_168)])
def test_public_facts_give_the_published_size(checkpoint, parameters):
    assert count(abstract(find_spec(ModelConfig(checkpoint=checkpoint)))) == parameters


def test_a_folder_comes_before_public_facts(tmp_path, write_llama_config):
    write_llama_config(tmp_path)
    assert find_spec(ModelConfig(checkpoint=str(tmp_path))).width == 32


def test_an_unknown_checkpoint_names_the_known_ones():
    with pytest.raises(JaxguardError, match=re.escape(GEMMA)):
        find_spec(ModelConfig(checkpoint="someone/something"))


@pytest.mark.parametrize(("peak", "verdict"), [(59, "fits"), (61, "does not fit")])
def test_the_table_says_whether_it_fits(config, peak, verdict):
    result = Plan(
        target="a100-80gb:8",
        shape=Shape(32, 2048, 512),
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        attention="xla",
        arguments=5 * GIB,
        temporaries=(peak - 5) * GIB,
        peak=peak * GIB,
        usable=60 * GIB,
        collectives={"all-gather": 3},
        kernels={},
        seconds=12.0,
    )
    console = Console(width=120, record=True)
    console.print(show(config, result))
    text = console.export_text()
    assert f"{peak}.00 GiB of 60.0 usable: {verdict}" in text
    assert "32 rows of 2,048 tokens, 512 targets each" in text
    assert "3 all-gather" in text


@pytest.mark.aot
def test_rows_that_the_devices_cannot_share(config):
    with pytest.raises(JaxguardError, match=r"12 rows cannot be shared out: .* multiples of 8"):
        compile_step(config, find_spec(config.model), "a100-80gb:8", rows=12)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kernel", "target", "call"),
    [
        (attention_kernels.cudnn, "a100-80gb:8", "__cudnn$fmhaScaleBiasSoftmaxBackward"),
        (attention_kernels.splash, "tpu-v5p:8", "tpu_custom_call"),
    ],
)
def test_kernels_are_cut_by_rows_and_heads_without_communication(kernel, target, call):
    """Packed rows and a window, forward and backward, over data, fsdp and tensor at once."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), topology(target))
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    query = jax.ShapeDtypeStruct((4, 512, 8, 128), jnp.bfloat16, sharding=cut)
    key = jax.ShapeDtypeStruct((4, 512, 2, 128), jnp.bfloat16, sharding=cut)
    segments = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=rows)

    def loss(query, key, value, segments):
        return kernel(query, key, value, segments, 100, 0.1).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, segments).compile().as_text()
    assert call in text
    assert "bf16[1,512,4,128]" in text  # a device's own rows and heads
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "target", "attention", "limit"),
    [
        ("llama8b_5k", "a100-80gb:8", "cudnn", 22 * GIB),
        ("gemma4b_5k", "a100-80gb:8", "xla", 14 * GIB),
        ("gemma4b_5k", "h100:8", "cudnn", 14 * GIB),
    ],
)
def test_the_real_step_fits(name, target, attention, limit):
    config = load(name, ["data.row_tokens=2048"])
    result = compile_step(config, find_spec(config.model), target, rows=32)
    assert result.attention == attention
    assert any("cudnn$fmha" in kernel for kernel in result.kernels) == (attention == "cudnn")
    assert result.peak <= limit, f"{result.peak / GIB:.2f} GiB"
    assert result.arguments * 8 >= 12 * count(abstract(find_spec(config.model)))  # master weights and both moments
    # Rows, heads and weights are cut so that nothing but fsdp's own gathers and reductions is needed.
    assert not {"all-to-all", "collective-permute"} & set(result.collectives)
