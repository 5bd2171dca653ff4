"""Sources of training tokens: every kind gives the rows it should, and says what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from replacement import LanguageModel
from replacement.demo.corpus import held_out_rows, sample_rows
from replacement.demo.tokenizer import build_tokenizer
from replacement.training.documents import Piece, pack, pieces_of_files
from replacement.training.token_sources import DemoRows, StoredRows, TokenSource
from replacement.training.tokens import open_source, store_rows

BOS = 1
TEXTS = ["w5 w6 w7", "w8", "w50 w51 w52 w53 w54", "w60 w61 w62"]
# Documents end to end; the tokenizer has no end-of-sequence token, so the beginning one stands between two of them.
PACKED = [[BOS, 5, 6, 7], [BOS, BOS, 8, BOS], [BOS, 50, 51, 52], [BOS, 53, 54, BOS], [BOS, 60, 61, 62]]
IDS = np.arange(3, 43)


@pytest.fixture(scope="module")
def lm(language_model: Callable[..., LanguageModel]) -> LanguageModel:
    """A model of 97 words and 32 positions."""
    return language_model("gpt2")


def epoch(source: TokenSource) -> Tensor:
    """The training rows once, in the source's own order."""
    return torch.cat(list(source.one_pass()))


def streamed(source: TokenSource, n: int) -> list[list[int]]:
    """The first n rows of the endless order, one at a time."""
    return [rows.tokens_RT[0].tolist() for rows in islice(source.blocks(1, seed=0), n)]


# Stored tokens --------------------------------------------------------------------------------------------------


def npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "tokens.npy", array)
    return folder / "tokens.npy"


def safetensors(folder: Path, array: np.ndarray) -> Path:
    tensors = {"a": torch.zeros(3), "ids": torch.from_numpy(array), "z": torch.arange(9)}
    save_file(tensors, folder / "tokens.safetensors")
    return folder / "tokens.safetensors"


@pytest.mark.parametrize(
    "write", [npy, safetensors, lambda folder, array: array, lambda folder, array: torch.tensor(array)]
)
@pytest.mark.parametrize("flat", [False, True])
def test_stored_tokens_give_their_rows(tmp_path: Path, lm: LanguageModel, write: Any, flat: bool) -> None:
    array = IDS if flat else IDS.reshape(10, 4)
    source = open_source(write(tmp_path, array.astype(np.int32)), lm, context=4, n_held_out=3)
    assert (source.n_rows, source.context, source.bos_id) == (7, 4, BOS)
    assert source.held_out().tolist() == IDS.reshape(10, 4)[:3].tolist()
    assert epoch(source).tolist() == IDS.reshape(10, 4)[3:].tolist()
    rows = next(source.blocks(7, seed=0))
    assert rows.tokens_RT.dtype == torch.int64
    assert sorted(rows.tokens_RT[:, 0].tolist()) == IDS.reshape(10, 4)[3:, 0].tolist()
    assert torch.equal(rows.tokens_RT, source.take(rows.index_R))


def test_flat_ids_drop_what_fills_no_row_and_take_the_context_of_the_model(tmp_path: Path, lm: LanguageModel) -> None:
    source = open_source(npy(tmp_path, np.arange(70) % 97), lm)
    assert epoch(source).tolist() == [list(range(32)), list(range(32, 64))]


def test_a_tensor_is_chosen_by_name(tmp_path: Path, lm: LanguageModel) -> None:
    source = open_source(safetensors(tmp_path, IDS), lm, context=3, tensor="z")
    assert epoch(source).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("first", [0, 3, 7, 25])
def test_blocks_run_over_the_ends_of_epochs_and_start_anywhere(first: int) -> None:
    source = StoredRows(IDS.reshape(10, 4), n_held_out=3)
    whole = torch.cat([rows.tokens_RT for rows in islice(source.blocks(1, seed=5), 40)])
    blocks = list(islice(source.blocks(5, first=first, seed=5), 3))
    assert torch.equal(torch.cat([rows.tokens_RT for rows in blocks]), whole[first : first + 15])
    assert [rows.epoch for rows in blocks] == [(first + last) // 7 for last in (4, 9, 14)]
    for start in range(0, 35, 7):
        assert sorted(whole[start : start + 7, 0].tolist()) == IDS.reshape(10, 4)[3:, 0].tolist()


# Text -----------------------------------------------------------------------------------------------------------


def jsonl(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n")
    return folder / "a.jsonl"


def text_files(folder: Path) -> Path:
    for name, text in zip("abcd", TEXTS, strict=True):
        (folder / f"{name}.txt").write_text(text.replace(" ", "\n\n", 1))
    return folder


def pattern(folder: Path) -> str:
    return str(text_files(folder) / "*.txt")


def listed(folder: Path) -> list[str | Path]:
    return [str(text_files(folder) / "a.txt"), *(folder / f"{name}.txt" for name in "bcd")]


def parquet(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    splits = {
        "test": datasets.Dataset.from_dict({"text": ["w3"]}),
        "train": datasets.Dataset.from_dict({"text": TEXTS}),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return folder / "splits"


def function(folder: Path) -> Callable[[], Iterator[str]]:
    return lambda: iter(TEXTS)


WRITERS = [jsonl, text_files, pattern, listed, parquet, saved, saved_splits, function]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: str(write.__name__))
def test_texts_are_joined_and_packed(tmp_path: Path, lm: LanguageModel, write: Callable[[Path], Any]) -> None:
    source = open_source(write(tmp_path), lm, context=4, n_held_out=2)
    assert source.held_out().tolist() == PACKED[:2]
    assert epoch(source).tolist() == PACKED[2:]
    assert streamed(source, 7) == [*PACKED[2:], *PACKED[2:], PACKED[2]]
    later = next(source.blocks(2, first=4, seed=9))
    assert later.tokens_RT.tolist() == [PACKED[3], PACKED[4]]
    assert (later.index_R.tolist(), later.epoch) == ([3, 4], 1)
