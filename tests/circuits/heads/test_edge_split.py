"""Edges split by heads: every split sums to its edge, and dense matrices of raw weights give the same parts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from path_oracle import PathOracle

import circuits.heads.edge_split
from circuits import CircuitGraph, DifferenceTarget, NodeKind, TokenTarget, trace
from circuits.attribution.identity import IdentityError
from circuits.graph.text import full_name
from circuits.heads.edge_split import HeadSplit, chain_weights, split_heads, with_heads
from circuits.heads.writes_and_reads import SourceWrites
from replacement import JumpReLU, LanguageModel, ReplacementModel, Site, TopK, Wiring
from replacement.splicing.skip import SkipTerms

HOPS = pytest.mark.parametrize("hop", ["last", "first"])
SKIP = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
FLOAT64 = 1e-7
"""Largest `sum_error` in float64: the rounding of the graph's weights, which are float32."""
FLOAT32 = 5e-5
"""The same in float32."""


def model_of(lm: Any, *, attention: bool = False, **options: Any) -> ReplacementModel:
    """A replacement model with a random crosscoder, and one of attention if asked for."""
    of_attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=of_attention)


def traced(model: ReplacementModel, *, n_tokens: int = 8, **options: Any) -> CircuitGraph:
    """A whole graph of a random prompt."""
    return trace(model, tiny.random_tokens(n_tokens), **{"coverage": 1.0, **options})


def two_reads(lm: Any) -> Wiring:
    """Every group reads the stream before and after attention, so that a feature is several targets."""
    layers = range(lm.shape.n_layers)
    reads = tuple((Site(layer, "resid_pre"), Site(layer, "resid_mid")) for layer in layers)
    writes = tuple(tuple(Site(later, "mlp_out") for later in layers[layer:]) for layer in layers)
    return Wiring("two reads", reads, writes, {"resid_pre": 32, "resid_mid": 32, "mlp_out": 32})


def assert_split(found: HeadSplit, direct_E: np.ndarray, heads_ELH: np.ndarray, *, tolerance: float = 1e-11) -> None:
    """Equal to the oracle's, relative to the largest part."""
    scale = max(np.abs(direct_E).max(), np.abs(heads_ELH).max())
    np.testing.assert_allclose(found.direct_E, direct_E, rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(found.heads_ELH, heads_ELH, rtol=0, atol=tolerance * scale)


def assert_same_split(found: HeadSplit, expected: HeadSplit, *, tolerance: float = 1e-11) -> None:
    """Two ways to the same parts."""
    assert_split(found, expected.direct_E, expected.heads_ELH, tolerance=tolerance)


@SKIP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_edge_is_the_sum_of_its_parts(
    language_model: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype, skip: bool
) -> None:
    model = model_of(language_model(architecture, dtype), skip=skip)
    graph = traced(model, n_tokens=6)
    run_once(monkeypatch, model, graph)
    for hop in ("last", "first"):
        split = split_heads(model, graph, hop=hop)
        assert split.heads_ELH.shape == (len(graph.edges), model.language_model.shape.n_layers, 4)
        heads_ELH = split.heads_ELH.astype(np.float64)
        gap = np.abs(split.direct_E + heads_ELH.sum((1, 2)) - graph.edges.weight)
        parts = np.abs(split.direct_E) + np.abs(heads_ELH).sum((1, 2)) + graph.nodes.inflow[graph.edges.target]
        relative = gap / np.maximum(np.abs(graph.edges.weight), 0.01 * parts)
        assert split.sum_error == pytest.approx(relative.max())
        assert split.sum_error <= (FLOAT32 if dtype == torch.float32 else FLOAT64)
        assert np.quantile(relative, 0.999) <= 1e-4
        assert split_heads(model, graph.prune(), hop=hop).sum_error <= 1e-4, "every kept edge"
        assert (gap <= 1e-6 * graph.nodes.inflow[graph.edges.target]).all()
        moved = graph.nodes.position[graph.edges.source] != graph.nodes.position[graph.edges.target]
        assert not split.direct_E[moved].any(), "nothing moves between positions but through heads"
        assert np.abs(split.heads_ELH[moved]).sum(2).any(0).all(), "every layer moves something"


RAW = {
    "native": ("native", {}),
    "native-skip": ("native", {"skip": True}),
    "gemma2": ("gemma2", {}),
    "gemma2-mlp_in-skip": ("gemma2", {"read": "mlp_in", "skip": True}),
    "neox-skip": ("neox", {"read": "resid_pre", "skip": True}),
    "llama-two_reads-skip": ("llama", {"read": "two", "skip": True}),
}


RawCase = Callable[[str], tuple[ReplacementModel, CircuitGraph]]


@pytest.fixture(scope="module")
def raw_case(language_model: Any) -> RawCase:
    """`raw_case(name)`: a small float64 model and a whole graph of a short prompt, made once."""

    @functools.cache
    def make(case: str) -> tuple[ReplacementModel, CircuitGraph]:
        architecture, options = RAW[case]
        lm = language_model(architecture, torch.float64)
        read = options.get("read")
        wiring = two_reads(lm) if read == "two" else Wiring.strictly_causal(lm, read=read)
        model = model_of(lm, wiring=wiring, n_features=24, skip=options.get("skip", False))
        return model, traced(model, n_tokens=4)

    return make


def run_once(monkeypatch: pytest.MonkeyPatch, model: ReplacementModel, graph: CircuitGraph) -> None:
    """Let the splits of a graph share one run of its prompt: a test of all chains would run it a hundred times."""
    with torch.no_grad():
        local = model.localize(torch.tensor(graph.metadata["token_ids"]))
    monkeypatch.setattr(model, "localize", lambda _: local)


@pytest.mark.parametrize("case", RAW)
def test_dense_matrices_of_raw_weights_agree(raw_case: RawCase, case: str) -> None:
    """Both hops, from all chains of heads: 25 of them in two layers, 125 in three."""
    model, graph = raw_case(case)
    oracle = PathOracle(model, graph)
    for hop in ("last", "first"):
        assert_split(split_heads(model, graph, hop=hop), *oracle.split(hop))


@pytest.mark.parametrize("case", RAW)
def test_chains_agree_with_raw_weights(raw_case: RawCase, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    model, graph = raw_case(case)
    oracle = PathOracle(model, graph)
    run_once(monkeypatch, model, graph)
    chains = [chain for chain in oracle.chains() if chain]
    scale = float(np.abs(graph.edges.weight).max())
    for chain in chains if case == "native" else chains[:: len(chains) // 12]:
        np.testing.assert_allclose(chain_weights(model, graph, chain), oracle.chain(chain), rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("case", ["native-skip", "gemma2"])
def test_all_chains_sum_to_the_edge_and_to_each_hop(
    raw_case: RawCase, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model, graph = raw_case(case)
    graph = graph.prune()
    run_once(monkeypatch, model, graph)
    last, first = (split_heads(model, graph, hop=hop) for hop in ("last", "first"))
    by_last, by_first = np.zeros_like(last.heads_ELH), np.zeros_like(last.heads_ELH)
    for chain in PathOracle(model, graph).chains():
        if chain:
            weight_E = chain_weights(model, graph, chain)
            by_last[:, *chain[-1]] += weight_E
            by_first[:, *chain[0]] += weight_E
    assert_split(last, last.direct_E, by_last)
    assert_split(first, last.direct_E, by_first)
    weight_E = last.direct_E + by_last.sum((1, 2))
    np.testing.assert_allclose(weight_E, graph.edges.weight, rtol=1e-6, atol=1e-8)


def test_a_head_without_output_weights_carries_nothing() -> None:
    """With one head's W_O zero its parts are zero, and with all others zero too it is the only one that carries."""
    for kept in ([0, 1, 3], [2]):
        lm = tiny.native_model(torch.float64)
        silent = [head for head in range(4) if head not in kept]
        attention = lm.parts.bridge.blocks[1].attn
        with torch.no_grad():
            attention.W_O[silent] = 0  # a view of the module's own weights
        assert not attention.W_O[silent].any()
        model = model_of(lm)
        graph = traced(model)
        for hop in ("last", "first"):
            split = split_heads(model, graph, hop=hop)
            assert split.sum_error <= FLOAT64
            assert not split.heads_ELH[:, 1, silent].any()
            assert split.heads_ELH[:, 1, kept].any(0).all()
        for chain in ([(1, silent[0])], [(0, 1), (1, silent[0])]):
            assert not chain_weights(model, graph, chain).any()


@HOPS
@SKIP
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_several_reads_of_one_feature(language_model: Any, architecture: str, skip: bool, hop: str) -> None:
    lm = language_model(architecture, torch.float64)
    model = model_of(lm, wiring=two_reads(lm), skip=skip)
    assert split_heads(model, traced(model), hop=hop).sum_error <= FLOAT64


@pytest.mark.parametrize(
    "targets",
    [
        ["w5", "w6@2", 9],
        DifferenceTarget(5, 9, 4),
        [DifferenceTarget(5, 9), DifferenceTarget(9, 5), DifferenceTarget(6, 7, 3), TokenTarget(5)],
        "feature",
    ],
    ids=["tokens", "difference", "differences", "feature"],
)
def test_every_kind_of_target(language_model: Any, targets: Any) -> None:
    model = model_of(language_model("gemma3", torch.float64))
    if targets == "feature":
        active = model.localize(tiny.random_tokens(8)).features.of(2)
        targets = [f"feature:2/{int(active.index[i])}@{int(active.row[i])}" for i in (20, -1)]
    graph = traced(model, targets=targets)
    last, first = (split_heads(model, graph, hop=hop) for hop in ("last", "first"))
    assert last.sum_error <= FLOAT64
    assert first.sum_error <= FLOAT64
    into_targets = np.isin(graph.edges.target, np.flatnonzero(graph.nodes.is_target))
    assert np.abs(last.heads_ELH[into_targets]).sum((0, 2)).all()
    np.testing.assert_array_equal(last.direct_E, first.direct_E)


def test_differences_agree_with_raw_weights(language_model: Any) -> None:
    model = model_of(language_model("native", torch.float64), n_features=24)
    graph = traced(model, n_tokens=4, targets=[DifferenceTarget(5, 9), DifferenceTarget(6, 7, 2), TokenTarget(5)])
    assert_split(split_heads(model, graph), *PathOracle(model, graph).split("last"))


@HOPS
def test_the_parts_of_a_pruned_graph_are_those_of_the_whole(language_model: Any, hop: str) -> None:
    model = model_of(language_model("gemma2", torch.float64), skip=True)
    whole = traced(model)
    pruned = whole.prune(nodes=0.6, edges=0.9)
    assert 0 < len(pruned.edges) < len(whole.edges) / 2
    place = {
        pair: edge
        for edge, pair in enumerate(
            zip(*(np.array(whole.nodes.ids())[end] for end in (whole.edges.target, whole.edges.source)), strict=True)
        )
    }
    ids = np.array(pruned.nodes.ids())
    rows = [place[pair] for pair in zip(ids[pruned.edges.target], ids[pruned.edges.source], strict=True)]
    all_parts = split_heads(model, whole, hop=hop)
    assert_split(split_heads(model, pruned, hop=hop), all_parts.direct_E[rows], all_parts.heads_ELH[rows])


@HOPS
@pytest.mark.parametrize(
    "options",
    [{"undecomposed_positions": 1}, {"activation": JumpReLU(), "tied": True}, {"activation": TopK(30, relu=False)}],
    ids=str,
)
def test_other_crosscoders(language_model: Any, options: dict[str, Any], hop: str) -> None:
    model = model_of(language_model("qwen3", torch.float64), **options)
    graph = traced(model)
    if "undecomposed_positions" in options:
        assert graph.nodes.position[graph.nodes.mask(NodeKind.FEATURE)].min() == 1
    assert split_heads(model, graph, hop=hop).sum_error <= FLOAT64


@HOPS
@pytest.mark.parametrize("rows", [1, 20])
def test_chunks_do_not_matter(language_model: Any, monkeypatch: pytest.MonkeyPatch, hop: str, rows: int) -> None:
    model = model_of(language_model("gemma2", torch.float64), skip=True)
    graph = traced(model, n_tokens=6).prune()
    chain = [(0, 1), (2, 3)]
    whole, whole_chain_E = split_heads(model, graph, hop=hop), chain_weights(model, graph, chain)
    monkeypatch.setattr(circuits.heads.edge_split, "rows_per_chunk", lambda _: rows)
    assert_same_split(split_heads(model, graph, hop=hop), whole)
    chain_E = chain_weights(model, graph, chain)
    np.testing.assert_allclose(chain_E, whole_chain_E, rtol=0, atol=1e-11 * np.abs(whole_chain_E).max())


@pytest.mark.parametrize(("architecture", "skip"), [*itertools.product(tiny.ARCHITECTURES, [True]), ("gemma2", False)])
def test_features_of_attention_split_by_the_heads_they_read(language_model: Any, architecture: str, skip: bool) -> None:
    model = model_of(language_model(architecture, torch.float64), attention=True, skip=skip, n_features=24)
    graph = traced(model, n_tokens=4)
    split = split_heads(model, graph)
    assert split.sum_error <= FLOAT64
    oracle, nodes = PathOracle(model, graph), graph.nodes
    streams = oracle.streams(())
    heads_ELH = np.zeros_like(split.heads_ELH)
    direct_E = oracle.on(())
    for target in oracle.targets[nodes.of_attention[oracle.targets]].tolist():
        edges = np.flatnonzero(graph.edges.target == target)
        heads_SH = oracle.read_heads(target, streams).numpy()
        heads_ELH[edges, nodes.layer[target]] = heads_SH[oracle.source_E[edges]]
        direct_E[edges] = 0
    assert_split(split, direct_E, heads_ELH)
    assert_same_split(split_heads(model, graph, hop="first"), split, tolerance=0)


def test_a_feature_of_attention_as_target(language_model: Any) -> None:
    model = model_of(language_model("gpt2", torch.float64), attention=True)
    local = model.localize(tiny.random_tokens(8))
    assert local.attention is not None
    active = local.attention.features.of(2)
    graph = traced(model, targets=f"attention:2/{int(active.index[-1])}@{int(active.row[-1])}")
    split = split_heads(model, graph.prune())
    assert split.sum_error <= FLOAT64
    assert split.heads_ELH[:, 2].any()


def test_a_graph_carries_its_heads(language_model: Any, tmp_path: Any) -> None:
    model = model_of(language_model("gpt2"))
    graph = traced(model)
    named = with_heads(model, graph)
    assert named.heads is not None
    assert named.metadata["heads"]["hop"] == "last"
    assert named.metadata["heads"]["sum_error"] == split_heads(model, graph).sum_error <= FLOAT32
    assert (named.nodes, named.edges) == (graph.nodes, graph.edges)
    assert graph.heads is None
    scale = np.abs(graph.edges.weight).max()
    np.testing.assert_allclose(named.heads.totals(), graph.edges.weight, rtol=1e-4, atol=1e-6 * scale)
    assert CircuitGraph.load(named.save(tmp_path / "graph.safetensors")) == named
    pruned = named.prune()
    assert pruned.heads is not None
    assert pruned.heads == heads_of_pairs(named, pruned)
    assert CircuitGraph.load(pruned.save(tmp_path / "pruned.safetensors")) == pruned
    assert pruned.prune(nodes=1.0, edges=1.0).heads == pruned.heads


def heads_of_pairs(whole: CircuitGraph, part: CircuitGraph) -> Any:
    """Heads of the edges that both graphs have, found by the names of their ends."""
    assert whole.heads is not None
    names = [np.array(graph.nodes.ids()) for graph in (whole, part)]
    kept = set(zip(names[1][part.edges.target], names[1][part.edges.source], strict=True))
    pairs = zip(names[0][whole.edges.target], names[0][whole.edges.source], strict=True)
    return whole.heads.select(np.array([pair in kept for pair in pairs]))


def test_a_graph_without_edges(language_model: Any) -> None:
    model = model_of(language_model("native"))
    graph = traced(model).prune(nodes=0.0, edges=0.0)
    assert len(graph.edges) == 0
    for hop in ("last", "first"):
        assert split_heads(model, graph, hop=hop).sum_error == 0
    assert chain_weights(model, graph, [(0, 1)]).shape == (0,)
    assert len(with_heads(model, graph).heads or ()) == 0


@pytest.mark.parametrize("layer", [0, 1])
def test_a_push_that_forgets_a_layer_is_refused(
    language_model: Any, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """Its heads write nothing: the edges they carry no longer sum to their weights."""
    model = model_of(language_model("gpt2"))
    graph = traced(model)
    carry_up = SourceWrites.carry_up

    def forget(*arguments: Any) -> Iterator[tuple[int, torch.Tensor]]:
        for at, mixed_NTX in carry_up(*arguments):
            yield at, mixed_NTX * (at != layer)

    monkeypatch.setattr(SourceWrites, "carry_up", forget)
    with pytest.raises(
        IdentityError, match=r"the parts of edge .+ -> .+ \(last hop\) sum to .+, but its value is"
    ) as error:
        with_heads(model, graph)
    assert np.abs(graph.edges.weight - error.value.expected).min() < 1e-6
    assert split_heads(model, graph, hop="first").sum_error <= FLOAT32


def test_a_pull_that_forgets_skip_connections_is_refused(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(language_model("llama", torch.float64), skip=True)
    graph = traced(model)
    monkeypatch.setattr(SkipTerms, "pull_back", lambda *_: iter(()))
    for hop in ("last", "first"):
        with pytest.raises(IdentityError, match=rf"edge .+ \({hop} hop\)"):
            split_heads(model, graph, hop=hop)


def test_a_graph_whose_weight_was_changed_is_refused(language_model: Any) -> None:
    model = model_of(language_model("gpt2"))
    graph = traced(model).prune(nodes=0.5, edges=0.5)
    weight_E = graph.edges.weight.copy()
    weight_E[3] *= 0.99
    edges = dataclasses.replace(graph.edges, weight=weight_E)
    source, target = (full_name(graph.nodes, int(end[3])) for end in (edges.source, edges.target))
    with pytest.raises(IdentityError, match=re.escape(f"edge {source} -> {target}")) as error:
        split_heads(model, dataclasses.replace(graph, edges=edges))
    assert error.value.expected == pytest.approx(weight_E[3], rel=1e-6)
    assert error.value.found == pytest.approx(graph.edges.weight[3], rel=1e-4)


def test_another_hop_is_refused(language_model: Any) -> None:
    model = model_of(language_model("native"))
    with pytest.raises(ValueError, match="hop must be 'last' or 'first', got 'middle'"):
        split_heads(model, traced(model), hop="middle")


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([], "expected (layer, head) pairs in rising layers, at least one; got []"),
        ([(1, 0), (0, 0)], "expected (layer, head) pairs in rising layers, at least one; got [(1, 0), (0, 0)]"),
        ([(1, 0), (1, 1)], "expected (layer, head) pairs in rising layers, at least one; got [(1, 0), (1, 1)]"),
        ([(2, 0)], "there is no head 2.0: 2 layers of 4 heads"),
        ([(0, 0), (1, 4)], "there is no head 1.4: 2 layers of 4 heads"),
        ([(-1, 0)], "there is no head -1.0: 2 layers of 4 heads"),
        ([(0, -1)], "there is no head 0.-1: 2 layers of 4 heads"),
    ],
)
def test_bad_chains_are_named(language_model: Any, chain: list[tuple[int, int]], message: str) -> None:
    model = model_of(language_model("native"))
    with pytest.raises(ValueError, match=re.escape(message)):
        chain_weights(model, traced(model), chain)


def test_chains_end_at_features_of_attention(language_model: Any) -> None:
    model = model_of(language_model("native"), attention=True)
    with pytest.raises(ValueError, match="an edge goes through one head at most: use split_heads"):
        chain_weights(model, traced(model), [(0, 0)])


def changed(graph: CircuitGraph, **facts: Any) -> CircuitGraph:
    """The graph with other metadata; None takes a fact away."""
    metadata = {name: fact for name, fact in {**graph.metadata, **facts}.items() if fact is not None}
    return dataclasses.replace(graph, metadata=metadata)


@pytest.mark.parametrize("fact", ["token_ids", "model_fingerprint"])
def test_hand_made_graphs_are_refused(language_model: Any, fact: str) -> None:
    model = model_of(language_model("native"))
    graph = changed(traced(model), **{fact: None})
    for split in (split_heads, with_heads):
        with pytest.raises(
            ValueError, match=r"does not name its model and tokens: expected one made by circuits\.trace"
        ):
            split(model, graph)


def test_a_graph_of_another_model_is_refused(language_model: Any) -> None:
    graph = traced(model_of(language_model("native")))
    other: LanguageModel = language_model("llama")
    with pytest.raises(
        ValueError, match=f"was traced in tiny-native, whose weights are not those of {re.escape(other.name)}"
    ):
        split_heads(model_of(other), graph)


def test_a_graph_of_another_crosscoder_is_refused(language_model: Any) -> None:
    lm = language_model("native")
    graph = traced(model_of(lm, n_features=64))
    with pytest.raises(
        ValueError, match="traced with another crosscoder: its weights are not those of the model given"
    ):
        split_heads(model_of(lm), graph)
    facts = {name: value for name, value in graph.metadata.items() if name != "crosscoder_fingerprint"}
    old = dataclasses.replace(graph, metadata=facts)  # of a version that did not write the fingerprint
    with pytest.raises(ValueError, match=r"traced with another crosscoder: node \d_\d+_\d is not active here"):
        split_heads(model_of(lm), old)


def test_a_crosscoder_with_the_same_features_and_other_decoders_is_refused(language_model: Any) -> None:
    lm = language_model("native")
    graph = traced(model_of(lm))
    other = model_of(lm)
    with torch.no_grad():
        for weights in other.crosscoder.W_dec:
            weights.mul_(-1.5)
    with pytest.raises(ValueError, match="traced with another crosscoder: its weights"):
        split_heads(other, graph)


@pytest.mark.parametrize("attention", [True, False])
def test_attention_must_be_what_it_was(language_model: Any, attention: bool) -> None:
    lm = language_model("native")
    graph = traced(model_of(lm, attention=attention))
    message = (
        "the graph has attention features: load the model with its attention crosscoder"
        if attention
        else "the graph has no attention features: load the model without its attention crosscoder"
    )
    for one in (graph, graph.prune(nodes=0.0, edges=0.5)):
        with pytest.raises(ValueError, match=message):
            split_heads(model_of(lm, attention=not attention), one)


def test_targets_must_be_named(language_model: Any) -> None:
    model = model_of(language_model("native"))
    graph = traced(model, targets=[DifferenceTarget(5, 9)])
    with pytest.raises(ValueError, match="the graph has 1 logit nodes, but names 0 targets"):
        split_heads(model, changed(graph, targets=[]))
    (fact,) = graph.metadata["targets"]
    without = {name: value for name, value in fact.items() if name != "token_ids"}
    with pytest.raises(ValueError, match="does not say which tokens its difference is of: trace it again"):
        split_heads(model, changed(graph, targets=[without]))


def test_the_oracle_knows_every_chain(raw_case: RawCase) -> None:
    """Its chains are all sets of heads with at most one of each layer."""
    model, graph = raw_case("native")
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    pairs = [(below, above) for below, above in itertools.product(heads, heads) if below[0] < above[0]]
    assert sorted(PathOracle(model, graph).chains()) == sorted([(), *((one,) for one in heads), *pairs])
