"""Attention scores as sums over pairs of nodes: the sum is the model's own score, and a dense formula agrees pair by pair."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import Tensor

import circuits.heads.qk_attribution
import circuits.heads.qk_result
from circuits import NodeKind, QKAttributor, attribute_score
from circuits.attribution.identity import IdentityError
from replacement import LanguageModel, LocalReplacement, ReplacementModel, Wiring
from replacement.language_model.queries_and_keys import FrozenQueryKey

EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
PLACES = [(0, 0, 9, 9), (0, 3, 7, 6), (1, 1, 9, 7), (1, 2, 3, 0), (-1, 0, 5, 4), (-1, 3, -1, -3)]
"""Layer (-1: the last), head, query, key: inside every window of the tiny models."""


def model_of(lm: Any, **options: Any) -> ReplacementModel:
    """A replacement model with a random crosscoder."""
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options))


@functools.cache
def caches_of(lm: LanguageModel) -> list[dict[str, Tensor]]:
    """Activations of every layer's attention in the random prompt, by their TransformerLens names below the block."""
    hooks = ["ln1.hook_scale", "hook_resid_pre"]
    hooks += [f"attn.{name}" for name in ("hook_attn_scores", "hook_pattern", "hook_cos", "hook_sin")]
    hooks += [f"attn.{name}.{hook}" for name in "qk" for hook in ("hook_out", "hook_scale")]
    hooks += [f"attn.{name}_norm.hook_scale" for name in "qk"]
    blocks = [f"blocks.{layer}." for layer in range(lm.shape.n_layers)]
    names = {block + hook for block in blocks for hook in hooks} & set(lm.parts.bridge.hook_dict)
    _, cache = lm.parts.capture(tiny.random_tokens(), names)
    return [{name.removeprefix(block): x for name, x in cache.items() if name.startswith(block)} for block in blocks]


@pytest.fixture(scope="module")
def attributor_of(language_model: Any) -> Callable[..., QKAttributor]:
    """`attributor_of(architecture, dtype, skip=False)`: attributor of a random prompt, made once."""

    @functools.cache
    def make(architecture: str, dtype: torch.dtype = torch.float32, *, skip: bool = False) -> QKAttributor:
        return QKAttributor(model_of(language_model(architecture, dtype), skip=skip), tiny.random_tokens())

    return make


PLAIN = [(name, dtype, False) for name in tiny.ARCHITECTURES for dtype in (torch.float32, torch.float64)]
SKIPS = [(name, torch.float64, True) for name in ("gpt2", "gemma3", "neox")]


@pytest.mark.parametrize(("architecture", "dtype", "skip"), [*PLAIN, *SKIPS], ids=str)
def test_pairs_sum_to_the_models_own_score(
    attributor_of: Any, architecture: str, dtype: torch.dtype, skip: bool
) -> None:
    attributor = attributor_of(architecture, dtype, skip=skip)
    caches = caches_of(attributor.model.language_model)
    for layer, head, query, key in PLACES:
        layer %= len(caches)
        found = attributor.score(layer=layer, head=head, query=query, key=key)
        cache = caches[layer]
        shown = cache["attn.hook_attn_scores"][head, query, key]
        total = torch.tensor(found.pairs.sum(), dtype=torch.float64)
        expected = float(shown)
        if architecture == "gemma2":  # what its softmax sees is capped
            total = 5 * torch.tanh(total / 5)
        if architecture == "native":  # its hook shows the pattern
            q, k = (cache[f"attn.{name}.hook_out"][:, head].double() for name in "qk")
            expected = float(q[query] @ k[key]) / 8**0.5
        size = max(abs(expected), 0.01 * np.abs(found.pairs).sum())
        assert abs(float(total) - expected) <= TOLERANCE[dtype] * size
        assert found.identity_error <= TOLERANCE[dtype]
        assert found.value == found.score
        assert found.pattern == float(cache["attn.hook_pattern"][head, query, key])


def test_local_and_global_layers_rotate_differently(tmp_path: Path) -> None:
    """Gemma 3's layers with and without a window have other rotary bases."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**tiny.SIZES, **tiny.GROUPED, sliding_window=20, layer_types=layers)
    torch.manual_seed(0)
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    lm = LanguageModel.from_pretrained(tmp_path, dtype=torch.float64)
    attributor = QKAttributor(model_of(lm), tiny.random_tokens())
    cos = [attributor.frozen(layer).rotation.cos_TR for layer in range(3)]
    assert torch.equal(cos[0], cos[2])
    assert not torch.allclose(cos[0], cos[1], atol=1e-3)
    for layer in range(3):
        assert attributor.score(layer=layer, head=1, key=4).identity_error <= 1e-9


@EVERYWHERE
def test_pairs_sum_where_attention_outputs_are_features(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    model = model_of(lm)
    model.attention_crosscoder = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)).eval().requires_grad_(False)
    attributor = QKAttributor(model, tiny.random_tokens())
    for layer, head, query, key in PLACES[1::2]:
        found = attributor.score(layer=layer % lm.shape.n_layers, head=head, query=query, key=key)
        assert found.identity_error <= 1e-9
        # Nothing but a node of attention moves between positions.
        assert {node.position for node in found.key_nodes if node.kind is not None} == {found.key}
        assert any(node.part == "attention" for node in found.key_nodes) == (layer != 0)


# Pair by pair ---------------------------------------------------------------------------------------------------


def dense_channels(lm: LanguageModel, cache: dict[str, Tensor], layer: int, side: str, head: int, position: int) -> Any:
    """A function of the stream at a position: the head's rotated query (`q`) or key (`k`), with norm scales as in the run."""
    block = lm.parts.bridge.blocks[layer]
    attention, norm = block.attn, block._modules.get("ln1")
    W, b = (attention.W_Q, attention.b_Q) if side == "q" else (attention.W_K, attention.b_K)
    head = head * len(W) // lm.shape.n_heads

    def offset(norm: Any) -> Tensor:
        weight = norm.original_component.weight
        return weight + 1 if "Gemma" in lm.parts.architecture else weight

    def channels(x_D: Tensor) -> Tensor:
        if norm is not None:
            is_layer_norm = isinstance(norm.original_component, torch.nn.LayerNorm)
            x_D = (x_D - x_D.mean() * is_layer_norm) / cache["ln1.hook_scale"][position] * offset(norm)
            x_D = x_D + norm.original_component.bias if is_layer_norm else x_D
        y_K = x_D @ W[head] + (0 if b is None else b[head])
        if (scale := cache.get(f"attn.{side}_norm.hook_scale")) is not None:
            gain = offset(getattr(attention, f"{side}_norm")).view(-1, 8)  # of every head, or of all of them (OLMo 2)
            y_K = y_K / scale.expand(len(W), -1, -1)[head, position] * gain.expand(len(W), -1)[head]
        if "attn.hook_cos" in cache:  # channels i and i + R/2 are one complex number, turned by the position's angle
            half = cache["attn.hook_cos"].shape[-1] // 2
            turn = torch.complex(cache["attn.hook_cos"][position, :half], cache["attn.hook_sin"][position, :half])
            turned = torch.complex(y_K[:half], y_K[half : 2 * half]) * turn
            y_K = torch.cat([turned.real, turned.imag, y_K[2 * half :]])
        return y_K

    return channels


def stream_without(local: LocalReplacement, node: Any, layer: int) -> Tensor:
    """The stream in front of a layer when one node is silent, or, for the constants, when every node is."""
    frozen, mlp, all_silent = local.frozen, local.mlp, node.kind is None
    activation_S, tokens_TD = mlp.features.activation.clone(), frozen.token_embedding_TD.clone()
    errors_LTD, position_TD = mlp.errors_LTD.clone(), frozen.position_embedding_TD
    if all_silent or node.kind is NodeKind.TOKEN:
        tokens_TD[slice(None) if all_silent else node.position] = 0
    if position_TD is not None and (all_silent or node.kind is NodeKind.POSITION):
        position_TD = position_TD.clone()
        position_TD[slice(None) if all_silent else node.position] = 0
    if all_silent:
        errors_LTD[:], activation_S[:] = 0, 0
    elif node.kind is NodeKind.ERROR:
        errors_LTD[node.layer, node.position] = 0
    elif node.kind is NodeKind.FEATURE:
        features = mlp.features
        own = (features.group == node.layer) & (features.row == node.position) & (features.index == node.index)
        assert int(own.sum()) == 1
        activation_S[own] = 0
    changed = dataclasses.replace(
        local,
        frozen=dataclasses.replace(frozen, token_embedding_TD=tokens_TD, position_embedding_TD=position_TD),
        mlp=dataclasses.replace(mlp, errors_LTD=errors_LTD),
    )
    return changed.streams(activation_S)[layer]


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, -1])
@EVERYWHERE
def test_a_dense_formula_agrees_pair_by_pair(attributor_of: Any, architecture: str, layer: int) -> None:
    """Silencing a node in the frozen model changes query and key by exactly the vectors that make its pairs."""
    attributor = attributor_of(architecture, torch.float64)
    lm = attributor.model.language_model
    layer, query, key = layer % lm.shape.n_layers, 8, 6
    found = attributor.score(layer=layer, head=3, query=query, key=key)
    cache, base_TD = caches_of(lm)[layer], attributor.local.streams()[layer]
    effects = []
    for side, nodes, position in (("q", found.query_nodes, query), ("k", found.key_nodes, key)):
        channels = dense_channels(lm, cache, layer, side, 3, position)
        without = [channels(stream_without(attributor.local, node, layer)[position]) for node in nodes]
        changes = [channels(base_TD[position]) - one for one in without[:-1]]
        effects.append(torch.stack([*changes, without[-1]]))
    scale = {"gemma3": 256**-0.5, "granite": tiny.MULTIPLIERS["attention_multiplier"]}.get(architecture, 8**-0.5)
    expected = (effects[0] @ effects[1].T * scale).numpy()
    assert len(found.query_nodes) > (2 if layer else 1)
    np.testing.assert_allclose(found.pairs, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@EVERYWHERE
def test_nodes_lie_before_what_they_cause(attributor_of: Any, architecture: str) -> None:
    attributor = attributor_of(architecture)
    for layer in range(attributor.local.shape.n_layers):
        for contrast, last in ((None, 6), ("mean", 8)):
            found = attributor.score(layer=layer, head=2, query=8, key=6, contrast=contrast)
            for nodes, position in ((found.query_nodes, 8), (found.key_nodes, last)):
                assert nodes[-1].kind is None
                assert all(node.position <= position and node.layer < layer for node in nodes[:-1])
                assert {node.position for node in nodes[:-1]} >= {position}
            for vectors in (found.query_vectors_NK, found.key_vectors_MK):
                assert vectors[:-1].any(1).all()
    first = attributor.score(layer=0, head=0, query=8, key=6)
    assert {node.position for node in first.query_nodes[:-1]} == {8}
    assert {node.kind for node in first.query_nodes[:-1]} <= {NodeKind.TOKEN, NodeKind.POSITION}


def test_a_wrong_query_gain_is_refused(language_model: Any, monkeypatch: Any) -> None:
    lm = language_model("qwen3")
    attributor = QKAttributor(model_of(lm), tiny.random_tokens())
    query = FrozenQueryKey.query

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        vectors_KD, constant_K = query(*arguments)
        return vectors_KD * 1.01, constant_K

    expected = attributor.score(layer=2, head=1, query=8, key=6).value
    monkeypatch.setattr(FrozenQueryKey, "query", wrong)
    for contrast in (None, "mean"):
        with pytest.raises(IdentityError, match=r"the score of head 2\.1 for query 8 and key 6 sum to") as error:
            attributor.score(layer=2, head=1, query=8, key=6, contrast=contrast)
        assert error.value.node == "the score of head 2.1 for query 8 and key 6"
        assert contrast == "mean" or error.value.expected == expected


# Contrasts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox"])
def test_contrast_subtracts_what_other_keys_get(attributor_of: Any, architecture: str, monkeypatch: Any) -> None:
    attributor = attributor_of(architecture, torch.float64)
    where = {"layer": 2, "head": 1, "query": 7}
    window = range(4, 8) if architecture == "gemma2" else range(8)
    one = {key: attributor.score(**where, key=key) for key in window}
    difference = attributor.score(**where, key=6, contrast=5)
    assert difference.value == pytest.approx(one[6].score - one[5].score, rel=1e-12)
    assert difference.contrast == attributor.score(**where, key=6, contrast=-5).contrast == 5
    others = [key for key in window if key != 6]
    mean = attributor.score(**where, key=6, contrast="mean")
    assert (mean.score, mean.pattern, mean.contrast) == (one[6].score, one[6].pattern, "mean")
    assert mean.value == pytest.approx(one[6].score - np.mean([one[key].score for key in others]), rel=1e-12)
    assert max(mean.identity_error, difference.identity_error) <= 1e-9
    for contrasted, rest in ((difference, [5]), (mean, others)):
        sums = {node.column: -np.zeros(1) for node in contrasted.key_nodes}
        for key, weight in [(6, 1.0), *((key, -1 / len(rest)) for key in rest)]:
            for node, row in zip(one[key].key_nodes, one[key].key_vectors_MK, strict=True):
                sums[node.column] = sums[node.column] + weight * row
        expected = np.stack([sums[node.column] for node in contrasted.key_nodes])
        np.testing.assert_allclose(contrasted.key_vectors_MK, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    monkeypatch.setattr(circuits.heads.qk_attribution, "NUMBERS_AT_ONCE", 1)
    np.testing.assert_allclose(attributor.score(**where, key=6, contrast="mean").pairs, mean.pairs, rtol=0, atol=1e-9)


def test_heads_of_a_group_share_keys(attributor_of: Any) -> None:
    attributor = attributor_of("llama")
    found = [attributor.score(layer=1, head=head, key=4).key_vectors_MK for head in range(4)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[3])
    assert np.abs(found[0] - found[2]).max() > 0.01


# What is shown --------------------------------------------------------------------------------------------------


def test_top_pairs_and_marginals(language_model: Any, monkeypatch: Any) -> None:
    lm = language_model("gpt2")
    found = attribute_score(model_of(lm), tiny.random_tokens(), layer=2, head=1)
    pairs, order = found.pairs, np.argsort(-np.abs(found.pairs).ravel())
    top = found.top(12)
    np.testing.assert_allclose([value for _, _, value in top], pairs.ravel()[order[:12]], rtol=1e-12)
    for (query, key, _), place in zip(top, order, strict=False):
        row, column = divmod(int(place), pairs.shape[1])
        assert (query.column, key.column) == (found.query_nodes[row].column, found.key_nodes[column].column)
        assert query.label
        assert key.label
    for marginal, sums in ((found.by_query, pairs.sum(1)), (found.by_key, pairs.sum(0))):
        values = [value for _, value in marginal(10**6)]
        np.testing.assert_allclose(values, sums[np.argsort(-np.abs(sums))], rtol=1e-6, atol=1e-9)
        assert len(marginal(3)) == 3
    monkeypatch.setattr(circuits.heads.qk_result, "ROWS_AT_ONCE", 7)
    assert found.top(12) == top
    assert len(found.top(10**6)) == pairs.size


def test_labels_and_json(language_model: Any) -> None:
    lm = language_model("gpt2")
    prompt = "w5 w9 w7 w5"
    found = attribute_score(model_of(lm), prompt, layer=1, head=0, key=2, contrast="mean")
    shown = {(node.kind, node.position): node.label for node, _ in found.by_query(10**6)}
    assert shown[NodeKind.TOKEN, found.query] == "w5"
    assert shown[NodeKind.POSITION, 2] == "position 2"
    assert shown[None, -1] == "constants"
    read = json.loads(json.dumps(found.to_json(5)))
    assert [len(read[name]) for name in ("pairs", "by_query", "by_key")] == [5, 5, 5]
    assert (read["layer"], read["query"], read["key"], read["contrast"]) == (1, found.query, 2, "mean")
    best = found.top(1)[0]
    assert read["pairs"][0]["contribution"] == best[2]
    assert read["pairs"][0]["query"]["label"] == best[0].label
    assert {one["kind"] for one in found.to_json(10**6)["by_key"]} == {"token", "position", "error", "feature", "bias"}


def test_contributors_are_named_as_in_graphs(language_model: Any) -> None:
    """Pairs and marginals in the published form, with the ids that the nodes of a traced graph have."""
    lm, prompt = language_model("gpt2"), tiny.random_tokens()
    found = attribute_score(model_of(lm), prompt, layer=2, head=1)
    contributors = found.contributors(10**6)
    assert [value for *_, value in contributors["pair_wise_contributors"]] == [value for *_, value in found.top(10**6)]
    ids = {name for name, _ in contributors["top_q_marginal_contributors"]}
    assert ids == {name for name, _, _ in contributors["pair_wise_contributors"]}
    assert "constants" in ids
    graph = circuits.trace(model_of(lm), prompt)
    below = {*graph.nodes.select(graph.nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)).ids()}
    assert below <= ids
    assert len(ids & {*graph.nodes.ids()}) > len(below)  # errors and features too
    assert found.contributors(3)["top_k_marginal_contributors"] == contributors["top_k_marginal_contributors"][:3]


def test_the_default_key_is_the_most_attended_one(attributor_of: Any) -> None:
    attributor = attributor_of("gpt2")
    found = attributor.score(layer=1, head=2, query=6)
    pattern_T = attributor.frozen(1).pattern_HTT[2, 6]
    assert found.pattern == float(pattern_T.max())
    assert found.key == int(pattern_T.argmax())


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"layer": 3}, "the language model has no layer 3: it has 3 layers"),
        ({"layer": -1}, "the language model has no layer -1"),
        ({"head": 4}, "layer 1 has no head 4: it has 4 heads"),
        ({"head": -1}, "layer 1 has no head -1"),
        ({"query": 10}, "query position 10 lies outside the prompt of 10 tokens"),
        ({"key": -11}, "key position -11 lies outside the prompt of 10 tokens"),
        ({"query": 4, "key": 5}, "key position 5 lies after query position 4"),
        ({"key": 2}, "key position 2 lies outside the attention window of query position 9"),
        ({"key": 9, "contrast": 1}, "contrast position 1 lies outside the attention window"),
        ({"query": 7, "key": 6, "contrast": 8}, "contrast position 8 lies after query position 7"),
        ({"key": 9, "contrast": -1}, "contrast needs another key than position 9"),
        ({"key": 9, "contrast": "median"}, "contrast must be a key position, 'mean' or None, got 'median'"),
        ({"query": 0, "contrast": "mean"}, "no contrast: position 0 is the only key that position 0 sees"),
    ],
)
def test_bad_requests(attributor_of: Any, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attributor_of("gemma3").score(**({"layer": 1, "head": 0} | request_))


def test_bad_counts(attributor_of: Any) -> None:
    found = attributor_of("gpt2").score(layer=0, head=0)
    for show in (found.top, found.by_query, found.by_key, found.to_json):
        with pytest.raises(ValueError, match="expected to show at least one, got n=0"):
            show(0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": tiny.VOCABULARY, "max_seq_len": 32}),
        ("HunYuanDenseV1", {**tiny.SIZES, **tiny.GROUPED}),
    ],
    ids=["biased scores", "norms after the rotation"],
)
def test_other_scores_are_refused_by_name(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """ALiBi adds what no node causes; HunYuan normalises what it has rotated. Attribution of features works in both."""
    model = model_of(LanguageModel.from_pretrained(tiny.write_model(f"{name}ForCausalLM", options, tmp_path)))
    with pytest.raises(ValueError, match=f"attention scores of {name}ForCausalLM cannot be attributed exactly"):
        attribute_score(model, tiny.random_tokens(), layer=0, head=0)
