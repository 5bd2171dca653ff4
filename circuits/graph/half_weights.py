"""Edge weights in 16 bits, for files: float16 times a power of two per row.

The power of two brings the row's largest weight to 2^14..2^15, so scaling rounds nothing and float16 keeps eleven bits of every
weight above 2^-28 (4e-9) of the largest: an error of at most 2^-11 (0.05 %). Smaller weights lose bits and may become 0.
"""

from __future__ import annotations

import numpy as np

from circuits.graph.edges import Edges, RowBlock, joined

TOP = 15
SMALLEST = 2.0**-28
"""Smallest weight, relative to the largest of its row, that keeps all bits of float16."""


def to_half(edges: Edges) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights in 16 bits.

    Returns:
        float16[E]; int16[N], the exponent of each row's factor (`weight = half * 2**exponent`); and the largest error of an
        edge, relative to its weight or to `SMALLEST` of the row's largest weight, whichever is more.
    """
    largest = np.zeros(edges.n_nodes, dtype=np.float32)
    for block in edges.row_blocks():
        largest[block.node] = np.maximum.reduceat(np.abs(block.weight), block.starts)
    exponent = (np.frexp(largest)[1] - TOP).astype(np.int16)
    halves = (np.ldexp(block.weight, -block.per_edge(exponent)).astype(np.float16) for block in edges.row_blocks())
    half, start, error = joined(halves, len(edges), np.dtype(np.float16)), 0, 0.0
    for block in edges.row_blocks():
        end = start + len(block.weight)
        gap = np.abs(_raised(half[start:end], block, exponent) - block.weight.astype(np.float64))
        size = np.maximum(np.abs(block.weight), SMALLEST * block.per_edge(largest.astype(np.float64)))
        error = max(error, float(np.divide(gap, size, out=np.zeros_like(gap), where=size > 0).max()))
        start = end
    return half, exponent, error


def from_half(*, indptr: np.ndarray, source: np.ndarray, weight: np.ndarray, exponent: np.ndarray) -> Edges:
    """Edges from the columns of a file.

    Raises:
        ValueError: columns of a wrong dtype or length, or that are no edges.
    """
    if weight.dtype != np.float16 or exponent.dtype != np.int16 or exponent.shape != (len(indptr) - 1,):
        raise ValueError(
            f"expected weights in float16 with int16[{len(indptr) - 1}] exponents, given {weight.dtype} with "
            f"{exponent.dtype}{list(exponent.shape)}"
        )
    edges = Edges(indptr, source, weight.astype(np.float32))
    weights = (_raised(block.weight, block, exponent) for block in edges.row_blocks())
    return Edges(indptr, source, joined(weights, len(edges), np.dtype(np.float32)))


def _raised(half: np.ndarray, block: RowBlock, exponent: np.ndarray) -> np.ndarray:
    return np.ldexp(half.astype(np.float32), block.per_edge(exponent))
