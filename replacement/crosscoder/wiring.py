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
| `joint` | 2 L | those of `strictly_causal`, then those of `attention` | the same as these |
| `lorsa` | L | the input `attn_in` of attention at layer g, at all positions up to its own | attention output of layer g |
| `acausal` | 1 | a site at every layer | the same sites |
| `model_diffing` | 1 | a site in each of N models | the same sites |
| `adapter` | L | MLP input of layer g of a fine-tuned model | what its MLP adds to that of its base model |
| `cross_layer_adapter` | L | residual stream at layer g | the same of layers >= g |

Cross-layer transcoders: Ameisen et al. 2025, "Circuit Tracing". Weakly causal and acausal crosscoders and model
diffing: Lindsey et al. 2024, "Sparse Crosscoders". Transcoders: Dunefsky et al. 2024. Adapters: Hu et al. 2026, "Transcoder
Adapters for Reasoning-Model Diffing".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from replacement.crosscoder.families import (
    ADAPTERS,
    JOINT,
    LORSA_READS,
    WHOLE_DEPTH,
    by_layer,
    kind_in_model,
    mlp_read,
    of_sites,
)
from replacement.crosscoder.sites import HasShape, ModelShape, Site, layers_of, shape_of
from replacement.number_checks import whole_number


@dataclass(frozen=True)
class Wiring:
    """Reads and writes of G feature groups.

    Raises:
        ValueError: no groups, a group without reads or writes, a site twice in one group, a site kind without a width,
            or a width below 1.
    """

    name: str
    """Family, such as `strictly_causal`."""
    reads: tuple[tuple[Site, ...], ...]
    """Sites each group reads, one tuple per group."""
    writes: tuple[tuple[Site, ...], ...]
    """Sites each group writes, one tuple per group."""
    widths: Mapping[str, int] = field(hash=False)
    """Vector width of every site kind in use; `kind@model` where that of a later model is another."""

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
                missing = sorted(site.kind for site in sites if not {site.kind, kind_in_model(site)} & set(self.widths))
                if missing:
                    raise ValueError(f"no width given for site kind {missing[0]!r}, which group {group} {role}")

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
    def write_blocks(self) -> tuple[tuple[int, tuple[Site, ...]], ...]:
        """The (group, sites) whose decoders are stored together: what a group writes, parted by width."""
        blocks: dict[tuple[int, int], list[Site]] = {}
        for group, sites in enumerate(self.writes):
            for site in sites:
                blocks.setdefault((group, self.width(site)), []).append(site)
        return tuple((group, tuple(sites)) for (group, _), sites in blocks.items())

    @property
    def n_models(self) -> int:
        """Number of models that sites belong to: one more than the largest."""
        return 1 + max(site.model for site in (*self.read_sites, *self.write_sites))

    @property
    def is_causal(self) -> bool:
        """Whether every write lies at or after every read of its group on the residual timeline."""
        return all(
            min(site.point for site in writes) >= max(site.point for site in reads)
            for reads, writes in zip(self.reads, self.writes, strict=True)
        )

    @property
    def writes_differences(self) -> bool:
        """Whether it writes what MLPs add to those of a base model: such a crosscoder is an adapter."""
        return any(site.kind == "mlp_difference" for site in self.write_sites)

    def as_outputs(self) -> Wiring:
        """The same wiring where all that an adapter writes is seen as a part of the MLPs' whole outputs."""

        def output(site: Site) -> Site:
            return replace(site, kind="mlp_out") if site.kind == "mlp_difference" else site

        widths = {kind.replace("mlp_difference", "mlp_out"): width for kind, width in self.widths.items()}
        return replace(self, writes=tuple(tuple(map(output, sites)) for sites in self.writes), widths=widths)

    def width(self, site: Site) -> int:
        """Vector width at a site."""
        return self.widths.get(kind_in_model(site)) or self.widths[site.kind]

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

    def check_fits(self, model: ModelShape | HasShape, *, number: int = 0) -> None:
        """Check that this wiring belongs to a model of these sizes.

        Args:
            number: which of the models that the wiring spans.

        Raises:
            ValueError: another vector width, a layer the model lacks, layers left out by a family that covers the whole
                depth, or `resid_mid` in a parallel model.
        """
        shape = shape_of(model)
        sites = [site for site in (*self.read_sites, *self.write_sites) if site.model == number]
        for kind, width in sorted({(site.kind, self.width(site)) for site in sites}):
            if width != shape.width(kind):
                raise ValueError(f"this crosscoder has width {width} at {kind}, the model has {shape.width(kind)}")
        depth = 1 + max((site.layer for site in sites), default=-1)
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
        return cls(*by_layer("autoencoder", model, site, site, layers=layers))

    @classmethod
    def transcoder(
        cls, model: ModelShape | HasShape, *, layer: int, read: str | None = None, write: str = "mlp_out"
    ) -> Wiring:
        """One transcoder: reads the MLP's input (see `strictly_causal` for `read`), writes its output."""
        return cls(*by_layer("transcoder", model, mlp_read(model, read), write, layers=layer))

    @classmethod
    def per_layer(cls, model: ModelShape | HasShape, *, read: str | None = None) -> Wiring:
        """A per-layer transcoder (PLT): one transcoder for each layer's MLP."""
        return cls(*by_layer("per_layer", model, mlp_read(model, read), "mlp_out"))

    @classmethod
    def strictly_causal(cls, model: ModelShape | HasShape, *, read: str | None = None) -> Wiring:
        """A cross-layer transcoder (CLT): group l reads the stream at layer l and writes `mlp_out` of layers >= l.

        Args:
            read: `resid_mid` (default), `resid_pre` (default for parallel models), `mlp_in`, or `mlp_normalized`, which is
                `mlp_in` before the norm's gain and offset.
        """
        return cls(*by_layer("strictly_causal", model, mlp_read(model, read), "mlp_out", writes_above=True))

    @classmethod
    def weakly_causal(cls, model: ModelShape | HasShape, *, site: str = "resid_post") -> Wiring:
        """A weakly causal crosscoder: group l reads a site at layer l and writes the same kind at layers >= l."""
        return cls(*by_layer("weakly_causal", model, site, site, writes_above=True))

    @classmethod
    def attention(cls, model: ModelShape | HasShape) -> Wiring:
        """An attention crosscoder: group l reads `attn_z` of layer l and writes `attn_out` of layers >= l.

        It is weakly causal: `attn_z` holds the outputs of all heads side by side, before the output weights mix them, so that
        each feature's encoder shows how much it reads from each head.
        """
        return cls(*by_layer("attention", model, "attn_z", "attn_out", writes_above=True))

    @classmethod
    def lorsa(cls, model: ModelShape | HasShape, *, layer: int | None = None, read: str = "attn_in") -> Wiring:
        """Low-rank sparse attention (`Lorsa`): group l reads `attn_in` of layer l and writes `attn_out` of layer l.

        Args:
            layer: a single layer; all by default.
            read: `attn_in`, or `attn_normalized`, which is `attn_in` before the norm's gain and offset.
        """
        if read not in LORSA_READS:
            raise ValueError(f"low-rank sparse attention reads {' or '.join(LORSA_READS)}; got {read!r:.50}")
        return cls(*by_layer("lorsa" if layer is None else "lorsa_layer", model, read, "attn_out", layers=layer))

    @classmethod
    def joint(cls, model: ModelShape | HasShape, *, read: str | None = None) -> Wiring:
        """MLPs and attention in one crosscoder: the groups of `strictly_causal` (which see for `read`), then of `attention`.

        Trained as one, each of the two parts meets the errors of the other. `joint.split` takes them apart.
        """
        mlps, attention = cls.strictly_causal(model, read=read), cls.attention(model)
        return cls(*of_sites(JOINT, (model,), mlps.reads + attention.reads, mlps.writes + attention.writes))

    @classmethod
    def adapter(
        cls,
        model: ModelShape | HasShape,
        *,
        read: str | None = None,
        layers: Sequence[int] | None = None,
        cross_layer: bool = False,
    ) -> Wiring:
        """A transcoder adapter: group l reads the MLP input of layer l of a fine-tuned model and writes what the MLP there
        adds to the MLP of its base model.

        Args:
            read: as for `strictly_causal`.
            layers: those that fine-tuning changed; all by default.
            cross_layer: write the same at all later ones of these layers, too.
        """
        name, read = ADAPTERS[cross_layer], mlp_read(model, read)
        return cls(*by_layer(name, model, read, "mlp_difference", layers=layers, writes_above=cross_layer))

    @classmethod
    def acausal(
        cls, model: ModelShape | HasShape, *, site: str = "resid_post", layers: Sequence[int] | None = None
    ) -> Wiring:
        """An acausal crosscoder: one group reads and writes a site at all layers (or the layers named)."""
        sites = tuple(Site(layer, site) for layer in layers_of(model, layers))
        return cls(*of_sites("acausal", (model,), (sites,), (sites,)))

    @classmethod
    def model_diffing(
        cls,
        models: ModelShape | HasShape | Sequence[ModelShape | HasShape],
        *,
        layer: int | Sequence[int],
        site: str = "resid_post",
    ) -> Wiring:
        """A model-diffing crosscoder: one group reads and writes one site in each of N models.

        Args:
            models: of any depths and widths; one stands for two of its shape.
            layer: of the site, the same in all models or one for each.
        """
        shapes = tuple(models) if isinstance(models, Sequence) else (models, models)
        layers = tuple(layer) if isinstance(layer, Sequence) else (layer,) * len(shapes)
        if len(layers) != len(shapes):
            raise ValueError(f"expected one layer, or one for each of {len(shapes)} models; got {list(layers)}")
        if len(shapes) < 2:
            raise ValueError(f"model diffing needs two models or more, got {len(shapes)}")
        chosen = [layers_of(model, number)[0] for model, number in zip(shapes, layers, strict=True)]
        sites = tuple(Site(number, site, model) for model, number in enumerate(chosen))
        return cls(*of_sites("model_diffing", shapes, (sites,), (sites,)))
