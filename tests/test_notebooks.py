"""The notebooks of `examples/`: clean as committed, and they run from top to bottom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PATIENCE = 900
"""Seconds that a cell may take on a busy machine; the whole notebook takes less than a minute of a free core."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_clean_as_committed(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(content)
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    cells = content["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    for cell in cells:
        text = "".join(cell["source"])
        assert text.strip() == text, "blank lines at the ends of a cell"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            compile(text, path.name, "exec")
            assert len(text.splitlines()) <= 40, "a cell that does not fit the screen"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own; what it displays are graphs that show themselves, tables, and short texts."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("<iframe" in data.get("text/html", "") for data in shown) == 1
    assert sum("<table" in data.get("text/html", "") for data in shown) >= 5
    assert max(len(data.get("text/plain", "")) for data in shown) < 2500
    assert not _littered(tmp_path)


def _littered(folder: Path) -> list[Any]:
    """Files that a notebook left in the folder it was started in."""
    return [path for path in folder.iterdir() if path.is_file()]
