"""Attention outputs as features: the identity holds, an autograd oracle agrees, and nothing else moves between positions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from autograd_oracle import compare_with_oracle

from circuits import CircuitGraph, FeatureTarget, NodeKind, trace
from circuits.attribution import direct_effects_with_attention as transport_file
from circuits.attribution.direct_effects_with_attention import ResidualTransport
from circuits.attribution.targets import parse_target
from replacement import JumpReLU, ReplacementModel, Site, Wiring

IDENTITY = {torch.float32: 1e-4, torch.float64: 1e-10}
ORACLE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
SKIP = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


def model_of(lm: Any, *, attention: dict[str, Any] | None = None, **options: Any) -> ReplacementModel:
    """A replacement model with random crosscoders for MLP outputs and for attention outputs."""
    of_attention = tiny.crosscoder_for(lm, **{"wiring": Wiring.attention(lm), **(attention or {})})
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=of_attention)


def compare_both_parts(model: ReplacementModel, tokens: torch.Tensor, *, tolerance: float) -> None:
    """Compare with the oracle, and check that features of both parts were compared."""
    attributor = compare_with_oracle(model, tokens, tolerance=tolerance)
    assert isinstance(attributor.transport, ResidualTransport)
    chosen = np.flatnonzero(attributor.rows.expanded[attributor.columns.features])
    n_mlp = len(attributor.local.features)
    assert (chosen < n_mlp).any(), "no feature of an MLP was expanded"
    assert (chosen >= n_mlp).any(), "no feature of attention was expanded"


@EVERYWHERE
@DTYPES
def test_identity_holds_for_every_expanded_target(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    graph = trace(model_of(language_model(architecture, dtype)), tiny.random_tokens(12), coverage=1.0)
    assert graph.metadata["stopped_by"] == "coverage"
    assert 0 < graph.identity_error <= IDENTITY[dtype]
    nodes = graph.nodes
    sums = np.bincount(graph.edges.target, weights=graph.edges.weight, minlength=len(nodes)) + nodes.bias
    gap = np.abs(sums - nodes.value)[nodes.expanded]
    assert (gap <= 1e-4 * (nodes.inflow + np.abs(nodes.bias))[nodes.expanded]).all()
    assert nodes.expanded[nodes.mask(NodeKind.FEATURE) & nodes.of_attention].mean() > 0.9


@EVERYWHERE
@DTYPES
@SKIP
def test_autograd_oracle_agrees(language_model: Any, architecture: str, dtype: torch.dtype, skip: bool) -> None:
    model = model_of(language_model(architecture, dtype), skip=skip)
    compare_both_parts(model, tiny.random_tokens(6), tolerance=ORACLE[dtype])


@SKIP
@pytest.mark.parametrize("read", ["mlp_in", "resid_pre"])
@pytest.mark.parametrize("architecture", ["gemma3", "neox"])
def test_autograd_oracle_agrees_for_other_reads(language_model: Any, architecture: str, read: str, skip: bool) -> None:
    lm = language_model(architecture, torch.float64)
    model = model_of(lm, wiring=Wiring.strictly_causal(lm, read=read), skip=skip)
    compare_both_parts(model, tiny.random_tokens(8), tolerance=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"undecomposed_positions": 1},
        {"attention": {"undecomposed_positions": 2}},
        {"attention": {"activation": JumpReLU()}},
        {"attention": {"n_features": 31}, "n_features": 40},
    ],
    ids=["mlp_undecomposed", "attention_undecomposed", "jumprelu", "other_size"],
)
def test_autograd_oracle_agrees_for_other_crosscoders(language_model: Any, options: dict[str, Any]) -> None:
    model = model_of(language_model("gemma2", torch.float64), **options)
    compare_both_parts(model, tiny.random_tokens(8), tolerance=1e-12)


def test_attention_crosscoder_of_one_layer(language_model: Any) -> None:
    """Layers that no group writes are error nodes as a whole."""
    lm = language_model("llama", torch.float64)
    wiring = Wiring("one", ((Site(1, "attn_z"),),), ((Site(1, "attn_out"),),), {"attn_z": 32, "attn_out": 32})
    model, tokens = model_of(lm, attention={"wiring": wiring}), tiny.random_tokens(8)
    compare_both_parts(model, tokens, tolerance=1e-12)
    local = model.localize(tokens)
    assert local.attention is not None
    for layer in (0, 2):
        whole = lm.read(tokens[None], [Site(layer, "attn_out")])[Site(layer, "attn_out")][0]
        torch.testing.assert_close(local.attention.errors_LTD[layer], whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(0, 1)], "cannot attribute features of an attention crosscoder whose groups read attn_z of several layers"),
        ([(1,), (0,)], "cannot name features by layer: the attention crosscoder's groups belong to the layers [1, 0]"),
        ([(1,), (1,)], "cannot name features by layer: the attention crosscoder's groups belong to the layers [1, 1]"),
    ],
    ids=["two_reads", "out_of_order", "one_layer_twice"],
)
def test_other_attention_crosscoders_are_refused_by_name(
    language_model: Any, layers: list[tuple[int, ...]], message: str
) -> None:
    """They can be spliced all the same."""
    lm, tokens = language_model("llama"), tiny.random_tokens(6)
    reads = tuple(tuple(Site(layer, "attn_z") for layer in group) for group in layers)
    writes = tuple((Site(max(group), "attn_out"),) for group in layers)
    wiring = Wiring("other", reads, writes, {"attn_z": 32, "attn_out": 32})
    model = model_of(lm, attention={"wiring": wiring})
    with pytest.raises(ValueError, match=re.escape(message)):
        trace(model, tokens)
    assert model(tokens).shape == (6, tiny.VOCABULARY)


def test_undecomposed_positions_have_errors_alone(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    options = {"undecomposed_positions": 2}
    graph = trace(model_of(lm, attention=options, **options), tiny.random_tokens(), coverage=1.0)
    features, errors = (graph.nodes.mask(kind) for kind in (NodeKind.FEATURE, NodeKind.ERROR))
    assert graph.nodes.position[features].min() == 2
    assert {
        (bool(a), int(p)) for a, p in zip(graph.nodes.of_attention[errors], graph.nodes.position[errors], strict=True)
    } >= {(part, position) for part in (False, True) for position in (0, 1)}
    assert graph.identity_error <= 1e-10


@SKIP
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox"])
def test_only_features_of_attention_read_other_positions(language_model: Any, architecture: str, skip: bool) -> None:
    graph = trace(model_of(language_model(architecture), skip=skip), tiny.random_tokens(), coverage=1.0)
    nodes, edges = graph.nodes, graph.edges
    moved = nodes.position[edges.source] != nodes.position[edges.target]
    of_attention = nodes.of_attention[edges.target]
    assert not moved[~of_attention].any()
    assert (nodes.position[edges.source] <= nodes.position[edges.target]).all()
    assert moved[of_attention].any()
    # An attention feature of layer l reads what layers below l wrote, in either part.
    layers = nodes.layer[edges.source]
    errors = nodes.mask(NodeKind.ERROR)[edges.source]
    assert (layers[of_attention] < nodes.layer[edges.target][of_attention]).all()
    assert errors.any()


def some_attention_feature(model: ReplacementModel, tokens: torch.Tensor) -> tuple[int, int, int]:
    """Layer, index and position of one that is active."""
    local = model.localize(tokens)
    assert local.attention is not None
    active = local.attention.features.of(1)
    return 1, int(active.index[12]), int(active.row[12])


def test_a_feature_of_attention_as_target(language_model: Any) -> None:
    model, tokens = model_of(language_model("gpt2", torch.float64)), tiny.random_tokens()
    layer, index, position = some_attention_feature(model, tokens)
    graph = trace(model, tokens, targets=f"attention:{layer}/{index}@{position}", coverage=1.0)
    (root,) = np.flatnonzero(graph.nodes.output_weight)
    assert graph.nodes.ids()[root] == f"A{layer}_{index}_{position}"
    assert graph.counts()["logits"] == 0
    assert graph.identity_error <= 1e-10
    assert graph.metadata["targets"] == [
        {"token": f"attention:{layer}/{index}", "position": position, "probability": 0.0}
    ]
    same = trace(model, tokens, targets=FeatureTarget(layer, index, position, part="attention"), coverage=1.0)
    assert same.nodes == graph.nodes
    z = Site(layer, "attn_z")
    assert model.attention_crosscoder is not None
    inputs = {z: model.language_model.read(tokens[None], [z])[z][0].flatten(1)}
    pre_BF = model.attention_crosscoder.pre_activations(inputs, layer)
    assert graph.nodes.value[root] == pytest.approx(float(pre_BF[position, index]), rel=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attention:1/23@5", FeatureTarget(1, 23, 5, part="attention")),
        ("attention:1/23", FeatureTarget(1, 23, -1, part="attention")),
        ("feature:1/23@5", FeatureTarget(1, 23, 5)),
    ],
)
def test_target_texts(text: str, expected: FeatureTarget) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("attention:9/0", "the crosscoder has no features in layer 9"),
        ("attention:1/1000000@3", "attention feature 1/1000000 is not active at position 3"),
        ("attention:1/0@99", "target position 99 lies outside the prompt of 10 tokens"),
    ],
)
def test_bad_targets(language_model: Any, target: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trace(model_of(language_model("gpt2")), tiny.random_tokens(), targets=target)


def test_features_of_attention_need_their_crosscoder(language_model: Any) -> None:
    lm = language_model("gpt2")
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    with pytest.raises(ValueError, match="no attention features: load the model with an attention crosscoder"):
        trace(model, tiny.random_tokens(), targets="attention:1/3")


def test_chunks_do_not_matter(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(language_model("gemma2", torch.float64), skip=True), tiny.random_tokens()

    def traced() -> CircuitGraph:
        return trace(model, tokens, coverage=1.0)

    whole = traced()
    monkeypatch.setattr(transport_file, "NUMBERS_AT_ONCE", 3 * len(tokens) * 32)
    parts = traced()
    assert parts.nodes.ids() == whole.nodes.ids()
    np.testing.assert_array_equal(parts.edges.source, whole.edges.source)
    np.testing.assert_allclose(parts.edges.weight, whole.edges.weight, rtol=1e-6, atol=1e-9)


def test_metadata_names_both_crosscoders(language_model: Any) -> None:
    graph = trace(model_of(language_model("gpt2")), tiny.random_tokens(5))
    assert graph.metadata["attention"] == "attention, 3 x 48 features, TopK"
    assert graph.metadata["crosscoder"] == "strictly_causal, 3 x 48 features, TopK"
