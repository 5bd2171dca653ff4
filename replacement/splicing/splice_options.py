"""What can be asked of a splice, and what is refused: reads, sites, masks of tokens, held layers, crosscoders side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLayers:
    """Layers whose outputs are held at their clean values plus what changed features write there (constrained patching)."""

    layers: frozenset[int]
    sites: tuple[Site, ...]
    """The held outputs, one per layer, whether the crosscoder writes there or not; of an adapter whole MLP outputs, too."""
    clean: Mapping[Site, Tensor]
    """Activations `[R, D]` of the original run at these sites and at all read sites."""
    features: Features
    """What the crosscoder reads there: the activations that features of held layers have."""


def possible_reads(wiring: Wiring, activation: Activation | None = None) -> tuple[str, ...]:
    """Which `reads` a splice can have: both, only `clean` (acausal, or features chosen over all groups together), or none (a
    second model is involved)."""
    if any(site.model for site in (*wiring.read_sites, *wiring.write_sites)):
        return ()
    # Two sites may share a point of the residual timeline (resid_post and the next resid_pre), and still one comes first.
    in_order = all(max(reads) <= min(writes) for reads, writes in zip(wiring.reads, wiring.writes, strict=True))
    by_group = activation is None or not activation.chooses_over_groups
    return ("propagated", "clean") if in_order and by_group else ("clean",)


def replaced_tokens(tokens_BT: Tensor, undecomposed_positions: int, keep_BT: Tensor | None) -> Tensor | None:
    """Mask `[B, T]` of the tokens whose output is replaced; None for all of them.

    Args:
        undecomposed_positions: first positions of every row that are not.
        keep_BT: bool mask of the others that are.

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    if keep_BT is None and not undecomposed_positions:
        return None
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if keep_BT is None else keep_BT.to(tokens_BT.device)
    if mask_BT.shape != tokens_BT.shape or mask_BT.dtype != torch.bool:
        raise ValueError(
            f"the mask must be bool of shape {list(tokens_BT.shape)}, got {mask_BT.dtype} of {list(mask_BT.shape)}"
        )
    return mask_BT & (torch.arange(tokens_BT.shape[1], device=tokens_BT.device) >= undecomposed_positions)


def check_together(crosscoders: Sequence[Crosscoder]) -> None:
    """Check that crosscoders can be spliced into one pass.

    Raises:
        ValueError: two use one site.
    """
    seen: set[Site] = set()
    for crosscoder in crosscoders:
        sites = {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites}
        if sites & seen:
            raise ValueError(f"two crosscoders spliced together must not share a site: both use {min(sites & seen)}")
        seen |= sites


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    """Check an option that has a few values.

    Raises:
        ValueError: names the option, its values and what was given.
    """
    if given not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {given!r}")


def check_reads(crosscoder: Crosscoder, reads: str) -> None:
    """Check that a splice of this crosscoder can have these `reads`.

    Raises:
        ValueError: it cannot, and why.
    """
    wiring = crosscoder.wiring
    possible = possible_reads(wiring, crosscoder.activation)
    if not possible:
        raise ValueError(f"a {wiring.name} crosscoder reads or writes a second model: it cannot be spliced into one")
    if reads not in possible:
        together = crosscoder.activation.chooses_over_groups
        why = "chooses features over all layers together" if together else "writes sites before those it reads"
        raise ValueError(f"this {wiring.name} crosscoder {why}: it can be spliced with reads='clean' only")


def sites_to_replace(wiring: Wiring, sites: Iterable[Site] | None) -> tuple[Site, ...]:
    """The sites named, in forward order; all that the wiring writes by default.

    Raises:
        ValueError: one that it does not write.
    """
    chosen = set(wiring.write_sites if sites is None else sites)
    if chosen - set(wiring.write_sites):
        known = ", ".join(map(str, wiring.write_sites))
        raise ValueError(f"the crosscoder writes {known}, not {min(chosen - set(wiring.write_sites))}")
    return tuple(sorted(chosen))
