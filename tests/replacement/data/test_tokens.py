"""Sources of training tokens: every kind gives the rows it should, and says what is wrong with it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import replacement
from replacement import LanguageModel
from replacement.data.documents import pieces_of_files, special_id
from replacement.data.open_tokens import open_source, store_rows
from replacement.data.token_sources import DemoRows, StoredRows, TokenSource
from replacement.demo.corpus import held_out_rows, sample_rows
from replacement.demo.tokenizer import build_tokenizer
from replacement.training.build import Models, open_tokens
from replacement.training.config import DataConfig

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


def test_the_default_context_is_bounded_alike_for_every_source_without_rows_of_its_own(
    tmp_path: Path, lm: LanguageModel
) -> None:
    """Models read up to hundreds of thousands of tokens; stored rows keep their width."""
    flat = npy(tmp_path, IDS)
    for source in (flat, str(flat), safetensors(tmp_path, IDS), IDS, written("a.txt", "w3 w4 " * 9)(tmp_path)):
        assert open_source(source, lm, default_context=5).context == 5
        assert open_source(source, lm, context=7).context == 7
        if not isinstance(source, np.ndarray):
            config = DataConfig(source=str(source), held_out_rows=1)
            assert open_tokens(config, Models((lm,)), default_context=5).context == 5
    assert open_source(IDS.reshape(5, 8), lm).context == 8


def several(folder: Path, *arrays: Any) -> Path:
    """A folder of `.npy` files 0.npy, 1.npy, ..., of several integer types."""
    (folder / "ids").mkdir()
    for number, ids in enumerate(arrays):
        np.save(folder / "ids" / f"{number}.npy", np.array(ids, dtype=[np.uint16, np.int64, np.uint64][number % 3]))
    return folder / "ids"


@pytest.mark.parametrize("form", ["folder", "pattern", "list"])
def test_files_of_token_ids_are_one_source(tmp_path: Path, lm: LanguageModel, form: str) -> None:
    """Rows keep their width, flat ids are cut to the same file by file; against the one array they make up."""
    rows = np.random.default_rng(0).integers(3, 97, (23, 4))
    flat = np.concatenate([rows[10:12].flatten(), [5, 6, 7]])
    folder = several(tmp_path, rows[:10], flat, rows[12:13], rows[13:])
    source = {"folder": folder, "pattern": str(folder / "*.npy"), "list": sorted(folder.iterdir())}[form]
    joined, whole = (open_source(value, lm, n_held_out=11) for value in (source, rows))
    assert (joined.n_rows, joined.context) == (12, 4)
    assert torch.equal(joined.held_out(), whole.held_out())
    assert torch.equal(epoch(joined), epoch(whole))
    for ours, theirs in zip(islice(joined.blocks(5, seed=1), 4), whole.blocks(5, seed=1), strict=False):
        assert torch.equal(ours.tokens_RT, theirs.tokens_RT)
        assert torch.equal(ours.index_R, theirs.index_R)


def test_a_folder_of_one_array_keeps_its_width(tmp_path: Path, lm: LanguageModel) -> None:
    source = open_tokens(DataConfig(source=str(several(tmp_path, IDS.reshape(10, 4))), held_out_rows=2), Models((lm,)))
    assert (source.context, source.n_rows) == (4, 8)


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


def test_a_long_text_file_is_one_document_whatever_its_pieces(
    tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = torch.randint(50, 97, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "long.txt").write_text("".join(f"w{word}\n" for word in words))
    monkeypatch.setattr("replacement.data.documents._PIECE_CHARACTERS", 40)
    assert len(list(pieces_of_files([tmp_path / "long.txt"], text_field="text"))) > 40
    source = open_source(tmp_path / "long.txt", lm, context=11)
    assert epoch(source)[:, 1:].flatten().tolist() == words


def test_a_model_trained_without_a_beginning_token_gets_none(
    tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm.parts.bridge.cfg, "default_prepend_bos", False)
    rows = epoch(open_source(jsonl(tmp_path), lm, context=3))
    assert rows.tolist() == [[5, 6, 7], [BOS, 8, BOS], [50, 51, 52], [53, 54, BOS], [60, 61, 62]]


def test_the_end_token_of_the_tokenizer_separates_where_it_has_one() -> None:
    import tiny

    tokenizer = tiny.tokenizer()
    assert special_id(tokenizer, "eos", vocabulary_size=97) is None
    tokenizer.eos_token = "<|endoftext|>"  # what TransformerLens gives a tokenizer without one: here the unknown word
    assert tokenizer.eos_token_id == 0
    assert special_id(tokenizer, "eos", vocabulary_size=97) is None
    tokenizer.eos_token = "w9"
    assert special_id(tokenizer, "eos", vocabulary_size=97) == 9
    assert special_id(tokenizer, "eos", vocabulary_size=9) is None


@pytest.mark.parametrize("kind", ["function", "dataset"])
def test_rows_of_ids_are_taken_as_they_stand(tmp_path: Path, lm: LanguageModel, kind: str) -> None:
    rows = IDS.reshape(10, 4).tolist()
    if kind == "dataset":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "rows")
        source = open_source(tmp_path / "rows", lm, context=4, text_field="input_ids")
    else:
        source = open_source(lambda: map(torch.tensor, rows), lm, context=4)
    assert streamed(source, 12) == [*rows, *rows[:2]]


def test_a_hub_dataset_is_streamed(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"body": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("hf:someone/corpus:small", lm, context=4, text_field="body", split="test")
    assert asked == [(("someone/corpus", "small"), {"split": "test", "streaming": True})]
    assert streamed(source, 6) == [*PACKED, PACKED[0]]


# The demo's corpus ----------------------------------------------------------------------------------------------


def test_the_demo_goes_on_from_seed_to_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replacement.data.token_sources.DEMO_ROWS_PER_SEED", 6)
    tokenizer = build_tokenizer()
    source = DemoRows(tokenizer, context=16, n_held_out=3)
    expected = np.concatenate([sample_rows(tokenizer, n_rows=6, context=16, seed=1_000_000 + i) for i in range(3)])
    for first in (0, 4, 7):
        blocks = list(islice(source.blocks(5, first=first, seed=0), 2))
        assert torch.cat([rows.tokens_RT for rows in blocks]).tolist() == expected[first : first + 10].tolist()
        assert torch.cat([rows.index_R for rows in blocks]).tolist() == list(range(first, first + 10))
    assert source.held_out().tolist() == held_out_rows(tokenizer, n_rows=3, context=16, seed=0).tolist()
    assert DemoRows(tokenizer, context=16).held_out().shape == (0, 16)


def test_the_demo_is_opened_by_name() -> None:
    lm = replacement.load("demo").language_model
    source = open_source("demo", lm, n_held_out=2)
    rows = next(source.blocks(3, seed=0)).tokens_RT
    assert rows.tolist() == sample_rows(lm.tokenizer, n_rows=4096, context=64, seed=1_000_000)[:3].tolist()
    assert (source.context, source.n_rows, source.bos_id) == (64, None, 0)
    assert len(source.held_out()) == 2


# Storing --------------------------------------------------------------------------------------------------------


def test_stored_rows_are_those_of_the_text_and_can_be_cut_short(tmp_path: Path, lm: LanguageModel) -> None:
    source = open_source(jsonl(tmp_path), lm, context=4, n_held_out=1)
    store_rows(source, tmp_path / "rows.npy")
    assert np.load(tmp_path / "rows.npy").dtype == np.uint16
    again = open_source(tmp_path / "rows.npy", lm, n_held_out=1)
    assert (again.held_out().tolist(), epoch(again).tolist()) == (PACKED[:1], PACKED[1:])
    store_rows(source, tmp_path / "rows.npy", n_rows=2)
    assert np.load(tmp_path / "rows.npy").tolist() == PACKED[:3]
    store_rows(again, tmp_path / "new" / "rows.npy")
    assert np.load(tmp_path / "new" / "rows.npy").tolist() == PACKED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "new", "rows.npy"]


def test_many_rows_and_an_endless_source_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 2**20, (12_345, 2))
    store_rows(StoredRows(rows), tmp_path / "rows.npy")
    assert np.array_equal(np.load(tmp_path / "rows.npy"), rows)
    monkeypatch.setattr("replacement.data.token_sources.DEMO_ROWS_PER_SEED", 6)
    demo = DemoRows(build_tokenizer(), context=16)
    with pytest.raises(ValueError, match="the demo corpus has no end: give n_rows, the rows to write"):
        store_rows(demo, tmp_path / "demo.npy")
    monkeypatch.setattr("replacement.data.token_sources._ROWS_AT_A_TIME", 4)
    store_rows(demo, tmp_path / "demo.npy", n_rows=7)
    assert np.load(tmp_path / "demo.npy").tolist() == next(demo.blocks(7, seed=0)).tokens_RT.tolist()
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.npy"):
        store_rows(demo, tmp_path / "demo.npz", n_rows=7)
    with pytest.raises(ValueError, match="n_rows must be 1 or more, got 0"):
        store_rows(demo, tmp_path / "none.npy", n_rows=0)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"folder\.npy: expected a file name, given a folder"):
        store_rows(demo, tmp_path / "folder.npy", n_rows=7)


def test_rows_that_cannot_be_written_to_the_end_leave_the_old_file(tmp_path: Path, lm: LanguageModel) -> None:
    store_rows(open_source(IDS, lm, context=4), tmp_path / "rows.npy")
    foreign = open_source(lambda: iter([[5, 6, 7, 8]] * 2000 + [[1, 2, 3, 97]]), lm, context=4)
    with pytest.raises(ValueError, match=re.escape("token ids must lie in [0, 97), got 1 to 97")):
        store_rows(foreign, tmp_path / "rows.npy")
    assert np.load(tmp_path / "rows.npy").tolist() == IDS.reshape(10, 4).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


# Mistakes -------------------------------------------------------------------------------------------------------


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def float_tensors(folder: Path) -> Path:
    save_file({"a": torch.zeros(3)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def array(values: Any, dtype: Any = np.int64) -> Callable[[Path], Path]:
    return lambda folder: npy(folder, np.array(values, dtype=dtype))


def mixed(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [written(name, "")(folder) for name in names]


ONCE = iter(TEXTS)
MISTAKES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "missing": (lambda folder: folder / "none.txt", {}, "none.txt does not exist: expected a file or folder of tokens"),
    "no match": (lambda folder: str(folder / "*.txt"), {}, "no file matches "),
    "no files": (
        lambda folder: folder,
        {},
        "is no saved dataset and holds no .npy, .safetensors, .txt, .jsonl, .parquet",
    ),
    "empty list": (lambda folder: [], {}, "the list of token files is empty"),
    "unknown kind": (
        written("a.csv", "x"),
        {},
        "unknown kind of file '.csv': expected one of .npy, .safetensors, .txt",
    ),
    "other widths": (
        lambda folder: several(folder, [[1] * 4], [1] * 9, [[1] * 5]),
        {"context": None},
        "2.npy holds rows of 5 tokens, expected 4 as in ",
    ),
    "other width of one": (
        lambda folder: several(folder, [[1] * 4], [[1] * 5]),
        {},
        "1.npy holds rows of 5 tokens, expected 4 (the context)",
    ),
    "few tokens of one": (
        lambda folder: several(folder, [1] * 9, [1] * 3),
        {},
        "1.npy holds 3 tokens, fewer than one row of 4",
    ),
    "floats of one": (
        lambda folder: [several(folder, [[1] * 4]), npy(folder, np.full((2, 4), 0.5))],
        {},
        "tokens.npy: expected integer token ids, got float64",
    ),
    "dataset and text": (lambda f: [saved(f), jsonl(f)], {}, "saved can only be read on its own"),
    "ids and text": (
        mixed("a.npy", "b.txt"),
        {},
        "mixes files of kinds .npy, .txt: expected either token ids or text",
    ),
    "mixed": (mixed("a.txt", "b.parquet"), {}, "mixes files of kinds .parquet, .txt: expected .parquet"),
    "damaged npy": (written("a.npy", b"\x93NUMPY"), {}, "a.npy is damaged or not a .npy file"),
    "damaged safetensors": (written("a.safetensors", b"no"), {}, "a.safetensors is damaged or not a safetensors file"),
    "no integers": (float_tensors, {}, "a.safetensors holds no integer tensor: expected token ids"),
    "other tensor": (lambda f: safetensors(f, IDS), {"tensor": "b"}, "has no tensor 'b': it holds a, ids, z"),
    "floats": (array([[0.5] * 4], float), {}, "tokens.npy: expected integer token ids, got float64"),
    "dimensions": (array([[[1] * 4]]), {}, "expected flat ids [N] or rows [R, T], got shape [1, 1, 4]"),
    "other width": (array([[1] * 5]), {}, "tokens.npy holds rows of 5 tokens, expected 4 (the context)"),
    "wide rows": (array([[1] * 33]), {"context": None}, "rows of 33 tokens: tiny-gpt2 reads at most 32"),
    "wide context": (array([1] * 99), {"context": 33}, "rows of 33 tokens: tiny-gpt2 reads at most 32"),
    "no context": (array([1] * 99), {"context": 0}, "the context must be 1 token or more, got 0"),
    "few tokens": (array([1] * 3), {}, "tokens.npy holds 3 tokens, fewer than one row of 4"),
    "no rows": (array(np.zeros((0, 4))), {}, "tokens.npy has 0 rows: expected at least 1"),
    "few rows": (
        array([[1] * 4] * 2),
        {"n_held_out": 2},
        "has 2 rows: expected at least 3 (n_held_out and one to train on",
    ),
    "negative": (array([[1] * 4]), {"n_held_out": -1}, "n_held_out must be 0 or more, got -1"),
    "foreign ids": (array([[1, 2, 3, 97]]), {}, "tokens.npy: token ids must lie in [0, 97), got 1 to 97"),
    "no text": (written("a.txt", ""), {}, "a.txt has 0 rows: expected at least 1"),
    "little text": (jsonl, {"n_held_out": 5}, "a.jsonl has 5 rows: expected at least 6"),
    "room for text": (jsonl, {"context": 1}, "a context of 1 leaves no room for text"),
    "not UTF-8": (written("a.txt", b"\xff\xfe"), {}, "a.txt is not UTF-8 text"),
    "not JSON": (written("a.jsonl", '{"text": "w5"}\n{'), {}, "a.jsonl, line 2 is not JSON"),
    "no field": (
        written("a.jsonl", '{"body": 1}'),
        {},
        "line 1: expected a text in the field 'text', got the fields body",
    ),
    "no object": (written("a.jsonl", "[1]"), {}, "line 1: expected a text in the field 'text', got list"),
    "no string": (written("a.jsonl", '{"text": 1}'), {}, "line 1: expected text in the field 'text', got int"),
    "no column": (saved, {"text_field": "body"}, "has no column 'body': it has text; see text_field"),
    "no parquet column": (parquet, {"text_field": "body"}, "has no column 'body': it has text; see text_field"),
    "no split": (saved_splits, {"split": "dev"}, "has no split 'dev': it has test, train"),
    "damaged dataset": (lambda f: written("d/state.json", "{}")(f).parent, {}, "cannot open the dataset"),
    "damaged parquet": (written("a.parquet", b"PAR0"), {}, "cannot open the dataset"),
    "once": (lambda folder: lambda: ONCE, {}, "expected a function that starts afresh at every call"),
    "nothing": (lambda folder: lambda: iter([]), {}, "yields nothing: expected texts or rows of token ids"),
    "short rows": (
        lambda folder: lambda: iter([[1, 2]]),
        {},
        "row 0: expected 4 integer token ids (the context), got int64",
    ),
    "ragged rows": (
        lambda folder: lambda: iter([[1, 2, 3, [4, 5]]]),
        {},
        "row 0: expected 4 integer token ids (the context), got object",
    ),
    "nested JSON": (written("a.jsonl", "[" * 100_000), {}, "a.jsonl, line 1 is not JSON"),
    "folder like a file": (
        lambda folder: written("a.txt/notes.md", "x")(folder).parent.parent,
        {},
        "is no saved dataset and holds no .npy",
    ),
    "mixed items": (lambda folder: lambda: iter(["w5", 3]), {}, "item 1: expected text, got int"),
    "foreign rows": (lambda folder: lambda: iter([[1, 2, 3, 97]]), {}, "token ids must lie in [0, 97), got 1 to 97"),
    "demo": (lambda folder: "demo", {}, "the demo corpus is for the demo model: this tokenizer lacks"),
}


@pytest.mark.parametrize(("make", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(
    tmp_path: Path, lm: LanguageModel, make: Callable[[Path], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(make(tmp_path), lm, **({"context": 4} | options))


@pytest.mark.parametrize("make", [jsonl, function, lambda folder: "demo"], ids=["file", "function", "demo"])
def test_text_needs_a_tokenizer(tmp_path: Path, language_model: Any, make: Callable[[Path], Any]) -> None:
    message = "is text, but tiny-native has no tokenizer: expected token ids (.npy, .safetensors)"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(make(tmp_path), language_model("native"), context=4)


def test_a_model_without_a_tokenizer_reads_stored_ids(language_model: Any) -> None:
    source = open_source(IDS, language_model("native"), context=4)
    assert (source.bos_id, source.n_rows) == (None, 10)


def test_ids_outside_the_vocabulary_are_found_wherever_they_stand(lm: LanguageModel) -> None:
    rows = np.full((50, 4), 5)
    rows[40, 2] = -1
    source = open_source(rows, lm)
    with pytest.raises(ValueError, match=re.escape("the token array: token ids must lie in [0, 97), got -1 to 5")):
        next(source.blocks(50, seed=0))


def test_a_source_that_cannot_start_again_is_refused_when_it_has_to(lm: LanguageModel) -> None:
    remaining = [[1, 2, 3, 4]] * 3

    def used_up() -> Iterator[list[int]]:
        while remaining:
            yield remaining.pop()

    message = "the source used_up gave only 0 rows when started again: expected the same rows"
    with pytest.raises(ValueError, match=message):
        next(open_source(used_up, lm, context=4).blocks(5, seed=0))


def test_a_hub_dataset_that_cannot_be_reached_is_named(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="cannot open the dataset hf:someone/corpus: no route"):
        open_source("hf:someone/corpus", lm)


def test_a_missing_library_is_named(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hf:corpus is read with the `datasets` library: pip install datasets"):
        open_source("hf:corpus", lm)
