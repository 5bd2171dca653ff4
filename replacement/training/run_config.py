"""How the settings of a run are read from a TOML file and from `--set key=value`, with every type checked."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import dacite

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.files import read_text
from replacement.training.config import RunConfig
from replacement.training.dead_features import Auxiliary, PreActivation
from replacement.training.losses import Loss, Strongest
from replacement.training.model_losses import JacobianMatching, OutputKL
from replacement.training.penalties import Distance, L1OfNorms, L2OfNorms, Tanh
from replacement.training.settings import settings_table

Kind = TypeVar("Kind", Activation, Loss)

ACTIVATIONS: dict[str, type[Activation]] = {kind.name: kind for kind in (TopK, BatchTopK, JumpReLU, ReLU)}
"""Every activation function, by name."""
LOSSES: dict[str, type[Loss]] = {
    kind.name: kind
    for kind in (L1OfNorms, L2OfNorms, Tanh, Distance, PreActivation, Auxiliary, Strongest, JacobianMatching, OutputKL)
}
"""Every loss besides the reconstruction, by name."""

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "int | tuple[int, ...]": "a whole number, or a list of whole numbers",
    "str | list[str]": "text, or a list of texts",
    "list[int]": "a list of whole numbers",
    **dict.fromkeys(("DataConfig", "CrosscoderConfig", "TrainingConfig", "LanguageModelConfig"), "a table of settings"),
}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def read_config(path: str | Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file.

    Args:
        overrides: `key=value` texts, such as `training.n_tokens=1_000_000`; values are TOML, or text if they are not.

    Raises:
        ValueError: the file is missing or not TOML, a key is unknown, or a value has another type or is out of range.
    """
    text = read_text(path, expected="a TOML file with the settings of a training run")
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
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
    hooks: dict[Any, Callable[[Any], Any]] = {
        Activation: partial(_from_table, kinds=ACTIVATIONS, what="activation", setting="crosscoder.activation"),
        list[Loss]: _as_losses,
        list[int]: _as_list,
        **_NUMBERS,
    }
    try:
        return dacite.from_dict(RunConfig, dict(value), dacite.Config(type_hooks=hooks, strict=True))
    except dacite.UnexpectedDataError as error:
        given, known = (
            ", ".join(map(_short_text, sorted(error.keys))),
            ", ".join(setting.name for setting in settings_table()),
        )
        raise ValueError(f"unknown setting {given}: expected some of {known}") from None
    except dacite.MissingValueError as error:
        raise ValueError(f"the setting {error.field_path} is missing") from None
    except dacite.WrongTypeError as error:
        raise ValueError(_wrong_type(str(error.field_path), _type_name(error.field_type), error.value)) from None


# Numbers and lists, stricter than dacite takes them -------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    """Dacite would go through the letters of a text."""
    if not isinstance(value, list):
        raise dacite.WrongTypeError(field_type=list[int], value=value)
    return value


def _number(kind: type[int] | type[float]) -> Callable[[Any], Any]:
    """TOML writes 1 for a float of value 1; true is no number, although Python takes it for one."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
            raise dacite.WrongTypeError(field_type=kind, value=value)
        return float(value) if kind is float and isinstance(value, int) else value

    return check


_NUMBERS: dict[Any, Callable[[Any], Any]] = {int: _number(int), float: _number(float)}


# Tables that choose a kind by name ------------------------------------------------------------------------------------


def _as_losses(value: Any) -> list[Loss]:
    if not isinstance(value, list):
        example = '[{ name = "l1", coefficient = 1e-3 }]'
        raise ValueError(f"training.losses must be a list of tables such as {example}, got {_short.repr(value)}")
    return [_from_table(entry, LOSSES, what="loss", setting="training.losses") for entry in value]


def _from_table(value: Any, kinds: Mapping[str, type[Kind]], *, what: str, setting: str) -> Kind:
    """The object that a table describes: `name` chooses its class, the other entries are its parameters.

    Args:
        kinds: dataclasses by name; fields that are keyword-only or do not count in comparisons are no parameters.
        what: what the classes are, for messages.
        setting: dotted name of the setting.
    """
    if not isinstance(value, Mapping):
        example = f'{{ name = "{next(iter(kinds))}", ... }}'
        raise ValueError(f"{setting} must be a table such as {example}, got {_short.repr(value)}")
    given = dict(value)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(
            f"unknown {what} {_short.repr(name)}: expected one of {', '.join(kinds)} as the name in {setting}"
        )
    known: dict[str, Field[Any]] = {
        field.name: field for field in fields(kinds[name]) if field.compare and not field.kw_only
    }
    needed = [key for key, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    if set(given) - set(known) or set(needed) - set(given):
        needs = f", needs {needed}" if needed else ""
        raise ValueError(f"the {what} {name} has the parameters {list(known)}{needs}; got {_short.repr(sorted(given))}")
    arguments = {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in given.items()}
    try:
        for key in arguments:
            if arguments[key] == ():
                raise dacite.WrongTypeError(field_path=key, field_type=int, value=())
        return dacite.from_dict(kinds[name], arguments, dacite.Config(type_hooks=_NUMBERS))
    except dacite.DaciteFieldError as error:
        key = str(error.field_path).split(".")[0]
        raise ValueError(_wrong_type(f"{setting}.{key} of {name}", str(known[key].type), given[key])) from None


def _wrong_type(setting: str, type_name: str, value: object) -> str:
    return f"{setting} must be {_EXPECTED.get(type_name, type_name)}, got {_short.repr(value)}"


def _type_name(kind: Any) -> str:
    name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return name.removeprefix("typing.Optional[").removeprefix(f"{RunConfig.__module__}.").removesuffix(" | None")


def _short_text(text: str) -> str:
    return _short.repr(text)[1:-1]


# Overrides ------------------------------------------------------------------------------------------------------------


def _override(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"expected key=value, such as training.n_tokens=1_000_000; got {_short.repr(override)}")
    try:
        parsed = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # ValueError for a number of thousands of digits, too
        parsed = text
    *sections, name = key.strip().split(".")
    table = value
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"{section} is not a section of the settings, so {_short_text(key.strip())} cannot be set")
    table[name] = parsed
