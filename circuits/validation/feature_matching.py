"""Which features of two crosscoders are the same: those that read and write the same, at the same layer.

Up to its threshold a feature is a map of rank one, from what it reads to what it writes. The likeness of two features is the
cosine of these maps, which is the cosine of their encoders times that of their decoders (all sites joined); it does not depend
on how a feature's size is divided among encoder and decoder. Where one of the two cosines is negative the likeness is 0: such
features fire on opposite sides. Two features match if each is the other's best match, and their likeness is at least `LEAST`.
0.5 is about 0.7 for each of the two cosines. Crosscoders of other seeds share only a part of their features (Paulo and Belrose
2025, "Sparse Autoencoders Trained on the Same Data Learn Different Features").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuits.graph.alignment import same_nodes
from circuits.graph.edges import GraphData
from circuits.graph.nodes import NodeKind, Part
from replacement import Crosscoder

LEAST = 0.5
AT_ONCE = 2**24
"""Entries of the largest intermediate matrix: bounds memory."""


def check_comparable(crosscoder: Crosscoder, other: Crosscoder) -> None:
    """Refuse a crosscoder whose features cannot be compared.

    Raises:
        ValueError: it reads or writes other sites.
    """
    if (crosscoder.wiring.reads, crosscoder.wiring.writes) != (other.wiring.reads, other.wiring.writes):
        mine, theirs = (f"{c.wiring.name} reading {c.wiring.read_sites[0].kind}" for c in (crosscoder, other))
        raise ValueError(
            f"expected another crosscoder with the same reads and writes ({mine}), given one that is {theirs}"
        )


class Pairing(NamedTuple):
    """Nodes of two graphs of one prompt that are the same."""

    row_N: np.ndarray
    """int64[N], row of each node's partner; -1 where there is none."""
    matched_N: np.ndarray
    """bool[N], features of MLPs that match a feature of the other crosscoder, active in the other graph or not."""
    likeness_N: np.ndarray
    """float64[N], likeness of each feature of an MLP and the feature that is most alike; NaN where nothing was compared."""


@torch.no_grad()
def match_features(
    crosscoder: Crosscoder, other: Crosscoder, group: int, index_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best matches of some features of one group.

    Returns:
        int64[S], the matching feature of `other`, -1 where there is none; float64[S], the likeness of the most alike feature,
        match or not.
    """
    index = torch.from_numpy(index_S.astype(np.int64)).to(crosscoder.device)
    likeness_S, best_S = _most_alike(crosscoder, index, other, group)
    _, back_S = _most_alike(other, best_S, crosscoder, group)
    matches = (back_S == index) & (likeness_S >= LEAST)
    return torch.where(matches, best_S, -1).cpu().numpy(), likeness_S.double().cpu().numpy()


def paired_nodes(
    graph: GraphData,
    other: GraphData,
    crosscoder: Crosscoder,
    other_crosscoder: Crosscoder,
    wanted: np.ndarray,
) -> Pairing:
    """The nodes of one prompt's graphs with two crosscoders of its MLPs that are the same.

    Features of MLPs are paired by `match_features`, all other nodes by what they are (`circuits.graph.alignment`).

    Args:
        wanted: bool[N], the nodes that are compared; other features of MLPs have no partner.
    """
    nodes, theirs = graph.nodes, other.nodes
    pairing, likeness = np.full(len(nodes), -1), np.full(len(nodes), np.nan)
    matched = np.zeros(len(nodes), dtype=bool)
    rows, other_rows = same_nodes(graph, other)
    pairing[rows] = other_rows
    of_mlps, of_theirs = (table.mask(NodeKind.FEATURE) & (table.part == Part.MLP) for table in (nodes, theirs))
    pairing[of_mlps] = -1
    for layer in np.unique(nodes.layer[of_mlps & wanted]).tolist():
        rows = np.flatnonzero(of_mlps & wanted & (nodes.layer == layer))
        other_rows = np.flatnonzero(of_theirs & (theirs.layer == layer))
        index, feature = np.unique(nodes.index[rows], return_inverse=True)
        match, alike = match_features(crosscoder, other_crosscoder, crosscoder.wiring.group_of(layer), index)
        likeness[rows] = alike[feature]
        T = len(graph.metadata["tokens"])
        keys, other_keys = (
            match[feature] * T + nodes.position[rows],
            theirs.index[other_rows] * T + theirs.position[other_rows],
        )
        matched[rows] = match[feature] >= 0
        _, here, there = np.intersect1d(keys, other_keys, return_indices=True)  # no partner has a negative key
        pairing[rows[here]] = other_rows[there]
    return Pairing(pairing, matched, likeness)


def _most_alike(crosscoder: Crosscoder, index_S: Tensor, other: Crosscoder, group: int) -> tuple[Tensor, Tensor]:
    """Likeness `[S]` and index `[S]` of the feature of `other` that is most alike to each feature."""
    reads, writes, parts = crosscoder.wiring.reads[group], crosscoder.wiring.writes[group], []
    for chunk in index_S.split(max(1, AT_ONCE // other.n_features)):
        likeness_SF = _cosines(
            (crosscoder.encoder_vectors(group, chunk, site), other.encoder(group, site)) for site in reads
        )
        likeness_SF *= _cosines(
            (crosscoder.decoder_vectors(group, chunk, site), other.decoder(group, site)) for site in writes
        )
        parts.append(likeness_SF.max(1))
        other.release()
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _cosines(pieces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`[S, F]`, cosines of vectors given in pieces `[S, D]` and `[F, D]`; 0 where they are negative or a vector is 0."""
    dots, squares_S, squares_F = (torch.zeros(()) for _ in range(3))
    for x_SD, y_FD in pieces:
        dots = dots + x_SD @ y_FD.T
        squares_S, squares_F = squares_S + (x_SD**2).sum(1), squares_F + (y_FD**2).sum(1)
    sizes = (squares_S[:, None] * squares_F).sqrt()
    return torch.where(sizes > 0, dots / sizes, 0.0).clamp(min=0.0)
