"""What the tests of mining share."""

import pytest
from bakery import Baker, row, write, write_config

from jaxguard.config import CONFIG_FOLDER, load
from jaxguard.data.guard_files import write_guard_files
from jaxguard.mine.__main__ import main

COUNT = 60


@pytest.fixture
def baker(monkeypatch):
    found = Baker()
    monkeypatch.setattr("jaxguard.mine.run.open_guard", found.open)
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A trained run, first.yaml, on 60 loaves of which 5 were held out; the working folder is its own."""
    (tmp_path / "configs").symlink_to(CONFIG_FOLDER.resolve())
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", map(row, range(COUNT)))
    write_config(tmp_path / "first.yaml")
    export = tmp_path / "runs/first/export"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"weights")
    write_guard_files(export, load("first.yaml"), [])
    return tmp_path


@pytest.fixture
def mined(run, baker):
    """mined(*overrides): mines, and returns the folder that it wrote."""

    def mine(*overrides):
        assert main(["--config", "first.yaml", *overrides]) == 0
        return run / "runs/first/mine"

    return mine
