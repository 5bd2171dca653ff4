"""Bad arguments as a user meets them: in a process of its own, without the type checker that tests run under."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from replacement.crosscoder.activation import ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring

SHAPE = ModelShape(n_layers=2, d_model=4, n_heads=2, d_head=3)
WIRING = Wiring.strictly_causal(SHAPE)
READ, WRITE = Site(0, "resid_mid"), Site(0, "mlp_out")


def made(**options: Any) -> Crosscoder:
    return Crosscoder(**{"wiring": WIRING, "n_features": 8, "activation": TopK(2), "seed": 0} | options)


def encoded(value: Any, **options: Any) -> Features:
    return made(undecomposed_positions=1).encode({site: value for site in WIRING.read_sites}, **options)


def columns(**changes: Any) -> Features:
    whole = torch.zeros(2, dtype=torch.int64)
    given = {"group": whole, "row": whole, "index": torch.arange(2), "activation": torch.ones(2)} | changes
    return Features.from_unsorted(**given, n_rows=3, n_groups=2, n_features=8)


X, NAN = torch.zeros(3, 4), torch.tensor([[float("nan")] * 4] * 3)
CASES: dict[str, tuple[Callable[[], object], str]] = {
    "n_features float": (lambda: made(n_features=16.0), "n_features must be a whole number, got 16.0"),
    "n_features bool": (lambda: made(n_features=True), "n_features must be a whole number, got True"),
    "n_features huge": (lambda: made(n_features=10**15), "no memory for 2 groups of 1000000000000000 features"),
    "n_features beyond 64 bits": (lambda: made(n_features=10**30), "n_features must be below 2^63"),
    "dtype int64": (lambda: made(dtype=torch.int64), "the dtype of a crosscoder must be one of float32"),
    "dtype fp8": (lambda: made(dtype=torch.float8_e4m3fn), "float16; got float8_e4m3fn"),
    "activation by name": (lambda: made(activation="topk"), "activation must be of type Activation, got 'topk'"),
    "tied text": (lambda: made(tied="no"), "tied must be of type bool, got 'no'"),
    "seed": (lambda: made(seed=-1), "seed must be 0 or more, got -1"),
    "wiring": (lambda: made(wiring=SHAPE), "wiring must be of type Wiring, got ModelShape"),
    "k float": (lambda: TopK(2.0), "k must be a whole number, got 2.0"),
    "layer": (lambda: Site(1.5, "mlp_out"), "the layer of a site must be a whole number, got 1.5"),
    "sites as text": (lambda: Wiring("x", (("a",),), (("b",),), {}), "group 0 reads must be a tuple of sites, got"),
    "width": (lambda: Wiring("x", ((READ,),), ((READ,),), {"resid_mid": 0}), "the width at resid_mid must be 1 or"),
    "float indices": (lambda: made().decoder_vectors(0, torch.zeros(2), WRITE), "must be a 1-D tensor of torch.int64"),
    "bool indices": (lambda: made().decoder_vectors(0, torch.ones(8) > 0, WRITE), "torch.int64, got torch.bool [8]"),
    "negative index": (
        lambda: made().decoder_vectors(0, torch.tensor([-1]), WRITE),
        "must lie in 0 to 7, got -1 to -1",
    ),
    "no such group": (lambda: made().encode_group(2, {READ: X}), "there is no group 2: this crosscoder has groups 0"),
    "group of features": (lambda: encoded(X).of(-1), "there is no group -1: these features have groups 0 to 1"),
    "float64 inputs": (lambda: encoded(X.double()), "holds torch.float64 on cpu, the weights are torch.float32"),
    "bool inputs": (lambda: encoded(X > 0), "the input at resid_mid.0 holds torch.bool on cpu"),
    "NaN inputs": (lambda: encoded(NAN), "the input at resid_mid.0 holds NaN or infinite values"),
    "huge inputs": (lambda: encoded(X + 1e38), "holds values up to 1e+38: expected magnitudes of at most 1e+18"),
    "positions": (lambda: encoded(X + 1, positions=torch.arange(2)), "one torch.int64 number for each of 3 rows"),
    "rows": (
        lambda: Crosscoder(Wiring.acausal(SHAPE), n_features=8, activation=ReLU()).encode(
            {Site(0, "resid_post"): X, Site(1, "resid_post"): X[:2]}
        ),
        "the input at resid_post.1 has 2 rows, that of other sites 3",
    ),
    "float64 features": (
        lambda: made().decode(encoded(X + 1).to(dtype=torch.float64)),
        "the weights are torch.float32",
    ),
    "float column": (lambda: columns(index=torch.arange(2.0)), "index must be a 1-D tensor of torch.int64"),
    "whole activations": (lambda: columns(activation=torch.arange(2)), "must be one of float32, float64"),
    "NaN activation": (lambda: columns(activation=NAN[0, :2]), "activation holds NaN or infinite values"),
    "huge activation": (lambda: columns(activation=torch.full((2,), 1e38)), "activation holds values up to 1e+38"),
    "lengths": (lambda: columns(activation=torch.ones(3)), "must be 1-D and have one length"),
    "scale": (lambda: made().fold_input_scale({READ: float("inf")}), "the scale for resid_mid.0 must be at most 1e+18"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    """Type and message of what every case raises."""
    return json.loads(subprocess.run([sys.executable, __file__], capture_output=True, check=True, timeout=200).stdout)


@pytest.mark.parametrize("name", CASES)
def test_every_mistake_is_one_clear_error(name: str, outcomes: dict[str, list[str]]) -> None:
    kind, message = outcomes[name]
    assert kind == "ValueError", message
    assert CASES[name][1] in message
    assert "\n" not in message


def main() -> None:
    """Print what every case raises, as JSON."""
    found = {}
    for name, (call, _) in CASES.items():
        try:
            call()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = ["nothing", "was accepted"]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
