"""Compile what samples a run's answers for hardware that is not attached: one more token of as many answers as run together.

The weights are gathered over fsdp in the compute type beside the training state, which stays. Caches have the size of the longest
prompts and answers, and nobody stops before: what is counted is the most.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxguard.compat import cudnn_attention_on_any_gpu
from jaxguard.config import Config
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.data.packing import Shape, bucket_size
from jaxguard.guards.backends.jax import sizes
from jaxguard.guards.backends.jax_decoding import SLOTS, Rows, sample_token
from jaxguard.guards.backends.jax_model import Model
from jaxguard.models.decoder import DecodingCache
from jaxguard.models.sharding import FSDP, make_mesh, partition
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table
from jaxguard.plan.compile import Sampling, compile_lowered, roofline, step_flops
from jaxguard.plan.hlo import Collective, CompiledProgram
from jaxguard.plan.targets import Cluster, topology
from jaxguard.train.step import build_program


def compile_sampling(config: Config, spec: Spec, cluster: Cluster) -> Sampling | None:
    """Compile the sampling of a token for `cluster`; None where a step samples nothing, or a server does.

    Raises:
        JaxguardError: no compiler for the cluster, or a mesh that does not fit it.
        OutOfMemoryError: the compiler finds no schedule that fits, which only a TPU's reports.
    """
    settings = config.reinforce or ReinforceConfig()
    exact = settings.reward.kind != "sampled" and config.data.mode == "direct"
    if exact or settings.endpoint or not config.train.objective.is_sampled:
        return None
    mesh = make_mesh(config.mesh, topology(cluster))
    program = build_program(config, spec, mesh, steps=1000)
    compute = program.compute.of_inference(cpu=False)
    prompt = config.data.max_seq_len - settings.max_tokens
    together = min(config.train.batch_size, max(1, settings.batch // settings.answers))
    _, prompts = sizes(together, mesh.size // mesh.shape["tensor"])
    rows = prompts * settings.answers

    def array(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        axes = axes or ("batch", *[None] * (len(shape) - 1))
        sharding = NamedSharding(mesh, partition(axes, shape, mesh.shape, without=FSDP if "embed" in axes else ()))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def cache(count: int, tokens: int) -> DecodingCache:
        leading, axes = (spec.num_layers, count, spec.num_kv_heads), ("layers", "batch", "kv_heads", None, None)
        key = array((*leading, spec.head_dim, tokens), compute.dtype, *axes)
        value = array((*leading, tokens, spec.head_dim), compute.dtype, *axes)
        return DecodingCache(key, value, array((count, tokens), np.int32))

    weights = {
        w.path: array(w.shape(spec), jnp.float32 if "norm" in w.axes else compute.dtype, *w.axes) for w in table(spec)
    }
    batches = math.ceil(config.train.batch_size / prompts)
    slots = settings.max_tokens + (SLOTS if batches > 1 else 0)  # where rows begin one after the other, some are empty
    own, new = cache(prompts, prompt), cache(rows, bucket_size(slots, SLOTS))
    of_rows = Rows(array((rows, 2), np.uint32), *[array((rows,), np.int32)] * 2)
    with jax.set_mesh(mesh), cudnn_attention_on_any_gpu(), compute.matmuls():
        token = jax.jit(sample_token, donate_argnames="new")
        hidden = array((rows, spec.d_model), compute.dtype)
        compiled = compile_lowered(
            token.lower(
                Model(weights, spec, compute, mesh), own, new, hidden, of_rows, jax.ShapeDtypeStruct((), np.int32)
            )
        )
    memory: Any = compiled.memory_analysis()
    hlo = CompiledProgram(compiled.as_text() or "")
    state, gathered, prompts_bytes, answers_bytes = map(bytes_of, (program.state, weights, own, new))
    # Once a step each device gets all others' parts of the weights, and the prompts are computed.
    fsdp = math.prod(mesh.shape[axis] for axis in FSDP if axis in mesh.shape)
    near = max(1, min(fsdp, cluster.linked // mesh.shape["tensor"]))
    gather = Collective("all-gather", "fsdp", fsdp, near, gathered, 1, "weights")
    prefill = step_flops(spec, Shape(prompts * batches, prompt, 1), compute)["model"] / 3 / cluster.devices
    times = partial(roofline, cluster.target, compute.dtype.name)
    of_token = times(hlo.matmul_flops(), hlo.traffic(), hlo.collectives(dict(mesh.shape), cluster.linked))
    once = times(prefill, 0.0, [gather] if fsdp > 1 else [])
    repeats = batches * settings.max_tokens
    return Sampling(
        prompts=prompts, answers=rows, batches=batches, prompt_tokens=prompt, tokens=settings.max_tokens,
        state=state, weights=gathered, caches=2 * prompts_bytes + answers_bytes,
        # What was computed of the prompts stays beside the cache that is made of it.
        peak=state + prompts_bytes + memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        seconds={name: once[name] + repeats * of_token[name] for name in once},
    )  # fmt: skip


def bytes_of(tree: Any) -> int:
    """Bytes of a device's part of sharded arrays."""
    arrays = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
