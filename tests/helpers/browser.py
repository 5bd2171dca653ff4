"""An installed Chromium without a network, driven through Playwright: for tests of pages, benchmarks and screenshots."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

    OpenPage = Callable[..., AbstractContextManager[Page]]

NAMES = ("chromium", "chromium-browser", "google-chrome")
LOCAL = ("file", "data", "blob")
"""Schemes of addresses that need no network."""
PATIENCE_MS = 90_000
"""How long an act may take before it fails: machines that run tests are busy, and nothing here measures time."""
BAD = ("error", "warning", "assert")
"""Kinds of console messages that fail a test."""


class MissingBrowserError(RuntimeError):
    """No Chromium, or no Playwright to drive it with."""


def find_chromium() -> str:
    """Path of the browser: `$CHROMIUM`, or the first of `NAMES` on the path.

    Raises:
        MissingBrowserError: there is none.
    """
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else NAMES)), None)
    if found is None:
        place = f"as CHROMIUM={named} says" if named else f"among {', '.join(NAMES)}"
        raise MissingBrowserError(f"there is no browser {place} (Debian: apt-get install chromium)")
    return found


@contextmanager
def chromium(*arguments: str) -> Iterator[OpenPage]:
    """A headless browser with these arguments, as the function that opens a page: `open_page(address, origin=None, **options)`.

    The page has a profile of its own and no network. Arguments of `open_page`:
        address: such as `path.as_uri()`.
        origin: the only server that may be asked, such as `http://127.0.0.1:8000`; none by default.
        options: of Playwright's `Browser.new_context`, such as `viewport`.
    When the page is closed, an `AssertionError` says whether it asked for anything else, opened a dialog or another page, or
    wrote an error or a warning to its console.

    Raises:
        MissingBrowserError: there is no browser or no Playwright.
    """
    executable = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as error:
        raise MissingBrowserError("no Playwright: it comes with `pip install -e .[dev]`") from error
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", *arguments])
        loop = asyncio.get_running_loop()
        with _running(None):
            yield partial(_open_page, browser, loop)
        browser.close()


@contextmanager
def _running(loop: asyncio.AbstractEventLoop | None) -> Iterator[None]:
    """Marks a loop as the running one of the thread.

    Playwright leaves its own marked between calls; then nothing else in the process could call `asyncio.run`.
    """
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(loop)
    try:
        yield
    finally:
        asyncio._set_running_loop(before)


@contextmanager
def _open_page(
    browser: Browser, loop: asyncio.AbstractEventLoop, address: str, *, origin: str | None = None, **options: Any
) -> Iterator[Page]:
    problems: list[str] = []

    def check(route: Route) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in LOCAL or f"{parts.scheme}://{parts.netloc}" == origin:
            route.continue_()
        else:
            problems.append(f"asked the network for {route.request.url}")
            route.abort()

    try:
        with _running(loop), browser.new_context(offline=origin is None, **options) as context:
            context.set_default_timeout(PATIENCE_MS)
            context.route("**/*", check)
            context.on("weberror", lambda error: problems.append(f"uncaught {error.error}"))
            context.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
            context.on("console", lambda line: line.type in BAD and problems.append(f"{line.type}: {line.text}"))
            page = context.new_page()
            context.on("page", lambda other: problems.append(f"opened {other.url}"))
            page.goto(address)
            yield page
    except BaseException as error:
        for problem in problems:
            error.add_note(problem)
        raise
    assert not problems, "\n".join(problems)
