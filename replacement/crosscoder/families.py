"""What the families of wirings are made of: their names, what they may read, and reads, writes and widths by layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from replacement.crosscoder.sites import HasShape, ModelShape, Site, layers_of, shape_of

MLP_READS = ("resid_mid", "resid_pre", "mlp_in", "mlp_normalized")
"""What may be read in front of an MLP."""
LORSA_READS = ("attn_in", "attn_normalized")
"""What low-rank sparse attention may read."""
ADAPTERS = ("adapter", "cross_layer_adapter")
"""Families that write the difference between the MLPs of a fine-tuned and a base model."""
JOINT = "joint"
WHOLE_DEPTH = ("per_layer", "strictly_causal", "weakly_causal", "attention", "lorsa", JOINT)
"""Families with one group for every layer of the model."""


class Groups(NamedTuple):
    """The fields of a `Wiring`."""

    name: str
    reads: tuple[tuple[Site, ...], ...]
    writes: tuple[tuple[Site, ...], ...]
    widths: dict[str, int]


def by_layer(
    name: str,
    model: ModelShape | HasShape,
    read: str,
    write: str,
    *,
    layers: int | Sequence[int] | None = None,
    writes_above: bool = False,
) -> Groups:
    """One group for each layer, which reads a site there and writes one there or, with `writes_above`, at all these
    layers from there on."""
    chosen = layers_of(model, layers)
    reads = tuple((Site(layer, read),) for layer in chosen)
    writes = tuple(
        tuple(Site(layer, write) for layer in chosen if layer == first or (writes_above and layer > first))
        for first in chosen
    )
    return of_sites(name, (model,), reads, writes)


def of_sites(
    name: str,
    models: Sequence[ModelShape | HasShape],
    reads: tuple[tuple[Site, ...], ...],
    writes: tuple[tuple[Site, ...], ...],
) -> Groups:
    """Groups of these sites, with the widths that they have in the models.

    Args:
        models: those that sites name by number.

    Raises:
        ValueError: `resid_mid` of a model that has none.
    """
    widths: dict[str, int] = {}
    for site in sorted({*itertools.chain(*reads, *writes)}, key=lambda site: (site.model, site.kind)):
        shape = shape_of(models[site.model])
        if shape.parallel and site.kind == "resid_mid":
            raise ValueError("a model with parallel attention has no resid_mid: use resid_pre or mlp_in")
        width = shape.width(site.kind)
        if widths.setdefault(site.kind, width) != width:
            widths[kind_in_model(site)] = width
    return Groups(name, reads, writes, widths)


def mlp_read(model: ModelShape | HasShape, read: str | None) -> str:
    """The site that is read in front of an MLP: the one named, or the stream there.

    Raises:
        ValueError: another site.
    """
    if read is None:
        return "resid_pre" if shape_of(model).parallel else "resid_mid"
    if read not in MLP_READS:
        raise ValueError(f"a transcoder reads one of {', '.join(MLP_READS)}; got {read!r:.50}")
    return read


def kind_in_model(site: Site) -> str:
    """The kind of a site in its own model, a key of `Wiring.widths`."""
    return f"{site.kind}@{site.model}"
