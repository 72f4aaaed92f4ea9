"""Every notebook runs from a clean kernel, top to bottom, and was saved with what it printed."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own machinery
@each
def test_a_notebook_runs_from_a_clean_kernel(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("XLA_FLAGS", "")  # as users have it: most of the time goes into training
    notebook = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    errors = [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert not errors


@each
def test_a_notebook_is_saved_with_its_outputs_and_opens_in_colab(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and sum(bool(c.outputs) for c in code) >= 2
    assert (
        f"/notebooks/{path.name}" in notebook.cells[0].source
        and "colab" in notebook.cells[0].source
    )
    assert "google.colab" in code[0].source and "pip install" in code[0].source
    assert any("TPU" in c.source for c in notebook.cells if c.cell_type == "markdown")
    text = "".join(str(o) for c in code for o in c.outputs)
    assert not re.search(r"'output_type': 'error'", text)


def test_there_is_a_notebook_for_each_experiment():
    assert len(NOTEBOOKS) == 12 and os.path.exists(FOLDER / "00_start.ipynb")
