"""The splice: hooks that put a crosscoder's reconstructions in the place of the sites it writes, in one forward pass.

This is the one engine for running a model with crosscoders in place. It serves every wiring of one model: transcoders,
autoencoders (the hook that reads a site returns its reconstruction), weakly causal and attention crosscoders; with and without
gradients to the crosscoder's weights. `clean_run.py` makes many passes over one prompt with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import EnoughSeen, Hook, LanguageModel
from replacement.splicing.feature_changes import Change, difference
from replacement.splicing.scaled_crosscoder import ScaledCrosscoder, add_sites
from replacement.splicing.splice_options import HeldLayers, check_choice, check_reads, replaced_tokens, sites_to_replace


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
        check_reads(crosscoder, reads)
        self.language_model, self.crosscoder, self.tokens_BT = language_model, crosscoder, tokens_BT
        self.written = sites_to_replace(crosscoder.wiring, sites)
        self.inputs: dict[Site, Tensor] = {}
        self.features: dict[int, Features] = {}
        self._change, self._held, self._keeps_mlps = change, held, mlps == "original"
        self._replaced_sites = tuple(site for site in self.written if not self._is_held(site))
        self._replaced_BT = replaced_tokens(tokens_BT, crosscoder.undecomposed_positions, keep_BT)
        self._scaled = ScaledCrosscoder(crosscoder, scales or {}, tokens_BT.shape, keep_BT=self._replaced_BT)
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
        hooks: dict[Site, Hook] = {site: self._writer(site) for site in self._replaced_sites}
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
            y_RD = self._scaled.reconstruction(site, self._sums[site] if self._reads_clean else self._sums.pop(site))
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
        for groups in self._scaled.encoded_together:
            writers = [group for group in groups if written.intersection(wiring.writes[group])]
            reads = {read for group in groups for read in wiring.reads[group]}
            if writers and site in reads and reads <= self.inputs.keys():
                features = self._scaled.encode(groups, self.inputs)
                for group in writers:
                    self._respond(group, features.of(group), self._scaled.inputs([group], self.inputs))

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
            self._scaled.add(self._sums, group, written, inputs, self._replaced_sites)

    def _add_changes(self, group: int, current: Features, written: Features, inputs: Mapping[Site, Tensor]) -> None:
        """What changed features write at sites that are not replaced, and what skip terms add at held ones."""
        writes = [site for site in self.crosscoder.wiring.writes[group] if site in self.written]
        held = self._held
        if held is not None:
            writes = [site for site in writes if self._is_held(site)]
            if self.crosscoder.skip and writes:  # skip terms are linear, so they follow the stream
                clean = self._scaled.inputs([group], held.clean)
                changes = {site: x_RD - clean[site] for site, x_RD in inputs.items()}
                add_sites(self._added, self.crosscoder.skip_contribution(changes, groups=[group]), writes)
        elif not self._keeps_mlps:
            return
        changed = difference(written, current, group=group) if written is not current else None
        if changed is not None and len(changed) and writes:
            contribution = self.crosscoder.decode_contribution(changed, groups=[group], sites=writes)
            add_sites(self._added, contribution, writes)

    @torch.no_grad()
    def _clean_errors(self, clean: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        sums: dict[Site, Tensor] = {}
        for groups in self._scaled.encoded_together:
            features = self._scaled.encode(groups, clean)
            for group in groups:
                inputs = self._scaled.inputs([group], clean)
                self._scaled.add(sums, group, features.of(group), inputs, self._replaced_sites)
        return {
            site: clean[site].to(sums[site]) - self._scaled.reconstruction(site, sums[site]) for site in self.written
        }


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


def _in_turn(first: Hook, second: Hook) -> Hook:
    """One hook of two: the second sees what the first returns."""

    def hook(x_BTD: Tensor) -> Tensor | None:
        changed_BTD = first(x_BTD)
        returned_BTD = second(x_BTD if changed_BTD is None else changed_BTD)
        return changed_BTD if returned_BTD is None else returned_BTD

    return hook


def _rows(x_BTD: Tensor) -> Tensor:
    """`[B, T, D]`, or `[B, T, H, K]` with its heads concatenated, as rows `[R, D]`."""
    return x_BTD.flatten(2).flatten(0, 1)
