"""Log-probabilities at the target positions only, without ever holding all logits, and the loss."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxguard.models.linear import gather, project
from jaxguard.models.sharding import constrain, num_shards


@jax.named_scope("head")
def target_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    index_BM: Int[Array, "B M"],
    ids_BMQ: Int[Array, "B M Q"],
    chunk: int,
    matmul_dtype: DTypeLike | None = None,
) -> Float[Array, "B M Q"]:
    """Compute the log-probability of vocabulary entries `ids_BMQ` after the tokens at `index_BM`, float32.

    One block of the vocabulary at a time, for all of a device's target positions: the block is gathered over fsdp, as a layer is,
    and its logits are recomputed in the backward pass. They are as many as the logits of `chunk` positions, and a gathered block
    takes no more memory than they do. So what is sent and held does not depend on the number of devices.
    """
    rows, targets = index_BM.shape
    vocabulary, width = head_VD.shape
    positions = rows // num_shards("batch", rows) * targets
    # A gathered row of the head takes as much memory as this many logits of four bytes.
    gathered = width * head_VD.dtype.itemsize // 4 if num_shards("embed", width) > 1 else 0
    blocks = min(vocabulary, math.ceil(max(positions, gathered) / chunk))
    size = math.ceil(vocabulary / blocks)
    # Block k has the entries k, k + blocks, …, so that the devices along `tensor` share each block evenly.
    head_CKD = jnp.pad(head_VD, ((0, size * blocks - vocabulary), (0, 0))).reshape(size, blocks, width)
    head_KCD = constrain(head_CKD.swapaxes(0, 1), None, "vocab", "embed")
    # In float32, so that the blocks' gradients add up in it.
    hidden_BMD = jnp.take_along_axis(hidden_BTD, index_BM[..., None], axis=1).astype(jnp.float32)

    def block(_: None, scanned: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        head_CD, first = scanned
        gathered_CD = gather(head_CD, head_CD, ("vocab", "embed"))
        logits_BMC = constrain(project("BMD,CD->BMC", hidden_BMD, gathered_CD, matmul_dtype), "batch", None, "vocab")
        entry_C = first + blocks * jnp.arange(size)
        logits_BMC = jnp.where(entry_C < vocabulary, logits_BMC, jnp.finfo(jnp.float32).min)
        # A masked sum instead of an index: it needs no gather across the vocabulary's devices.
        chosen = [
            jnp.sum(jnp.where(entry_C == ids_BMQ[..., q, None], logits_BMC, 0), -1) for q in range(ids_BMQ.shape[-1])
        ]
        return None, (jax.nn.logsumexp(logits_BMC, axis=-1), jnp.stack(chosen, axis=-1))

    scanned = (head_KCD, jnp.arange(blocks))
    _, (sums_KBM, chosen_KBMQ) = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), None, scanned)
    return jnp.sum(chosen_KBMQ, axis=0) - jax.nn.logsumexp(sums_KBM, axis=0)[..., None]


@jax.named_scope("loss")
def token_weighted_loss(
    logprobs_BM: Float[Array, "B M"], weights_BM: Float[Array, "B M"], total_weight: Float[Array, ""]
) -> Float[Array, ""]:
    """Sum the negative log-likelihood over these targets, and divide by the weight of all targets of the global batch.

    Summing this over micro-batches gives the loss of the whole batch, however its examples were packed or split.
    """
    return -jnp.sum(logprobs_BM * weights_BM) / total_weight
