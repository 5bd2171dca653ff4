"""Patching: passes over copies of one prompt in which features are changed and everything else reacts, or is held.

Letters: B copies, T tokens, R = B T rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook, LanguageModel
from replacement.splicing.interventions import Intervention, difference, intervene
from replacement.splicing.splice import Splice, read_rows, run_together

Change = Callable[[int, Features, Features], Features]
"""`change(group, features, current)`: the features of a group (row = copy * T + position) with some of them changed;
`current` has the activations that multiples and sums refer to."""

WRITES = {"mlp": "mlp_out", "attention": "attn_out"}
"""Kind of site that the crosscoder of each part writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What reacts to a change, and what is held at its value in the original model's run.

    Raises:
        ValueError: an option outside its choices.
    """

    errors: str = "keep"
    """`keep` adds the clean run's reconstruction errors back; `drop` leaves them out."""
    patterns: str = "live"
    """Attention patterns: `live` or `frozen`."""
    norms: str = "live"
    """Scales of the residual stream's norms: `live` or `frozen`."""
    mlps: str = "replaced"
    """Outputs outside `constrained_layers`: `replaced` by the crosscoder, whose features react; or the model's own
    (`original`), to which the changed features' change is added (only inside them, where they are given: what the model's
    own later MLPs make of it need not be added once more)."""
    constrained_layers: Collection[int] | None = None
    """Constrained patching: at these layers every output is held at its clean value plus what the change of the changed
    features writes there, and no feature reacts (skip terms, which are linear, follow the stream); None for no layer."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("errors", ("keep", "drop")),
            ("patterns", ("live", "frozen")),
            ("norms", ("live", "frozen")),
            ("mlps", ("replaced", "original")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class Patched:
    """What one pass over B copies showed."""

    logits_BTV: Tensor
    features: Mapping[str, Features]
    """By part: what the crosscoder reads off the streams of this run, changed features at their new values; row =
    copy * T + position. At held layers this is what features would read, not what is written."""
    inputs: Mapping[Site, Tensor]
    """Every read site, `[R, D]`."""


class Patcher:
    """One prompt, run once without changes and then any number of times with them."""

    def __init__(
        self,
        language_model: LanguageModel,
        crosscoders: Mapping[str, Crosscoder],
        tokens_T: Tensor,
        conditions: Conditions,
    ) -> None:
        """Run the prompt in the original model.

        Raises:
            ValueError: a layer the model does not have.
        """
        self.language_model, self.crosscoders = language_model, dict(crosscoders)
        self.tokens_T, self.conditions = tokens_T, conditions
        self.held = frozenset(conditions.constrained_layers or ())
        n_layers = language_model.shape.n_layers
        if wrong := [layer for layer in self.held if not 0 <= layer < n_layers]:
            raise ValueError(f"constrained_layers holds {min(wrong)}: the model has layers 0 to {n_layers - 1}")
        sites = {site for each in self.crosscoders.values() for site in each.wiring.read_sites}
        sites |= {Site(layer, WRITES[part]) for part in self.crosscoders for layer in range(n_layers)}
        with torch.no_grad():
            logits_1TV, self.clean = read_rows(language_model, tokens_T[None], sites)
            self.clean_features = {part: each.encode(self._inputs(each)) for part, each in self.crosscoders.items()}
            frozen = conditions.patterns == "frozen"
            self._patterns = language_model.read_patterns(tokens_T[None]) if frozen else None
            frozen = conditions.norms == "frozen"
            self._scales = language_model.read_norm_scales(tokens_T) if frozen else None
            self.errors = self._clean_errors() if conditions.errors == "keep" else {}
        self.original_logits_TV = logits_1TV[0]

    @torch.no_grad()
    def run(
        self,
        changes: Mapping[str, Change],
        *,
        n_copies: int = 1,
        errors: Mapping[Site, Tensor] | None = None,
        hooks: Mapping[Site, Hook] | None = None,
    ) -> Patched:
        """One pass over copies of the prompt.

        Args:
            changes: by part, what is changed.
            errors: error terms `[R, D]` of written sites, instead of the prompt's own.
            hooks: see `[B, T, D]` at their sites and may change it, before features are read there.
        """
        tokens_BT = self.tokens_T.expand(n_copies, -1)
        clean = {site: x_TD.repeat(n_copies, 1) for site, x_TD in self.clean.items()}
        kept = errors or {site: x_TD.repeat(n_copies, 1) for site, x_TD in self.errors.items()}
        splices = [_PatchedSplice(self, part, tokens_BT, clean, changes.get(part), kept) for part in self.crosscoders]
        logits_BTV = run_together(splices, hooks=hooks, patterns=self._patterns, norm_scales=self._scales)
        return Patched(
            logits_BTV,
            {
                splice.part: Features.concatenate([splice.features[g] for g in sorted(splice.features)])
                for splice in splices
            },
            {site: x for splice in splices for site, x in splice.inputs.items()},
        )

    def _clean_errors(self) -> dict[Site, Tensor]:
        errors = {}
        for each in self.crosscoders.values():
            for site, y_TD in each(self._inputs(each)).reconstructions.items():
                errors[site] = self.clean[site] - y_TD
        return errors

    def _inputs(self, crosscoder: Crosscoder) -> dict[Site, Tensor]:
        return {site: self.clean[site] for site in crosscoder.wiring.read_sites}


class _PatchedSplice(Splice):
    """The part of one crosscoder in a pass over copies of a prompt."""

    def __init__(
        self,
        patcher: Patcher,
        part: str,
        tokens_BT: Tensor,
        clean: Mapping[Site, Tensor],
        change: Change | None,
        errors: Mapping[Site, Tensor],
    ) -> None:
        super().__init__(patcher.language_model, patcher.crosscoders[part], tokens_BT)
        own = patcher.conditions.mlps == "original"
        self._errors = {site: errors[site] for site in self.written if site in errors}
        self.part, self.held = part, patcher.held
        self._clean, self._change, self._own = clean, change, own
        self._writes_on = not (own and self.held)  # outside the held layers
        self._changes: dict[Site, Tensor] = {}
        self._clean_features = patcher.clean_features[part]

    def hooks(self) -> dict[Site, Hook]:
        hooks = super().hooks()
        for layer in self.held:
            site = Site(layer, WRITES[self.part])
            if site not in hooks:  # a layer that the crosscoder does not write
                hooks[site] = self._writer(site)
        return hooks

    def _writer(self, site: Site) -> Hook:
        if not self._own and site.layer not in self.held:
            return super()._writer(site)

        def hook(x_BTD: Tensor) -> Tensor | None:
            change_RD = self._changes.pop(site, None)
            if site.layer in self.held:
                y_RD = self._clean[site] if change_RD is None else self._clean[site] + change_RD
                return y_RD.to(x_BTD).view_as(x_BTD)
            return None if change_RD is None else x_BTD + change_RD.to(x_BTD).view_as(x_BTD)

        return hook

    def _respond(self, group: int, read: Features, inputs: Mapping[Site, Tensor]) -> None:
        """Where a group's layer is held its features keep their clean activations, but for those that are changed."""
        base = read
        if self.crosscoder.wiring.group_layer(group) in self.held:
            base = copies_of(self._clean_features.of(group), len(self.tokens_BT))
        self._follow_skips(group, inputs)
        written = base if self._change is None else self._change(group, base, base)
        self.features[group] = read if self._change is None else self._change(group, read, base)
        if self._change is not None:
            self._add_changes(group, difference(written, base, group=group))
        if not self._own:
            self._add(self._sums, group, written, inputs)

    def _follow_skips(self, group: int, inputs: Mapping[Site, Tensor]) -> None:
        """At held layers, what the skip terms of a group make of the change of its inputs."""
        if not self.crosscoder.skip or not self.held:
            return
        clean = self._scaled(group, self._clean)
        changes = {site: x_RD - clean[site] for site, x_RD in inputs.items()}
        for site, y_RD in self.crosscoder.skip_contribution(changes, groups=[group]).items():
            if site.layer in self.held:
                self._changes[site] = self._changes[site] + y_RD if site in self._changes else y_RD

    def _add_changes(self, group: int, changed: Features) -> None:
        sites = [
            s for s in self.crosscoder.wiring.writes[group] if s.layer in self.held or (self._own and self._writes_on)
        ]
        if not len(changed) or not sites:
            return
        for site, y_RD in self.crosscoder.decode_contribution(changed, groups=[group], sites=sites).items():
            self._changes[site] = self._changes[site] + y_RD if site in self._changes else y_RD


def changes_of(interventions: Mapping[str, Sequence[Sequence[Intervention]]], patcher: Patcher) -> dict[str, Change]:
    """Interventions as functions of features.

    Args:
        interventions: by part, for each copy of the prompt those on its features, checked.
    """
    n_positions = len(patcher.tokens_T)
    return {
        part: _change(own, n_positions=n_positions, first_position=patcher.crosscoders[part].undecomposed_positions)
        for part, own in interventions.items()
    }


def _change(own: Sequence[Sequence[Intervention]], *, n_positions: int, first_position: int) -> Change:
    def change(group: int, features: Features, current: Features) -> Features:
        return intervene(
            features, own, group=group, current=current, n_positions=n_positions, first_position=first_position
        )

    return change


def copies_of(features: Features, n_copies: int) -> Features:
    """The features of one group and one prompt, repeated for every copy of the prompt."""
    starts = torch.arange(n_copies, device=features.row.device)[:, None] * features.n_rows
    return Features(
        features.group.repeat(n_copies),
        (features.row + starts).flatten(),
        features.index.repeat(n_copies),
        features.activation.repeat(n_copies),
        features.n_rows * n_copies,
        features.n_groups,
        features.n_features,
    )
