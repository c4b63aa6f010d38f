"""A Backend that computes in this process with JAX, over the training mesh.

Verdict probabilities come from log-odds of two next tokens, which are computed as in training: prompts are packed into rows,
which hold the common prefix of all prompts (policy, chat header) once, and go through the same attention kernels. A prompt that
is the beginning of another one is scored within it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import KERNEL_MULTIPLE, Batch, assemble, bucket_size, bucketed, pack
from jaxguard.guards.backends.sampler import Model, Sampling, check_prompts, common_prefix, generate, place_model
from jaxguard.guards.protocol import Completion
from jaxguard.models.compute import Compute, choose_compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.hf_io.checkpoints import check_vocabulary, read_weights
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import Spec, UnsupportedModelError, read_spec
from jaxguard.utils.errors import JaxguardError


@dataclass(frozen=True)
class JaxBackend:
    """Implements protocol.Backend; `max_seq_len` is that of the packed rows in which verdicts are scored."""

    model: Model
    settings: EvaluateConfig
    max_seq_len: int
    workers: int = 1

    @property
    def group(self) -> int:
        return max(1, self.settings.batch // max(1, self.settings.generations))

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...], /
    ) -> list[list[Completion]]:
        settings = self.settings
        sampling = Sampling(settings.temperature, settings.top_p, max_tokens, stop_ids, settings.seed, n)
        return generate(self.model, prompts, sampling, rows=settings.batch)

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], /) -> list[float]:
        return next_log_odds(self.model, prefixes, pairs, max_seq_len=self.max_seq_len)


def load_backend(folder: Path, config: Config, settings: EvaluateConfig) -> JaxBackend:
    """Read a checkpoint onto the config's mesh.

    Raises:
        JaxguardError: the checkpoint cannot be read, our decoder lacks its architecture, or the mesh does not fit the devices.
    """
    try:
        spec = read_spec(folder)
    except UnsupportedModelError as error:
        raise JaxguardError(
            f"{error}. JAX cannot compute this guard, SGLang may: set evaluate.backend=sglang, or serve it and give the "
            "guard the server's endpoint"
        ) from None
    check_vocabulary(folder, spec)
    mesh = make_mesh(config.mesh)
    compute = choose_compute(config.model, spec, mesh, config.data.max_seq_len)
    weights = read_weights(folder, spec, weight_shardings(spec, mesh), compute.matmul_dtype or compute.dtype)
    return JaxBackend(place_model(spec, weights, compute, mesh), settings, config.data.max_seq_len)


def next_log_odds(
    model: Model, prompts: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], *, max_seq_len: int
) -> list[float]:
    """After each prompt, the log-probability of the first token of its pair less that of the second.

    Packed rows have `max_seq_len` tokens, more where a prompt is longer; each device computes one row at a time.

    Raises:
        JaxguardError: a prompt is empty, or too long for the model.
    """
    check_prompts(model.spec, prompts, 1)
    if not prompts:
        return []
    odds = np.zeros(len(prompts))
    sequences = _sequences(prompts)
    longest = max(len(sequence.tokens) for sequence, _ in sequences)
    max_seq_len = max(max_seq_len, bucket_size(longest, KERNEL_MULTIPLE))
    ends_in = {id(sequence): ends for sequence, ends in sequences}
    rows = pack([sequence for sequence, _ in sequences], max_seq_len, model.row_multiple)
    with model.on_mesh():
        for start in range(0, len(rows), model.row_multiple):
            part = rows[start : start + model.row_multiple]
            batch = assemble(part, bucketed(part, max_seq_len, model.row_multiple))
            pairs_BM2 = np.zeros((*batch.target_ids_BM.shape, 2), np.int32)
            targets = {r: [i for sequence in row for i in ends_in[id(sequence)]] for r, row in enumerate(part) if row}
            for r, own in targets.items():
                pairs_BM2[r, : len(own)] = [pairs[i] for i in own]
            odds_BM = np.asarray(_log_odds(model.weights, *model.put((batch, pairs_BM2)), **model.static))
            for r, own in targets.items():
                odds[own] = odds_BM[r, : len(own)]
    return odds.tolist()


def _sequences(prompts: Sequence[Sequence[int]]) -> list[tuple[EncodedExample, list[int]]]:
    """Few sequences in which every prompt ends somewhere before the last token; with each, the prompts that do, in order.

    A sequence is the longest of its prompts and a token after it, whichever; targets are the tokens after each.
    """
    prefix = np.asarray(prompts[0][: common_prefix(prompts)], np.int32).tobytes()
    # Backwards, so that what continues a prompt comes before it.
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]), reverse=True)
    groups: list[list[int]] = []
    for i in order:
        shortest = prompts[groups[-1][0]] if groups else ()
        if len(prompts[i]) < len(shortest) and tuple(shortest[: len(prompts[i])]) == tuple(prompts[i]):
            groups[-1].insert(0, i)
        else:
            groups.append([i])
    sequences = []
    for group in groups:
        tokens = np.asarray([*prompts[group[-1]], 0], np.int32)
        target = np.isin(np.arange(len(tokens)), [len(prompts[i]) for i in group])
        example = EncodedExample("", Mode.DIRECT, tokens, target, (), (), cut=False, shared_prefix=prefix)
        sequences.append((example, group))
    return sequences


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
