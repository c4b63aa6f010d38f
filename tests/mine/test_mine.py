"""Mining by the command: what is requested, stored, counted and written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from bakery import Baker, number, row, write

from jaxguard.cli import PROVENANCE_CHANGED
from jaxguard.config import load
from jaxguard.config.data import SourceConfig
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.prepare import select
from jaxguard.data.sources import load_examples
from jaxguard.mine.__main__ import main


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_training_example_is_asked_once_as_it_was_trained(mined, baker):
    mined("data.mode=dual")
    selection = select(load("first.yaml", ["data.mode=dual"]))
    assert len(selection.train) == 55
    assert Counter(mode for _, mode in selection.train) == {Mode.REASONING: 28, Mode.DIRECT: 27}
    asked = {ask.example.id: ask.mode for ask in baker.asked}
    assert asked == {example.id: mode for example, mode in selection.train}
    assert len(baker.asked) == 55
    alike = [each for each, _ in groupby((ask.mode, ask.questions) for ask in baker.asked)]
    assert len(alike) == len(set(alike)) == 4  # what shares a beginning is asked together
    assert baker.settings.generations == 4
    assert baker.settings.ask == "benchmark"
    assert baker.opened == 1


def test_other_data_are_mined_without_what_was_trained_or_held_out(run, mined, baker, capsys):
    write(run / "other.jsonl", map(row, range(40, 80)))
    other, selection = "mine.sources=[{kind: jsonl, path: other.jsonl}]", select(load("first.yaml"))
    folder = mined(other)
    assert {ask.example.id for ask in baker.asked} == {f"x{i}" for i in range(60, 80)}
    assert {one["id"] for one in lines(folder / "hard.jsonl")} == {f"x{i}" for i in range(60, 80) if i % 5 in (2, 3)}
    assert len(lines(folder / "train.jsonl")) == len(selection.train)
    shutil.rmtree(folder)
    baker.asked.clear()
    mined(other, "mine.exclude_trained=false")
    held_out = {example.id for example, _ in selection.validation}
    assert {ask.example.id for ask in baker.asked} == {f"x{i}" for i in range(40, 80)} - held_out
    shutil.rmtree(folder)
    baker.asked.clear()
    mined(other, "mine.subset=7")
    assert len({ask.example.id for ask in baker.asked} & {f"x{i}" for i in range(60, 80)}) == len(baker.asked) == 7
    assert main(["--config", "first.yaml", "mine.sources=[{kind: jsonl, path: data.jsonl}]"]) == 2
    assert "mine.sources: " in capsys.readouterr().err
    assert main(["--config", "first.yaml", "mine.subset=7"]) == 2
    assert "subset needs sources" in capsys.readouterr().err


def test_examples_are_counted_and_the_hard_ones_written(mined, capsys):
    folder = mined()
    selection = select(load("first.yaml"))
    expected = [sum(number(example) % 5 == right for example, _ in selection.train) for right in range(5)]
    report = json.loads((folder / "report.json").read_text())
    assert report["right"] == expected
    assert sum(expected) == report["examples"] == 55
    hard = load_examples(SourceConfig(kind="jsonl", path=str(folder / "hard.jsonl")))
    trained = {example.id: example for example, _ in selection.train}
    assert {example.id for example in hard} == {name for name in trained if int(name[1:]) % 5 in (2, 3)}
    assert all(example.trace == f"Loaf {number(example)} is a loaf." for example in hard)
    assert {one["right"] for one in lines(folder / "hard.jsonl")} == {2, 3}
    never = lines(folder / "never_right.jsonl")
    assert {one["id"] for one in never} == {name for name in trained if int(name[1:]) % 5 == 0}
    assert all(len(one["answers"]) == 4 and "Prompt harm: " in one["answers"][0] for one in never)
    assert report["hard_ids"] == [example.id for example in hard]
    assert f"{len(hard)} hard examples" in capsys.readouterr().out


def test_the_report_counts_by_what_is_known_and_quotes_nothing(mined):
    folder = mined("mine.balance=class", "mine.most=8")
    report = json.loads((folder / "report.json").read_text())
    for name in ("mode", "label", "source"):
        assert [sum(column) for column in zip(*report["by"][name].values(), strict=True)] == report["right"], name
    assert set(report["by"]["category"]) == {"(none)", "rye", "salt"}
    assert "prompt_harm harmful, response_harm unharmful" in report["by"]["label"]
    assert sum(report["taken"].values()) == len(report["hard_ids"]) == 8
    assert set(report["taken"].values()) == {2}
    page = (folder / "report.md").read_text()
    assert f"| 2 of 4 | {report['right'][2]} |" in page
    assert "85%" in page
    assert "How do I bake" not in page + (folder / "report.json").read_text()
    assert (folder / "right.png").read_bytes().startswith(b"\x89PNG")


def test_names_cannot_mark_up_the_report(run, mined, capsys):
    forged = {"source": "a|b`\n# c", "categories": ["<img src=x>", "[red]|[/red]"], "id": "x3[bold]\n# d"}
    write(run / "data.jsonl", [row(i, **(forged if i == 3 else {})) for i in range(30)])
    folder = mined("data.validation_size=0")
    page = (folder / "report.md").read_text()
    assert "| `a/b' # c` | 1 |" in page
    assert "| `<img src=x>` | 1 |" in page
    assert "\n# c" not in page
    assert "# d" not in page


def test_started_again_nothing_is_asked_and_the_choice_may_change(mined, baker):
    folder = mined()
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    mined()
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before
    mined("mine.hard=[1]", "mine.most=3")
    assert [one["right"] for one in lines(folder / "hard.jsonl")] == [1, 1, 1]
    assert (len(baker.asked), baker.opened) == (55, 1)


@pytest.mark.parametrize("answers", [0, 1, 30])
def test_interrupted_it_goes_on(run, mined, monkeypatch, answers):
    whole = Baker()
    monkeypatch.setattr("jaxguard.mine.run.open_guard", Baker(fails_after=answers).open)
    assert main(["--config", "first.yaml"]) == 130
    assert not (run / "runs/first/mine/hard.jsonl").exists()
    monkeypatch.setattr("jaxguard.mine.run.open_guard", whole.open)
    folder = mined()
    assert len(whole.asked) == 55 - answers
    assert json.loads((folder / "report.json").read_text())["examples"] == 55


def test_half_a_line_is_asked_again(mined, baker):
    folder = mined()
    store = folder / "answers/direct.jsonl"
    report = (folder / "report.json").read_text()
    store.write_bytes(store.read_bytes()[:-9])
    mined()
    assert len(baker.asked) == 56
    assert baker.asked[54].example == baker.asked[55].example
    assert (folder / "report.json").read_text() == report


def test_killed_it_loses_only_what_is_under_way(run, mined, baker):
    script = Path(__file__).with_name("bakery.py")
    path = os.pathsep.join(map(str, [Path(__file__).resolve().parents[2], script.parent]))
    process = subprocess.Popen([sys.executable, str(script), "first.yaml"], env={**os.environ, "PYTHONPATH": path})
    store, deadline = run / "runs/first/mine/answers/direct.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (store.is_file() and len(store.read_bytes().splitlines()) > 10):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stored = len(store.read_bytes().splitlines()) - 1
    assert 10 <= stored < 55
    folder = mined()
    assert 55 - stored <= len(baker.asked) <= 56 - stored
    assert json.loads((folder / "report.json").read_text())["examples"] == 55


def test_a_run_without_an_export_is_to_be_trained_first(run, baker, capsys):
    (run / "runs/first/export/jaxguard.json").unlink()
    assert main(["--config", "first.yaml"]) == 2
    assert "runs/first holds no trained guard" in capsys.readouterr().err
    assert not baker.asked


@pytest.mark.parametrize("checkpoint", ["runs/first", "runs/first/export"])
def test_a_guard_by_path_is_the_same_guard(run, mined, baker, checkpoint):
    mined()
    mined(f"mine.guard.checkpoint={checkpoint}")
    assert len(baker.asked) == 55


def test_answers_of_other_weights_are_not_mixed(run, mined, baker, capsys):
    mined()
    (run / "runs/first/export/model.safetensors").write_bytes(b"other weights")
    assert main(["--config", "first.yaml"]) == PROVENANCE_CHANGED
    assert "direct.jsonl" in capsys.readouterr().err
    assert len(baker.asked) == 55


@pytest.mark.parametrize(
    "change", ["mine.generations=5", "evaluate.temperature=1", "data.subset=20", "data.policy=demo"]
)
def test_answers_that_were_got_otherwise_are_not_mixed(mined, capsys, change):
    mined()
    assert main(["--config", "first.yaml", change]) == PROVENANCE_CHANGED
    assert "direct.jsonl" in capsys.readouterr().err


def test_two_do_not_mine_at_once(mined, capsys):
    folder = mined()
    code = (
        f"import pathlib, jaxguard.utils.files as d; f = d.lock_folder(pathlib.Path({str(folder)!r}), 'x'); "
        "print(1, flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "1\n"
        assert main(["--config", "first.yaml"]) == 2
        assert "in use by another process" in capsys.readouterr().err
        other.communicate("\n")


def test_without_a_terminal_progress_is_told_in_lines(mined, capsys, monkeypatch):
    monkeypatch.setattr("jaxguard.utils.progress.PLAIN_SECONDS", 0.0)
    folder = mined()
    counts = len(lines(folder / "hard.jsonl")), len(lines(folder / "never_right.jsonl"))
    progress = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mining")]
    assert len(progress) == 55
    assert progress[-1].startswith("mining 55/55  right 4/4 20%  hard {}  never {}  ".format(*counts))
    assert "ETA 0:00:00" in progress[-1]
