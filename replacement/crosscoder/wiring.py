"""Wiring: which sites each group of features reads and which it writes.

Every published family is a wiring of one `Crosscoder` class:

| constructor | groups | group g reads | group g writes |
|---|---|---|---|
| `autoencoder` | one per layer named | a site | the same site |
| `transcoder` | 1 | MLP input | MLP output of the same layer |
| `per_layer` (PLT) | L | MLP input of layer g | MLP output of layer g |
| `strictly_causal` (CLT) | L | residual stream at layer g | MLP outputs of layers >= g |
| `weakly_causal` | L | a site at layer g | the same kind of site at layers >= g |
| `attention` | L | the heads' outputs `attn_z` of layer g | attention outputs of layers >= g |
| `acausal` | 1 | a site at every layer | the same sites |
| `model_diffing` | 1 | a site in two models | the same two sites |

Cross-layer transcoders: Ameisen et al. 2025, "Circuit Tracing". Weakly causal and acausal crosscoders and model
diffing: Lindsey et al. 2024, "Sparse Crosscoders". Transcoders: Dunefsky et al. 2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from replacement.crosscoder.sites import ModelShape, Site
from replacement.number_checks import whole_number

MLP_READS = ("resid_mid", "resid_pre", "mlp_in", "mlp_normalized")
WHOLE_DEPTH = ("per_layer", "strictly_causal", "weakly_causal", "attention")
"""Families with one group for every layer of the model."""


@runtime_checkable
class HasShape(Protocol):
    """Anything with a `.shape` of type `ModelShape`, such as a language model."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        ...


@dataclass(frozen=True)
class Wiring:
    """Reads and writes of G feature groups.

    Raises:
        ValueError: no groups, a group without reads or writes, a site twice in one group, a site kind without a width,
            a width below 1, or written sites of different widths in one group.
    """

    name: str
    """Family, such as `strictly_causal`."""
    reads: tuple[tuple[Site, ...], ...]
    """Sites each group reads, one tuple per group."""
    writes: tuple[tuple[Site, ...], ...]
    """Sites each group writes, one tuple per group."""
    widths: Mapping[str, int] = field(hash=False)
    """Vector width of every site kind in use."""

    def __post_init__(self) -> None:
        if not self.reads or len(self.reads) != len(self.writes):
            given = f"{len(self.reads)} and {len(self.writes)}"
            raise ValueError(
                f"a wiring needs one tuple of reads and one of writes per group, at least one; got {given}"
            )
        for kind, width in self.widths.items():
            whole_number(f"the width at {kind}", width, least=1)
        for group, (reads, writes) in enumerate(zip(self.reads, self.writes, strict=True)):
            for role, sites in (("reads", reads), ("writes", writes)):
                if not isinstance(sites, tuple) or not all(isinstance(site, Site) for site in sites):
                    raise ValueError(f"group {group} {role} must be a tuple of sites, got {sites!r:.50}")
                if not sites:
                    raise ValueError(f"group {group} {role} no site: expected at least one")
                if len(set(sites)) != len(sites):
                    raise ValueError(f"group {group} {role} a site twice: {', '.join(map(str, sites))}")
                missing = sorted({site.kind for site in sites} - set(self.widths))
                if missing:
                    raise ValueError(f"no width given for site kind {missing[0]!r}, which group {group} {role}")
            if len({self.widths[site.kind] for site in writes}) > 1:
                given = ", ".join(f"{site} {self.widths[site.kind]}" for site in writes)
                raise ValueError(f"the sites one group writes must have one width; group {group} has {given}")

    @property
    def n_groups(self) -> int:
        """Number of feature groups G."""
        return len(self.reads)

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """Every site some group reads, in forward order."""
        return tuple(sorted({site for sites in self.reads for site in sites}))

    @property
    def write_sites(self) -> tuple[Site, ...]:
        """Every site some group writes, in forward order."""
        return tuple(sorted({site for sites in self.writes for site in sites}))

    @property
    def is_causal(self) -> bool:
        """Whether every write lies at or after every read of its group on the residual timeline."""
        return all(
            min(site.point for site in writes) >= max(site.point for site in reads)
            for reads, writes in zip(self.reads, self.writes, strict=True)
        )

    def width(self, site: Site) -> int:
        """Vector width at a site."""
        return self.widths[site.kind]

    def group_layer(self, group: int) -> int:
        """Layer a group belongs to: the lowest layer it reads."""
        return min(site.layer for site in self.reads[group])

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that groups belong to, in order and each once."""
        return tuple(sorted({self.group_layer(group) for group in range(self.n_groups)}))

    def group_of(self, layer: int) -> int:
        """The group that belongs to a layer.

        Raises:
            ValueError: no group, or several.
        """
        groups = [group for group in range(self.n_groups) if self.group_layer(group) == layer]
        if len(groups) != 1:
            raise ValueError(f"expected one group of features in layer {layer}, the crosscoder has {len(groups)}")
        return groups[0]

    def writers(self, site: Site) -> tuple[int, ...]:
        """Groups that write a site, in order."""
        return tuple(group for group, sites in enumerate(self.writes) if site in sites)

    def check_fits(self, model: ModelShape | HasShape) -> None:
        """Check that this wiring belongs to a model of these sizes.

        Raises:
            ValueError: another vector width, a layer the model lacks, layers left out by a family that covers the whole
                depth, or `resid_mid` in a parallel model.
        """
        shape = _shape_of(model)
        for kind, width in self.widths.items():
            if width != shape.width(kind):
                raise ValueError(f"this crosscoder has width {width} at {kind}, the model has {shape.width(kind)}")
        sites = (*self.read_sites, *self.write_sites)
        depth = 1 + max(site.layer for site in sites)
        if depth > shape.n_layers or (self.name in WHOLE_DEPTH and depth != shape.n_layers):
            raise ValueError(f"this {self.name} crosscoder spans {depth} layers, the model has {shape.n_layers}")
        if shape.parallel and any(site.kind == "resid_mid" for site in sites):
            raise ValueError("this crosscoder uses resid_mid, which a model with parallel attention does not have")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value; `from_dict` is the inverse."""
        return {
            "name": self.name,
            "reads": [[str(site) for site in sites] for sites in self.reads],
            "writes": [[str(site) for site in sites] for sites in self.writes],
            "widths": dict(self.widths),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Wiring:
        """Read the value `to_dict` wrote.

        Raises:
            ValueError: a key is missing, or a site or width cannot be read.
        """
        try:
            missing = [key for key in ("name", "reads", "writes", "widths") if key not in value]
            if missing:
                raise ValueError(f"a wiring needs name, reads, writes and widths; {missing[0]} is missing")
            reads, writes = (
                tuple(tuple(Site.parse(text) for text in group) for group in value[key]) for key in ("reads", "writes")
            )
            return cls(value["name"], reads, writes, dict(value["widths"]))
        except TypeError as error:
            raise ValueError(f"cannot read a wiring from {value!r:.80}: {error}") from None

    @classmethod
    def autoencoder(
        cls, model: ModelShape | HasShape, *, layers: int | Sequence[int] | None = None, site: str = "resid_post"
    ) -> Wiring:
        """Sparse autoencoders, one group per layer (all by default), each reading and writing one site."""
        return _by_layer("autoencoder", model, site, site, layers=layers)

    @classmethod
    def transcoder(
        cls, model: ModelShape | HasShape, *, layer: int, read: str | None = None, write: str = "mlp_out"
    ) -> Wiring:
        """One transcoder: reads the MLP's input (see `strictly_causal` for `read`), writes its output."""
        return _by_layer("transcoder", model, _mlp_read(model, read), write, layers=layer)

    @classmethod
    def per_layer(cls, model: ModelShape | HasShape, *, read: str | None = None) -> Wiring:
        """A per-layer transcoder (PLT): one transcoder for each layer's MLP."""
        return _by_layer("per_layer", model, _mlp_read(model, read), "mlp_out")

    @classmethod
    def strictly_causal(cls, model: ModelShape | HasShape, *, read: str | None = None) -> Wiring:
        """A cross-layer transcoder (CLT): group l reads the stream at layer l and writes `mlp_out` of layers >= l.

        Args:
            read: `resid_mid` (default), `resid_pre` (default for parallel models), `mlp_in`, or `mlp_normalized`, which is
                `mlp_in` before the norm's gain and offset.
        """
        return _by_layer("strictly_causal", model, _mlp_read(model, read), "mlp_out", writes_above=True)

    @classmethod
    def weakly_causal(cls, model: ModelShape | HasShape, *, site: str = "resid_post") -> Wiring:
        """A weakly causal crosscoder: group l reads a site at layer l and writes the same kind at layers >= l."""
        return _by_layer("weakly_causal", model, site, site, writes_above=True)

    @classmethod
    def attention(cls, model: ModelShape | HasShape) -> Wiring:
        """An attention crosscoder: group l reads `attn_z` of layer l and writes `attn_out` of layers >= l.

        It is weakly causal: `attn_z` holds the outputs of all heads side by side, before the output weights mix them, so that
        each feature's encoder shows how much it reads from each head.
        """
        return _by_layer("attention", model, "attn_z", "attn_out", writes_above=True)

    @classmethod
    def acausal(
        cls, model: ModelShape | HasShape, *, site: str = "resid_post", layers: Sequence[int] | None = None
    ) -> Wiring:
        """An acausal crosscoder: one group reads and writes a site at all layers (or the layers named)."""
        sites = tuple(Site(layer, site) for layer in _layers_of(model, layers))
        return _wire("acausal", model, (sites,), (sites,))

    @classmethod
    def model_diffing(cls, model: ModelShape | HasShape, *, layer: int, site: str = "resid_post") -> Wiring:
        """A model-diffing crosscoder: one group reads and writes one site in two models of this shape."""
        (layer,) = _layers_of(model, layer)
        sites = (Site(layer, site, 0), Site(layer, site, 1))
        return _wire("model_diffing", model, (sites,), (sites,))


def _by_layer(
    name: str,
    model: ModelShape | HasShape,
    read: str,
    write: str,
    *,
    layers: int | Sequence[int] | None = None,
    writes_above: bool = False,
) -> Wiring:
    """One group for each layer, which reads a site there and writes one there or, with `writes_above`, from there on."""
    chosen = _layers_of(model, layers)
    reads = tuple((Site(layer, read),) for layer in chosen)
    last = _shape_of(model).n_layers if writes_above else 0
    writes = tuple(tuple(Site(layer, write) for layer in range(first, max(last, first + 1))) for first in chosen)
    return _wire(name, model, reads, writes)


def _wire(
    name: str, model: ModelShape | HasShape, reads: tuple[tuple[Site, ...], ...], writes: tuple[tuple[Site, ...], ...]
) -> Wiring:
    shape = _shape_of(model)
    kinds = {site.kind for site in itertools.chain(*reads, *writes)}
    if shape.parallel and "resid_mid" in kinds:
        raise ValueError("a model with parallel attention has no resid_mid: use resid_pre or mlp_in")
    return Wiring(name, reads, writes, {kind: shape.width(kind) for kind in sorted(kinds)})


def _mlp_read(model: ModelShape | HasShape, read: str | None) -> str:
    if read is None:
        return "resid_pre" if _shape_of(model).parallel else "resid_mid"
    if read not in MLP_READS:
        raise ValueError(f"a transcoder reads one of {', '.join(MLP_READS)}; got {read!r:.50}")
    return read


def _layers_of(model: ModelShape | HasShape, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    n_layers = _shape_of(model).n_layers
    chosen = range(n_layers) if layers is None else (layers,) if not isinstance(layers, Sequence) else layers
    for layer in chosen:
        if layer not in range(n_layers):
            raise ValueError(f"layer {layer} does not exist: the model has layers 0 to {n_layers - 1}")
    return tuple(chosen)


def _shape_of(model: ModelShape | HasShape) -> ModelShape:
    shape = model if isinstance(model, ModelShape) else getattr(model, "shape", None)
    if not isinstance(shape, ModelShape):
        raise ValueError(f"expected a ModelShape or an object whose .shape is one, got {type(model).__name__}")
    return shape
