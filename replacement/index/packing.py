"""How the columns of an index file are packed into bytes: small, and of one form on every machine (little endian)."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from replacement.index.records import TokenEffects

TOP = 255
"""In place of a quantile: an example kept for its activation."""
EXAMPLE = np.dtype([("row", "<u4"), ("position", "<u2"), ("quantile", "u1"), ("n_active", "u1")])
"""An example: its peak, the number of its quantile, and how many tokens of its window are active."""
NEIGHBOUR = np.dtype([("offset", "u1"), ("activation", "<f2")])
"""An active token: its place in the window, and its activation as a share of the feature's largest."""
ROWS_PER_BLOCK = 256
ROLES = ("promoted", "suppressed", "read", "read_through_heads")
_NO_HEAD = 0xFFFF


def pack_counts(counts: np.ndarray) -> bytes:
    """Counts in as few bytes each as the largest needs, without zeros at the end."""
    counts = np.trim_zeros(counts, "b")
    dtype = next(dtype for dtype in ("u1", "<u2", "<u4", "<u8") if counts.max(initial=0) <= np.iinfo(dtype).max)
    return bytes([np.dtype(dtype).itemsize]) + counts.astype(dtype).tobytes()


def unpack_counts(blob: bytes) -> np.ndarray:
    """The inverse of `pack_counts`."""
    return np.frombuffer(blob, dtype=f"<u{blob[0]}", offset=1).astype(np.int64)


def pack_examples(
    feature_N: np.ndarray, heads_N: np.ndarray, share_NW: np.ndarray, *, before: int, n_features: int
) -> Iterator[bytes]:
    """Examples of every feature: how many there are, and the `EXAMPLE` and `NEIGHBOUR` entries of each.

    Args:
        feature_N: number of the feature of every example, sorted.
        heads_N: `EXAMPLE` entries; `n_active` is filled in.
        share_NW: activations around the peaks, as shares of each feature's largest.
        before: tokens of the window in front of the peak.
    """
    number_A, place_A = np.nonzero(share_NW)
    heads_N["n_active"] = np.bincount(number_A, minlength=len(heads_N))
    neighbours_A = np.empty(len(number_A), NEIGHBOUR)
    outside_N = (before - heads_N["position"].astype(np.int64)).clip(min=0)  # of the row
    neighbours_A["offset"] = place_A - outside_N[number_A]
    neighbours_A["activation"] = share_NW[number_A, place_A]
    bounds_F = np.searchsorted(feature_N, np.arange(n_features + 1))
    ends_N = np.concatenate([[0], np.cumsum(heads_N["n_active"], dtype=np.int64)])
    for begin, end in itertools.pairwise(bounds_F.tolist()):
        neighbours = neighbours_A[ends_N[begin] : ends_N[end]]
        yield bytes([end - begin]) + heads_N[begin:end].tobytes() + neighbours.tobytes()


def token_dtype(vocabulary_size: int) -> np.dtype:
    """What token ids are stored in."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def pack_rows(number_R: np.ndarray, tokens_RT: np.ndarray, dtype: np.dtype) -> tuple[bytes, bytes]:
    """Some rows of one block: their numbers in the block, and their tokens, position by position."""
    tokens = zlib.compress(np.ascontiguousarray(tokens_RT.T.astype(dtype)).tobytes(), 9)
    return (number_R % ROWS_PER_BLOCK).astype("u1").tobytes(), tokens


def unpack_row(number: int, present: bytes, tokens: bytes, dtype: np.dtype) -> np.ndarray:
    """The tokens of one row of a block."""
    tokens_TR = np.frombuffer(zlib.decompress(tokens), dtype=dtype).reshape(-1, len(present))
    return tokens_TR[:, present.index(number % ROWS_PER_BLOCK)].astype(np.int64)


def pack_effects(effects: TokenEffects, ids: Mapping[str, int], dtype: np.dtype) -> bytes:
    """Token ids and weights by role, and the head.

    Args:
        ids: some token with each text.
    """
    lists = [getattr(effects, role) for role in ROLES]
    head = effects.head or (_NO_HEAD, _NO_HEAD)
    flat = [pair for pairs in lists for pair in pairs]
    tokens = np.array([ids[text] for text, _ in flat], dtype=dtype)
    weights = np.clip(np.array([weight for _, weight in flat], dtype=np.float64), -6e4, 6e4).astype("<f2")
    return bytes(map(len, lists)) + np.array(head, dtype="<u2").tobytes() + tokens.tobytes() + weights.tobytes()


def unpack_effects(blob: bytes, texts: Sequence[str], dtype: np.dtype) -> TokenEffects:
    """The inverse of `pack_effects`.

    Args:
        texts: of the tokens that `effect_tokens` gives.
    """
    counts, layer_and_head = blob[:4], np.frombuffer(blob, "<u2", 2, 4)
    weights = np.frombuffer(blob, "<f2", offset=8 + sum(counts) * dtype.itemsize).tolist()
    pairs = list(zip(texts, weights, strict=True))
    ends = np.cumsum(list(counts)).tolist()
    lists = [tuple(pairs[end - count : end]) for count, end in zip(counts, ends, strict=True)]
    layer, head = layer_and_head.tolist()
    return TokenEffects(**dict(zip(ROLES, lists, strict=True)), head=None if layer == _NO_HEAD else (layer, head))


def effect_tokens(blob: bytes, dtype: np.dtype) -> np.ndarray:
    """Token ids of packed effects, role by role."""
    return np.frombuffer(blob, dtype, sum(blob[:4]), 8)
