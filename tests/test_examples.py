"""The notebook of examples/ runs from its first cell to its last, with fewer steps than it shows."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "train_and_check.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the kernel's packages have warnings of their own
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"steps, held_out = 2, 8\nrun_folder = {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    table = notebook.cells[-1].outputs[0]["data"]["text/plain"]
    assert "P(harmful)" in table
    assert "harmful" in table
