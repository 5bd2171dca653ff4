"""Removing heads in the model: hand-computed cases, exactness of the first rung, and how rules are scored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import replacement
from circuits.heads.feature_heads import HeadViews
from circuits.heads.relu_credit import RULES
from circuits.heads.removal_check import RUNGS, HeadCheck, check_heads, direct_removals, run_without
from replacement import BatchTopK, JointTopK, JumpReLU, LanguageModel, ReLU, ReplacementModel, Site, TopK, Wiring

PROMPTS = [tiny.random_tokens(8, seed=seed) for seed in range(2)]
ACTIVATIONS = [ReLU(), JumpReLU(threshold=0.4), BatchTopK(4), TopK(5)]


def model_of(lm: Any, **options: Any) -> ReplacementModel:
    """A replacement model with a random crosscoder; BatchTopK has thresholds as after training."""
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, **options))
    if isinstance(model.crosscoder.activation, BatchTopK):
        model.crosscoder.threshold[:] = 0.5
    return model


def one_layer() -> LanguageModel:
    """One layer whose every weight is away from its default."""
    config = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "n_ctx": 16, "d_vocab": 97, "act_fn": "gelu"}
    bridge = TransformerBridge.boot_native({**config, "normalization_type": "LN", "seed": 0}, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return LanguageModel(bridge, name="tiny-one-layer")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox"])
def test_ablation_is_exact_where_only_the_own_read_changes(
    language_model: Any, architecture: str, activation: Any
) -> None:
    check = check_heads(model_of(language_model(architecture, torch.float64), activation=activation), PROMPTS)
    assert check.n_prompts == 2
    assert check.n_features == 8
    assert np.abs(check.measured["direct"]).max() > 1e-3
    assert check.relative_error("ablation", "direct") < 1e-9
    assert check.correlation("ablation", "direct") == pytest.approx(1)
    assert {len(check.predicted[rule]) for rule in RULES} == {len(check.measured[rung]) for rung in RUNGS}
    assert check.n_pairs % 4 == 0


def test_one_layer_by_hand() -> None:
    """x_mid without head h is x_mid - z_h W_O_h + its bias; ReLU features of it are what every rung measures."""
    lm = one_layer()
    model, tokens, position = model_of(lm, activation=ReLU()), tiny.random_tokens(7), 5
    acts = lm.read(tokens, [Site(0, "resid_mid"), Site(0, "attn_z")])
    attention, ln1 = lm.parts.bridge.blocks[0].attn, lm.parts.norm_weights("blocks.0.ln1")
    bias_HK = torch.einsum("d,hdk->hk", ln1.bias_D, attention.W_V) + attention.b_V
    z_HK = acts[Site(0, "attn_z")][position].view(2, 8) - bias_HK  # rows of a pattern sum to 1
    written_HD = torch.einsum("hk,hkd->hd", z_HK, attention.W_O).detach()
    W_enc_FD, b_F = model.crosscoder.encoders(0)[0], model.crosscoder.b_enc[0]
    clean_F = torch.relu(acts[Site(0, "resid_mid")][position] @ W_enc_FD.T + b_F)
    removed_HF = torch.relu((acts[Site(0, "resid_mid")][position] - written_HD) @ W_enc_FD.T + b_F)
    local = model.localize(tokens)
    heads = [(0, 0, position), (0, 1, position)]
    for patterns in (None, lm.read_patterns(tokens[None])):
        shown = run_without(lm, local, heads, [Site(0, "resid_mid")], patterns)[Site(0, "resid_mid")]
        torch.testing.assert_close(torch.relu(shown @ W_enc_FD.T + b_F), removed_HF, rtol=0, atol=1e-10)
    views = HeadViews(local, ("",) * 7)
    for number in torch.nonzero(local.features.row == position)[:, 0].tolist():
        view = views.of(local.mlp, number)
        index = view.feature.index
        np.testing.assert_allclose(view.heads_LH[0], written_HD @ W_enc_FD[index], atol=1e-10)
        np.testing.assert_allclose(direct_removals(local, view), removed_HF[:, index], atol=1e-10)
        assert view.activation == pytest.approx(float(clean_F[index]))
    assert float((clean_F - removed_HF).abs().max()) > 0.1
    check = check_heads(model, [tokens], n_features=50)
    for rung in RUNGS:
        assert check.relative_error("ablation", rung) < 1e-9


def test_what_reacts_behind_a_head_by_hand(language_model: Any) -> None:
    """Patterns held: MLP 0 and the values of layer 1 react at the one position, computed from the model's own parts."""
    lm, tokens, position = language_model("gpt2", torch.float64), tiny.random_tokens(8), 6
    local = model_of(lm).localize(tokens)
    sites = [Site(0, "resid_mid"), Site(0, "attn_z"), Site(1, "resid_pre"), Site(1, "attn_out")]
    acts, patterns = lm.read(tokens, sites), lm.read_patterns(tokens[None])
    without_D = acts[Site(0, "attn_z")][position].clone()
    without_D[8:16] = local.frozen.attentions[0].constant_z_TX[position, 8:16]
    W_O_XD = lm.parts.bridge.blocks[0].attn.W_O.detach().flatten(0, 1)
    mid_D = acts[Site(0, "resid_mid")][position] + (without_D - acts[Site(0, "attn_z")][position]) @ W_O_XD
    pre_TD = acts[Site(1, "resid_pre")].clone()
    pre_TD[position] = mid_D + lm.parts.mlp_map(0, "resid_mid")(mid_D[None])[0]
    attention, norm = lm.parts.bridge.blocks[1].attn, lm.parts.norm_map("blocks.1.ln1")
    v_HTK = torch.einsum("td,hdk->htk", norm(pre_TD), attention.W_V) + attention.b_V[:, None]
    z_HK = torch.einsum("ht,htk->hk", patterns[1][0, :, position], v_HTK)
    expected_D = pre_TD[position] + torch.einsum("hk,hkd->d", z_HK, attention.W_O) + attention.b_O
    read = Site(1, "resid_mid")
    frozen_D = run_without(lm, local, [(0, 1, position)], [read], patterns)[read][0]
    live_D = run_without(lm, local, [(0, 1, position)], [read], None)[read][0]
    torch.testing.assert_close(frozen_D, expected_D.detach(), rtol=0, atol=1e-10)
    assert float((frozen_D - live_D).abs().max()) > 1e-3


def test_copies_do_not_touch_each_other(language_model: Any) -> None:
    lm, tokens = language_model("llama", torch.float64), tiny.random_tokens(8)
    local, read = model_of(lm).localize(tokens), Site(2, "resid_mid")
    heads = [(0, 1, 3), (2, 0, 7), (1, 3, 7), (0, 0, 5)]
    together = run_without(lm, local, heads, [read], None)[read]
    alone = torch.cat([run_without(lm, local, [head], [read], None)[read] for head in heads])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_features_of_attention_read_what_is_left_of_their_heads(language_model: Any) -> None:
    """They read `attn_z` itself: with ReLU nothing else can change them on any rung."""
    lm = language_model("gpt2", torch.float64)
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm), activation=ReLU())
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, activation=ReLU()), attention_crosscoder=attention)
    local = model.localize(PROMPTS[0])
    views = HeadViews(local, ("",) * 8)
    second = local.decompositions[1]
    view = views.of(second, int(torch.nonzero((second.features.group == 1) & (second.features.row == 4))[0, 0]))
    site, heads = Site(1, "attn_z"), [(1, head, 4) for head in range(4)]
    z_BX = run_without(lm, local, heads, [site], None)[site]
    pre_B = z_BX @ attention.encoders(1)[0][view.feature.index] + attention.b_enc[1][view.feature.index]
    np.testing.assert_allclose(pre_B, view.pre_activation - view.heads_LH[1], atol=1e-10)
    assert check_heads(model, PROMPTS, n_features=30).relative_error("ablation", "direct") < 1e-9


def test_the_draw_depends_on_the_seed_alone(language_model: Any) -> None:
    model = model_of(language_model("gpt2", torch.float64))
    first, again, other = (check_heads(model, PROMPTS, seed=seed) for seed in (0, 0, 1))
    for rung in RUNGS:
        np.testing.assert_array_equal(first.measured[rung], again.measured[rung])
    assert first.n_pairs != other.n_pairs or not np.array_equal(first.measured["live"], other.measured["live"])


def test_scores() -> None:
    predicted = {rule: np.array([1.0, 2.0, 4.0]) for rule in RULES} | {"path": np.array([3.0, 3.0, 3.0])}
    measured = {"direct": np.array([2.0, 4.0, 8.0]), "frozen": np.array([1.0, 2.0, 5.0]), "live": np.zeros(3)}
    check = HeadCheck(1, 1, predicted, measured)
    assert check.correlation("gate", "direct") == pytest.approx(1)
    assert check.relative_error("gate", "direct") == pytest.approx(0.5)
    assert check.relative_error("gate", "frozen") == pytest.approx(1 / 8)
    assert math.isnan(check.correlation("path", "direct"))
    assert math.isnan(check.relative_error("gate", "live"))
    assert check.n_pairs == 3


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "expected at least one prompt, given none"),
        ("w5 w6 w7", {}, "expected a list of prompts, given a single one"),
        (PROMPTS, {"n_features": 0}, "n_features must be 1 or more, got 0"),
        ([torch.tensor([5])], {}, "no active feature of these prompts reads attention heads"),
    ],
)
def test_mistakes(language_model: Any, prompts: list[Tensor], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_heads(model_of(language_model("gpt2")), prompts, **options)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (ReLU(affine=True), "cannot check credit for activations that are scaled and shifted"),
        (JointTopK(12), "chooses features over all layers together"),
    ],
)
def test_features_that_credit_does_not_divide(language_model: Any, activation: Any, message: str) -> None:
    lm = language_model("gpt2")
    with pytest.raises(ValueError, match=message):
        check_heads(ReplacementModel(lm, tiny.crosscoder_for(lm, activation=activation)), [tiny.random_tokens()])


def test_demo() -> None:
    """A few prompts of the demo in float32: nothing of what the table reports is out of order."""
    model = replacement.load("demo")
    check = check_heads(
        model,
        ["the capital of the state containing Dallas is", "the capital of the state containing Oakland is"],
        n_features=3,
    )
    assert check.n_features == 6
    assert check.relative_error("ablation", "direct") < 1e-3
    assert check.correlation("ablation", "live") > 0.3


def test_features_with_trivial_heads_are_not_drawn(language_model: Any) -> None:
    """Those of the first layer read below all heads, those of position 0 are the same in every prompt."""
    lm = language_model("gpt2", torch.float64)
    model = model_of(lm, wiring=Wiring.strictly_causal(lm, read="resid_pre"))
    local = model.localize(PROMPTS[0])
    views = HeadViews(local, ("",) * 8)
    shares = []
    for number in torch.nonzero((local.features.group > 0) & (local.features.row > 0))[:, 0].tolist():
        size_J = np.abs(views.of(local.mlp, number).contributions)
        shares.append(size_J[:-1].sum() / size_J.sum())
    expected = sum(share >= 0.1 for share in shares)
    assert 0 < expected < len(local.features)
    assert check_heads(model, PROMPTS[:1], n_features=10**6).n_features == expected
