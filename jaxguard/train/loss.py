"""Log-probabilities at the target positions only, without ever holding all logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxguard.models.axes import constrain
from jaxguard.models.decoder import project


def target_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    index_BM: Int[Array, "B M"],
    ids_BMQ: Int[Array, "B M Q"],
    chunk: int,
) -> Float[Array, "B M Q"]:
    """Log-probability of vocabulary entries `ids_BMQ` after the tokens at `index_BM`, float32.

    Works on about `chunk` target positions of the batch at a time and recomputes their logits in the backward pass. Logits are
    cut over the vocabulary on tensor and fsdp together (models/axes.py), which is why hidden states are gathered over fsdp
    here: a chunk of them is far smaller than the head.
    """
    rows, targets = index_BM.shape
    width = max(1, min(targets, chunk // rows))
    padding = -targets % width
    hidden_BMD = jnp.take_along_axis(hidden_BTD, index_BM[..., None], axis=1)

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        return x.reshape(rows, -1, width, x.shape[-1]).swapaxes(0, 1)

    @jax.checkpoint
    def logprobs(hidden_BCD: Array, ids_BCQ: Array) -> Array:
        hidden_BCD = constrain(hidden_BCD, "copies", None, None)
        logits_BCV = project("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
        logits_BCV = constrain(logits_BCV, "copies", None, "vocab")
        normaliser_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A masked sum instead of an index: it needs no gather across the vocabulary's devices.
        vocabulary_V = jnp.arange(logits_BCV.shape[-1])
        chosen = [
            jnp.sum(jnp.where(vocabulary_V == ids_BCQ[..., q, None], logits_BCV, 0), -1)
            for q in range(ids_BCQ.shape[-1])
        ]
        return jnp.stack(chosen, axis=-1) - normaliser_BC[..., None]

    chunks = jax.lax.map(lambda x: logprobs(*x), (chunked(hidden_BMD), chunked(ids_BMQ)))
    return chunks.swapaxes(0, 1).reshape(rows, -1, ids_BMQ.shape[-1])[:, :targets]


def token_weighted_loss(
    logprobs_BM: Float[Array, "B M"], weights_BM: Float[Array, "B M"], total_weight: Float[Array, ""]
) -> Float[Array, ""]:
    """Negative log-likelihood summed over these targets, divided by the weight of all targets of the global batch.

    Summing this over micro-batches gives the loss of the whole batch, however its examples were packed or split.
    """
    return -jnp.sum(logprobs_BM * weights_BM) / total_weight
