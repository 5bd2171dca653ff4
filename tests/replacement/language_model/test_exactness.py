"""What is rebuilt from frozen parts is compared position by position: a massive first token hides no error behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from replacement import LanguageModel, Site
from replacement.language_model.bridge_parts import BridgeParts
from replacement.language_model.frozen_layers import FrozenAttention, FrozenNorm
from replacement.language_model.queries_and_keys import FrozenQueryKey, QueryKeyWeights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


@pytest.fixture(scope="module")
def massive(model_folder: Callable[[str], Path]) -> Callable[..., tuple[LanguageModel, Tensor]]:
    """`massive(architecture, dtype)`: a model of its own whose first token is 1,000 times larger, and a prompt for it."""
    loaded: dict[Any, tuple[LanguageModel, Tensor]] = {}

    def load(architecture: str, dtype: torch.dtype) -> tuple[LanguageModel, Tensor]:
        if (architecture, dtype) not in loaded:
            if architecture == "native":
                lm = tiny.native_model(dtype)
            else:
                lm = LanguageModel.from_pretrained(model_folder(architecture), dtype=dtype)
            loaded[architecture, dtype] = lm, tiny.with_massive_first_token(lm)
        return loaded[architecture, dtype]

    return load


@EVERYWHERE
@DTYPES
def test_the_correct_model_passes(massive: Any, architecture: str, dtype: torch.dtype) -> None:
    lm, prompt = massive(architecture, dtype)
    sites = [Site(layer, kind) for layer in range(lm.shape.n_layers) for kind in ("resid_post", "attn_z")]
    frozen = lm.freeze(prompt, sites=sites)
    size_T = frozen.activations[Site(1, "resid_post")].abs().amax(-1)
    assert size_T[0] > 1000 * size_T[1:].max(), "the first token is not massive"
    for layer in range(lm.shape.n_layers):
        lm.freeze_query_key(prompt, layer=layer)


def _wrong(x_T: Tensor) -> Tensor:
    """5 % wrong at the positions 1 to 7 (axis -2)."""
    factor_T1 = torch.ones_like(x_T[..., :1])
    factor_T1[..., 1:8, :] = 1.05
    return x_T * factor_T1


def _break_hook(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Stands for a model that computes something else there: it shows another activation than the parts sum to."""
    original = BridgeParts.capture

    def capture(self: BridgeParts, *given: Any) -> Any:
        logits, cache = original(self, *given)
        return logits, {hook: _wrong(x) if hook == name else x for hook, x in cache.items()}

    monkeypatch.setattr(BridgeParts, "capture", capture)


def _break_method(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *given: _wrong(original(self, *given)))


@EVERYWHERE
@DTYPES
@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("blocks.1.hook_resid_post", "residual sum of layer 1"),
        ("blocks.1.hook_resid_pre", "residual sum of layer 0"),
        ("blocks.0.hook_resid_pre", "embedding"),
        ("ln_final.hook_in", "residual sum of layer "),
        ((FrozenAttention, "apply"), "attention of layer 0"),
        ((FrozenAttention, "z"), "mixed values of layer 0"),
        ((FrozenNorm, "apply"), "MLP norm of layer 0"),
        ((BridgeParts, "soft_cap"), "unembedding"),
    ],
    ids=lambda given: given if isinstance(given, str) else given[1],
)
def test_a_part_that_is_5_percent_wrong_behind_the_first_token_is_refused(
    massive: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype, broken: Any, part: str
) -> None:
    lm, prompt = massive(architecture, dtype)
    if isinstance(broken, str):
        _break_hook(monkeypatch, broken)
    else:
        _break_method(monkeypatch, *broken)
    with pytest.raises(ValueError, match=rf"cannot be linearised exactly: the {part}.* relative at position [1-7]$"):
        lm.freeze(prompt, sites=[Site(0, "attn_z")])


@EVERYWHERE
@DTYPES
def test_scores_that_are_5_percent_wrong_behind_the_first_token_are_refused(
    massive: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype
) -> None:
    lm, prompt = massive(architecture, dtype)
    _break_method(monkeypatch, FrozenQueryKey, "scores")
    with pytest.raises(ValueError, match=r"layer 1, rebuilt .* relative in head \d at position [1-7]$"):
        lm.freeze_query_key(prompt, layer=1)


@EVERYWHERE
@DTYPES
def test_a_softmax_of_other_scores_is_refused(
    massive: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype
) -> None:
    """The scores agree, but the model attends by something else: what `cap` makes of them is wrong."""
    lm, prompt = massive(architecture, dtype)
    _break_method(monkeypatch, QueryKeyWeights, "cap")
    with pytest.raises(ValueError, match=r"layer 1, rebuilt .* relative in head \d at position [1-7]$"):
        lm.freeze_query_key(prompt, layer=1)


@DTYPES
def test_heads_that_cancel_are_exact_up_to_rounding(model_folder: Callable[[str], Path], dtype: torch.dtype) -> None:
    """Layer 1 writes rounding noise alone, by which an error must not be measured."""
    lm = LanguageModel.from_pretrained(model_folder("gpt2"), dtype=dtype)
    attention = lm.parts.bridge.blocks[1].attn
    with torch.no_grad():
        for part in (attention.q, attention.k, attention.v):
            for name in ("weight", "bias"):
                tensor = getattr(part.original_component, name)
                tensor.copy_(tensor.reshape(4, 8, -1)[[0, 0, 1, 1]].reshape(tensor.shape))
        out = attention.o.original_component
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)[:, None, None]
        out.weight.copy_((sign * out.weight.reshape(4, 8, 32)[[0, 0, 1, 1]]).view(32, 32))
        out.bias.zero_()
    frozen = lm.freeze(tiny.random_tokens(), sites=[Site(1, "attn_out")])
    noise = float(frozen.activations[Site(1, "attn_out")].abs().max())
    assert noise < 1e3 * torch.finfo(dtype).eps
