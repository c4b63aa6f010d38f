"""Which scores of an evaluation an export's model card gets."""

from dataclasses import replace

from huggingface_hub import ModelCard
from report_examples import some

from jaxguard.config import load
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.data.benchmarks.schema import read_benchmark
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.policies import Policy
from jaxguard.evaluate.report.card import refresh_cards
from jaxguard.guards.loading import weights_digest
from jaxguard.guards.operating_points import Asked, OperatingPoint, OperatingPoints, Share, write_points

CARD = "---\nlicense: mit\n---\n\n# tiny\n\n## Benchmarks\n\nNone.\n"


def test_whole_benchmarks_of_jaxguards_format(tmp_path):
    """Of three guards one has a card, one is another's, one is a repository; of its benchmarks one is evaluated in part."""
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "model.safetensors").write_bytes(b"some")
    policy = Policy("short", rules="No bread.")
    points = OperatingPoints(
        asked=Asked.of(policy, "prompt_harm", Mode.DIRECT, EvaluateConfig()),
        precision="float32",
        positives=4,
        negatives=40,
        examples_sha256="0",
        platt=None,
        points={
            "0.01": OperatingPoint(),
            "0.05": OperatingPoint(threshold=0.75, recall=Share(value=0.5, low=0.25, high=1)),
        },
    )
    write_points(tmp_path, weights_digest(tmp_path), [points])
    guards = [
        {"checkpoint": str(tmp_path)},
        {"name": "other", "format": "majority"},
        {"name": "far", "checkpoint": "a/b"},
    ]
    config = load("gemma4b_5k", {"evaluate": {"guards": guards}}, stage="evaluate")
    first, *others = some().benchmarks
    cells = tuple(replace(cell, complete=cell.benchmark != first) for cell in some().cells)
    evaluation = replace(some(), cells=cells, settings={**some().settings, "generations": 0})
    refresh_cards(evaluation, config, {cell.benchmark: read_benchmark(cell.source) for cell in cells})
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {result.dataset_name for result in results} == set(others)
    cell = next(cell for cell in cells if (cell.guard, cell.benchmark) == ("ours", others[0]))
    values = {
        result.metric_name: result.metric_value
        for result in results
        if result.dataset_name == others[0] and result.task_name.endswith(cell.mode)
    }
    assert values["F1 at P > 0.5"] == round(cell.result.scores.f1.value, 4)
    assert values["F1 at chosen threshold"] == round(cell.thresholded.result.scores.f1.value, 4)
    assert values["AUPRC"] == round(cell.calibration.auprc.value, 4)
    text = (tmp_path / "README.md").read_text()
    assert "F1 at chosen threshold" in text
    assert "| Prompt harm | direct | short | 0.05 | 0.750 | n/a | 0.500 [0.250, 1.000] |" in text
    assert "| 0.01 |" not in text
