"""The export of a finished run: a Hugging Face checkpoint that explains itself."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import jax

from jaxguard.config import Config
from jaxguard.data.encoding import Encoder
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.guard_files import is_complete, write_guard_files
from jaxguard.data.guard_template import write_guard_template
from jaxguard.data.model_card import write_card
from jaxguard.data.prepare import Prepared
from jaxguard.data.questions import Ask, ask
from jaxguard.models.hf_io.checkpoints import ExportReport, export_hf
from jaxguard.utils.files import whole_folder


def export(
    weights: Mapping[str, jax.Array],
    folder: Path,
    *,
    source: Path,
    config: Config,
    data: Prepared,
    metrics: Mapping[str, Mapping[str, float]],
) -> ExportReport | None:
    """Write weights, tokenizer, the guard's own files and its model card, all or nothing; None if that was done before.

    `metrics` are for the card: stage -> name -> number. Call it on every process.
    """
    if is_complete(folder):
        return None
    first = jax.process_index() == 0
    with whole_folder(folder) if first else nullcontext(folder) as draft:
        report = export_hf(weights, source, draft)
        if not first:
            return report
        encoder = Encoder.load(source, config.data)
        modes = [mode for mode in Mode if config.data.mode in ("dual", mode)]
        write_guard_template(draft, encoder, modes, data.trained_together)
        asks = encoder.policy.asks
        asked = next(iter(ask(asks, asks, True, modes[0], data.trained_together)), Ask(asks, asks, True))
        changes = (
            f"{report.changed_fraction:.2%} of the {report.values:,} trained weights, as stored in {', '.join(report.dtypes)}, "
            f"differ from the base. {report.tensors:,} tensors were trained; {report.carried:,} were carried over as bytes."
        )
        write_card(draft, source, config, data.manifest, metrics, changes, asked)
        write_guard_files(draft, config, data.trained_together)
    return report
