"""Objects from the tables of a settings file that choose one of several kinds by `name`, with every type checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

import dacite

Kind = TypeVar("Kind")

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "int | tuple[int, ...]": "a whole number, or a list of whole numbers",
}


def as_float(value: Any) -> Any:
    """TOML writes 1 for a float of value 1; true is no number, although Python takes it for one."""
    if isinstance(value, bool):
        raise dacite.WrongTypeError(field_type=float, value=value)
    return float(value) if isinstance(value, int) else value


def as_int(value: Any) -> Any:
    """Refuse true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise dacite.WrongTypeError(field_type=int, value=value)
    return value


NUMBER_HOOKS: dict[Any, Callable[[Any], Any]] = {int: as_int, float: as_float}
"""What dacite is to make of numbers."""


def from_table(value: Any, kinds: Mapping[str, type[Kind]], *, what: str, setting: str) -> Kind:
    """The object that a table describes: `name` chooses its class, the other entries are its parameters.

    Args:
        kinds: dataclasses by name; fields that do not count in comparisons are no parameters.
        what: what the classes are, for messages, such as `loss`.
        setting: dotted name of the setting.

    Raises:
        ValueError: no table, an unknown name, an unknown or missing parameter, or a value of another type.
    """
    example = next(iter(kinds))
    if not isinstance(value, Mapping):
        raise ValueError(f'{setting} must be a table such as {{ name = "{example}", ... }}, got {value!r}')
    given = dict(value)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(kinds)} as the name in {setting}")
    known = _parameters(kinds[name])
    needed = [key for key, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    if set(given) - set(known) or set(needed) - set(given):
        needs = f", needs {needed}" if needed else ""
        raise ValueError(f"the {what} {name} has the parameters {list(known)}{needs}; got {sorted(given)}")
    for key, entry in given.items():
        if entry == []:
            raise ValueError(_wrong_type(f"{setting}.{key} of {name}", known[key], entry))
    arguments = {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in given.items()}
    try:
        return dacite.from_dict(kinds[name], arguments, dacite.Config(type_hooks=NUMBER_HOOKS))
    except dacite.DaciteFieldError as error:
        key = str(error.field_path).split(".")[0]
        raise ValueError(_wrong_type(f"{setting}.{key} of {name}", known[key], given[key])) from None


def _parameters(kind: type[Any]) -> dict[str, Field[Any]]:
    return {field.name: field for field in fields(kind) if field.compare}


def _wrong_type(setting: str, field: Field[Any], value: object) -> str:
    return f"{setting} must be {_EXPECTED.get(str(field.type), field.type)}, got {value!r}"
