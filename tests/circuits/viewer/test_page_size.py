"""A page stays small enough to send by mail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from random_circuit import random_circuit

from circuits.viewer.page import to_html


def test_a_thousand_nodes_take_two_megabytes_at_most(index_of: Callable[..., Any]) -> None:
    """1,000 nodes and 20,000 edges with the heads of every edge, and evidence of 915 different features."""
    graph = random_circuit(1000, 20_000, n_heads=12)
    graph = dataclasses.replace(graph, metadata={**graph.metadata, "crosscoder_fingerprint": "2:toy"})
    with index_of(graph, tuple(f" word{number}" for number in range(5000))) as index:
        page = to_html(graph, index=index).encode()
    assert 1_000_000 < len(page) <= 2_000_000
