"""Global circuits equal the edges of all graphs added up, whatever the order, the chunks and interruptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from circuits import CircuitGraph, FeatureTarget, GlobalCircuits, NodeKind, global_circuits, split_heads, trace
from circuits.explain import global_edges, global_pass
from circuits.explain.global_circuits import OF_EDGES, OF_FEATURES
from replacement import ReplacementModel, Wiring
from replacement.index.firings import counted_tokens

PROMPTS = [tiny.random_tokens(length, seed=seed) for seed, length in enumerate((9, 5, 9, 7))]
SPECIAL = torch.tensor([1])


def model_of(lm: Any, *, attention: bool = False, **options: Any) -> ReplacementModel:
    other = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm, n_features=24, **options), attention_crosscoder=other)


@pytest.fixture(scope="module")
def native(language_model: Any) -> ReplacementModel:
    return model_of(language_model("native", torch.float64))


@pytest.fixture(scope="module")
def built(native: ReplacementModel) -> GlobalCircuits:
    return global_circuits(native, PROMPTS)


def full_graph(model: ReplacementModel, tokens_T: torch.Tensor) -> CircuitGraph:
    """A graph with a row for every active feature."""
    local, roots = model.localize(tokens_T), []
    for name, part in zip(("mlp", "attention"), local.decompositions, strict=False):
        features, wiring = part.features, part.crosscoder.wiring
        columns = (features.group.tolist(), features.index.tolist(), features.row.tolist())
        roots += [FeatureTarget(wiring.group_layer(g), i, t, part=name) for g, i, t in zip(*columns, strict=True)]
    return trace(model, tokens_T, targets=roots, coverage=1.0, max_nodes=None)


def reference(model: ReplacementModel, prompts: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Dense sums over the graphs of all prompts, edge by edge in plain Python."""
    offsets, F = {}, 0
    for number, crosscoder in enumerate(model.crosscoders.values()):
        for layer in crosscoder.wiring.layers:
            offsets[number, layer] = F
            F += crosscoder.n_features
    sums = {name: np.zeros((F, F)) for name in OF_EDGES} | {name: np.zeros(F) for name in OF_FEATURES[:-2]}
    for tokens_T in prompts:
        counted_T, graph = counted_tokens(model.language_model, tokens_T[None])[0], full_graph(model, tokens_T)
        nodes, direct_E = graph.nodes, split_heads(model, graph).direct_E

        def feature(node: int, nodes: Any = nodes) -> int:
            return offsets[int(nodes.part[node]), int(nodes.layer[node])] + int(nodes.index[node])

        counts = nodes.mask(NodeKind.FEATURE) & (nodes.activation > 0) & counted_T.numpy()[nodes.position]
        for node in np.flatnonzero(counts).tolist():
            t = feature(node)
            sums["firings"][t] += 1
            sums["pre_activation"][t] += nodes.value[node]
            sums["bias"][t] += nodes.bias[node]
            sums["inflow"][t] += nodes.inflow[node]
        edges = zip(
            graph.edges.target.tolist(), graph.edges.source.tolist(), graph.edges.weight.tolist(), direct_E, strict=True
        )
        for target, source, weight, direct in edges:
            if not counts[target]:
                continue
            t, kind = feature(target), nodes.kind[source]
            if kind == NodeKind.FEATURE:
                s, activation = feature(source), float(nodes.activation[source])
                sums["direct"][t, s] += direct
                sums["attention"][t, s] += weight - direct
                sums["reach"][t, s] += activation
                sums["together"][t, s] += activation * (nodes.position[source] == nodes.position[target])
            else:
                sums["errors" if kind == NodeKind.ERROR else "tokens"][t] += weight
    return sums


def dense(found: GlobalCircuits, name: str) -> np.ndarray:
    F = found.numbers.n_features
    matrix = np.zeros((F, F))
    matrix[found.target, found.source] = found.edges[name]
    return matrix


def assert_same(first: GlobalCircuits, second: GlobalCircuits) -> None:
    np.testing.assert_array_equal(first.indptr, second.indptr)
    np.testing.assert_array_equal(first.source, second.source)
    for kind in ("features", "edges"):
        for name, column in getattr(first, kind).items():
            np.testing.assert_allclose(getattr(second, kind)[name], column, rtol=1e-5, atol=1e-6, err_msg=name)


CASES = [("native", {}), ("native", {"skip": True}), ("gemma2", {}), ("native", {"attention": True}), ("neox", {})]


@pytest.mark.parametrize(("architecture", "options"), CASES, ids=str)
def test_sums_are_those_of_all_graphs(language_model: Any, architecture: str, options: dict[str, Any]) -> None:
    model = model_of(language_model(architecture, torch.float64), **options)
    prompts = [torch.cat([SPECIAL, tokens_T]) for tokens_T in PROMPTS]
    found, expected = global_circuits(model, prompts), reference(model, prompts)
    for name in OF_FEATURES[:-2]:
        np.testing.assert_allclose(found.features[name], expected[name], rtol=1e-6, atol=1e-5, err_msg=name)
    for name in OF_EDGES:
        if options.get("skip") and name in ("direct", "attention"):
            continue  # `split_heads` counts skips of other layers as it passes them
        np.testing.assert_allclose(dense(found, name), expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    total = dense(found, "direct") + dense(found, "attention")
    np.testing.assert_allclose(total, expected["direct"] + expected["attention"], rtol=1e-5, atol=1e-5)
    assert 0 < found.metadata["identity_error"] < 1e-10
    assert found.metadata["is_exact"]
    assert not found.features["omitted"].any()


def test_the_account_of_a_feature_sums_to_its_mean_pre_activation(built: GlobalCircuits) -> None:
    for number in np.flatnonzero(built.features["firings"]).tolist():
        account = built.account(built.numbers.name(number))
        assert account.pop("pre_activation") == pytest.approx(sum(account.values()))
        assert account["not_listed"] == pytest.approx(0, abs=1e-5)


def test_direct_paths_alone(native: ReplacementModel, built: GlobalCircuits) -> None:
    direct = global_circuits(native, PROMPTS, paths="direct")
    np.testing.assert_allclose(dense(direct, "direct"), dense(built, "direct"), rtol=1e-6, atol=1e-9)
    assert not direct.edges["attention"].any()
    has_edge = dense(built, "direct") != 0
    np.testing.assert_allclose(dense(direct, "reach"), dense(built, "together") * has_edge, rtol=1e-6)


def test_neither_chunks_nor_the_order_of_prompts_matter(
    native: ReplacementModel, built: GlobalCircuits, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(global_circuits(native, PROMPTS[::-1]), built)
    monkeypatch.setattr(global_edges, "LARGEST_ROUND", 3)
    monkeypatch.setattr(global_pass, "BYTES_PER_PAIR", 1)
    least = 2 * built.numbers.n_features * 48
    assert_same(global_circuits(native, PROMPTS, neighbours=48, memory=least), built)


def test_little_memory_is_off_by_no_more_than_it_says(
    native: ReplacementModel, built: GlobalCircuits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(global_pass, "BYTES_PER_PAIR", 1)
    F = built.numbers.n_features
    found = global_circuits(native, PROMPTS, neighbours=3, memory=2 * F * 3)
    assert not found.metadata["is_exact"]
    assert found.largest_error > 0
    assert np.diff(found.indptr).max() <= 3
    kept = dense(found, "reach") != 0
    off = sum(np.abs(dense(found, name) - dense(built, name)) for name in ("direct", "attention"))
    assert (off <= np.where(kept, found.features["error"][:, None], found.features["omitted"][:, None]) + 1e-5).all()
    assert off[kept].max() > 0
    cut = global_circuits(native, PROMPTS, neighbours=3)
    assert cut.metadata["is_exact"]
    kept = dense(cut, "reach") != 0
    np.testing.assert_allclose(dense(cut, "direct")[kept], dense(built, "direct")[kept])
    assert (dense(cut, "reach") <= dense(built, "reach")).all()


# Neighbours ----------------------------------------------------------------------------------------------------------


def test_neighbours_are_the_largest_effects(built: GlobalCircuits) -> None:
    effect = (dense(built, "direct") + dense(built, "attention")) / np.maximum(built.features["firings"], 1)[:, None]
    target, source = np.unravel_index(np.abs(effect).argmax(), effect.shape)
    names = built.numbers.name
    first = built.upstream(names(int(target)), top=3)[0]
    assert first.name == names(int(source))
    assert first.effect == pytest.approx(effect[target, source], rel=1e-5)
    assert first.share == pytest.approx(
        effect[target, source] * built.features["firings"][target] / built.features["inflow"][target], rel=1e-5
    )
    sizes = [abs(neighbour.effect) for neighbour in built.upstream(names(int(target)), top=50)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == np.count_nonzero(dense(built, "reach")[target])
    mass = np.abs(effect[:, source]) * built.features["firings"] ** 2 / np.maximum(built.features["inflow"], 1e-30)
    assert built.downstream(names(int(source)))[0].name == names(int(mass.argmax()))


def test_a_virtual_weight_is_the_direct_effect_of_a_unit(language_model: Any) -> None:
    """Without a norm in front of the reader it is the inner product of the decoders below and the encoder."""
    lm = language_model("native", torch.float64)
    model = model_of(lm, wiring=Wiring.strictly_causal(lm, read="resid_mid"))
    found, crosscoder = global_circuits(model, PROMPTS), model.crosscoder
    (reads,), checked = crosscoder.wiring.reads[1], 0
    for number in np.flatnonzero(found.features["firings"])[-8:].tolist():
        _, layer, index = found.numbers.feature(number)
        encoder_D = crosscoder.encoder_vectors(layer, torch.tensor([index]), reads)[0]
        for neighbour in found.upstream(found.numbers.name(number), top=48):
            _, below, source = found.numbers.feature(found.numbers.named(neighbour.name))
            written = [site for site in crosscoder.wiring.writes[below] if site.layer < layer]
            expected = sum(
                float(encoder_D @ crosscoder.decoder_vectors(below, torch.tensor([source]), site)[0])
                for site in written
            )
            if neighbour.virtual_weight is not None:
                assert neighbour.virtual_weight == pytest.approx(expected, rel=1e-4)
                checked += 1
    assert checked > 10


# Local graphs --------------------------------------------------------------------------------------------------------


def test_all_edges_of_a_graph_of_the_corpus_are_global(native: ReplacementModel, built: GlobalCircuits) -> None:
    graph = full_graph(native, PROMPTS[0])
    facts = built.explained(graph)
    assert facts["edges"] > 50
    assert facts["share_of_edges"] == facts["share_of_influence"] == 1.0
    assert 0.5 < facts["correlation"] <= 1.0
    fewer, control = built.strongest(2), built.strongest(2).shuffled(0)
    assert 0 < fewer.explained(graph)["share_of_edges"] < 1
    assert fewer.explained(graph)["share_of_influence"] > fewer.explained(graph)["share_of_edges"]
    assert control.explained(graph)["share_of_influence"] < fewer.explained(graph)["share_of_influence"]


def test_the_correlation_is_that_with_activation_times_slope(native: ReplacementModel, built: GlobalCircuits) -> None:
    graph, cut = full_graph(native, PROMPTS[1]), built.strongest(3)
    nodes, names = graph.nodes, {f"{layer}/{index}" for layer in (0, 1) for index in range(24)}
    table = {(t, s): e for e, (t, s) in enumerate(zip(cut.target.tolist(), cut.source.tolist(), strict=True))}
    predicted, weights = [], []
    edges = zip(graph.edges.target.tolist(), graph.edges.source.tolist(), graph.edges.weight.tolist(), strict=True)
    for target, source, weight in edges:
        if nodes.kind[source] != NodeKind.FEATURE:
            continue
        ends = [f"{nodes.layer[node]}/{nodes.index[node]}" for node in (target, source)]
        assert set(ends) <= names
        edge = table.get(tuple(map(cut.numbers.named, ends)))
        slope = 0.0
        if edge is not None:
            direct, attention, together, reach = (float(cut.edges[name][edge]) for name in OF_EDGES)
            slope = attention / reach + (direct / together if nodes.position[source] == nodes.position[target] else 0)
        predicted.append(slope * nodes.activation[source])
        weights.append(weight)
    facts = cut.explained(graph)
    assert facts["edges"] == len(weights)
    assert facts["correlation"] == pytest.approx(np.corrcoef(predicted, weights)[0, 1], abs=1e-5)


def test_a_shuffle_keeps_layers_and_density(built: GlobalCircuits) -> None:
    control = built.shuffled(1)
    np.testing.assert_array_equal(control.indptr, built.indptr)
    np.testing.assert_array_equal(
        np.sort(np.bincount(control.source, minlength=48)), np.sort(np.bincount(built.source, minlength=48))
    )
    np.testing.assert_array_equal(np.bincount(control.source // 24), np.bincount(built.source // 24))
    assert (control.source != built.source).any()
    key = control.target.astype(np.int64) * 48 + control.source
    assert (np.diff(key) > 0).all()


# Interruptions and files ---------------------------------------------------------------------------------------------


def test_a_killed_pass_goes_on_where_it_was_saved(
    native: ReplacementModel, built: GlobalCircuits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(global_pass, "SAVE_EVERY_S", 0.0)
    state, localized = tmp_path / "state.npz", []

    def stop(n_tokens: int) -> None:
        if len(localized) == 3:
            raise KeyboardInterrupt

    def localize(tokens_T: torch.Tensor) -> Any:
        localized.append(len(tokens_T))
        return ReplacementModel.localize(native, tokens_T)

    monkeypatch.setattr(native, "localize", localize)
    with pytest.raises(KeyboardInterrupt):
        global_circuits(native, PROMPTS, state=state, progress=stop)
    assert state.is_file()
    localized.clear()
    assert_same(global_circuits(native, PROMPTS, state=state), built)
    assert localized == [7]  # the last prompt alone
    assert not state.exists()
    localized.clear()
    with pytest.raises(KeyboardInterrupt):
        global_circuits(native, PROMPTS, state=state, progress=stop)
    saved = state.read_bytes()
    with pytest.raises(ValueError, match=r"state\.npz is of a pass with another neighbours \(64, now 5\): remove it"):
        global_circuits(native, PROMPTS, state=state, neighbours=5)
    assert state.read_bytes() == saved


def test_a_file_gives_back_what_was_saved(built: GlobalCircuits, tmp_path: Path) -> None:
    read = GlobalCircuits.load(built.save(tmp_path / "global.safetensors"))
    assert_same(read, built)
    assert read.metadata == built.metadata | {"parts": [[list(layers), n] for layers, n in built.metadata["parts"]]}
    assert read.upstream("1/3") == built.upstream("1/3")


def test_files_that_hold_something_else(built: GlobalCircuits, native: ReplacementModel, tmp_path: Path) -> None:
    path = built.save(tmp_path / "global.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"global\.safetensors: expected a file of global circuits.*damaged.*digest"):
        GlobalCircuits.load(path)
    path.write_bytes(content[:40])
    with pytest.raises(ValueError, match="damaged or foreign"):
        GlobalCircuits.load(path)
    graph = full_graph(native, PROMPTS[1])
    graph.save(path)
    with pytest.raises(ValueError, match=r"another kind of safetensors file \(crosstrace\.circuit\)"):
        GlobalCircuits.load(path)
    with pytest.raises(ValueError, match="got no such file"):
        GlobalCircuits.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="got a folder or device"):
        GlobalCircuits.load(tmp_path)
    other = replace(graph, metadata={**graph.metadata, "crosscoder_fingerprint": "another"})
    with pytest.raises(ValueError, match=r"traced with another crosscoder \(another\) than that of these edges"):
        built.explained(other)


def test_mistakes_are_named(native: ReplacementModel, built: GlobalCircuits, tmp_path: Path) -> None:
    for name in ("2/3", "1/24", "attention:1/3"):
        with pytest.raises(ValueError, match=rf"there is no feature '{name}': expected one of mlp layers 0, 1 with"):
            built.upstream(name)
    with pytest.raises(ValueError, match="expected the name of a feature such as 2/345@7"):
        built.downstream("Texas")
    with pytest.raises(ValueError, match="expected tokens to count features on, got none in the prompts given"):
        global_circuits(native, [])
    with pytest.raises(ValueError, match="paths: expected 'all' or 'direct', got 'heads'"):
        global_circuits(native, PROMPTS, paths="heads")
    with pytest.raises(ValueError, match="neighbours must be 1 or more, got 0"):
        global_circuits(native, PROMPTS, neighbours=0)
    with pytest.raises(
        ValueError, match=r"memory: expected at least 0\.737 MB for 64 neighbours of each of 48 features, got"
    ):
        global_circuits(native, PROMPTS, memory="500kB")
    with pytest.raises(ValueError, match="memory: expected a size above 0"):
        global_circuits(native, PROMPTS, memory="much")
    state = tmp_path / "state.npz"
    state.write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"state\.npz is damaged .*: remove it to start again"):
        global_circuits(native, PROMPTS, state=state)


def test_a_corpus_of_special_tokens_has_nothing_to_count(language_model: Any) -> None:
    model = model_of(language_model("gpt2", torch.float64))
    with pytest.raises(ValueError, match="got none in the prompts given"):
        global_circuits(model, [torch.tensor([2, 2, 2])])
