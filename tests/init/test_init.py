"""The starter folder: what it holds, and that it trains and is evaluated as it is."""

import pytest

from jaxguard.cli import main
from jaxguard.config import load
from jaxguard.data.examples import LABELS
from jaxguard.data.policies import load_policy
from jaxguard.data.prepare import prepare
from jaxguard.data.sources import load_examples
from jaxguard.init.__main__ import STARTER
from jaxguard.utils.versions import versions


@pytest.fixture
def starter(tmp_path, monkeypatch):
    """A starter folder, seen from the folder that it is in."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my_guard"]) == 0
    return tmp_path / "my_guard"


def test_it_holds_a_config_a_policy_and_twenty_examples(starter):
    assert {file.name for file in starter.iterdir()} == {file.name for file in STARTER.iterdir()}
    config = load("my_guard/config.yaml")
    assert config.name == "my_guard"
    assert load_policy(config.data.policy).asks == ("prompt_harm", "response_harm")
    examples = [load_examples(source) for source in (*config.data.train, *config.data.validation)]
    assert [len(part) for part in examples] == [16, 4]
    for part in examples:
        for label in LABELS[:2]:
            assert {getattr(example, label) for example in part} == {"harmful", "unharmful"}


def test_its_examples_fit_a_row(starter, tokenizer_folder):
    data = prepare(load("my_guard/config.yaml"), tokenizer_folder("tiny")).manifest
    assert (data["train"]["examples"], data["validation"]["examples"]) == (16, 4)
    assert data["train"]["cut"] == data["validation"]["cut"] == 0
    assert sum(data["dropped"].values()) == 0


@pytest.mark.slow
def test_it_trains_and_is_evaluated(starter, tiny_checkpoint):
    options = ["--config", "my_guard/config.yaml", f"model.checkpoint={tiny_checkpoint}"]
    assert main(["data", *options]) == main(["train", *options]) == main(["evaluate", *options]) == 0
    assert "owner" not in (starter.parent / "runs/my_guard/export/README.md").read_text()


def test_nothing_is_overwritten(starter, capsys):
    (starter / "policy.yaml").write_text("mine")
    (starter / "train.jsonl").unlink()
    assert main(["init", "my_guard"]) == 2
    assert "policy.yaml" in capsys.readouterr().err
    assert (starter / "policy.yaml").read_text() == "mine"
    assert not (starter / "train.jsonl").exists()


@pytest.mark.parametrize(("folder", "code"), [(".", 0), ("a b/c:d", 0), ("/", 2), ("file/x", 2)])
def test_folders(tmp_path, monkeypatch, folder, code):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["init", folder]) == code
    if code == 0:
        path = tmp_path / "here" / folder / "config.yaml"
        assert load(path).name == path.resolve().parent.name


def test_env_and_version(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["env"]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed.items() >= {name: version for name, version in versions().items() if version}.items()
    assert printed["JAX_PLATFORMS"] == "cpu"
    assert "cpu" in printed["devices"]
    assert printed.keys() >= {"python", "platform", "memory", "processors", "transformers"}
    assert "hf_secret" not in str(printed)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxguard {printed['jaxguard']}\n"
