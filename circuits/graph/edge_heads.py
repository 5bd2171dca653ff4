"""Which heads carry an edge: its weight as the direct stream + the heads listed + the rest. E edges, P (edge, head) pairs."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

COLUMNS: dict[str, np.dtype] = {
    "direct": np.dtype(np.float32),
    "rest": np.dtype(np.float32),
    "indptr": np.dtype(np.int64),
    "layer": np.dtype(np.int16),
    "head": np.dtype(np.int16),
    "weight": np.dtype(np.float32),
}
LISTED = 0.99
"""Share of an edge's summed head magnitudes that the listed heads hold, where `MOST_LISTED` of them are enough for it."""
MOST_LISTED = 16
"""Heads listed for an edge at most; weaker ones are in `rest`, so the sum stays exact. In a model of 270 heads 99 % took 79,
and a graph of half a million edges filled 18 GB when it was exported."""
_EDGES_AT_ONCE = 8192
"""Edges whose heads are sorted together: in float64, with the order, they take several times the memory of the table."""


class EdgeRow(NamedTuple):
    """The parts of one edge."""

    direct: float
    rest: float
    heads: list[tuple[int, int, float]]
    """(layer, head, contribution), the strongest first."""

    def text(self, *, most: int = 3, least: float = 0.1) -> str:
        """See `EdgeHeads.text`."""
        heads = self.heads
        total = sum([abs(weight) for _, _, weight in heads]) + abs(self.direct) + abs(self.rest) or 1.0
        parts = [(abs(weight), 1, f"L{layer}H{head}", weight) for layer, head, weight in heads[:most]]
        parts.append((abs(self.direct), 0, "direct", self.direct))
        parts = sorted((part for part in parts if part[0]), key=_size, reverse=True)[:most]
        return ", ".join(
            [
                f"{'−' if weight < 0 else ''}{name} {100 * size / total:.0f} %"
                for size, _, name, weight in parts
                if size / total >= least
            ]
        )


_size = operator.itemgetter(0, 1)
"""Larger parts first; heads in front of what is direct where both are equal."""


@dataclass(frozen=True, eq=False, repr=False)
class EdgeHeads:
    """Heads of E edges as compressed rows, the strongest first: `weight = direct + sum of listed heads + rest`.

    A head here is the last one on the way: the one that writes into the target's own position.

    Raises `ValueError` for columns of a wrong dtype or length, or numbers that are not finite.
    """

    direct: np.ndarray
    """float32[E], what arrives along the stream of the target's own position, through no head."""
    rest: np.ndarray
    """float32[E], sum of the heads that are not listed."""
    indptr: np.ndarray
    """int64[E + 1]: the heads of edge e are `indptr[e]:indptr[e + 1]`."""
    layer: np.ndarray
    """int16[P], layer of the head."""
    head: np.ndarray
    """int16[P], number of the head in its layer."""
    weight: np.ndarray
    """float32[P], signed contribution."""

    def __post_init__(self) -> None:
        n_edges, n_pairs = len(self.direct), len(self.weight)
        lengths = {"direct": n_edges, "rest": n_edges, "indptr": n_edges + 1}
        for name, dtype in COLUMNS.items():
            column, length = getattr(self, name), lengths.get(name, n_pairs)
            if not isinstance(column, np.ndarray) or column.dtype != dtype or column.shape != (length,):
                raise ValueError(f"EdgeHeads.{name}: expected {dtype}[{length}], given {_describe(column)}")
            if dtype.kind == "f" and not np.isfinite(column).all():
                raise ValueError(f"EdgeHeads.{name}: expected finite numbers, given NaN or infinity")
        if self.indptr[0] != 0 or self.indptr[-1] != n_pairs or (np.diff(self.indptr) < 0).any():
            raise ValueError(f"EdgeHeads.indptr: expected to rise from 0 to the {n_pairs} heads")

    @classmethod
    def from_dense(cls, direct: np.ndarray, heads: np.ndarray, *, listed: float = LISTED) -> EdgeHeads:
        """From all heads of all edges.

        Args:
            direct: float[E].
            heads: float[E, L, H].
            listed: share of the summed magnitudes that the listed heads must hold, unless that takes more than `MOST_LISTED`.
        """
        n_edges, _, n_heads = heads.shape
        counts, rest = np.zeros(n_edges, np.int64), np.zeros(n_edges, np.float32)
        # Results have their place beforehand: small ones between large ones that come and go would keep these apart in memory.
        number = np.empty(n_edges * MOST_LISTED, np.int32)
        weight = np.empty(n_edges * MOST_LISTED, np.float32)
        n_pairs = 0
        for begin in range(0, n_edges, _EDGES_AT_ONCE):
            block = slice(begin, begin + _EDGES_AT_ONCE)
            listed_numbers, listed_weights, counts[block], rest[block] = _strongest(heads[block], listed)
            pairs = slice(n_pairs, n_pairs + len(listed_numbers))
            number[pairs], weight[pairs], n_pairs = listed_numbers, listed_weights, pairs.stop
        return cls(
            direct=direct.astype(np.float32),
            rest=rest,
            indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            layer=(number[:n_pairs] // n_heads).astype(np.int16),
            head=(number[:n_pairs] % n_heads).astype(np.int16),
            weight=weight[:n_pairs].copy(),
        )

    def __repr__(self) -> str:
        return f"EdgeHeads({len(self.weight)} heads of {len(self)} edges)"

    def __len__(self) -> int:
        return len(self.direct)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EdgeHeads):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMNS)

    def of(self, edge: int) -> list[tuple[int, int, float]]:
        """(layer, head, contribution) of the heads listed for one edge, the strongest first."""
        return self.rows(slice(edge, edge + 1))[0].heads

    def magnitude(self, edge: int) -> float:
        """|direct| + sum of |heads| + |rest| of one edge; `magnitudes` has those of all."""
        heads = sum(abs(weight) for *_, weight in self.of(edge))
        return heads + abs(float(self.direct[edge])) + abs(float(self.rest[edge]))

    def totals(self) -> np.ndarray:
        """float64[E], direct + heads + rest: the edges' weights."""
        return self._sums(lambda part: part)

    def magnitudes(self) -> np.ndarray:
        """float64[E], |direct| + sum of |heads| + |rest|."""
        return self._sums(np.abs)

    @property
    def edge(self) -> np.ndarray:
        """int64[P], the edge each listed head is of."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    def _sums(self, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        apart = of(self.direct.astype(np.float64)) + of(self.rest.astype(np.float64))
        return apart + np.bincount(self.edge, of(self.weight), minlength=len(self))

    def select(self, edges: np.ndarray) -> EdgeHeads:
        """The heads of the edges where `edges` (bool[E]) is true."""
        counts = np.diff(self.indptr)
        pairs = np.repeat(edges, counts)
        return EdgeHeads(
            direct=self.direct[edges],
            rest=self.rest[edges],
            indptr=np.concatenate([[0], np.cumsum(counts[edges])]).astype(np.int64),
            layer=self.layer[pairs],
            head=self.head[pairs],
            weight=self.weight[pairs],
        )

    def text(self, edge: int, *, most: int = 3, least: float = 0.1) -> str:
        """What carries an edge, in words: `L1H3 62 %, direct 30 %`; parts of its summed magnitudes, strongest first.

        Args:
            most: names at most.
            least: smallest part that is named.
        """
        (row,) = self.rows(slice(edge, edge + 1))
        return row.text(most=most, least=least)

    def rows(self, edges: slice | np.ndarray) -> list[EdgeRow]:
        """The heads of many edges (a slice, or their numbers) as Python values, much faster than one by one."""
        number = np.arange(len(self))[edges] if isinstance(edges, slice) else edges
        starts, stops = self.indptr[number], self.indptr[number + 1]
        pairs = ranges(starts, stops)
        columns = (column[pairs].tolist() for column in (self.layer, self.head, self.weight))
        listed = list(zip(*columns, strict=True))
        ends = np.concatenate([[0], np.cumsum(stops - starts)]).tolist()
        facts = zip(self.direct[number].tolist(), self.rest[number].tolist(), itertools.pairwise(ends), strict=True)
        return [EdgeRow(direct, rest, listed[first:last]) for direct, rest, (first, last) in facts]

    def __iter__(self) -> Iterator[EdgeRow]:
        """The heads of every edge; as Python values, those of all edges together would take a hundred times their memory."""
        for begin in range(0, len(self), _EDGES_AT_ONCE):
            yield from self.rows(slice(begin, begin + _EDGES_AT_ONCE))


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The numbers of several ranges, one after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _strongest(heads: np.ndarray, listed: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The listed heads of a block of edges: numbers (layer * H + head) and weights, how many of each edge, and the rest."""
    flat = heads.reshape(len(heads), heads.shape[1] * heads.shape[2]).astype(np.float64)
    size = np.abs(flat)
    # Only the strongest are sorted; equal ones by number, as their places are sorted first.
    most = min(MOST_LISTED, flat.shape[1])
    place = np.sort(np.argpartition(-size, most - 1, axis=1)[:, :most], axis=1)
    order = np.take_along_axis(place, np.argsort(-np.take_along_axis(size, place, 1), axis=1, kind="stable"), 1)
    strongest, sizes = np.take_along_axis(flat, order, 1), np.take_along_axis(size, order, 1)
    before = np.cumsum(sizes, axis=1) - sizes
    keep = (before < listed * size.sum(1, keepdims=True)) & (strongest != 0)
    np.put_along_axis(flat, order, np.where(keep, 0.0, strongest), 1)  # what is left of each edge
    rest = flat.sum(1).astype(np.float32)
    return order[keep].astype(np.int32), strongest[keep].astype(np.float32), keep.sum(1), rest


def _describe(column: object) -> str:
    return f"{column.dtype}{list(column.shape)}" if isinstance(column, np.ndarray) else type(column).__name__
