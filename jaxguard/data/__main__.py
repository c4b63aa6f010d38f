"""`python -m jaxguard.data --config NAME`: what a run would train on."""

import argparse
import sys

from rich.console import Console

from jaxguard import hub
from jaxguard.config import Config
from jaxguard.data import encode, prepare
from jaxguard.data.report import report
from jaxguard.doors import run_door

DESCRIPTION = """\
Load, choose and encode a run's data, and report on it: where the examples come from, what was skipped and why, label
balance, lengths, packing, and one example as the model sees it, the trained tokens highlighted. Nothing is written and
no model is loaded; of the checkpoint only the tokenizer is needed.

examples:
  python -m jaxguard.data --config gemma4b_5k
  python -m jaxguard.data --config gemma4b_5k data.subset=500 --show-text
  python -m jaxguard.data --config gemma4b_5k model.checkpoint=path/to/checkpoint data.train.0.path=traces.jsonl
"""


def main(argv: list[str] | None = None) -> int:
    return run_door("data", DESCRIPTION, _main, _extend, argv)


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show-text",
        action="store_true",
        help="show the example's prompt, response and trace, which may be offensive; by default only their lengths",
    )


def _main(options: argparse.Namespace, config: Config) -> None:
    folder = hub.fetch(config.model.checkpoint, config.model.revision, encode.TOKENIZER_FILES)
    encoder = encode.Encoder.load(folder, config.data)
    selection = prepare.select(config)
    prepared = prepare.encode_selection(config, selection, encoder)
    Console().print(report(config, selection, prepared, encoder, options.show_text))


if __name__ == "__main__":
    sys.exit(main())
