"""Files and folders that survive a kill at any moment: they appear whole or not at all, and a folder has one writer."""

import contextlib
import difflib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from jaxguard.utils.errors import JaxguardError

_HELD: WeakValueDictionary[Path, IO[str]] = WeakValueDictionary()
"""The locks that this process holds: the system would give it the same one twice."""


def lock_folder(folder: Path, what: str) -> IO[str]:
    """Make a folder where there is none, and hold its lock until the returned file is closed.

    A POSIX record lock ends with the process, however it ends, and is not handed on to forked workers, which would otherwise keep
    it after a SIGKILL of their parent. JaxguardError: another process holds it, or this one, or the folder cannot be written to.
    """
    held = _HELD.get(folder.absolute())
    if held is not None and not held.closed:
        raise JaxguardError(
            f"the {what} folder {folder} is in use by this process: wait for what runs there, such as another cell of a notebook"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise JaxguardError(
            f"cannot write to the {what} folder {folder}: {error.strerror or error}; choose another folder or name"
        ) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise JaxguardError(
            f"the {what} folder {folder} is in use by another process ({owner}); "
            "wait for it, stop it, or choose another name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _HELD[folder.absolute()] = file
    return file


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Replace a file so that a crash leaves the old one or the new one; JaxguardError if it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        _to_disk(draft)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise JaxguardError(
            f"cannot write {path}: {error.strerror or error}; free some space, or write elsewhere"
        ) from None
    _to_disk(path.parent)


@contextlib.contextmanager
def whole_folder(output: Path, size: int = 0) -> Iterator[Path]:
    """Yield a scratch folder beside `output`, and rename it to `output` at the end, after everything in it is on the disk.

    When the block raises, the scratch folder is removed and `output` stays as it was; what a killed process left of it, the next
    one removes. JaxguardError: `output` is not empty, cannot be made, or is written by another process; the disk is full or has
    no room for about `size` bytes.
    """
    output = output.absolute()
    draft = output.with_name(f".{output.name}.partial")
    try:
        check_free(output)
        with lock_folder(draft, "output"):
            check_free(output)  # whoever held the lock before may have written it
            try:
                scratch = draft / "whole"
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                free = shutil.disk_usage(scratch).free
                if free < size:
                    raise JaxguardError(
                        f"no space for {output}: it takes about {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
                        "free some space or write elsewhere"
                    )
                yield scratch
                for path in [*scratch.rglob("*"), scratch]:
                    _to_disk(path)
                scratch.replace(output)
                _to_disk(output.parent)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise JaxguardError(
                f"the disk is full: {output} was not written, nothing was left behind; free some space or write elsewhere"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise JaxguardError(f"{output} cannot be written: {error.strerror} ({error.filename})") from error
        raise


def disk_steps(folder: Path) -> list[int]:
    """List the steps of the complete checkpoints in a checkpoints folder, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def check_free(output: Path) -> None:
    """Raise a JaxguardError if `output` is a file, or a folder that is not empty."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise JaxguardError(f"{output} exists and is not empty: choose another output folder, or remove it first")


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def absent(path: Path) -> str:
    """Say of a path that is not there what is there instead: its folder, and the nearest name in it."""
    missing = next((each for each in (*reversed(path.parents), path) if not each.exists()), path)
    siblings = [each.name for each in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, siblings, n=1)
    what = "it is not" if missing == path else f"there is no {missing.name!r}"
    return f"{what} in {missing.parent.resolve()}{f', but {near[0]!r} is' if near else ''}"
