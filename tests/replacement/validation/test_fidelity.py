"""Fidelity of spliced crosscoders: identities, hooks written by hand and torch's own losses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from replacement import Crosscoder, ReLU, TopK, Wiring
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import BatchTopK
from replacement.validation.fidelity import measure_fidelity
from replacement.validation.measure import measure
from replacement.validation.protocols import protocols
from replacement.validation.slices import batches_of

WIRINGS = {
    "autoencoder": lambda lm: Wiring.autoencoder(lm),
    "autoencoder of attn_z": lambda lm: Wiring.autoencoder(lm, site="attn_z"),
    "acausal": lambda lm: Wiring.acausal(lm, site="resid_mid"),
    "model_diffing": lambda lm: Wiring.model_diffing(lm, layer=1),
}


def prompts(n: int = 5) -> Tensor:
    """A batch of random prompts."""
    return torch.stack([tiny.random_tokens(length=8, seed=seed) for seed in range(n)])


def identity_crosscoder(wiring: Wiring, **options: Any) -> Crosscoder:
    """Two features per read coordinate, one for each sign, written back where they were read: a perfect autoencoder."""
    reads = wiring.reads[0]
    width = wiring.width(reads[0])
    n_features = 2 * width * len(reads)
    crosscoder = Crosscoder(wiring, n_features=n_features, activation=ReLU(), dtype=torch.float64, **options)
    both_FD = torch.cat([torch.eye(width, dtype=torch.float64), -torch.eye(width, dtype=torch.float64)])
    with torch.no_grad():
        for group, sites in enumerate(wiring.reads):
            for place, site in enumerate(sites):
                block = slice(2 * width * place, 2 * width * (place + 1))
                crosscoder.encoder(group, site).zero_()[block] = both_FD
                crosscoder.decoder(group, site)[block] = both_FD
    return crosscoder


def mean_loss(logits_BTV: Tensor, tokens_BT: Tensor) -> float:
    """Mean next-token loss, by torch."""
    return float(functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()))


@pytest.mark.parametrize("name", WIRINGS)
def test_a_perfect_crosscoder_loses_nothing(language_model: Any, name: str) -> None:
    lm = language_model("gpt2", torch.float64)

    def others(rows: slice) -> dict[Site, Tensor]:
        return {Site(1, "resid_post", 1): lm.read(prompts()[rows], [Site(1, "resid_post")])[Site(1, "resid_post")]}

    fidelity = measure_fidelity(lm, identity_crosscoder(WIRINGS[name](lm)), prompts(), rows_per_pass=2, others=others)
    assert fidelity.mean_unexplained < 1e-20
    assert fidelity.n_tokens == 40
    if name == "model_diffing":
        assert fidelity.kl is fidelity.agreement_all is fidelity.cross_entropy is None
        assert fidelity.cross_entropy_recovered is None
        return
    assert fidelity.kl is not None
    assert abs(fidelity.kl) < 1e-12
    assert fidelity.agreement_all == 1
    assert fidelity.cross_entropy == pytest.approx(fidelity.cross_entropy_original, abs=1e-12)
    assert fidelity.cross_entropy_recovered == pytest.approx(1, abs=1e-9)
    # Every coordinate has exactly one of its two signs active.
    assert fidelity.l0 == ((32.0 * 3,) if name == "acausal" else (32.0,) * 3)


def test_losses_equal_torch_and_zeroed_sites_equal_hooks_by_hand(language_model: Any) -> None:
    lm = language_model("llama", torch.float64)
    crosscoder, tokens = tiny.crosscoder_for(lm), prompts()
    fidelity = measure_fidelity(lm, crosscoder, tokens, rows_per_pass=3)
    zeroed = lm.run(tokens, {site: torch.zeros_like for site in crosscoder.wiring.write_sites})
    assert fidelity.cross_entropy_original == pytest.approx(mean_loss(lm(tokens), tokens), rel=1e-10)
    assert fidelity.cross_entropy_zero == pytest.approx(mean_loss(zeroed, tokens), rel=1e-10)
    with torch.no_grad():
        for parameter in (*crosscoder.W_dec, *crosscoder.b_dec):
            parameter.zero_()
    nothing = measure_fidelity(lm, crosscoder, tokens)
    assert nothing.cross_entropy == pytest.approx(nothing.cross_entropy_zero, rel=1e-12)
    assert nothing.cross_entropy_recovered == pytest.approx(0, abs=1e-9)
    assert nothing.kl is not None
    assert nothing.kl > 1e-3


def test_every_number_of_a_transcoder_equals_hooks_by_hand(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    crosscoder, tokens = tiny.crosscoder_for(lm, wiring=Wiring.transcoder(lm, layer=1)), prompts()
    read, write = crosscoder.wiring.read_sites[0], crosscoder.wiring.write_sites[0]
    x, y = (lm.read(tokens, [read, write])[site].flatten(0, 1) for site in (read, write))
    output = crosscoder({read: x})
    y_hat = output.reconstructions[write].detach()
    spliced = lm.run(tokens, {write: lambda z: y_hat.view_as(z)})
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (lm(tokens), spliced))
    confident = lm(tokens).softmax(-1).amax(-1) >= 0.5
    agreed = lm(tokens).argmax(-1) == spliced.argmax(-1)
    fidelity = measure_fidelity(lm, crosscoder, tokens, rows_per_pass=2)
    assert fidelity.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-9)
    assert fidelity.cross_entropy == pytest.approx(mean_loss(spliced, tokens), rel=1e-10)
    assert fidelity.agreement == float(agreed[confident].double().mean()) if confident.any() else None
    assert fidelity.agreement_all == float(agreed.double().mean())
    assert fidelity.unexplained == pytest.approx([float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())])
    assert fidelity.total_l0 == pytest.approx(len(output.features) / 40)


def test_masked_tails_equal_rows_cut_short(language_model: Any) -> None:
    """Padding behind a text changes nothing: neither the tokens before it nor the loss on them."""
    lm = language_model("gpt2", torch.float64)
    for wiring in (Wiring.strictly_causal(lm), Wiring.autoencoder(lm, site="attn_z")):
        crosscoder = tiny.crosscoder_for(lm, wiring=wiring, undecomposed_positions=1)
        keep = torch.zeros(5, 8, dtype=torch.bool)
        keep[:, :6] = True
        masked = measure_fidelity(lm, crosscoder, prompts(), keep_RT=keep, rows_per_pass=2)
        short = measure_fidelity(lm, crosscoder, prompts()[:, :6])
        assert masked.n_tokens == 5 * 5
        for ours, theirs in zip(masked, short, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_training_crosscoder_is_measured_as_it_will_be_used(language_model: Any) -> None:
    """Scaled weights in training mode give the numbers of the folded crosscoder in evaluation mode, and stay as they were."""
    lm = language_model("gpt2", torch.float64)
    wiring = Wiring.weakly_causal(lm)
    scales = {site: 0.5 + site.layer for site in wiring.write_sites}
    scaled, folded = (tiny.crosscoder_for(lm, wiring=wiring, activation=BatchTopK(6), skip=True) for _ in range(2))
    for crosscoder in (scaled, folded):
        crosscoder.threshold.fill_(0.4)
    folded.fold_input_scale(scales, scales)
    before = {name: value.clone() for name, value in scaled.state_dict().items()}
    ours = measure_fidelity(lm, scaled.train(), prompts(), scales=scales)
    for value, theirs in zip(ours, measure_fidelity(lm, folded.eval(), prompts()), strict=True):
        assert value == pytest.approx(theirs, rel=1e-9)
    everything = [protocols([crosscoder]).values() for crosscoder in (scaled, folded)]
    options = [{"means": dict.fromkeys(scales, torch.zeros(32)), "scales": s} for s in (scales, None)]
    for_scaled, for_folded = (
        measure(lm, [crosscoder], batches_of(prompts(), lm), chosen, **option).facts()["protocols"]
        for crosscoder, chosen, option in zip((scaled, folded), everything, options, strict=True)
    )
    for name, facts in for_scaled.items():
        assert facts["kl"] == pytest.approx(for_folded[name]["kl"], rel=1e-8, abs=1e-13), name
    assert scaled.training
    for name, value in scaled.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_one_run_of_the_original_per_pass(language_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("gpt2")
    runs: list[int] = []
    run = lm.parts.run
    monkeypatch.setattr(lm.parts, "run", lambda *arguments: runs.append(1) or run(*arguments))
    measure_fidelity(lm, tiny.crosscoder_for(lm), prompts(), rows_per_pass=5)
    assert len(runs) == 3  # original, spliced, zeroed


def test_an_acausal_crosscoder_reads_clean(language_model: Any) -> None:
    """It cannot read the stream that it replaces, so the spliced model holds its reconstructions of the original one."""
    lm = language_model("gpt2", torch.float64)
    crosscoder, tokens = tiny.crosscoder_for(lm, wiring=Wiring.acausal(lm, site="resid_mid")), prompts()
    sites = crosscoder.wiring.write_sites
    clean = {site: x.flatten(0, 1) for site, x in lm.read(tokens, crosscoder.wiring.read_sites).items()}
    outputs = {site: y.detach() for site, y in crosscoder(clean).reconstructions.items()}
    spliced = lm.run(tokens, {site: (lambda x, site=site: outputs[site].view_as(x)) for site in sites})
    fidelity = measure_fidelity(lm, crosscoder, tokens, rows_per_pass=2)
    p, q = (torch.distributions.Categorical(logits=z) for z in (lm(tokens), spliced))
    assert fidelity.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-9)
    assert fidelity.cross_entropy == pytest.approx(mean_loss(spliced, tokens), rel=1e-10)


def test_rows_of_one_token_have_no_loss(language_model: Any) -> None:
    lm = language_model("gpt2")
    fidelity = measure_fidelity(lm, tiny.crosscoder_for(lm), prompts()[:, :1])
    assert fidelity.cross_entropy is fidelity.cross_entropy_recovered is None
    assert fidelity.kl is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_RT": torch.ones(3, dtype=torch.int64)}, "expected token rows [R, T] with at least one token, got [3]"),
        (
            {"rows_RT": torch.ones(3, 1, dtype=torch.int64)},
            "leaves 1 positions of every row undecomposed, the rows have 1",
        ),
        ({"rows_RT": torch.full((3, 4), 97)}, "token ids must lie in [0, 97)"),
        ({"keep_RT": torch.ones(5, 7, dtype=torch.bool)}, "bool of shape [5, 8], got torch.bool of [5, 7]"),
        ({"keep_RT": torch.ones(5, 8)}, "bool of shape [5, 8], got torch.float32 of [5, 8]"),
        ({"keep_RT": torch.zeros(5, 8, dtype=torch.bool)}, "no token to measure: expected at least one"),
    ],
)
def test_bad_rows_and_masks(language_model: Any, options: dict[str, Any], message: str) -> None:
    lm = language_model("gpt2")
    crosscoder = tiny.crosscoder_for(lm, undecomposed_positions=1)
    with pytest.raises(ValueError, match=re.escape(message)):
        measure_fidelity(lm, crosscoder, **{"rows_RT": prompts(), **options})


def test_crosscoders_of_other_models(language_model: Any) -> None:
    lm = language_model("gpt2")
    diffing = Crosscoder(Wiring.model_diffing(lm, layer=1), n_features=16, activation=TopK(2))
    with pytest.raises(
        ValueError, match=r"model_diffing crosscoder reads resid_post\.1@1 of another model: give others"
    ):
        measure_fidelity(lm, diffing, prompts())
    with pytest.raises(ValueError, match="involves several models: it has no spliced output"):
        measure(lm, [diffing], batches_of(prompts(), lm), protocols([diffing]).values())
    with pytest.raises(ValueError, match="trained on another model: on 'tiny-gpt2'"):
        measure_fidelity(language_model("llama"), tiny.crosscoder_for(lm), prompts())
