"""All activation functions by the names that checkpoints know them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.topk import BatchTopK, JointTopK, TopK


def activation_from_dict(value: Mapping[str, Any]) -> Activation:
    """Read what `Activation.to_dict` wrote.

    Raises:
        ValueError: unknown name, or parameters the function does not have.
    """
    kinds: dict[str, type[Activation]] = {kind.name: kind for kind in (ReLU, JumpReLU, TopK, BatchTopK, JointTopK)}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or value["name"] not in kinds:
        name = value.get("name") if isinstance(value, Mapping) else value
        raise ValueError(f"unknown activation {name!r:.50}: expected one of {', '.join(kinds)}")
    parameters = {name: given for name, given in value.items() if name != "name"}
    kind = kinds[value["name"]]
    expected = [field.name for field in fields(kind)]
    if set(parameters) - set(expected) or ("k" in expected and "k" not in parameters):
        raise ValueError(f"activation {kind.name} has the parameters {expected}, got {sorted(parameters)}")
    for entry in fields(kind):
        if entry.kw_only and not isinstance(parameters.get(entry.name, False), bool):
            raise ValueError(f"{entry.name} of {kind.name} must be true or false, got {parameters[entry.name]!r:.50}")
    if isinstance(parameters.get("k"), list):  # JSON has no tuples
        parameters["k"] = tuple(parameters["k"])
    return kind(**parameters)
