"""Activations of stored rows on disk, to be read in place of forward passes. R rows, T tokens per row, D site width.

    FOLDER/cache.json                what is cached, and the SHA-256 of every part written so far
    FOLDER/part-00000.safetensors    `{site: [rows_per_part, T, D]}`, consecutive rows of the source

Rows are numbered as in the source, held-out rows included, so one cache serves any split into held-out and training rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from replacement.crosscoder.sites import Site
from replacement.data.token_sources import StoredRows, TokenSource

FORMAT = "crosstrace activation cache"
VERSION = 1
METADATA_FILE = "cache.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_OPEN_PARTS = 64  # parts whose files stay mapped
_WHOLE_NUMBERS = ("version", "context", "n_rows", "rows_per_part")


class ActivationCache:
    """Activations of every row of a stored source, read from disk a few rows at a time.

    Goes where a stream takes `read_activations`. The checksum of a part is verified when it is first read.

    Attributes:
        source: the rows whose activations are cached.
        sites: the sites read from it.
    """

    def __init__(self, folder: Path, source: StoredRows, sites: Sequence[Site], metadata: Mapping[str, Any]) -> None:
        """Use `ActivationCache.open` or `.build`, which check that the cache is what it should be."""
        self.source, self.sites = source, tuple(sites)
        self._folder, self._metadata = folder, metadata
        self._rows_per_part: int = metadata["rows_per_part"]
        self._verified: set[int] = set()
        self._part = lru_cache(maxsize=_OPEN_PARTS)(self._open_part)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        source: TokenSource,
        read_activations: Callable[[Tensor], dict[Site, Tensor]],
        sites: Sequence[Site],
        *,
        fingerprint: str,
        dtype: torch.dtype = torch.bfloat16,
        rows_per_read: int = 32,
        part_bytes: int = 1 << 28,
    ) -> ActivationCache:
        """Write the activations of all rows of a source, and open them; goes on where an earlier call stopped.

        Args:
            read_activations: maps tokens `[B, T]` to activations `{site: [B, T, D]}` of at least these sites.
            fingerprint: digest of the model's weights (`LanguageModel.fingerprint`; joined ones for two models).
            dtype: bfloat16, float16 or float32.
            part_bytes: size of a part; one part is held in memory.

        Raises:
            ValueError: a source that is not stored, another dtype, a folder that holds something else or the cache of
                something else, activations of another shape, or values that the dtype cannot hold.
        """
        target, name = Path(folder), str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"activations are cached as one of {', '.join(DTYPES)}, got {name}")
        if not sites:
            raise ValueError("no sites to cache: expected at least one")
        stored = _stored(source)
        widths = _widths(read_activations(stored.take(torch.zeros(1, dtype=torch.int64))), sites, stored.context)
        row_bytes = stored.context * sum(widths.values()) * dtype.itemsize
        description = {**_description(stored, fingerprint), "dtype": name, "sites": widths}
        metadata = _started(target, description, rows_per_part=max(1, part_bytes // row_bytes))
        n_parts = _n_parts(metadata)
        done = len(metadata["parts"])
        for part in tqdm(range(done, n_parts), initial=done, total=n_parts, desc="caching", unit="part", disable=None):
            size = metadata["rows_per_part"]
            index_R = torch.arange(part * size, min((part + 1) * size, stored.n_stored))
            acts = _read_part(stored, index_R, read_activations, widths, dtype, rows_per_read)
            metadata["parts"].append(_write_part(target / _part_name(part), acts))
            _write_metadata(target, metadata)
        return cls(target, stored, sites, metadata)

    @classmethod
    def open(
        cls, folder: str | Path, source: TokenSource, *, fingerprint: str, sites: Sequence[Site] | None = None
    ) -> ActivationCache:
        """Open a finished cache for a source; every row of token ids is compared, by a checksum over all of them.

        Args:
            fingerprint: digest of the weights of the model whose activations are wanted.
            sites: the sites wanted, all by default.

        Raises:
            ValueError: no cache, a damaged or unfinished one, or the cache of another model, other rows or other sites.
        """
        target, stored = Path(folder), _stored(source)
        metadata = _read_metadata(target)
        _check_same(target, metadata, _description(stored, fingerprint))
        n_done, n_parts = len(metadata["parts"]), _n_parts(metadata)
        if n_done < n_parts:
            raise ValueError(f"the cache {target} is unfinished: {n_done} of {n_parts} parts; build it to the end")
        held = {Site.parse(site): width for site, width in metadata["sites"].items()}
        wanted = tuple(held) if sites is None else tuple(sites)
        missing = [site for site in wanted if site not in held]
        if missing:
            raise ValueError(f"the cache {target} lacks {missing[0]}: it holds {', '.join(map(str, held))}")
        return cls(target, stored, wanted, metadata)

    def read_rows(self, index_R: Int[Tensor, " R"]) -> dict[Site, Tensor]:
        """Activations `{site: [R, T, D]}` of rows by their number in the source, in the dtype of the cache.

        Raises:
            ValueError: a part that is missing or not what was written.
        """
        part_R, place_R = index_R // self._rows_per_part, index_R % self._rows_per_part
        dtype, context = DTYPES[self._metadata["dtype"]], self.source.context
        acts = {
            site: torch.empty(len(index_R), context, self._metadata["sites"][str(site)], dtype=dtype)
            for site in self.sites
        }
        for part in part_R.unique().tolist():
            here_R = part_R == part
            stored = self._part(part)
            for site, x_RTD in acts.items():
                x_RTD[here_R] = stored[site][place_R[here_R]]
        return acts

    def _open_part(self, part: int) -> dict[Site, Tensor]:
        """Tensors mapped from a part's file; pages are read as they are touched."""
        path = self._folder / _part_name(part)
        if not path.is_file():
            raise ValueError(f"{path} is missing: the cache is damaged, build it anew")
        if part not in self._verified:
            expected, found = self._metadata["parts"][part], _sha256(path)
            if found != expected:
                raise ValueError(f"{path} is damaged: expected SHA-256 {expected}, got {found}; build the cache anew")
            self._verified.add(part)
        try:
            with safe_open(path, framework="pt") as file:
                return {site: file.get_tensor(str(site)) for site in self.sites}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


# What is cached -----------------------------------------------------------------------------------------------------


def _stored(source: TokenSource) -> StoredRows:
    if not isinstance(source, StoredRows):
        raise ValueError(
            f"{source.name} is streamed: only stored rows can be cached; write them to a .npy file with store_rows"
        )
    return source


def _description(source: StoredRows, fingerprint: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for rows_R in torch.arange(source.n_stored).split(4096):
        digest.update(source.take(rows_R).numpy().astype("<i8").tobytes())
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "context": source.context,
        "n_rows": source.n_stored,
        "rows_sha256": digest.hexdigest(),
    }


def _check_same(folder: Path, metadata: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for entry, value in expected.items():
        if metadata[entry] != value:
            raise ValueError(
                f"the cache {folder} is of something else: expected {entry} {value!r}, it has {metadata[entry]!r}"
            )


def _n_parts(metadata: Mapping[str, Any]) -> int:
    return -(-metadata["n_rows"] // metadata["rows_per_part"])


def _part_name(part: int) -> str:
    return f"part-{part:05d}.safetensors"


# Metadata -----------------------------------------------------------------------------------------------------------


def _started(folder: Path, description: dict[str, Any], *, rows_per_part: int) -> dict[str, Any]:
    """The metadata to go on with: that of an unfinished cache of the same, or a new one."""
    if (folder / METADATA_FILE).is_file():
        metadata = _read_metadata(folder)
        _check_same(folder, metadata, description)
        return metadata
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no activation cache: expected a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {**description, "rows_per_part": rows_per_part, "parts": []}
    _write_metadata(folder, metadata)
    return metadata


def _write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    scratch = folder / f".{METADATA_FILE}"
    scratch.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, folder / METADATA_FILE)


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not an activation cache")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no activation cache: expected format {FORMAT!r}")
    if not isinstance(metadata.get("version"), int) or metadata["version"] > VERSION:
        given = metadata.get("version")
        raise ValueError(f"{path} has format version {given!r}; this library reads versions up to {VERSION}")
    sites, parts = metadata.get("sites"), metadata.get("parts")
    sound = (
        all(isinstance(metadata.get(entry), int) and metadata[entry] > 0 for entry in _WHOLE_NUMBERS)
        and all(isinstance(metadata.get(entry), str) for entry in ("fingerprint", "rows_sha256"))
        and metadata.get("dtype") in DTYPES
        and isinstance(sites, dict)
        and all(isinstance(width, int) for width in sites.values())
        and isinstance(parts, list)
    )
    if not sound:
        raise ValueError(f"{path} is damaged: an entry is missing or of another kind; build the cache anew")
    return metadata


# Parts --------------------------------------------------------------------------------------------------------------


def _widths(acts: Mapping[Site, Tensor], sites: Sequence[Site], context: int) -> dict[str, int]:
    missing = [site for site in sites if site not in acts]
    if missing:
        raise ValueError(f"read_activations returned {', '.join(map(str, acts)) or 'no sites'}, but not {missing[0]}")
    for site in sites:
        if acts[site].dim() != 3 or acts[site].shape[:2] != (1, context):
            expected = f"[1, {context}, width]"
            raise ValueError(f"the activations at {site} must have shape {expected}, got {list(acts[site].shape)}")
    return {str(site): acts[site].shape[2] for site in sites}


@torch.no_grad()
def _read_part(
    source: StoredRows,
    index_R: Tensor,
    read_activations: Callable[[Tensor], dict[Site, Tensor]],
    widths: Mapping[str, int],
    dtype: torch.dtype,
    rows_per_read: int,
) -> dict[str, Tensor]:
    acts = {site: torch.empty(len(index_R), source.context, width, dtype=dtype) for site, width in widths.items()}
    for chunk_B in torch.arange(len(index_R)).split(rows_per_read):
        read = read_activations(source.take(index_R[chunk_B]))
        for site, x_RTD in acts.items():
            given, expected = read[Site.parse(site)], x_RTD[chunk_B]
            if given.shape != expected.shape:
                raise ValueError(
                    f"the activations at {site} must have shape {list(expected.shape)}, got {list(given.shape)}"
                )
            x_RTD[chunk_B] = given.to("cpu", dtype)
    for site, x_RTD in acts.items():
        if not bool(torch.isfinite(x_RTD).all()):
            raise ValueError(f"the activations at {site} hold values that {dtype} cannot: choose another dtype")
    return acts


def _write_part(path: Path, acts: dict[str, Tensor]) -> str:
    """Write a part atomically; its SHA-256."""
    scratch = path.with_name(f".{path.name}")
    save_file(acts, scratch)
    digest = _sha256(scratch)
    os.replace(scratch, path)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
