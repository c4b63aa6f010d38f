"""`jaxguard init FOLDER`: write a starter folder with a config, a policy and twenty labelled examples."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from jaxguard.cli import Command
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.parse import path_part

STARTER = Path(__file__).parent / "starter"
CONFIG = "config.yaml"
DESCRIPTION = """\
Write config.yaml, policy.yaml, train.jsonl and held_out.jsonl into a folder: a guard that trains on a CPU in minutes, to replace
bit by bit by your own policy and examples. Nothing that exists is overwritten.

examples:
  jaxguard init my_guard
"""


def _init(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    try:
        name = path_part(folder.resolve().name)
    except ValueError as error:
        raise JaxguardError(f"{folder}: {error}") from None
    files = sorted(STARTER.iterdir())
    if there := [file.name for file in files if (folder / file.name).exists()]:
        raise JaxguardError(f"{folder} already holds {', '.join(there)}: choose another folder, or move them away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JaxguardError(f"cannot make the folder {folder}: {error.strerror}") from None
    for file in files:
        text = file.read_text(encoding="utf-8")
        write_atomically(folder / file.name, text.format(name=json.dumps(name)) if file.name == CONFIG else text)
    print(f"wrote {folder}: {', '.join(file.name for file in files)}. Next:")
    config = shlex.quote(str(folder / CONFIG))
    for stage in ("data", "train", "evaluate"):
        print(f"  jaxguard {stage} --config {config}")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="my_guard", help="also the run's name; default: my_guard")


main = Command("init", DESCRIPTION, _init, _options)

if __name__ == "__main__":
    sys.exit(main())
