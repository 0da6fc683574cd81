"""The notebooks and scripts of examples/ run from top to bottom: small in `make test`, whole in `make notebooks`."""

import os
import subprocess
import sys

import pytest
from documents import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
REDUCED = {  # what the cell with the parameters is replaced by
    "compare_placements.ipynb": (
        "PLACEMENTS, RATES = ['pre', 'peri'], [0.002]\nSTEPS, LAYERS, TEXT_BYTES, JOBS = 12, 2, 400_000, 1"
    ),
    "cure_a_checkpoint.ipynb": (
        "MODEL, DATA = 'overflowing', 'random'\nSAMPLES, TOKENS = 4, 16\nLAYERS, WIDTH = 6, 32"
    ),
}


def read(name: str):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'peri-llama[docs]'")
    return nbformat.read(EXAMPLES / name, as_version=4)


def run(notebook, folder, monkeypatch) -> str:
    """What the cells print, in their order; a cell that raises fails the test."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'peri-llama[docs]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'peri-llama[docs]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def check(name: str, said: str, folder) -> None:
    """What a reader was promised."""
    if name == "cure_a_checkpoint.ipynb":
        assert "overflows FP16 in the forward pass" in said and "finite, up to a loss scale" in said
        assert (folder / "cured" / "fp16_rewrite.json").is_file()
        assert "FP32, cured against source: 0.0e+00" in said
    else:
        assert "completed" in said and "runs diverged" in said
        assert list((folder / "figures").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    notebook = read(name)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    given = set(compile_names(cell.source))
    cell.source = REDUCED[name]
    assert set(compile_names(cell.source)) == given
    check(name, run(notebook, tmp_path, monkeypatch), tmp_path)


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_at_its_full_size(name, tmp_path, monkeypatch):
    check(name, run(read(name), tmp_path, monkeypatch), tmp_path)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name):
    for cell in read(name).cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_the_notebooks_are_those_that_are_checked():
    assert set(NOTEBOOKS) == set(REDUCED)


@pytest.mark.slow
def test_a_placement_of_ones_own_trains(tmp_path):
    words = [sys.executable, EXAMPLES / "own_placement.py", "--steps", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, words)], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["pre", "peri", "own"]


def compile_names(code: str) -> tuple[str, ...]:
    """The names that a cell assigns."""
    return compile(code, "cell", "exec").co_names
