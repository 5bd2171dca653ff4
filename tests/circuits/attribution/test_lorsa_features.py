"""Low-rank sparse attention in the local model: an autograd oracle agrees, and a copy of original heads is exact."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from autograd_oracle import compare_with_oracle

import circuits
from circuits import NodeKind, QKAttributor, attribute_score, head_view, trace
from circuits.attribution.identity import IdentityError
from circuits.attribution.readers import head_reads
from replacement import JumpReLU, LanguageModel, Lorsa, QueryKeys, ReplacementModel, Site, TopK, Wiring
from replacement.crosscoder.rotation import Rotary
from replacement.language_model.queries_and_keys import FrozenQueryKey

ROTARY = QueryKeys(n_groups=2, width=6, rotary=Rotary.of_base(4, neighbours=True), norm_epsilon=1e-5)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
IDENTITY = {torch.float32: 1e-4, torch.float64: 1e-10}
ORACLE = {torch.float32: 1e-5, torch.float64: 1e-12}
EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def model_of(lm: LanguageModel, *, attention: dict[str, Any] | None = None, **options: Any) -> ReplacementModel:
    """A replacement model with a random crosscoder of MLP outputs and random low-rank sparse attention."""
    return ReplacementModel(
        lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=tiny.lorsa_for(lm, **(attention or {}))
    )


def compare_both_parts(model: ReplacementModel, tokens: torch.Tensor, *, tolerance: float) -> None:
    """Compare with the oracle, and check that features of attention were compared."""
    attributor = compare_with_oracle(model, tokens, tolerance=tolerance)
    expanded = attributor.rows.expanded[attributor.columns.features]
    assert expanded[: len(attributor.local.features)].any()
    assert expanded[len(attributor.local.features) :].any()


@EVERYWHERE
@DTYPES
def test_autograd_oracle_agrees(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    model = model_of(language_model(architecture, dtype), attention={"query_keys": ROTARY}, n_features=24)
    compare_both_parts(model, tiny.random_tokens(6), tolerance=ORACLE[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"skip": True},
        {"attention": {"undecomposed_positions": 2}},
        {"attention": {"activation": JumpReLU()}},
        {"attention": {"activation": TopK(3, scored=True), "query_keys": ROTARY}},
        {"attention": {"wiring": {"read": "attn_normalized"}}},
        {"attention": {"wiring": {"layer": 1}}},
    ],
    ids=["skip", "undecomposed", "jumprelu", "scored", "normalized", "one_layer"],
)
@pytest.mark.parametrize("architecture", ["gemma2", "neox"])
def test_autograd_oracle_agrees_for_other_settings(
    language_model: Any, architecture: str, options: dict[str, Any]
) -> None:
    lm = language_model(architecture, torch.float64)
    attention = dict(options.get("attention", {}))
    if "wiring" in attention:
        attention["wiring"] = Wiring.lorsa(lm, **attention["wiring"])
    model, tokens = model_of(lm, **{**options, "attention": attention}), tiny.random_tokens(7)
    compare_both_parts(model, tokens, tolerance=1e-12)
    local, layers = model.localize(tokens), range(lm.shape.n_layers)
    torch.testing.assert_close(local.logits(), local.frozen.logits_TV)
    written = lm.read(tokens, [Site(layer, "attn_out") for layer in layers])
    outputs_LTD = local.attention.outputs()
    for layer in layers:
        torch.testing.assert_close(outputs_LTD[layer], written[Site(layer, "attn_out")], rtol=0, atol=1e-12)


@pytest.mark.parametrize("of_heads", [True, False], ids=["lorsa", "attn_z"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
@torch.no_grad()
def test_both_kinds_of_attention_features_are_one_kind_of_target(
    language_model: Any, architecture: str, of_heads: bool
) -> None:
    """What they read head by head, and their vectors on the stream, give the pre-activation that the crosscoder computed."""
    lm, tokens = language_model(architecture, torch.float64), tiny.random_tokens(8)
    attention = tiny.lorsa_for(lm) if of_heads else tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    local = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=attention).localize(tokens)
    part, streams = local.attention, local.streams()
    chosen_S = torch.nonzero(part.features.group == 1)[:, 0]
    targets = head_reads(local, part, chosen_S, 1)
    assert targets.head_NP.shape[1] == (1 if of_heads else lm.shape.n_heads)
    x_TD = streams[targets.layer]
    by_head_N = targets.read(x_TD).sum((1, 2)) + targets.constant_N
    by_position_N = (targets.pull_back() * x_TD).sum((1, 2)) + targets.constant_N
    for value_N in (by_head_N, by_position_N):
        torch.testing.assert_close(value_N, part.pre_activation_S[chosen_S], rtol=1e-10, atol=1e-10)


def test_nodes_and_edges_are_those_of_attention_features(language_model: Any) -> None:
    model, tokens = model_of(language_model("gpt2")), tiny.random_tokens()
    graph = trace(model, tokens, coverage=1.0)
    assert 0 < graph.identity_error <= IDENTITY[torch.float32]
    nodes, edges = graph.nodes, graph.edges
    of_lorsa = nodes.mask(NodeKind.FEATURE) & nodes.of_attention
    assert nodes.expanded[of_lorsa].mean() > 0.9
    assert all(re.fullmatch(r"A\d_\d+_\d+", name) for name in nodes.select(of_lorsa).ids())
    moved = nodes.position[edges.source] != nodes.position[edges.target]
    assert not moved[~of_lorsa[edges.target]].any()
    assert moved[of_lorsa[edges.target]].any()
    assert graph.metadata["attention"] == "lorsa, 3 x 48 features, TopK"
    root = graph.nodes.ids()[int(np.flatnonzero(of_lorsa)[-1])]
    layer, index, position = map(int, root.removeprefix("A").split("_"))
    of_feature = trace(model, tokens, targets=f"attention:{layer}/{index}@{position}", coverage=1.0)
    assert of_feature.nodes.ids()[int(np.flatnonzero(of_feature.nodes.output_weight)[0])] == root


@pytest.mark.parametrize("settings", [QueryKeys(n_groups=4, width=6), ROTARY], ids=["plain", "rotary and norm"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmo2"])
def test_pairs_sum_to_the_scores_of_query_key_groups(
    language_model: Any, architecture: str, settings: QueryKeys
) -> None:
    lm, tokens = language_model(architecture, torch.float64), tiny.random_tokens()
    model = model_of(lm, attention={"query_keys": settings})
    attributor, lorsa = QKAttributor(model, tokens), model.attention_crosscoder
    for layer, group, query, key in ((0, 0, 9, 9), (1, 1, 7, 3), (2, 1, 5, 0)):
        site = Site(layer, "attn_in")
        queries_BQTC, keys_BQTC = lorsa.queries_and_keys(lm.read(tokens[None], [site])[site], layer)
        expected = float(queries_BQTC[0, group, query] @ keys_BQTC[0, group, key])
        score = attributor.score(layer=layer, head=group, query=query, key=key, heads="replaced")
        assert float(score.pairs.sum()) == pytest.approx(expected, rel=1e-9)
        assert score.identity_error <= 1e-10
        assert score.name == f"L{layer}Q{group}"
        pattern_QTT = lorsa.patterns(lm.read(tokens, [site]), layer)[0]
        assert score.pattern == pytest.approx(float(pattern_QTT[group, query, key]), rel=1e-9)
        contrasted = attributor.score(layer=layer, head=group, query=7, key=3, contrast="mean", heads="replaced")
        assert contrasted.identity_error <= 1e-10


def test_a_wrong_key_of_a_group_is_refused(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attributor, key = QKAttributor(model_of(language_model("gpt2")), tiny.random_tokens()), FrozenQueryKey.key
    monkeypatch.setattr(FrozenQueryKey, "key", lambda *args: tuple(1.01 * x for x in key(*args)))
    with pytest.raises(IdentityError, match=r"the score of query-key group 1\.1 for query 8 and key 6 sum to"):
        attributor.score(layer=1, head=1, query=8, key=6, heads="replaced")


@pytest.mark.parametrize("settings", [QueryKeys(n_groups=4, width=6), ROTARY], ids=["plain", "rotary and norm"])
def test_a_feature_split_by_source_positions(language_model: Any, settings: QueryKeys) -> None:
    lm, tokens = language_model("llama", torch.float64), tiny.random_tokens()
    model = model_of(lm, attention={"query_keys": settings})
    local, lorsa = model.localize(tokens), model.attention_crosscoder
    active = local.attention.features.of(1)
    index, position = int(active.index[-1]), int(active.row[-1])
    view = head_view(model, tokens, f"attention:1/{index}@{position}")
    group, site = index // lorsa.heads_per_group, Site(1, "attn_in")
    others = [q for q in range(settings.n_groups) if q != group]
    assert not view.heads_LHT[:, others].any()
    assert view.name((1, group)) == f"L1Q{group}"
    values_T = lm.read(tokens, [site])[site] @ lorsa.encoder(1, site)[index]
    expected_T = lorsa.patterns(lm.read(tokens, [site]), 1)[0, group, position] * values_T
    parts_T = view.heads_LHT[1, group]  # without the constants of the norm, which llama's has none of
    np.testing.assert_allclose(parts_T, expected_T.numpy(), rtol=0, atol=1e-12)
    assert view.heads_LH.sum() + view.bias == pytest.approx(view.pre_activation, rel=1e-10)
    rivals = lorsa.pre_activations(lm.read(tokens, [site]), 1)[position].sort(descending=True).values
    assert view.threshold == pytest.approx(max(float(rivals[5]), 0.0), rel=1e-9)


# A copy of the original heads ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rank_one(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """GPT-2 whose heads use one channel of their values each: heads of rank one."""
    folder = tmp_path_factory.mktemp("rank_one")
    tiny.save_model("gpt2", folder)
    original = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        for block in original.transformer.h:
            for parameter in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                values_HK = parameter[..., -32:].unflatten(-1, (4, 8))
                values_HK[..., 1:] = 0
    original.save_pretrained(folder)
    return LanguageModel.from_pretrained(folder, dtype=torch.float64)


def copy_of_heads(lm: LanguageModel) -> Lorsa:
    """One Lorsa head for each original one, with its queries, keys, value vector and output vector."""
    lorsa = tiny.lorsa_for(lm, query_keys=QueryKeys(n_groups=4, width=8), n_features=4, activation=TopK(4, relu=False))
    with torch.no_grad():
        for layer in range(lm.shape.n_layers):
            attention = lm.parts.bridge.blocks[layer].attn
            for name in ("W_Q", "W_K", "b_Q", "b_K"):
                getattr(lorsa, name)[layer].copy_(getattr(attention, name))
            lorsa.encoder(layer, Site(layer, "attn_in")).copy_(attention.W_V[:, :, 0])
            lorsa.b_enc[layer].copy_(attention.b_V[:, 0])
            lorsa.decoder(layer, Site(layer, "attn_out")).copy_(attention.W_O[:, 0])
            lorsa.b_dec[layer].copy_(attention.b_O)
    return lorsa


@torch.no_grad()
def test_a_copy_of_rank_one_heads_is_exact(rank_one: LanguageModel) -> None:
    """No errors; patterns, scores and their pairs, and the graph's edges, are those of the heads that were copied."""
    lm, tokens = rank_one, tiny.random_tokens(8)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=copy_of_heads(lm))
    local = model.localize(tokens)
    assert float(local.attention.errors_LTD.abs().max()) <= 1e-12
    torch.testing.assert_close(model(tokens, parts="attention"), lm(tokens), rtol=0, atol=1e-10)
    for layer, (pattern_BHTT, pattern_QTT) in enumerate(
        zip(lm.read_patterns(tokens), local.attention.patterns, strict=True)
    ):
        torch.testing.assert_close(pattern_QTT, pattern_BHTT[0], rtol=0, atol=1e-12)
        place = {"layer": layer, "head": 3, "query": 7, "key": 2, "contrast": "mean"}
        original, replaced = (
            attribute_score(model, tokens, **place, heads=heads) for heads in ("original", "replaced")
        )
        assert replaced.value == pytest.approx(original.value, rel=1e-10)
        np.testing.assert_allclose(replaced.pairs, original.pairs, rtol=0, atol=1e-10)
    # A feature of the first layer that reads the second position: what the head's values at that position hold.
    graph = trace(model, tokens, coverage=1.0)
    names = {name: number for number, name in enumerate(graph.nodes.ids())}
    token, target = names[f"E_{int(tokens[2])}_2"], names["A0_3_7"]
    (edge,) = np.flatnonzero((graph.edges.source == token) & (graph.edges.target == target))
    attention = local.frozen.attentions[0]
    value = attention.weights.W_V_XD[3 * 8] @ local.frozen.token_embedding_TD[2]
    assert graph.edges.weight[edge] == pytest.approx(float(attention.kernel_HTT[3, 7, 2] * value), rel=1e-6)
    assert graph.identity_error <= 1e-10
    from_errors = (graph.nodes.mask(NodeKind.ERROR) & graph.nodes.of_attention)[graph.edges.source]
    assert np.abs(graph.edges.weight[from_errors]).max(initial=0) <= 1e-10


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_needs_original_heads_is_refused(language_model: Any) -> None:
    lm, tokens = language_model("gpt2"), tiny.random_tokens(6)
    model = model_of(lm)
    graph = trace(model, tokens).prune()
    for split in (circuits.split_heads, circuits.with_heads):
        with pytest.raises(
            ValueError, match="no head of the model carries an edge of this graph: attention is replaced by"
        ):
            split(model, graph)
    plain = ReplacementModel(lm, tiny.crosscoder_for(lm))
    with pytest.raises(
        ValueError, match="this model has no query-key groups: its attention is not replaced by low-rank"
    ):
        attribute_score(plain, tokens, layer=1, head=0, heads="replaced")
    with pytest.raises(ValueError, match="layer 1 has no query-key group 4: it has 4 query-key groups"):
        attribute_score(model, tokens, layer=1, head=4, heads="replaced")
    with pytest.raises(ValueError, match="heads must be 'original' or 'replaced', got 'both'"):
        attribute_score(model, tokens, layer=1, head=0, heads="both")


def test_a_plain_crosscoder_with_that_wiring_is_refused(language_model: Any) -> None:
    lm = language_model("gpt2")
    plain = tiny.crosscoder_for(lm, wiring=Wiring.lorsa(lm))
    with pytest.raises(
        ValueError, match=r"attention needs a crosscoder that reads attn_z sites, this one reads attn_in\.0"
    ):
        ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=plain)
