"""What is installed here: versions for a run's records and for bug reports, and how to install what is missing."""

import hashlib
import importlib.metadata
import platform
import re
import shlex
import subprocess
from pathlib import Path

import jaxguard

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
"""What can change a run's results."""


def versions() -> dict[str, str | None]:
    """Return the versions of jaxguard, its commit in a checkout, Python and PACKAGES."""
    return {
        "jaxguard": jaxguard.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def commit() -> str | None:
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


def code_digest(*parts: str) -> str:
    """Hash the code of parts of this package, folders or modules: "data", "train/step.py"."""
    code, package = hashlib.sha256(), Path(jaxguard.__file__).parent
    for part in parts:
        path = package / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            code.update(file.read_bytes())
    return code.hexdigest()


def install(extra: str) -> str:
    """Return the command that installs the packages of an extra, however jaxguard itself was installed."""
    try:
        requirements = importlib.metadata.requires("jaxguard") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        requirements = []
    own = [text.partition(";")[0].strip() for text in requirements if re.search(rf"extra == .{extra}.$", text)]
    return f"python -m pip install {shlex.join(own or ['-e', f'.[{extra}]'])}"
