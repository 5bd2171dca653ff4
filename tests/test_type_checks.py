"""The import hook of these tests: wrong types and shapes raise, in closures and dataclasses too, and right ones pass."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import type_checks
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

import circuits
import replacement

SOURCE = '''
"""A module with every kind of definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from all_shapes import Column
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Thing

Row: TypeAlias = Float[Tensor, "T"]

__all__ = ["adder"]
"""Words after a statement do not move the imports."""

def adder(number: int) -> Callable[..., int]:
    def add(*others: int, twice: bool = False) -> int:
        return sum(others) * (1 + twice) + number

    return add

def unannotated():
    def nothing():
        return 5

    return nothing

def wrong() -> int:
    return "5"

def up_to(number: int) -> Iterator[int]:
    yield from range(number)

def product(x_TD: Float[Tensor, "T D"], W_DF: Float[Tensor, "D F"]) -> Float[Tensor, "T F"]:
    return x_TD @ W_DF if len(x_TD) > 1 else x_TD

@dataclass(frozen=True)
class Place:
    layer: int
    name: str = ""

    @property
    def half(self) -> int:
        return self.layer / 2

    @cached_property
    def double(self) -> int:
        return self.layer * 2

    @staticmethod
    def read(text: str) -> Place:
        return Place(int(text))

    @classmethod
    def first(cls, name: str) -> Place:
        return cls(0, name)

def total(x_T: Row) -> float:
    return float(x_T[0]) + (total(x_T[1:]) if len(x_T) > 1 else 0.0)

def length(y_T: Column) -> int:
    return 1 + (length(y_T[1:]) if len(y_T) > 1 else 0)

def same(thing: Thing | None, number: int) -> Thing | None:
    return thing

@dataclass
class Holder:
    number: int
    thing: Thing | None = None

@dataclass
class Pair:
    x_T: Float[Tensor, "T"]
    y_T: Float[Tensor, "T"]
'''
SHAPES = """
from jaxtyping import Float
from torch import Tensor

Column = Float[Tensor, "T"] | None
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("checked")
    (folder / "all_shapes.py").write_text(SHAPES, encoding="utf-8")
    (folder / "all_kinds.py").write_text(SOURCE, encoding="utf-8")
    before = list(sys.meta_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        type_checks.install(["all_kinds"])
        yield importlib.import_module("all_kinds")
    sys.meta_path[:] = before
    for name in ("all_kinds", "all_shapes"):
        del sys.modules[name]


def test_wrong_types_raise(module: ModuleType) -> None:
    place = module.Place.first("a")
    assert (place, module.Place.read("4").double, list(module.up_to(2))) == (module.Place(0, "a"), 8, [0, 1])
    for call in (
        lambda: module.adder("5"),
        module.wrong,
        lambda: list(module.up_to("5")),
        lambda: module.Place("5"),
        lambda: place.half,
        lambda: module.Place.read(5),
        lambda: module.Place.first(5),
        lambda: module.Place(layer=5, name=5),
    ):
        with pytest.raises(BeartypeCallHintViolation):
            call()


def test_closures_are_checked_and_keep_apart(module: ModuleType) -> None:
    add_one, add_two = module.adder(1), module.adder(2)
    assert (add_one(3), add_two(3), add_one(3, 4, twice=True), add_two()) == (4, 5, 15, 2)
    assert (add_one.__name__, add_one.__wrapped__.__closure__[0].cell_contents) == ("add", 1)
    for add in (add_one, add_two):
        with pytest.raises(BeartypeCallHintViolation):
            add("3")
        with pytest.raises(BeartypeCallHintViolation):
            add(3, twice="yes")
    with pytest.raises(BeartypeCallHintViolation):
        module.adder(0.5)
    assert (module.unannotated()(), module.unannotated()()) == (5, 5)


def test_letters_of_shapes_have_one_size(module: ModuleType) -> None:
    assert module.product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    for x_TD, W_DF in (
        (torch.ones(2, 3), torch.ones(4, 3)),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(2, 3).long(), torch.ones(3, 4)),
        (torch.ones(1, 3), torch.ones(3, 4)),  # returns another shape than it says
    ):
        with pytest.raises(TypeCheckError):
            module.product(x_TD, W_DF)
    assert module.total(torch.ones(3)) == module.length(torch.ones(3)) == 3  # an inner call has sizes of its own
    module.Pair(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeCheckError):
        module.Pair(torch.ones(2), torch.ones(3))


def test_names_for_type_checkers_alone_are_left_unchecked(module: ModuleType) -> None:
    assert module.same("anything", 5) == "anything"
    assert module.Holder(5, thing="anything").thing == "anything"
    for call in (lambda: module.same("anything", "5"), lambda: module.Holder("5")):
        with pytest.raises(TypeCheckError):
            call()


def test_plain_imports_of_the_same_file_do_not_meet_its_checked_code(module: ModuleType) -> None:
    folder = Path(module.__file__).parent
    plain = subprocess.run(
        [sys.executable, "-c", "import all_kinds; print(all_kinds.wrong())"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert plain.stdout == "5\n"


def test_both_packages_are_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        replacement.Site("five", "mlp_out")
    with pytest.raises(BeartypeCallHintViolation):
        circuits.CircuitGraph.load(5)
