"""Shape annotations of both packages are checked by beartype under pytest, and tiny models are built once per session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
import type_checks
from browser import MissingBrowserError, chromium
from filelock import FileLock

if TYPE_CHECKING:
    from browser import OpenPage
    from playwright.sync_api import Page

type_checks.install(["replacement", "circuits"])

torch.set_num_threads(1)  # the suite runs in several processes; more threads than cores are slower than one

EXAMPLES = Path(__file__).parent.parent / "examples"
ModelFactory = Callable[..., "object"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model in Hugging Face layout, written on first use."""
    import tiny

    root = tmp_path_factory.mktemp("models")

    @cache
    def folder(architecture: str) -> Path:
        return tiny.save_model(architecture, root / f"tiny-{architecture}")

    return folder


@pytest.fixture(scope="session")
def language_model(model_folder: Callable[[str], Path]) -> ModelFactory:
    """`language_model(architecture, dtype)`: a tiny language model, loaded once."""
    import tiny

    from replacement import LanguageModel

    @cache
    def load(architecture: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
        if architecture == "native":
            return tiny.native_model(dtype)
        return LanguageModel.from_pretrained(model_folder(architecture), dtype=dtype)

    return load


@pytest.fixture(scope="session")
def smollm2() -> ModuleType:
    """The module `examples/smollm2.py`."""
    spec = importlib.util.spec_from_file_location("smollm2", EXAMPLES / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def smollm2_folder(smollm2: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of SmolLM2-135M-Instruct, a real model of 30 layers with massive activations, converted once for all workers.

    Tests that use it are skipped where its packages are not installed.
    """
    try:
        smollm2.packaged_weights()
    except smollm2.MissingPackageError as error:
        pytest.skip(f"no real model to test: {error}")
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / "smollm2.lock"):
        return smollm2.convert(root / "smollm2")


@pytest.fixture(scope="session")
def open_page() -> Iterator[OpenPage]:
    """Opens pages in the session's headless Chromium (see `browser.chromium`); tests are skipped where there is none."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(chromium())
        except MissingBrowserError as error:
            pytest.skip(str(error))


@pytest.fixture
def visit(open_page: OpenPage) -> Iterator[Callable[..., Page]]:
    """`visit(file or address, **options)`: a page that is closed when the test ends; the test fails if the page complained."""
    with ExitStack() as pages:

        def visit(place: Path | str, **options: Any) -> Page:
            return pages.enter_context(open_page(place.as_uri() if isinstance(place, Path) else place, **options))

        yield visit
