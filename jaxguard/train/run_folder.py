"""A run's folder: its lock, whether a run may be resumed in it, and its records. docs/resume.md says what it holds.

Only process 0 writes here, except for the checkpoints, which all processes write together.
"""

import datetime
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxguard.config import NO_EFFECT, ROUNDING, Config, dump, read_dump
from jaxguard.data.guard_files import is_complete
from jaxguard.train.logging import read_metrics
from jaxguard.utils.errors import JaxguardError, ProvenanceError
from jaxguard.utils.files import disk_steps, lock_folder, write_atomically
from jaxguard.utils.parse import Fields, check, read_json
from jaxguard.utils.store import differences, refuse_others
from jaxguard.utils.versions import versions

logger = logging.getLogger(__name__)

Resume = Literal["auto", "always", "never"]

FREE = ("name", "run_folder", "distill", "build", "evaluate", "mine", *NO_EFFECT)
"""Fields that a resumed run may change; those of ROUNDING too, with a warning."""


@contextmanager
def open_run(config: Config, resume: Resume = "auto") -> Iterator[Path]:
    """Lock run_folder/name for this process until the end, and refuse a run that `resume` does not allow there.

    Nothing is written but the lock: that is for `begin_run`, when nothing cheap can fail any more. Call it on every process, after
    jax.distributed is initialized; process 0 does the work and the others wait for it. `resume`: auto resumes the folder's run, if
    there is one; always requires a checkpoint, never a folder without a run.

    Raises:
        JaxguardError: the folder is locked by another process, holds another run, or is not what `resume` requires.
    """
    folder, opened = config.folder, False
    with ExitStack() as stack:
        try:
            if jax.process_index() == 0:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock_folder(folder, "run"))
                except (FileExistsError, NotADirectoryError):
                    raise JaxguardError(f"{folder} is not a folder; choose another name or run_folder") from None
                except OSError as error:
                    raise JaxguardError(
                        f"cannot write to the run folder {folder}: {error}; choose another run_folder"
                    ) from None
                _check_resume(folder, config, resume)
                opened = True
        finally:
            opened = bool(multihost_utils.broadcast_one_to_all(np.int32(opened)))
        if not opened:
            raise JaxguardError(f"process 0 could not open the run folder {folder}: see its message")
        yield folder


def holds_run(folder: Path) -> bool:
    """Whether a step was recorded, saved or exported in a run's folder; what a start that failed before left behind is no run."""
    metrics = folder / "metrics.jsonl"
    recorded = metrics.is_file() and any(record["step"] > 0 for record in read_metrics(metrics))
    return recorded or bool(disk_steps(folder / "checkpoints")) or is_complete(folder / "export")


@dataclass(frozen=True)
class _Tokens:
    tokens_sha256: str


@dataclass(frozen=True)
class _DataFile:
    """What is compared of a data.json; older ones lack the weights."""

    train: _Tokens
    weights: str | None = None


def begin_run(folder: Path, config: Config, manifest: dict[str, Any], attention: str) -> None:
    """Write config, versions and data manifest into an open run's folder.

    `manifest` also has the digest of the `weights` that the run starts from; `attention` is the kernel that was chosen.
    ProvenanceError: the folder's run was trained on other data, or from other weights.
    """
    path, resumes = folder / "data.json", holds_run(folder)
    before = read_json(path, Fields) if resumes and path.is_file() else manifest
    known = check(before, _DataFile, str(path))
    if known.train.tokens_sha256 != manifest["train"]["tokens_sha256"]:
        raise ProvenanceError(
            f"{folder} was trained on other data: {path} does not match the config's sources. Restore "
            "the data, or start a new run under another name"
        )
    if known.weights not in (None, manifest["weights"]):
        raise ProvenanceError(
            f"{folder} was trained from other weights: those of model.checkpoint={config.model.checkpoint} have changed since. "
            "Restore them, or start a new run under another name"
        )
    if jax.process_index() == 0:
        (folder / "validation_predictions").mkdir(exist_ok=True)
        _write_versions(folder / "versions.json", attention, resumes)
        write_atomically(path, json.dumps(before, indent=2, ensure_ascii=False))
        write_atomically(folder / "config.yaml", dump(config))


def _check_resume(folder: Path, config: Config, resume: Resume) -> None:
    """Refuse what `resume` does not allow, and to resume with a config of another run."""
    path, resumes = folder / "config.yaml", holds_run(folder)
    if resume == "never" and resumes:
        raise JaxguardError(
            f"{folder} already holds a run and --resume is never; choose another name, or delete the folder"
        )
    if resume == "always" and not disk_steps(folder / "checkpoints"):
        raise JaxguardError(
            f"{folder} holds no checkpoint to resume from and --resume is always; use --resume auto to start"
        )
    if not resumes or not path.is_file():
        return
    try:
        before = read_dump(path)
    except JaxguardError as error:
        raise JaxguardError(f"{folder} holds a run whose config is invalid, choose another name: {error}") from None
    changes = differences(before.model_dump(mode="json"), config.model_dump(mode="json"))
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


def _write_versions(path: Path, attention: str, resumes: bool) -> None:
    """Record the versions of everything that can change a run's results; other ones of earlier starts stay under `before`."""
    now = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **versions(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "device_count": jax.device_count(),
        "processes": jax.process_count(),
        "attention": attention,
    }
    before: list[Any] = []
    if resumes and path.is_file():
        last = read_json(path, Fields)
        before = check(last.pop("before", []), list[Any], f"{path}: before")
        changed = {k: v for k, v in differences(last, now).items() if k != "started"}
        if changed:
            before = [*before, last]
            listed = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items())
            logger.warning("%s resumes with other versions, so rounding may differ: %s", path.parent, listed)
    write_atomically(path, json.dumps({**now, "before": before}, indent=2) + "\n")
