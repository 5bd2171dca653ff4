"""Attention crosscoders: spliced into any architecture they reach the residual stream, and training settings build them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from replacement import LanguageModel, Site, Wiring
from replacement.splicing.splice import Splice
from replacement.training.build import Models, build_crosscoder, build_wiring
from replacement.training.config import CrosscoderConfig, TrainingConfig
from replacement.training.reads import choose_reads
from replacement.validation.fidelity import measure_fidelity

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def prompts(n: int = 3) -> Tensor:
    """A batch of random prompts."""
    return torch.stack([tiny.random_tokens(seed=seed) for seed in range(n)])


@EVERYWHERE
@DTYPES
def test_attention_replaced_with_its_errors_is_the_original(
    language_model: Any, architecture: str, dtype: torch.dtype
) -> None:
    lm = language_model(architecture, dtype)
    crosscoder = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    with torch.no_grad():
        kept = Splice(lm, crosscoder, prompts(), errors="keep").run()
        dropped = Splice(lm, crosscoder, prompts()).run()
    torch.testing.assert_close(kept, lm(prompts()), rtol=0, atol=TOLERANCE[dtype])
    assert float((dropped - lm(prompts())).abs().max()) > 0.1  # the random crosscoder is no copy of attention


@EVERYWHERE
def test_what_overwrites_attn_out_is_what_the_stream_gains(language_model: Any, architecture: str) -> None:
    """After a post-norm (Gemma), and beside the MLP in a parallel block (NeoX): stream = before + written + MLP."""
    lm: LanguageModel = language_model(architecture, torch.float64)
    written_BTD = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    kinds = ("resid_pre", "mlp_out", "resid_post")
    hooks: dict[Site, Any] = {Site(1, kind): (lambda x, kind=kind: seen.update({kind: x})) for kind in kinds}
    hooks[Site(1, "attn_out")] = lambda x: written_BTD
    if not lm.shape.parallel:
        hooks[Site(1, "resid_mid")] = lambda x: seen.update(resid_mid=x)
    lm.run(prompts(), hooks)
    middle = seen["resid_pre"] + written_BTD
    torch.testing.assert_close(seen["resid_post"], middle + seen["mlp_out"], rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.get("resid_mid", middle), middle, rtol=0, atol=1e-12)


@EVERYWHERE
def test_the_heads_outputs_decide_the_attention_output(language_model: Any, architecture: str) -> None:
    """`attn_z` is as wide as all heads, and what is put there is what `attn_out` is made of."""
    lm: LanguageModel = language_model(architecture, torch.float64)
    z, out = Site(1, "attn_z"), Site(1, "attn_out")
    acts = lm.read(prompts(), [z, out])
    assert acts[z].shape == (3, 10, lm.shape.width("attn_z"))
    seen: dict[str, Tensor] = {}
    lm.run(prompts(), {z: lambda x: 0 * x, out: lambda x: seen.update(x=x)})
    assert float(seen["x"].std(dim=(0, 1)).max()) < 1e-12, "without the heads only constants are left"
    assert float((seen["x"] - acts[out]).abs().max()) > 1e-2


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox"])
def test_fidelity_of_an_attention_crosscoder(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture)
    fidelity = measure_fidelity(lm, tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)), prompts())
    assert len(fidelity.unexplained) == len(fidelity.l0) == 3
    assert fidelity.kl is not None
    assert fidelity.kl > 1e-3


def test_training_settings_build_one(language_model: Any) -> None:
    lm = language_model("gpt2")
    for read in (None, "attn_z"):
        assert build_wiring(CrosscoderConfig(wiring="attention", read=read), [lm.shape]) == Wiring.attention(lm)
    models = Models((lm,))
    crosscoder = build_crosscoder(
        CrosscoderConfig(wiring="attention"), models, torch.ones(1, 4, dtype=torch.int64), seed=0
    )
    # It is used with its own errors upstream, like a cross-layer transcoder, and so is trained on them.
    assert choose_reads(TrainingConfig(n_tokens=4096), crosscoder.wiring, models) == "subset"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read": "resid_mid"}, "the wiring attention reads attn_z; read='resid_mid' does not apply"),
        ({"layers": [1]}, "the wiring attention covers every layer; layers=[1] does not apply"),
    ],
)
def test_settings_that_do_not_apply(language_model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_wiring(CrosscoderConfig(wiring="attention", **options), [language_model("gpt2").shape])
