"""What must not change a graph: linear combinations of targets, the numbering of features, a feature written as two halves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from circuits import CircuitGraph, NodeKind, trace
from circuits.attribution.direct_effects import Transport
from circuits.attribution.direct_effects_with_attention import ResidualTransport
from circuits.attribution.readers import Targets
from replacement import Crosscoder, ReLU, ReplacementModel, Wiring

TOKENS = tiny.random_tokens(9)


def rebuilt(crosscoder: Crosscoder, choice_F: Tensor, decoder_scale_F: Tensor) -> Crosscoder:
    """The crosscoder whose feature i is feature `choice[i]` of another, with its decoder scaled."""
    made = Crosscoder.like(crosscoder, n_features=len(choice_F))
    tensors = {}
    for name, value in crosscoder.state_dict().items():
        if name.startswith("b_dec"):
            tensors[name] = value
        else:
            scale = decoder_scale_F.view(-1, *[1] * (value.ndim - 1)) if name.startswith("W_dec") else 1.0
            tensors[name] = value[choice_F] * scale
    made.load_state_dict(tensors)
    return made


def by_name(graph: CircuitGraph, rename: dict[int, int] | None = None) -> dict[tuple[Any, ...], float]:
    """Edges by the names of their ends, features of every layer renumbered."""
    nodes = graph.nodes
    names = []
    for kind, layer, position, index in zip(nodes.kind, nodes.layer, nodes.position, nodes.index, strict=True):
        number = (rename or {}).get(int(index), int(index)) if kind == NodeKind.FEATURE else int(index)
        names.append((int(kind), int(layer), int(position), number))
    ends = zip(graph.edges.target.tolist(), graph.edges.source.tolist(), graph.edges.weight.tolist(), strict=True)
    return {(names[target], names[source]): weight for target, source, weight in ends}


@pytest.mark.parametrize("attention", [False, True], ids=["linear", "features"])
def test_transport_is_linear_in_its_targets(language_model: Any, attention: bool) -> None:
    lm = language_model("llama", torch.float64)
    second = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, skip=True), attention_crosscoder=second)
    local = model.localize(TOKENS)
    transport = (ResidualTransport if attention else Transport)(local)
    generator = torch.Generator().manual_seed(0)
    v_ND, w_ND = (torch.randn(6, lm.shape.d_model, generator=generator, dtype=torch.float64) for _ in range(2))
    depth_N, position_N = torch.tensor([0, 1, 2, 3, 5, 6]), torch.tensor([8, 3, 0, 7, 5, 8])
    (v_effects, v_bias), (w_effects, w_bias), (effects, bias) = (
        transport.attribute(Targets(vectors, depth_N, position_N)) for vectors in (v_ND, w_ND, 2.5 * v_ND - 0.75 * w_ND)
    )
    torch.testing.assert_close(effects, 2.5 * v_effects - 0.75 * w_effects, rtol=0, atol=1e-11)
    torch.testing.assert_close(bias, 2.5 * v_bias - 0.75 * w_bias, rtol=0, atol=1e-11)
    assert float(effects.abs().max()) > 1e-2


def test_the_numbering_of_features_changes_nothing_but_names(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, activation=ReLU())
    choice_F = torch.randperm(crosscoder.n_features, generator=torch.Generator().manual_seed(1))
    shuffled = rebuilt(crosscoder, choice_F, torch.ones(len(choice_F), dtype=torch.float64))
    before, after = (trace(ReplacementModel(lm, given), TOKENS, coverage=1.0) for given in (crosscoder, shuffled))
    expected, edges = by_name(before), by_name(after, rename=dict(enumerate(choice_F.tolist())))
    assert edges.keys() == expected.keys()
    for ends, weight in expected.items():
        assert edges[ends] == pytest.approx(weight, rel=1e-5, abs=1e-6)  # graphs hold float32
    assert after.scores().replacement == pytest.approx(before.scores().replacement, rel=1e-9)
    assert after.scores().completeness == pytest.approx(before.scores().completeness, rel=1e-9)


def test_two_halves_of_a_feature_together_are_the_feature(language_model: Any) -> None:
    """Every layer's feature 7 becomes two with the same encoder and half the decoder each."""
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, activation=ReLU())
    F = crosscoder.n_features
    scale_F = torch.ones(F + 1, dtype=torch.float64)
    scale_F[7] = scale_F[F] = 0.5
    halved = rebuilt(crosscoder, torch.tensor([*range(F), 7]), scale_F)
    models = [ReplacementModel(lm, given) for given in (crosscoder, halved)]
    torch.testing.assert_close(models[1](TOKENS), models[0](TOKENS), rtol=0, atol=1e-11)
    before, after = (trace(model, TOKENS, coverage=1.0) for model in models)
    assert after.scores().replacement == pytest.approx(before.scores().replacement, rel=1e-6)
    assert after.scores().completeness == pytest.approx(before.scores().completeness, rel=1e-6)
    whole, halves = (feature_influence(graph, (7, F)) for graph in (before, after))
    assert halves == pytest.approx(whole, rel=1e-6)
    assert whole > 1e-3
    assert feature_influence(after, (F,)) == pytest.approx(feature_influence(after, (7,)), rel=1e-6)


def feature_influence(graph: CircuitGraph, indices: tuple[int, ...]) -> float:
    """Summed influence of the features with these indices, over layers and positions."""
    nodes = graph.nodes
    chosen = nodes.mask(NodeKind.FEATURE) & np.isin(nodes.index, indices)
    return float(graph.influence()[chosen].sum())
