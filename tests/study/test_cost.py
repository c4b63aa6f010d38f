"""What a study takes, against hand-worked cases."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from jaxguard.study.__main__ import print_cost
from jaxguard.study.cost import Speed, Work, estimate, seconds, speed_of, teacher_work, training_examples, work
from jaxguard.study.grid import open_study

ROOT = Path(__file__).parents[2]


def test_the_5k_run_by_hand(monkeypatch):
    """5,000 × 5 / 32 = 781 updates of 32 examples of 600 + 300 + 16 tokens, 6 FLOPs a parameter and token."""
    monkeypatch.chdir(ROOT)
    study = open_study("paper/controls")
    run = next(run for run in study.runs if run.name == "seeds-reasoning-0")
    found = work(run)
    assert found.steps == 781
    assert found.trained == 781 * 32 * 916 == 22_892_672
    # The benchmarks of both averages, once in the one mode that is trained, each with four answers.
    predicted = 1699 + 1964 + 1680 + 100 + 2853 + 1709 + 852 + 446 + 300 + 2362 + 200
    assert (found.predictions, found.generated) == (predicted, 4 * 316 * predicted)
    # After each of the four reasoning traces P(harmful) is read: that of a prompt in one place, that of a response after both
    # answers about its prompt as well.
    responses = 1709 + 852 + 446 + 300
    assert found.read == 600 * predicted + 4 * 900 * (predicted - responses + 3 * responses)
    assert not found.assumed
    train = 6 * 8.03e9 * 22_892_672 / (8 * 312e12 * 0.4)
    read = 2 * 8.03e9 * found.read / (8 * 312e12 * 0.4)
    generate = 2 * 8.03e9 * found.generated / (8 * 312e12 * 0.04)
    assert seconds(found, speed_of(study), run.cost) == pytest.approx(train + read + generate + 2 * 120)
    assert train == pytest.approx(1104.8, abs=0.1)


def test_both_modes_of_a_dual_run_are_judged(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {run.name: run for run in open_study("paper/controls").runs}
    dual, reasoning, direct = (work(runs[f"seeds-{mode}-0"]) for mode in ("dual", "reasoning", "direct"))
    assert dual.trained == (reasoning.trained + direct.trained) / 2
    assert dual.predictions == 2 * reasoning.predictions
    assert dual.generated == reasoning.generated + direct.generated


def test_examples_are_counted_in_local_files_and_else_taken_from_the_row(study):
    runs = {run.name: run for run in study().runs}
    assert training_examples(runs["bread-8-0"]) == (8, False)
    assert training_examples(runs["more"]) == (20, False)
    Path("bread.jsonl").unlink()
    rows = {"x": {"examples": 7}, "y": {}}
    x, y = study("data.validation_size=2", rows=rows).runs
    assert (training_examples(x), training_examples(y)) == ((5, True), (0, True))


def test_speed_is_the_best_that_is_known(study, tmp_path):
    found = study("cost.tokens_per_second=50", "cost.generated_per_second=9")
    assert speed_of(study()).source.startswith("8 × A100-80GB, assumed")
    assert speed_of(found) == Speed(50, 150, 9, speed_of(found).source)
    assert "assumption" in speed_of(found).source
    folder = found.runs[1].folder
    folder.mkdir(parents=True)
    lines = [{"speed": {"tokens_per_second": n}} for n in (1, 2, 40, 60, 80)]
    text = "".join(json.dumps(line) + "\n" for line in (*lines, {"validation/loss": 1}))
    (folder / "metrics.jsonl").write_text(text + '{"cut', encoding="utf-8")
    assert speed_of(found).trained == 60
    assert "3 steps of this study" in speed_of(found).source
    (found.folder / "speed.json").write_text('{"tokens_per_second": 30}', encoding="utf-8")
    assert speed_of(found).trained == 30


def test_the_table_adds_up(study, capsys):
    found = study(
        "cost.tokens_per_second=100", "cost.generated_per_second=100", "cost.start_seconds=0", "cost.devices=2"
    )
    # 8 × 5 / 4 = 10 steps of 4 examples of 616 tokens; 20 examples predicted, 4 × 16 tokens generated for each, and its prompt
    # read once to answer, and for the probability of the response's verdict once for each place of the tree of two lines
    one = 10 * 4 * 616 / 100 + 20 * (1 + 3) * 600 / 300 + 20 * 64 / 100
    assert {run.name: s for run, _, s in estimate(found)}["bread-8-0"] == pytest.approx(one)
    print_cost(found, Console(width=150))
    shown = capsys.readouterr().out
    assert f"{one * 2 / 3600:.2f}" in next(line for line in shown.splitlines() if "bread-8-0" in line)
    assert "6 runs" in shown


def test_the_miniature_takes_the_minutes_that_the_documents_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = open_study("paper/sample_efficiency", "smollm")
    assumed = Speed(130, 390, 150, "")
    assert study.definition.cost.tokens_per_second == assumed.trained
    minutes = sum(seconds(work(run), assumed, run.cost) for run in study.runs) / 60
    assert minutes < 27
    said = f"{len(study.runs)} runs, estimated at {minutes:.0f} minutes"
    assert said in (ROOT / "docs/studies.md").read_text(encoding="utf-8")


def test_what_a_teacher_takes_is_told_apart(study, capsys):
    """20 examples of 600 tokens and traces of 300 + 16; a budget shortens each trace, which is then read as well."""
    distill = {"distill.teacher.model": "baker", "distill.budgets": [1, 2]}
    read = [{"kind": "jsonl", "path": "runs/traces/traces.jsonl"}]
    rows = {"x": {"set": {"data.train": read, "data.subset": 8}}}
    found = study(prepare={"traces": {"stages": ["distill"], "set": distill}}, rows=rows)
    print_cost(found, Console(width=150))
    shown = capsys.readouterr().out
    assert "traces needs a teacher" in shown
    assert "20 examples, 48 k tokens read and 19 k generated" in shown
    assert (teacher_work(found.prepared[0]).read, teacher_work(found.prepared[0]).generated) == (
        20 * 2400,
        20 * 3 * 316,
    )
    print_cost(study(), Console(width=150))
    assert "teacher" not in capsys.readouterr().out


def test_mining_reads_probabilities_too(study):
    (run,) = study(rows={"x": {"stages": ["mine"]}}).runs
    assert work(run) == Work(predictions=20, read=20 * 2 * 600, generated=20 * 4 * 16, stages=1)


def test_baselines_cost_nothing(study):
    baseline = {"evaluate.guards": [{"name": "most", "format": "majority"}]}
    (run,) = study(rows={"x": {"stages": ["evaluate"], "set": baseline}}).runs
    assert work(run) == Work(stages=1)


def test_work_adds_up():
    assert Work(1, 2, 3, 4, 5, 6) + Work(10, 20, 30, 40, 50, 60, True) == Work(11, 22, 33, 44, 55, 66, True)
