"""Head view: parts sum to the pre-activation, heads are what the model's own weights and patterns say, thresholds flip."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from circuits import FeatureTarget, plot_heads
from circuits.attribution.identity import IdentityError
from circuits.attribution.readers import HeadTargets
from circuits.attribution.targets import parse_feature
from circuits.heads.feature_heads import HeadView, HeadViews, head_view
from circuits.heads.heat_map import drawable
from circuits.heads.node_credit import feature_threshold
from replacement import BatchTopK, JointTopK, JumpReLU, ReLU, ReplacementModel, Site, TopK, Wiring

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
IDENTITY = {torch.float32: 1e-4, torch.float64: 1e-10}


def model_of(lm: Any, *, attention: bool = False, **options: Any) -> ReplacementModel:
    """A replacement model with random crosscoders."""
    second = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=second)


def views_of(model: ReplacementModel, tokens: Tensor, *, every: int = 7) -> list[HeadView]:
    """Views of some active features of every part."""
    local = model.localize(tokens)
    views = HeadViews(local, tuple(model.language_model.token_strings(tokens.tolist())))
    return [views.of(part, n) for part in local.decompositions for n in range(0, len(part.features), every)]


def check_identity(views: list[HeadView], tolerance: float) -> None:
    for view in views:
        parts = np.append(view.contributions, view.bias)
        scale = max(abs(view.pre_activation), 0.01 * float(np.abs(parts).sum()))
        assert abs(float(parts.sum()) - view.pre_activation) <= tolerance * scale
        assert view.identity_error <= tolerance
        assert view.encoder_share_LH.sum() == pytest.approx(1 if view.layers else 0)


@EVERYWHERE
@DTYPES
def test_parts_sum_to_the_pre_activation(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    views = views_of(model_of(language_model(architecture, dtype), attention=True), tiny.random_tokens(12))
    assert {view.feature.part for view in views} == {"mlp", "attention"}
    check_identity(views, IDENTITY[dtype])
    for view in views:
        assert not view.heads_LHT[:, :, view.feature.position + 1 :].any()
        if view.feature.part == "attention":
            assert (view.layers, view.direct) == ((view.feature.layer,), 0.0)


@pytest.mark.parametrize("read", ["resid_mid", "resid_pre", "mlp_in"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "neox"])
def test_identity_through_skip_matrices(language_model: Any, architecture: str, read: str) -> None:
    lm = language_model(architecture, torch.float64)
    if architecture == "neox" and read == "resid_mid":
        pytest.skip("parallel models have no resid_mid")
    model = model_of(lm, wiring=Wiring.strictly_causal(lm, read=read), skip=True)
    check_identity(views_of(model, tiny.random_tokens()), 1e-10)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "native"])
def test_a_head_is_what_its_output_adds_in_the_model(language_model: Any, architecture: str, skip: bool) -> None:
    """With all other outputs held, removing a head's output changes the feature's own read by its contribution."""
    lm, tokens = language_model(architecture, torch.float64), tiny.random_tokens()
    model = model_of(lm, skip=skip)
    local = model.localize(tokens)
    number = int(torch.nonzero((local.features.group == 1) & (local.features.row == 6))[0, 0])
    view = HeadViews(local, tuple("t" * len(tokens))).of(local.mlp, number)
    (read,) = model.crosscoder.wiring.reads[1]
    outputs = {Site(layer, kind) for layer in range(lm.shape.n_layers) for kind in ("attn_out", "mlp_out")}
    clean = lm.read(tokens[None], {*model.crosscoder.wiring.read_sites, *outputs})
    encoder_D = model.crosscoder.encoder(1, read)[view.feature.index]
    for layer, head in view.players:
        read_TD = _read_without(model, tokens, clean, (layer, head, view.feature.position), read)
        change = float((clean[read][0] - read_TD)[view.feature.position] @ encoder_D)
        assert change == pytest.approx(view.heads_LH[layer, head], abs=1e-10)
    assert np.abs(view.heads_LH[list(view.layers)]).min() > 1e-6


def _read_without(
    model: ReplacementModel, tokens: Tensor, clean: dict[Site, Tensor], head: tuple[int, int, int], read: Site
) -> Tensor:
    """A read site without one (layer, head, position), every other output held, but for what skip matrices add."""
    lm, crosscoder, (layer, number, position) = model.language_model, model.crosscoder, head
    constant_X = model.localize(tokens).frozen.attentions[layer].constant_z_TX[position]
    own = slice(number * lm.shape.d_head, (number + 1) * lm.shape.d_head)
    streams = {site: clean[site][0] for site in crosscoder.wiring.read_sites}
    before = crosscoder.skip_contribution(streams)

    def remove(z: Tensor) -> Tensor:
        z_BTX = z.flatten(2).clone()
        z_BTX[0, position, own] = constant_X[own]
        return z_BTX.view_as(z)

    def hold(site: Site) -> Any:
        def hook(_: Tensor) -> Tensor:
            if site not in before:
                return clean[site]
            return clean[site] + (crosscoder.skip_contribution(streams)[site] - before[site])[None]

        return hook

    def keep(site: Site) -> Any:
        return lambda x: streams.update({site: x[0].clone()})

    held = [site for site in clean if site.kind in ("attn_out", "mlp_out") and site != Site(layer, "attn_out")]
    hooks = {site: hold(site) for site in held} | {site: keep(site) for site in streams}
    lm.run(tokens[None], {**hooks, Site(layer, "attn_z"): remove})
    return streams[read]


@pytest.mark.parametrize("attention", [False, True], ids=["stream", "attn_z"])
def test_source_positions_are_pattern_times_value_times_encoder(language_model: Any, attention: bool) -> None:
    """Llama has no biases: the formula of the view, with the model's own patterns, values and W_O."""
    lm, tokens = language_model("llama", torch.float64), tiny.random_tokens()
    model = model_of(lm, attention=True)
    local = model.localize(tokens)
    part = local.decompositions[int(attention)]
    number = int(torch.nonzero((part.features.group == 2) & (part.features.row == 7))[0, 0])
    view = HeadViews(local, tuple("t" * len(tokens))).of(part, number)
    (read,) = part.crosscoder.wiring.reads[2]
    encoder = part.crosscoder.encoder(2, read)[view.feature.index]
    norm_LH = np.zeros_like(view.heads_LH)
    for layer in view.layers:
        block = f"blocks.{layer}.attn"
        _, cache = lm.parts.capture(tokens, {f"{block}.hook_pattern", f"{block}.v.hook_out"})
        v_TGK = cache[f"{block}.v.hook_out"].reshape(len(tokens), -1, lm.shape.d_head)
        v_THK = v_TGK.repeat_interleave(lm.shape.n_heads // v_TGK.shape[1], 1)
        W_O_HKD = lm.parts.bridge.blocks[layer].attn.W_O.detach()
        seen_HK = encoder.view(lm.shape.n_heads, -1) if attention else W_O_HKD @ encoder
        expected_HT = cache[f"{block}.hook_pattern"][:, 7] * torch.einsum("thk,hk->ht", v_THK, seen_HK)
        np.testing.assert_allclose(view.heads_LHT[layer], expected_HT.numpy(), atol=1e-10)
        norm_LH[layer] = seen_HK.norm(dim=1)
    np.testing.assert_allclose(view.encoder_share_LH, norm_LH / norm_LH.sum(), atol=1e-12)
    assert len(view.layers) == (1 if attention else 3)


def test_a_wrong_kernel_is_refused(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The view's own use of the kernel, 1 % too large; the streams are the prompt's own."""
    model, tokens = model_of(language_model("gpt2"), attention=True), tiny.random_tokens()
    local = model.localize(tokens)
    views = HeadViews(local, ("t",) * len(tokens))
    heads, read = HeadViews._heads, HeadTargets.read
    monkeypatch.setattr(HeadViews, "_heads", lambda *arguments: 1.01 * heads(*arguments))
    monkeypatch.setattr(HeadTargets, "read", lambda *arguments: 1.01 * read(*arguments))
    assert local.attention is not None
    for part in local.decompositions:
        number = int(torch.nonzero((part.features.group == 2) & (part.features.row == 7))[0, 0])
        layer, index = 2, int(part.features.index[number])
        name = f"feature {'attention:' if part is local.attention else ''}{layer}/{index}@7, split by heads, sum to"
        with pytest.raises(IdentityError, match=name) as error:
            views.of(part, number)
        assert error.value.expected == pytest.approx(float(part.pre_activation_S[number]))


def test_head_view_of_a_prompt(language_model: Any) -> None:
    model, prompt = model_of(language_model("gpt2", torch.float64)), "w5 w9 w3 w5 w7"
    local = model.localize(model.language_model.tokenize(prompt))
    number = int(torch.nonzero(local.features.row == 5)[0, 0])
    target = FeatureTarget(int(local.features.group[number]), int(local.features.index[number]))
    view = head_view(model, prompt, target)
    assert view.feature == FeatureTarget(target.layer, target.index, 5)
    assert view.tokens[0].strip() == "w1"
    assert view.activation == pytest.approx(float(local.features.activation[number]))
    assert len(view.contributions) == len(view.players) + 1
    found = view.credit("path")
    assert found.residual == pytest.approx(0, abs=1e-12)
    assert view.credit().rule == "ablation"
    tokens_T = model.language_model.tokenize(prompt)
    for same in (tokens_T, tokens_T.tolist()):
        for name in (f"{target.layer}/{target.index}", f"{target.layer}/{target.index}@5", str(target)):
            assert head_view(model, same, name).activation == view.activation
    assert found.credit_J.sum() == pytest.approx(view.activation - max(view.bias, 0) * (view.bias > view.threshold))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("2/345@7", FeatureTarget(2, 345, 7)),
        ("feature:2/345@-3", FeatureTarget(2, 345, -3)),
        (" attention:0/1 ", FeatureTarget(0, 1, -1, part="attention")),
        ("2/345@0", FeatureTarget(2, 345, 0)),
    ],
)
def test_names_of_features(name: str, feature: FeatureTarget) -> None:
    assert parse_feature(name) == parse_feature(str(feature)) == feature


def test_features_that_are_not_there(language_model: Any) -> None:
    model = model_of(language_model("gpt2"))
    active = set(model.localize(tiny.random_tokens()).features.of(1).index.tolist())
    asleep = min(set(range(48)) - active)
    with pytest.raises(ValueError, match=rf"feature 1/{asleep} is not active at position 4"):
        head_view(model, tiny.random_tokens(), FeatureTarget(1, asleep, 4))
    for feature, message in (
        ("1/2/3", "expected the name of a feature such as 2/345@7 or attention:2/345@7, got '1/2/3'"),
        (f"1/{10**30}@4", "is not active at position 4"),
        ("5/1@4", "the crosscoder has no features in layer 5"),
    ):
        with pytest.raises(ValueError, match=message):
            head_view(model, tiny.random_tokens(), feature)
    with pytest.raises(ValueError, match="there are no attention features"):
        head_view(model, tiny.random_tokens(), FeatureTarget(1, 0, 4, part="attention"))


@pytest.mark.parametrize(
    "activation",
    [
        ReLU(),
        JumpReLU(threshold=0.4),
        JumpReLU(threshold=0.0),
        BatchTopK(4),
        TopK(5),
        TopK((3, 5, 48)),
        TopK(30, relu=False),
        TopK(5, scored=True, affine=True),
    ],
    ids=str,
)
def test_a_feature_is_active_above_its_threshold_alone(language_model: Any, activation: Any) -> None:
    """With the others held, the crosscoder's own choice flips at the threshold."""
    lm, tokens = language_model("gpt2", torch.float64), tiny.random_tokens()
    model = model_of(lm, activation=activation)
    if isinstance(activation, BatchTopK) or activation == JumpReLU(threshold=0.0):
        model.crosscoder.threshold[:] = torch.tensor([[0.3], [0.7], [-1.0]])
    if model.crosscoder.score_factor is not None:
        model.crosscoder.score_factor.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    local = model.localize(tokens)
    below_zero = activation in (JumpReLU(threshold=0.0), TopK(30, relu=False))
    assert bool((local.features.activation < 0).any()) == below_zero
    for number in range(0, len(local.features), 5):
        group, row, index = (int(c[number]) for c in (local.features.group, local.features.row, local.features.index))
        theta = feature_threshold(local, local.mlp, number)
        assert below_zero or theta >= 0
        (site,) = model.crosscoder.wiring.reads[group]
        pre_F = model.crosscoder.pre_activations({site: local.frozen.activations[site][row : row + 1]}, group)[0]
        pre_2F = pre_F.repeat(2, 1)
        pre_2F[:, index] = torch.tensor([theta - 1e-9, theta + 1e-9], dtype=torch.float64)
        chosen = model.crosscoder.select(pre_2F, group)
        assert chosen.rows[chosen.indices == index].tolist() == [1]


@pytest.mark.parametrize("relu", [False, True])
def test_a_jointly_chosen_feature_is_active_above_its_threshold_alone(language_model: Any, relu: bool) -> None:
    """With the pre-activations of all layers held but one, it is among the k best scores just above its threshold."""
    lm, tokens = language_model("gpt2", torch.float64), tiny.random_tokens(6)
    model = model_of(lm, activation=JointTopK(12, relu=relu, scored=True))
    crosscoder = model.crosscoder
    crosscoder.score_factor.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    local = model.localize(tokens)
    pre_GTF = torch.stack([crosscoder.pre_activations(local.frozen.activations, group) for group in range(3)])
    for number in range(0, len(local.features), 5):
        group, row, index = (int(c[number]) for c in (local.features.group, local.features.row, local.features.index))
        theta = feature_threshold(local, local.mlp, number)
        for step in (-1e-9, 1e-9):
            pre_GF = pre_GTF[:, row].clone()
            pre_GF[group, index] = theta + step
            score_GF = pre_GF * crosscoder.score_factor
            is_best = int((score_GF > score_GF[group, index]).sum()) < 12
            assert (is_best and (bool(pre_GF[group, index] > 0) or not relu)) == (step > 0)


@pytest.fixture(scope="module")
def view(language_model: Any) -> HeadView:
    """A feature of the last layer, behind tokens that are hard to print."""
    local = model_of(language_model("gpt2", torch.float64)).localize(tiny.random_tokens(6))
    number = int(torch.nonzero((local.features.group == 2) & (local.features.row == 5))[0, 0])
    return HeadViews(local, ("$a", " b$", "<&>", "\n", "a_b^c", "x" * 40)).of(local.mlp, number)


def test_pictures(view: HeadView, tmp_path: Path) -> None:
    svg = plot_heads(view, tmp_path / "new" / "view.svg").read_text()
    ElementTree.fromstring(svg)
    for text in (
        ">$a 0<",
        ">␣b$ 1<",
        "⏎ 3<",
        "a_b^c 4<",
        "feature 2/",
        "to the pre-activation",
        "L2H",
        f">direct  {view.direct:+.3g}<",
    ):
        assert text in svg
    assert plot_heads(view, tmp_path / "again.svg").read_text() == svg
    assert plot_heads(view, tmp_path / "view.PNG").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"view\.gif: expected a file that ends in \.svg or \.png"):
        plot_heads(view, tmp_path / "view.gif")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "again.svg", "view.PNG"}


def test_characters_that_fonts_lack(language_model: Any, tmp_path: Path) -> None:
    """Without a warning: an .svg keeps them for the viewer's fonts, a .png shows a placeholder."""
    local = model_of(language_model("gpt2", torch.float64)).localize(tiny.random_tokens(6))
    number = int(torch.nonzero((local.features.group == 2) & (local.features.row == 5))[0, 0])
    tokens = ("こ", "a\u0000b", "\ud800", "\U0001f9ff", "e\u200d", "漢")
    view = HeadViews(local, tokens).of(local.mlp, number)
    svg = plot_heads(view, tmp_path / "view.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(svg)
    for text in (">こ 0<", ">a&lt;U+0000&gt;b 1<", ">&lt;U+D800&gt; 2<", ">漢 5<"):
        assert text in svg
    assert plot_heads(view, tmp_path / "view.png").read_bytes().startswith(b"\x89PNG")
    assert drawable("aこ\nß␣ 漢\U000e0001⏎…") == "a□\nß␣ □⏎…"


def test_picture_of_a_feature_below_all_heads(language_model: Any, tmp_path: Path) -> None:
    lm = language_model("gpt2", torch.float64)
    model = model_of(lm, wiring=Wiring.strictly_causal(lm, read="resid_pre"))
    view = views_of(model, tiny.random_tokens())[0]
    assert view.layers == view.players == ()
    assert not view.encoder_share_LH.any()
    svg = plot_heads(view, tmp_path / "none.svg").read_text()
    assert "heads +0" in svg
    assert f">direct  {view.direct:+.3g}<" in svg, "the direct path has a row even where no head has one"
