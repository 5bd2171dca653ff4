"""Global circuits of hand-built networks are their true wiring; weights that never carry anything are not among them.

The truth is what the program of each network says of every prompt, run in plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from models import BUILDERS, GroundTruth
from program import run
from recovery import auroc
from superposed import superposed_two_hop

from circuits import NodeKind, global_circuits
from replacement import ReplacementModel
from replacement.crosscoder.sites import Site

SIZES = {"two-hop": {"n_families": 3}, "and-or": {"pairs": 4}}
PROMPTS = 60


@dataclass
class Weights:
    """True, global and virtual weights `[F, F]`, by target and source, and which pairs could be an edge."""

    true: np.ndarray
    found: np.ndarray
    virtual: np.ndarray
    is_candidate: np.ndarray

    @property
    def is_edge(self) -> np.ndarray:
        return (self.true != 0)[self.is_candidate]

    def auroc(self, weights: np.ndarray) -> float:
        return auroc(np.abs(weights[self.is_candidate]), self.is_edge)


def weights_of(truth: GroundTruth) -> Weights:
    model, n = ReplacementModel(truth.language_model, truth.crosscoder), truth.crosscoder.n_features
    prompts, F = truth.prompts[:PROMPTS], truth.crosscoder.n_groups * n
    found = global_circuits(model, [torch.tensor(prompt) for prompt in prompts])
    effect, true, virtual = (np.zeros((F, F)) for _ in range(3))
    effect[found.target, found.source] = found.effect
    firings = np.zeros(F)
    for prompt in prompts:
        program = run(truth.program, prompt)
        for node in program.activations:
            firings[node.layer * n + node.index] += 1
        for (source, target), weight in program.edges.items():
            if source.kind == target.kind == NodeKind.FEATURE:
                true[target.layer * n + target.index, source.layer * n + source.index] += weight
    np.testing.assert_array_equal(found.features["firings"], firings)
    crosscoder = truth.crosscoder
    for layer in range(crosscoder.n_groups):
        reads_FD = crosscoder.encoder(layer, Site(layer, "resid_mid")).detach().double()
        for below in range(layer):
            sites = [site for site in crosscoder.wiring.writes[below] if site.layer < layer]
            writes_FD = sum(crosscoder.decoder(below, site).detach().double() for site in sites)
            virtual[layer * n : (layer + 1) * n, below * n : (below + 1) * n] = reads_FD @ writes_FD.T
    layer_F = np.arange(F) // n
    is_candidate = (layer_F[:, None] > layer_F) & (firings[:, None] > 0) & (firings > 0)
    return Weights(true / np.maximum(firings, 1)[:, None], effect, virtual, is_candidate)


@pytest.mark.parametrize("rotation", [None, 0])
@pytest.mark.parametrize("name", ["two-hop", "and-or"])
def test_the_true_wiring_at_its_weights(name: str, rotation: int | None) -> None:
    weights = weights_of(BUILDERS[name](rotation=rotation, **SIZES[name]))
    assert weights.is_edge.sum() >= 15
    assert (~weights.is_edge).sum() > weights.is_edge.sum()
    assert weights.auroc(weights.found) == 1.0
    np.testing.assert_allclose(weights.found, weights.true, atol=1e-5)


@pytest.mark.parametrize("name", ["token-copy", "induction"])
def test_networks_whose_features_only_talk_through_patterns_have_no_edges(name: str) -> None:
    weights = weights_of(BUILDERS[name](rotation=0))
    assert not weights.is_edge.any()
    np.testing.assert_allclose(weights.found, 0, atol=1e-5)


def test_interference_vanishes() -> None:
    """Of features that share too few dimensions inner products are large everywhere; nothing flows where both never fire."""
    weights = weights_of(superposed_two_hop())
    false = weights.is_candidate & (weights.true == 0)
    assert weights.auroc(weights.found) == 1.0
    assert weights.auroc(weights.virtual) < 0.95
    assert np.abs(weights.found[false]).max() < 1e-5
    assert np.abs(weights.virtual[false]).max() > np.median(np.abs(weights.virtual[weights.true != 0]))
    np.testing.assert_allclose(weights.found, weights.true, atol=1e-4)
