"""One checkpoint's folder: its description, and reading it so that no corrupt data is taken for the state.

Orbax notices a truncated or missing file, but not a changed byte inside an array's data (measured with 0.12.8: a flipped bit is
read back without complaint). So every array has a checksum, which its devices compute before the save and after the restore.
That costs one pass over device memory, does not depend on the mesh, and covers the whole way to the disk and back.
"""

import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, UInt32

from jaxguard.utils.errors import JaxguardError

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""A pytree of jax.Array whose key "weights" holds the weights by path."""


class CorruptError(Exception):
    """This checkpoint cannot be used; another one may be."""


Target = Callable[[Path, dict[str, Any]], State]
"""From a checkpoint's folder and description to the abstract items to read; raises JaxguardError for another model."""


def read_newest(folder: Path, steps: Sequence[int], target: Target) -> tuple[int | None, State, list[int]]:
    """Return (step, items, newer steps that are corrupt); the step is None when all are corrupt."""
    corrupt: list[int] = []
    for step in reversed(steps):
        try:
            return step, _read(folder / str(step), target), corrupt
        except CorruptError as error:
            logger.warning("the checkpoint %s is corrupt: %s", folder / str(step), error)
            corrupt.append(step)
    return None, {}, corrupt


def _read(path: Path, target: Target) -> State:
    """Read and verify one checkpoint. All processes return its items, or all raise CorruptError."""
    problem, description, items = None, {}, {}
    try:
        description = read_description(path)
        items = _restore(path, target(path, description))
    except CorruptError as error:
        problem = error
    # The checksums are sums over all processes' shards, so all must compute them or none.
    if not _all_agree(problem is None):
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
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook
    raise CorruptError(problem)


def read_description(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds: step, fingerprint, validation loss, and shape, type and checksum of each array."""
    try:
        description: dict[str, Any] = json.loads((path / "about" / "metadata").read_text(encoding="utf-8"))
        signature = description.pop("sha256")
    except PermissionError as error:
        raise JaxguardError(f"the checkpoint {path} cannot be opened: {error}") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptError(f"its description is malformed: {type(error).__name__}: {_first_line(error)}") from error
    if signature != signed(description)["sha256"]:
        raise CorruptError("its description changed on disk")
    if description["step"] != int(path.name):
        raise CorruptError(f"it is named {path.name} but was saved at step {description['step']}")
    return description


def signed(description: dict[str, Any]) -> dict[str, Any]:
    """Add the description's own hash to it."""
    return {**description, "sha256": hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()}


def check_model(path: Path, description: dict[str, Any], target: State, fingerprint: str) -> None:
    """Refuse a checkpoint of another model: the user's mistake, not a corrupt file, so no other checkpoint is tried."""
    problem = ""
    if description["fingerprint"] != fingerprint:
        problem = f"{description['fingerprint']!r}, this run has {fingerprint!r}"
    for name, item in target.items():
        saved = {k: (tuple(a["shape"]), a["dtype"]) for k, a in description["arrays"].get(name, {}).items()}
        problem = problem or difference(saved, {k: (x.shape, str(x.dtype)) for k, x in _named_leaves(item)})
    if problem:
        raise JaxguardError(
            f"{path} is a checkpoint of another model: {problem}; choose another name for this run, or the model that the folder "
            "was trained from"
        )


def difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Name the first few arrays in which a checkpoint and this run differ; empty where they do not."""
    differences = []
    for key in sorted({*saved, *here}):
        if key not in saved or key not in here:
            differences.append(f"{key} is only {'in this run' if key in here else 'in the checkpoint'}")
        elif saved[key] != here[key]:
            differences.append(f"{key} is {saved[key]} there and {here[key]} here")
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more


def checkpoint_losses(folder: Path) -> dict[int, float | None]:
    """Map each step to its validation loss, None where it has none or is corrupt, oldest first."""
    losses: dict[int, float | None] = {}
    for step in disk_steps(folder):
        try:
            losses[step] = read_description(folder / str(step))["validation_loss"]
        except CorruptError:
            losses[step] = None
    return losses


def disk_steps(folder: Path) -> list[int]:
    """List the steps of the complete checkpoints in a checkpoints folder, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


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
    if x.dtype.itemsize > 4 or x.dtype == jnp.bool_:
        x = jax.lax.bitcast_convert_type(x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x, jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(index + np.uint32(1))), dtype=jnp.uint32)


def _mix(h: Array) -> Array:
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _all_agree(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
