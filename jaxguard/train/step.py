"""The one training step, which loop, tests, planner and benchmarks call, its optimizer and its FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxguard.config import Config
from jaxguard.config.train import OptimizerConfig
from jaxguard.data.packing import Batch, Shape
from jaxguard.models.compute import Compute, choose_compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.linear import Buffered, Weights, gradient_buffers
from jaxguard.models.sharding import abstract_state, batch_sharding, replicated, weight_shardings
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table
from jaxguard.train.objectives import Objective, choose_objective, target_logprobs

State = dict[str, Any]
"""weights: path -> float32 array; optimizer: optax's state; step: number of completed steps."""


class Metrics(NamedTuple):
    """Scalars of one step, on the devices."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    target_tokens: Int[Array, ""]
    logged: dict[str, Array]  # what the objective says besides


@runtime_checkable
class TrainStep(Protocol):
    """A jitted function that computes one step and donates the old state."""

    def __call__(self, state: State, batch: Batch, /) -> tuple[State, Metrics]: ...

    def lower(self, state: State, batch: Batch, /) -> jax.stages.Lowered: ...


@dataclass(frozen=True)
class Program:
    """Everything that a run compiles, for one model on one mesh."""

    spec: Spec
    compute: Compute
    mesh: Mesh
    train_step: TrainStep
    score: Callable[
        [dict[str, Array], Batch, Array], Array
    ]  # of ids_BMQ at the targets: log-probabilities BMQ, replicated
    initialize: Callable[[dict[str, Array]], State]  # weights -> state at step 0; donates the weights
    state: State  # its shapes, types and shardings

    def batch(self, shape: Shape) -> Batch:
        """Shapes, types and shardings of a batch."""
        sharding = batch_sharding(self.mesh)
        return Batch.build(shape, partial(jax.ShapeDtypeStruct, sharding=sharding))


def build_program(config: Config, spec: Spec, mesh: Mesh, steps: int) -> Program:
    """Define the jitted functions of a run of `steps` steps; each is compiled on its first use with a batch shape.

    Raises:
        JaxguardError: the requested attention kernel cannot run on this mesh.
    """
    compute = choose_compute(config.model, spec, mesh, config.data.max_seq_len)
    transformation = optimizer(config.optimizer, spec, steps)
    schedule = learning_rate(config.optimizer, steps)
    state = abstract_state(transformation, spec, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    objective = choose_objective(config)
    rows, whole, weights = batch_sharding(mesh), replicated(mesh), weight_shardings(spec, mesh)

    def initialize(weights: dict[str, Array]) -> State:
        return {"weights": weights, "optimizer": transformation.init(weights), "step": jnp.int32(0)}

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        with compute.matmuls():
            loss, gradient, logged = loss_and_gradient(
                state["weights"], batch, objective, spec=spec, compute=compute, accumulation=config.train.accumulation,
                loss_chunk=config.model.loss_chunk,
            )  # fmt: skip
        with jax.named_scope("optimizer"):
            changes, moments = transformation.update(gradient, state["optimizer"], state["weights"])
            weights = optax.apply_updates(state["weights"], changes)
            norm, rate = optax.tree.norm(gradient), jnp.float32(schedule(state["step"]))
        targets = batch.target_weights_BM if batch.target_pairs_BM is None else batch.target_pairs_BM
        metrics = Metrics(loss, norm, rate, jnp.count_nonzero(targets), logged)
        return {"weights": weights, "optimizer": moments, "step": state["step"] + 1}, metrics

    def score(weights: dict[str, Array], batch: Batch, ids_BMQ: Int[Array, "B M Q"]) -> Float[Array, "B M Q"]:
        with compute.matmuls():
            return logprobs(weights, batch, ids_BMQ, spec=spec, compute=compute, loss_chunk=config.model.loss_chunk)

    jitted = (
        jax.jit(train_step, in_shardings=(shardings, rows), out_shardings=(shardings, whole), donate_argnums=0),
        jax.jit(score, in_shardings=(weights, rows, rows), out_shardings=whole),
        jax.jit(initialize, in_shardings=(weights,), out_shardings=shardings, donate_argnums=0),
    )
    return Program(spec, compute, mesh, *jitted, state)


def logprobs(
    weights: Weights, batch: Batch, ids_BMQ: Int[Array, "B M Q"], *, spec: Spec, compute: Compute, loss_chunk: int
) -> Float[Array, "B M Q"]:
    """Compute the log-probabilities of ids at the batch's target positions."""
    decoder = Decoder(spec, weights, compute)
    hidden_BTD = decoder(batch.tokens_BT, batch.positions_BT, batch.ends_BT)
    targets = batch.target_index_BM, ids_BMQ, loss_chunk
    return target_logprobs(hidden_BTD, decoder.head_VD, *targets, compute.matmul_dtype, compute.keep_logits)


def loss_and_gradient(
    weights: dict[str, Array], batch: Batch, objective: Objective, *,
    spec: Spec, compute: Compute, accumulation: int, loss_chunk: int,
) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Array]]:  # fmt: skip
    """Compute the objective over the whole batch, its gradient, float32, and what it logs, in `accumulation` micro-batches."""
    count = objective.count(batch)
    buffers = gradient_buffers(spec, compute)

    def loss_of(variables: dict[str, Array], batch: Batch) -> tuple[Array, dict[str, Array]]:
        buffered = {path: Buffered(weights[path], variable) if path in buffers else variable
                    for path, variable in variables.items()}  # fmt: skip
        logprobs_BM1 = logprobs(
            buffered, batch, batch.target_ids_BM[..., None],
            spec=spec, compute=compute, loss_chunk=loss_chunk,
        )  # fmt: skip
        sums: tuple[Array, dict[str, Array]] = objective.loss(logprobs_BM1[..., 0], batch)
        loss, logged = jax.tree.map(lambda x: x / count, sums)
        return loss, logged

    def gradient_of(batch: Batch) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        (loss, logged), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights | buffers, batch)
        return loss, {path: gradient[path].astype(jnp.float32) for path in weights}, logged

    if accumulation == 1:
        return gradient_of(batch)

    def add(total: Any, micro_batch: Batch) -> tuple[Any, dict[str, Array]]:
        *sums, logged = gradient_of(micro_batch)
        return jax.tree.map(jnp.add, total, tuple(sums)), logged

    def split(x_B: Array) -> Array:
        """Reshape [B, …] to [count, B / count, …], so that every micro-batch has rows of every device and none move."""
        return x_B.reshape(-1, accumulation, *x_B.shape[1:]).swapaxes(0, 1)

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, weights))
    (loss, gradient), logged_A = jax.lax.scan(add, zero, jax.tree.map(split, batch))
    return loss, gradient, jax.tree.map(jnp.sum, logged_A)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear warmup, then decay to the final share at `steps`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_share
    decay_steps = max(1, steps - config.warmup_steps)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_learning_rate_share)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
    # The first step of the warmup has 1 / (warmup + 1) of the peak, not 0.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def optimizer(config: OptimizerConfig, spec: Spec, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam in float32, decoupled decay of matrices only, schedule."""
    decayed = {w.path: "norm" not in w.axes for w in table(spec)}
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def attended_pairs(positions: np.ndarray, window: int | None = None) -> int:
    """Count the (query, key) pairs of causal attention for tokens at these positions of their sequences, self included."""
    keys = positions + 1
    return int((keys if window is None else np.minimum(keys, window)).sum(dtype=np.int64))


def training_flops(spec: Spec, positions: np.ndarray, targets: int) -> float:
    """Count the FLOPs of the matmuls that one step needs, for MFU, without padding and recomputation.

    Forward: 2 per weight and token in the layers; 4 N H per pair of tokens that attend (scores and weighted sum);
    2 V D per target token in the head. The backward pass takes twice that (Chowdhery et al., PaLM, 2022, appendix B,
    with the pairs that the causal and local masks leave instead of T^2).

    `positions` are those of every token that is computed, in its sequence; `targets` is the number of tokens whose loss is taken.
    """
    D, F, H, N, K = spec.d_model, spec.mlp_dim, spec.head_dim, spec.num_heads, spec.num_kv_heads
    layer_weights = D * H * (2 * N + 2 * K) + 3 * D * F
    pairs = [attended_pairs(positions, kind.window) for kind in spec.kinds]
    layers = 2 * layer_weights * spec.num_layers * len(positions)
    attention = 4 * N * H * sum(pairs[kind] for kind in spec.layer_kinds)
    head = 2 * spec.vocab_size * D * targets
    return 3.0 * (layers + attention + head)
