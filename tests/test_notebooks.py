"""Every notebook runs by itself, top to bottom, and was saved with what it printed."""

import itertools
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jaxode.experiments import command_line

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Every line runs, at a small size: training stops after three steps, and of a thousand things there are
# twenty. What it comes to is tested with the experiments, and saved with the notebook.
SMALLER = {r"\bfor _ in range\(\d+\)": "for _ in range(3)", r"\b1000\b": "20"}
# What the kernel runs before a notebook: no name of another one is left, nor of this.
CLEAN = """
%reset -f
def clean():
    import os

    import jax

    from jaxode import data, train

    def fetched(dataset):
        raise ConnectionError("Tests fetch nothing.")

    os.chdir({folder!r})
    jax.config.update("jax_enable_x64", False)
    os.environ.pop("MNIST", None)
    data.fetched = fetched
    whole = train.fit
    train.fit = lambda *args, **options: whole(*args[:4], min(args[4], 3), **options)


clean()
del clean
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # of Jupyter's own machinery


@pytest.fixture(scope="module")
def client():
    """A kernel for all notebooks: its start takes as long as most of them."""
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=600, kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        yield client
    client.nb = nbformat.v4.new_notebook()
    client.execute()  # and ends the kernel


@each
def test_a_notebook_runs_from_a_clean_namespace(path, tmp_path, client):
    notebook = nbformat.read(path, 4)
    for cell, (whole, part) in itertools.product(notebook.cells, SMALLER.items()):
        cell.source = re.sub(whole, part, cell.source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(CLEAN.format(folder=str(tmp_path))))
    for weights in FOLDER.glob("*.eqx"):  # a notebook runs beside them
        shutil.copy(weights, tmp_path)
    client.nb = notebook
    client.execute(cleanup_kc=False)


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
    there = {path.stem.split("_", 1)[1] for path in NOTEBOOKS}
    assert {name.replace("-", "_") for name in command_line.EXPERIMENTS} <= there
