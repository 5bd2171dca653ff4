"""Circuits: what caused what, from tokens to logits, in a replacement model.

>>> import circuits, replacement
>>> graph = circuits.trace(replacement.load("demo"), "the capital of the state containing Dallas is")
>>> circuit = graph.prune()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits.attribution.estimate import Estimate
    from circuits.attribution.labels import with_labels
    from circuits.attribution.targets import DifferenceTarget, FeatureTarget, TokenTarget
    from circuits.attribution.trace import trace
    from circuits.explain.consensus import consensus
    from circuits.explain.difference import difference
    from circuits.explain.global_circuits import GlobalCircuits
    from circuits.explain.global_pass import global_circuits
    from circuits.explain.statistics import graph_statistics
    from circuits.explain.story import explain_graph
    from circuits.graph.circuit_graph import CircuitGraph
    from circuits.graph.graph_files import GraphFiles
    from circuits.graph.nodes import NodeKind, NodeTable
    from circuits.graph.scores import Scores
    from circuits.heads.edge_split import split_heads, with_heads
    from circuits.heads.feature_heads import HeadView, head_view
    from circuits.heads.heat_map import plot_heads
    from circuits.heads.node_credit import source_credit
    from circuits.heads.qk_attribution import QKAttributor, attribute_score
    from circuits.heads.qk_result import QKAttribution
    from circuits.many_prompts import PromptLine, read_prompts, trace_many
    from circuits.trace_options import TraceOptions

__all__ = [
    "CircuitGraph",
    "DifferenceTarget",
    "Estimate",
    "FeatureTarget",
    "GlobalCircuits",
    "GraphFiles",
    "HeadView",
    "NodeKind",
    "NodeTable",
    "PromptLine",
    "QKAttribution",
    "QKAttributor",
    "Scores",
    "TokenTarget",
    "TraceOptions",
    "attribute_score",
    "consensus",
    "difference",
    "explain_graph",
    "global_circuits",
    "graph_statistics",
    "head_view",
    "plot_heads",
    "read_prompts",
    "source_credit",
    "split_heads",
    "trace",
    "trace_many",
    "with_heads",
    "with_labels",
]

# Imported on first use: a command that is interrupted must not be importing yet, and a saved graph needs no torch.
_LAZY = {
    "CircuitGraph": "circuits.graph.circuit_graph",
    "DifferenceTarget": "circuits.attribution.targets",
    "Estimate": "circuits.attribution.estimate",
    "FeatureTarget": "circuits.attribution.targets",
    "GlobalCircuits": "circuits.explain.global_circuits",
    "GraphFiles": "circuits.graph.graph_files",
    "HeadView": "circuits.heads.feature_heads",
    "NodeKind": "circuits.graph.nodes",
    "NodeTable": "circuits.graph.nodes",
    "PromptLine": "circuits.many_prompts",
    "QKAttribution": "circuits.heads.qk_result",
    "QKAttributor": "circuits.heads.qk_attribution",
    "Scores": "circuits.graph.scores",
    "TokenTarget": "circuits.attribution.targets",
    "TraceOptions": "circuits.trace_options",
    "attribute_score": "circuits.heads.qk_attribution",
    "consensus": "circuits.explain.consensus",
    "difference": "circuits.explain.difference",
    "explain_graph": "circuits.explain.story",
    "global_circuits": "circuits.explain.global_pass",
    "graph_statistics": "circuits.explain.statistics",
    "head_view": "circuits.heads.feature_heads",
    "plot_heads": "circuits.heads.heat_map",
    "read_prompts": "circuits.many_prompts",
    "source_credit": "circuits.heads.node_credit",
    "split_heads": "circuits.heads.edge_split",
    "trace": "circuits.attribution.trace",
    "trace_many": "circuits.many_prompts",
    "with_heads": "circuits.heads.edge_split",
    "with_labels": "circuits.attribution.labels",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        importlib.import_module("circuits.export")  # graphs find their exporters, however they were made
        importlib.import_module("circuits.viewer")
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'circuits' has no attribute {name!r}")
