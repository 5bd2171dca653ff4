"""The site `mlp_normalized`: the output of the norm in front of the MLP before its gain and offset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import SETTINGS
from torch import Tensor

from circuits import trace
from replacement import Crosscoder, LanguageModel, ReLU, ReplacementModel, Site, Wiring
from replacement.language_model.architectures import ARCHITECTURES

EXTRA = {"Phi (one norm for both)": "Phi", "OLMo (no gain)": "OLMo"}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, language_model: Any) -> Any:
    """Models of the shared fixture, and two whose norms are shared by attention and MLP or have no gain."""

    def make(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
        if name not in EXTRA:
            return language_model(name, dtype)
        row = next(row for row in ARCHITECTURES if row.name == EXTRA[name])
        folder = tmp_path_factory.mktemp("model")
        return LanguageModel.from_pretrained(tiny.write_model(row.model_class, SETTINGS[row.name], folder), dtype=dtype)

    return make


def stream_site(lm: LanguageModel, layer: int) -> Site:
    return Site(layer, "resid_pre" if lm.shape.parallel else "resid_mid")


def by_hand(name: str, lm: LanguageModel, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in front of an MLP before its gain, the gain and the offset, from the stream and Hugging Face's own weights."""
    block = lm.parts.bridge.blocks[layer]
    if name == "olmo2":  # no norm there
        return x, torch.ones(()), torch.zeros(())
    norm = block.ln1 if name.startswith("Phi") else block.ln2
    stored = dict(norm.original_component.named_parameters())
    centred = x - x.mean(-1, keepdim=True) if name in ("gpt2", "neox", *EXTRA) else x
    epsilon = 1e-6 if name in ("gemma2", "llama") else 1e-5
    gain = stored.get("weight", torch.ones(())) + (1 if name == "gemma2" else 0)
    scale = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return centred / scale, gain, stored.get("bias", torch.zeros(()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "olmo2", *EXTRA])
def test_values_equal_those_computed_by_hand(load: Any, name: str) -> None:
    lm, tokens = load(name), tiny.random_tokens()
    sites = [Site(layer, "mlp_normalized") for layer in range(lm.shape.n_layers)]
    frozen = lm.freeze(tokens, sites=sites)
    shown = lm.read(tokens, [*sites, *(Site(site.layer, "mlp_in") for site in sites)])
    for site in sites:
        stream = stream_site(lm, site.layer)
        x_TD, gain, offset = by_hand(name, lm, site.layer, lm.read(tokens, [stream])[stream])
        torch.testing.assert_close(shown[site], x_TD, rtol=0, atol=1e-12)
        torch.testing.assert_close(frozen.activations[site], x_TD, rtol=0, atol=1e-12)
        torch.testing.assert_close(shown[Site(site.layer, "mlp_in")], x_TD * gain + offset, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "neox", "Phi (one norm for both)"])
def test_reading_changes_nothing_and_a_replacement_reaches_the_mlp_alone(load: Any, name: str) -> None:
    lm, tokens, site = load(name, torch.float32), tiny.random_tokens(), Site(1, "mlp_normalized")
    assert torch.equal(lm.run(tokens, {site: lambda x: None}), lm(tokens))
    written = {}

    def keep(kind: str) -> Any:
        return lambda x: written.update({kind: x[0]})

    double = {site: lambda x: 2 * x, **{Site(1, kind): keep(kind) for kind in ("attn_out", "mlp_in")}}
    lm.run(tokens, double)
    clean = lm.read(tokens, [site, Site(1, "mlp_in"), Site(1, "attn_out")])
    torch.testing.assert_close(written["attn_out"], clean[Site(1, "attn_out")], rtol=0, atol=0)
    offset = lm.parts.norm_weights(lm.parts.norm_before(1, "mlp")).bias_D
    torch.testing.assert_close(
        written["mlp_in"] - offset, 2 * (clean[Site(1, "mlp_in")] - offset), rtol=1e-4, atol=1e-4
    )


def test_a_held_norm_divides_by_the_scale_it_is_held_at(load: Any) -> None:
    lm, tokens, site, seen = load("gpt2"), tiny.random_tokens(), Site(1, "mlp_normalized"), []
    clean = lm.read(tokens, [site])[site]
    hooks = {Site(1, "resid_mid"): lambda x: 3 * x, site: lambda x: seen.append(x[0])}
    lm.run(tokens, hooks, norm_scales=lm.read_norm_scales(tokens))
    torch.testing.assert_close(seen[0], 3 * clean, rtol=0, atol=1e-11)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "neox", "olmo2"])
def test_the_same_function_read_before_and_after_the_gain(load: Any, name: str, skip: bool) -> None:
    """With the gain and offset folded into the encoder (and skip matrices) everything is the same, the graph included."""
    lm, tokens = load(name), tiny.random_tokens()
    behind = tiny.crosscoder_for(lm, wiring=Wiring.per_layer(lm, read="mlp_in"), activation=ReLU(), skip=skip)
    before = Crosscoder(
        Wiring.per_layer(lm, read="mlp_normalized"), n_features=48, activation=ReLU(), skip=skip, dtype=lm.dtype
    )
    tensors = dict(behind.state_dict())
    for layer in range(lm.shape.n_layers):
        _, gain, offset = by_hand(name, lm, layer, torch.zeros(1, lm.shape.d_model, dtype=lm.dtype))
        gain_D, offset_D = (value.detach().expand(lm.shape.d_model).to(lm.dtype) for value in (gain, offset))
        tensors[f"W_enc.{layer}"] = behind.W_enc[layer] * gain_D
        tensors[f"b_enc.{layer}"] = behind.b_enc[layer] + behind.W_enc[layer] @ offset_D
        if skip:
            tensors[f"W_skip.{layer}"] = behind.W_skip[layer] * gain_D
            tensors[f"b_dec.{layer}"] = behind.b_dec[layer] + behind.W_skip[layer] @ offset_D
    before.load_state_dict(tensors)
    models = [ReplacementModel(lm, crosscoder) for crosscoder in (behind, before)]
    for options in ({}, {"reads": "clean"}, {"patterns": "frozen", "layers": [1]}):
        logits = [model(tokens, **options) for model in models]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-9)
    graphs = [trace(model, tokens, coverage=1.0) for model in models]
    assert graphs[0].nodes.ids() == graphs[1].nodes.ids()
    assert np.array_equal(graphs[0].edges.source, graphs[1].edges.source)
    np.testing.assert_allclose(graphs[0].edges.weight, graphs[1].edges.weight, rtol=0, atol=1e-6)
    np.testing.assert_allclose(graphs[0].nodes.bias, graphs[1].nodes.bias, rtol=0, atol=1e-9)


def test_it_is_no_site_of_a_layer_that_does_not_exist(load: Any) -> None:
    with pytest.raises(ValueError, match=r"the language model has no site mlp_normalized\.7: it has 3 layers"):
        load("gpt2").run(tiny.random_tokens(), {Site(7, "mlp_normalized"): lambda x: None})


def test_checkpoints_name_it(load: Any, tmp_path: Path) -> None:
    wiring = Wiring.strictly_causal(load("gpt2"), read="mlp_normalized")
    assert Wiring.from_dict(wiring.to_dict()) == wiring
    assert wiring.is_causal
    assert str(wiring.read_sites[0]) == "mlp_normalized.0"
