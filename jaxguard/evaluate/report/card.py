"""The scores of a guard on whole benchmarks as the `model-index` of its export's model card, and its operating points."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxguard.config import Config
from jaxguard.data.benchmarks.schema import BenchmarkDefinition
from jaxguard.data.files import weights_digest
from jaxguard.data.format.dialogue import TITLES
from jaxguard.data.model_card import Metric, Named, Score, add_scores
from jaxguard.evaluate.report.tables import AT_THRESHOLD, f1_title
from jaxguard.evaluate.scores.results import Cell, Evaluation
from jaxguard.guards.loading import checkpoint_of
from jaxguard.guards.operating_points import OperatingPoints, read_points
from jaxguard.report import Block, Table, note
from jaxguard.utils.statistics import Estimate


def refresh_cards(evaluation: Evaluation, config: Config, definitions: Mapping[str, BenchmarkDefinition]) -> None:
    """Add the scores to the card of every export that was evaluated; `definitions`: label of a benchmark -> what it is.

    Benchmarks of which only some examples were evaluated are left out. JaxguardError: a card cannot be written.
    """
    local = {each.label or each.name for each in config.evaluate.benchmarks if each.path} if config.evaluate else set()
    for guard in config.evaluate.guards if config.evaluate else ():
        if guard.format == "jaxguard":
            cells = [cell for cell in evaluation.cells if cell.guard == guard.name and cell.complete]
            hubs = [None if cell.benchmark in local else definitions[cell.benchmark].source.hub for cell in cells]
            scores = [_score(cell, hub, f1_title(evaluation)) for cell, hub in zip(cells, hubs, strict=True)]
            folder = Path(checkpoint_of(guard, config))
            points, _ = read_points(folder, weights_digest(folder))
            add_scores(folder, scores, *_points_table(points.values()))


def _points_table(sets: Iterable[OperatingPoints]) -> list[Block]:
    """The operating points of guard.json; nothing where there are none."""
    table = Table(("question", "mode", "policy", "point", "threshold", "false-positive rate", "recall"), left=4)
    for each in sets:
        for name, point in each.points.items():
            if point.threshold is not None:
                shares = (point.false_positive_rate, point.recall)
                estimates = (Estimate(x.value, x.low, x.high) if x else None for x in shares)
                asked = each.asked
                table.add(TITLES[asked.question], asked.mode, asked.policy, name, point.threshold, *estimates)
    text = "Operating points: thresholds on calibrated probabilities, with their rates on the validation examples."
    return [note(f"{text} jaxguard check reads them from guard.json."), table] if table.rows else []


def _score(cell: Cell, hub: str | None, f1: str) -> Score:
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
        dataset=Named(type=hub or cell.source, name=cell.benchmark),
        metrics=[Metric(type=kind, name=name, value=round(value, 4)) for kind, name, value in measured],
    )
