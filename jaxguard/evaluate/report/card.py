"""The scores of a guard on whole benchmarks as the `model-index` of its export's model card."""

from collections.abc import Mapping
from pathlib import Path

from jaxguard.config import Config
from jaxguard.data.benchmarks.schema import BenchmarkDefinition
from jaxguard.data.format.dialogue import TITLES
from jaxguard.data.model_card import Metric, Named, Score, add_scores
from jaxguard.evaluate.report.tables import AT_THRESHOLD, f1_title
from jaxguard.evaluate.scores.results import Cell, Evaluation
from jaxguard.guards.loading import checkpoint_of


def refresh_cards(evaluation: Evaluation, config: Config, definitions: Mapping[str, BenchmarkDefinition]) -> None:
    """Add the scores to the card of every export that was evaluated; `definitions`: label of a benchmark -> what it is.

    Benchmarks of which only some examples were evaluated are left out. JaxguardError: a card cannot be written.
    """
    for guard in config.evaluate.guards if config.evaluate else ():
        if guard.format == "jaxguard":
            cells = [cell for cell in evaluation.cells if cell.guard == guard.name and cell.complete]
            scores = [_score(cell, definitions[cell.benchmark], f1_title(evaluation)) for cell in cells]
            add_scores(Path(checkpoint_of(guard, config)), scores)


def _score(cell: Cell, definition: BenchmarkDefinition, f1: str) -> Score:
    """A cell as an item of `model-index`, F1 under the name `f1`; data that are not on the hub have their name for a type."""
    scores, chosen = cell.result.scores, cell.thresholded
    metrics = [
        ("f1", f1, scores.f1),
        ("f1", AT_THRESHOLD, chosen.result.scores.f1 if chosen else None),
        ("precision", "Precision", scores.precision),
        ("recall", "Recall", scores.recall),
        ("average_precision", "AUPRC", cell.calibration.auprc if cell.calibration else None),
    ]
    measured = [(kind, name, x.value) for kind, name, x in metrics if x is not None and x.value is not None]
    return Score(
        task=Named(type="text-classification", name=f"{TITLES[cell.question]}, {cell.mode}"),
        dataset=Named(type=definition.source.hub or cell.source, name=cell.benchmark),
        metrics=[Metric(type=kind, name=name, value=round(value, 4)) for kind, name, value in measured],
    )
