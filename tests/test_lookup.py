"""Names of configs, policies and the rest are found from any folder."""

from pathlib import Path

import pytest

from jaxguard.cli import main
from jaxguard.config import load
from jaxguard.config.base import CONFIG_FOLDER, INSTALLED, find_yaml, locate, names
from jaxguard.config.hardware import read_hardware
from jaxguard.config.study import read_study
from jaxguard.data.benchmarks.loading import list_benchmarks, load_benchmark
from jaxguard.data.examples import Example
from jaxguard.data.policies import load_policy, policy_for
from jaxguard.distill.prompts import load_prompt
from jaxguard.evaluate.report.published import read_published
from jaxguard.plan.sweeps import read_sweep
from jaxguard.utils.errors import JaxguardError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_command_runs_from_an_empty_folder(capsys):
    assert main(["train", "--config", "gemma4b_5k", "--dry-run"]) == 0
    assert "checkpoint: google/gemma-3-4b-it" in capsys.readouterr().out


def test_every_kind_of_file_is_found_by_name():
    assert load_policy("bank_support").name
    novel = Example("a", "b", "c", policy="novel/homework_answers")
    assert policy_for(novel, load_policy("aegis2")).name == "novel/homework_answers"
    assert "novel_policies" in list_benchmarks()
    assert len(load_benchmark("novel_policies").examples) == 240, "its rows lie in configs/, too"
    assert read_published().rows
    assert load_prompt("trace").name
    assert read_sweep(names(CONFIG_FOLDER / "sweeps")[0]).series
    assert "a100-80gb" in read_hardware().targets
    assert read_study("paper/main")[0].rows


def test_a_path_into_configs_is_found_from_any_folder(empty_folder):
    shipped = "configs/scales/smollm/traces.jsonl"
    [source] = load("tiny", [f"data.train=[{{kind: jsonl, path: {shipped}}}]"]).data.train
    assert Path(source.path).is_file()
    assert source.path.endswith(shipped)
    write(empty_folder / shipped, "{}\n")
    assert load("tiny", [f"data.train=[{{kind: jsonl, path: {shipped}}}]"]).data.train[0].path == shipped


def test_an_own_file_wins(empty_folder):
    write(empty_folder / "configs/policies/aegis2.yaml", "name: mine\nrules: No bread.\n")
    assert load_policy("aegis2").name == "mine"
    assert load_policy("wildguard").name == "wildguard"


@pytest.mark.parametrize("path", ["own.yaml", "configs/own.yaml", "configs/deep/own.yaml"])
def test_an_own_config_extends_a_shipped_one(empty_folder, path):
    write(empty_folder / path, "extends: gemma4b_5k\nseed: 3\n")
    config = load(str(empty_folder / path))
    assert (config.seed, config.name, config.data.subset) == (3, "own", 5000)


def test_what_is_beside_is_extended_first(empty_folder):
    write(empty_folder / "tiny.yaml", "model: {checkpoint: x}\ndata: {train: [{kind: aegis2}]}\n")
    write(empty_folder / "own.yaml", "extends: tiny\n")
    assert load("own.yaml").model.checkpoint == "x"


def test_an_error_lists_what_exists(empty_folder):
    write(empty_folder / "configs/policies/bread.yaml", "name: bread\nrules: No bread.\n")
    with pytest.raises(JaxguardError) as error:
        find_yaml("aegis", CONFIG_FOLDER / "policies", "policy")
    assert all(name in str(error.value) for name in ("'aegis2'", "bread", "wildguard"))


def test_another_folder_is_the_only_one(empty_folder):
    with pytest.raises(JaxguardError):
        load_policy("aegis2", empty_folder)
    assert locate(empty_folder / "absent") == empty_folder / "absent"
    assert locate(CONFIG_FOLDER / "policies") == INSTALLED / "policies"


def test_hidden_files_have_no_names(empty_folder):
    """A ConfigMap that is mounted links its files to those of a hidden folder."""
    write(empty_folder / "laws/..2026/law.yaml", "name: law\nrules: No bread.\n")
    (empty_folder / "laws/..data").symlink_to("..2026")
    (empty_folder / "laws/law.yaml").symlink_to("..data/law.yaml")
    assert names(empty_folder / "laws") == ["law"]
