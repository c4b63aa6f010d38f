"""Log-probabilities at the target positions only, without holding all logits, and objectives, which are functions of them."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxguard.config import Config
from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.config.train import ObjectiveConfig
from jaxguard.data.packing import Batch
from jaxguard.models.linear import DOTS, gather, project
from jaxguard.models.sharding import constrain, num_shards


@jax.named_scope("head")
def target_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    index_BM: Int[Array, "B M"],
    ids_BMQ: Int[Array, "B M Q"],
    chunk: int,
    matmul_dtype: DTypeLike | None = None,
    keep_logits: bool = False,
) -> Float[Array, "B M Q"]:
    """Compute the log-probability of vocabulary entries `ids_BMQ` after the tokens at `index_BM`, float32.

    One block of the vocabulary at a time, for all of a device's target positions: the block is gathered over fsdp, as a layer is,
    and its logits are recomputed in the backward pass. They are as many as the logits of `chunk` positions, and a gathered block
    takes no more memory than they do. So what is sent and held does not depend on the number of devices. `keep_logits`: hold all of
    them instead of computing them again.
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

    kept = jax.checkpoint_policies.save_only_these_names(DOTS) if keep_logits else None
    scanned = (head_KCD, jnp.arange(blocks))
    _, (sums_KBM, chosen_KBMQ) = jax.lax.scan(jax.checkpoint(block, prevent_cse=False, policy=kept), None, scanned)
    return jnp.sum(chosen_KBMQ, axis=0) - jax.nn.logsumexp(sums_KBM, axis=0)[..., None]


@runtime_checkable
class Objective(Protocol):
    """What a step minimizes: a mean over the examples or targets of a batch, whatever rows and micro-batches they are in."""

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Return what the mean is divided by, for the whole batch."""
        ...

    def loss(self, logprobs_BM: Float[Array, "B M"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss of a micro-batch before that division, and with it what else is logged."""
        ...


class Likelihood:
    """Supervised fine-tuning: the negative log-likelihood, a mean over all target tokens by their weights."""

    def count(self, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(batch.target_weights_BM)

    @jax.named_scope("loss")
    def loss(self, logprobs_BM: Float[Array, "B M"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
        return -jnp.sum(logprobs_BM * batch.target_weights_BM), {}


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation, a mean over pairs; of each, the gain is that of an answer's log-probability on the reference.

    dpo: -log sigmoid(beta (gain of the chosen answer - gain of the rejected one)), of sums over tokens, with a share
    `label_smoothing` of the opposite (Rafailov et al. 2023; Mitchell 2023). ipo: (difference - 1 / (2 beta))^2, of means over
    tokens (Azar et al. 2023; TRL). Each is multiplied by the pair's weight; then `sft_weight` times the mean negative
    log-likelihood of the chosen answer's tokens is added.
    """

    settings: ObjectiveConfig

    def count(self, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(batch.pair_weights_BP > 0, dtype=jnp.float32)

    @jax.named_scope("loss")
    def loss(self, logprobs_BM: Float[Array, "B M"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
        settings, weights_BP = self.settings, batch.pair_weights_BP
        of_pairs = partial(_sum_by_answer, batch)
        gains_BM, ones_BM = logprobs_BM - batch.target_reference_BM, jnp.ones_like(logprobs_BM)
        chosen_BP, rejected_BP = (of_pairs(gains_BM, sign) for sign in (1, -1))
        real_BP = weights_BP > 0
        if settings.kind == "ipo":
            lengths = [jnp.maximum(of_pairs(ones_BM, sign), 1) for sign in (1, -1)]
            difference_BP = chosen_BP / lengths[0] - rejected_BP / lengths[1]
            loss_BP = (difference_BP - 1 / (2 * settings.beta)) ** 2
        else:
            difference_BP = chosen_BP - rejected_BP
            right_BP, wrong_BP = (jax.nn.log_sigmoid(sign * settings.beta * difference_BP) for sign in (1, -1))
            loss_BP = -(1 - settings.label_smoothing) * right_BP - settings.label_smoothing * wrong_BP
        likelihood = jnp.sum(logprobs_BM * batch.target_weights_BM)
        logged = {
            "preference/accuracy": real_BP * (difference_BP > 0),
            "preference/margin": real_BP * settings.beta * difference_BP,
            "preference/chosen_gain": chosen_BP,
            "preference/rejected_gain": rejected_BP,
        }
        total = jnp.sum(weights_BP * loss_BP) - settings.sft_weight * likelihood
        return total, {name: jnp.sum(x_BP) for name, x_BP in logged.items()}


@dataclass(frozen=True)
class PolicyGradient:
    """Minus the advantage of sampled answers, times the ratio of each token's probability to that when it was sampled.

    grpo: the ratio of a token, clipped where it is to the answer's advantage (Shao et al. 2024; PPO's). gspo: the geometric mean
    of its answer's (Zheng et al. 2025). cispo: capped, without a gradient, as the weight of the log-probability (MiniMax 2025).
    Where the model that trains is the one that sampled, all ratios are 1, and all three have the gradient of the expected reward.
    """

    kind: Literal["grpo", "gspo", "cispo"]
    settings: ReinforceConfig

    def count(self, batch: Batch) -> Float[Array, ""]:
        if self.settings.average == "tokens":
            return jnp.sum(batch.target_pairs_BM > 0, dtype=jnp.float32)
        return jnp.sum(jnp.max(batch.target_pairs_BM, axis=1), dtype=jnp.float32)  # a row's answers are 1, 2, …

    @jax.named_scope("loss")
    def loss(self, logprobs_BM: Float[Array, "B M"], batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
        kind, settings, answers_BM = self.kind, self.settings, batch.target_pairs_BM
        real_BM = answers_BM > 0
        lengths_BP = jnp.maximum(_sum_by_answer(batch, jnp.ones_like(logprobs_BM)), 1)

        def of_answer(x_BP: Array) -> Float[Array, "B M"]:
            """Give each target what belongs to its answer, and padding 0."""
            return jnp.take_along_axis(jnp.pad(x_BP, ((0, 0), (1, 0))), answers_BM, axis=1)

        def mean(x_BM: Array) -> Float[Array, ""]:
            """Sum over tokens, or the answers' means of them: what becomes the mean when it is divided by `count`."""
            x_BM = jnp.where(real_BM, x_BM, 0.0)
            return jnp.sum(x_BM if settings.average == "tokens" else _sum_by_answer(batch, x_BM) / lengths_BP)

        advantages_BM = of_answer(batch.pair_weights_BP)
        log_ratios_BM = jnp.where(real_BM, logprobs_BM - batch.target_reference_BM, 0)
        if kind == "gspo":
            log_ratios_BM = of_answer(_sum_by_answer(batch, log_ratios_BM) / lengths_BP)
        ratios_BM = jnp.exp(log_ratios_BM)
        if kind == "cispo":
            capped_BM = jnp.minimum(ratios_BM, 1 + settings.clip_high)
            gains_BM = jax.lax.stop_gradient(capped_BM) * advantages_BM * logprobs_BM
            clipped_BM = capped_BM < ratios_BM
        else:
            within_BM = jnp.clip(ratios_BM, 1 - settings.clip_low, 1 + settings.clip_high)
            gains_BM = jnp.minimum(ratios_BM * advantages_BM, within_BM * advantages_BM)
            clipped_BM = gains_BM < ratios_BM * advantages_BM  # they have no gradient
        logged = {
            "policy/ratio": ratios_BM,
            "policy/ratio_error": jnp.abs(ratios_BM - 1),
            "policy/clipped": clipped_BM,
            "policy/kl": ratios_BM - 1 - log_ratios_BM,  # Schulman's estimate of that to the model that sampled
        }
        constant = settings.average == "constant"
        gain = jnp.sum(jnp.where(real_BM, gains_BM, 0)) / settings.max_tokens if constant else mean(gains_BM)
        return -gain, {name: mean(x_BM) for name, x_BM in logged.items()}


def _sum_by_answer(batch: Batch, x_BM: Array, sign: int = 1) -> Float[Array, "B P"]:
    """Sum over the targets of each pair's chosen answer, sign 1, or rejected one, -1."""
    answers_BM = jnp.maximum(sign * batch.target_pairs_BM, 0)
    segments = batch.pair_weights_BP.shape[1] + 1
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=segments))(x_BM, answers_BM)[:, 1:]


def choose_objective(config: Config) -> Objective:
    settings = config.train.objective
    match settings.kind:
        case "sft":
            return Likelihood()
        case "dpo" | "ipo":
            return Preference(settings)
        case kind:
            return PolicyGradient(kind, config.reinforce or ReinforceConfig())
