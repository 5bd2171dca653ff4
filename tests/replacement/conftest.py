"""Small random crosscoders of every family, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest
import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring

# A busy machine makes single examples slow now and then; correctness is what is tested.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

SHAPE = ModelShape(n_layers=3, d_model=8, n_heads=2, d_head=5)
WIDER = ModelShape(n_layers=5, d_model=12, n_heads=2, d_head=6)
FAMILIES = {
    "autoencoder": Wiring.autoencoder(SHAPE, layers=[0, 2], site="attn_z"),
    "transcoder": Wiring.transcoder(SHAPE, layer=1, read="mlp_in"),
    "per_layer": Wiring.per_layer(SHAPE),
    "strictly_causal": Wiring.strictly_causal(SHAPE),
    "weakly_causal": Wiring.weakly_causal(SHAPE),
    "attention": Wiring.attention(SHAPE),
    "joint": Wiring.joint(SHAPE),
    "acausal": Wiring.acausal(SHAPE),
    "model_diffing": Wiring.model_diffing(SHAPE, layer=1),
    "many_models": Wiring.model_diffing([SHAPE, WIDER, SHAPE, WIDER], layer=[1, 4, 0, 2]),
}

CrosscoderFactory = Callable[..., Crosscoder]
InputFactory = Callable[..., dict[Site, Tensor]]


@pytest.fixture(scope="session")
def shape() -> ModelShape:
    """Sizes of the imaginary model the crosscoders below are wired to."""
    return SHAPE


@pytest.fixture(params=FAMILIES, scope="session")
def wiring(request: pytest.FixtureRequest) -> Wiring:
    """Every family in turn."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def random_crosscoder() -> CrosscoderFactory:
    """`random_crosscoder(wiring, activation=..., seed=..., ...)`: fp64, every weight random, thresholds positive."""

    def build(wiring: Wiring, *, activation: Activation | None = None, seed: int = 0, **options: object) -> Crosscoder:
        options = {"n_features": 16, "dtype": torch.float64, **options}
        crosscoder = Crosscoder(wiring, activation=activation or TopK(3), seed=seed, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in crosscoder.state_dict().items():
                value.normal_(generator=generator)
                if name in ("threshold", "score_factor"):
                    value.abs_()
        return crosscoder.eval()

    return build


@pytest.fixture(scope="session")
def random_inputs() -> InputFactory:
    """`random_inputs(wiring, n_rows=..., seed=...)`: fp64 activations of every read site."""

    def build(wiring: Wiring, *, n_rows: int = 7, seed: int = 1) -> dict[Site, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            site: torch.randn(n_rows, wiring.width(site), dtype=torch.float64, generator=generator)
            for site in wiring.read_sites
        }

    return build
