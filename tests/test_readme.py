"""The README keeps its promises: its Python runs, its picture and links exist, and CI finds the test command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "replacement=" in capsys.readouterr().out
    assert (tmp_path / "dallas.svg").read_text(encoding="utf-8").startswith("<")


def test_features_are_changed_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feature of the example exists, and suppressing it takes from the answer."""
    first, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    change = re.findall(r"## Change features\n\n```python\n(.*?)```", README, re.S)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(first + change, "README.md", "exec"), names)
    model, off, prompt = names["model"], names["off"], names["prompt"]
    austin = model.language_model.token_id("Austin")
    found = model.intervene(prompt, off)
    assert float(found.logits[-1, austin]) < float(found.clean_logits[-1, austin]) - 0.1
    assert len(names["found"].tokens) == len(model.language_model.tokenize(prompt)) + 3


def test_links_and_pictures_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_ci_finds_the_test_command() -> None:
    after = README.split("<!-- test-command -->")[1]
    command = re.findall(r"```bash\n(.*?)```", after, re.S)[0]
    assert "pytest" in command
    assert "constraints.txt" in command


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
