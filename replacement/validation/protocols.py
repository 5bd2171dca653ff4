"""Protocols, the ways of putting something in the place of the sites that crosscoders write, each one forward pass.

- `clean`: every written site replaced, features read from the original activations;
- `propagated`: every written site replaced, features read from the stream that the replacement itself produces;
- `single SITE`: one site replaced (nothing before it is, so what it reads is clean either way);
- `first K layers`: the sites of layers below K replaced, features read from the replacement's own stream;
- `errors kept`: as `propagated`, with the error terms of the original run added back; equals the original model;
- `zero`, `mean`: every written site set to 0, or to its mean over the tokens of the whole stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder, CrosscoderOutput
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook, LanguageModel
from replacement.splicing.splice import Splice, read_rows, run_together
from replacement.splicing.splice_options import possible_reads, replaced_tokens
from replacement.validation.slices import Batch

CLEAN, PROPAGATED, ERRORS_KEPT, ZERO, MEAN = "clean", "propagated", "errors kept", "zero", "mean"
BASIC = (CLEAN, PROPAGATED, ZERO, MEAN)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of replacing sites.

    Where reads are propagated, a crosscoder whose wiring allows clean reads only (acausal) reads clean.
    """

    name: str
    about: str = ""
    sites: frozenset[Site]
    reads: str = "clean"
    """`clean` or `propagated`."""
    errors: str = "drop"
    """`keep` adds the error terms of the original run back."""
    value: str = "reconstruction"
    """What the sites are set to: `reconstruction`, `zero` or `mean`."""

    def logits(self, run: BatchRun, means: Mapping[Site, Tensor]) -> Tensor:
        """Logits `[B, T, V]` of the model with the sites replaced."""
        hooks: dict[Site, Hook] = {}
        splices: list[Splice] = []
        for number, crosscoder in enumerate(run.crosscoders):
            sites = [site for site in crosscoder.wiring.write_sites if site in self.sites]
            if (
                sites
                and self.reads == "propagated"
                and "propagated" in possible_reads(crosscoder.wiring, crosscoder.activation)
            ):
                splices.append(
                    Splice(
                        run.language_model,
                        crosscoder,
                        run.tokens_BT,
                        sites=sites,
                        errors=self.errors,
                        scales=run.scales,
                        keep_BT=run.keep_BT,
                        clean=run.clean,
                    )
                )
                continue
            for site in sites:
                if self.value == "reconstruction":
                    value = run.reconstructions[number].reconstructions[site]
                else:
                    value = means[site] if self.value == "mean" else torch.zeros(())
                hooks[site] = overwrite(run.masks[number], value)
        return run_together(splices, hooks=hooks) if splices else run.language_model.run(run.tokens_BT, hooks)

    def stand_ins(self, run: BatchRun) -> Mapping[Site, tuple[Tensor, Tensor]]:
        """Targets and reconstructions `[R, D]` of what is put in the place of sites, where crosscoders do not make them."""
        return {}


def protocols(crosscoders: Sequence[Crosscoder]) -> dict[str, Protocol]:
    """Every protocol, by name, in the order of the module's list.

    All K layers are `propagated`, and are not run a second time.
    """
    sites = sorted({site for crosscoder in crosscoders for site in crosscoder.wiring.write_sites})
    every_site = frozenset(sites)
    plan = [
        Protocol(name=CLEAN, sites=every_site),
        Protocol(name=PROPAGATED, sites=every_site, reads="propagated"),
        *(Protocol(name=single(site), sites=frozenset([site])) for site in sites),
        *(
            Protocol(name=first(k), sites=frozenset(site for site in sites if site.layer < k), reads="propagated")
            for k in cumulative(sites)[:-1]
        ),
        Protocol(name=ERRORS_KEPT, sites=every_site, reads="propagated", errors="keep"),
        Protocol(name=ZERO, sites=every_site, value="zero"),
        Protocol(name=MEAN, sites=every_site, value="mean"),
    ]
    return {protocol.name: protocol for protocol in plan}


def single(site: Site | str) -> str:
    """Name of the protocol that replaces one site."""
    return f"single {site}"


def first(n_layers: int) -> str:
    """Name of the protocol that replaces the first layers."""
    return f"first {n_layers} layers"


def cumulative(sites: Sequence[Site]) -> list[int]:
    """Numbers of layers K at which `first K layers` replaces a site more than before; the last replaces all."""
    return sorted({site.layer + 1 for site in sites})


class BatchRun:
    """The original model's run over one batch, and what crosscoders make of it.

    Attributes:
        logits_BTV: of the original model.
        clean: original activations `[R, D]` of every read and written site.
        masks: for every crosscoder the tokens `[B, T]` whose output it replaces.
        replaced_BT: tokens that some crosscoder replaces; without crosscoders all that are kept.
        measured_BT: tokens that are measured, those of `replaced_BT` that are asked about.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        crosscoders: Sequence[Crosscoder],
        batch: Batch,
        *,
        scales: Mapping[Site, float] | None = None,
    ) -> None:
        """Run the original model; see `measure` for the arguments."""
        self.language_model, self.crosscoders, self.scales = language_model, crosscoders, scales or {}
        self.tokens_BT = language_model.batch(batch.tokens_BT)
        self.keep_BT = None if batch.keep_BT is None else batch.keep_BT.to(language_model.device)
        sites = {
            s for crosscoder in crosscoders for s in (*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites)
        }
        self.logits_BTV, self.clean = read_rows(language_model, self.tokens_BT, {s for s in sites if s.model == 0})
        if missing := sorted(site for site in sites if site.model and site not in (batch.others or {})):
            raise ValueError(
                f"this {crosscoders[0].wiring.name} crosscoder reads {missing[0]} of another model: give others"
            )
        device = self.logits_BTV.device
        self.clean |= {site: x_BTD.flatten(2).flatten(0, 1).to(device) for site, x_BTD in (batch.others or {}).items()}
        self.masks = [self._mask(crosscoder.undecomposed_positions) for crosscoder in crosscoders]
        self.replaced_BT = torch.stack(self.masks).any(dim=0) if self.masks else self._mask(0)
        self.measured_BT = self.replaced_BT
        if batch.asked_BT is not None:
            self.measured_BT = self.measured_BT & batch.asked_BT.to(language_model.device)

    def _mask(self, undecomposed_positions: int) -> Tensor:
        mask_BT = replaced_tokens(self.tokens_BT, undecomposed_positions, self.keep_BT)
        return torch.ones_like(self.tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT

    @cached_property
    def reconstructions(self) -> list[CrosscoderOutput]:
        """What each crosscoder makes of the original activations, at the P tokens it replaces, in the model's scale."""
        return [self._reconstruct(*pair) for pair in zip(self.crosscoders, self.masks, strict=True)]

    def _reconstruct(self, crosscoder: Crosscoder, mask_BT: Tensor) -> CrosscoderOutput:
        inputs = {
            site: self.clean[site].to(crosscoder.device, crosscoder.dtype) * self.scales.get(site, 1.0)
            for site in crosscoder.wiring.read_sites
        }
        positions_R = torch.arange(mask_BT.shape[1], device=crosscoder.device).repeat(len(mask_BT))
        keep_R = mask_BT.flatten().to(crosscoder.device)
        outputs, features = crosscoder(inputs, positions=positions_R, keep=keep_R)
        outputs = {site: y_PD / self.scales.get(site, 1.0) for site, y_PD in outputs.items()}
        return CrosscoderOutput(outputs, features)


def overwrite(mask_BT: Bool[Tensor, "B T"], value: Tensor) -> Hook:
    """A hook that sets the P tokens of a mask to a value `[P, D]`, or all of them to one of `[D]` or `[]`."""

    def hook(x_BTD: Tensor) -> Tensor:
        changed_BTD = x_BTD.flatten(2).clone()
        changed_BTD[mask_BT.to(x_BTD.device)] = value.to(changed_BTD)
        return changed_BTD.view_as(x_BTD)

    return hook
