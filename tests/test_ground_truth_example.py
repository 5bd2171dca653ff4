"""The hop fidelity examples print their tables, and train nothing twice."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "ground_truth"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> object:
    """`table(name, *arguments)`: an example as a module, and the lines it prints."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, *arguments: str) -> tuple[ModuleType, list[str]]:
        example = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(tmp_path), *arguments])
        example.main()
        return example, [line for line in capsys.readouterr().out.splitlines() if line]

    return run


def test_dictionaries_are_compared_at_equal_l0(table: object, tmp_path: Path) -> None:
    small = ("--networks", "two-hop", "--seeds", "2", "--steps", "20", "--prompts", "3")
    _, (title, headings, *rows) = table("hop_fidelity", *small)
    assert title == "two-hop"
    assert headings.split()[:3] == ["dictionary", "L0", "FVU"]
    labels = [f"{wiring}  {method}" for wiring in ("CLT", "PLT") for method in ("BatchTopK", "JumpReLU")]
    assert [row[:28].strip() for row in rows] == ["truth", *labels]
    l0, unexplained, found, *fidelity, errors, _ = (float(cell.split()[0]) for cell in cells(rows[0]))
    assert (l0, unexplained, found, fidelity, errors) == (4.2, 0, 1, [1, 1, 1], 0)
    assert all(len(cells(row)) == 8 for row in rows)
    file = tmp_path / "hop_fidelity.json"
    before = json.loads(file.read_text())
    assert len(before) == 2 * (2 + 3)  # two seeds of each, and a search for the penalty of JumpReLU
    assert table("hop_fidelity", *small)[1] == [title, headings, *rows]
    assert json.loads(file.read_text()) == before


def test_a_remedy_is_chosen_on_some_seeds_and_judged_on_others(table: object, tmp_path: Path) -> None:
    example, lines = table("hop_remedies", "--steps", "4", "--prompts", "1")
    titles = [line for line in lines if "seeds" in line]
    assert titles == [f"two-hop, seeds {example.CHOOSE} to choose"] + [
        f"{network}, seeds {example.JUDGE} to judge" for network in ("two-hop", "and-or")
    ]
    [chosen] = [line.removeprefix("chosen: ") for line in lines if line.startswith("chosen: ")]
    seeds = {}
    for row in json.loads((tmp_path / "hop_remedies.json").read_text()):
        seeds.setdefault((row["network"], row["remedy"]), []).append(row["seed"])
    assert len(seeds) > 10
    for (network, remedy), used in seeds.items():
        judged = [2, 3, 4] if remedy in ("none", chosen, *importlib.import_module("remedies").PLTS) else []
        assert used == ([0, 1] if network == "two-hop" else []) + judged


def cells(row: str) -> list[str]:
    """The columns of a line of the table."""
    return [row[28 + 18 * place :][:18].strip() for place in range(8)]
