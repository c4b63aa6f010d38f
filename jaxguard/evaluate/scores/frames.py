"""An evaluation as pandas DataFrames, a row for each guard, mode and benchmark (or average)."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jaxguard.utils.statistics import Estimate

if TYPE_CHECKING:
    import pandas as pd

    from jaxguard.evaluate.scores.results import Average, Cell, Evaluation, Versus

SCORES = ("f1", "precision", "recall", "false_positive_rate", "agreement", "kappa")


def tables(evaluation: "Evaluation") -> dict[str, "pd.DataFrame"]:
    """The numbers of an evaluation; scores have the ends of their 95 % intervals as `_low` and `_high`.

    Returns:
        scores: of the sampled verdicts on every benchmark.
        averages: F1 of prompt, response, safety and custom benchmarks; `missing` names those left out.
        cost: means per example in seconds and tokens; `wall` is of all examples, forced, unscored and cut are counts.
        calibration: scores of probabilities, the threshold chosen on validation examples, and F1 at it.
        versus: F1 less that of the first guard, on benchmarks and averages, with p-values.
    """
    import pandas as pd  # takes a second, which the command line need not wait for

    cells, averages = evaluation.cells, evaluation.averages
    rows: dict[str, Iterable[dict[str, Any]]] = {
        "scores": map(_scores, cells),
        "averages": (_average_name(a) | _estimate("f1", a.f1) | {"missing": ", ".join(a.missing)} for a in averages),
        "cost": (_cell_name(cell) | {"examples": cell.examples} | asdict(cell.cost) for cell in cells),
        "calibration": (_calibration(cell) for cell in cells if cell.calibration),
        "versus": [
            *(_cell_name(cell) | _versus(cell.versus) for cell in cells if cell.versus),
            *(_average_name(a) | _versus(a.versus) for a in averages if a.versus),
        ],
    }
    return {name: pd.DataFrame(list(each)) for name, each in rows.items()}


def _cell_name(cell: "Cell") -> dict[str, Any]:
    return {"guard": cell.guard, "mode": cell.mode, "benchmark": cell.benchmark}


def _average_name(average: "Average") -> dict[str, Any]:
    return {"guard": average.guard, "mode": average.mode, "average": average.name}


def _estimate(name: str, score: Estimate) -> dict[str, Any]:
    return {
        name: score.value,
        f"{name}_low": score.low,
        f"{name}_high": score.high,
        f"{name}_deviation": score.deviation,
    }


def _scores(cell: "Cell") -> dict[str, Any]:
    result = cell.result
    row = _cell_name(cell) | {"examples": cell.examples, "positives": result.scores.positives}
    for name in SCORES:
        row |= _estimate(name, getattr(result.scores, name))
    return row | {"generations": result.generations, "unparsable": result.unparsable, "complete": cell.complete}


def _calibration(cell: "Cell") -> dict[str, Any]:
    row, chosen = _cell_name(cell), cell.thresholded
    for name in ("auprc", "auroc", "brier"):
        row |= _estimate(name, getattr(cell.calibration, name))
    row["ece"] = cell.calibration.ece if cell.calibration else None
    row["threshold"] = chosen.threshold if chosen else None
    return row | _estimate("f1_at_threshold", chosen.result.scores.f1 if chosen else Estimate(None))


def _versus(versus: "Versus") -> dict[str, Any]:
    f1, test = versus.f1, versus.mcnemar
    return {
        "first_guard": versus.guard,
        "first_mode": versus.mode,
        "f1_difference": f1.value,
        "low": f1.low,
        "high": f1.high,
        "p": f1.p,
        "right_alone": test.only_first if test else None,
        "first_right_alone": test.only_second if test else None,
        "mcnemar_p": test.p if test else None,
    }
