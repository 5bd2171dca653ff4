"""`replacement index` and `replacement features`, as a user meets them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from index_file import write

from replacement import LanguageModel, checkpoint
from replacement.cli import main
from replacement.index import feature_page, showing
from replacement.index.store import FeatureIndex


@pytest.fixture(scope="module")
def folders(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a crosscoder of it, and rows of tokens."""
    folder, root = model_folder("llama"), tmp_path_factory.mktemp("command")
    checkpoint.save(tiny.crosscoder_for(LanguageModel.from_pretrained(folder)), root / "run" / "crosscoder")
    np.save(root / "rows.npy", np.random.default_rng(0).integers(3, 12, (40, 16)))
    return folder, root / "run", root / "rows.npy"


def error_of(capsys: Any, *arguments: object) -> str:
    """The one line that a mistake ends in."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").strip()


def test_index_then_features(folders: tuple[Path, Path, Path], capsys: Any) -> None:
    model, run, data = folders
    made = ["index", "--model", str(model), "--crosscoder", str(run), "--data", str(data), "--tokens", "480"]
    assert main(made) == 0
    assert "tokens read" in capsys.readouterr().out
    file = run / "crosscoder" / "features.sqlite"
    with FeatureIndex.open(file) as index:
        digest = index.digest()
    assert main([*made, "--json", "--out", str(run / "again.sqlite")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["labels"]["alive"] > 0
    with FeatureIndex.open(run / "again.sqlite") as index:
        assert (index.digest(), index.facts["n_rows"]) == (digest, facts["n_rows"])
    for given in (file, run, file.parent):  # beside the crosscoder, it is found by the folder
        assert main(["features", str(given), "1/7", "0/3"]) == 0
        shown = capsys.readouterr().out
        assert "feature 1/7" in shown
        assert "feature 0/3" in shown
    assert checkpoint.load(file.parent).n_features == 48, "an index beside the weights does not disturb"


def test_a_feature_in_the_terminal(tmp_path: Path, capsys: Any) -> None:
    path = str(write(tmp_path / "a.sqlite"))
    assert main(["features", path, "0/0", "0/1", "2/0", "2/1"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "promotes ␣the 2, ␣Dallas 1.5",
        "suppresses a%b -3",
        r"reads ␣\n 0.25",
        "reads through head 1.3 ␣Dallas 1",
        "fires on 25.000% of the tokens, with at most 8",
        "activations 0 ▂ █ 6",
        "8 <s>[Dallas] the",
        "2 above 25% thedallas[a%b]",
        "label cities (F1 0.85, precision 0.90, recall 0.80)",
        "label unclear (F1 0.13, precision 0.10, recall 0.20; claim: tokens a%b)",
        "label none",
    ):
        assert line in shown
    assert main(["features", path, "0/1", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["features"]
    assert record["top_examples"][0]["tokens"] == ["<s>", " Dallas", " the"]


def test_search(tmp_path: Path, capsys: Any) -> None:
    path = str(write(tmp_path / "a.sqlite"))
    assert main(["features", path, "--search", "dallas"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["0/1", "2/1", "0/0"]
    assert main(["features", path, "--search", "cities", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["features"]
    assert (found["layer"], found["index"], found["label"]["f1"]) == (2, 0, 0.8471)
    assert main(["features", path, "--search", "\x1b[31m"]) == 0
    assert capsys.readouterr().out.startswith(r"no feature has \x1b[31m in its label")


def test_long_examples_are_cut_and_nothing_reaches_the_terminal_as_it_is() -> None:
    from replacement.index.records import Example

    tokens = tuple(f" word{n}" for n in range(60))
    example = Example((*tokens, " \x1b[2J", *tokens), (0.0,) * 60 + (2.0,) + (1.0,) * 60, 60, 0, 0)
    text = feature_page._example_text(example, 2.0).plain
    assert text.startswith("… word")
    assert text.endswith("…")
    assert r"word59[\x1b[2J] word0" in text
    assert len(text) < 120


def test_features_waits_for_no_torch() -> None:
    script = "import sys, replacement.index.showing; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_mistakes_about_features(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    path = write(tmp_path / "a.sqlite")
    (tmp_path / "text").write_text("text")
    monkeypatch.setattr(showing, "DEMO_FOLDER", tmp_path)
    assert "none.sqlite does not exist: expected a feature index" in error_of(
        capsys, "features", tmp_path / "none.sqlite", "0/1"
    )
    assert "text is no feature index" in error_of(capsys, "features", tmp_path / "text", "0/1")
    assert "features.sqlite does not exist" in error_of(capsys, "features", "0/1")
    assert "there is no layer 1" in error_of(capsys, "features", path, "1/1")
    assert "there is no feature 0/3: layers have features 0 to 2" in error_of(capsys, "features", path, "0/3")
    assert "expected a feature as LAYER/INDEX such as 2/345, given '7'" in error_of(capsys, "features", path, "7")
    assert "expected features such as 2/345, or --search TEXT" in error_of(capsys, "features", path)
    assert "one of them" in error_of(capsys, "features", path, "0/1", "--search", "a")
    assert "search: expected some text" in error_of(capsys, "features", path, "--search", " ")
    assert "limit: expected at least 1" in error_of(capsys, "features", path, "--search", "a", "--limit", 0)


def test_mistakes_about_an_index(folders: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    model, run, data = folders
    loaded = ["index", "--model", model, "--crosscoder", run]
    assert f"data: expected text files, a dataset or token ids that {model} reads" in error_of(capsys, *loaded)
    rows = [*loaded, "--data", data]
    assert "tokens: expected at least 1, given 0" in error_of(capsys, *rows, "--tokens", 0)
    assert "part: expected mlp or attention, given 'x'" in error_of(capsys, *rows, "--part", "x")
    assert "crosscoder: expected a crosscoder made for" in error_of(capsys, "index", "--model", model, "--data", data)
    assert "does not exist" in error_of(capsys, *loaded, "--data", tmp_path / "none.txt")
    (tmp_path / "file").write_text("")
    assert "file is no feature index" in error_of(capsys, *rows, "--out", tmp_path / "file")
    assert "is a file" in error_of(capsys, *rows, "--out", tmp_path / "file" / "a.sqlite")
    assert "expected a file name, given a folder" in error_of(capsys, *rows, "--out", tmp_path)
    other = shutil.copy(write(tmp_path / "a.sqlite"), tmp_path / "b.sqlite")
    assert "is the index of another crosscoder: of 2:abc (tiny)" in error_of(capsys, *rows, "--out", other)
    np.save(tmp_path / "short.npy", np.load(data)[:1])
    assert "has 1 row of 16 tokens: expected at least 2" in error_of(capsys, *loaded, "--data", tmp_path / "short.npy")
    command = [*rows, "--tokens", 64, "--out", tmp_path / "c.sqlite", "--labeller", "no-such-command"]
    assert "labeller: no-such-command cannot be run" in error_of(capsys, *command)
