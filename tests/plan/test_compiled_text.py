"""What the compiled step of an absent GPU or TPU does in which type, and in which order: two small layers."""

import re
from dataclasses import replace

import jax
import pytest

from jaxguard.compat import cudnn_attention_on_any_gpu
from jaxguard.config import load
from jaxguard.data.packing import Shape
from jaxguard.models.sharding import make_mesh
from jaxguard.plan.compile import find_spec
from jaxguard.plan.targets import find_cluster, topology
from jaxguard.train.step import build_program


def compiled(target: str, *overrides: str, **options: bool) -> str:
    config = load("llama8b_5k", ["data.max_seq_len=512", *overrides])
    spec = find_spec(config.model)
    spec = replace(spec, num_layers=2, layer_kinds=spec.layer_kinds[:2], d_model=1024, mlp_dim=1024, vocab_size=4096)
    mesh = make_mesh(config.mesh, topology(find_cluster(target)))
    program = build_program(config, spec, mesh, steps=10)
    with jax.set_mesh(mesh), cudnn_attention_on_any_gpu():
        lowered = program.train_step.lower(program.state, program.batch(Shape(8, 512, 128)))
        return lowered.compile(compiler_options=options).as_text()


@pytest.mark.aot
@pytest.mark.parametrize("target", ["a100-80gb:8", "h100:8"])
def test_gradients_of_norms_are_summed_in_float32(target):
    sums = re.findall(r"= (\w+)\[\d+\]\S* reduce\(.*norm\)?/reduce_sum", compiled(target))
    assert len(sums) >= 3
    assert set(sums) == {"f32"}


@pytest.mark.aot
@pytest.mark.parametrize(("target", "float32"), [("a100-80gb:8", True), ("v5e:8", False)])
def test_float32_is_the_type_of_a_gpus_matmuls_too(target, float32):
    """Without a precision a GPU takes TF32; a TPU multiplies in bfloat16, as documented."""
    text = compiled(target, "model.compute_dtype=float32", "model.attention=xla")
    products = re.findall(r"= f32\[.* (?:dot|convolution)\(.*", text)
    assert products
    assert {"operand_precision={highest,highest}" in product for product in products} == {float32}


@pytest.mark.aot
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_flag_makes_a_gpus_sums_deterministic(deterministic):
    """A scatter to indices that are not unique adds atomically, in any order: docs/resume.md."""
    text = compiled("a100-80gb:8", xla_gpu_exclude_nondeterministic_ops=deterministic)
    scatters = [line for line in text.splitlines() if " scatter(" in line]
    assert scatters
    assert all("unique_indices=true" in line for line in scatters) == deterministic
