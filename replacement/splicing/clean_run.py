"""`CleanRun`: the original model's run over some tokens, shared by all passes with crosscoders in place.

The original model runs once. What it showed (activations, features, error terms, attention patterns, norm scales) is computed
when it is first needed, and serves any number of passes under any `Conditions`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook, LanguageModel
from replacement.number_checks import integers
from replacement.splicing.feature_changes import Change, repeat_prompt
from replacement.splicing.splice import Splice, read_rows, run_together
from replacement.splicing.splice_options import HeldLayers, check_choice

WRITES = {"mlp": "mlp_out", "attention": "attn_out"}
"""Kind of site that is the output of each part; its crosscoder writes it, or an adapter a part of it, `mlp_difference`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What reacts to a change of features, and what is held at its value in the original model's run.

    Raises:
        ValueError: an option outside its choices.
    """

    reads: str = "propagated"
    """`propagated` encodes the stream that the replaced outputs produced; `clean` the original one."""
    errors: str = "keep"
    """`keep` adds the clean run's reconstruction errors back; `drop` leaves them out."""
    patterns: str = "live"
    """Attention patterns, those of low-rank sparse attention too: `live` or `frozen`."""
    norms: str = "live"
    """Scales of the residual stream's norms: `live`, `frozen`, or that of the `final` norm alone frozen."""
    mlps: str = "replaced"
    """Outputs outside `constrained_layers`: `replaced` by the crosscoder, whose features react; or the model's own
    (`original`), to which the changed features' change is added (only inside them, where they are given: what the model's
    own later MLPs make of it need not be added once more)."""
    constrained_layers: Collection[int] | None = None
    """Constrained patching: at these layers every output is held at its clean value plus what the change of the changed
    features writes there, and no feature reacts (skip terms, which are linear, follow the stream); None for no layer."""

    def __post_init__(self) -> None:
        check_choice("reads", self.reads, ("propagated", "clean"))
        check_choice("errors", self.errors, ("drop", "keep"))
        check_choice("patterns", self.patterns, ("live", "frozen"))
        check_choice("norms", self.norms, ("live", "frozen", "final"))
        check_choice("mlps", self.mlps, ("replaced", "original"))


@dataclass(frozen=True, slots=True)
class SplicedRun:
    """What one pass with crosscoders in place showed."""

    logits_BTV: Tensor
    features: Mapping[str, Features]
    """By part: what the crosscoder reads off the streams of this run, changed features at their new values; row =
    prompt * T + position. At held layers these are counterfactual: they are read, but not written."""
    inputs: Mapping[Site, Tensor]
    """Every read site, `[R, D]`."""


class CleanRun:
    """Tokens run through the original model, and any number of times with crosscoders in place."""

    def __init__(self, language_model: LanguageModel, crosscoders: Mapping[str, Crosscoder], tokens_BT: Tensor) -> None:
        """Prepare the run; the original model runs when something of it is first needed.

        Args:
            crosscoders: by part, those that are put in place.
            tokens_BT: token ids `[B, T]` that the model can read.
        """
        self.language_model, self.crosscoders, self.tokens_BT = language_model, dict(crosscoders), tokens_BT
        layers = range(language_model.shape.n_layers)
        wirings = [crosscoder.wiring for crosscoder in self.crosscoders.values()]
        self._sites = {site for wiring in wirings for site in (*wiring.read_sites, *wiring.write_sites)}
        self._sites |= {Site(layer, WRITES[part]) for part in self.crosscoders for layer in layers}

    @cached_property
    def _logits_and_activations(self) -> tuple[Tensor, dict[Site, Tensor]]:
        return read_rows(self.language_model, self.tokens_BT, self._sites)

    @property
    def logits(self) -> Tensor:
        """Logits `[B, T, V]` of the original model."""
        return self._logits_and_activations[0]

    @property
    def activations(self) -> dict[Site, Tensor]:
        """Activations `[R, D]` of the original model at every read and written site and at the output of every layer."""
        return self._logits_and_activations[1]

    @cached_property
    def features(self) -> dict[str, Features]:
        """By part: the features that the crosscoder reads off the original run; row = prompt * T + position."""
        with torch.no_grad():
            return {
                part: crosscoder.encode(self._inputs(crosscoder), positions=self._positions)
                for part, crosscoder in self.crosscoders.items()
            }

    @property
    def _positions(self) -> Tensor:
        """Position of every row in its prompt, `[R]`."""
        B, T = self.tokens_BT.shape
        return torch.arange(T, device=self.language_model.device).repeat(B)

    @cached_property
    def _with_frozen_patterns(self) -> dict[str, Crosscoder]:
        """The crosscoders, those that attend with the patterns they have in the original run."""
        with torch.no_grad():
            return {
                part: crosscoder.holding_patterns(self._inputs(crosscoder), positions=self._positions)
                for part, crosscoder in self.crosscoders.items()
            }

    @cached_property
    def errors(self) -> dict[Site, Tensor]:
        """Error term `[R, D]` of every written site: output minus reconstruction, in the original run."""
        errors = {}
        with torch.no_grad():
            for part, crosscoder in self.crosscoders.items():
                skipped = crosscoder.skip_contribution(self._inputs(crosscoder))
                for site, y_RD in crosscoder.decode(self.features[part]).items():
                    errors[site] = self.activations[site] - y_RD - skipped.get(site, 0)
        return errors

    @cached_property
    def patterns(self) -> list[Tensor]:
        """Attention patterns `[B, H, T, T]` of every layer."""
        return self.language_model.read_patterns(self.tokens_BT)

    @cached_property
    def norm_scales(self) -> dict[str, Tensor]:
        """Scale `[T, 1]` of every norm of the residual stream, for a run of one prompt."""
        assert len(self.tokens_BT) == 1, "norm scales are frozen for one prompt"
        return self.language_model.read_norm_scales(self.tokens_BT[0])

    def _inputs(self, crosscoder: Crosscoder) -> dict[Site, Tensor]:
        return {site: self.activations[site] for site in crosscoder.wiring.read_sites}

    def run(
        self,
        conditions: Conditions,
        changes: Mapping[str, Change | None] | None = None,
        *,
        n_copies: int = 1,
        tokens_BT: Tensor | None = None,
        sites: Mapping[str, tuple[Site, ...]] | None = None,
        errors: Mapping[Site, Tensor] | None = None,
        hooks: Mapping[Site, Hook] | None = None,
        gradients: bool = False,
    ) -> SplicedRun:
        """One pass with the crosscoders in place.

        Args:
            changes: by part, how features are changed after they are read.
            n_copies: copies of the (single) prompt that run together, each with changes of its own.
            tokens_BT: token ids `[B, T]` that this pass reads in place of the prompt; what is held stays that of the prompt.
            sites: by part, the written sites that are replaced; all by default.
            errors: error terms `[R, D]` of written sites, instead of the run's own.
            hooks: see `[B, T, D]` at their sites and may change it, before features are read there.
            gradients: whether the logits have gradients to what the changes depend on.

        Raises:
            ValueError: a layer to hold that the model does not have, or a wiring that cannot be spliced that way.
        """
        held_layers = self._held_layers(conditions)
        tokens_BT = self.tokens_BT.repeat(n_copies, 1) if tokens_BT is None else tokens_BT
        needs_clean = bool(held_layers) or conditions.reads == "clean"
        clean = self._copies(self.activations, n_copies) if needs_clean else None
        if errors is None and conditions.errors == "keep":
            errors = self._copies(self.errors, n_copies)
        frozen = conditions.patterns == "frozen"
        crosscoders = self._with_frozen_patterns if frozen else self.crosscoders
        with torch.set_grad_enabled(gradients):
            splices = {
                part: Splice(
                    self.language_model,
                    crosscoder,
                    tokens_BT,
                    sites=None if sites is None else sites[part],
                    reads=conditions.reads,
                    errors=errors or "drop",
                    mlps=conditions.mlps,
                    change=(changes or {}).get(part),
                    held=self._hold(part, held_layers, clean, n_copies) if held_layers and clean is not None else None,
                    clean=clean,
                )
                for part, crosscoder in crosscoders.items()
            }
            logits_BTV = run_together(
                list(splices.values()),
                hooks=hooks,
                patterns=self.patterns if frozen else None,
                norm_scales=self._held_norms(conditions),
            )
        features = {
            part: Features.concatenate([splice.features[group] for group in sorted(splice.features)])
            for part, splice in splices.items()
            if splice.features
        }
        inputs = {site: x_RD for splice in splices.values() for site, x_RD in splice.inputs.items()}
        return SplicedRun(logits_BTV, features, inputs)

    def _held_norms(self, conditions: Conditions) -> dict[str, Tensor] | None:
        if conditions.norms == "live":
            return None
        held = ["ln_final"] if conditions.norms == "final" else list(self.norm_scales)
        return {name: self.norm_scales[name] for name in held}

    def _held_layers(self, conditions: Conditions) -> frozenset[int]:
        n_layers = self.language_model.shape.n_layers
        given = conditions.constrained_layers
        layers = frozenset(() if given is None else integers("constrained_layers", given))
        if wrong := [layer for layer in layers if not 0 <= layer < n_layers]:
            raise ValueError(f"constrained_layers holds {min(wrong)}: the model has layers 0 to {n_layers - 1}")
        return layers

    def _hold(self, part: str, layers: frozenset[int], clean: Mapping[Site, Tensor], n_copies: int) -> HeldLayers:
        sites = tuple(Site(layer, WRITES[part]) for layer in sorted(layers))
        features = self.features[part]
        return HeldLayers(
            layers=layers,
            sites=sites,
            clean=clean,
            features=features if n_copies == 1 else repeat_prompt(features, n_copies),
        )

    def _copies(self, rows: Mapping[Site, Tensor], n_copies: int) -> dict[Site, Tensor]:
        return {site: x_RD if n_copies == 1 else x_RD.repeat(n_copies, 1) for site, x_RD in rows.items()}
