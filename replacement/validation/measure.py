"""One slice measured: its tokens are passed over once, and every protocol's sums grow. R = B T rows of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import LanguageModel
from replacement.validation.outputs import OriginalSums, OutputSums, compare, read_original
from replacement.validation.protocols import ERRORS_KEPT, MEAN, PROPAGATED, ZERO, Protocol, Run, protocols
from replacement.validation.reconstruction import Activity, SiteErrors, SiteMeans
from replacement.validation.slices import Slice
from replacement.validation.worst import WorstTokens

Progress = Callable[[int], None]
"""Told how many tokens were run since it was last told, once for every forward pass."""

SELF_CHECK_TOKENS = 4096
"""Tokens after which `errors kept`, which equals the original whatever the tokens, is not run any more."""


def no_progress(n_tokens: int) -> None:
    """Tell nobody."""


@torch.no_grad()
def site_means(
    lm: LanguageModel, crosscoders: Sequence[Crosscoder], part: Slice, progress: Progress = no_progress
) -> dict[Site, Tensor]:
    """Mean of every written site over the tokens its crosscoder replaces.

    Raises:
        ValueError: the slice has no such token.
    """
    all_means: dict[Site, Tensor] = {}
    sums = [SiteMeans() for _ in crosscoders]
    for batch in part.batches():
        run = Run(lm, crosscoders, batch)
        for each, mask_BT, own in zip(crosscoders, run.replaced_BT, sums, strict=True):
            asked_R = mask_BT.flatten()
            own.add({site: run.clean[site][asked_R] for site in each.wiring.write_sites})
        progress(batch.tokens_BT.numel())
    for own in sums:
        all_means |= own.value()
    return all_means


class Measured:
    """Everything one pass over a slice adds up."""

    def __init__(self, crosscoders: Sequence[Crosscoder], chosen: Iterable[Protocol], *, n_worst: int = 0) -> None:
        sites = [site for each in crosscoders for site in each.wiring.write_sites]
        self.chosen = tuple(chosen)
        self.errors = SiteErrors(sites)
        self.activity = [Activity(each) for each in crosscoders]
        self.original = OriginalSums()
        self.outputs = {protocol.name: OutputSums() for protocol in self.chosen}
        self.worst = WorstTokens(n_worst) if n_worst else None

    def facts(self) -> dict[str, Any]:
        """Plain JSON value of reconstruction, original and protocols."""
        ablated = {name: self.outputs[name] for name in (ZERO, MEAN) if name in self.outputs}
        parts = [activity.facts() for activity in self.activity]
        return {
            "n_tokens": self.original.n_tokens,
            "reconstruction": {
                **self.errors.facts(),
                "crosscoders": parts,
                **{key: sum(part[key] for part in parts) for key in ("l0", "dead", "dense")},
            },
            "original": self.original.facts(),
            "protocols": {name: sums.facts(ablated) for name, sums in self.outputs.items() if sums.kl.count},
        }


@torch.no_grad()
def measure_slice(
    lm: LanguageModel,
    crosscoders: Sequence[Crosscoder],
    part: Slice,
    means: Mapping[Site, Tensor],
    *,
    names: Iterable[str] | None = None,
    n_worst: int = 0,
    progress: Progress = no_progress,
) -> Measured:
    """Run the original and every protocol named over a slice.

    Args:
        means: of every written site, for mean ablation.
        names: protocols; all by default.
        n_worst: tokens of largest KL kept, with errors propagating.

    Raises:
        ValueError: the slice has no token that a crosscoder decomposes.
    """
    known = protocols(crosscoders)
    measured = Measured(crosscoders, [known[name] for name in names or known], n_worst=n_worst)
    for batch in part.batches():
        run = Run(lm, crosscoders, batch)
        progress(batch.tokens_BT.numel())
        original = read_original(run.logits_BTV, run.tokens_BT, run.asked_BT, run.keep_BT)
        if not len(original.best_K):
            continue
        measured.original.add(original, batch.answers)
        _reconstruct(run, measured)
        for protocol in measured.chosen:
            sums = measured.outputs[protocol.name]
            if protocol.name == ERRORS_KEPT and sums.kl.count >= SELF_CHECK_TOKENS:
                continue
            changed = compare(original, run.logits(protocol, means))
            sums.add(original, changed, batch.answers)
            if measured.worst is not None and protocol.name == PROPAGATED:
                measured.worst.add(original, changed)
            progress(batch.tokens_BT.numel())
    if not measured.original.n_tokens:
        raise ValueError(f"{part.name}: no token to measure: expected at least one that the crosscoder decomposes")
    return measured


def _reconstruct(run: Run, measured: Measured) -> None:
    """Clean reads of one pass: errors of every site and firing of every feature, at the tokens asked about."""
    for each, splice, replaced_BT, activity in zip(
        run.crosscoders, run.clean_splices(), run.replaced_BT, measured.activity, strict=True
    ):
        asked_R = (run.asked_BT & replaced_BT).flatten()
        activity.add(splice.features, asked_R)
        for site in each.wiring.write_sites:
            measured.errors.add(site, run.clean[site][asked_R], run.reconstruction(site)[asked_R])
