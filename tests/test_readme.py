"""The README keeps its promises: its Python runs, its picture and links exist, and CI finds the test command."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_ci_finds_the_test_command() -> None:
    after = README.split("<!-- test-command -->")[1]
    command = re.findall(r"```bash\n(.*?)```", after, re.S)[0]
    assert "pytest" in command
    assert "constraints.txt" in command


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
