"""The MLPs of a base model beside those of a model that was fine-tuned from it: the sites `mlp_difference`. D d_model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from replacement.crosscoder.sites import Site
from replacement.language_model.bridge_norms import NamedHook
from replacement.language_model.bridge_parts import BridgeParts

MLPMap = Callable[[Tensor], Tensor]
"""Rows `[R, D]` at `mlp_normalized` to rows at `mlp_out`."""


def base_mlps(parts: BridgeParts, base: BridgeParts) -> dict[int, MLPMap]:
    """The map of the base model's MLP at every layer whose MLP, or the norms around it, was changed by fine-tuning.

    Raises:
        ValueError: models of different kinds, MLPs that cannot be computed apart from their layers (OPT), or none was changed.
    """
    if _kind(parts) != _kind(base):
        raise ValueError(f"expected a base model of the fine-tuned model's kind ({_kind(parts)}), got {_kind(base)}")
    maps = {layer: base.mlp_map(layer, "mlp_normalized") for layer in range(parts.shape.n_layers)}
    changed = {layer: mlp for layer, mlp in maps.items() if not _same_mlp(parts, base, layer)}
    if not changed:
        raise ValueError("the MLPs of the fine-tuned and the base model are the same: their difference is zero")
    return changed


def difference_hooks(
    parts: BridgeParts,
    site: Site,
    base_mlp: MLPMap | None,
    run: Callable[[Tensor], Tensor | None],
    scales: Mapping[str, Tensor],
) -> list[NamedHook]:
    """Hooks that show `run` what an MLP writes beyond the base model's, which is added to what `run` replaces that by.

    Args:
        site: the difference.
        base_mlp: the base model's MLP; None where fine-tuning left it as it was, and the difference is exactly zero.
        run: sees and may replace `[B, T, D]`.
        scales: scales of norms that are held, as in `BridgeParts.norm_scale_hooks`.
    """
    inputs: list[Tensor] = []

    def show(y_BTD: Tensor, hook: object) -> Tensor | None:
        base_BTD = y_BTD if base_mlp is None else base_mlp(inputs.pop().flatten(0, -2)).view_as(y_BTD)
        difference_BTD = run(y_BTD - base_BTD)
        return None if difference_BTD is None else difference_BTD + base_BTD

    read = Site(site.layer, "mlp_normalized")
    keep = [] if base_mlp is None else parts.normalized_hooks(read, inputs.append, scales)
    return [*keep, (parts.hook_name(Site(site.layer, "mlp_out", site.model)), show)]


def _kind(parts: BridgeParts) -> str:
    shape, dtype = parts.shape, str(parts.dtype).removeprefix("torch.")
    return f"{parts.architecture}, {shape.n_layers} layers, d_model {shape.d_model}, {dtype} on {parts.device}"


def _same_mlp(parts: BridgeParts, base: BridgeParts, layer: int) -> bool:
    own, others = parts.mlp_tensors(layer), base.mlp_tensors(layer)
    return len(own) == len(others) and all(map(torch.equal, own, others))
