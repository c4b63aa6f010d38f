"""Log-odds of two next tokens after a prompt: what verdict probabilities are computed from.

Computed as in training: prompts are packed into rows, which hold the common prefix of all prompts (policy, chat header) once, and
go through the same attention kernels. A prompt that is the beginning of another one is scored within it.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import KERNEL_MULTIPLE, Batch, assemble, bucket_size, bucketed, pack
from jaxguard.guards.backends.sampler import Model, check_prompts, common_prefix
from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.spec import Spec


def next_log_odds(
    model: Model, prompts: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], *, max_seq_len: int
) -> list[float]:
    """After each prompt, the log-probability of the first token of its pair less that of the second.

    Args:
        model: see `place_model`.
        prompts: token ids.
        pairs: two tokens for each prompt.
        max_seq_len: tokens of a packed row, more where a prompt is longer; each device computes one row at a time.

    Raises:
        JaxguardError: a prompt is empty, or too long for the model.
    """
    check_prompts(model.spec, prompts, 1)
    if not prompts:
        return []
    odds = np.zeros(len(prompts))
    packed = _pack(prompts)
    longest = max(len(example.sequence.tokens) for example in packed)
    max_seq_len = max(max_seq_len, bucket_size(longest, KERNEL_MULTIPLE))
    prompts_in = {id(example.sequence): example.prompts for example in packed}
    rows = pack([example.sequence for example in packed], max_seq_len, model.row_multiple)
    with model.on_mesh():
        for start in range(0, len(rows), model.row_multiple):
            part = rows[start : start + model.row_multiple]
            batch = assemble(part, bucketed(part, max_seq_len, model.row_multiple))
            pairs_BM2 = np.zeros((*batch.target_ids_BM.shape, 2), np.int32)
            indices = [
                (r, [i for sequence in row for i in prompts_in[id(sequence)]]) for r, row in enumerate(part) if row
            ]
            for r, targets in indices:
                pairs_BM2[r, : len(targets)] = [pairs[i] for i in targets]
            odds_BM = np.asarray(
                _log_odds(model.weights, *model.put((batch, pairs_BM2)), spec=model.spec, compute=model.compute)
            )
            for r, targets in indices:
                odds[targets] = odds_BM[r, : len(targets)]
    return odds.tolist()


class _Packed(NamedTuple):
    """A sequence, and the prompts that end within it, in order."""

    sequence: EncodedExample
    prompts: list[int]


def _pack(prompts: Sequence[Sequence[int]]) -> list[_Packed]:
    """Few sequences in which every prompt ends somewhere before the last token."""
    head = np.asarray(prompts[0][: common_prefix(prompts)], np.int32).tobytes()
    # Backwards, so that what continues a prompt comes before it.
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]), reverse=True)
    groups: list[list[int]] = []
    for i in order:
        shortest = prompts[groups[-1][0]] if groups else ()
        if len(prompts[i]) < len(shortest) and tuple(shortest[: len(prompts[i])]) == tuple(prompts[i]):
            groups[-1].insert(0, i)
        else:
            groups.append([i])
    return [_Packed(_sequence(prompts, group, head), group) for group in groups]


def _sequence(prompts: Sequence[Sequence[int]], group: Sequence[int], head: bytes) -> EncodedExample:
    """The longest prompt and a token after it, whichever; targets are the tokens after each."""
    tokens = np.asarray([*prompts[group[-1]], 0], np.int32)
    target = np.isin(np.arange(len(tokens)), [len(prompts[i]) for i in group])
    return EncodedExample("", Mode.DIRECT, tokens, target, probes=(), answers=(), cut=False, shared_prefix=head)


@partial(jax.jit, static_argnames=("spec", "compute"))
def _log_odds(
    weights: dict[str, Array], batch: Batch, pairs_BM2: Int[Array, "B M 2"], *, spec: Spec, compute: Compute
) -> Float[Array, "B M"]:
    """From the difference of the two tokens' rows of the head: the other logits cancel out."""
    decoder = Decoder(spec, weights, compute)
    hidden_BTD = decoder(batch.tokens_BT, batch.positions_BT, batch.segments_BT, batch.prefixes_BT)
    hidden_BMD = jnp.take_along_axis(hidden_BTD, batch.target_index_BM[..., None], axis=1)
    pairs_BM2D = jnp.take(decoder.head_VD, pairs_BM2, axis=0).astype(jnp.float32)
    return jnp.sum(hidden_BMD * (pairs_BM2D[:, :, 0] - pairs_BM2D[:, :, 1]), axis=-1)
