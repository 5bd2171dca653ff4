"""The complete replacement model: MLPs and attention replaced in one pass, patterns live or frozen, and how faithful it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from replacement import Intervention, LanguageModel, ReLU, ReplacementModel, Site, Wiring
from replacement.splicing.intervention import PARTS
from replacement.splicing.splice import Splice
from replacement.validation.fidelity import measure_fidelity

EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def prompts(n: int = 3) -> Tensor:
    """A batch of random prompts."""
    return torch.stack([tiny.random_tokens(seed=seed) for seed in range(n)])


def complete(lm: LanguageModel, **options: Any) -> ReplacementModel:
    """A replacement model with random crosscoders for MLPs and attention."""
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm), **options)
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=attention)


def by_hand(model: ReplacementModel, tokens_BT: Tensor) -> Tensor:
    """Oracle: replace one site after the other in forward order, dense ReLU features, one forward pass per site."""
    lm = model.language_model
    sites = {site: each for each in model.crosscoders.values() for site in each.wiring.write_sites}
    fixed: dict[Site, Tensor] = {}
    for site in sorted(sites):
        crosscoder, hooks = sites[site], {s: (lambda x, y=y: y.view_as(x)) for s, y in fixed.items()}
        seen: dict[Site, Tensor] = {}
        for group in crosscoder.wiring.writers(site):
            (read,) = crosscoder.wiring.reads[group]
            hooks[read] = lambda x, read=read, seen=seen: seen.update({read: x.flatten(2).flatten(0, 1)})
        lm.run(tokens_BT, hooks)
        total = crosscoder.decoder_bias(site)
        for group in crosscoder.wiring.writers(site):
            (read,) = crosscoder.wiring.reads[group]
            pre = seen[read] @ crosscoder.encoder(group, read).T + crosscoder.b_enc[group]
            total = total + pre.relu() @ crosscoder.decoder(group, site)
        fixed[site] = total
    return lm.run(tokens_BT, {s: (lambda x, y=y: y.view_as(x)) for s, y in fixed.items()})


@EVERYWHERE
@pytest.mark.parametrize("patterns", ["live", "frozen"])
@pytest.mark.parametrize("reads", ["propagated", "clean"])
def test_everything_replaced_with_its_errors_is_the_original(
    language_model: Any, architecture: str, patterns: str, reads: str
) -> None:
    lm = language_model(architecture, torch.float64)
    model = complete(lm)
    for parts in (None, ["mlp"], ["attention"], "attention"):
        kept = model(prompts(), errors="keep", patterns=patterns, reads=reads, parts=parts)
        torch.testing.assert_close(kept, lm(prompts()), rtol=0, atol=1e-10)
    assert float((model(prompts(), patterns=patterns, reads=reads) - lm(prompts())).abs().max()) > 0.1


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox"])
def test_both_replaced_equal_one_site_after_the_other(language_model: Any, architecture: str) -> None:
    model = complete(language_model(architecture, torch.float64), activation=ReLU())
    torch.testing.assert_close(model(prompts()), by_hand(model, prompts()), rtol=0, atol=1e-10)


def test_parts_and_layers_choose_what_is_replaced(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model, tokens = complete(lm), prompts()
    alone = ReplacementModel(lm, model.crosscoder)
    assert alone.attention_crosscoder is None
    assert list(alone.crosscoders) == ["mlp"]
    torch.testing.assert_close(model(tokens, parts=["mlp"]), alone(tokens), rtol=0, atol=0)
    assert model.attention_crosscoder is not None
    with torch.no_grad():
        attention = Splice(lm, model.attention_crosscoder, tokens).run()
    torch.testing.assert_close(model(tokens, parts=["attention"]), attention, rtol=0, atol=0)
    torch.testing.assert_close(model(tokens, parts=["attention", "mlp"]), model(tokens), rtol=0, atol=0)
    # Layer 1 alone: both of its outputs are replaced, encoded from the original stream, and nothing else.
    clean = lm.read(tokens, [site for each in model.crosscoders.values() for site in each.wiring.read_sites])
    flat = {site: x.flatten(0, 1) for site, x in clean.items()}
    hooks = {}
    for each, kind in ((model.crosscoder, "mlp_out"), (model.attention_crosscoder, "attn_out")):
        y_RD = each(flat).reconstructions[Site(1, kind)].detach()
        hooks[Site(1, kind)] = lambda x, y_RD=y_RD: y_RD.view_as(x)
    torch.testing.assert_close(model(tokens, layers=[1], reads="clean"), lm.run(tokens, hooks), rtol=0, atol=1e-11)
    torch.testing.assert_close(model(tokens[0], layers=[]), lm(tokens[0]), rtol=0, atol=0)


def test_layers_that_one_of_the_crosscoders_leaves_alone(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    model = ReplacementModel(
        lm, tiny.crosscoder_for(lm, wiring=Wiring.transcoder(lm, layer=1)), attention_crosscoder=attention
    )
    only_attention = model(prompts(), layers=[0], parts=["attention"])
    torch.testing.assert_close(model(prompts(), layers=[0]), only_attention, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"the crosscoder writes layers \[1\], not layer 0"):
        model(prompts(), layers=[0], parts=["mlp"])


# Patterns -----------------------------------------------------------------------------------------------------------


@EVERYWHERE
def test_patterns_that_are_held_stay_and_are_used(language_model: Any, architecture: str) -> None:
    """Hold a uniform pattern: every head's output is then the mean of the values so far."""
    lm: LanguageModel = language_model(architecture, torch.float64)
    clean = lm.read_patterns(prompts())
    assert [tuple(pattern.shape) for pattern in clean] == [(3, 4, 10, 10)] * lm.shape.n_layers
    torch.testing.assert_close(clean[1].sum(-1), torch.ones(3, 4, 10, dtype=torch.float64), rtol=0, atol=1e-6)
    uniform_TT = torch.ones(10, 10, dtype=torch.float64).tril() / torch.arange(1, 11)[:, None]
    seen: dict[str, Tensor] = {}
    lm.parts.run(
        prompts(),
        [
            *lm.parts.pattern_hooks([uniform_TT.expand_as(pattern) for pattern in clean]),
            ("blocks.1.attn.hook_v", lambda x, hook: seen.update(v=x)),
            ("blocks.1.attn.hook_z", lambda x, hook: seen.update(z=x)),
        ],
    )
    values_BTHK = seen["v"].repeat_interleave(4 // seen["v"].shape[2], dim=2)
    expected = torch.einsum("qs,bshk->bqhk", uniform_TT, values_BTHK).flatten(2)
    torch.testing.assert_close(seen["z"].flatten(2), expected, rtol=0, atol=1e-12)


@EVERYWHERE
def test_frozen_patterns_stay_under_interventions(language_model: Any, architecture: str) -> None:
    """A change of the embeddings, or of a feature, moves the live patterns and leaves the frozen ones."""
    lm: LanguageModel = language_model(architecture, torch.float64)
    model, tokens = complete(lm), tiny.random_tokens()[None]
    clean = lm.read_patterns(tokens)
    run, used = lm.parts.run, {}

    def spy(tokens_BT: Tensor, hooks: list[Any]) -> Tensor:
        names = [
            f"blocks.{layer}.attn.{name}" for layer in range(lm.shape.n_layers) for name in ("v.hook_out", "hook_z")
        ]
        watch = [(name, lambda x, hook, name=name: used.update({name: x})) for name in names]
        return run(tokens_BT, [*hooks, *watch])

    change = torch.randn(10, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embeddings = {Site(0, "resid_pre"): lambda x: x + change}
    features = [Intervention(layer=0, index=i, position=4, activation=9.0, part=part) for i in (0, 1) for part in PARTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.parts, "run", spy)
        for patterns in (None, clean):
            used.clear()
            lm.run(tokens, embeddings, patterns=patterns)
            assert mixes_by(used, clean) == (patterns is not None)
        for choice in ("live", "frozen"):
            used.clear()
            model(tokens, errors="keep", patterns=choice, interventions=features)
            assert mixes_by(used, clean) == (choice == "frozen")


def mixes_by(used: dict[str, Tensor], patterns: list[Tensor]) -> bool:
    """Whether the values of every layer are mixed by these patterns."""
    for layer, pattern_BHTT in enumerate(patterns):
        v_BTGK, z_BTHK = used[f"blocks.{layer}.attn.v.hook_out"], used[f"blocks.{layer}.attn.hook_z"]
        group_H = torch.arange(z_BTHK.shape[2]) * v_BTGK.shape[2] // z_BTHK.shape[2]
        expected = torch.einsum("bhts,bshk->bthk", pattern_BHTT, v_BTGK[:, :, group_H])
        if not torch.allclose(z_BTHK, expected, rtol=0, atol=1e-12 * float(expected.abs().max())):
            return False
    return True


def test_an_attention_feature_of_the_last_layer_adds_its_vector(language_model: Any) -> None:
    """With errors kept, setting it changes what attention writes by its decoder vector times the change, and nothing else."""
    lm = language_model("gpt2", torch.float64)
    model, tokens = complete(lm), tiny.random_tokens()[None]
    on = Intervention(layer=2, index=7, position=3, activation=2.0, part="attention")
    site = Site(2, "attn_out")
    assert model.attention_crosscoder is not None
    local = model.attention_crosscoder.encode_group(
        2, {Site(2, "attn_z"): lm.read(tokens, [Site(2, "attn_z")])[Site(2, "attn_z")][0]}
    )
    before = float(local.activation[(local.row == 3) & (local.index == 7)].sum())
    vector_D = model.attention_crosscoder.decoder(2, site)[7] * (2.0 - before)

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 3] += vector_D
        return x

    # The last MLP's features read what attention wrote, so leave the MLPs as they are.
    kept = model(tokens, errors="keep", parts=["attention"], interventions=[on], patterns="frozen")
    torch.testing.assert_close(kept, lm.run(tokens, {site: add}), rtol=0, atol=1e-11)


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": "fixed"}, "patterns must be 'live' or 'frozen', got 'fixed'"),
        ({"parts": ["mlps"]}, "parts must be 'mlp' or 'attention', got 'mlps'"),
        ({"parts": []}, "parts names nothing to replace: expected 'mlp', 'attention' or both"),
        ({"layers": [3]}, "the crosscoder writes layers [0, 1, 2], not layer 3"),
        (
            {"interventions": [Intervention(layer=0, index=48, position=0, activation=0.0, part="attention")]},
            "intervention on index 48: expected 0 to 47",
        ),
        (
            {
                "parts": ["mlp"],
                "interventions": [Intervention(layer=0, index=0, position=0, activation=0.0, part="attention")],
            },
            "an intervention sets a feature of attention, which is not replaced in this call",
        ),
    ],
)
def test_options_that_cannot_be(language_model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        complete(language_model("gpt2"))(tiny.random_tokens(), **options)


def test_attention_is_asked_of_a_model_that_leaves_it_alone(language_model: Any) -> None:
    lm = language_model("gpt2")
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    with pytest.raises(
        ValueError, match="this replacement model has no attention crosscoder: give one with attention_crosscoder="
    ):
        model(tiny.random_tokens(), parts=["attention"])
    with pytest.raises(ValueError, match="the part of an intervention must be 'mlp' or 'attention', got 'head'"):
        Intervention(layer=0, index=0, position=0, activation=0.0, part="head")


def test_crosscoders_that_cannot_replace_attention(language_model: Any) -> None:
    lm = language_model("gpt2")
    mlp, widths = tiny.crosscoder_for(lm), {"attn_z": 32, "attn_out": 32}
    backwards = Wiring("backwards", ((Site(2, "attn_z"),),), ((Site(0, "attn_out"),),), widths)
    second = Wiring("second", ((Site(0, "attn_z"),),), ((Site(0, "attn_out", 1),),), widths)
    elsewhere = Wiring("elsewhere", ((Site(0, "attn_z", 1),),), ((Site(0, "attn_out"),),), widths)
    for wiring, message in (
        (
            Wiring.strictly_causal(lm),
            "attention needs a crosscoder that writes attn_out sites, this one writes mlp_out.0",
        ),
        (second, "attention needs a crosscoder that writes attn_out sites, this one writes attn_out.0@1"),
        (
            Wiring.transcoder(lm, layer=1, read="resid_pre", write="attn_out"),
            "attention needs a crosscoder that reads attn_z sites, this one reads resid_pre.1",
        ),
        (elsewhere, "attention needs a crosscoder that reads attn_z sites, this one reads attn_z.0@1"),
        (backwards, "attention needs a causal crosscoder: this backwards one writes sites before those it reads"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ReplacementModel(lm, mlp, attention_crosscoder=tiny.crosscoder_for(lm, wiring=wiring))
    with pytest.raises(ValueError, match="writes mlp_out sites, this one writes attn_out"):
        ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)))
    broken = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    with torch.no_grad():
        broken.b_enc[1][0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ReplacementModel(lm, mlp, attention_crosscoder=broken)
    llama, others = language_model("llama"), tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    with pytest.raises(ValueError, match="trained on another model: on 'tiny-gpt2'"):
        ReplacementModel(llama, tiny.crosscoder_for(llama), attention_crosscoder=others)


def test_a_site_belongs_to_one_crosscoder(language_model: Any) -> None:
    lm = language_model("gpt2")
    reads, writes = ((Site(0, "attn_out"),),), ((Site(2, "mlp_out"),),)
    crosscoder = tiny.crosscoder_for(lm, wiring=Wiring("late", reads, writes, {"attn_out": 32, "mlp_out": 32}))
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    message = "two crosscoders spliced together must not share a site: both use attn_out.0"
    with pytest.raises(ValueError, match=message):
        ReplacementModel(lm, crosscoder, attention_crosscoder=attention)
    with pytest.raises(ValueError, match=message):
        measure_fidelity(lm, [crosscoder, attention], prompts())


# Fidelity -----------------------------------------------------------------------------------------------------------


def test_fidelity_of_one_crosscoder_and_of_both(language_model: Any) -> None:
    """Each alone is what it is by itself; both together have both reconstructions, and the output of both spliced in."""
    lm = language_model("llama", torch.float64)
    model, tokens = complete(lm), prompts(5)
    alone = [measure_fidelity(lm, crosscoder, tokens, rows_per_pass=2) for crosscoder in model.crosscoders.values()]
    both = measure_fidelity(lm, list(model.crosscoders.values()), tokens, rows_per_pass=2)
    assert both.l0 == alone[0].l0 + alone[1].l0
    assert both.unexplained == alone[0].unexplained + alone[1].unexplained
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (lm(tokens), model(tokens)))
    assert both.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-9)
    agreed = lm(tokens).argmax(-1) == model(tokens).argmax(-1)
    assert both.agreement_all == float(agreed.double().mean())
    sites = [site for crosscoder in model.crosscoders.values() for site in crosscoder.wiring.write_sites]
    zeroed = lm.run(tokens, dict.fromkeys(sites, torch.zeros_like))
    loss = torch.nn.functional.cross_entropy(zeroed[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert both.cross_entropy_zero == pytest.approx(float(loss), rel=1e-10)


def test_outputs_are_compared_where_either_replaces_something(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    mlp = tiny.crosscoder_for(lm, undecomposed_positions=3)
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm), undecomposed_positions=1)
    alone, other, both = (measure_fidelity(lm, some, prompts()) for some in (mlp, attention, [mlp, attention]))
    assert [fidelity.n_tokens for fidelity in (alone, other, both)] == [21, 27, 27]
    assert both.l0 == alone.l0 + other.l0


def test_crosscoders_that_cannot_be_measured_together(language_model: Any) -> None:
    lm = language_model("gpt2")
    diffing = tiny.crosscoder_for(lm, wiring=Wiring.model_diffing(lm, layer=1))
    with pytest.raises(
        ValueError, match="a model_diffing crosscoder involves several models: it cannot be measured with"
    ):
        measure_fidelity(lm, [tiny.crosscoder_for(lm), diffing], prompts())
    with pytest.raises(ValueError, match="expected at least one crosscoder to measure, got none"):
        measure_fidelity(lm, [], prompts())
