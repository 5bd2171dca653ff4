"""Circuits: what caused what, from tokens to logits, in a replacement model.

>>> import circuits, replacement
>>> graph = circuits.trace(replacement.load("demo"), "the capital of the state containing Dallas is")
>>> circuit = graph.prune()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from circuits.graph import CircuitGraph
from circuits.nodes import NodeKind, NodeTable
from circuits.scores import Scores

if TYPE_CHECKING:
    from circuits.targets import DifferenceTarget, FeatureTarget, TokenTarget
    from circuits.tracing import trace

__all__ = [
    "CircuitGraph",
    "DifferenceTarget",
    "FeatureTarget",
    "NodeKind",
    "NodeTable",
    "Scores",
    "TokenTarget",
    "trace",
]

# What needs a model is imported on first use: reading, pruning and drawing a saved graph must not wait for torch.
_LAZY = {
    "DifferenceTarget": "circuits.targets",
    "FeatureTarget": "circuits.targets",
    "TokenTarget": "circuits.targets",
    "trace": "circuits.tracing",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'circuits' has no attribute {name!r}")
