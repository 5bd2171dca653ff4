"""Sites: named places in a transformer, or in one of several, and the shape of the model that holds them.

One layer, in the order of the residual timeline (a parallel layer has no `resid_mid`: both branches read `resid_pre`):

    resid_pre -> [attn_normalized -> attn_in -> attn_z -> attn_out] -> resid_mid
    resid_mid -> [mlp_normalized -> mlp_in -> mlp_out] -> resid_post

`resid_post` is the `resid_pre` of the next layer. `mlp_normalized` is the output of the norm in front of the MLP before its
gain and offset, `mlp_in` after them; in a model without such a norm both are the stream. `attn_normalized` and
`attn_in` are the same in front of attention. `mlp_difference` is, in a fine-tuned model, `mlp_out` minus what the MLP of its
base model writes for the same input (`LanguageModel.with_base`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import total_ordering
from typing import Protocol, runtime_checkable

from replacement.number_checks import whole_number

SITE_KINDS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "mlp_normalized",
    "mlp_in",
    "mlp_difference",
    "mlp_out",
    "attn_normalized",
    "attn_in",
    "attn_z",
    "attn_out",
)

# Points of one layer on the residual timeline; resid_post of a layer IS resid_pre of the next (8 = 0 one layer on).
_IN_ORDER = (
    "resid_pre",
    "attn_normalized",
    "attn_in",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_normalized",
    "mlp_in",
    "mlp_difference",
    "mlp_out",
    "resid_post",
)
_POINT = {kind: point for point, kind in enumerate(_IN_ORDER)}
_POINTS_PER_LAYER = _POINT["resid_post"]
_SITE_TEXT = re.compile(r"([a-z_]+)\.(\d{1,18})(?:@(\d{1,9}))?", re.ASCII)


@total_ordering
@dataclass(frozen=True)
class Site:
    """A named place in the transformer; sites sort in the order the forward pass meets them.

    >>> str(Site(3, "resid_mid")), str(Site(3, "resid_mid", model=1))
    ('resid_mid.3', 'resid_mid.3@1')

    Raises:
        ValueError: unknown kind, negative layer or negative model.
    """

    layer: int
    """Layer, from 0."""
    kind: str
    """One of `SITE_KINDS`."""
    model: int = 0
    """0, or the number of the model where a crosscoder spans several."""

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        whole_number("the layer of a site", self.layer)
        whole_number("the model of a site", self.model)

    @property
    def point(self) -> int:
        """Place on the residual timeline; `resid_post` of a layer and `resid_pre` of the next share one."""
        return self.layer * _POINTS_PER_LAYER + _POINT[self.kind]

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read `kind.layer` or `kind.layer@model`, the inverse of `str`.

        Raises:
            ValueError: the text has another form, or names no site.
        """
        match = _SITE_TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            expected = "expected 'kind.layer' such as 'resid_mid.3', or 'resid_mid.3@1'"
            raise ValueError(f"cannot read site {text!r:.50}: {expected}")
        kind, layer, model = match.groups()
        return cls(int(layer), kind, int(model or 0))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}" + (f"@{self.model}" if self.model else "")

    def __lt__(self, other: Site) -> bool:
        return (self.layer, _POINT[self.kind], self.model) < (other.layer, _POINT[other.kind], other.model)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformer that decide how a crosscoder is wired to it.

    Raises:
        ValueError: a size below 1.
    """

    n_layers: int
    """Number of layers L."""
    d_model: int
    """Width D of the residual stream."""
    n_heads: int
    """Attention heads per layer H."""
    d_head: int
    """Width of one head's value vector."""
    parallel: bool = False
    """Attention and MLP both read `resid_pre` (GPT-NeoX); such a model has no `resid_mid`."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_head"):
            whole_number(name, getattr(self, name), least=1)

    def width(self, kind: str) -> int:
        """Vector width at sites of this kind: `n_heads * d_head` for `attn_z`, `d_model` elsewhere.

        Raises:
            ValueError: unknown kind.
        """
        _check_kind(kind)
        return self.n_heads * self.d_head if kind == "attn_z" else self.d_model


@runtime_checkable
class HasShape(Protocol):
    """Anything with a `.shape` of type `ModelShape`, such as a language model."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        ...


def layers_of(model: ModelShape | HasShape, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    """Layers that are named, all by default.

    Raises:
        ValueError: a layer that the model does not have.
    """
    n_layers = shape_of(model).n_layers
    chosen = range(n_layers) if layers is None else (layers,) if not isinstance(layers, Sequence) else layers
    for layer in chosen:
        if layer not in range(n_layers):
            raise ValueError(f"layer {layer} does not exist: the model has layers 0 to {n_layers - 1}")
    return tuple(chosen)


def shape_of(model: ModelShape | HasShape) -> ModelShape:
    """The sizes of a model, or these sizes themselves.

    Raises:
        ValueError: neither.
    """
    shape = model if isinstance(model, ModelShape) else getattr(model, "shape", None)
    if not isinstance(shape, ModelShape):
        raise ValueError(f"expected a ModelShape or an object whose .shape is one, got {type(model).__name__}")
    return shape


def _check_kind(kind: str) -> None:
    if kind not in SITE_KINDS:
        raise ValueError(f"unknown site kind {kind!r:.50}: expected one of {', '.join(SITE_KINDS)}")
