"""What examples/ holds runs: the notebook with fewer steps than it shows, the book club's files, the script."""

import asyncio
import io
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

import jaxguard
from jaxguard.config import load
from jaxguard.data.policies import load_policy
from jaxguard.data.sources import load_examples

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def test_book_club_holds_both_labels_of_its_policys_question(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = load(str(EXAMPLES / "book_club" / "config.yaml")).data
    assert load_policy(data.policy).asks == ("prompt_harm",)
    for source, size in ((data.train[0], 32), (data.validation[0], 8)):
        labels = [example.prompt_label for example in load_examples(source)]
        assert (labels.count("harmful"), labels.count("unharmful")) == (size // 2, size // 2)


def test_moderate_prints_what_does_not_pass(monkeypatch, capsys):
    async def acheck(message):
        return SimpleNamespace(passes="bad" not in message, probabilities={"prompt_harm": 0.9})

    monkeypatch.setattr(jaxguard.Guard, "load", lambda model, policy: nullcontext(SimpleNamespace(acheck=acheck)))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"good\n\nbad one\n")))
    asyncio.run(runpy.run_path(str(EXAMPLES / "moderate.py"))["main"]("runs/any"))
    assert capsys.readouterr().out == "{'prompt_harm': 0.9} bad one\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the kernel's packages have warnings of their own
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(EXAMPLES / "train_and_check.ipynb", as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"steps, held_out = 2, 8\nrun_folder = {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    table = notebook.cells[-1].outputs[0]["data"]["text/plain"]
    assert "P(harmful)" in table
    assert "harmful" in table
