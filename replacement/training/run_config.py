"""All settings of a run, and how they are read from a TOML file and from `--set key=value`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import dacite

from replacement.crosscoder.activation import Activation, BatchTopK, JumpReLU, ReLU, TopK
from replacement.training.config import CrosscoderConfig, DataConfig, TrainingConfig
from replacement.training.loss_table import LOSSES
from replacement.training.losses import Loss
from replacement.training.tables import NUMBER_HOOKS, from_table

_ACTIVATION_KINDS: tuple[type[Activation], ...] = (TopK, BatchTopK, JumpReLU, ReLU)
ACTIVATIONS: dict[str, type[Activation]] = {kind.name: kind for kind in _ACTIVATION_KINDS}
"""Every activation function, by name."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run: the sections `data`, `crosscoder` and `training`, and three keys of its own."""

    model: str | list[str] = "demo"
    """Hub name or local Hugging Face folder of the language model, or `demo`; two of them for model diffing."""
    data: DataConfig = field(default_factory=DataConfig)
    crosscoder: CrosscoderConfig = field(default_factory=CrosscoderConfig)
    training: TrainingConfig
    checkpoint_every: int = 500
    """Steps between two checkpoints, each with a measurement on held-out rows; a killed run loses at most these."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be 1 or more, got {self.checkpoint_every}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value; `run_config` reads it back."""
        value = asdict(self)
        value["crosscoder"]["activation"] = self.crosscoder.activation.to_dict()
        value["training"]["losses"] = [loss.to_dict() for loss in self.training.losses]
        return value


def read_config(path: str | Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file.

    Args:
        overrides: `key=value` each, such as `training.n_tokens=1_000_000`; values are TOML, or text if they are not.

    Raises:
        ValueError: the file is missing or not TOML, a key is unknown, or a value has another type or is out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a TOML file with the settings of a training run")
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        _override(value, override)
    try:
        return run_config(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def run_config(value: Mapping[str, Any]) -> RunConfig:
    """Settings from nested dictionaries, as TOML or JSON holds them.

    Raises:
        ValueError: a key is unknown or missing, or a value has another type or is out of range.
    """
    hooks = {Activation: _as_activation, list[Loss]: _as_losses, list[int]: _as_list, **NUMBER_HOOKS}
    try:
        return dacite.from_dict(RunConfig, dict(value), dacite.Config(type_hooks=hooks, strict=True))
    except dacite.UnexpectedDataError as error:
        known = ", ".join(setting_names())
        raise ValueError(f"unknown setting {', '.join(sorted(error.keys))}: expected some of {known}") from None
    except dacite.MissingValueError as error:
        raise ValueError(f"the setting {error.field_path} is missing") from None
    except dacite.DaciteError as error:
        raise ValueError(str(error)) from None


def setting_names() -> list[str]:
    """Dotted names of all settings."""
    names = []
    for own in fields(RunConfig):
        section = _SECTIONS.get(own.name)
        names += [f"{own.name}.{inner.name}" for inner in fields(section)] if section else [own.name]
    return names


_SECTIONS: dict[str, Any] = {"data": DataConfig, "crosscoder": CrosscoderConfig, "training": TrainingConfig}


def _as_activation(value: Any) -> Activation:
    return from_table(value, ACTIVATIONS, what="activation", setting="crosscoder.activation")


def _as_losses(value: Any) -> list[Loss]:
    if not isinstance(value, list):
        example = '[{ name = "l1", coefficient = 1e-3 }]'
        raise ValueError(f"training.losses must be a list of tables such as {example}, got {value!r}")
    return [from_table(entry, LOSSES, what="loss", setting="training.losses") for entry in value]


def _as_list(value: Any) -> Any:
    """Dacite would go through the letters of a text."""
    if not isinstance(value, list):
        raise dacite.WrongTypeError(field_type=list[int], value=value)
    return value


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"expected key=value, such as training.n_tokens=1_000_000; got {override!r}")
    try:
        parsed = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = text
    *sections, name = key.strip().split(".")
    table = value
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"{section} is not a section of the settings, so {key.strip()} cannot be set")
    table[name] = parsed
