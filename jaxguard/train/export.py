"""The export of a finished run: a Hugging Face checkpoint that explains itself."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxguard.config import Config
from jaxguard.data.encoding import Encoder
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import is_complete, write_guard_files
from jaxguard.data.prepare import Prepared
from jaxguard.models.hf_io.checkpoints import ExportReport, export_hf
from jaxguard.train.model_card import write_card


def export(
    weights: Mapping[str, jax.Array],
    folder: Path,
    *,
    source: Path,
    config: Config,
    data: Prepared,
    metrics: Mapping[str, Any],
) -> ExportReport | None:
    """Write weights, tokenizer, the guard's own files and its model card, all or nothing; None if that was done before.

    The files are written into a draft folder, which then takes the place of `folder`. Call it on every process.

    Args:
        weights: path -> the trained array.
        folder: the export.
        source: folder of the base checkpoint.
        config: the run's.
        data: what was trained on.
        metrics: for the card: stage -> name -> number.
    """
    if is_complete(folder):
        return None
    draft, first = folder.with_name(f".{folder.name}.draft"), jax.process_index() == 0
    if first:
        shutil.rmtree(draft, ignore_errors=True)
    report = export_hf(weights, source, draft)
    if first:
        write_card(
            draft,
            source=source,
            base=config.model.checkpoint,
            config=config,
            manifest=data.manifest,
            metrics=metrics,
            report=report,
            datasets=[entry["hub"] for entry in data.manifest["sources"] if "hub" in entry],
            example=_example_prompt(source, config),
        )
        write_guard_files(draft, config, (tuple(question for question, _ in example.answers) for example in data.train))
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    return report


def _example_prompt(source: Path, config: Config) -> str:
    """A user turn as the guard expects it, so that whoever serves it sees the format."""
    mode = Mode.DIRECT if config.data.mode == "direct" else Mode.REASONING
    harmless = Example("card", "card", "How do I bake bread?", "Mix flour, water, salt and yeast, wait, and bake it.")
    return Encoder.load(source, config.data).messages(harmless, mode)[0]["content"]
