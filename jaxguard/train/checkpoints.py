"""Checkpoints of the training state: written by Orbax in the background, verified when read.

A checkpoint is the folder checkpoints/STEP, where STEP is the number of completed steps:

    weights/   the weights alone, which is all that export and evaluation read
    rest/      the optimizer's state and the step
    about/     JSON: the model's fingerprint, the validation loss, and shape, type and checksum of every array

Orbax writes into a temporary folder and renames it when all is on disk, so a killed save leaves no half checkpoint. It notices a
truncated or missing file, but not a changed byte inside an array's data (measured with 0.12.8: a flipped bit is read back without
complaint). So every array has a checksum, which its devices compute before the save and after the restore, on any mesh.
"""

import errno
import gc
import hashlib
import itertools
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, UInt32

from jaxguard.config.train import CheckpointConfig
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import disk_steps, write_atomically
from jaxguard.utils.parse import Fields, check, parse_json

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""A pytree of jax.Array whose key "weights" holds the weights by path."""

Target = Callable[[Path, dict[str, Any]], State]
"""From a checkpoint's folder and description to the abstract items to read; raises JaxguardError for another model."""


class CorruptError(Exception):
    """This checkpoint cannot be used; another one may be."""


@dataclass
class Checkpoints:
    """The checkpoints of one run. Call every method on every process."""

    folder: Path
    fingerprint: str  # identifies the model; a checkpoint with another one is refused
    _manager: ocp.CheckpointManager
    _losses: dict[int, float | None]
    _saving: int | None = None

    def save(self, step: int, state: State, validation_loss: float | None = None) -> None:
        """Begin to write the checkpoint of a number of completed steps, unless it exists; return when the state may be donated.

        The validation loss ranks it among the best; None or a non-finite number leaves it out.

        Raises:
            JaxguardError: this checkpoint, or the previous one, could not be written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        loss = validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None
        self._losses[step] = loss
        self._saving = step
        items = _items(state)
        about = {"step": step, "fingerprint": self.fingerprint, "validation_loss": loss, "arrays": describe(items)}
        args: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args["about"] = ocp.args.JsonSave(about | {"sha256": _sha256(about)})
        with self._explain_errors():
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def rank(self, step: int, validation_loss: float) -> None:
        """Note the validation loss of a checkpoint that was saved without one, if there is this checkpoint: a stop saves first."""
        self.wait()
        if step not in self._manager.all_steps():
            return
        path = self.folder / str(step)
        about = read_description(path) | {
            "validation_loss": validation_loss if math.isfinite(validation_loss) else None
        }
        self._losses[step] = about["validation_loss"]
        if jax.process_index() == 0:
            write_atomically(path / "about" / "metadata", json.dumps(about | {"sha256": _sha256(about)}))

    def restore(self, abstract_state: State) -> tuple[int, State] | None:
        """Read the newest valid checkpoint as (step, state); None when there is no checkpoint.

        Newer ones that are corrupt are reported and renamed to STEP.corrupt, so that the run can save these steps again.
        `abstract_state` holds the state's shapes, types and shardings, as jax.ShapeDtypeStruct; on any mesh.

        Raises:
            JaxguardError: all checkpoints are corrupt, or the newest valid one is of another model.
        """
        self.wait()
        abstract_items = _items(abstract_state)
        here: dict[str, Any] = {"fingerprint": self.fingerprint}
        here |= {key: (x.shape, str(x.dtype)) for item in abstract_items.values() for key, x in _named_leaves(item)}

        def target(path: Path, description: dict[str, Any]) -> State:
            saved = {"fingerprint": description["fingerprint"]}
            for arrays in description["arrays"].values():
                saved |= {key: (tuple(array["shape"]), array["dtype"]) for key, array in arrays.items()}
            _refuse_other_model(path, saved, here)
            return abstract_items

        steps = sorted(self._manager.all_steps())
        if not steps:
            return None
        step, items, corrupt = _read_newest(self.folder, steps, target)
        if corrupt:
            for bad in corrupt if jax.process_index() == 0 else ():
                names = (self.folder / f"{bad}.corrupt{n or ''}" for n in itertools.count())
                new = (self.folder / str(bad)).rename(next(name for name in names if not name.exists()))
                logger.warning("resuming from the checkpoint of step %d instead; the corrupt one is now %s", step, new)
            multihost_utils.sync_global_devices("jaxguard: corrupt checkpoints renamed")
            self._manager.reload()
        return step, {"weights": items["weights"], **items["rest"]}

    def wait(self) -> None:
        """Return when the checkpoint being written is on disk.

        Raises:
            JaxguardError: it could not be written.
        """
        with self._explain_errors():
            self._manager.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        """Finish the checkpoint being written. No other method may be called afterwards."""
        with self._explain_errors():
            self._manager.close()

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn the error of a failed save into one that says where the run can resume."""
        try:
            yield
        except Exception as error:
            steps = [s for s in disk_steps(self.folder) if s != self._saving]
            last = f"the last one on disk is step {steps[-1]}" if steps else "there is none before it"
            reason = str(error) or type(error).__name__
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            words = ("No space left", "Disk quota exceeded", "File too large", "ENOSPC", "EDQUOT", "EFBIG")
            if full or any(word in reason for word in words):
                free = shutil.disk_usage(self.folder).free / 2**30
                reason = f"no space on the disk ({free:.1f} GiB free there now), or a limit on file sizes"
            raise JaxguardError(
                f"the checkpoint of step {self._saving} could not be written to {self.folder}: {reason}. "
                f"Correct that and run the command again: the run resumes from its last checkpoint ({last})."
            ) from error


@contextmanager
def open_checkpoints(folder: Path, config: CheckpointConfig, fingerprint: str) -> Iterator[Checkpoints]:
    """Open the checkpoints in `folder`, which is created; leftovers of a killed save are removed.

    On leaving, the save in progress is finished, also when an error or a stop passes through; but an error on one of
    several hosts cannot wait for the others to finish theirs.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    losses: dict[int, float | None] = {}
    for step in disk_steps(folder):
        with suppress(CorruptError):
            losses[step] = read_description(folder / str(step))["validation_loss"]
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        preservation_policy=_Preservation(config.keep_last, config.keep_best, losses),
        enable_async_checkpointing=True,
    )
    checkpoints = Checkpoints(folder, fingerprint, ocp.CheckpointManager(folder, options=options), losses)
    try:
        yield checkpoints
    except BaseException:
        try:
            if jax.process_count() == 1:
                checkpoints.close()
        except JaxguardError as error:
            logger.warning("%s", error)  # the error that is passing through matters more
        raise
    checkpoints.close()


@dataclass
class _Preservation:
    """Orbax's policy of which checkpoints to preserve: the last, and the best by validation loss."""

    last: int
    best: int
    losses: Mapping[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:  # noqa: ARG002 (Orbax's signature)
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = sorted((loss, step) for step in steps if (loss := self.losses.get(step)) is not None)
        preserved = {*sorted(steps)[-self.last :], *(step for _, step in ranked[: self.best])}
        return [step in preserved for step in steps]


def read_checkpoint_weights(
    folder: Path, shardings: Mapping[str, Sharding] | None = None, step: int | None = None
) -> dict[str, jax.Array]:
    """Read the weights alone, by path, of a run's folder or its checkpoints folder. Changes nothing on disk.

    `shardings` is path -> sharding; None puts everything on the first local device. Without a step it is the newest valid
    checkpoint, and those that are corrupt are reported.

    Raises:
        JaxguardError: no such checkpoint, or corrupt, or `shardings` names other weights.
    """
    folder = folder.absolute()
    folder = folder / "checkpoints" if disk_steps(folder / "checkpoints") else folder
    steps = disk_steps(folder)
    if not steps:
        raise JaxguardError(f"{folder} holds no checkpoint; give a run's folder, or its checkpoints folder")
    if step is not None and step not in steps:
        raise JaxguardError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")

    def target(path: Path, description: dict[str, Any]) -> State:
        arrays = description["arrays"]["weights"]
        where = shardings or dict.fromkeys(arrays, SingleDeviceSharding(jax.local_devices()[0]))
        _refuse_other_model(path, dict.fromkeys(arrays, "weight"), dict.fromkeys(where, "weight"))
        return {
            "weights": {k: jax.ShapeDtypeStruct(a["shape"], a["dtype"], sharding=where[k]) for k, a in arrays.items()}
        }

    _, items, _ = _read_newest(folder, steps if step is None else [step], target)
    weights: dict[str, jax.Array] = items["weights"]
    return weights


def write_checkpoint_weights(folder: Path, weights: Mapping[str, jax.Array], fingerprint: str = "") -> None:
    """Write weights alone as the checkpoint of step 0 in `folder`, for read_checkpoint_weights."""
    with open_checkpoints(folder, CheckpointConfig(), fingerprint) as checkpoints:
        checkpoints.save(0, {"weights": dict(weights)})


def _items(state: State) -> State:
    rest = {k: v for k, v in state.items() if k != "weights"}
    return {"weights": state["weights"]} | ({"rest": rest} if rest else {})


def _read_newest(folder: Path, steps: Sequence[int], target: Target) -> tuple[int, State, list[int]]:
    """Return (step, items, newer steps that are corrupt) of the newest valid checkpoint."""
    corrupt: list[int] = []
    for step in reversed(steps):
        try:
            return step, _read(folder / str(step), target), corrupt
        except CorruptError as error:
            logger.warning("the checkpoint %s is corrupt: %s", folder / str(step), error)
            corrupt.append(step)
    raise JaxguardError(
        f"every checkpoint in {folder} is corrupt ({', '.join(map(str, corrupt))}): see the warnings above. "
        "Restore one from a copy, or delete the folder to start again."
    )


def _read(path: Path, target: Target) -> State:
    """Read and verify one checkpoint. All processes return its items, or all raise CorruptError."""
    problem, description, items = None, {}, {}
    try:
        description = read_description(path)
        items = _restore(path, target(path, description))
    except CorruptError as error:
        problem = error
    # The checksums are sums over all processes' shards, so all must compute them or none.
    if not np.all(multihost_utils.process_allgather(np.asarray(problem is None))):
        raise problem or CorruptError("another process cannot read it")
    for name, arrays in describe(items).items():
        saved = description["arrays"][name]
        changed = [key for key, array in arrays.items() if array["checksum"] != saved[key]["checksum"]]
        if changed:
            raise CorruptError(f"{name}: {len(changed)} arrays changed on disk, such as {', '.join(changed[:3])}")
    return items


def _restore(path: Path, target: State) -> State:
    """Read the items as this process sees them, without waiting for the others.

    Orbax's checkpointers end a restore with a collective, in which the others would wait forever when one process finds its shards
    corrupt; its handlers do not.
    """
    handler = ocp.StandardCheckpointHandler()
    try:
        return {k: handler.restore(path / k, args=ocp.args.StandardRestore(v)) for k, v in target.items()}
    except PermissionError as error:
        raise JaxguardError(f"the checkpoint {path} cannot be opened: {error}") from None
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # not the checkpoint's fault
        problem = f"{type(error).__name__}: {_first_line(error)}"
    finally:
        handler.close()
    # The other reads of a failed restore fail too, and each would print a traceback when it is freed later.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook
    raise CorruptError(problem)


@dataclass(frozen=True)
class _Array:
    """A saved array; the type is NumPy's or one of ml_dtypes."""

    shape: list[int]
    dtype: str
    checksum: int


@dataclass(frozen=True)
class _Description:
    """The shape of what read_description returns."""

    step: int
    fingerprint: str
    validation_loss: float | None
    arrays: dict[str, dict[str, _Array]]


def read_description(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds: step, fingerprint, validation loss, and shape, type and checksum of each array."""
    try:
        text = (path / "about" / "metadata").read_text(encoding="utf-8")
        description = parse_json(text, Fields, "its description", finite=False)
        if description.pop("sha256", None) != _sha256(description):
            raise CorruptError("its description changed on disk")
        check(description, _Description, "its description")
    except PermissionError as error:
        raise JaxguardError(f"the checkpoint {path} cannot be opened: {error}") from None
    except (OSError, UnicodeDecodeError, JaxguardError) as error:
        raise CorruptError(f"its description is malformed: {_first_line(error)}") from error
    if description["step"] != int(path.name):
        raise CorruptError(f"it is named {path.name} but was saved at step {description['step']}")
    return description


def _sha256(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _refuse_other_model(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model: the user's mistake, not a corrupt file, so no other checkpoint is tried."""
    differences = []
    for key in dict.fromkeys([*saved, *here]):
        if key not in saved or key not in here:
            differences.append(f"{key} is only {'in this run' if key in here else 'in the checkpoint'}")
        elif saved[key] != here[key]:
            differences.append(f"{key} is {saved[key]!r} there and {here[key]!r} here")
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise JaxguardError(
            f"{path} is a checkpoint of another model: {'; '.join(differences[:3])}{more}; choose another name for this run, or "
            "the model that the folder was trained from"
        )


def describe(items: State) -> dict[str, dict[str, dict[str, Any]]]:
    """Map item -> array -> its shape, type and checksum."""
    leaves = [leaf for item in items.values() for leaf in jax.tree.leaves(item)]
    meshes = {leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)}
    everywhere = NamedSharding(meshes.pop(), PartitionSpec()) if len(meshes) == 1 else None
    checksums = map(int, np.asarray(_checksums(everywhere)(leaves)))
    return {
        name: {
            key: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": next(checksums)}
            for key, leaf in _named_leaves(item)
        }
        for name, item in items.items()
    }


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


@lru_cache(maxsize=4)
def _checksums(out: Sharding | None) -> Callable[[list[Array]], Array]:
    return jax.jit(lambda leaves: jnp.stack([checksum(x) for x in leaves]), out_shardings=out)


def checksum(x: Array) -> UInt32[Array, ""]:
    """Compute a number that depends on every bit of `x` and on its position, but not on how `x` is sharded.

    It is the sum modulo 2^32 of a mixture of each element's bits with its index. The mixture is a bijection of the bits (the
    finalizer of MurmurHash3), so a change of any single element is always noticed, and any other with probability 1 - 2^-32.
    """

    def mix(h: Array) -> Array:
        h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(mix(bits ^ mix(index + np.uint32(1))), dtype=jnp.uint32)
