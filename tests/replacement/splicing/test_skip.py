"""Skip connections as one operator: the transpose of itself, and equal to what the crosscoder writes in the model."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from replacement import ReplacementModel, Site, Wiring
from replacement.splicing.skip import SkipTerms, add_terms, read_depth


def mixed_reads(lm: Any) -> Wiring:
    """Groups that read every kind of site on the stream, some of them two at once, and write ahead."""
    mid = "resid_pre" if lm.shape.parallel else "resid_mid"
    reads = (
        (Site(0, "resid_pre"), Site(0, "mlp_in")),
        (Site(0, "resid_post"), Site(1, mid)) if mid == "resid_mid" else (Site(0, "resid_post"),),
        (Site(2, "mlp_in"),),
    )
    writes = tuple(tuple(Site(layer, "mlp_out") for layer in range(group, 3)) for group in range(3))
    widths = dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "mlp_in", "mlp_out"), lm.shape.d_model)
    return Wiring("mixed", reads, writes, widths)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "neox"])
def test_pull_back_is_the_transpose_of_apply(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=mixed_reads(lm), skip=True))
    skips = model.localize(tiny.random_tokens()).skips
    generator = torch.Generator().manual_seed(0)
    L, D, positions_T = 3, lm.shape.d_model, torch.tensor([0, 3, 4, 9])
    streams = {depth: torch.randn(2, 4, D, generator=generator, dtype=torch.float64) for depth in range(2 * L + 1)}
    readers = {layer: torch.randn(2, 4, D, generator=generator, dtype=torch.float64) for layer in range(L)}
    written: dict[int, torch.Tensor] = {}
    for depth, stream in streams.items():
        add_terms(written, skips.apply(stream, depth, positions_T))
    upwards = sum((readers[layer] * y).sum() for layer, y in written.items())
    pulled: dict[int, torch.Tensor] = {}
    for layer, vectors in readers.items():
        add_terms(pulled, skips.pull_back(vectors, layer, positions_T))
    downwards = sum((streams[depth] * v).sum() for depth, v in pulled.items())
    torch.testing.assert_close(upwards, downwards, rtol=1e-12, atol=1e-12)
    assert abs(float(upwards)) > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_apply_and_bias_give_what_the_crosscoder_writes_in_the_model(language_model: Any, architecture: str) -> None:
    """The oracle reads the model's own activations, norms live, and multiplies them with the weights."""
    lm = language_model(architecture, torch.float64)
    crosscoder = tiny.crosscoder_for(lm, wiring=mixed_reads(lm), skip=True)
    tokens_T = tiny.random_tokens()
    local = ReplacementModel(lm, crosscoder).localize(tokens_T)
    streams, positions_T = local.streams(), torch.arange(len(tokens_T))
    mids = lm.read(tokens_T, [Site(layer, "resid_mid") for layer in range(3)] if not lm.shape.parallel else [])
    written = {layer: torch.zeros_like(streams[0]) + local.skips.bias(layer) for layer in range(3)}
    for layer in range(3):
        add_terms(written, local.skips.apply(streams[layer], 2 * layer, positions_T))
        if mids:
            add_terms(written, local.skips.apply(mids[Site(layer, "resid_mid")], 2 * layer + 1, positions_T))
    expected = crosscoder.skip_contribution(lm.read(tokens_T, crosscoder.wiring.read_sites))
    for site, y_TD in expected.items():
        torch.testing.assert_close(written[site.layer], y_TD, rtol=0, atol=1e-10)


def test_a_crosscoder_without_skip_connections_has_no_terms(language_model: Any) -> None:
    lm = language_model("llama", torch.float64)
    skips = ReplacementModel(lm, tiny.crosscoder_for(lm)).localize(tiny.random_tokens()).skips
    x_TD, positions_T = torch.ones(10, lm.shape.d_model, dtype=torch.float64), torch.arange(10)
    assert isinstance(skips, SkipTerms)
    assert not skips
    assert not [*skips.apply(x_TD, 1, positions_T), *skips.pull_back(x_TD, 1, positions_T)]
    assert skips.bias(1) == 0.0


def test_sites_off_the_stream_are_refused_by_name(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    for kind in ("attn_z", "attn_out", "mlp_out"):
        with pytest.raises(ValueError, match=f"{kind}.1 is no reading of the residual stream"):
            read_depth(Site(1, kind), lm.shape)
    for kind in ("attn_z", "attn_out"):
        wiring = Wiring("other", ((Site(1, kind),),), ((Site(1, "mlp_out"),),), {kind: 32, "mlp_out": 32})
        model = ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=wiring))
        assert model(tiny.random_tokens()).shape == (10, 97), "it can be spliced"
        with pytest.raises(ValueError, match=f"cannot attribute features of a crosscoder for MLPs that reads {kind}.1"):
            model.localize(tiny.random_tokens())
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm), skip=True)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=attention)
    with pytest.raises(ValueError, match="an attention crosscoder with skip connections"):
        model.localize(tiny.random_tokens())
