"""Log-probabilities by the weights that a run starts from, which a preference is relative to.

They are computed once, before the first step, and kept in the run's folder under a key of weights and data: no second model is in
memory, and a resumed run reads them, or computes them from the weights that it started from, never from those that it trained.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxguard.data.encoding import EncodedExample
from jaxguard.data.files import weights_digest
from jaxguard.data.packing import assemble, bucketed, pack, target_spans
from jaxguard.models.sharding import batch_sharding, shard_batch
from jaxguard.train.step import Program
from jaxguard.utils.arrays import DamagedError, read_arrays, write_arrays
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.progress import track

logger = logging.getLogger(__name__)


def with_reference(
    examples: Sequence[EncodedExample],
    program: Program,
    source: Path,
    read: Callable[[], dict[str, Array]],
    path: Path,
    *,
    batch_size: int,
    max_seq_len: int,
    row_multiple: int,
) -> list[EncodedExample]:
    """Give both answers of every example their tokens' log-probabilities by the weights of the checkpoint `source`.

    `read` reads these weights. What `path` holds of them is not computed again. JaxguardError: the file cannot be written, or a
    log-probability is not finite.
    """
    sequences = [sequence for example in examples for sequence in example.sequences]
    counts = [int(sequence.loss_mask.sum()) for sequence in sequences]
    key = reference_key(sequences, source, program)
    try:
        stored = read_arrays(path, key) if jax.process_index() == 0 else None
    except DamagedError as error:
        logger.warning("%s: the reference is computed again", error)
        stored = None
    logprobs = np.zeros(sum(counts), np.float32) if stored is None else stored["logprobs"]
    if not multihost_utils.broadcast_one_to_all(np.int32(stored is not None)):
        scored_sequences = score_targets(sequences, program, read(), batch_size, max_seq_len, row_multiple)
        logprobs = np.concatenate(scored_sequences).astype(np.float32)
        for sequence, own in zip(sequences, scored_sequences, strict=True):
            if not np.isfinite(own).all():
                raise JaxguardError(
                    f"example {sequence.example_id!r}: the reference model's log-probabilities are not finite: the "
                    "checkpoint that the run starts from is damaged"
                )
        if jax.process_index() == 0:
            write_arrays(path, key, {"logprobs": logprobs})
    parts = iter(np.split(np.asarray(multihost_utils.broadcast_one_to_all(logprobs)), np.cumsum(counts)[:-1]))

    def scored(example: EncodedExample) -> EncodedExample:
        own = replace(example, reference=next(parts))
        return own if own.rejected is None else replace(own, rejected=replace(own.rejected, reference=next(parts)))

    return [scored(example) for example in examples]


def reference_key(sequences: Sequence[EncodedExample], source: Path, program: Program) -> str:
    """Hash what decides the log-probabilities: weights, tokens, and the types that are computed in."""
    facts = hashlib.sha256(f"{weights_digest(source)} {program.compute.dtype} {program.compute.matmul_dtype}".encode())
    for sequence in sequences:
        facts.update(f" {len(sequence.tokens)} {int(sequence.loss_mask.sum())} ".encode())
        facts.update(sequence.tokens.astype("<i4").tobytes())
    return facts.hexdigest()


def score_targets(
    sequences: Sequence[EncodedExample],
    program: Program,
    weights: dict[str, Array],
    batch_size: int,
    max_seq_len: int,
    row_multiple: int,
) -> list[np.ndarray]:
    """Return the log-probabilities of each sequence's targets by these weights, as the training step computes them."""
    alone = [replace(sequence, rejected=None, reference=None) for sequence in sequences]
    number = {id(sequence): i for i, sequence in enumerate(alone)}
    parts: list[np.ndarray] = [np.zeros(0, np.float32)] * len(alone)
    for start in track(range(0, len(alone), batch_size), "scoring answers", least=2):
        rows = pack(alone[start : start + batch_size], max_seq_len, row_multiple)
        batch = assemble(rows, bucketed(rows, max_seq_len, row_multiple))
        sharded = shard_batch((batch, batch.target_ids_BM[..., None]), batch_sharding(program.mesh))
        logprobs_BM = np.asarray(program.score(weights, *sharded))[..., 0]
        for r, row in enumerate(rows):
            for sequence, span in target_spans(row):
                parts[number[id(sequence)]] = logprobs_BM[r, span]
    return parts
