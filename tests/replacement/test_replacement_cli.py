"""The `replacement` command: tables for people, one JSON object for programs, one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replacement.cli import main
from replacement.loading import ARTIFACTS


def test_show_describes_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(ARTIFACTS / "crosscoder")]) == 0
    printed = capsys.readouterr().out
    assert "strictly_causal, 4 groups" in printed
    assert "mlp_out.3" in printed


def test_demo_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rows", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in facts["behaviours"]} >= {"two-hop geography", "addition", "antonyms"}
    assert facts["fidelity"]["n_tokens"] == 8 * 64


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "show" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "/nowhere"], "error: /nowhere does not exist"),
        (["demo", "--rows", "0"], "error: rows: expected 1 to 100000, given 0"),
        (["demo", "--rows", "9" * 30], "error: rows: expected 1 to 100000, given 999"),
        (["show", "/dev/null"], "error: /dev/null has no known layout"),
        (["show", "."], "error: "),
        (["demo", "--rows", "many"], "error: "),
        (["train"], "error: "),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
