"""Models with 16-bit weights: exact work is that of the same weights in float32, and no float32 copy of them remains."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import replacement
from circuits import trace
from replacement import LanguageModel, ReplacementModel, Site
from replacement.language_model.boot import boot
from replacement.language_model.sixteen_bits import BLOCK_BYTES, Unembedding

SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def upcast(model_folder: Callable[[str], Path], stored: LanguageModel, architecture: str) -> LanguageModel:
    """The same weights and buffers, loaded and computed in float32: the oracle."""
    if architecture == "native":
        bridge = tiny.native_model(torch.float32).parts.bridge
    else:
        bridge, _ = boot(model_folder(architecture), dtype=torch.float32, device="cpu")
    stored_model, model = stored.parts.bridge.original_model, bridge.original_model
    tensors = {**dict(stored_model.named_parameters()), **dict(stored_model.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(tensors[name])
    return LanguageModel(bridge)


@EVERYWHERE
@SIXTEEN
def test_a_frozen_prompt_is_that_of_the_same_weights_in_float32(
    language_model: Any, model_folder: Any, architecture: str, dtype: torch.dtype
) -> None:
    lm, prompt = language_model(architecture, dtype), tiny.random_tokens()
    oracle = upcast(model_folder, lm, architecture)
    frozen, expected = lm.freeze(prompt), oracle.freeze(prompt)
    for site, x_TD in expected.activations.items():
        torch.testing.assert_close(frozen.activations[site], x_TD)
    torch.testing.assert_close(frozen.logits_TV, expected.logits_TV)
    for ours, theirs in zip(frozen.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours.weights.W_V_XD, theirs.weights.W_V_XD)
        torch.testing.assert_close(ours.weights.W_O_XD, theirs.weights.W_O_XD)
    assert expected.logit_gap_16bit is None
    own_TV = lm.parts.capture(prompt, set())[0]
    assert own_TV.dtype == dtype, "the model itself still computes in 16 bits"
    gap = (own_TV.float() - lm.parts.soft_cap(expected.logits_TV)).abs().max()
    assert frozen.logit_gap_16bit == pytest.approx(float(gap), rel=1e-3)
    assert frozen.logit_gap_16bit > 0
    for layer in range(lm.shape.n_layers):
        ours, theirs = (model.freeze_query_key(prompt, layer=layer) for model in (lm, oracle))
        torch.testing.assert_close(ours.scores_HTT, theirs.scores_HTT)


@SIXTEEN
def test_a_trace_is_that_of_the_same_weights_in_float32(
    language_model: Any, model_folder: Any, dtype: torch.dtype
) -> None:
    lm = language_model("llama", dtype)
    oracle = upcast(model_folder, lm, "llama")
    crosscoder = tiny.crosscoder_for(lm)
    graph = trace(ReplacementModel(lm, crosscoder), tiny.random_tokens(), targets=[3])
    rounded = crosscoder.to_inference(dtype=dtype).to_inference(dtype=torch.float32)
    rounded.model_fingerprint = oracle.fingerprint
    expected = trace(ReplacementModel(oracle, rounded), tiny.random_tokens(), targets=[3])
    assert graph.identity_error < 1e-4
    assert len(graph.edges) == len(expected.edges) > 100
    np.testing.assert_allclose(graph.nodes.activation, expected.nodes.activation, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(graph.edges.weight, expected.edges.weight, rtol=1e-3, atol=1e-5)
    assert graph.metadata["logit_gap_16bit"] > 0
    assert "logit_gap_16bit" not in expected.metadata


@EVERYWHERE
@SIXTEEN
def test_the_replacement_model_runs_in_16_bits(language_model: Any, architecture: str, dtype: torch.dtype) -> None:
    lm, prompt = language_model(architecture, dtype), tiny.random_tokens()
    model = ReplacementModel(lm, tiny.crosscoder_for(lm))
    assert model.crosscoder.dtype == dtype
    assert model(prompt).dtype == dtype
    kept, original = model(prompt, errors="keep").float(), lm(prompt).float()
    assert (kept - original).abs().max() < 16 * torch.finfo(dtype).eps * original.abs().max()


def reachable_bytes(dtype: torch.dtype) -> int:
    """Bytes of all tensors of a dtype that anything refers to, each storage counted once."""
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) in (Tensor, torch.nn.Parameter) and x.dtype == dtype and x.device.type == "cpu"
    }
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_no_second_copy_of_the_weights_remains(model_folder: Any, dtype: torch.dtype) -> None:
    before = reachable_bytes(torch.float32)
    lm = LanguageModel.from_pretrained(model_folder("llama"), dtype=dtype)
    stored = {id(weight) for weight in lm.parts.bridge.parameters()}
    loaded = reachable_bytes(torch.float32)
    frozen = lm.freeze([5, 6])
    assert {id(weight) for weight in lm.parts.bridge.parameters()} == stored, "the stored weights are back in place"
    held = reachable_bytes(torch.float32) - loaded
    # What is held is activations of two tokens, and norms.
    weights = sum(weight.numel() * 4 for weight in lm.parts.bridge.blocks.parameters())
    assert held < weights / 4
    assert loaded - before < (weights / 4 if dtype == torch.bfloat16 else torch.inf)
    assert frozen.attentions[0].weights.W_O.untyped_storage().data_ptr() in {
        weight.untyped_storage().data_ptr() for weight in lm.parts.bridge.parameters()
    }


def test_a_run_that_fails_puts_the_weights_back(language_model: Any) -> None:
    lm = language_model("gemma2", torch.bfloat16)

    def fail(x: Tensor) -> None:
        raise KeyError

    with pytest.raises(KeyError), lm.parts.exact_arithmetic():
        lm.run(tiny.random_tokens(), {Site(1, "mlp_out"): fail})
    assert {weight.dtype for weight in lm.parts.bridge.parameters()} == {torch.bfloat16}
    assert lm(tiny.random_tokens()).dtype == torch.bfloat16


def test_blocks_of_an_unembedding_give_the_whole_product() -> None:
    generator = torch.Generator().manual_seed(0)
    D = 4096
    V = BLOCK_BYTES // (4 * D) + 5  # one block and a little more
    W_DV, b_V = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((D, V), (V,)))
    x_ND = torch.randn(2, D, generator=generator)
    unembedding = Unembedding(W_DV, b_V, scale=0.5)
    expected = 0.5 * (x_ND.double() @ W_DV.double() + b_V.double())
    torch.testing.assert_close(unembedding.logits(x_ND).double(), expected, rtol=1e-4, atol=1e-3)
    direction_D, bias = unembedding.token(V - 1)
    torch.testing.assert_close((x_ND @ direction_D + bias).double(), expected[:, -1], rtol=1e-4, atol=1e-3)
    direction_D, bias = unembedding.mean()
    torch.testing.assert_close((x_ND @ direction_D + bias).double(), expected.mean(1), rtol=1e-3, atol=1e-3)


def test_auto_takes_the_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert replacement.load(device="auto").language_model.device.type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="dtype: MPS has no float64: expected float32, bfloat16 or float16"):
        replacement.load(device="auto", dtype="float64")
