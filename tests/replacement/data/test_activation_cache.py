"""Cached activations are those of the model, rounded once; a cache that is not what it should be is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock
from torch import Tensor

from replacement import LanguageModel
from replacement.crosscoder.sites import Site
from replacement.data.activation_cache import ActivationCache
from replacement.data.activation_stream import ActivationStream
from replacement.data.token_sources import StoredRows, StreamedRows

SITES = (Site(0, "resid_mid"), Site(1, "attn_z"), Site(2, "mlp_out"))
N_ROWS, CONTEXT = 23, 8
ROWS = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (N_ROWS, CONTEXT))
ROW_BYTES = CONTEXT * 96 * 4
OPTIONS: dict[str, Any] = {"fingerprint": "f", "dtype": torch.float32, "rows_per_read": 1, "part_bytes": 5 * ROW_BYTES}

Read = Callable[[Tensor], dict[Site, Tensor]]


@pytest.fixture(scope="module")
def read(language_model: Callable[..., LanguageModel]) -> Read:
    """Forward passes of a tiny model, one row at a time: equal rows give equal bits."""
    lm = language_model("gpt2")

    def forward(tokens_BT: Tensor) -> dict[Site, Tensor]:
        each = [lm.read(tokens_1T, SITES) for tokens_1T in tokens_BT.split(1)]
        return {site: torch.cat([acts[site] for acts in each]) for site in SITES}

    return forward


def source(rows: np.ndarray = ROWS, n_held_out: int = 2) -> StoredRows:
    return StoredRows(rows, n_held_out=n_held_out, name="the rows")


def build(folder: Path, read: Read, **options: Any) -> ActivationCache:
    return ActivationCache.build(folder, source(), read, SITES, **(OPTIONS | options))


def metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cache.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_rows_are_the_model_s_rounded_once(tmp_path: Path, read: Read, dtype: torch.dtype) -> None:
    build(tmp_path / "cache", read, dtype=dtype)
    cache = ActivationCache.open(tmp_path / "cache", source(), fingerprint="f")
    index_R = torch.tensor([22, 0, 7, 7, 19, 4, 5])
    cached, direct = cache.read_rows(index_R), read(torch.from_numpy(ROWS)[index_R])
    assert cached.keys() == direct.keys()
    assert all(torch.equal(cached[site], direct[site].to(dtype)) for site in SITES)
    assert len(list((tmp_path / "cache").glob("part-*.safetensors"))) == (5 if dtype == torch.float32 else 3)


def test_a_stream_over_a_cache_gives_the_batches_of_the_model(tmp_path: Path, read: Read) -> None:
    rows = source()
    cache = ActivationCache.build(tmp_path / "cache", rows, read, SITES, **OPTIONS)
    options: dict[str, Any] = {
        "batch_tokens": 8,
        "buffer_tokens": 96,
        "shards": 4,
        "seed": 1,
        "undecomposed_positions": 1,
    }
    direct = ActivationStream(rows, read, **options, my_shards=[1, 2]).batches(start=3)
    cached = ActivationStream(rows, cache, **options, my_shards=[1, 2]).batches(start=3)
    for expected, batch in islice(zip(direct, cached, strict=True), 30):
        assert all(torch.equal(batch[site], expected[site]) for site in SITES)


def test_any_split_into_held_out_rows_and_any_sites_can_be_read(tmp_path: Path, read: Read) -> None:
    build(tmp_path / "cache", read)
    cache = ActivationCache.open(tmp_path / "cache", source(n_held_out=9), fingerprint="f", sites=SITES[1:2])
    acts = cache.read_rows(torch.tensor([9]))
    assert acts.keys() == {SITES[1]}
    assert torch.equal(acts[SITES[1]], read(torch.from_numpy(ROWS[9:10]))[SITES[1]])


def test_an_interrupted_build_goes_on_with_the_part_it_was_at(tmp_path: Path, read: Read) -> None:
    n_read = 0

    def failing(tokens_BT: Tensor) -> dict[Site, Tensor]:
        nonlocal n_read
        n_read += 1
        if n_read == 14:  # the first call looks at the widths; two parts of five rows and two rows are done
            raise KeyboardInterrupt
        return read(tokens_BT)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", failing)
    assert len(metadata(tmp_path / "cache")["parts"]) == 2
    with pytest.raises(ValueError, match="is unfinished: 2 of 5 parts; build it to the end"):
        ActivationCache.open(tmp_path / "cache", source(), fingerprint="f")
    build(tmp_path / "cache", failing, part_bytes=1)  # parts keep their size
    assert n_read == 14 + 1 + 13
    build(tmp_path / "other", read)
    assert metadata(tmp_path / "cache") == metadata(tmp_path / "other")
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [".lock"]
    build(tmp_path / "cache", failing)
    assert n_read == 14 + 1 + 13 + 1  # nothing was left to do


def test_only_the_parts_needed_are_read(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "cache", read)
    cache = ActivationCache.open(tmp_path / "cache", source(), fingerprint="f")
    (tmp_path / "cache" / "part-00001.safetensors").write_bytes(b"damaged")
    (tmp_path / "cache" / "part-00003.safetensors").unlink()
    assert cache.read_rows(torch.tensor([0, 12]))[SITES[0]].shape == (2, CONTEXT, 32)
    with pytest.raises(ValueError, match=r"part-00001.safetensors is damaged: expected SHA-256 [0-9a-f]{64}, got"):
        cache.read_rows(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"part-00003.safetensors is missing"):
        cache.read_rows(torch.tensor([15]))


def test_one_changed_bit_is_noticed(tmp_path: Path, read: Read) -> None:
    build(tmp_path / "cache", read)
    path = tmp_path / "cache" / "part-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    cache = ActivationCache.open(tmp_path / "cache", source(), fingerprint="f")
    with pytest.raises(ValueError, match=r"part-00002.safetensors is damaged: expected SHA-256"):
        cache.read_rows(torch.tensor([10]))


CHANGED = ROWS.copy()
CHANGED[22, 7] -= 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"fingerprint": "g"}, "is of something else: expected fingerprint 'g', it has 'f'"),
        (ROWS[:22], {}, "expected n_rows 22, it has 23"),
        (ROWS[:, :7], {}, "expected context 7, it has 8"),
        (CHANGED, {}, "is of something else: expected rows_sha256"),
        (ROWS, {"sites": [Site(1, "mlp_in")]}, "lacks mlp_in.1: it holds resid_mid.0, attn_z.1, mlp_out.2"),
    ],
    ids=["model", "number of rows", "context", "one token", "sites"],
)
def test_a_cache_of_something_else_is_refused(
    tmp_path: Path, read: Read, rows: np.ndarray, options: dict[str, Any], message: str
) -> None:
    build(tmp_path / "cache", read)
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivationCache.open(tmp_path / "cache", source(rows), **({"fingerprint": "f"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, "expected dtype 'bfloat16', it has 'float32'"),
        ({"fingerprint": "g"}, "expected fingerprint 'g', it has 'f'"),
    ],
)
def test_a_cache_is_not_continued_with_something_else(
    tmp_path: Path, read: Read, options: dict[str, Any], message: str
) -> None:
    build(tmp_path / "cache", read)
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tmp_path / "cache", read, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "cache.json does not exist"),
        ("{", "cache.json is not JSON"),
        ({"format": "x"}, "cache.json is no activation cache: expected format 'crosstrace activation cache'"),
        ({"version": 2}, "cache.json has format version 2; this library reads versions up to 1"),
        ({"parts": {}}, "cache.json is damaged: an entry is missing or of another kind"),
        ({"rows_per_part": 0}, "cache.json is damaged"),
        ({"dtype": "int8"}, "cache.json is damaged"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, read: Read, changes: Any, message: str) -> None:
    build(tmp_path / "cache", read)
    path = tmp_path / "cache" / "cache.json"
    if changes is None:
        path.unlink()
    else:
        path.write_text(changes if isinstance(changes, str) else json.dumps(metadata(path.parent) | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivationCache.open(tmp_path / "cache", source(), fingerprint="f")


def zeros(*shape: int, value: float = 0.0) -> Read:
    return lambda tokens: {site: torch.full((len(tokens), *shape), value) for site in SITES}


def growing() -> Read:
    calls: list[None] = []

    def read_more(tokens: Tensor) -> dict[Site, Tensor]:
        calls.append(None)
        return zeros(CONTEXT, len(calls))(tokens)

    return read_more


@pytest.mark.parametrize(
    ("read", "options", "message"),
    [
        (lambda tokens: {}, {}, "read_activations returned no sites, but not resid_mid.0"),
        (zeros(7, 3), {}, "the activations at resid_mid.0 must have shape [1, 8, width], got [1, 7, 3]"),
        (growing(), {}, "the activations at resid_mid.0 must have shape [1, 8, 1], got [1, 8, 2]"),
        (zeros(8, 3, value=1e5), {"dtype": torch.float16}, "at resid_mid.0 hold values that torch.float16 cannot"),
        (zeros(8, 3), {"dtype": torch.float64}, "are cached as one of bfloat16, float16, float32, got float64"),
    ],
    ids=["no sites", "shape", "width", "overflow", "dtype"],
)
def test_bad_activations_are_refused(tmp_path: Path, read: Read, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tmp_path / "cache", read, **options)


def test_a_folder_in_use_is_refused(tmp_path: Path, read: Read) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no activation cache: expected a new or empty folder"):
        build(tmp_path, read)


def test_streamed_rows_and_no_sites_cannot_be_cached(tmp_path: Path, read: Read) -> None:
    streamed = StreamedRows(lambda: [ROWS], context=CONTEXT, name="a text")
    with pytest.raises(ValueError, match="a text is streamed: only stored rows can be cached"):
        ActivationCache.build(tmp_path / "cache", streamed, read, SITES, fingerprint="f")
    with pytest.raises(ValueError, match="no sites to cache"):
        ActivationCache.build(tmp_path / "cache", source(), read, [], fingerprint="f")


def test_a_stream_refuses_the_cache_of_another_source(tmp_path: Path, read: Read) -> None:
    cache = build(tmp_path / "cache", read)
    with pytest.raises(ValueError, match="the cache was opened for the rows, not for the token rows"):
        ActivationStream(StoredRows(ROWS), cache, batch_tokens=8, buffer_tokens=96, seed=0)


def test_a_second_process_that_builds_the_same_cache_waits_for_the_first(tmp_path: Path, read: Read) -> None:
    """Otherwise each would replace parts whose digests the other has recorded."""
    n_read: list[int] = []

    def counting(tokens_BT: Tensor) -> dict[Site, Tensor]:
        n_read.append(len(tokens_BT))
        return read(tokens_BT)

    build(tmp_path / "done", read)
    (tmp_path / "cache").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / "cache" / ".lock"):
            second = pool.submit(build, tmp_path / "cache", counting)
            assert not wait([second], timeout=0.5).done
            for path in (tmp_path / "done").glob("[!.]*"):  # the first one ends
                shutil.copy(path, tmp_path / "cache")
        assert second.result(timeout=60).sites == SITES
    assert n_read == [1], "the second one looks at the widths and computes nothing"
