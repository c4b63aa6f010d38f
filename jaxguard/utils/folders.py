"""Output folders that appear complete or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jaxguard.utils.errors import JaxguardError


def check_free(output: Path) -> None:
    """Refuse an output folder that is not empty.

    Raises:
        JaxguardError: `output` is a file, or a folder that is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise JaxguardError(f"{output} exists and is not empty: choose another output folder, or remove it first")


@contextlib.contextmanager
def whole_folder(output: Path, size: int = 0) -> Iterator[Path]:
    """Yield a scratch folder beside `output`, and rename it to `output` at the end, after everything in it is on the disk.

    When the block raises, the scratch folder is removed and `output` stays as it was.

    Args:
        output: the folder.
        size: bytes that it will hold, approximately, so that a disk without space for them is refused at once.

    Raises:
        JaxguardError: `output` is not empty, cannot be made, or the disk is full.
    """
    output = output.absolute()
    check_free(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise _explained(error, output) from error
    try:
        free = shutil.disk_usage(scratch).free
        if free < size:
            raise JaxguardError(
                f"no space for {output}: it takes about {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
                "free some space or write elsewhere"
            )
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            _to_disk(path)
        scratch.chmod(0o755)
        scratch.replace(output)
        _to_disk(output.parent)
    except OSError as error:
        raise _explained(error, output) from error
    finally:
        _remove(scratch)


def _remove(folder: Path) -> None:
    """Remove a folder into which threads of a failed export may still be writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explained(error: OSError, output: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return JaxguardError(
            f"the disk is full: {output} was not written, nothing was left behind; free some space or write elsewhere"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return JaxguardError(f"{output} cannot be written: {error.strerror} ({error.filename})")
    return error
