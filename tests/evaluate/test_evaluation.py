"""A whole evaluation of a tiny model, by the command: what it leaves behind, and what a kill costs."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from jaxguard.cli import PROVENANCE_CHANGED
from jaxguard.config import load
from jaxguard.data.policies import QUESTIONS
from jaxguard.evaluate.__main__ import main
from jaxguard.evaluate.run import paper_data
from jaxguard.evaluate.scores.results import read_results
from jaxguard.guards.loading import weights_digest
from jaxguard.guards.operating_points import F1, POINTS, read_points
from jaxguard.train.__main__ import main as train
from jaxguard.utils.parse import Fields
from jaxguard.utils.store import read_records

COUNT = 12
PLAIN = ["evaluate.batch=8", "evaluate.generations=2", "evaluate.verdict_tokens=12", "evaluate.reasoning_tokens=8"]


@pytest.fixture(scope="module")
def run(tiny_files, tmp_path_factory):
    """A trained run's config, and a benchmark of mild questions: who mentions a lamp is harmful."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny_files(folder, train={"max_steps": 2}, mesh={"fsdp": -1})
    assert train(["--config", str(config)]) == 0
    things = ["lamps" if i % 3 else "bread" for i in range(COUNT)]
    rows = [{"text": f"tell me about {what} {i}", "what": what} for i, what in enumerate(things)]
    (folder / "lamps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = {
        "name": "lamps",
        "title": "Lamps",
        "group": "safety_prompt",
        "question": "prompt_harm",
        "source": {"path": str(folder / "lamps.jsonl")},
        "examples": [{"prompt": "text", "positive": {"column": "what", "equals": "lamps"}}],
        "slices": [{"name": "category", "column": "what"}],
        "expected": {"positive": 8, "negative": 4},
        "license": "none",
        "citation": "nobody",
        "url": "https://example.org",
    }
    (folder / "lamps_benchmark.yaml").write_text(yaml.safe_dump(benchmark))
    tree = yaml.safe_load(config.read_text())
    tree["evaluate"] = {"benchmarks": [{"name": str(folder / "lamps_benchmark.yaml"), "label": "lamps"}]}
    config.write_text(yaml.safe_dump(tree))
    return config


def evaluate(config, *overrides):
    return main(["--config", str(config), *PLAIN, *overrides])


def predictions(config, guard="ours", mode="direct", label="lamps"):
    path = config.parent / f"runs/tiny/evaluate/predictions/{guard}/{mode}/{label}.jsonl"
    return list(read_records(path, Fields))


def test_both_modes_and_the_baselines_are_scored(run):
    guards = "evaluate.guards=[{name: ours}, {name: words, format: tfidf}, {name: most, format: majority}]"
    assert evaluate(run, guards) == 0
    folder = run.parent / "runs/tiny/evaluate"
    found = read_results(folder / "results.json")
    cells = {(cell.guard, cell.mode): cell for cell in found.cells}
    assert set(cells) == {("ours", "reasoning"), ("ours", "direct"), ("words", "direct"), ("most", "direct")}
    words = cells["words", "direct"]
    assert words.examples == COUNT
    assert words.result.scores.f1.value > 0.8
    assert (words.versus.guard, words.versus.mode) == ("ours", "direct")
    assert cells["ours", "direct"].versus is None
    assert cells["ours", "reasoning"].result.generations == 2
    assert cells["ours", "reasoning"].cost.forced > 0
    assert set(words.slices) == {"category: lamps", "category: bread"}
    assert {(a.guard, a.name) for a in found.averages} >= {("ours", "prompt"), ("words", "prompt")}
    for name in ("report.md", "report.html"):
        assert "Lamps" in (folder / name).read_text()
    assert len(predictions(run)) == COUNT
    card = ModelCard.load(run.parent / "runs/tiny/export/README.md").data
    f1 = {r.task_name: r.metric_value for r in card.eval_results if (r.metric_type, r.dataset_name) == ("f1", "lamps")}
    own = {f"Prompt harm, {cell.mode}": cell.result.scores.f1.value for cell in found.cells if cell.guard == "ours"}
    assert f1 == pytest.approx(own, abs=1e-4)
    assert len(f1) == 2
    assert card.model_name == "tiny"


def test_part_of_a_benchmark_does_not_change_the_card(run):
    card = run.parent / "runs/tiny/export/README.md"
    before = card.read_bytes()
    name = "evaluate.guards=[{name: partly, modes: [direct]}]"
    assert evaluate(run, name, "evaluate.generations=0", "evaluate.limit=3") == 0
    assert card.read_bytes() == before


def test_probabilities_alone_need_no_sampling(run):
    name = "evaluate.guards=[{name: scored, modes: [direct]}]"
    validation = f"evaluate.validation=[{{kind: jsonl, path: {run.parent / 'train.jsonl'}}}]"
    assert evaluate(run, name, validation, "evaluate.generations=0") == 0
    found = predictions(run, "scored")
    for one in found:
        assert one["verdicts"] == {"prompt_harm": [1 if one["probabilities"]["prompt_harm"] > 0.5 else 0]}
        assert not one["texts"]
    (cell,) = read_results(run.parent / "runs/tiny/evaluate/results.json").cells
    assert cell.thresholded is not None
    assert len(predictions(run, "scored", label="validation-prompt_harm")) == 48
    export, folder = run.parent / "runs/tiny/export", run.parent / "runs/tiny/evaluate/predictions/scored"
    assert (export / POINTS).read_bytes() == (folder / POINTS).read_bytes()
    points, _ = read_points(export, weights_digest(export))
    [own] = [each for each in points.values() if each.asked.question == "prompt_harm"]
    assert (own.asked.mode, own.positives + own.negatives) == ("direct", 48)
    assert own.threshold(F1) == cell.thresholded.threshold
    assert evaluate(run, name, "evaluate.generations=0") == 0  # the same threshold, without the examples
    (again,) = read_results(run.parent / "runs/tiny/evaluate/results.json").cells
    assert again.thresholded == cell.thresholded


def test_reasoning_cannot_be_left_out(run, capsys):
    assert evaluate(run, "evaluate.generations=0") == 2
    assert "modes=[direct]" in capsys.readouterr().err


def test_other_sampling_is_refused(run, capsys):
    name = "evaluate.guards=[{name: scored, modes: [direct]}]"
    assert evaluate(run, name, "evaluate.generations=0") == 0
    assert evaluate(run, name, "evaluate.generations=1") == PROVENANCE_CHANGED
    assert "generations: 0 there, 1 now" in capsys.readouterr().err


def test_unsupported_questions_are_left_out_of_the_validation(run, capsys, tmp_path):
    """No training example has a refusal label, so the baseline knows nothing of refusals."""
    rows = [json.loads(line) for line in (run.parent / "train.jsonl").read_text().splitlines()][:6]
    refusals = [
        {**row, "response": "No.", "refusal_label": ("refusal", "compliance")[i % 2]} for i, row in enumerate(rows)
    ]
    (tmp_path / "refusals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refusals))
    policy = yaml.safe_load((run.parent / "lamps.yaml").read_text())
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({**policy, "asks": list(QUESTIONS)}))
    validation = f"evaluate.validation=[{{kind: jsonl, path: {tmp_path / 'refusals.jsonl'}}}]"
    baseline = "evaluate.guards=[{name: most, format: majority}]"
    assert evaluate(run, baseline, validation, f"data.policy={tmp_path / 'all.yaml'}", "name=baselines") == 0
    assert "validation-response_refusal is left out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        ([], "WildGuardMix"),
        (["data.train=[{kind: aegis2}]"], "Aegis 2.0"),
        (["data.train=[{kind: wildguardmix}, {kind: aegis2}]"], None),
        (["data.train=[{kind: jsonl, path: built.parquet}]"], None),
        (["train.epochs=50"], None),
    ],
)
def test_runs_stand_beside_the_paper_where_their_data_are_its(overrides, data):
    base = ["data.train=[{kind: wildguardmix}]", "train.epochs=5"]
    assert paper_data(load("llama8b_direct_5k", [*base, *overrides])) == data


def test_without_an_export_it_says_to_train(run, capsys):
    assert evaluate(run, "name=untrained") == 2
    assert "jaxguard train" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from jaxguard.evaluate.__main__ import main
from jaxguard.guards.loading import Predictions
append = Predictions.append
def kill_at_the_fourth(predictions, answer):
    if len(predictions.answers) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    append(predictions, answer)
Predictions.append = kill_at_the_fourth
main(sys.argv[1:])
"""


def test_a_kill_loses_the_batch_in_flight_at_most(run):
    options = ["--config", str(run), *PLAIN, "evaluate.guards=[{name: killed, modes: [direct]}]", "evaluate.batch=4"]
    command = [sys.executable, "-c", KILLED, *options]
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    killed = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    stored = predictions(run, "killed")
    assert len(stored) == 3
    assert main(options) == 0
    after = predictions(run, "killed")
    assert after[:3] == stored
    assert len({a["example_id"] for a in after}) == len(after) == COUNT
