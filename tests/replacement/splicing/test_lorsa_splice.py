"""Low-rank sparse attention inside a model: spliced by the one engine, exact with its errors, held where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from replacement import Intervention, LanguageModel, Lorsa, ReLU, ReplacementModel, Site, Wiring
from replacement.splicing.splice import Splice
from replacement.validation.fidelity import measure_fidelity


def prompts(n: int = 3) -> Tensor:
    """A batch of random prompts."""
    return torch.stack([tiny.random_tokens(seed=seed) for seed in range(n)])


def with_lorsa(lm: LanguageModel, **options: Any) -> ReplacementModel:
    """A replacement model whose attention is a random Lorsa."""
    return ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=tiny.lorsa_for(lm, **options))


def written(lorsa: Lorsa, layer: int, x_BTD: Tensor, patterns_BQTT: Tensor) -> Tensor:
    """Oracle for heads that are all active where positive: what they write `[B, T, D]`, group by group."""
    total_BTD = lorsa.b_dec[layer].expand_as(x_BTD)
    for head in range(lorsa.n_features):
        group = head // (lorsa.n_features // lorsa.query_keys.n_groups)
        moved_BT = (patterns_BQTT[:, group] @ (x_BTD @ lorsa.W_enc[layer][head])[:, :, None])[:, :, 0]
        total_BTD = total_BTD + (moved_BT + lorsa.b_enc[layer][head]).relu()[:, :, None] * lorsa.W_dec[layer][head, 0]
    return total_BTD


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("patterns", ["live", "frozen"])
@pytest.mark.parametrize("reads", ["propagated", "clean"])
def test_attention_replaced_with_its_errors_is_the_original(
    language_model: Any, architecture: str, patterns: str, reads: str
) -> None:
    lm = language_model(architecture, torch.float64)
    model = with_lorsa(lm, undecomposed_positions=1)
    for parts in (None, "attention"):
        kept = model(prompts(), errors="keep", patterns=patterns, reads=reads, parts=parts)
        torch.testing.assert_close(kept, lm(prompts()), rtol=0, atol=1e-10)
    assert float((model(prompts(), patterns=patterns, reads=reads) - lm(prompts())).abs().max()) > 0.1


@pytest.mark.parametrize("architecture", ["gpt2", "olmo2", "neox"])
@pytest.mark.parametrize("patterns", ["live", "frozen"])
@torch.no_grad()
def test_layers_are_replaced_one_after_the_other(language_model: Any, architecture: str, patterns: str) -> None:
    lm = language_model(architecture, torch.float64)
    lorsa = tiny.lorsa_for(lm, activation=ReLU())
    clean = lm.read(prompts(), lorsa.wiring.read_sites)
    fixed: dict[Site, Tensor] = {}
    for layer in range(lm.shape.n_layers):
        read, seen = Site(layer, "attn_in"), dict[str, Tensor]()
        hooks = {site: (lambda x, y=y: y) for site, y in fixed.items()}
        lm.run(prompts(), {**hooks, read: lambda x, seen=seen: seen.update(x=x)})
        pattern_source = seen["x"] if patterns == "live" else clean[read]
        rows = {read: pattern_source.flatten(0, 1)}
        pattern_BQTT = lorsa.patterns(rows, layer, positions=torch.arange(10).repeat(3))
        fixed[Site(layer, "attn_out")] = written(lorsa, layer, seen["x"], pattern_BQTT)
    expected = lm.run(prompts(), {site: (lambda x, y=y: y) for site, y in fixed.items()})
    model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=lorsa)
    # The model's own patterns play no part: every attention output is replaced.
    torch.testing.assert_close(model(prompts(), parts="attention", patterns=patterns), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_tokens_that_are_not_replaced_are_seen_as_keys(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    lorsa, tokens = tiny.lorsa_for(lm, activation=ReLU(), undecomposed_positions=1), prompts()
    keep_BT = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    splice = Splice(lm, lorsa, tokens, sites=[Site(1, "attn_out")], keep_BT=keep_BT)
    logits = splice.run()
    x_BTD = lm.read(tokens, [Site(1, "attn_in")])[Site(1, "attn_in")]
    rows = {Site(1, "attn_in"): x_BTD.flatten(0, 1)}
    y_BTD = written(lorsa, 1, x_BTD, lorsa.patterns(rows, 1, positions=torch.arange(10).repeat(3)))
    mask_BT1 = (keep_BT & (torch.arange(10) >= 1))[..., None]
    expected = lm.run(tokens, {Site(1, "attn_out"): lambda x: torch.where(mask_BT1, y_BTD, x)})
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert set(splice.features[1].row.tolist()) <= set(mask_BT1.flatten().nonzero()[:, 0].tolist())


@torch.no_grad()
def test_a_changed_head_writes_its_output_vector(language_model: Any) -> None:
    """Held everywhere and errors kept: the only change is the head's decoder vector, at its own layer and position."""
    lm = language_model("llama", torch.float64)
    model, prompt = with_lorsa(lm), tiny.random_tokens()
    lorsa = model.attention_crosscoder
    assert lorsa is not None
    features = model.localize(prompt).attention
    assert features is not None
    part = features.features.of(1)
    position, index, activation = int(part.row[-1]), int(part.index[-1]), float(part.activation[-1])
    site = Site(1, "attn_out")
    change = Intervention(layer=1, index=index, position=position, scale=3.0, part="attention")
    held = model.intervene(prompt, [change], constrained_layers=range(lm.shape.n_layers), patterns="frozen")

    def add(x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.clone()
        x_BTD[0, position] += 2 * activation * lorsa.decoder(1, site)[index]
        return x_BTD

    clean = lm.read(prompt, [Site(layer, kind) for layer in range(3) for kind in ("mlp_out", "attn_out")])
    hooks = {where: (lambda x, y=y: y[None]) for where, y in clean.items()}
    expected = lm.run(prompt[None], {**hooks, site: lambda x: add(clean[site][None])})[0]
    torch.testing.assert_close(held.logits, expected, rtol=0, atol=1e-10)
    live = model.intervene(prompt, [change])
    assert float((live.logits - held.logits).abs().max()) > 1e-6


def test_fidelity_counts_what_every_head_read(language_model: Any) -> None:
    lm = language_model("gpt2")
    lorsa, tokens = tiny.lorsa_for(lm, undecomposed_positions=1), prompts(5)
    measured = measure_fidelity(lm, lorsa, tokens, rows_per_pass=2)
    with torch.no_grad():
        read = lm.read(tokens, [*lorsa.wiring.read_sites, *lorsa.wiring.write_sites])
        flat = {site: x_BTD.flatten(0, 1) for site, x_BTD in read.items()}
        outputs, features = lorsa(flat, positions=torch.arange(10).repeat(5))
        keep_R = (torch.arange(10) >= 1).repeat(5)
        unexplained = []
        for site, y_RD in outputs.items():
            target_RD = flat[site][keep_R]
            error = (target_RD - y_RD[keep_R]).square().sum()
            unexplained.append(float(error / (target_RD - target_RD.mean(0)).square().sum()))
    assert measured.unexplained == pytest.approx(unexplained, rel=1e-4)
    assert measured.total_l0 == pytest.approx(len(features) / 45, rel=1e-6)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_attn_in_is_the_output_of_the_norm_in_front(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    norm = lm.parts.norm_before(1, "attention")
    assert (norm is None) == (architecture == "olmo2")
    site, stream = Site(1, "attn_in"), Site(1, "resid_pre")
    read = lm.read(tiny.random_tokens(), [site, stream])
    expected = read[stream] if norm is None else lm.parts.norm_map(norm)(read[stream])
    torch.testing.assert_close(read[site], expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_bad_input(language_model: Any) -> None:
    lm, other = language_model("gpt2"), language_model("llama")
    clt, lorsa = tiny.crosscoder_for(lm), tiny.lorsa_for(lm)
    with pytest.raises(
        ValueError, match="a replacement model needs a crosscoder that writes mlp_out sites, this one writes"
    ):
        ReplacementModel(lm, lorsa)
    with pytest.raises(ValueError, match="this crosscoder was trained on another model: on 'tiny-gpt2'"):
        ReplacementModel(other, tiny.crosscoder_for(other), attention_crosscoder=lorsa)
    plain = tiny.crosscoder_for(lm, wiring=Wiring.lorsa(lm))
    with pytest.raises(
        ValueError, match="attention needs a crosscoder that reads attn_z sites, this one reads attn_in"
    ):
        ReplacementModel(lm, clt, attention_crosscoder=plain)
    elsewhere = tiny.lorsa_for(lm, wiring=Wiring.attention(lm))
    with pytest.raises(
        ValueError, match=r"attention needs a crosscoder that reads attn_in.* sites, this one reads attn_z"
    ):
        ReplacementModel(lm, clt, attention_crosscoder=elsewhere)
