"""The splice against hooks written by hand, for every causal wiring, with and without gradients."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from replacement import Crosscoder, Features, JointTopK, ReLU, Site, TopK, Wiring
from replacement.crosscoder.topk import BatchTopK
from replacement.splicing.splice import Splice, read_rows
from replacement.splicing.splice_options import possible_reads

CAUSAL = {
    "strictly_causal": lambda lm: Wiring.strictly_causal(lm),
    "per_layer of mlp_in": lambda lm: Wiring.per_layer(lm, read="mlp_in"),
    "per_layer of mlp_normalized": lambda lm: Wiring.per_layer(lm, read="mlp_normalized"),
    "autoencoder of resid_pre": lambda lm: Wiring.autoencoder(lm, site="resid_pre"),
    "autoencoder of resid_mid": lambda lm: Wiring.autoencoder(lm, site="resid_mid"),
    "autoencoder of resid_post": lambda lm: Wiring.autoencoder(lm, layers=[0, 2]),
    "autoencoder of attn_z": lambda lm: Wiring.autoencoder(lm, site="attn_z"),
    "autoencoder of attn_out": lambda lm: Wiring.autoencoder(lm, layers=1, site="attn_out"),
    "autoencoder of mlp_in": lambda lm: Wiring.autoencoder(lm, layers=1, site="mlp_in"),
    "autoencoder of mlp_normalized": lambda lm: Wiring.autoencoder(lm, layers=1, site="mlp_normalized"),
    "weakly_causal": lambda lm: Wiring.weakly_causal(lm),
    "weakly_causal of resid_mid": lambda lm: Wiring.weakly_causal(lm, site="resid_mid"),
    "attention transcoder": lambda lm: Wiring.transcoder(lm, layer=1, read="resid_pre", write="attn_out"),
}


def by_hand(lm: Any, crosscoder: Crosscoder, tokens_BT: Tensor) -> Tensor:
    """Oracle: replace one site after the other in forward order, dense ReLU features, one forward pass per site."""
    wiring = crosscoder.wiring
    fixed: dict[Site, Tensor] = {}
    for site in wiring.write_sites:
        seen: dict[Site, Tensor] = {}

        def keep(x: Tensor, read: Site, seen: dict[Site, Tensor] = seen) -> Tensor | None:
            seen[read] = x.flatten(2).flatten(0, 1)
            return fixed[read].view_as(x) if read in fixed else None

        hooks: dict[Site, Any] = {s: (lambda x, y=y: y.view_as(x)) for s, y in fixed.items()}
        hooks |= {read: (lambda x, read=read: keep(x, read)) for read in wiring.read_sites if read <= site}
        lm.run(tokens_BT, hooks)
        total = crosscoder.decoder_bias(site)
        for group in wiring.writers(site):
            pre = sum(seen[read] @ crosscoder.encoder(group, read).T for read in wiring.reads[group])
            total = total + (pre + crosscoder.b_enc[group]).relu() @ crosscoder.decoder(group, site)
            if crosscoder.skip:
                for read in wiring.reads[group]:
                    total = total + seen[read] @ crosscoder.skip_matrix(group, read, site).T
        fixed[site] = total
    return lm.run(tokens_BT, {s: (lambda x, y=y: y.view_as(x)) for s, y in fixed.items()})


def prompts(n: int = 2) -> Tensor:
    """A batch of random prompts."""
    return torch.stack([tiny.random_tokens(length=7, seed=seed) for seed in range(n)])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_wiring_equals_a_splice_by_hand(language_model: Any, architecture: str, name: str) -> None:
    lm = language_model(architecture, torch.float64)
    crosscoder = tiny.crosscoder_for(lm, wiring=CAUSAL[name](lm), activation=ReLU(), skip="transcoder" in name)
    tokens = prompts()
    spliced = Splice(lm, crosscoder, tokens).run()
    torch.testing.assert_close(spliced, by_hand(lm, crosscoder, tokens), rtol=0, atol=1e-11)
    assert float((spliced - lm(tokens)).detach().abs().max()) > 1e-3
    kept = Splice(lm, crosscoder, tokens, errors="keep").run()
    torch.testing.assert_close(kept, lm(tokens), rtol=0, atol=1e-11)


def test_gradients_to_the_weights_equal_those_of_dense_hooks(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    for name in ("strictly_causal", "weakly_causal", "autoencoder of attn_z", "attention transcoder"):
        crosscoder = tiny.crosscoder_for(lm, wiring=CAUSAL[name](lm), activation=ReLU(), skip=True).train()
        weight_BTV = torch.randn(lm(prompts()).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradients = []
        for logits in (Splice(lm, crosscoder, prompts()).run(), by_hand(lm, crosscoder, prompts())):
            crosscoder.zero_grad()
            (logits * weight_BTV).sum().backward()
            gradients.append({name: p.grad.clone() for name, p in crosscoder.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == {name for name, _ in crosscoder.named_parameters()}
        for parameter, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[0][parameter], gradient, rtol=1e-8, atol=1e-9)


def test_a_scaled_crosscoder_equals_the_folded_one(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    wiring = Wiring.weakly_causal(lm)
    scales = {site: 0.5 + site.layer for site in wiring.write_sites}
    scaled, folded = (tiny.crosscoder_for(lm, wiring=wiring, skip=True) for _ in range(2))
    folded.fold_input_scale(scales, scales)
    for options in ({}, {"reads": "clean"}, {"errors": "keep"}):
        expected = Splice(lm, folded, prompts(), **options).run()
        torch.testing.assert_close(
            Splice(lm, scaled, prompts(), scales=scales, **options).run(), expected, rtol=0, atol=1e-11
        )


def test_inputs_and_features_are_those_of_the_spliced_stream(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm)
    splice = Splice(lm, crosscoder, prompts(), scales={Site(0, "resid_mid"): 2.0})
    assert not splice.inputs
    splice.run()
    read = [Site(layer, "resid_mid") for layer in range(3)]
    clean = read_rows(lm, prompts(), read)[1]
    torch.testing.assert_close(splice.inputs[read[0]], clean[read[0]], rtol=0, atol=0)  # raw: nothing replaced before
    assert float((splice.inputs[read[2]] - clean[read[2]]).detach().abs().max()) > 1e-3
    again = crosscoder.encode({s: x * (2.0 if s == read[0] else 1.0) for s, x in splice.inputs.items()})
    for group in range(3):
        torch.testing.assert_close(splice.features[group].activation, again.of(group).activation)
    only = Splice(lm, crosscoder, prompts(), sites=[])
    torch.testing.assert_close(only.run(), lm(prompts()), rtol=0, atol=0)
    assert not only.features, "no group writes a replaced site"
    last = Splice(lm, crosscoder, prompts(), sites=[Site(0, "mlp_out")])
    inputs = last.read()
    assert set(last.features) == {0}
    assert set(inputs) == set(read)
    last.run()
    for site in read:
        torch.testing.assert_close(inputs[site], last.inputs[site], rtol=0, atol=0)


def test_groups_that_read_two_sites_wait_for_both(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    reads = ((Site(0, "resid_mid"), Site(2, "attn_out")), (Site(1, "resid_pre"),))
    writes = ((Site(2, "mlp_out"),), (Site(1, "mlp_out"), Site(2, "mlp_out")))
    widths = {kind: 32 for kind in ("resid_mid", "attn_out", "resid_pre", "mlp_out")}
    crosscoder = tiny.crosscoder_for(lm, wiring=Wiring("two reads", reads, writes, widths), activation=ReLU())
    expected = by_hand(lm, crosscoder, prompts())
    torch.testing.assert_close(Splice(lm, crosscoder, prompts()).run(), expected, rtol=0, atol=1e-11)


def test_acausal_crosscoders_are_spliced_with_clean_reads(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    wiring = Wiring.acausal(lm)
    crosscoder = tiny.crosscoder_for(lm, wiring=wiring)
    clean = lm.read(prompts(), wiring.read_sites)
    outputs = crosscoder({site: x.flatten(0, 1) for site, x in clean.items()}).reconstructions
    splice = Splice(lm, crosscoder, prompts(), reads="clean")
    last = Site(2, "resid_post")
    expected = lm.run(prompts(), {last: lambda x: outputs[last].view_as(x)})
    torch.testing.assert_close(splice.run(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(splice.run(), expected, rtol=0, atol=1e-12)  # clean reads: it may run again,
    first = Site(0, "resid_post")
    alone = lm.run(prompts(), {first: splice.hooks()[first]})  # and each hook is a splice of its own
    torch.testing.assert_close(alone, lm.run(prompts(), {first: lambda x: outputs[first].view_as(x)}))
    kept = Splice(lm, crosscoder, prompts(), reads="clean", errors="keep")
    torch.testing.assert_close(kept.run(), lm(prompts()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("errors", ["drop", "keep"])
def test_tokens_outside_the_mask_keep_their_output(language_model: Any, errors: str) -> None:
    lm = language_model("gpt2", torch.float64)
    # The choice of a training batch must not see masked tokens: with room for one prompt's features, both see the same.
    crosscoder = tiny.crosscoder_for(lm, activation=BatchTopK(4), undecomposed_positions=1).train()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1] = False
    keep[0, 3] = False
    with torch.no_grad():
        splice = Splice(lm, crosscoder, prompts(), keep_BT=keep, errors=errors)
        logits = splice.run()
        alone = Splice(lm, crosscoder, prompts()[:1], keep_BT=keep[:1], errors=errors).run()
    torch.testing.assert_close(logits[1], lm(prompts())[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[:1], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[0, 0], lm(prompts())[0, 0], rtol=0, atol=1e-12)
    rows = torch.cat([part.row for part in splice.features.values()]).unique().tolist()
    assert rows == [1, 2, 4, 5, 6]
    assert isinstance(splice.features[0], Features)
    assert splice.features[0].n_rows == 14


def test_a_crosscoder_of_another_dtype_is_spliced_in_the_models(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, activation=ReLU())
    expected = Splice(lm, crosscoder, prompts()).run()
    single = tiny.crosscoder_for(lm, activation=ReLU()).float()
    logits = Splice(lm, single, prompts()).run()
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_reads_that_a_wiring_allows(language_model: Any) -> None:
    lm = language_model("gpt2")
    assert possible_reads(Wiring.strictly_causal(lm)) == ("propagated", "clean")
    assert possible_reads(Wiring.acausal(lm)) == ("clean",)
    assert possible_reads(Wiring.model_diffing(lm, layer=1)) == ()
    # resid_post.0 and resid_pre.1 are one point of the stream, but the second is met later.
    early, late, widths = Site(0, "resid_post"), Site(1, "resid_pre"), {"resid_post": 32, "resid_pre": 32}
    assert possible_reads(Wiring("forwards", ((early,),), ((late,),), widths)) == ("propagated", "clean")
    assert possible_reads(Wiring("backwards", ((late,),), ((early,),), widths)) == ("clean",)


@pytest.mark.parametrize(
    ("wiring", "options", "message"),
    [
        (
            "acausal",
            {},
            "this acausal crosscoder writes sites before those it reads: it can be spliced with reads='clean'",
        ),
        ("model_diffing", {"reads": "clean"}, "a model_diffing crosscoder reads or writes a second model"),
        ("strictly_causal", {"sites": [Site(0, "mlp_in")]}, "mlp_out.0, mlp_out.1, mlp_out.2, not mlp_in.0"),
        ("strictly_causal", {"reads": "dirty"}, "reads must be 'propagated' or 'clean', got 'dirty'"),
        ("strictly_causal", {"errors": "add"}, "errors must be 'drop' or 'keep', got 'add'"),
        (
            "strictly_causal",
            {"keep_BT": torch.ones(1, 7, dtype=torch.bool)},
            "the mask must be bool of shape [2, 7], got torch.bool of [1, 7]",
        ),
    ],
)
def test_splices_that_cannot_be(language_model: Any, wiring: str, options: dict[str, Any], message: str) -> None:
    lm = language_model("gpt2")
    made = Wiring.model_diffing(lm, layer=1) if wiring == "model_diffing" else getattr(Wiring, wiring)(lm)
    crosscoder = Crosscoder(made, n_features=16, activation=TopK(2))
    with pytest.raises(ValueError, match=re.escape(message)):
        Splice(lm, crosscoder, prompts(), **options)


def test_joint_choice_is_spliced_with_clean_reads(language_model: Any) -> None:
    """By hand: reconstructions of the original activations overwrite the outputs, at replaced tokens and layers alone."""
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, activation=JointTopK(14), undecomposed_positions=1, skip=True)
    tokens_BT = prompts()
    n_prompts, length = tokens_BT.shape
    _, clean = read_rows(lm, tokens_BT, {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites})
    outputs = crosscoder(clean, positions=torch.arange(length).repeat(n_prompts)).reconstructions
    for sites in (crosscoder.wiring.write_sites, [Site(1, "mlp_out")]):

        def overwrite(x_BTD: torch.Tensor, y_RD: torch.Tensor) -> torch.Tensor:
            y_BTD = y_RD.view_as(x_BTD)
            return torch.cat([x_BTD[:, :1], y_BTD[:, 1:]], 1)

        expected = lm.run(tokens_BT, {site: functools.partial(overwrite, y_RD=outputs[site]) for site in sites})
        found = Splice(lm, crosscoder, tokens_BT, sites=sites, reads="clean").run()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    kept = Splice(lm, crosscoder, tokens_BT, reads="clean", errors="keep").run()
    torch.testing.assert_close(kept, lm(tokens_BT), rtol=0, atol=1e-9)
    assert possible_reads(crosscoder.wiring, crosscoder.activation) == ("clean",)
    with pytest.raises(
        ValueError, match="chooses features over all layers together: it can be spliced with reads='clean'"
    ):
        Splice(lm, crosscoder, tokens_BT)
