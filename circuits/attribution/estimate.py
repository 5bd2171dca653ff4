"""What a trace will cost in memory and time, computed from shapes and counts before any row is made.

Memory is what the trace adds to the process: edges (rows of the expanded features), the dense rows of one round, source rows
(for every active feature one vector per layer that it writes), and the scores of labels. Which features will be expanded is not
known, so their rows are taken to be as long as the average feature's, and as many as `max_nodes` allows; a trace that
reaches its coverage earlier costs less. The estimate was 1.3 and 1.4 times the measured growth of the resident memory on a
model of 30 layers (15 tokens and 2,000 features; 100 tokens and 500 features) and 1.1 times on the demo with 60 tokens. Where
only some megabytes are needed it can be too small (0.7 times 8 MB on a short prompt of the demo).

Time is the number of floating-point operations over the speed of a small matrix product measured on the spot, so it is right
only while the machine is as busy as it was then.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.attribution.columns import Columns
from circuits.attribution.direct_effects import LEAST_TARGETS, PUSHED_NUMBERS, rows_per_chunk
from circuits.attribution.expansion import DENSE_BYTES, FIRST_ROUND, LARGEST_ROUND
from circuits.attribution.limits import LABELLED, memory_bytes
from circuits.attribution.sources import BUDGET
from replacement import LocalReplacement
from replacement.index.token_effects import CHUNK
from replacement.memory import available_memory, resident_memory, size_text

EFFICIENCY = 0.8
"""Speed of a trace over that of the matrix product it is compared with."""
SECONDS_PER_LAYER = 2e-4
"""What one layer costs a chunk of targets beside its floating-point operations."""
NODE_BYTES = 200
"""What a node takes in the tables that are held while the graph is put together."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The expected cost of a trace; `str` gives one line."""

    bytes: int
    """Most memory that the trace adds to what the process holds."""
    seconds: float
    """Time, at the speed measured when the estimate was made."""
    n_expanded: int
    """Most features that will be expanded."""
    n_active: int
    """Active features of the prompt."""
    n_edges: int
    """Expected edges of the full graph."""

    def __str__(self) -> str:
        return (
            f"about {self.seconds:.2g} s and {size_text(self.bytes)}: at most {self.n_expanded:,} of {self.n_active:,} "
            f"active features expanded, {self.n_edges:,} edges"
        )


def estimate(local: LocalReplacement, *, n_logits: int, max_nodes: int | None) -> Estimate:
    """Estimate what it costs to trace a prompt.

    Args:
        local: the prompt's local replacement model.
        n_logits: targets that are logits.
        max_nodes: most features expanded; None for no limit.
    """
    lengths_S, cones_S = _row_lengths(local)
    n_active, n_columns = len(lengths_S), Columns.of(local).n_columns
    n_expanded = n_active if max_nodes is None else min(max_nodes, n_active)
    share = n_expanded / max(1, n_active)
    row_entries = share * float(lengths_S.sum()) + n_logits * n_columns
    carried = share * float(cones_S.sum()) + n_logits * local.n_positions * local.shape.n_layers
    return Estimate(
        bytes=int(_bytes(local, n_expanded, row_entries)),
        seconds=_seconds(local, n_expanded + n_logits, row_entries, carried),
        n_expanded=n_expanded,
        n_active=n_active,
        n_edges=int(row_entries),
    )


def check_memory(cost: Estimate, memory: str | int | None, n_positions: int) -> None:
    """Refuse a trace that does not fit.

    Args:
        cost: of the trace.
        memory: most bytes that the process may hold in all; by default what it holds and what is available.
        n_positions: tokens of the prompt.

    Raises:
        ValueError: the process would hold more.
    """
    resident, available = resident_memory(), available_memory()
    if memory is not None:
        limit, of_what = memory_bytes(memory), "the limit"
    elif available is not None:
        limit, of_what = resident + available, "what is available"
    else:
        return
    if resident + cost.bytes > limit:
        raise ValueError(
            f"memory: the trace needs about {size_text(cost.bytes)} beside the {size_text(resident)} in use, and {of_what} is "
            f"{size_text(limit)} in all: lower --max-nodes (here {cost.n_expanded}), raise --memory, or shorten the prompt "
            f"of {n_positions} tokens"
        )


def _row_lengths(local: LocalReplacement) -> tuple[Tensor, Tensor]:
    """Entries in the row of every active feature `[S]`, and layers x positions that its target crosses `[S]`."""
    T, L = local.n_positions, local.shape.n_layers
    linear = local.attention is None
    written_PLT = torch.ones(len(local.decompositions), L, T)  # an error at every place
    places = []
    for number, part in enumerate(local.decompositions):
        wiring, features = part.crosscoder.wiring, part.features
        layer_G = torch.tensor([wiring.group_layer(group) for group in range(wiring.n_groups)])
        layer_S, row_S = layer_G[features.group.cpu()], features.row.cpu()
        places.append((layer_S, row_S))
        written_PLT[number] += torch.bincount(layer_S * T + row_S, minlength=L * T).view(L, T)
    below_PLT = torch.nn.functional.pad(
        written_PLT.cumsum(1), (0, 0, 1, 0)
    )  # written in front of each layer, L + 1 of them
    embeddings = 1 + (local.frozen.position_embedding_TD is not None)
    lengths, cones = [], []
    for number, (layer_S, row_S) in enumerate(places):
        below_LT = below_PLT[0, :-1].clone()
        if not linear:
            below_LT += (
                below_PLT[1, :-1] if number else below_PLT[1, 1:]
            )  # MLPs read the attention of their own layer too
        below_LT += embeddings
        crosses = linear or number == 1  # whether a target reaches other positions than its own
        if crosses:
            below_LT = below_LT.cumsum(1)
        lengths.append(below_LT[layer_S, row_S])
        cones.append((row_S + 1) * ((layer_S + 1) if linear else 1) * crosses)
    return torch.cat(lengths).double(), torch.cat(cones).double()


def _bytes(local: LocalReplacement, n_expanded: int, row_entries: float) -> float:
    T, L, D = local.n_positions, local.shape.n_layers, local.shape.d_model
    item, columns = local.mlp.errors_LTD.element_size(), Columns.of(local)
    vectors = len(local.decompositions) * L * T
    for part in local.decompositions:
        written_G = torch.tensor([len(writes) for writes in part.crosscoder.wiring.writes])
        vectors += int(written_G[part.features.group.cpu()].sum())
    sources = min(vectors * (D * item + 8), BUDGET) + vectors * (D * item + 8) / L  # kept, and one layer being gathered
    embeddings = T * (1 + columns.learned_positions)
    pushed = embeddings * T * D if embeddings <= D // 4 and embeddings * T * D <= PUSHED_NUMBERS else 0
    n_round = min(_largest_round(n_expanded), max(1, DENSE_BYTES // (columns.n_columns * item)))
    carried = max(rows_per_chunk(local.mlp.errors_LTD.device), LEAST_TARGETS * T) * (4 * D + columns.n_columns / T)
    a_round = (2 * n_round * columns.n_columns + carried) * item
    V = local.frozen.logits_TV.shape[1]
    labels = (V * D + 3 * min(CHUNK, LABELLED) * V) * item
    edges = row_entries * (4 + item)
    return (
        sources
        + ((2 * L + 1) * T * D + 2 * pushed) * item
        + max(a_round, labels)
        + edges
        + NODE_BYTES * columns.n_columns
    )


def _largest_round(n_expanded: int) -> int:
    """Features of the largest of the doubling rounds."""
    size, largest = FIRST_ROUND, 0
    while n_expanded > 0:
        largest = max(largest, min(size, n_expanded))
        n_expanded, size = n_expanded - size, min(2 * size, LARGEST_ROUND)
    return largest


def _seconds(local: LocalReplacement, n_targets: int, row_entries: float, carried: float) -> float:
    """Floating-point operations of rows and labels over the measured speed, and the fixed cost of every chunk and layer."""
    T, D, shape = local.n_positions, local.shape.d_model, local.shape
    X, V, errors_LTD = shape.n_heads * shape.d_head, local.frozen.logits_TV.shape[1], local.mlp.errors_LTD
    flops = carried * (4 * D * X + T * X) + 2 * D * row_entries + 4 * min(LABELLED, n_targets) * V * D
    chunk = max(LEAST_TARGETS, rows_per_chunk(errors_LTD.device) // max(1, T // 2))
    return flops / (EFFICIENCY * _speed(errors_LTD)) + SECONDS_PER_LAYER * shape.n_layers * (1 + n_targets / chunk)


def _speed(like: Tensor) -> float:
    """Floating-point operations per second of a matrix product as wide as the model: the best of five."""
    D, best = like.shape[-1], float("inf")
    left_RD, right_DD = like.new_ones(512, D), like.new_ones(D, D)
    for _ in range(5):
        started = time.perf_counter()
        float((left_RD @ right_DD)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * left_RD.numel() * D / max(best, 1e-9)
