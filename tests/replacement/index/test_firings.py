"""Firings against dense activations of every feature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from replacement import JointTopK, JumpReLU, ReplacementModel, TopK, Wiring
from replacement.index import firings
from replacement.index.firings import firings_of

ROWS = torch.stack([tiny.random_tokens(12, seed=seed) for seed in range(7)])
ROWS[:, 0] = 1  # the beginning-of-sequence token
ROWS[2, 5] = 1


def dense(model: ReplacementModel, part: str = "mlp") -> np.ndarray:
    """Activations [R, T, G, F] of each row on its own."""
    crosscoder = model.crosscoders[part]
    acts = []
    for row_T in ROWS:
        features = crosscoder.encode(model.language_model.read(row_T, crosscoder.wiring.read_sites))
        acts.append(torch.stack([features.dense(group) for group in range(crosscoder.n_groups)], 1))
    return torch.stack(acts).detach().numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"activation": TopK(5)},
        {"activation": TopK(5, relu=False), "undecomposed_positions": 1},
        {"activation": JointTopK(9)},
        {"activation": JumpReLU(threshold=0.2)},
        {"wiring": "per_layer"},
    ],
    ids=str,
)
def test_every_positive_activation_is_found(language_model: Any, options: dict[str, Any], monkeypatch: Any) -> None:
    lm = language_model("llama")
    options = {**options, "wiring": Wiring.per_layer(lm)} if "wiring" in options else options
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, **options))
    acts = dense(model)
    counted = np.ones(ROWS.shape, dtype=bool)
    counted[2, 5] = False
    counted[:, : options.get("undecomposed_positions", 0)] = False
    acts[~counted] = 0
    whole = firings_of(model, ROWS)
    monkeypatch.setattr(firings, "TOKENS_PER_PASS", 30)
    in_passes = firings_of(model, ROWS.numpy())
    for found in (whole, in_passes):
        assert np.array_equal(found.counted_RT, counted)
        assert found.n_tokens == counted.sum()
        assert np.array_equal(found.tokens_RT, ROWS.numpy())
        order = np.lexsort((found.index, found.position, found.row, found.layer))
        assert np.array_equal(order, np.arange(len(found)))
        scattered = np.zeros_like(acts)
        scattered[found.row, found.position, found.layer, found.index] = found.activation
        assert len(found) == (acts > 0).sum() > 0
        np.testing.assert_allclose(scattered, np.maximum(acts, 0), rtol=1e-4, atol=1e-5)


def test_features_of_attention(language_model: Any) -> None:
    lm = language_model("llama")
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=attention)
    acts = dense(model, "attention")
    acts[2, 5] = 0
    assert len(firings_of(model, ROWS, part="attention")) == (acts > 0).sum() > 0
    with pytest.raises(ValueError, match="part: expected 'mlp', got 'attention'"):
        firings_of(ReplacementModel(lm, model.crosscoder), ROWS, part="attention")
