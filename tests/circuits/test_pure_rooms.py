"""Graphs know nothing of models: reading, pruning and exporting one loads no tensor library."""

import subprocess
import sys

import pytest

PURE = ["nodes", "edges", "influence", "pruning", "scores", "paths", "storage", "graph", "export.formats"]
PURE += ["credit", "heads.edge_heads", "heads.qk_attribution"]
HEAVY = ("torch", "transformer_lens", "transformers", "replacement")
SCRIPT = """
import importlib, sys, types
import circuits_path
package = types.ModuleType("circuits")
package.__path__ = [circuits_path.FOLDER]
sys.modules["circuits"] = package
importlib.import_module("circuits." + sys.argv[1])
print(*[name for name in sys.argv[2:] if name in sys.modules])
"""


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_no_model_code(room, tmp_path) -> None:
    """The package's own `__init__` is left out, because it also offers `trace`."""
    import circuits

    (tmp_path / "circuits_path.py").write_text(f"FOLDER = {circuits.__path__[0]!r}\n")
    loaded = subprocess.run(
        [sys.executable, "-c", SCRIPT, room, *HEAVY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert loaded.stdout.strip() == ""
