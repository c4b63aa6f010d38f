"""One checkpoint's folder: what it says of itself, and reading it so that nothing corrupt passes for the state."""

import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxguard.train.checksums import describe, named_leaves
from jaxguard.utils.errors import JaxguardError

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""A pytree of jax.Array whose key "weights" holds the weights by path."""


class CorruptError(Exception):
    """This checkpoint cannot be read; another may."""


Target = Callable[[Path, dict[str, Any]], State]
"""From a checkpoint's folder and its description to the abstract items to read; refuses another model."""


def read_newest(folder: Path, steps: Sequence[int], target: Target) -> tuple[int | None, State, list[int]]:
    """(step, items, the newer steps that are corrupt); no step when none can be read."""
    corrupt: list[int] = []
    for step in reversed(steps):
        try:
            return step, _read(folder / str(step), target), corrupt
        except CorruptError as error:
            logger.warning("the checkpoint %s is corrupt: %s", folder / str(step), error)
            corrupt.append(step)
    return None, {}, corrupt


def _read(path: Path, target: Target) -> State:
    """The items of one checkpoint, verified. All processes get them, or all raise CorruptError."""
    problem, about, items = None, {}, {}
    try:
        about = read_about(path)
        items = _restore(path, target(path, about))
    except CorruptError as error:
        problem = error
    # The checksums are sums over all processes' shards, so none may go there alone.
    if not _all_agree(problem is None):
        raise problem or CorruptError("another process cannot read it")
    for name, arrays in describe(items).items():
        bad = [key for key, found in arrays.items() if found["checksum"] != about["arrays"][name][key]["checksum"]]
        if bad:
            raise CorruptError(f"{name}: the data of {', '.join(bad[:3])} changed on disk ({len(bad)} arrays in all)")
    return items


def _restore(path: Path, target: State) -> State:
    """The items as this process finds them, without waiting for the others.

    Orbax's checkpointers end a restore with a collective, in which the others would be left alone when one process
    finds its shards corrupt; its handlers do not.
    """
    handler = ocp.StandardCheckpointHandler()
    try:
        return {k: handler.restore(path / k, args=ocp.args.StandardRestore(v)) for k, v in target.items()}
    except PermissionError as error:
        raise JaxguardError(f"the checkpoint {path} cannot be read: {error}") from None
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # says nothing about the checkpoint
        problem = f"{type(error).__name__}: {_first_line(error)}"
    finally:
        handler.close()
    _drop_unfinished_reads()
    raise CorruptError(problem)


def _drop_unfinished_reads() -> None:
    """Free the other reads of a failed restore, which fail too and would each print a page when freed later."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    try:
        about = json.loads((path / "about" / "metadata").read_text(encoding="utf-8"))
        signature = about.pop("sha256")
    except PermissionError as error:
        raise JaxguardError(f"the checkpoint {path} cannot be read: {error}") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptError(f"its description cannot be read: {type(error).__name__}: {_first_line(error)}") from error
    if signature != signed(about)["sha256"]:
        raise CorruptError("its description changed on disk")
    if about["step"] != int(path.name):
        raise CorruptError(f"it is named {path.name} but was saved at step {about['step']}")
    return about


def signed(about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "sha256": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}


def check_model(path: Path, about: dict[str, Any], target: State, fingerprint: str) -> None:
    """Another model is a mistake of the user, not a corrupt file: no fallback."""
    if about["fingerprint"] != fingerprint:
        raise JaxguardError(
            f"{path} is a checkpoint of another model ({about['fingerprint']!r}, this run has {fingerprint!r}); choose "
            "another name for this run, or the model that the folder was trained from"
        )
    for name, item in target.items():
        there = {k: (tuple(a["shape"]), a["dtype"]) for k, a in about["arrays"].get(name, {}).items()}
        here = {k: (x.shape, str(x.dtype)) for k, x in named_leaves(item)}
        if there != here:
            raise JaxguardError(
                f"{path} is a checkpoint of another model: {difference(there, here)}; choose another name for this run"
            )


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first few arrays in which two models differ."""
    told = []
    for key in sorted({*there, *here}):
        if key not in there or key not in here:
            told.append(f"{key} is only {'in this run' if key in here else 'in the checkpoint'}")
        elif there[key] != here[key]:
            told.append(f"{key} is {there[key]} there and {here[key]} here")
    return "; ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")


def checkpoint_losses(folder: Path) -> dict[int, float | None]:
    """Step -> validation loss (None where it has none, or where it cannot be read), oldest first."""
    losses: dict[int, float | None] = {}
    for step in disk_steps(folder):
        try:
            losses[step] = read_about(folder / str(step))["validation_loss"]
        except CorruptError:
            losses[step] = None
    return losses


def disk_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a checkpoints folder, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def _all_agree(fine: bool) -> bool:
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
