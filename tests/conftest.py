"""Shape annotations of both packages are checked by beartype under pytest, and tiny models are built once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook(["replacement", "circuits"], "beartype.beartype")

torch.set_num_threads(1)  # the suite runs in several processes; more threads than cores are slower than one

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
