"""`jaxguard push --model RUN --to OWNER/NAME`: upload a trained guard with its model card to the Hugging Face hub."""

import argparse
import sys
from pathlib import Path

from jaxguard.cli import Command
from jaxguard.data.guard_files import export_or, is_complete
from jaxguard.data.model_card import CARD, named_card
from jaxguard.utils import hub
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.terminal import shown

DESCRIPTION = """\
Upload an export (weights, tokenizer, config, policy and model card) in one commit. The repository is made if it is not there,
and is private unless --public is given. `hf auth login` or HF_TOKEN says who you are; look at the export's README.md before.

examples:
  jaxguard push --model runs/gemma4b_5k --to OWNER/my-guard
"""


def _push(options: argparse.Namespace) -> None:
    folder = Path(export_or(options.model)).expanduser()
    if not is_complete(folder):
        raise JaxguardError(f"{folder} is no export of jaxguard: name a finished run's folder, or the export in it")
    own = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    paths = {path.relative_to(folder).as_posix(): path for path in own}
    files: dict[str, Path | bytes] = {name: path for name, path in paths.items() if not name.startswith(".")}
    if CARD in files:
        files[CARD] = named_card(folder, options.to).encode()
    print(shown(f"uploaded {len(files)} files: {hub.push(files, options.to, private=not options.public)}"))


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a run's folder, or the export in it")
    add("--to", required=True, metavar="OWNER/NAME", help="the repository on the hub")
    add("--public", action="store_true", help="make a new repository public")


main = Command("push", DESCRIPTION, _push, _options)

if __name__ == "__main__":
    sys.exit(main())
