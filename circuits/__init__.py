"""Circuits: what caused what, from tokens to logits, in a replacement model."""

from circuits.graph import CircuitGraph
from circuits.nodes import NodeKind, NodeTable
from circuits.scores import Scores

__all__ = ["CircuitGraph", "NodeKind", "NodeTable", "Scores"]
