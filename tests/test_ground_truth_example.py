"""The hop fidelity example prints its table: the truth, then trained dictionaries."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "ground_truth"


def test_the_table_has_the_truth_and_both_dictionaries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    example = importlib.import_module("hop_fidelity")
    small = ["--networks", "two-hop", "--penalties", "0.1", "--seeds", "2", "--steps", "20", "--prompts", "3"]
    monkeypatch.setattr(sys, "argv", ["hop_fidelity.py", *small])
    example.main()
    title, headings, *rows = capsys.readouterr().out.strip().splitlines()
    assert title == "two-hop"
    assert headings.split()[:3] == ["dictionary", "penalty", "L0"]
    assert [row.split()[0] for row in rows] == ["truth", "CLT", "PLT"]
    l0, unexplained, found, *fidelity, errors, _ = map(float, rows[0].split()[1::2])
    assert (l0, unexplained, found, fidelity, errors) == (4.2, 0, 1, [1, 1, 1], 0)
    assert all(row.count("+-") == 8 for row in rows)
