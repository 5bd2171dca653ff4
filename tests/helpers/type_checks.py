"""Import hook: the functions and dataclasses of some packages check their annotations at every call, with beartype.

jaxtyping's own hook does the same, at a price that was most of the tests' time: it wraps every function twice, binds the
arguments of every call, and starts anew whenever a function inside another one is defined. Here

- functions whose annotations name shapes get jaxtyping's decorator, which holds a letter (`T`, `D`) to one size per call, and
  so do those that name what is imported for type checkers only, which it leaves unchecked;
- all others get beartype's alone;
- what checks a function inside another one is built once, and bound to every new closure.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import jaxtyping
from beartype import beartype

_CACHE_TAG = f"checked{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"
"""In the names of cached byte code, so that neither plain code nor what another version of this file made is taken for it."""
_CHECKED_FUNCTION = "__beartype_func"
"""The keyword-only argument by which a wrapper of beartype's holds the function that it checks."""
_NESTED: dict[tuple[str, CodeType], FunctionType] = {}
"""The first wrapper of every function inside another one."""

_Function = Callable[..., Any]


def install(packages: Iterable[str]) -> None:
    """Check all modules of these packages that are imported from now on."""
    sys.meta_path.insert(0, _Finder(tuple(packages)))


def checked(function: _Function) -> _Function:
    """Decorator: arguments and result are checked."""
    if _has_shapes(function):
        return checked_by_jaxtyping(function)
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    key = (function.__module__, function.__code__)
    if key not in _NESTED:
        _NESTED[key] = beartype(function)
    return _bound_to(_NESTED[key], function)


def checked_by_jaxtyping(function: _Function) -> _Function:
    """Decorator: the same, where every letter of shapes has one size and names that are not there are no error."""
    return jaxtyping.jaxtyped(function, typechecker=beartype)


def checked_fields(cls: type) -> type:
    """Decorator of classes: what a dataclass is made of is checked."""
    return _with_init(cls, checked)


def checked_fields_by_jaxtyping(cls: type) -> type:
    """The same with the other decorator of functions."""
    return _with_init(cls, checked_by_jaxtyping)


def _with_init(cls: type, check: _Function) -> type:
    generated = "__dataclass_fields__" in vars(cls) and "__init__" in vars(cls)
    if generated and not hasattr(cls.__init__, "__wrapped__"):  # written out it is checked already
        cls.__init__ = check(cls.__init__)
    return cls


def _has_shapes(function: _Function) -> bool:
    """Whether the annotations of a function name a shape, or a name for one."""
    hints = function.__annotations__.values()
    names = {name for hint in hints if isinstance(hint, str) for name in re.findall(r"\w+", hint)}
    return any(map(_is_shape, [*map(function.__globals__.get, names), *hints]))


def _is_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray | jaxtyping.AbstractDtype):
        return True
    return any(map(_is_shape, typing.get_args(hint)))


def _bound_to(wrapper: FunctionType, function: _Function) -> _Function:
    """The wrapper around another closure of the same code."""
    if wrapper.__code__ is function.__code__:  # nothing is annotated, so nothing is wrapped
        return function
    held = wrapper.__kwdefaults__
    assert _CHECKED_FUNCTION in held, "this version of beartype holds functions in another way"
    copy = FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, wrapper.__closure__
    )
    copy.__kwdefaults__ = {**held, _CHECKED_FUNCTION: function}
    return functools.update_wrapper(copy, function)


class _Decorate(ast.NodeTransformer):
    """Puts the decorators above on every function and class of a module."""

    def __init__(self) -> None:
        self.for_type_checkers: set[str] = set()
        """Names imported for type checkers only."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        n_first = len(list(itertools.takewhile(_comes_first, node.body)))
        node.body.insert(n_first, ast.Import(names=[ast.alias(__name__)]))
        return node

    def visit_If(self, node: ast.If) -> ast.If:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            self.for_type_checkers.update(*map(_imported, node.body))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        decorator = "checked" + self._suffix([node.args, *filter(None, [node.returns])])
        node.decorator_list.append(_reference(decorator, node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        fields = [statement.annotation for statement in node.body if isinstance(statement, ast.AnnAssign)]
        node.decorator_list.insert(0, _reference("checked_fields" + self._suffix(fields), node))
        return node

    def _suffix(self, annotations: Iterable[ast.AST]) -> str:
        names = {part.id for tree in annotations for part in ast.walk(tree) if isinstance(part, ast.Name)}
        return "_by_jaxtyping" if names & self.for_type_checkers else ""


def _imported(statement: ast.stmt) -> set[str]:
    """Names that a statement imports."""
    if not isinstance(statement, ast.Import | ast.ImportFrom):
        return set()
    return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}


def _comes_first(statement: ast.stmt) -> bool:
    """Whether this has to stay in front of all others: the docstring, and imports from the future."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _reference(name: str, node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.Attribute(ast.Name(__name__, ast.Load()), name, ast.Load()), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        cached = functools.partial(_cached_path, sys.modules["importlib._bootstrap_external"].cache_from_source)
        with patch("importlib._bootstrap_external.cache_from_source", cached):
            return super().get_code(fullname)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        tree = ast.fix_missing_locations(_Decorate().visit(ast.parse(data, path)))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)


def _cached_path(original: _Function, path: str) -> str:
    return original(path, optimization=_CACHE_TAG)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and has the packages' modules loaded with checks."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
