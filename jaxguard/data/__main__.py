"""`jaxguard data --config NAME`: report on a run's training data, and build training sets into files."""

import argparse
import sys
from functools import partial

from rich.text import Text

from jaxguard.cli import stage
from jaxguard.config import Config
from jaxguard.data.inputs import check_inputs
from jaxguard.report import Table
from jaxguard.utils.terminal import Console

DESCRIPTION = """\
Load, select and encode a run's data, and report on it: sources, what was skipped and why, label balance, lengths, packing,
and one example as the model sees it, with the trained tokens highlighted. Nothing is written and no model is loaded; only
the checkpoint's tokenizer is needed.

commands:
  build    write the training sets of a config into files, with a manifest and a card

examples:
  jaxguard data --config gemma4b_5k
  jaxguard data --config gemma4b_5k data.subset=500 --show-text
  jaxguard data --config gemma4b_5k model.checkpoint=path/to/checkpoint data.train.0.path=traces.jsonl
  jaxguard data build --config wildguard_sets
"""
BUILD = """\
Build training sets from the examples and traces of data.train, as the config's `build` says: reasoning, direct and dual, each in
full and as random subsets, without examples that a benchmark holds. `datasets`, TRL, LlamaFactory and data.train can read
runs/NAME/dataset: {kind: jsonl, path: runs/NAME/dataset/dual/5000_0.parquet}. The same input gives the same bytes.

examples:
  jaxguard data build --config wildguard_sets
  jaxguard data build --config wildguard_sets 'build.subsets=[500]' 'build.seeds=[0,1]'
"""


def _build(_: argparse.Namespace, config: Config) -> None:
    from jaxguard.data.build import build

    result, console = build(config), Console(soft_wrap=True)
    table = Table(("set", "examples", "with a trace", "subsets", "contaminated", "dropped"), "Training sets")
    for name, entry in result.manifest["sets"].items():
        full, dropped = entry["subsets"]["all"], sum(entry["dropped"].values())
        traced, subsets = full["by_mode"].get("reasoning", 0), len(entry["subsets"]) - 1
        table.add(name, full["examples"], traced, subsets, entry["contaminated"], dropped)
    console.print(table.rich())
    console.print(Text(f"version {result.manifest['version']}: {result.folder}"))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show-text",
        action="store_true",
        help="show the example's prompt, response and trace, which may be offensive; by default only their lengths",
    )


def _report(options: argparse.Namespace, config: Config) -> None:
    from jaxguard.data.encoding import TOKENIZER_FILES, Encoder  # these load transformers
    from jaxguard.data.prepare import encode_selection, select
    from jaxguard.data.report import report
    from jaxguard.utils import hub

    folder = hub.fetch(config.model.checkpoint, config.model.revision, TOKENIZER_FILES)
    encoder, selection = Encoder.load(folder, config.data), select(config)
    prepared = encode_selection(config, selection, encoder)
    Console().print(report(config, selection, prepared, encoder, options.show_text))


BUILDING = stage("data build", BUILD, _build, check=partial(check_inputs, stage="data build"))
main = stage("data", DESCRIPTION, _report, _options, {"build": BUILDING}, partial(check_inputs, stage="data"))

if __name__ == "__main__":
    sys.exit(main())
