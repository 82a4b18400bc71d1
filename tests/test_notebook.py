"""The notebook runs from top to bottom, and shows in the repository what it gave."""

import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "cosmos_demo.ipynb"


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_every_cell_was_run_without_error():
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for c in cells for output in c.outputs)
    assert str(Path.home()) not in NOTEBOOK.read_text()


def test_the_notebook_runs(tmp_path):
    """On a copy, as it writes; with a shorter training than the reader's."""
    for name in ("cosmos_jax", "configs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    copy = Path(shutil.copy(NOTEBOOK, tmp_path))
    notebook = nbformat.read(copy, 4)
    (tuning,) = [cell for cell in notebook.cells if "MINUTES = 2\n" in cell.source]
    tuning.source = tuning.source.replace("MINUTES = 2\n", "MINUTES = 1\n")
    client = nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "ended with 0" in printed(tuning)
    assert int(re.search(r"(\d+) steps", printed(code[-1]))[1]) >= 1
    infilled = next(printed(c) for c in code if "prose.infill" in c.source)
    assert all("the captain" in line and "the ship" in line for line in infilled.splitlines())
    assert "[MASK]" not in infilled
    shares = [float(s) for c in code for s in re.findall(r": (\d+)% are taken", printed(c))]
    plain, bible, novel = shares
    assert novel < plain < bible


@pytest.mark.parametrize("name", ["passages", "synopses"])
def test_a_demo_model_is_small(name):
    size = sum(path.stat().st_size for path in (ROOT / "demo" / name).iterdir())
    assert size <= 30e6
