"""Running a study: order, skipping, going on, failing, stopping. Every stage is the stub."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxguard.cli import main as cli
from jaxguard.study import stages
from jaxguard.study.cost import clock, speed_of
from jaxguard.study.run import measure_speed, run_study
from jaxguard.study.stages import REQUEUE, StageRunner, note, pending, put_aside
from jaxguard.train import signals
from jaxguard.utils.errors import JaxguardError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def go():
    """go(study): run it; (its exit code, its log with the failures)."""

    def go(study):
        lines = []
        result = run_study(study, lines.append)
        code = REQUEUE if result.stopped else int(bool(result.failed))
        return code, "\n".join([*lines, *(f"{name}: {reason}" for name, reason in result.failed.items())])

    return go


def test_runs_go_in_order_and_what_is_done_is_skipped(study, go, calls):
    code, said = go(study())
    assert code == 0
    assert calls() == ["base evaluate"] + [
        f"{run} {stage}"
        for run in ("bread-8-0", "bread-8-1", "bread-16-0", "bread-16-1", "more")
        for stage in ("train", "evaluate")
    ]
    assert "3 of 6: bread-8-1; about" in said
    assert "0 of 6 runs are done" in said
    code, said = go(study())
    assert (code, calls()) == (0, [])
    assert "6 of 6 runs are done" in said


def test_what_a_stage_depends_on_brings_it_back(study, go, calls):
    go(study())
    calls()
    go(study("evaluate.generations=2"))
    assert {call.split()[1] for call in calls()} == {"evaluate"}
    go(study("evaluate.generations=2", "log.tensorboard=false"))
    assert calls() == []
    Path("runs/study/bread-8-0/evaluate/results.json").unlink()
    go(study("evaluate.generations=2"))
    assert calls() == ["bread-8-0 evaluate"]
    Path("bread.jsonl").write_text(Path("bread.jsonl").read_text().replace("So.", "Thus."))
    go(study("evaluate.generations=2"))
    assert len(calls()) == 11


def test_a_row_is_done_again_when_what_it_reads_was(study, go, calls):
    rows = {"base": {"stages": ["train", "evaluate"]}, "more": {"after": ["base"]}}
    go(study(rows=rows))
    calls()
    go(study(rows={**rows, "base": {"set": {"evaluate.seed": 1}}}))
    assert calls() == ["base evaluate"]
    go(study(rows={**rows, "base": {"set": {"seed": 1}}}))
    assert calls() == ["base train", "base evaluate", "more train", "more evaluate"]


def test_old_output_is_put_aside(study, go, calls):
    """The stages refuse a folder that holds what was made of other inputs."""
    go(study())
    calls()
    code, said = go(study("evaluate.generations=2"))
    assert (code, len(calls())) == (0, 6)
    old = Path("runs/study/bread-8-0.old-1")
    assert "bread-8-0: the old output of evaluate, of other inputs, is in runs/study/bread-8-0.old-1" in said
    assert [path.name for path in old.iterdir()] == ["evaluate"]
    assert Path("runs/study/bread-8-0/export/jaxguard.json").is_file()
    Path("bread.jsonl").write_text(Path("bread.jsonl").read_text().replace("So.", "Thus."))
    code, said = go(study("evaluate.generations=2"))
    assert (code, len(calls())) == (0, 11)
    old = Path("runs/study/bread-8-0.old-2")
    assert "the old output of train, of other inputs, is in runs/study/bread-8-0.old-2" in said
    assert {path.name for path in old.iterdir()} == {"evaluate", "export", "metrics.jsonl", "train.json"}
    assert go(study("evaluate.generations=2"))[0] == 0
    assert calls() == []


def test_what_earlier_stages_of_a_run_wrote_stays(study):
    (run,) = study(rows={"x": {"stages": ["build", "train", "evaluate"]}}).runs
    for name in ("dataset", "export", "evaluate"):
        (run.folder / name).mkdir(parents=True)
    note(run, "build", done=True)
    assert put_aside(run, "train") == Path("runs/study/x.old-1")
    assert {path.name for path in run.folder.iterdir()} == {"dataset", "stages.json"}
    assert {path.name for path in Path("runs/study/x.old-1").iterdir()} == {"export", "evaluate"}
    assert put_aside(run, "build") == Path("runs/study/x.old-2")
    assert [path.name for path in run.folder.iterdir()] == ["stages.json"]


def test_a_run_that_was_stopped_is_begun_anew_when_what_it_reads_was(study, go, calls, behave):
    """Its training would go on from a checkpoint of the old weights: their folder is called as before."""
    rows = {"base": {"stages": ["train"]}, "more": {"after": ["base"]}}
    behave({"more train": "requeue"})
    assert go(study(rows=rows))[0] == REQUEUE
    behave({})
    rows["base"]["set"] = {"seed": 1}
    code, said = go(study(rows=rows))
    assert code == 0
    assert "more: train reads output that was made again; its old output is in runs/study/more.old-1" in said
    assert calls() == ["base train", "more train", "base train", "more train", "more evaluate"]
    assert go(study(rows=rows))[0] == 0
    assert calls() == []


@pytest.fixture
def real(study, monkeypatch, tmp_path, tiny_files):
    """real(stages, *overrides): a study of one row of real stages, in this process; its guard needs no model."""
    monkeypatch.setattr(StageRunner, "run", lambda _, words: cli([words[1].removeprefix("jaxguard."), *words[2:]]))
    monkeypatch.setattr(stages, "COMMANDS", {stage: ("-m", f"jaxguard.{stage}") for stage in stages.COMMANDS})
    tiny_files(tmp_path, data={"mode": "direct", "validation_size": 0}, train={"max_steps": 1}, mesh={"fsdp": -1})
    settings = {
        "evaluate.guards": [{"name": "most", "format": "majority"}],
        "evaluate.benchmarks": [{"name": "own_prompts", "path": "train.jsonl"}],
        "evaluate.resamples": 10,
    }

    def real(names, *overrides):
        rows = {"x": {"stages": names, "set": settings}}
        return study(*overrides, config="tiny.yaml", rows=rows, curve=None, scales={})

    return real


def test_the_evaluation_refuses_and_the_study_puts_aside(real, go):
    assert go(real(["evaluate"]))[0] == 0
    code, said = go(real(["evaluate"], "evaluate.seed=1"))
    assert code == 0
    assert "runs/study/x.old-1" in said
    assert Path("runs/study/x.old-1/evaluate/results.json").is_file()


@pytest.mark.slow
def test_the_training_refuses_and_the_study_puts_aside(real, go):
    assert go(real(["train", "evaluate"]))[0] == 0
    Path("train.jsonl").write_text(Path("train.jsonl").read_text().replace("tell me", "please tell me"))
    code, said = go(real(["train", "evaluate"]))
    assert code == 0
    assert "runs/study/x.old-1" in said
    assert {"config.yaml", "export", "evaluate"} <= {path.name for path in Path("runs/study/x.old-1").iterdir()}
    code, said = go(real(["train", "evaluate"], "seed=3"))
    assert code == 0
    assert "runs/study/x.old-2" in said


def test_a_row_that_fails_is_reported_and_the_others_go_on(study, go, calls, behave):
    behave({"bread-8-0 train": "fail", "base evaluate": "fail"})
    code, said = go(study())
    assert code == 1
    assert "bread-8-0: train ended with code 5" in said
    assert "more: not begun: it reads the output of base" in said
    assert said.count("error: ") == 3
    assert [call for call in calls() if call.startswith(("more", "bread-8-0"))] == ["bread-8-0 train"]
    behave({})
    assert go(study())[0] == 0
    assert calls() == ["base evaluate", "bread-8-0 train", "bread-8-0 evaluate", "more train", "more evaluate"]


def test_a_stage_that_leaves_nothing_has_failed(study, go, behave):
    behave({"bread-8-0 train": "nothing"})
    code, said = go(study())
    assert code == 1
    assert "bread-8-0: train ended with code 0, but did not write runs/study/bread-8-0/export/jaxguard.json" in said


def test_a_stopped_stage_stops_the_study_and_it_goes_on(study, go, calls, behave):
    behave({"bread-8-1 train": "requeue"})
    assert go(study())[0] == REQUEUE == signals.REQUEUE
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
    assert "runs/sets/dataset/loaves/all.parquet" in said
    behave({})
    assert go(study(prepare=build, rows=rows))[0] == 0
    assert calls()[0] == "sets build"
    go(study(prepare=build, rows=rows))
    assert calls() == []


def test_measuring_keeps_the_speed_and_nothing_else(study, calls):
    found = study()
    assert measure_speed(found, print)
    assert calls() == ["measure train"]
    assert not (found.folder / "measure").exists()
    assert json.loads((found.folder / "speed.json").read_text()) == {"tokens_per_second": 200.0}
    assert speed_of(found).trained == 200


def test_measuring_needs_a_run_that_trains(study):
    with pytest.raises(JaxguardError, match="no row of this study trains"):
        measure_speed(study(rows={"base": {"stages": ["evaluate"]}}), print)


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


def test_after_a_kill_it_waits_for_the_stage_that_was_left_behind(study, behave, calls):
    found = study()
    behave({"bread-8-0 train": "hang"})
    process = start()
    wait_for_call("bread-8-0 train")
    with pytest.raises(JaxguardError, match=f"in use by another process.*{process.pid}"):
        run_study(found, print)
    process.kill()
    process.wait(timeout=60)
    process.stdout.close()  # the stage that is left behind still holds the other end
    behave({})
    again = start()
    assert any("waiting for it" in line for line in again.stdout)
    assert calls() == ["base evaluate", "bread-8-0 train"]
    Path("stub/release").touch()
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert [pending(run) for run in found.runs] == [[]] * 6


def test_times_are_for_people():
    assert [clock(s) for s in (90, 3540, 5400)] == ["2 min", "59 min", "1.5 h"]
