"""Files that survive a kill at any moment, and folders that have one writer."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from jaxguard.utils.errors import JaxguardError


def lock_folder(folder: Path, what: str) -> IO[str]:
    """Hold a folder's lock until the returned file is closed; `what` the folder is of names it in errors.

    A POSIX record lock ends with the process, however it ends, and is not handed on to forked workers, which
    would otherwise keep it after a SIGKILL of their parent.

    Raises:
        JaxguardError: another process holds it.
    """
    file = (folder / ".lock").open("a+", encoding="utf-8")
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
    return file


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a crash leaves the old one or the new one, never a part.

    Raises:
        JaxguardError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise JaxguardError(
            f"cannot write {path}: {error.strerror or error}; free some space, or write elsewhere"
        ) from None
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
