"""Attribution: the identity holds for every expanded node, and an autograd oracle agrees edge by edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from autograd_oracle import compare_with_oracle

from circuits import CircuitGraph, DifferenceTarget, FeatureTarget, NodeKind, TokenTarget, trace
from circuits.attribution.direct_effects import Transport
from circuits.attribution.targets import parse_target
from replacement import BatchTopK, JumpReLU, ReLU, ReplacementModel, Site, TopK, Wiring

IDENTITY = {torch.float32: 1e-4, torch.float64: 1e-10}
ORACLE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = [torch.float32, torch.float64]


def model_of(lm: Any, **options: Any) -> ReplacementModel:
    """A replacement model with a random crosscoder."""
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_identity_holds_for_every_expanded_target(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    graph = trace(model_of(language_model(architecture, dtype)), tiny.random_tokens(12), coverage=1.0)
    assert graph.metadata["stopped_by"] == "coverage"
    assert 0 < graph.identity_error <= IDENTITY[dtype]
    # The stored graph obeys it too, up to the float32 of its weights; and values are those of the model, not sums.
    nodes = graph.nodes
    sums = np.bincount(graph.edges.target, weights=graph.edges.weight, minlength=len(nodes)) + nodes.bias
    gap = np.abs(sums - nodes.value)[nodes.expanded]
    assert (gap <= 1e-4 * (nodes.inflow + np.abs(nodes.bias))[nodes.expanded]).all()
    assert nodes.expanded[nodes.mask(NodeKind.FEATURE)].mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_autograd_oracle_agrees(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    model = model_of(language_model(architecture, dtype))
    compare_with_oracle(model, tiny.random_tokens(), tolerance=ORACLE[dtype])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_autograd_oracle_agrees_where_embeddings_are_pushed_up(language_model: Any, architecture: str) -> None:
    """Prompts short beside D take another way through attention 0, skip connections from behind it or not."""
    lm, tokens = language_model(architecture, torch.float64), tiny.random_tokens(4)
    behind = model_of(lm, wiring=Wiring.per_layer(lm), skip=True)
    assert (Transport(behind.localize(tokens)).pushed is None) == lm.shape.parallel
    compare_with_oracle(behind, tokens, tolerance=1e-12)
    model = model_of(lm)
    assert Transport(model.localize(tokens)).pushed is not None
    assert Transport(model.localize(tiny.random_tokens(20))).pushed is None
    compare_with_oracle(model, tokens, tolerance=1e-12)


def two_reads(lm: Any) -> Wiring:
    """Every group reads the stream before and after attention."""
    layers = range(lm.shape.n_layers)
    reads = tuple((Site(layer, "resid_pre"), Site(layer, "resid_mid")) for layer in layers)
    writes = tuple(tuple(Site(later, "mlp_out") for later in layers[layer:]) for layer in layers)
    return Wiring("two reads", reads, writes, {"resid_pre": 32, "resid_mid": 32, "mlp_out": 32})


def reads_behind(lm: Any) -> Wiring:
    """A group that reads `resid_post`, the point where the next layer begins."""
    sites = tuple(Site(layer, "mlp_out") for layer in range(1, lm.shape.n_layers))
    return Wiring("reads behind", ((Site(0, "resid_post"),),), (sites,), {"resid_post": 32, "mlp_out": 32})


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize(
    "wiring",
    [
        lambda lm: Wiring.strictly_causal(lm, read="mlp_in"),
        lambda lm: Wiring.strictly_causal(lm, read="resid_pre"),
        lambda lm: Wiring.per_layer(lm),
        lambda lm: Wiring.transcoder(lm, layer=1),
        two_reads,
        reads_behind,
    ],
    ids=["mlp_in", "resid_pre", "per_layer", "one_layer", "two_reads", "reads_behind"],
)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_autograd_oracle_agrees_for_every_wiring(
    language_model: Any, architecture: str, wiring: Any, skip: bool
) -> None:
    lm = language_model(architecture, torch.float64)
    compare_with_oracle(model_of(lm, wiring=wiring(lm), skip=skip), tiny.random_tokens(), tolerance=1e-12)


@pytest.mark.parametrize(
    "options", [{"tied": True}, {"undecomposed_positions": 1}, {"activation": BatchTopK(4)}], ids=str
)
def test_autograd_oracle_agrees_for_other_crosscoders(language_model: Any, options: dict[str, Any]) -> None:
    model = model_of(language_model("neox", torch.float64), **options)
    compare_with_oracle(model, tiny.random_tokens(), tolerance=1e-12)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("read", ["resid_mid", "resid_pre", "mlp_in"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "neox"])
def test_identity_for_every_read_site_and_skip(language_model: Any, architecture: str, read: str, skip: bool) -> None:
    lm = language_model(architecture, torch.float64)
    if architecture == "neox" and read == "resid_mid":
        pytest.skip("parallel models have no resid_mid")
    wiring = Wiring.strictly_causal(lm, read=read)
    graph = trace(model_of(lm, wiring=wiring, skip=skip), tiny.random_tokens(12), coverage=1.0)
    assert 0 < graph.identity_error <= 1e-10


@pytest.mark.parametrize("activation", [ReLU(), TopK(4), JumpReLU()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("kind", ["strictly_causal", "per_layer", "transcoder", "tied"])
def test_identity_for_every_wiring_and_activation(language_model: Any, kind: str, activation: Any) -> None:
    lm = language_model("llama", torch.float64)
    wiring = Wiring.transcoder(lm, layer=1) if kind == "transcoder" else None
    wiring = Wiring.per_layer(lm) if kind == "per_layer" else wiring
    graph = trace(model_of(lm, wiring=wiring, activation=activation, tied=kind == "tied"), tiny.random_tokens())
    assert 0 < graph.identity_error <= 1e-10
    # Layers the crosscoder does not write are error nodes as a whole.
    errors = graph.nodes.layer[graph.nodes.mask(NodeKind.ERROR)]
    assert set(errors) == {0, 1, 2}


@pytest.mark.parametrize(
    "target",
    [
        5,
        "w5",
        "w5@3",
        "w5 - w9",
        TokenTarget("w7", position=4),
        DifferenceTarget(5, 6, position=-2),
        ["w5", "w6@2", 9],
        None,
    ],
    ids=str,
)
def test_targets(language_model: Any, target: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    tokens = tiny.random_tokens()
    graph = trace(model_of(lm), tokens, targets=target)
    assert 0 < graph.identity_error <= 1e-10
    logits = lm(tokens)
    nodes = graph.nodes
    mask = nodes.mask(NodeKind.LOGIT)
    for index, position, value in zip(nodes.index[mask], nodes.position[mask], nodes.value[mask], strict=True):
        row = logits[position]
        expected = row[index] - row.mean() if index >= 0 else None
        if expected is not None:
            assert value == pytest.approx(float(expected), abs=1e-9)
    assert nodes.output_weight.sum() == pytest.approx(1)
    deepest = int(nodes.position[mask].max())
    assert nodes.position[~nodes.mask(NodeKind.TOKEN)].max() <= deepest  # nothing after the target is in its circuit


def test_difference_is_the_difference_of_two_logits(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    tokens, model = tiny.random_tokens(), model_of(lm)
    graph = trace(model, tokens, targets=DifferenceTarget("w5", "w9"))
    logits = lm(tokens)[-1]
    assert graph.nodes.value[-1] == pytest.approx(float(logits[5] - logits[9]), abs=1e-9)
    assert graph.nodes.label[-1] == "w5 − w9"


def test_a_feature_as_target(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    tokens, model = tiny.random_tokens(), model_of(lm)
    active = model.localize(tokens).features.of(2)
    position, index = int(active.row[3]), int(active.index[3])
    graph = trace(model, tokens, targets=FeatureTarget(2, index, position))
    assert graph.counts()["logits"] == 0
    root = np.flatnonzero(graph.nodes.output_weight)
    assert graph.nodes.ids()[root[0]] == f"2_{index}_{position}"
    assert graph.nodes.output_weight[root] == 1
    assert graph.identity_error <= 1e-10
    same = trace(model, tokens, targets=f"feature:2/{index}@{position}")
    assert same.nodes == graph.nodes


@pytest.mark.parametrize("limits", [{"coverage": 0.0}, {"coverage": 0.5}, {"max_nodes": 1}], ids=str)
def test_feature_targets_always_have_their_row(language_model: Any, limits: dict[str, Any]) -> None:
    model, tokens = model_of(language_model("gpt2", torch.float64)), tiny.random_tokens()
    active = model.localize(tokens).features.of(2)
    named = [FeatureTarget(2, int(active.index[i]), int(active.row[i])) for i in (3, -1)]
    graph = trace(model, tokens, targets=named, **limits)
    roots = graph.nodes.output_weight > 0
    assert roots.sum() == 2
    assert graph.nodes.expanded[roots].all()


def test_groups_out_of_layer_order_are_refused(language_model: Any) -> None:
    lm = language_model("gpt2")
    sites = [(Site(layer, "resid_mid"),) for layer in (1, 0)], [(Site(layer, "mlp_out"),) for layer in (1, 0)]
    wiring = Wiring("shuffled", tuple(sites[0]), tuple(sites[1]), {"resid_mid": 32, "mlp_out": 32})
    with pytest.raises(ValueError, match=r"groups belong to the layers \[1, 0\]"):
        trace(model_of(lm, wiring=wiring), tiny.random_tokens())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Austin", TokenTarget("Austin")),
        (" Austin", TokenTarget(" Austin")),
        ("Austin@5", TokenTarget("Austin", 5)),
        ("a - b@-2", DifferenceTarget("a", "b", -2)),
        ("-", TokenTarget("-")),
        ("feature:2/345@7", FeatureTarget(2, 345, 7)),
        ("feature:2/345", FeatureTarget(2, 345, -1)),
    ],
)
def test_target_texts(text: str, expected: Any) -> None:
    assert parse_target(text) == expected


def test_coverage_bounds_the_unexpanded_share(language_model: Any) -> None:
    model, tokens = model_of(language_model("gpt2"), n_features=200, activation=TopK(40)), tiny.random_tokens(20)
    shares, expanded = [], []
    for coverage in (0.0, 0.5, 0.8, 0.95, 1.0):
        graph = trace(model, tokens, coverage=coverage)
        assert graph.metadata["unexpanded_share"] <= 1 - coverage + 1e-9
        # The stored graph says the same as the tracing loop.
        nodes = graph.nodes
        held = (graph.influence() + nodes.output_weight)[nodes.unexpanded].sum()
        assert held == pytest.approx(graph.metadata["unexpanded_share"], abs=1e-5)
        shares.append(graph.metadata["unexpanded_share"])
        expanded.append(int(nodes.expanded.sum()))
    assert shares == sorted(shares, reverse=True)
    assert expanded == sorted(expanded)
    assert expanded[0] < expanded[2] < expanded[4]


def test_max_nodes_stops_the_expansion(language_model: Any) -> None:
    model, tokens = model_of(language_model("gpt2")), tiny.random_tokens()
    graph = trace(model, tokens, coverage=1.0, max_nodes=7)
    assert graph.metadata["stopped_by"] == "max_nodes"
    assert (graph.nodes.expanded & graph.nodes.mask(NodeKind.FEATURE)).sum() == 7
    assert graph.metadata["unexpanded_share"] > 0


def test_expansion_takes_the_most_influential_first(language_model: Any) -> None:
    """With room for one feature, it is the one with the largest direct share of the logits."""
    model, tokens = model_of(language_model("gpt2", torch.float64)), tiny.random_tokens()
    graph = trace(model, tokens, targets=["w5"], coverage=1.0, max_nodes=1)
    nodes, edges = graph.nodes, graph.edges
    row = np.flatnonzero(nodes.mask(NodeKind.LOGIT))[0]
    sources, weights = (x[edges.indptr[row] : edges.indptr[row + 1]] for x in (edges.source, np.abs(edges.weight)))
    features = nodes.mask(NodeKind.FEATURE)[sources]
    assert nodes.expanded[sources[features][weights[features].argmax()]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 1.5}, "coverage: expected a share of influence between 0 and 1, given 1.5"),
        ({"coverage": float("nan")}, "coverage: expected a share of influence between 0 and 1, given nan"),
        ({"max_nodes": 0}, "max_nodes must be 1 or more, got 0"),
        ({"targets": []}, "expected at least one target"),
        ({"targets": ["w5", "w5"]}, "the same target is named twice"),
        ({"targets": ["quux"]}, "'quux' is not a single token"),
        ({"targets": [97]}, r"token id 97 lies outside \[0, 97\)"),
        ({"targets": "w5@99"}, "target position 99 lies outside the prompt of 10 tokens"),
        ({"targets": "w5 - w5"}, "a difference needs two different tokens"),
        ({"targets": " "}, "a target is empty"),
        ({"targets": FeatureTarget(9, 0)}, "the crosscoder has no features in layer 9"),
        ({"targets": FeatureTarget(1, 10**6)}, "feature 1/1000000 is not active at position 9"),
        ({"targets": True}, "cannot read target True: expected a text, a token id or one of the target types"),
        ({"targets": [5, False]}, "cannot read target False"),
        ({"targets": DifferenceTarget(True, 3)}, "expected the text of a token or its id, got True"),
        ({"targets": f"feature:2/{10**20 - 1}@7"}, f"feature 2/{10**20 - 1} is not active at position 7"),
        ({"targets": f"feature:{10**20}/3@7"}, f"the crosscoder has no features in layer {10**20}"),
        ({"targets": f"feature:2/3@{10**20}"}, f"target position {10**20} lies outside the prompt of 10 tokens"),
        ({"targets": "feature:-1/3@7"}, "expected the name of a feature such as 2/345@7 .*, got 'feature:-1/3@7'"),
        ({"targets": "feature:2/@7"}, "expected the name of a feature such as 2/345@7"),
        ({"targets": "feature:2/3@7@1"}, "expected the name of a feature such as 2/345@7"),
        ({"max_nodes": True}, "max_nodes must be a whole number, got True"),
    ],
)
def test_bad_requests(language_model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(model_of(language_model("gpt2")), tiny.random_tokens(), **options)


def test_mixed_targets_are_refused(language_model: Any) -> None:
    model, tokens = model_of(language_model("gpt2")), tiny.random_tokens()
    index = int(model.localize(tokens).features.of(1).index[-1])
    with pytest.raises(ValueError, match="all logits or all features, got both"):
        trace(model, tokens, targets=["w5", f"feature:1/{index}"])


@pytest.mark.parametrize("attention", [False, True], ids=["linear", "features"])
def test_small_edges_are_left_out_and_count_as_lost(language_model: Any, attention: bool) -> None:
    lm = language_model("llama", torch.float64)
    of_attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=of_attention)
    full = trace(model, tiny.random_tokens(), coverage=1.0, max_nodes=None)
    graph = trace(model, tiny.random_tokens(), coverage=1.0, max_nodes=None, drop_below=0.02)
    assert graph.metadata["dropped_below"] == 0.02

    def rows(traced: CircuitGraph) -> dict[str, dict[str, float]]:
        ids, edges = traced.nodes.ids(), traced.edges
        found: dict[str, dict[str, float]] = {}
        for source, target, weight in zip(edges.source, edges.target, edges.weight, strict=True):
            if abs(weight) > 0.02 * traced.nodes.inflow[target]:
                found.setdefault(ids[target], {})[ids[source]] = float(weight)
        return found

    expected, kept = rows(full), rows(graph)
    assert 0 < len(graph.edges) < len(full.edges) / 2
    assert sum(map(len, kept.values())) == len(graph.edges), "no smaller edge is stored"
    for target, row in kept.items():
        assert row == pytest.approx(expected[target], rel=1e-6)
    assert graph.scores().replacement < full.scores().replacement
    with pytest.raises(ValueError, match=r"drop_below: expected a share .* between 0 and 1, given 2.0"):
        trace(model, tiny.random_tokens(), drop_below=2.0)
