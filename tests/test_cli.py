"""The command line that all stages share."""

import errno

import pytest
import yaml

from jaxguard.cli import run_stage
from jaxguard.config import dump, load
from jaxguard.utils.errors import JaxguardError

SMALL = {"model": {"checkpoint": "some/model"}, "data": {"train": [{"kind": "jsonl", "path": "a.jsonl"}]}}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return str(path)


def door(argv, main=lambda options, config: None, extend=None):
    return run_stage("train", "Does things.", main, extend, argv)


def test_main_gets_options_and_config(config):
    seen = []

    def main(options, run):
        seen.append((options.fast, run.train.epochs, run.seed))
        return 7

    def extend(parser):
        parser.add_argument("--fast", action="store_true")

    assert door(["train.epochs=2", "--config", config, "--fast", "seed=4"], main, extend) == 7
    assert seen == [(True, 2.0, 4)]


def test_none_is_success(config):
    assert door(["--config", config]) == 0


def test_dry_run_prints_a_config_that_loads_and_does_nothing_else(config, capsys, tmp_path):
    def main(options, run):
        raise AssertionError("must not run")

    assert door(["--config", config, "seed=3", "--dry-run"], main) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load(str(printed)) == load(config, ["seed=3"])
    assert printed.read_text(encoding="utf-8") == dump(load(config, ["seed=3"]), "train")


def test_a_users_mistake_is_one_line_on_stderr_and_code_2(config, capsys):
    def main(options, run):
        raise JaxguardError("field [red]x[/red] is wrong")

    assert door(["--config", config], main) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: field [red]x[/red] is wrong\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sed=3"], "did you mean 'seed'?"),
        (["--seed.x=3"], "written without dashes, as seed.x=3"),
        (["--dryrun"], "unknown option '--dryrun'; known: --config, --dry-run, --help"),
    ],
)
def test_bad_arguments(config, capsys, argv, words):
    assert door(["--config", config, *argv]) == 2
    assert words in capsys.readouterr().err


def test_no_config_is_argparses_error(capsys):
    with pytest.raises(SystemExit) as stop:
        door([])
    assert stop.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        door(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "train.epochs=3" in text
    assert "Does things." in text


def test_a_full_disk_is_said_so(config, capsys):
    def main(options, run):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    assert door(["--config", config], main) == 2
    assert "disk is full" in capsys.readouterr().err


def test_other_errors_are_bugs_and_keep_their_traceback(config):
    def main(options, run):
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        door(["--config", config], main)


def test_ctrl_c(config, capsys):
    def main(options, run):
        raise KeyboardInterrupt

    assert door(["--config", config], main) == 130
    assert "interrupted" in capsys.readouterr().err
