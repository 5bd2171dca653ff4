"""The splice: hooks that put a crosscoder's reconstructions in the place of the sites it writes, in one forward pass.

This is the one engine for running a model with crosscoders in place. It serves every wiring of one model: transcoders,
autoencoders (the hook that reads a site returns its reconstruction), weakly causal and attention crosscoders; with and without
gradients to the crosscoder's weights. `clean_run.py` makes many passes over one prompt with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring
from replacement.language_model.language_model import EnoughSeen, Hook, LanguageModel
from replacement.splicing.feature_changes import Change, difference


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


class Splice:
    """One forward pass of a language model in which a crosscoder overwrites the sites it writes.

    >>> splice = Splice(lm, crosscoder, tokens_BT)              # doctest: +SKIP
    >>> logits = splice.run()                                   # doctest: +SKIP
    >>> splice.features[2], splice.inputs[Site(2, "resid_mid")] # doctest: +SKIP

    The weights get gradients unless they are frozen or gradients are off; clean activations and error terms are constants.

    Attributes:
        inputs: after the run, what each read site showed, unscaled, `[R, D]`.
        features: after the run, the active features of each group that writes a replaced site, by group number, with changes
            applied; row = prompt * T + position. Tokens that keep their own output have none. At held layers these are the
            counterfactual features of the run's stream, not the clean ones that are written.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        crosscoder: Crosscoder,
        tokens_BT: Tensor,
        *,
        sites: Iterable[Site] | None = None,
        reads: str = "propagated",
        errors: str | Mapping[Site, Tensor] = "drop",
        mlps: str = "replaced",
        change: Change | None = None,
        held: HeldLayers | None = None,
        scales: Mapping[Site, float] | None = None,
        keep_BT: Tensor | None = None,
        clean: Mapping[Site, Tensor] | None = None,
    ) -> None:
        """Prepare the pass; runs the original model where the options need it and `clean` is not given.

        Args:
            tokens_BT: token ids.
            sites: written sites to replace; all by default, none is allowed.
            reads: `propagated` encodes the stream that the replaced sites produced; `clean` encodes the original one.
            errors: `drop` lets reconstruction errors propagate; `keep` adds the error of the clean run back to every
                replaced site, which gives the original logits where no feature is changed; or error terms `[R, D]` by site.
            mlps: `replaced` overwrites the sites; `original` leaves the model's own outputs and adds only what changed
                features write (at held layers alone, where there are some).
            change: changes features after they are read, such as `change_of(interventions, ...)`.
            held: layers whose outputs are held.
            scales: for a crosscoder that lives in scaled activations, as while training: it reads `scale * x`, and what
                it writes is divided by the site's scale. 1 where absent.
            keep_BT: bool mask of the tokens to replace; the others keep their own output, as do positions before
                `undecomposed_positions`. All by default.
            clean: activations `[R, D]` of the original run at all read and written sites, if they are known already.

        Raises:
            ValueError: an option outside its choices, a site the crosscoder does not write, a mask of another shape, or a
                wiring that cannot be spliced that way.
        """
        check_choice("reads", reads, ("propagated", "clean"))
        if isinstance(errors, str):
            check_choice("errors", errors, ("drop", "keep"))
        _check_reads(crosscoder, reads)
        self.language_model, self.crosscoder, self.tokens_BT = language_model, crosscoder, tokens_BT
        self.written = _written_sites(crosscoder.wiring, sites)
        self.inputs: dict[Site, Tensor] = {}
        self.features: dict[int, Features] = {}
        self._change, self._held, self._keeps_mlps = change, held, mlps == "original"
        self._scales = dict(scales or {})
        self._replaced_BT = replaced_tokens(tokens_BT, crosscoder.undecomposed_positions, keep_BT)
        positions_T = torch.arange(tokens_BT.shape[1], device=crosscoder.device)
        self._positions_R = positions_T.repeat(len(tokens_BT))
        self._keep_R = None if self._replaced_BT is None else self._replaced_BT.to(crosscoder.device).flatten()
        groups = range(crosscoder.n_groups)
        self._encoded_together = (
            [groups] if crosscoder.activation.chooses_over_groups else [[group] for group in groups]
        )
        self._sums: dict[Site, Tensor] = {}
        self._added: dict[Site, Tensor] = {}
        self._errors = {} if isinstance(errors, str) else errors
        self._reads_clean = reads == "clean"
        if errors == "keep" or self._reads_clean:
            sites_needed = {*crosscoder.wiring.read_sites, *self.written}
            activations = clean or read_rows(language_model, tokens_BT, sites_needed)[1]
            self._errors = self._clean_errors(activations) if errors == "keep" else self._errors
            for site in crosscoder.wiring.read_sites if self._reads_clean else ():
                self._receive(site, activations[site])

    def run(self) -> Tensor:
        """Logits `[B, T, V]` of the spliced model; call it once, or any number of times where reads are clean."""
        return run_together([self])

    def read(self) -> dict[Site, Tensor]:
        """What every read site shows with the sites replaced, `[R, D]`; runs no further than the last of them."""

        def stop_after_last_read(hook: Hook) -> Hook:
            def run(x_BTD: Tensor) -> Tensor | None:
                replacement = hook(x_BTD)
                if len(self.inputs) == len(self.crosscoder.wiring.read_sites):
                    raise EnoughSeen
                return replacement

            return run

        hooks = {site: stop_after_last_read(hook) for site, hook in self.hooks().items()}
        self.language_model.run_to(self.tokens_BT, hooks)
        return self.inputs

    def hooks(self) -> dict[Site, Hook]:
        """Hooks for the language model, one per site: readers, unless reads are clean, and writers.

        Where reads are clean the hooks do not depend on each other, and any part of them is a splice of fewer sites.
        """
        hooks: dict[Site, Hook] = {site: self._writer(site) for site in self.written if not self._is_held(site)}
        for site in self._held.sites if self._held is not None else ():
            hooks[site] = self._held_writer(site)
        for site in () if self._reads_clean else self.crosscoder.wiring.read_sites:
            hooks[site] = self._reader(site)
        return hooks

    def _reader(self, site: Site) -> Hook:
        write = self._writer(site) if site in self.written else None

        def hook(x_BTD: Tensor) -> Tensor | None:
            self._receive(site, _rows(x_BTD))
            return None if write is None else write(x_BTD)

        return hook

    def _writer(self, site: Site) -> Hook:
        return self._adder(site) if self._keeps_mlps else self._replacer(site)

    def _replacer(self, site: Site) -> Hook:
        """Overwrite a site with its reconstruction, and the error term where there is one."""

        def hook(x_BTD: Tensor) -> Tensor:
            y_RD = self._finish(site, self._sums[site] if self._reads_clean else self._sums.pop(site))
            if site in self._errors:
                y_RD = y_RD + self._errors[site]
            y_BTD = y_RD.to(x_BTD).view_as(x_BTD)
            if self._replaced_BT is None:
                return y_BTD
            mask_BT1 = self._replaced_BT.to(x_BTD.device).view(*x_BTD.shape[:2], *[1] * (x_BTD.ndim - 2))
            return torch.where(mask_BT1, y_BTD, x_BTD)

        return hook

    def _held_writer(self, site: Site) -> Hook:
        """Hold a site at its clean value plus what changes write there."""
        held = self._held
        assert held is not None

        def hook(x_BTD: Tensor) -> Tensor:
            y_RD = held.clean[site]
            for written in self.written:
                if written.layer == site.layer:
                    y_RD = y_RD + self._added.pop(written, 0)
            return y_RD.to(x_BTD).view_as(x_BTD)

        return hook

    def _adder(self, site: Site) -> Hook:
        """Leave a site as the model computes it, plus what changes write there."""

        def hook(x_BTD: Tensor) -> Tensor | None:
            added_RD = self._added.pop(site, None)
            return None if added_RD is None else x_BTD + added_RD.to(x_BTD).view_as(x_BTD)

        return hook

    def _is_held(self, site: Site) -> bool:
        return self._held is not None and site.layer in self._held.layers

    def _receive(self, site: Site, x_RD: Tensor) -> None:
        """Take in one read site; encode and add up every group whose reads are now complete."""
        self.inputs[site] = x_RD
        wiring, written = self.crosscoder.wiring, set(self.written)
        for groups in self._encoded_together:
            writers = [group for group in groups if written.intersection(wiring.writes[group])]
            reads = {read for group in groups for read in wiring.reads[group]}
            if writers and site in reads and reads <= self.inputs.keys():
                features = self._encode(groups, self.inputs)
                for group in writers:
                    self._respond(group, features.of(group), self._scaled([group], self.inputs))

    def _respond(self, group: int, read: Features, inputs: Mapping[Site, Tensor]) -> None:
        """Apply the change to the features that one group read, and add up what they write.

        Features of held layers keep their clean activations, but for those that are changed.
        """
        current = read
        if self._held is not None and self.crosscoder.wiring.group_layer(group) in self._held.layers:
            current = self._held.features.of(group)
        written = current if self._change is None else self._change(group, current, current)
        self.features[group] = read if self._change is None else self._change(group, read, current)
        self._add_changes(group, current, written, inputs)
        if not self._keeps_mlps:
            self._add(self._sums, group, written, inputs)

    def _add_changes(self, group: int, current: Features, written: Features, inputs: Mapping[Site, Tensor]) -> None:
        """What changed features write at sites that are not replaced, and what skip terms add at held ones."""
        writes = [site for site in self.crosscoder.wiring.writes[group] if site in self.written]
        held = self._held
        if held is not None:
            writes = [site for site in writes if self._is_held(site)]
            if self.crosscoder.skip and writes:  # skip terms are linear, so they follow the stream
                clean = self._scaled([group], held.clean)
                changes = {site: x_RD - clean[site] for site, x_RD in inputs.items()}
                _add_sites(self._added, self.crosscoder.skip_contribution(changes, groups=[group]), writes)
        elif not self._keeps_mlps:
            return
        changed = difference(written, current, group=group) if written is not current else None
        if changed is not None and len(changed) and writes:
            contribution = self.crosscoder.decode_contribution(changed, groups=[group], sites=writes)
            _add_sites(self._added, contribution, writes)

    def _scaled(self, groups: Iterable[int], inputs: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """What the crosscoder reads for some groups: scaled, in its own dtype."""
        crosscoder = self.crosscoder
        scaled = {}
        for site in {site for group in groups for site in crosscoder.wiring.reads[group]}:
            x_RD = inputs[site].to(crosscoder.device, crosscoder.dtype)
            scaled[site] = x_RD * self._scales[site] if site in self._scales else x_RD
        return scaled

    def _encode(self, groups: Sequence[int], inputs: Mapping[Site, Tensor]) -> Features:
        """Features of groups that are encoded together, of the replaced tokens alone."""
        crosscoder = self.crosscoder
        together = crosscoder.activation.chooses_over_groups
        encode = crosscoder.encode if together else functools.partial(crosscoder.encode_group, groups[0])
        return encode(self._scaled(groups, inputs), positions=self._positions_R, keep=self._keep_R)

    def _add(self, sums: dict[Site, Tensor], group: int, features: Features, inputs: Mapping[Site, Tensor]) -> None:
        """Add what one group writes to the replaced sites, skip terms included, in the crosscoder's scale."""
        writes = self.crosscoder.wiring.writes[group]
        sites = [site for site in writes if site in self.written and not self._is_held(site)]
        if sites:
            _add_sites(sums, self.crosscoder.skip_contribution(inputs, groups=[group]), sites)
            _add_sites(sums, self.crosscoder.decode_contribution(features, groups=[group], sites=sites), sites)

    def _finish(self, site: Site, sum_RD: Tensor) -> Tensor:
        """Reconstruction of a site from its sum: the bias added, in the model's scale."""
        return (sum_RD + self.crosscoder.decoder_bias(site)) / self._scales.get(site, 1.0)

    @torch.no_grad()
    def _clean_errors(self, clean: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        sums: dict[Site, Tensor] = {}
        for groups in self._encoded_together:
            features = self._encode(groups, clean)
            for group in groups:
                self._add(sums, group, features.of(group), self._scaled([group], clean))
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
    all_hooks = dict(hooks or {})
    for splice in splices:
        for site, hook in splice.hooks().items():
            all_hooks[site] = _in_turn(all_hooks[site], hook) if site in all_hooks else hook
    lm = splices[0].language_model
    return lm.run(splices[0].tokens_BT, all_hooks, patterns=patterns, norm_scales=norm_scales)


@torch.no_grad()
def read_rows(
    language_model: LanguageModel, tokens_BT: Tensor, sites: Iterable[Site]
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits `[B, T, V]` and activations `[R, D]` at sites, of one run of the original model; constants."""
    return run_and_read(language_model, tokens_BT, sites)


def run_and_read(
    language_model: LanguageModel, tokens_BT: Tensor, sites: Iterable[Site]
) -> tuple[Tensor, dict[Site, Tensor]]:
    """The same, with gradients to the language model's weights where these collect some."""
    activations: dict[Site, Tensor] = {}

    def keep(site: Site) -> Hook:
        def hook(x_BTD: Tensor) -> None:
            activations[site] = _rows(x_BTD)

        return hook

    logits_BTV = language_model.run(tokens_BT, {site: keep(site) for site in sites})
    return logits_BTV, activations


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


def _in_turn(first: Hook, second: Hook) -> Hook:
    """One hook of two: the second sees what the first returns."""

    def hook(x_BTD: Tensor) -> Tensor | None:
        changed_BTD = first(x_BTD)
        returned_BTD = second(x_BTD if changed_BTD is None else changed_BTD)
        return changed_BTD if returned_BTD is None else returned_BTD

    return hook


def _check_reads(crosscoder: Crosscoder, reads: str) -> None:
    wiring = crosscoder.wiring
    possible = possible_reads(wiring, crosscoder.activation)
    if not possible:
        raise ValueError(f"a {wiring.name} crosscoder reads or writes a second model: it cannot be spliced into one")
    if reads not in possible:
        together = crosscoder.activation.chooses_over_groups
        why = "chooses features over all layers together" if together else "writes sites before those it reads"
        raise ValueError(f"this {wiring.name} crosscoder {why}: it can be spliced with reads='clean' only")


def _written_sites(wiring: Wiring, sites: Iterable[Site] | None) -> tuple[Site, ...]:
    chosen = set(wiring.write_sites if sites is None else sites)
    if chosen - set(wiring.write_sites):
        known = ", ".join(map(str, wiring.write_sites))
        raise ValueError(f"the crosscoder writes {known}, not {min(chosen - set(wiring.write_sites))}")
    return tuple(sorted(chosen))


def _add_sites(sums: dict[Site, Tensor], terms: Mapping[Site, Tensor], sites: Iterable[Site]) -> None:
    for site in sites:
        if site in terms:
            sums[site] = sums[site] + terms[site] if site in sums else terms[site]


def _rows(x_BTD: Tensor) -> Tensor:
    """`[B, T, D]`, or `[B, T, H, K]` with its heads concatenated, as rows `[R, D]`."""
    return x_BTD.flatten(2).flatten(0, 1)
