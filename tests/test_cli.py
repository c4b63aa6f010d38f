"""The command line that all stages share."""

import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import argcomplete
import pytest
import yaml

from jaxguard.cli import main, stage, stages
from jaxguard.config import READS, dump, load
from jaxguard.utils.errors import JaxguardError, ProvenanceError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"model": {"checkpoint": "some/model"}, "data": {"train": [{"kind": "jsonl", "path": "a.jsonl"}]}}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return str(path)


def command(argv, run=lambda options, config: None, add_options=lambda parser: None, name="train"):
    return stage(name, "Does things.", run, add_options)(argv)


def failing(error):
    def run(options, config):
        raise error

    return run


def test_usage_lists_the_stages(capsys):
    assert main([]) == main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(stages()) >= {name for name in READS if " " not in name} | {"check", "study"}
    for name, summary in stages().items():
        assert lines.count(next(line for line in lines if line.split() == [name, *summary.split()])) == 2
        assert summary
        assert "`" not in summary


def test_a_stage_is_run(capsys):
    assert main(["data", "--config", "gemma4b_5k", "--dry-run"]) == 0
    assert "checkpoint: google/gemma-3-4b-it" in capsys.readouterr().out


def test_an_unknown_stage(capsys):
    assert main(["trian", "--config", "gemma4b_5k"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_main_gets_options_and_config(config):
    calls = []

    def run(options, config):
        calls.append((options.fast, config.train.epochs, config.seed))
        return 7

    def add_options(parser):
        parser.add_argument("--fast", action="store_true")

    assert command(["train.epochs=2", "--config", config, "--fast", "seed=4"], run, add_options) == 7
    assert calls == [(True, 2.0, 4)]


def test_none_is_success(config):
    assert command(["--config", config]) == 0


def test_dry_run(config, capsys, tmp_path):
    assert command(["--config", config, "seed=3", "--dry-run"], failing(AssertionError("must not run"))) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load(str(printed)) == load(config, ["seed=3"])
    assert printed.read_text(encoding="utf-8") == dump(load(config, ["seed=3"]), "train")


def test_a_command_reads_what_its_stage_reads(config, capsys):
    assert command(["--config", config, "--dry-run"], failing(AssertionError()), name="distill audit") == 0
    assert "distill" in yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JaxguardError("field [red]x[/red] is wrong"), 2),
        (ProvenanceError("another run"), 3),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"), 2),
    ],
)
def test_errors_are_messages_and_codes(config, capsys, error, code):
    assert command(["--config", config], failing(error)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    if code < 130:
        assert str(getattr(error, "filename", None) or error) in captured.err


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m jaxguard train --config tiny --dry-run | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("141", "0")


def test_a_home_is_expanded(config, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    overrides = ["run_folder=~/runs", "data.train.0.path=~/a.jsonl"]
    assert command(["--config", f"~/{Path(config).name}", *overrides], lambda _, resolved: seen.append(resolved)) == 0
    assert (seen[0].run_folder, seen[0].data.train[0].path) == (f"{tmp_path}/runs", f"{tmp_path}/a.jsonl")


def test_other_errors_keep_their_traceback(config):
    with pytest.raises(PermissionError):
        command(["--config", config], failing(PermissionError("no")))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sed=3"], ["'seed'"]),
        (["--seed.x=3"], ["'--seed.x=3'", " seed.x=3"]),
        (["--dryrun"], ["'--dryrun'", "--config", "--dry-run", "--help"]),
        (["--learning-rate=3e-4"], ["'--learning-rate=3e-4'", " optimizer.learning_rate=3e-4"]),
        (["--learning-rate", "3e-4"], [" optimizer.learning_rate=3e-4"]),
        (["--train.epochs", "3"], [" train.epochs=3"]),
        (["mine.most=3"], ["mine.most=3", "train"]),
        (["learning_rate=3"], ["override 'learning_rate=3'", "'optimizer.learning_rate'"]),
        (["data.train=[{kind: jsonl,", "path: x}]"], ["override 'data.train=[{kind: jsonl,'", "quote"]),
    ],
)
def test_bad_arguments(config, capsys, argv, words):
    assert command(["--config", config, *argv]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--config", "--help"]),
        (["gemma4b_5k"], ["--config gemma4b_5k"]),
        (["seed=3", "gemma4b_5k", "--dry-run"], ["--config gemma4b_5k"]),
        (["--config"], ["--config"]),
    ],
)
def test_a_command_line_without_a_config(capsys, argv, words):
    assert command(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(word in error for word in words)


def test_help_ends_the_process(capsys):
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--config", "train.epochs=3", "Does things.", "gemma4b_5k"))


def shell_asks(line, answer):
    """What a shell sets to have a line completed, in whose place `answer` gets the words."""
    return {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("jaxguard ev", ["evaluate"]),
        ("jaxguard data bu", ["build"]),
        ("jaxguard data build --c", ["--config"]),
        ("jaxguard data build --config ti", ["tiny"]),
        ("jaxguard train --config tiny mesh.d", ["mesh.data="]),
        ("jaxguard train --config tiny model.remat=d", ["model.remat=dots"]),
        ("jaxguard train --resume ", ["auto", "always", "never"]),
        ("jaxguard train mine", []),
        ("jaxguard check --policy novel/hom", ["novel/homework_answers"]),
        ("jaxguard plan --target a100-8", ["a100-80gb:"]),
        ("jaxguard study run paper/ma", ["paper/main"]),
    ],
)
def test_completion(tmp_path, monkeypatch, line, words):
    answer = tmp_path / "answer"
    for name, value in shell_asks(line, answer).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jaxguard.cli.COMPLETING", True)
    monkeypatch.setattr(argcomplete.CompletionFinder, "_init_debug_stream", lambda _: None)  # a descriptor of pytest's
    with answer.open("w") as stream:
        complete = partial(argcomplete.autocomplete, exit_method=sys.exit, output_stream=stream)
        monkeypatch.setattr(argcomplete, "autocomplete", complete)
        with pytest.raises(SystemExit) as stop:
            main([])
    assert stop.value.code == 0
    assert answer.read_text().split() == words


def test_completion_in_a_process(tmp_path):
    answer = tmp_path / "answer"
    request = shell_asks("jaxguard data build --config ti", answer)
    subprocess.run([sys.executable, "-m", "jaxguard"], env={**os.environ, **request}, cwd=ROOT, check=True)
    assert answer.read_text().split() == ["tiny"]
