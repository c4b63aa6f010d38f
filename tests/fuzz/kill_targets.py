"""What is killed: commands in a process that has everything imported already, so that a kill costs no start of Python."""

import contextlib
import importlib
import os
import sys
from pathlib import Path

from campaign import MEMORY, peak


def command(module: str, arguments: list[str], log: str) -> None:
    """Run a command of jaxguard; its output goes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = importlib.import_module(module).main(arguments)
    sys.exit(code if peak() < MEMORY else f"took {peak() >> 20} MiB")


def export(checkpoint: str, output: str, log: str) -> None:
    """Export a checkpoint's weights, each a little larger, as a run's end does; nothing where that is done."""
    from jaxguard.models.hf_io.checkpoints import export_hf, read_weights
    from jaxguard.models.spec import read_spec

    with contextlib.redirect_stderr(Path(log).open("w", encoding="utf-8")):
        if not Path(output).is_dir():
            weights = read_weights(Path(checkpoint), read_spec(Path(checkpoint)))
            export_hf({name: weight + 1 for name, weight in weights.items()}, Path(checkpoint), Path(output))
