"""Running a study: order, skipping, resuming, failing, stopping. Every stage is the stub."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxguard.study import run as study_run
from jaxguard.study.__main__ import main
from jaxguard.study.run import REQUEUE, pending, run_study
from jaxguard.train import hosts
from jaxguard.utils.errors import JaxguardError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def go():
    """go(study): run it; (its exit code, its log)."""

    def go(study):
        lines = []
        code = run_study(study, lines.append)
        return code, "\n".join(lines)

    return go


def test_runs_go_in_order_and_what_is_done_is_skipped(study, go, calls):
    code, said = go(study())
    assert code == 0
    assert calls() == ["base evaluate"] + [
        f"{run} {stage}"
        for run in ("bread-8-0", "bread-8-1", "bread-16-0", "bread-16-1", "more")
        for stage in ("train", "evaluate")
    ]
    assert "3 of 6: bread-8-1" in said
    assert "0 of 6 runs are done" in said
    code, said = go(study())
    assert (code, calls()) == (0, [])
    assert "6 of 6 runs are done" in said


def test_what_a_stage_depends_on_brings_it_back(study, go, calls):
    """The stages refuse a folder that holds what was made of other inputs, and say what to do; the study reports it."""
    go(study())
    calls()
    code, said = go(study("evaluate.generations=2"))
    assert code == 1
    assert "bread-8-0: evaluate ended with code 3" in said
    for folder in Path("runs/study").glob("*/evaluate"):
        shutil.rmtree(folder)
    assert go(study("evaluate.generations=2"))[0] == 0
    assert {call.split()[1] for call in calls()} == {"evaluate"}
    go(study("evaluate.generations=2", "log.tensorboard=false"))
    assert calls() == []
    Path("runs/study/bread-8-0/evaluate/results.json").unlink()
    go(study("evaluate.generations=2"))
    assert calls() == ["bread-8-0 evaluate"]
    Path("bread.jsonl").write_text(Path("bread.jsonl").read_text().replace("So.", "Thus."))
    code, said = go(study("evaluate.generations=2"))
    assert code == 1
    assert "bread-8-0: train ended with code 3" in said
    shutil.rmtree("runs/study")
    assert go(study("evaluate.generations=2"))[0] == 0
    assert len(calls()) == 11


def test_checkpoints_of_runs_that_are_done_can_be_left_out(study, go, calls, behave):
    for keep in (True, False):
        opened = study(rows={"x": {}, "y": {}}, keep_checkpoints=keep)
        behave({"y evaluate": "requeue"})
        folders = [run.folder / "checkpoints" for run in opened.runs]
        for folder in folders:
            folder.mkdir(parents=True)
        go(opened)
        assert [folder.exists() for folder in folders] == [keep, True], "y is not done"
        shutil.rmtree("runs/study")
        calls()
    assert (
        go(study(rows={"x": {}}, keep_checkpoints=False))[0]
        == go(study(rows={"x": {}}, keep_checkpoints=False))[0]
        == 0
    )
    assert calls() == ["x train", "x evaluate"]


@pytest.mark.slow
def test_the_smallest_study_runs_at_scale_smollm(monkeypatch, tmp_path, tiny_checkpoint):
    """Its stages are real, on the one device of a CPU; its weights are tiny ones."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.chdir(ROOT)
    changes = [f"run_folder={tmp_path}", f"model.checkpoint={tiny_checkpoint}", "data.max_seq_len=2048"]
    arguments = ["paper/sentence_budget", "--scale", "smollm", *changes]
    assert main(["run", *arguments]) == 0
    assert main(["report", *arguments]) == 0
    folder = tmp_path / "sentence_budget-smollm"
    text = (folder / "report.md").read_text()
    lines = [
        line for line in text.splitlines() if line.startswith(("| shortened, ", "| full_length ", "| label_only "))
    ]
    assert len(lines) == 4 * text.count("\n## "), "a line for each run in every table, but that of words"
    assert not any("n/a" in line or "part" in line for line in lines)
    assert "Words by sentences of a trace" in (folder / "report.html").read_text()
    assert list(folder.rglob("checkpoints")) == []
    assert list(folder.glob(".programs/*-cache"))


@pytest.mark.slow
def test_second_rounds_run_at_scale_smollm(monkeypatch, tmp_path, tiny_checkpoint):
    """Hard examples are mined, and a guard learns from them by supervision, preference and reinforcement."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.chdir(ROOT)
    benchmarks = [{"name": "wildguardtest_prompt", "path": "configs/scales/smollm/exchanges.jsonl"}]
    changes = [f"run_folder={tmp_path}", f"model.checkpoint={tiny_checkpoint}", "data.max_seq_len=2048"]
    changes.append(f"evaluate.benchmarks={json.dumps(benchmarks)}")
    assert main(["run", "paper/reinforce", "--scale", "smollm", *changes]) == 0


BASE = {
    "base": {"stages": ["train", "mine", "evaluate"]},
    "more": {"after": ["base"], "set": {"model.checkpoint": "{study}/base/export"}},
}


def test_a_row_is_done_again_when_what_it_reads_was(study, go, calls):
    """How its base is scored is nothing to it."""
    rows = {key: dict(row) for key, row in BASE.items()}
    go(study(rows=rows))
    calls()
    shutil.rmtree("runs/study/base/evaluate")
    rows["base"]["set"] = {"evaluate.resamples": 10, "evaluate.limit": 5}
    go(study(rows=rows))
    assert calls() == ["base evaluate"]
    shutil.rmtree("runs/study/base")
    rows["base"]["set"] = {"seed": 1}
    code, said = go(study(rows=rows))
    assert (code, "more: train ended with code 3" in said) == (1, True)
    assert calls() == ["base train", "base mine", "base evaluate"]
    shutil.rmtree("runs/study/more")
    assert go(study(rows=rows))[0] == 0
    assert calls() == ["more train", "more evaluate"]


def test_what_has_no_effect_leaves_a_run_done(study, go, calls):
    go(study(rows=BASE))
    calls()
    changes = "train.accumulation=2", "checkpoint.every=7", "mesh.fsdp=1", "data.prefetch=2", "evaluate.batch=4"
    assert go(study(*changes, rows=BASE))[0] == 0
    assert calls() == []


@pytest.mark.parametrize("what", ["weights", "policy", "benchmark"])
def test_a_run_is_done_again_when_a_folder_or_yaml_file_that_it_reads_changed(study, go, calls, what):
    """Also what lies outside of the study, and what its config only names."""
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    files = {
        "weights": Path("other/model.safetensors"),
        "policy": Path("kitchen.yaml"),
        "benchmark": Path("answers.yaml"),
    }
    files["weights"].write_text("one")
    for name, shipped in (("policy", "policies/demo"), ("benchmark", "benchmarks/own_responses")):
        shutil.copy(ROOT / f"configs/{shipped}.yaml", files[name])
    benchmarks = [{"name": "answers.yaml", "path": "bread.jsonl"}]
    settings = {"model.checkpoint": "other", "data.policy": "kitchen.yaml", "evaluate.benchmarks": benchmarks}
    rows = {"x": {"set": settings}}
    go(study(rows=rows))
    assert (go(study(rows=rows))[0], calls()) == (0, ["x train", "x evaluate"])
    text = files[what].read_text()
    files[what].write_text(text.replace("one", "two") if what == "weights" else f"{text}\n" + CHANGES[what])
    go(study(rows=rows))
    assert calls() == (["x evaluate"] if what == "benchmark" else ["x train", "x evaluate"])


CHANGES = {"policy": "allowed: [Bread.]\n", "benchmark": "# changed\n"}


def test_a_file_that_changes_while_a_stage_runs_is_no_input_of_it(study, behave):
    behave({"x train": "hang"})
    opened = study(rows={"x": {"stages": ["train"]}})
    process = start()
    wait_for_call("x train")
    Path("bread.jsonl").write_text(Path("bread.jsonl").read_text().replace("So.", "Thus."))
    Path("stub/release").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert pending(opened.runs[0]) == ["train"]


@pytest.mark.slow
def test_the_real_stages_refuse_output_of_other_data_and_say_what_to_do(
    study, go, monkeypatch, tmp_path, tiny_files, capfd
):
    monkeypatch.setattr(study_run, "ENTRY", ("-m", "jaxguard"))
    tiny_files(tmp_path, data={"mode": "direct", "validation_size": 0}, train={"max_steps": 1}, mesh={"fsdp": -1})
    settings = {
        "evaluate.guards": [{"name": "most", "format": "majority"}],
        "evaluate.benchmarks": [{"name": "own_prompts", "path": "train.jsonl"}],
        "evaluate.resamples": 10,
    }

    def real(*overrides):
        rows = {"x": {"stages": ["train", "evaluate"], "set": settings}}
        return study(*overrides, config="tiny.yaml", rows=rows, curve=None, scales={})

    assert go(real())[0] == 0
    code, said = go(real("evaluate.seed=1"))
    assert (code, "evaluate ended with code 3" in said) == (1, True)
    assert "runs/study/x" in capfd.readouterr().err
    Path("train.jsonl").write_text(Path("train.jsonl").read_text().replace("tell me", "please tell me"))
    code, said = go(real())
    assert (code, "train ended with code 3" in said) == (1, True)
    assert "runs/study/x" in capfd.readouterr().err


def test_inputs_that_are_missing_are_said_once_before_anything_runs(study, go, calls, capsys):
    """What another run of the study makes is not missing."""
    Path("bread.jsonl").unlink()
    with pytest.raises(JaxguardError) as caught:
        go(study())
    lines = [line for line in str(caught.value).splitlines() if "bread.jsonl" in line]
    assert len(lines) == 2, "of the training, and of the benchmark"
    assert all(line.count(run) == 1 for line in lines for run in ("bread-8-0", "bread-16-1", "more"))
    assert "base/export" not in str(caught.value)
    assert (calls(), Path("runs").exists()) == ([], False)
    assert main(["run", "study.yaml", "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert (printed.err.count("data.train.0.path"), "bread-8-0" in printed.out) == (1, True)


def test_a_row_that_fails_is_reported_and_the_others_run(study, go, calls, behave):
    behave({"bread-8-0 train": "fail", "base evaluate": "fail"})
    code, said = go(study())
    assert code == 1
    assert "bread-8-0: train ended with code 5" in said
    assert "more: not begun: it reads the output of base" in said
    assert said.count("error: ") == 6, "as they happen, and at the end"
    assert [call for call in calls() if call.startswith(("more", "bread-8-0"))] == ["bread-8-0 train"]
    behave({})
    assert go(study())[0] == 0
    assert calls() == ["base evaluate", "bread-8-0 train", "bread-8-0 evaluate", "more train", "more evaluate"]


def test_a_stopped_stage_stops_the_study_which_resumes(study, go, calls, behave):
    behave({"bread-8-1 train": "requeue"})
    assert go(study())[0] == REQUEUE == hosts.REQUEUE
    assert calls()[-1] == "bread-8-1 train"
    behave({})
    assert go(study())[0] == 0
    assert calls()[0] == "bread-8-1 train"


def test_what_is_needed_first_is_made_once(study, go, calls, behave):
    build = {"sets": {"stages": ["build"], "set": {"build.sets": [{"name": "loaves"}]}}}
    reads = [{"kind": "jsonl", "path": "runs/sets/dataset/loaves/all.parquet"}]
    rows = {"bread": {"set": {"data.train": reads, "data.subset": 8}}}
    behave({"sets build": "fail"})
    code, said = go(study(prepare=build, rows=rows))
    assert (code, calls()) == (1, ["sets build"])
    assert "bread: not begun: it reads the output of sets" in said
    behave({})
    assert go(study(prepare=build, rows=rows))[0] == 0
    assert calls()[0] == "sets build"
    _, said = go(study(prepare=build, rows=rows))
    assert (calls(), "other settings" in said) == ([], False)
    build["sets"]["set"]["build.similarity"] = 0.9
    _, said = go(study(prepare=build, rows=rows))
    assert calls() == []
    assert "note: runs/sets was made with other settings than this study's" in said


def start():
    command = [sys.executable, "-u", str(ROOT / "tests/study/start.py"), str(ROOT / "tests/study/stub.py")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for_call(call):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = Path("stub/calls.txt")
        if path.is_file() and call in path.read_text().splitlines():
            return
        time.sleep(0.05)
    raise AssertionError(f"{call} was never begun")


@pytest.mark.slow
def test_sigterm_is_handed_on_and_the_code_passed_on(study, behave, calls):
    study()
    behave({"bread-8-0 train": "hang"})
    process = start()
    wait_for_call("bread-8-0 train")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE
    assert "run the same command again" in said
    assert calls() == ["base evaluate", "bread-8-0 train"]


@pytest.mark.slow
def test_a_killed_study_resumes(study, behave, calls):
    definition = study()
    behave({"bread-8-0 train": "hang"})
    process = start()
    wait_for_call("bread-8-0 train")
    with pytest.raises(JaxguardError, match=f"in use by another process.*{process.pid}"):
        run_study(definition, print)
    process.kill()
    behave({})
    Path("stub/release").touch()  # the stage that was left behind ends
    process.communicate(timeout=60)
    again = start()
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert calls()[:2] == ["base evaluate", "bread-8-0 train"]
    assert [pending(run) for run in definition.runs] == [[]] * 6
