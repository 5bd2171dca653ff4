"""The command and its report: keys, files, escaping, any local model, one line for every mistake."""

from __future__ import annotations

import csv
import errno
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import replacement.validation.report
from replacement import Wiring, checkpoint
from replacement.cli import main
from replacement.loading import load
from replacement.validation import ValidationConfig, validate
from replacement.validation.plots import plots
from replacement.validation.report import write_report

EVIL = "<script>alert(1)</script>&\"'"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Any, language_model: Any) -> dict[str, str]:
    """Options that name a tiny Llama, crosscoders for it, and stored token ids."""
    folder = tmp_path_factory.mktemp("validate")
    lm = language_model("llama", torch.float32)
    checkpoint.save(tiny.crosscoder_for(lm, wiring=Wiring.strictly_causal(lm, read="mlp_in")), folder / "clt")
    checkpoint.save(tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)), folder / "attention")
    rows = torch.stack([tiny.random_tokens(length=16, seed=seed) for seed in range(8)])
    np.save(folder / "ids.npy", rows.numpy())
    text = " ".join(f"w{i}" for i in tiny.random_tokens(length=200).tolist())
    (folder / "other.txt").write_text(text, encoding="utf-8")
    second = tiny.crosscoder_for(lm, wiring=Wiring.strictly_causal(lm, read="mlp_in"), undecomposed_positions=1)
    checkpoint.save(second, folder / "second")
    (folder / "unknown.txt").write_text("unheard of words alone " * 20, encoding="utf-8")
    (folder / "special.txt").write_text("w1 w2 " * 40, encoding="utf-8")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    np.save(folder / "flat.npy", rows.flatten().numpy())
    np.save(folder / "floats.npy", np.zeros((4, 16)))
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "other.txt")
    return {
        "--model": str(model_folder("llama")),
        "--crosscoder": str(folder / "clt"),
        "--data": str(folder / "ids.npy"),
        "attention": str(folder / "attention"),
        "text": str(folder / "other.txt"),
        "clt": str(folder / "clt"),
        "second": str(folder / "second"),
        "ids": str(folder / "ids.npy"),
        "unknown": str(folder / "unknown.txt"),
        "special": str(folder / "special.txt"),
        "flat": str(folder / "flat.npy"),
        "floats": str(folder / "floats.npy"),
        "folder": str(folder),
        "binary": str(folder / "binary.json"),
        "pipe": str(folder / "pipe"),
        "link": str(folder / "link"),
    }


def options(tiny_run: dict[str, str], **changed: str | None) -> list[str]:
    """`validate` with the options of the tiny model, some of them changed or left out."""
    chosen: dict[str, str | None] = {name: value for name, value in tiny_run.items() if name.startswith("--")}
    chosen |= {f"--{name}": value for name, value in changed.items()}
    return ["validate", *(part for name, value in chosen.items() if value is not None for part in (name, value))]


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.text += data


def test_json_and_report_of_a_local_model(
    tiny_run: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "report"
    arguments = [
        *options(tiny_run),
        "--attention-crosscoder",
        tiny_run["attention"],
        "--slice",
        f"text={tiny_run['text']}",
    ]
    assert main([*arguments, "--json", "--report", str(folder)]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert captured.err == ""  # no progress bar away from a terminal
    assert json.loads((folder / "validation.json").read_text(encoding="utf-8")) == facts
    assert facts["data"]["n_tokens"] == 8 * 16
    assert [part["part"] for part in facts["model"]["crosscoders"]] == ["mlp", "attention"]
    assert {f"single {kind}.{layer}" for kind in ("attn_out", "mlp_out") for layer in range(3)} < facts[
        "protocols"
    ].keys()
    assert [row["name"] for row in facts["slices"]] == ["whole", "shuffled words", "text"]
    assert facts["protocols"]["errors kept"]["kl"]["max"] < 1e-8
    assert len(facts["worst_tokens"]) == 20
    page = (folder / "index.html").read_text(encoding="utf-8")
    seen = Page(page)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for tag, attributes in seen.tags if tag == "img"]
    assert len(sources) == 4
    assert all(source is not None and source.startswith("data:image/svg+xml;base64,") for source in sources)
    logarithmic = [axes for figure in plots(facts).values() for axes in figure.axes if axes.get_xscale() == "log"]
    assert len(logarithmic) == 3
    assert not any(axes.patches for axes in logarithmic), "a bar has no length on a logarithmic axis"
    for name in ("layers", "protocols", "slices", "controls"):
        assert (folder / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert b"<svg" in (folder / "plots" / f"{name}.svg").read_bytes()
        with (folder / "tables" / f"{name}.csv").open(encoding="utf-8") as file:
            heads, *body = csv.reader(file)
        assert body
        assert all(len(row) == len(heads) for row in body)
        assert body[0][0] in seen.text


def test_every_documented_key_is_there_and_every_key_is_documented(
    tiny_run: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options(tiny_run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    documented = (Path(replacement.validation.__file__).parent / "README.md").read_text(encoding="utf-8")

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if not isinstance(value, dict):
            return set()
        return set(value).union(*map(keys, value.values()))

    names = keys({key: value for key, value in facts.items() if key not in ("protocols", "model")})
    names |= keys(list(facts["protocols"].values())) | facts["model"].keys()
    missing = sorted(name for name in names if f"`{name}`" not in documented)
    assert not missing


def test_tables_are_printed_and_nothing_in_them_is_markup(
    tiny_run: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options(tiny_run), "--slice", f"[red]x[/red]={tiny_run['text']}", "--no-controls"]) == 0
    printed = capsys.readouterr().out
    assert "[red]x[/red]" in printed
    assert "all layers, errors propagating" in printed
    assert "claims may be trusted" in printed
    assert "random dictionary" not in printed


def test_text_of_models_and_users_is_escaped(tiny_run: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    assert main([*options(tiny_run), "--json", "--no-controls"]) == 0
    facts = json.loads(capsys.readouterr().out)
    facts["model"]["name"] = facts["data"]["source"] = facts["slices"][1]["name"] = EVIL
    facts["slices"][0]["name"] = "$\\frac{"  # no formula either
    for key in ("token", "next", "original", "replacement"):
        facts["worst_tokens"][0][key] = EVIL
    facts["model"]["fingerprint"] = "\udcff"  # a name that is no UTF-8
    facts["worst_tokens"][0]["before"] = [EVIL, "\x1b[2J", "\n"]
    page = write_report(facts, tmp_path / "report").read_text(encoding="utf-8")
    assert "<script" not in page
    seen = Page(page)
    assert seen.text.count(EVIL) >= 8
    assert "\x1b" not in page
    assert "<U+001B>[2J ⏎" in seen.text


def test_a_full_disk_leaves_no_part_of_a_report(
    tiny_run: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither where nothing was before, nor in the folder of an earlier report."""
    arguments = [*options(tiny_run, report=str(tmp_path / "report")), "--no-controls", "--json"]

    def full(facts: object, pictures: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(replacement.validation.report, "render", full)
        assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {tmp_path / 'report'}: could not be written (No space left on device)\n"
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
    facts = json.loads(json.dumps(_facts(arguments, capsys)))
    (tmp_path / "report" / "notes.txt").write_text("kept", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    facts["model"]["name"] = "another"
    monkeypatch.setattr(replacement.validation.report, "render", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_report(facts, tmp_path / "report")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    write_report(facts, tmp_path / "report")
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before.keys()
    assert "another" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def _facts(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_a_report_with_infinite_divergences_says_nothing_of_them(
    tiny_run: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = _facts([*options(tiny_run), "--json"], capsys)
    for output in facts["protocols"].values():
        output["kl"] |= {"mean": None, "max": None}
    for row in (*facts["slices"], *facts["summary"]["first_layers"], *facts["controls"]):
        row["kl"] = row["kl"] | {"mean": None, "max": None} if isinstance(row["kl"], dict) else None
    seen = Page(write_report(facts, tmp_path / "report").read_text(encoding="utf-8"))
    assert seen.text.count("–") > 20


def test_a_report_with_a_curve_names_the_compute(tiny_run: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "curve.json").write_text("[[1, 90], [10, 80], [100, 1]]", encoding="utf-8")
    arguments = options(tiny_run, **{"training-curve": str(tmp_path / "curve.json"), "report": str(tmp_path / "r")})
    assert main([*arguments, "--no-controls"]) == 0
    assert "training compute" in capsys.readouterr().out
    assert (tmp_path / "r" / "plots" / "compute.svg").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": None}, "data: expected text files"),
        ({"crosscoder": None}, "crosscoder: expected a crosscoder made for"),
        ({"crosscoder": "demo"}, "this crosscoder has width 128"),
        ({"data": "/nowhere/*.txt"}, "/nowhere/*.txt"),
        ({"data": "demo"}, "the demo corpus is for the demo model"),
        ({"slice": "news"}, "slice: expected NAME=DATA"),
        ({"slice": "=x"}, "slice: expected NAME=DATA"),
        ({"slice": "a=/nowhere.txt"}, "slice a: "),
        ({"slice": "a\x1b[2J=IDS"}, "the name of a slice must be printable text, got 'a\\x1b[2J'"),
        ({"slice": "a\udcff=IDS"}, "the name of a slice must be printable text, got 'a\\udcff'"),
        ({"data": ""}, "data: expected text files, a dataset or token ids, given ''"),
        ({"slice": "whole=demo"}, "slices need names of their own"),
        ({"slice": "shuffled words=IDS"}, "slices need names of their own, got 'shuffled words'"),
        ({"slice": "a=UNKNOWN"}, "slice a: no usable token: it holds special tokens and words unknown to"),
        ({"tokens": "0"}, "tokens: expected at least 1, given 0"),
        ({"tokens": "-7"}, "tokens: expected at least 1, given -7"),
        ({"context": "0"}, "context: expected at least 1, given 0"),
        ({"data": "TEXT", "context": "1"}, "a context of 1 leaves no room for text"),
        ({"context": "-2"}, "context: expected at least 1, given -2"),
        ({"data": "UNKNOWN"}, "unknown.txt: no usable token: it holds special tokens and words unknown to"),
        ({"data": "SPECIAL"}, "special.txt: no usable token: it holds special tokens and words unknown to"),
        ({"data": "FLOATS"}, "floats.npy"),
        (
            {"data": "FLAT", "context": "1", "crosscoder": "SECOND"},
            "flat.npy: no token to measure: expected at least one",
        ),
        ({"attention-crosscoder": "CLT"}, "attention needs a crosscoder that writes attn_out sites"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, float64"),
        ({"training-curve": "/nowhere.json"}, "/nowhere.json does not exist"),
        ({"training-curve": "FOLDER"}, "expected a JSON file of [compute, loss] pairs"),
        ({"training-curve": "BINARY"}, "binary.json: expected a JSON file of [compute, loss] pairs in UTF-8"),
        ({"report": __file__}, "expected a folder, but"),
        ({"report": f"{__file__}/report"}, "expected a folder, but"),
        ({"report": "/dev/null"}, "/dev/null: expected a folder, but /dev/null is a device"),
        ({"report": "PIPE"}, "is a named pipe"),
        ({"report": "LINK"}, "is a symbolic link"),
        ({"report": "/proc/nothing"}, "/proc/nothing: expected a folder that can be written to"),
        ({"context": "99"}, "reads at most 32"),
    ],
)
def test_mistakes_are_one_line(
    changed: dict[str, str | None], message: str, tiny_run: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    named = {name: value and _with_paths(value, tiny_run) for name, value in changed.items()}
    assert main(options(tiny_run, **named)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def _with_paths(value: str, tiny_run: dict[str, str]) -> str:
    """A value with the names of the files that `tiny_run` made in place of words in capitals."""
    words = {name.upper(): path for name, path in tiny_run.items() if not name.startswith("--")}
    return "=".join(words.get(word, word) for word in value.split("="))


def test_data_without_rows_is_named(tiny_run: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.txt").write_text("w3 w4", encoding="utf-8")
    assert main(options(tiny_run, data=str(tmp_path / "empty.txt"))) == 2
    assert "has 0 rows" in capsys.readouterr().err


def test_the_demo_brings_its_behaviours_and_one_template() -> None:
    facts = validate(load(), ValidationConfig(n_tokens=128, n_probes=4, controls=False))
    names = [row["name"] for row in facts["slices"]]
    assert names[:3] == ["whole", "two-hop geography", "two-hop, held-out states"]
    assert names[-2:] == ["one template", "shuffled words"]
    asked = next(row for row in facts["slices"] if row["name"] == "two-hop geography")
    assert asked["n_tokens"] == 4
    assert asked["accuracy_original"] == asked["accuracy"] == 1.0
    assert facts["summary"]["is_within"]
