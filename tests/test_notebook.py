"""The notebook runs from top to bottom, on what the repository holds alone."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "cosmos_demo.ipynb"


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(cell):
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    )


def test_it_reads_well_without_running(saved):
    nbformat.validate(saved)
    cells = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = [cell.source for cell in cells if not cell.outputs]
    assert len(silent) <= 1, silent  # the one that installs
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    page = "\n".join(cell.source for cell in saved.cells) + "".join(map(outputs, cells))
    for path in ("/tmp", "/home", "/root", str(ROOT)):
        assert path not in page


def test_it_runs_from_top_to_bottom(saved, tmp_path, monkeypatch):
    for name in ("cosmos_jax", "configs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    # The kernel is a fast machine's: the tests' way of compiling makes what is trained slow.
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    cells = [cell for cell in saved.cells if cell.cell_type == "code"]
    (minutes,) = [cell for cell in cells if "MINUTES = 2\n" in cell.source]
    minutes.source = minutes.source.replace("MINUTES = 2\n", "MINUTES = 0.75\n")
    texts = outputs(cells[2])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(saved, timeout=600, resources=resources).execute()
    # A seed gives the same texts on another machine of the kind, so at least as many.
    assert outputs(cells[2]).count("\n") == texts.count("\n") == 8
    assert outputs(minutes) == "ended with 0\n"
    assert "steps" in outputs(cells[-1])
