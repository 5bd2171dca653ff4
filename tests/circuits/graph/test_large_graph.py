"""A graph of more than 10^5 edges gives the numbers of a dense float64 reference, and names of features change nothing."""

import numpy as np
import pytest

from circuits import CircuitGraph, NodeKind, NodeTable
from circuits.graph.edges import Edges

T, E, F, L = NodeKind.TOKEN, NodeKind.ERROR, NodeKind.FEATURE, NodeKind.LOGIT
TOKENS, LAYERS, PER_LAYER, LOGITS = 6, 4, 180, 5


def large(*, seed: int, order: np.ndarray | None = None) -> tuple[CircuitGraph, np.ndarray]:
    """A random layered graph at one position, and A in float64. `order` puts the features of every layer in another order."""
    random = np.random.default_rng(seed)
    level = np.concatenate([
        np.full(TOKENS, -1), np.arange(LAYERS), np.repeat(np.arange(LAYERS), PER_LAYER), np.full(LOGITS, LAYERS)
    ])  # fmt: skip
    kind = np.repeat([T, E, F, L], [TOKENS, LAYERS, LAYERS * PER_LAYER, LOGITS])
    n = len(kind)
    first = TOKENS + LAYERS
    expanded = (kind == L) | ((kind == F) & (random.random(n) < 0.9))
    below = (level[None, :] < level[:, None]) & expanded[:, None] & (kind != L)[None, :]
    A = (random.normal(size=(n, n)) * random.pareto(1.5, size=(n, n)) * below * (random.random((n, n)) < 0.7)).astype(
        np.float32
    )
    lost = random.exponential(size=n) * expanded
    weight = np.where(kind == L, random.random(n), 0)
    weight /= weight.sum()
    if order is not None:  # features keep all they have and change places inside their layer
        place = np.arange(n)
        for layer in range(LAYERS):
            start = first + layer * PER_LAYER
            place[start : start + PER_LAYER] = start + order
        A, lost, expanded = A[np.ix_(place, place)], lost[place], expanded[place]
    index = np.where(kind == F, np.tile(np.arange(n), 1), np.where(kind == E, -1, np.arange(n)))
    inflow = np.abs(A.astype(np.float64)).sum(1) + lost
    nodes = NodeTable.build(
        kind=kind,
        layer=np.where(kind == T, -1, level),
        position=np.where(kind == T, np.arange(n), TOKENS - 1),
        index=index,
        expanded=expanded,
        output_weight=weight,
        inflow=inflow,
    )
    target, source = np.nonzero(A)
    edges = Edges.from_coo(target, source, A[target, source], n_nodes=n)
    facts = {"prompt": "x", "tokens": ["x"] * TOKENS, "n_layers": LAYERS, "identity_error": 0.0}
    return CircuitGraph(nodes, edges, facts), A.astype(np.float64)


def series(M: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p (M + M^2 + ...) by solving a dense linear system."""
    return np.linalg.solve((np.eye(len(p)) - M).T, M.T @ p)


def smallest_holding(values: np.ndarray, share: float) -> set[int]:
    """The smallest set that holds a share of the sum, taken one by one."""
    chosen, held, total = set(), 0.0, values.sum()
    for number in sorted(range(len(values)), key=lambda number: -values[number]):
        if held >= share * total or values[number] == 0:
            break
        chosen.add(number)
        held += values[number]
    return chosen


def test_influence_scores_and_pruning_equal_a_dense_reference() -> None:
    graph, A = large(seed=0)
    assert len(graph.edges) > 100_000
    nodes, p = graph.nodes, graph.nodes.output_weight
    inflow = nodes.inflow[:, None]
    M = np.divide(np.abs(A), inflow, out=np.zeros_like(A), where=inflow > 0)
    influence = series(M, p)
    np.testing.assert_allclose(graph.influence(), influence, rtol=1e-9, atol=1e-15)

    through, lost = influence + p, np.where(nodes.expanded, 1 - M.sum(1), 0.0)
    is_error, is_input = nodes.kind == E, nodes.kind == T
    ends = {"input": through[is_input].sum(), "error": through[is_error].sum(), "lost": through @ lost}
    unexpanded = (nodes.kind == F) & ~nodes.expanded
    ends["unexpanded"] = through[unexpanded].sum()
    assert sum(ends.values()) == pytest.approx(1, abs=1e-9)
    assert graph.scores().replacement == pytest.approx(ends["input"], rel=1e-9)
    # Lost mass is one more error node: it has no inputs, hence no error among them.
    wrong = np.where(unexpanded, 1.0, M[:, is_error].sum(1) + lost)
    complete = ((1 - wrong) @ through + ends["lost"]) / (through.sum() + ends["lost"])
    assert graph.scores().completeness == pytest.approx(complete, rel=1e-9)

    # Pruning, node by node and edge by edge.
    stays = (nodes.kind == T) | (nodes.kind == L)
    kept = set(np.flatnonzero(stays).tolist()) | smallest_holding(np.where(stays, 0, influence), 0.8)
    keep = np.isin(np.arange(len(nodes)), list(kept))
    left = np.abs(A) * keep[:, None] * keep[None, :]
    total = left.sum(1, keepdims=True)
    shares = np.divide(left, total, out=np.zeros_like(left), where=total > 0)
    mass = (series(shares, p) + p)[:, None] * shares
    chosen = np.zeros(A.size, dtype=bool)
    chosen[list(smallest_holding(mass.ravel(), 0.98))] = True
    chosen = chosen.reshape(A.shape)
    had_causes = (np.abs(A).sum(1) > 0) & (nodes.kind == F)
    while True:
        dangling = keep & ~stays & (~chosen.any(0) | (had_causes & ~chosen.any(1)))
        if not dangling.any():
            break
        keep &= ~dangling
        chosen &= keep[:, None] & keep[None, :]
    pruned = graph.prune()
    assert pruned.nodes.ids() == nodes.select(keep).ids()
    all_ids, ids = nodes.ids(), pruned.nodes.ids()
    expected = [(all_ids[s], all_ids[t]) for t, s in zip(*np.nonzero(chosen), strict=True)]
    assert [(ids[s], ids[t]) for s, t in zip(pruned.edges.source, pruned.edges.target, strict=True)] == expected


def test_another_order_of_features_changes_nothing() -> None:
    order = np.random.default_rng(1).permutation(PER_LAYER)
    graph, _ = large(seed=2)
    other, _ = large(seed=2, order=order)
    first = TOKENS + LAYERS
    place = np.arange(len(graph.nodes))
    for layer in range(LAYERS):
        start = first + layer * PER_LAYER
        place[start : start + PER_LAYER] = start + order
    np.testing.assert_allclose(other.influence(), graph.influence()[place], rtol=1e-9, atol=1e-15)
    for first_graph, second_graph in ((graph, other), (graph.prune(), other.prune())):
        assert first_graph.scores().replacement == pytest.approx(second_graph.scores().replacement, rel=1e-9)
        assert first_graph.scores().completeness == pytest.approx(second_graph.scores().completeness, rel=1e-9)
        assert first_graph.counts() == second_graph.counts()


def test_a_feature_in_two_equal_halves_changes_nothing(build_graph) -> None:
    """Two features that write half as much each, and are caused as the whole was."""
    token, logit = {"kind": T, "index": 1}, {"kind": L, "layer": 2, "index": 1, "expanded": True, "output_weight": 1.0}
    feature = {"kind": F, "layer": 0, "expanded": True}
    error, top = {"kind": E, "layer": 0}, {"kind": F, "layer": 1, "index": 9, "expanded": True}
    whole = build_graph(
        [token, error, {**feature, "index": 1}, top, logit],
        [(2, 0, 3.0), (2, 1, 1.0), (3, 2, 2.0), (3, 1, 1.0), (4, 2, 4.0), (4, 3, 1.0)],
    )
    into_halves = [(2, 0, 3.0), (2, 1, 1.0), (3, 0, 3.0), (3, 1, 1.0)]
    from_halves = [(4, 2, 1.0), (4, 3, 1.0), (5, 2, 2.0), (5, 3, 2.0)]
    halves = build_graph(
        [token, error, {**feature, "index": 1}, {**feature, "index": 2}, top, logit],
        [*into_halves, *from_halves, (4, 1, 1.0), (5, 4, 1.0)],
    )
    assert halves.scores().replacement == pytest.approx(whole.scores().replacement, rel=1e-12)
    assert halves.influence()[[2, 3]].sum() == pytest.approx(whole.influence()[2], rel=1e-12)
    np.testing.assert_allclose(halves.influence()[[0, 1, 4, 5]], whole.influence()[[0, 1, 3, 4]], rtol=1e-12)
