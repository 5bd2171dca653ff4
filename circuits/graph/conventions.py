"""What counts as a source, and how pruning ranks nodes: this package's conventions, and those of circuit-tracer.

The attribution is the same under both: every entry `A[target, source]` that both have is equal. They differ in which sources
have a node at all, hence in what a row is divided by when influence is computed, and in what pruning ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """The differences, one by one; a graph names its conventions in `metadata["conventions"]`, none means `exact`.

    The effects of sources without a node are part of their targets' `bias`, so that `value = sum of edges + bias` still holds.
    """

    name: str
    first_position: bool
    """Whether the errors of undecomposed positions, and the features and errors of position 0, have nodes."""
    learned_positions: bool
    """Whether learned position embeddings have nodes."""
    unexpanded: bool
    """Whether active features have nodes although their own causes were not computed."""
    ranks_tokens: bool
    """Whether pruning counts the influence of tokens, which it never drops, towards the share that the kept nodes must hold."""
    circuit_nodes: int
    """Most features, errors and positions that `circuits trace` leaves in a circuit if nothing is said; 0 for no limit."""
    circuit_edges: int
    """Most edges, likewise."""


EXACT = Conventions(
    name="exact",
    first_position=True,
    learned_positions=True,
    unexpanded=True,
    ranks_tokens=False,
    circuit_nodes=60,
    circuit_edges=300,
)
CIRCUIT_TRACER = Conventions(
    name="circuit-tracer",
    first_position=False,
    learned_positions=False,
    unexpanded=False,
    ranks_tokens=True,
    circuit_nodes=0,
    circuit_edges=0,
)
CONVENTIONS = {conventions.name: conventions for conventions in (EXACT, CIRCUIT_TRACER)}


def named_conventions(name: str) -> Conventions:
    """The conventions of a name; raises `ValueError` for another one."""
    if not isinstance(name, str) or name not in CONVENTIONS:
        raise ValueError(f"conventions: expected {' or '.join(CONVENTIONS)}, given {name!r:.50}")
    return CONVENTIONS[name]


def conventions_of(metadata: Mapping[str, Any]) -> Conventions:
    """The conventions a graph was traced with."""
    return named_conventions(metadata.get("conventions", EXACT.name))
