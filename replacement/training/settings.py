"""The table of settings that `replacement train --help` shows, read from the source of `config` without importing PyTorch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SECTIONS = {
    "RunConfig": "",
    "DataConfig": "data.",
    "CrosscoderConfig": "crosscoder.",
    "TrainingConfig": "training.",
    "LanguageModelConfig": "language_model.",
}


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    """Dotted name, such as `training.n_tokens`."""
    default: str
    """As Python writes it; `needed` if there is none, `auto` where the meaning says what is chosen."""
    unit: str
    meaning: str
    """First sentence of the setting's docstring."""


def settings_table() -> list[Setting]:
    """Name, default, unit and meaning of every setting: from the annotations and docstrings of the classes in `config`."""
    module = ast.parse(Path(__file__).with_name("config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    return [setting for name, prefix in _SECTIONS.items() for setting in _settings(classes[name], prefix)]


def _settings(config: ast.ClassDef, prefix: str) -> Iterator[Setting]:
    for statement, following in zip(config.body, config.body[1:], strict=False):
        match statement, following:
            case (
                ast.AnnAssign(ast.Name(name), ast.Subscript(ast.Name("Annotated"), ast.Tuple([_, ast.Constant(unit)]))),
                ast.Expr(ast.Constant(str(meaning))),
            ):
                sentence = " ".join(meaning.split()).split(". ")[0].rstrip(".")
                yield Setting(prefix + name, _default(statement.value), str(unit), sentence)


def _default(value: ast.expr | None) -> str:
    match value:
        case None:
            return "needed"
        case ast.Constant(None):
            return "auto"
        case ast.Constant(bool(constant)):
            return str(constant).lower()
        case ast.Constant(int(constant)):
            return f"{constant:_}"
        case ast.Call(keywords=[ast.keyword(value=ast.Lambda(body=body))]):  # field(default_factory=lambda: ...)
            return ast.unparse(body)
    return ast.unparse(value)
