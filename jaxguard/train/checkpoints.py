"""Checkpoints of the training state: written by Orbax in the background, verified when read.

A checkpoint is the folder checkpoints/STEP, where STEP is the number of completed steps:

    weights/   the weights alone, which is all that export and evaluation read
    rest/      the optimizer's state and the step
    about/     JSON: the model's fingerprint, the validation loss, and shape, type and checksum of every array

Orbax writes into a temporary folder and renames it when all is on disk, so a killed save leaves no half checkpoint.
"""

import errno
import itertools
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from jaxguard.config.train import CheckpointConfig
from jaxguard.train.checkpoint_files import (
    State,
    check_model,
    checkpoint_losses,
    describe,
    difference,
    disk_steps,
    read_newest,
    signed,
)
from jaxguard.utils.errors import JaxguardError

logger = logging.getLogger(__name__)


@dataclass
class Checkpoints:
    """The checkpoints of one run. Call every method on every process.

    Attributes:
        folder: the run's checkpoints folder.
        fingerprint: identifies the model; a checkpoint with another one is refused.
    """

    folder: Path
    fingerprint: str
    _manager: ocp.CheckpointManager
    _losses: dict[int, float]
    _saving: int | None = None

    def steps(self) -> list[int]:
        """List the steps of all checkpoints, the one being written included, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, validation_loss: float | None = None) -> None:
        """Begin to write a checkpoint, after the previous one is done; return when the state may be donated.

        Does nothing when this step is saved already.

        Args:
            step: number of completed steps.
            state: the training state.
            validation_loss: ranks the checkpoint among the best; None or a non-finite number leaves it out.

        Raises:
            JaxguardError: this checkpoint, or the previous one, could not be written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        if validation_loss is not None and math.isfinite(validation_loss):
            self._losses[step] = validation_loss
        self._saving = step
        args = _save_args(_items(state), step, self.fingerprint, self._losses.get(step))
        with self._explain_errors():
            self._manager.save(step, args=args, force=True)

    def restore(self, abstract_state: State) -> tuple[int, State] | None:
        """Read the newest valid checkpoint as (step, state); None when there is no checkpoint.

        Newer ones that are corrupt are reported and renamed to STEP.corrupt, so that the run can save these steps again.

        Args:
            abstract_state: the state's shapes, types and shardings, as jax.ShapeDtypeStruct; on any mesh.

        Raises:
            JaxguardError: all checkpoints are corrupt, or the newest valid one is of another model.
        """
        self.wait()
        abstract_items = _items(abstract_state)

        def target(path: Path, description: dict[str, Any]) -> State:
            check_model(path, description, abstract_items, self.fingerprint)
            return abstract_items

        step, items, corrupt = read_newest(self.folder, self.steps(), target)
        if step is None and corrupt:
            raise JaxguardError(
                f"every checkpoint in {self.folder} is corrupt ({', '.join(map(str, corrupt))}): see the warnings "
                "above. Restore one from a copy, or delete the folder to start again."
            )
        if step is None:
            return None
        if corrupt:
            self._rename_corrupt(corrupt, step)
        return step, {"weights": items["weights"], **items["rest"]}

    def _rename_corrupt(self, corrupt: Sequence[int], step: int) -> None:
        """Rename corrupt checkpoints, on process 0 after all have seen which names are free."""
        renames = {self.folder / str(bad): _free_name(self.folder / f"{bad}.corrupt") for bad in corrupt}
        _wait_for_all("jaxguard: corrupt checkpoints named")
        for old, new in renames.items():
            logger.warning("resuming from the checkpoint of step %d instead; the corrupt one is now %s", step, new)
            if jax.process_index() == 0:
                old.rename(new)
        _wait_for_all("jaxguard: corrupt checkpoints renamed")
        self._manager.reload()

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
            reason = _full_disk(error, self.folder) or str(error) or type(error).__name__
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
    losses = {step: loss for step, loss in checkpoint_losses(folder).items() if loss is not None}
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
    losses: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:  # noqa: ARG002 (Orbax's signature)
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = sorted((s for s in steps if s in self.losses), key=lambda s: (self.losses[s], s))
        preserved = {*sorted(steps)[-self.last :], *ranked[: self.best]}
        return [step in preserved for step in steps]


def read_checkpoint_weights(
    folder: Path, shardings: Mapping[str, Sharding] | None = None, step: int | None = None
) -> dict[str, jax.Array]:
    """Read the weights alone, by path, for export and evaluation. Changes nothing on disk.

    Args:
        folder: a run's folder, its checkpoints folder, or one checkpoint's folder.
        shardings: path -> sharding; None puts everything on the first local device.
        step: which checkpoint; None takes the newest valid one, and reports those that are corrupt.

    Raises:
        JaxguardError: no such checkpoint, or corrupt, or `shardings` names other weights.
    """
    folder, steps = _find(folder.absolute(), step)
    here = SingleDeviceSharding(jax.local_devices()[0])

    def target(path: Path, description: dict[str, Any]) -> State:
        arrays = description["arrays"]["weights"]
        if shardings is not None and set(shardings) != set(arrays):
            raise JaxguardError(f"{path} is of another model: {difference(arrays, shardings)}")
        where = dict.fromkeys(arrays, here) if shardings is None else shardings
        return {
            "weights": {k: jax.ShapeDtypeStruct(a["shape"], a["dtype"], sharding=where[k]) for k, a in arrays.items()}
        }

    newest, items, _ = read_newest(folder, steps, target)
    if newest is None:
        raise JaxguardError(f"no checkpoint in {folder} is valid; corrupt: {', '.join(map(str, steps))}")
    weights: dict[str, jax.Array] = items["weights"]
    return weights


def write_checkpoint_weights(folder: Path, weights: Mapping[str, jax.Array], fingerprint: str = "") -> Path:
    """Write weights alone as the checkpoint of step 0 in `folder`, for read_checkpoint_weights. Returns its folder."""
    path = folder.absolute() / "0"
    args = _save_args({"weights": dict(weights)}, 0, fingerprint, None)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=args)
    except Exception as error:
        raise JaxguardError(
            f"the weights could not be written to {path}: {_full_disk(error, folder) or error}"
        ) from error
    return path


def _save_args(items: State, step: int, fingerprint: str, validation_loss: float | None) -> ocp.args.Composite:
    description = {
        "step": step,
        "fingerprint": fingerprint,
        "validation_loss": validation_loss,
        "arrays": describe(items),
    }
    saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    return ocp.args.Composite(about=ocp.args.JsonSave(signed(description)), **saved)


def _items(state: State) -> State:
    return {"weights": state["weights"], "rest": {k: v for k, v in state.items() if k != "weights"}}


def _find(folder: Path, step: int | None) -> tuple[Path, list[int]]:
    """Return (checkpoints folder, candidate steps) for a run's folder, its checkpoints folder or one checkpoint's."""
    if folder.name.isdigit() and (folder / "about").is_dir():
        return folder.parent, [int(folder.name)]
    for candidate in (folder / "checkpoints", folder):
        steps = disk_steps(candidate)
        if step is not None and steps and step not in steps:
            raise JaxguardError(f"{candidate} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        if steps:
            return candidate, steps if step is None else [step]
    raise JaxguardError(
        f"{folder} holds no checkpoint; give a run's folder, its checkpoints folder, or one checkpoint in it"
    )


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _full_disk(error: BaseException, folder: Path) -> str | None:
    """Explain a write that failed for lack of space; None for another error."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("No space left", "Disk quota exceeded", "File too large", "ENOSPC", "EDQUOT", "EFBIG")
    if not full and not any(word in str(error) for word in words):
        return None
    free = shutil.disk_usage(folder).free / 2**30
    return f"no space on the disk ({free:.1f} GiB free there now), or a limit on file sizes"
