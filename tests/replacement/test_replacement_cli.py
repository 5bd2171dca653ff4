"""The `replacement` command: tables for people, one JSON object for programs, one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from replacement.cli import main
from replacement.crosscoder import checkpoint
from replacement.crosscoder.formats.layouts import LAYOUTS, open_published
from replacement.loading import ARTIFACTS


def test_show_describes_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(ARTIFACTS / "crosscoder")]) == 0
    printed = capsys.readouterr().out
    assert "strictly_causal, 4 groups" in printed
    assert "mlp_out.3" in printed


def test_demo_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rows", "8", "--no-families", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in facts["behaviours"]} >= {"two-hop geography", "addition", "antonyms"}
    assert facts["fidelity"]["n_tokens"] == 8 * 64


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "show" in printed


@pytest.mark.parametrize("verb", ["demo", "train", "validate", "show", "convert", "layouts", "architectures"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"replacement {verb}" in printed
    assert "--help" in printed


@pytest.mark.parametrize("verb", ["show", "convert"])
def test_help_says_how_a_crosscoder_is_named(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    words = "".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "hf:ORG/REPO/PATH@REVISION" in words
    assert "params.npz?read=mlp_in&write=mlp_out&layer=5" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "/nowhere"], "error: /nowhere does not exist"),
        (["demo", "--rows", "0"], "error: rows: expected 1 to 100000, given 0"),
        (["demo", "--rows", "9" * 30], "error: rows: expected 1 to 100000, given 999"),
        (["demo", "--probes", "train"], "error: probes: expected 'choose' or 'judge', given 'train'"),
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


def test_convert_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "copy"
    assert main(["convert", "demo", str(target), "--dtype", "bfloat16", "--model", "demo"]) == 0
    printed = capsys.readouterr().out
    for expected in (str(target), "crosstrace", "strictly_causal, 4 groups of", "bfloat16", "files      2, "):
        assert expected in printed
    assert open_published(target).stored_dtype == torch.bfloat16


def test_layouts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layouts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layout", "read", "written", "what", "it", "is"]
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == [layout.name for layout in LAYOUTS]


def test_show_measures_beside_what_the_file_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "demo", "--model", "demo", "--data", "demo", "--tokens", "2048"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Measured on 2,0" in captured.out
    for expected in ("layer 0", "all layers together", "mlp_out.3", "mean over sites"):
        assert expected in captured.out


def test_show_warns_where_the_file_says_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layout takes its claim from the folder's name."""
    folder = tmp_path / "k900"
    crosscoder = checkpoint.load(ARTIFACTS / "crosscoder")
    crosscoder.undecomposed_positions = 1
    checkpoint.save(crosscoder, tmp_path / "native")
    assert main(["convert", str(tmp_path / "native"), str(folder), "--to", "llama-scope-2"]) == 0
    assert main(["show", str(folder), "--model", "demo", "--data", "demo", "--tokens", "1024"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: active features per token, all layers together: measured ")
    assert "the file says 3600" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "demo", "OUT", "--to", "onnx"], "error: to: expected one of crosstrace, "),
        (["convert", "demo", "OUT", "--dtype", "int8"], "error: dtype: expected one of float32, "),
        (
            ["convert", "demo", "OUT", "--to", "circuit-tracer-plt"],
            "error: the layout circuit-tracer-plt has no place ",
        ),
        (["convert", "/nowhere", "OUT"], "error: /nowhere does not exist"),
        (["convert", "demo", "."], "error: "),
        (["show", "demo", "--model", "demo"], "error: expected --model and --data together"),
        (["show", "demo", "--model", "demo", "--data", "demo", "--tokens", "0"], "error: tokens: expected at least 1"),
        (["show", "demo", "--model", "demo", "--data", "/nowhere.txt"], "error: "),
        (["layouts", "more"], "error: "),
    ],
)
def test_mistakes_of_layouts_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out") if word == "OUT" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or arguments[0] == "show"
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
