"""Activations of stored rows on disk, to be read in place of forward passes.

    FOLDER/cache.json                what is cached, and the SHA-256 of every part written so far
    FOLDER/part-00000.safetensors    `{site: [rows_per_part, T, D]}`, consecutive rows of the source

Rows are numbered as in the source, held-out rows included, so one cache serves any split into held-out and training rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import dacite
import torch
from filelock import FileLock
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from replacement.crosscoder.sites import Site
from replacement.data.token_sources import StoredRows, TokenSource
from replacement.files import atomic_file, check_folder, read_json, sha256_of, write_atomic

FORMAT = "crosstrace activation cache"
VERSION = 1
METADATA_FILE = "cache.json"
LOCK_FILE = ".lock"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_OPEN_PARTS = 64  # parts whose files stay mapped


class ActivationCache:
    """Activations of every row of a stored source, read from disk a few rows at a time.

    Goes where a stream takes `read_activations`. The checksum of a part is verified when it is first read.

    Attributes:
        source: the rows whose activations are cached.
        sites: the sites read from it.
    """

    def __init__(self, folder: Path, source: StoredRows, sites: Sequence[Site], metadata: _Metadata) -> None:
        """Use `ActivationCache.open` or `.build`, which check that the cache is what it should be."""
        self.source, self.sites = source, tuple(sites)
        self._folder, self._metadata = folder, metadata
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

        A second process that builds the same cache waits until the first one has ended.

        Args:
            read_activations: maps tokens `[B, T]` to activations `{site: [B, T, D]}` of at least these sites.
            fingerprint: digest of the model's weights (`LanguageModel.fingerprint`; joined ones for two models).
            dtype: bfloat16, float16 or float32.
            part_bytes: size of a part; one part is held in memory.

        Raises:
            ValueError: a source that is not stored, another dtype, a folder that holds something else or the cache of
                something else, activations of another shape, values that the dtype cannot hold, or a full disk.
        """
        target, dtype_name = Path(folder), str(dtype).removeprefix("torch.")
        if dtype_name not in DTYPES:
            raise ValueError(f"activations are cached as one of {', '.join(DTYPES)}, got {dtype_name}")
        if not sites:
            raise ValueError("no sites to cache: expected at least one")
        stored = _stored(source)
        widths = _widths(read_activations(stored.take(torch.zeros(1, dtype=torch.int64))), sites, stored.context)
        row_bytes = stored.context * sum(widths.values()) * dtype.itemsize
        description = {**_description(stored, fingerprint), "dtype": dtype_name, "sites": widths}
        metadata = _begun(target, description)
        if metadata is not None and len(metadata.parts) == metadata.n_parts:
            return cls(target, stored, sites, metadata)
        if metadata is None and target.is_dir() and {path.name for path in target.iterdir()} - {LOCK_FILE}:
            raise ValueError(f"{target} exists and is no activation cache: expected a new or empty folder")
        check_folder(target).mkdir(parents=True, exist_ok=True)
        with FileLock(target / LOCK_FILE):
            metadata = _begun(target, description)
            if metadata is None:
                metadata = _Metadata(**description, rows_per_part=max(1, part_bytes // row_bytes))
            done, total = len(metadata.parts), metadata.n_parts
            for part in tqdm(range(done, total), initial=done, total=total, desc="caching", unit="part", disable=None):
                size = metadata.rows_per_part
                index_R = torch.arange(part * size, min((part + 1) * size, stored.n_stored))
                acts = _read_part(stored, index_R, read_activations, widths, dtype, rows_per_read)
                with atomic_file(target / _part_name(part)) as scratch:
                    save_file(acts, scratch)
                    metadata.parts.append(sha256_of(scratch))
                write_atomic(target / METADATA_FILE, json.dumps(asdict(metadata), indent=1) + "\n")
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
        if len(metadata.parts) < metadata.n_parts:
            raise ValueError(
                f"the cache {target} is unfinished: {len(metadata.parts)} of {metadata.n_parts} parts; build it to the end"
            )
        wanted = [Site.parse(site) for site in metadata.sites] if sites is None else sites
        missing = [site for site in wanted if str(site) not in metadata.sites]
        if missing:
            raise ValueError(f"the cache {target} lacks {missing[0]}: it holds {', '.join(metadata.sites)}")
        return cls(target, stored, wanted, metadata)

    def read_rows(self, index_R: Int[Tensor, " R"]) -> dict[Site, Tensor]:
        """Activations `{site: [R, T, D]}` of rows by their number in the source, in the dtype of the cache.

        Raises:
            ValueError: a part that is missing or not what was written.
        """
        metadata, context = self._metadata, self.source.context
        part_R, place_R = index_R // metadata.rows_per_part, index_R % metadata.rows_per_part
        acts = {
            site: torch.empty(len(index_R), context, metadata.sites[str(site)], dtype=DTYPES[metadata.dtype])
            for site in self.sites
        }
        for part in part_R.unique().tolist():
            in_part_R, stored = part_R == part, self._part(part)
            for site, x_RTD in acts.items():
                x_RTD[in_part_R] = stored[site][place_R[in_part_R]]
        return acts

    def _open_part(self, part: int) -> dict[Site, Tensor]:
        """Tensors mapped from a part's file; pages are read as they are touched."""
        path = self._folder / _part_name(part)
        if not path.is_file():
            raise ValueError(f"{path} is missing: the cache is damaged, build it anew")
        if part not in self._verified:
            expected, actual = self._metadata.parts[part], sha256_of(path)
            if actual != expected:
                raise ValueError(f"{path} is damaged: expected SHA-256 {expected}, got {actual}; build the cache anew")
            self._verified.add(part)
        try:
            with safe_open(path, framework="pt") as file:
                return {site: file.get_tensor(str(site)) for site in self.sites}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


# What is cached -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Metadata:
    """Content of `cache.json`."""

    format: str
    version: int
    fingerprint: str
    context: int
    n_rows: int
    rows_sha256: str
    dtype: str
    sites: dict[str, int]
    rows_per_part: int
    parts: list[str] = field(default_factory=list)

    @property
    def n_parts(self) -> int:
        return -(-self.n_rows // self.rows_per_part)


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


def _check_same(folder: Path, metadata: _Metadata, expected: Mapping[str, Any]) -> None:
    for entry, value in expected.items():
        cached = getattr(metadata, entry)
        if cached != value:
            raise ValueError(f"the cache {folder} is of something else: expected {entry} {value!r}, it has {cached!r}")


def _begun(folder: Path, description: Mapping[str, Any]) -> _Metadata | None:
    """The metadata of a cache that an earlier call has begun, checked to be of the same; None if there is none."""
    if not (folder / METADATA_FILE).is_file():
        return None
    metadata = _read_metadata(folder)
    _check_same(folder, metadata, description)
    return metadata


def _part_name(part: int) -> str:
    return f"part-{part:05d}.safetensors"


def _read_metadata(folder: Path) -> _Metadata:
    path = folder / METADATA_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not an activation cache")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"{path} is no activation cache: expected format {FORMAT!r}")
    if not isinstance(value.get("version"), int) or value["version"] > VERSION:
        raise ValueError(
            f"{path} has format version {value.get('version')!r}; this library reads versions up to {VERSION}"
        )
    try:
        metadata = dacite.from_dict(_Metadata, value)
        is_sound = metadata.dtype in DTYPES and min(metadata.context, metadata.n_rows, metadata.rows_per_part) > 0
    except dacite.DaciteError:
        is_sound = False
    if not is_sound or not isinstance(value.get("parts"), list):
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
