"""The browser of the tests notices what must fail a test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import MissingBrowserError, find_chromium

PROBLEMS = {
    "console.error('x')": "error: x",
    "setTimeout(() => { throw Error('late') })": "uncaught late",
    "alert(1)": "dialog: 1",
    "new Image().src = 'http://example.com/a.png'": "asked the network for http://example.com/a.png",
    "fetch('https://example.com/').catch(() => 0)": "asked the network for https://example.com/",
    "new WebSocket('ws://127.0.0.1:9')": "WebSocket connection",
}


def test_a_quiet_page_from_disk(visit: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<!DOCTYPE html><p>hello</p><script>console.log('fine')</script>")
    assert visit(path).locator("p").inner_text() == "hello"


@pytest.mark.parametrize(("script", "problem"), PROBLEMS.items())
def test_problems_fail_the_page(open_page: Any, tmp_path: Path, script: str, problem: str) -> None:
    path = tmp_path / "page.html"
    path.write_text(f"<!DOCTYPE html><script>{script}</script>")
    with pytest.raises(AssertionError, match=problem), open_page(path.as_uri()) as page:
        page.wait_for_timeout(200)


def test_other_tests_may_run_event_loops(open_page: Any) -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 1

    assert asyncio.run(answer()) == 1


def test_a_missing_browser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(MissingBrowserError, match="CHROMIUM=/nowhere/chromium"):
        find_chromium()
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingBrowserError, match="among chromium"):
        find_chromium()
