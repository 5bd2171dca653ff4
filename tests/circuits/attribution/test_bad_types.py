"""Arguments of a wrong type as a user meets them: in a process of its own, without the type checker that tests run under."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch

from circuits import FeatureTarget, TokenTarget, trace
from replacement import ReplacementModel

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "bytes": ({"targets": b"w5"}, "cannot read target b'w5': expected a text, a token id or one of the target types"),
    "a set": ({"targets": {5}}, "cannot read target {5}"),
    "a float": ({"targets": 5.0}, "cannot read target 5.0"),
    "nothing in a list": ({"targets": [None]}, "cannot read target None"),
    "token as a float": ({"targets": lambda: TokenTarget(5.5)}, "expected the text of a token or its id, got 5.5"),
    "no token": ({"targets": lambda: TokenTarget(None)}, "expected the text of a token or its id, got None"),
    "position as a float": ({"targets": lambda: TokenTarget(5, 2.5)}, "target position must be a whole number, got 2.5"),
    "layer as a float": ({"targets": lambda: FeatureTarget(2.0, 3)}, "the layer of a target must be a whole number, got 2.0"),
    "index as a text": ({"targets": lambda: FeatureTarget(2, "3")}, "the index of a target must be a whole number, got '3'"),
    "coverage as a text": ({"coverage": "0.9"}, "coverage must be a number, got '0.9'"),
    "coverage True": ({"coverage": True}, "coverage must be a number, got True"),
    "no coverage": ({"coverage": None}, "coverage must be a number, got None"),
    "max_nodes as a float": ({"max_nodes": 2.5}, "max_nodes must be a whole number, got 2.5"),
    "max_nodes NaN": ({"max_nodes": float("nan")}, "max_nodes must be a whole number, got nan"),
    "max_nodes as a text": ({"max_nodes": "5"}, "max_nodes must be a whole number, got '5'"),
}  # fmt: skip


def refusals() -> dict[str, str]:
    """What `trace` says to every case."""
    lm = tiny.native_model(torch.float32)
    model, said = ReplacementModel(lm, tiny.crosscoder_for(lm)), {}
    for name, (options, _) in CASES.items():
        try:
            trace(model, tiny.random_tokens(), **{k: v() if callable(v) else v for k, v in options.items()})
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, check=True, timeout=200)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_wrong_types_are_value_errors(said: dict[str, str], name: str) -> None:
    assert said.get(name, "accepted").startswith("ValueError: ")
    assert CASES[name][1] in said[name]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(refusals()))
