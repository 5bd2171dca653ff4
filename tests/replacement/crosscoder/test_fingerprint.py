"""A fingerprint changes with everything that changes what a crosscoder computes, and with nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import replacement.crosscoder.fingerprint
import replacement.crosscoder.weights
from replacement.crosscoder import checkpoint
from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.crosscoder.wiring import Wiring

SHAPE = ModelShape(n_layers=3, d_model=8, n_heads=2, d_head=5)
CLT = Wiring.strictly_causal(SHAPE)


def test_every_setting_counts(random_crosscoder: Any) -> None:
    crosscoders = [
        random_crosscoder(wiring, **options)
        for wiring, options in [
            (CLT, {}),
            (CLT, {"activation": TopK(5)}),
            (CLT, {"activation": TopK((3, 3, 2))}),
            (CLT, {"activation": ReLU()}),
            (CLT, {"activation": JumpReLU()}),
            (CLT, {"activation": BatchTopK(3)}),
            (CLT, {"undecomposed_positions": 1}),
            (CLT, {"tied": True}),
            (CLT, {"skip": True}),
            (CLT, {"n_features": 17}),
            (Wiring.strictly_causal(SHAPE, read="mlp_in"), {}),
            (Wiring.per_layer(SHAPE), {}),
        ]
    ]
    prints = [crosscoder.fingerprint for crosscoder in crosscoders]
    assert len(set(prints)) == len(crosscoders)
    assert all(text.startswith("2:") and len(text) == 18 for text in prints)


@pytest.mark.parametrize("activation", [JumpReLU(), BatchTopK(3)], ids=lambda a: a.name)
def test_every_value_of_every_tensor_counts(activation: Any, random_crosscoder: Any) -> None:
    crosscoder = random_crosscoder(CLT, activation=activation, skip=True)
    before, seen = crosscoder.fingerprint, set()
    for value in crosscoder.state_dict().values():
        for place in (0, value.numel() // 2, value.numel() - 1):
            flat = value.view(-1)
            kept = flat[place].clone()
            flat[place] += 1
            seen.add(crosscoder.fingerprint)
            flat[place] = kept
        assert crosscoder.fingerprint == before
    assert len(seen) == 3 * len(crosscoder.state_dict())
    assert before not in seen


def test_the_dtype_of_the_weights_and_the_name_of_the_model_do_not_count(
    random_crosscoder: Any, tmp_path: Path
) -> None:
    crosscoder = random_crosscoder(CLT, dtype=torch.float32, activation=JumpReLU())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert crosscoder.to_inference(dtype=dtype).fingerprint == crosscoder.fingerprint
        checkpoint.save(crosscoder, tmp_path / "c", dtype=dtype)
        assert checkpoint.load(tmp_path / "c").fingerprint == crosscoder.fingerprint
    named = random_crosscoder(CLT, dtype=torch.float32, activation=JumpReLU(), model_name="m", model_fingerprint="f")
    assert named.train().fingerprint == crosscoder.fingerprint


def test_it_is_computed_again_only_after_a_change(random_crosscoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> str:
        calls.append(arguments)
        return replacement.crosscoder.fingerprint.fingerprint(*arguments)

    monkeypatch.setattr(replacement.crosscoder.weights, "fingerprint", counted)
    crosscoder = random_crosscoder(CLT, activation=BatchTopK(3))
    prints = [crosscoder.fingerprint, crosscoder.fingerprint]
    assert (len(calls), len(set(prints))) == (1, 1)
    optimizer = torch.optim.SGD(crosscoder.parameters(), lr=0.1)
    crosscoder.b_dec[0].sum().backward()
    optimizer.step()
    prints.append(crosscoder.fingerprint)
    crosscoder.load_state_dict(random_crosscoder(CLT, activation=BatchTopK(3), seed=3).state_dict())
    prints.append(crosscoder.fingerprint)
    crosscoder.activation = BatchTopK(4)
    prints.append(crosscoder.fingerprint)
    with torch.inference_mode():
        twin = random_crosscoder(CLT, activation=BatchTopK(4), seed=3)
        assert twin.fingerprint == prints[-1]
        twin.b_dec[0].add_(1)
        prints.append(twin.fingerprint)
    assert len(set(prints)) == 5


def test_the_legacy_form_is_that_of_earlier_versions(random_crosscoder: Any) -> None:
    """Their graphs and checkpoints hold it; it ignored the activation and all buffers."""
    crosscoder = random_crosscoder(CLT, n_features=2000, dtype=torch.float32)
    digest = hashlib.sha256()
    for name in sorted(dict(crosscoder.named_parameters())):
        flat = crosscoder.get_parameter(name).detach().flatten()
        sample = flat[:: max(1, len(flat) // 4096)]
        digest.update(sample.to(torch.bfloat16).float().numpy().tobytes())
    assert crosscoder.legacy_fingerprint == digest.hexdigest()[:16]


RECORDED = {
    "autoencoder": "2:0ec44302670472b6",
    "transcoder": "2:1982aba1448b7de5",
    "per_layer": "2:c36dfc2b252be21d",
    "strictly_causal": "2:a10dfe28caa56564",
    "weakly_causal": "2:f72858794f6ffb19",
    "attention": "2:11082d6e08da42a8",
    "joint": "2:0dde88a4874a3b13",
    "acausal": "2:ffa2d4e88792aab0",
    "model_diffing": "2:30cefaa7ef19a753",
    "many_models": "2:e3fc66da1beda7e0",
}
"""As graphs and checkpoints hold them."""


def test_fingerprints_of_every_family_stay_what_they_are(wiring: Wiring, request: pytest.FixtureRequest) -> None:
    crosscoder = Crosscoder(wiring, n_features=4, activation=TopK(2), dtype=torch.float64)
    with torch.no_grad():
        for value in crosscoder.state_dict().values():
            value.copy_(torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape))
    assert crosscoder.fingerprint == RECORDED[request.node.callspec.params["wiring"]]
