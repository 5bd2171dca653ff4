"""The documentation keeps its promises: Python on its pages runs, links lead somewhere, every public name has its place."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(inner)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_exist(page: Path) -> None:
    pages = set(_pages(SITE["nav"]))
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in link or link in pages or (page.parent / link).exists(), link


def test_the_site_has_every_page_and_readme() -> None:
    pages = set(_pages(SITE["nav"]))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} <= pages
    for package in ("circuits", "replacement"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("README.md")} <= pages


@pytest.mark.parametrize("package", ["circuits", "replacement"])
def test_every_public_name_is_documented(package: str) -> None:
    text = (ROOT / "docs" / "api" / f"{package}.md").read_text(encoding="utf-8")
    names = re.findall(rf"^::: {package}\.(\w+)$", text, re.M)
    assert sorted(names) == sorted(importlib.import_module(package).__all__)


def test_the_site_loads_nothing_from_elsewhere() -> None:
    assert SITE["theme"]["font"] is False
    assert SITE["use_directory_urls"] is False
    assert "offline" in SITE["plugins"]
    for name in [*SITE["extra"]["polyfills"], *SITE["extra_css"]]:
        assert "http" not in (ROOT / "docs" / name).read_text(encoding="utf-8")
