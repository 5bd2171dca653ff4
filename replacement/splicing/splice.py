"""The splice: one forward pass of a language model with a crosscoder's reconstructions in place of the sites it writes.

It serves every wiring of one model: transcoders, autoencoders (the hook that reads a site returns its reconstruction),
weakly causal and attention crosscoders; with and without gradients to the crosscoder's weights.

Letters: B batch, T tokens, R = B T rows, D site width, S active features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring
from replacement.language_model.language_model import EnoughSeen, Hook, LanguageModel
from replacement.splicing.interventions import Intervention, check_interventions, intervene


class Splice:
    """One forward pass of a language model in which a crosscoder overwrites the sites it writes.

    >>> splice = Splice(lm, crosscoder, tokens_BT)              # doctest: +SKIP
    >>> logits = splice.run()                                   # doctest: +SKIP
    >>> splice.features[2], splice.inputs[Site(2, "resid_mid")] # doctest: +SKIP

    The weights get gradients unless they are frozen or gradients are off; clean activations and error terms are constants.

    Attributes:
        inputs: after the run, what each read site showed, raw, `[R, D]`.
        features: after the run, the active features of each group that writes a replaced site, by group number; row =
            prompt * T + position. Tokens that keep their own output have none.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        crosscoder: Crosscoder,
        tokens_BT: Tensor,
        *,
        sites: Iterable[Site] | None = None,
        reads: str = "propagated",
        errors: str = "drop",
        interventions: Iterable[Intervention] = (),
        scales: Mapping[Site, float] | None = None,
        keep_BT: Tensor | None = None,
        clean: Mapping[Site, Tensor] | None = None,
    ) -> None:
        """Prepare the pass; reads the original model where the options need it.

        Args:
            tokens_BT: token ids.
            sites: written sites to replace; all by default, none is allowed.
            reads: `propagated` encodes the stream that the replaced sites produced; `clean` encodes the original one.
            errors: `drop` lets reconstruction errors propagate; `keep` adds the error of the clean run back to every
                replaced site, which gives the original logits when there are no interventions.
            interventions: features to change, the same in every prompt of the batch.
            scales: for a crosscoder that lives in scaled activations, as while training: it reads `scale * x`, and what
                it writes is divided by the site's scale. 1 where absent.
            keep_BT: bool mask of the tokens to replace; the others keep their own output, as do positions before
                `undecomposed_positions`. All by default.
            clean: activations `[R, D]` of the original run at all read and written sites, if they are known already.

        Raises:
            ValueError: an option outside its choices, a site the crosscoder does not write, an unknown feature, a mask of
                another shape, or a wiring that cannot be spliced that way.
        """
        for name, given, choices in (("errors", errors, ("drop", "keep")), ("reads", reads, ("propagated", "clean"))):
            if given not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {given!r}")
        _check_wiring(crosscoder.wiring, reads)
        self.language_model, self.crosscoder, self.tokens_BT = language_model, crosscoder, tokens_BT
        self.written = _written_sites(crosscoder.wiring, sites)
        self.interventions = check_interventions(
            interventions,
            n_groups=crosscoder.n_groups,
            n_positions=tokens_BT.shape[1],
            n_features=crosscoder.n_features,
            first_position=crosscoder.undecomposed_positions,
        )
        self._check_reached()
        self.inputs: dict[Site, Tensor] = {}
        self.features: dict[int, Features] = {}
        self._scales = dict(scales or {})
        self._replaced_BT = replaced_tokens(tokens_BT, crosscoder.undecomposed_positions, keep_BT)
        self._sums: dict[Site, Tensor] = {}
        self._errors: dict[Site, Tensor] = {}
        self._reads_clean = reads == "clean"
        if errors == "keep" or self._reads_clean:
            known = clean or read_rows(language_model, tokens_BT, {*crosscoder.wiring.read_sites, *self.written})[1]
            self._errors = self._clean_errors(known) if errors == "keep" else {}
            for site in crosscoder.wiring.read_sites if self._reads_clean else ():
                self._take(site, known[site])

    def _check_reached(self) -> None:
        """An intervention on features that write none of the replaced sites would do nothing."""
        for one in self.interventions:
            if not set(self.crosscoder.wiring.writes[one.group]) & set(self.written):
                replaced = ", ".join(map(str, self.written)) or "no site"
                raise ValueError(f"intervention on group {one.group} would do nothing: only {replaced} is replaced")

    def run(self) -> Tensor:
        """Logits `[B, T, V]` of the spliced model; call it once, or any number of times where reads are clean."""
        return run_together([self])

    def read(self) -> dict[Site, Tensor]:
        """What every read site shows with the sites replaced, `[R, D]`; runs no further than the last of them."""
        hooks = self.hooks()

        def stopping(hook: Hook) -> Hook:
            def run(x_BTD: Tensor) -> Tensor | None:
                replacement = hook(x_BTD)
                if len(self.inputs) == len(self.crosscoder.wiring.read_sites):
                    raise EnoughSeen
                return replacement

            return run

        self.language_model.run_to(self.tokens_BT, {site: stopping(hook) for site, hook in hooks.items()})
        return self.inputs

    def hooks(self) -> dict[Site, Hook]:
        """Hooks for the language model, one per site: readers, unless reads are clean, and writers.

        Where reads are clean the hooks do not depend on each other, and any part of them is a splice of fewer sites.
        """
        hooks: dict[Site, Hook] = {}
        for site in self.written:
            hooks[site] = self._writer(site)
        for site in () if self._reads_clean else self.crosscoder.wiring.read_sites:
            hooks[site] = self._reader(site)
        return hooks

    def _reader(self, site: Site) -> Hook:
        write = self._writer(site) if site in self.written else None

        def hook(x_BTD: Tensor) -> Tensor | None:
            self._take(site, _rows(x_BTD))
            return None if write is None else write(x_BTD)

        return hook

    def _writer(self, site: Site) -> Hook:
        def hook(x_BTD: Tensor) -> Tensor:
            y_RD = self._sums[site] if self._reads_clean else self._sums.pop(site)
            y_RD = self._finish(site, y_RD)
            if site in self._errors:
                y_RD = y_RD + self._errors[site]
            y_BTD = y_RD.to(x_BTD).view_as(x_BTD)
            if self._replaced_BT is None:
                return y_BTD
            mask_BT1 = self._replaced_BT.to(x_BTD.device).view(*x_BTD.shape[:2], *[1] * (x_BTD.ndim - 2))
            return torch.where(mask_BT1, y_BTD, x_BTD)

        return hook

    def _take(self, site: Site, x_RD: Tensor) -> None:
        """Receive one read site; encode and add up every group whose reads are now complete."""
        self.inputs[site] = x_RD
        wiring, written = self.crosscoder.wiring, set(self.written)
        for group, group_reads in enumerate(wiring.reads):
            if not written.intersection(wiring.writes[group]):
                continue  # nothing of this group is asked for
            if site in group_reads and all(read in self.inputs for read in group_reads):
                inputs = self._scaled(group, self.inputs)
                self._respond(group, self._encode(group, inputs), inputs)

    def _respond(self, group: int, read: Features, inputs: Mapping[Site, Tensor]) -> None:
        """Apply the interventions to the features that one group read, and add up what they write."""
        self.features[group] = intervene(
            read,
            [self.interventions] * len(self.tokens_BT),
            group=group,
            n_positions=self.tokens_BT.shape[1],
            first_position=self.crosscoder.undecomposed_positions,
        )
        self._add(self._sums, group, self.features[group], inputs)

    def _scaled(self, group: int, inputs: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """What the crosscoder reads for one group: scaled, in its own dtype."""
        crosscoder = self.crosscoder
        scaled = {}
        for site in crosscoder.wiring.reads[group]:
            x_RD = inputs[site].to(crosscoder.device, crosscoder.dtype)
            scaled[site] = x_RD * self._scales[site] if site in self._scales else x_RD
        return scaled

    def _encode(self, group: int, inputs: Mapping[Site, Tensor]) -> Features:
        """Features of the replaced tokens alone: a choice over the whole batch (BatchTopK) must not see the others."""
        if self._replaced_BT is None:
            return self.crosscoder.encode_group(group, inputs)
        row_K = self._replaced_BT.to(self.crosscoder.device).flatten().nonzero()[:, 0]
        kept = {site: x_RD[row_K] for site, x_RD in inputs.items()}
        features = self.crosscoder.encode_group(group, kept, positions=row_K % self.tokens_BT.shape[1])
        return dataclasses.replace(features, row=row_K[features.row], n_rows=self.tokens_BT.numel())

    def _add(self, sums: dict[Site, Tensor], group: int, features: Features, inputs: Mapping[Site, Tensor]) -> None:
        """Add what one group writes to the replaced sites, skip terms included, in the crosscoder's scale."""
        sites = [site for site in self.crosscoder.wiring.writes[group] if site in self.written]
        if not sites:
            return
        for part in (
            self.crosscoder.skip_contribution(inputs, groups=[group]),
            self.crosscoder.decode_contribution(features, groups=[group], sites=sites),
        ):
            for site in sites:
                if site in part:
                    sums[site] = sums[site] + part[site] if site in sums else part[site]

    def _finish(self, site: Site, sum_RD: Tensor) -> Tensor:
        """Reconstruction of a site from its sum: the bias added, in the model's scale."""
        return (sum_RD + self.crosscoder.decoder_bias(site)) / self._scales.get(site, 1.0)

    @torch.no_grad()
    def _clean_errors(self, clean: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        sums: dict[Site, Tensor] = {}
        for group in range(self.crosscoder.n_groups):
            inputs = self._scaled(group, clean)
            self._add(sums, group, self._encode(group, inputs), inputs)
        return {site: clean[site].to(sums[site]) - self._finish(site, sums[site]) for site in self.written}


def run_together(
    splices: Sequence[Splice],
    *,
    hooks: Mapping[Site, Hook] | None = None,
    patterns: Sequence[Tensor] | None = None,
    norm_scales: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits `[B, T, V]` of one pass in which every splice overwrites its sites.

    Args:
        splices: at least one, of the same tokens and the same model, by crosscoders without a site in common.
        hooks: further hooks; at a site that a splice uses too, the splice sees what they return.
        patterns: attention patterns to hold; see `LanguageModel.run`.
        norm_scales: scales of norms to hold; see `LanguageModel.run`.
    """
    every = dict(hooks or {})
    for splice in splices:
        for site, hook in splice.hooks().items():
            every[site] = in_turn(every[site], hook) if site in every else hook
    lm = splices[0].language_model
    return lm.run(splices[0].tokens_BT, every, patterns=patterns, norm_scales=norm_scales)


def in_turn(first: Hook, second: Hook) -> Hook:
    """One hook of two: the second sees what the first returns."""

    def hook(x_BTD: Tensor) -> Tensor | None:
        changed_BTD = first(x_BTD)
        returned_BTD = second(x_BTD if changed_BTD is None else changed_BTD)
        return changed_BTD if returned_BTD is None else returned_BTD

    return hook


def check_together(crosscoders: Sequence[Crosscoder]) -> None:
    """Check that crosscoders can be spliced into one pass.

    Raises:
        ValueError: two use one site.
    """
    seen: set[Site] = set()
    for crosscoder in crosscoders:
        own = {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites}
        if own & seen:
            raise ValueError(f"two crosscoders spliced together must not share a site: both use {min(own & seen)}")
        seen |= own


@torch.no_grad()
def read_rows(
    language_model: LanguageModel, tokens_BT: Tensor, sites: Iterable[Site]
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits `[B, T, V]` and activations `[R, D]` at sites, of one run of the original model."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Hook:
        def hook(x_BTD: Tensor) -> None:
            seen[site] = _rows(x_BTD)

        return hook

    logits_BTV = language_model.run(tokens_BT, {site: keep(site) for site in sites})
    return logits_BTV, seen


def possible_reads(wiring: Wiring) -> tuple[str, ...]:
    """Which `reads` a splice of this wiring can have: both, only `clean` (acausal), or none (a second model is involved)."""
    if any(site.model for site in (*wiring.read_sites, *wiring.write_sites)):
        return ()
    # Two sites may share a point of the residual timeline (resid_post and the next resid_pre), and still one comes first.
    in_order = all(max(reads) <= min(writes) for reads, writes in zip(wiring.reads, wiring.writes, strict=True))
    return ("propagated", "clean") if in_order else ("clean",)


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


def _check_wiring(wiring: Wiring, reads: str) -> None:
    possible = possible_reads(wiring)
    if not possible:
        raise ValueError(f"a {wiring.name} crosscoder reads or writes a second model: it cannot be spliced into one")
    if reads not in possible:
        raise ValueError(
            f"this {wiring.name} crosscoder writes sites before those it reads: it can be spliced with reads='clean' only"
        )


def _written_sites(wiring: Wiring, sites: Iterable[Site] | None) -> tuple[Site, ...]:
    chosen = set(wiring.write_sites if sites is None else sites)
    if chosen - set(wiring.write_sites):
        known = ", ".join(map(str, wiring.write_sites))
        raise ValueError(f"the crosscoder writes {known}, not {min(chosen - set(wiring.write_sites))}")
    return tuple(sorted(chosen))


def _rows(x_BTD: Tensor) -> Tensor:
    """`[B, T, D]`, or `[B, T, H, K]` with its heads concatenated, as rows `[R, D]`."""
    return x_BTD.flatten(2).flatten(0, 1)
