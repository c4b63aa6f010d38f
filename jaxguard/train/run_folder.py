"""A run's folder: what it holds, its lock, and whether a run may be resumed in it.

    runs/NAME/
      config.yaml     the resolved config
      versions.json   what the run was computed with
      metrics.jsonl   one record a line (logging.py)
      validation_predictions/  STEP.jsonl: the probability of every held-out verdict after that step
      checkpoints/  export/  tensorboard/  profile/  evaluate/  mine/

Only process 0 writes here, except for the checkpoints, which all processes write together.
"""

import datetime
import importlib.metadata
import json
import logging
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxguard
from jaxguard.config import Config, dump, load
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import lock_folder, write_atomically
from jaxguard.utils.provenance import differences, refuse_others

logger = logging.getLogger(__name__)

Resume = Literal["auto", "always", "never"]

FREE = (
    "name", "run_folder", "checkpoint.", "log.", "data.prefetch", "train.export", "train.evaluate_every",
    "mesh.coordinator", "distill", "build", "evaluate", "mine",
)  # fmt: skip
"""Fields that a resumed run may change without any effect on the weights."""

ROUNDING = ("mesh.", "model.attention", "model.remat", "model.query_chunk", "model.loss_chunk", "train.accumulation")
"""Fields that a resumed run may change with an effect on rounding only: sums are added up in another order."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


@dataclass
class RunFolder:
    """A run's folder, locked by this process until `close`.

    Attributes:
        path: the folder.
        resumed: whether it held this run already.
    """

    path: Path
    resumed: bool
    _lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def validation_predictions(self) -> Path:
        return self.path / "validation_predictions"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(config: Config, resume: Resume = "auto") -> RunFolder:
    """Create or reopen run_folder/name and lock it for this process.

    Call it on every process, after jax.distributed is initialized; process 0 does the work and the others wait for it.

    Args:
        config: the resolved config.
        resume: auto resumes the folder's run, if there is one; always requires a checkpoint to resume from; never requires a
            folder without a run.

    Raises:
        JaxguardError: the folder is locked by another process, holds another run, or is not what `resume` requires.
    """
    if jax.process_index() != 0:
        state = _from_first_process(_WAITING)
        if state == _REFUSED:
            raise JaxguardError(f"process 0 could not open the run folder {config.folder}: see its message")
        return RunFolder(config.folder, resumed=state == _RESUMED)
    try:
        run = _open_locked(config, resume)
    except BaseException:
        _from_first_process(_REFUSED)
        raise
    _from_first_process(_RESUMED if run.resumed else _NEW)
    return run


_WAITING, _REFUSED, _NEW, _RESUMED = range(4)


def _from_first_process(state: int) -> int:
    return int(multihost_utils.broadcast_one_to_all(np.int32(state))) if jax.process_count() > 1 else state


def _open_locked(config: Config, resume: Resume) -> RunFolder:
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, "run")
    except (FileExistsError, NotADirectoryError):
        raise JaxguardError(f"{folder} is not a folder; choose another name or run_folder") from None
    except OSError as error:
        raise JaxguardError(f"cannot write to the run folder {folder}: {error}; choose another run_folder") from None
    try:
        resumed = (folder / "config.yaml").is_file()
        _check_resume(folder, resumed, resume)
        if resumed:
            _check_same_run(folder, config)
        for name in ("validation_predictions", "checkpoints", "export", "tensorboard", "profile"):
            (folder / name).mkdir(exist_ok=True)
        _write_versions(folder / "versions.json")
        write_atomically(folder / "config.yaml", dump(config))
    except BaseException:
        lock.close()
        raise
    return RunFolder(folder, resumed, lock)


def _check_resume(folder: Path, holds_run: bool, resume: Resume) -> None:
    if resume == "never" and holds_run:
        raise JaxguardError(
            f"{folder} already holds a run and --resume is never; choose another name, or delete the folder"
        )
    if resume == "always" and not any(p.name.isdigit() for p in (folder / "checkpoints").glob("*")):
        raise JaxguardError(
            f"{folder} holds no checkpoint to resume from and --resume is always; use --resume auto to start"
        )


def _check_same_run(folder: Path, config: Config) -> None:
    """Refuse to resume with a config of another run."""
    try:
        before = load(str(folder / "config.yaml"))
    except JaxguardError as error:
        raise JaxguardError(f"{folder} holds a run whose config is invalid, choose another name: {error}") from None
    old_tree, new_tree = (
        c.model_dump(mode="json", exclude={"distill", "build"}) for c in (before, config)
    )  # no part of training
    changes = differences(old_tree, new_tree)
    changes = {field: pair for field, pair in changes.items() if not field.startswith(FREE)}
    rounding = [field for field in changes if field.startswith(ROUNDING)]
    refuse_others(
        {field: pair for field, pair in changes.items() if field not in rounding},
        f"{folder} holds another run; these fields change the result:",
        "Choose another name (name=...), restore the old values, or delete the folder.",
    )
    if rounding:
        logger.warning(
            "%s resumes with other %s: the same sums in another order, so rounding differs", folder, ", ".join(rounding)
        )


def _write_versions(path: Path) -> None:
    """Record the versions of this start; earlier starts with other versions stay listed under `before`."""
    now = versions()
    before: list[Any] = []
    if path.is_file():
        try:
            last = json.loads(path.read_text(encoding="utf-8"))
            before = last.pop("before", [])
        except (ValueError, AttributeError):
            last = {}
        changed = {k: v for k, v in differences(last, now).items() if k != "started"}
        if last and changed:
            before = [*before, last]
            listed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items())
            logger.warning("%s resumes with other versions, so rounding may differ: %s", path.parent, listed)
    write_atomically(path, json.dumps({**now, "before": before}, indent=2) + "\n")


def versions() -> dict[str, Any]:
    """Collect the versions of everything that can change a run's results."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jaxguard": jaxguard.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "device_count": jax.device_count(),
        "processes": jax.process_count(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from; None outside of a checkout."""
    checkout = Path(jaxguard.__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 (fixed words)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
