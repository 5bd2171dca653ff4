"""Ways of putting a crosscoder into a model, each one forward pass. B rows, T tokens per row, R = B T, D width.

- `clean`: every written site replaced, features read from the original activations;
- `propagated`: every written site replaced, features read from the stream the replacement itself produces;
- `single SITE`: one site replaced (nothing before it is, so what it reads is clean either way);
- `first K layers`: the sites of layers below K replaced, features read from the replacement's own stream;
- `errors kept`: as `propagated`, with the error terms of the original run added back; equals the original model;
- `zero`, `mean`: every written site set to 0, or to its mean over the tokens of the whole stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook, LanguageModel
from replacement.splicing.replacement_model import ReplacementModel
from replacement.splicing.splice import Splice, read_rows, replaced_tokens, run_together
from replacement.validation.slices import Batch

CLEAN, PROPAGATED, ERRORS_KEPT, ZERO, MEAN = "clean", "propagated", "errors kept", "zero", "mean"
BASIC = (CLEAN, PROPAGATED, ZERO, MEAN)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of replacing sites."""

    name: str
    reads: str
    """`clean`, `propagated`, or `constant` for ablations."""
    sites: frozenset[Site]
    errors: str = "drop"


def protocols(crosscoders: Sequence[Crosscoder]) -> dict[str, Protocol]:
    """Every protocol, by name, in the order of the module's list.

    All K layers are `propagated`, and are not run a second time.
    """
    sites = sorted({site for each in crosscoders for site in each.wiring.write_sites})
    everything = frozenset(sites)
    plan = [
        Protocol(name=CLEAN, reads="clean", sites=everything),
        Protocol(name=PROPAGATED, reads="propagated", sites=everything),
        *(Protocol(name=single(site), reads="clean", sites=frozenset([site])) for site in sites),
        *(
            Protocol(name=first(k), reads="propagated", sites=frozenset(site for site in sites if site.layer < k))
            for k in cumulative(sites)[:-1]
        ),
        Protocol(name=ERRORS_KEPT, reads="propagated", sites=everything, errors="keep"),
        Protocol(name=ZERO, reads="constant", sites=everything),
        Protocol(name=MEAN, reads="constant", sites=everything),
    ]
    return {protocol.name: protocol for protocol in plan}


def single(site: Site) -> str:
    """Name of the protocol that replaces one site."""
    return f"single {site}"


def first(n_layers: int) -> str:
    """Name of the protocol that replaces the first layers."""
    return f"first {n_layers} layers"


def cumulative(sites: Sequence[Site]) -> list[int]:
    """Numbers of layers K at which `first K layers` replaces a site more than before; the last replaces all."""
    return sorted({site.layer + 1 for site in sites})


class Run:
    """The original model's pass over one batch, and everything that is replaced in it.

    Attributes:
        logits_BTV: of the original model.
        clean: original activations `[R, D]` of every read and written site.
        replaced_BT: tokens whose output is replaced, by crosscoder.
        asked_BT: tokens that are measured: those asked for that some crosscoder decomposes.
    """

    def __init__(self, lm: LanguageModel, crosscoders: Sequence[Crosscoder], batch: Batch) -> None:
        self.lm, self.crosscoders = lm, crosscoders
        self.tokens_BT = lm.batch(batch.tokens_BT)
        self.keep_BT = None if batch.keep_BT is None else batch.keep_BT.to(lm.device)
        sites = {site for each in crosscoders for site in (*each.wiring.read_sites, *each.wiring.write_sites)}
        self.logits_BTV, self.clean = read_rows(lm, self.tokens_BT, sites)
        everything_BT = torch.ones_like(self.tokens_BT, dtype=torch.bool)
        self.replaced_BT: list[Tensor] = []
        for each in crosscoders:
            mask_BT = replaced_tokens(self.tokens_BT, each.undecomposed_positions, self.keep_BT)
            self.replaced_BT.append(everything_BT if mask_BT is None else mask_BT)
        self.asked_BT = torch.stack(self.replaced_BT).any(dim=0)
        if batch.asked_BT is not None:
            self.asked_BT = self.asked_BT & batch.asked_BT.to(lm.device)
        self._clean_splices: list[Splice] = []
        self._clean_hooks: dict[Site, Hook] = {}

    def logits(self, protocol: Protocol, means: Mapping[Site, Tensor]) -> Tensor:
        """Logits `[B, T, V]` of one protocol."""
        if protocol.reads == "constant":
            return self.lm.run(self.tokens_BT, self._constants(None if protocol.name == ZERO else means))
        if protocol.reads == "clean" and protocol.errors == "drop":
            hooks = self.clean_hooks()
            return self.lm.run(self.tokens_BT, {site: hooks[site] for site in protocol.sites})
        splices = [
            self._splice(each, sites, protocol)
            for each in self.crosscoders
            if (sites := protocol.sites.intersection(each.wiring.write_sites))
        ]
        return run_together(splices)

    def clean_splices(self) -> list[Splice]:
        """One splice of all sites per crosscoder that reads the original activations; its features are known."""
        if not self._clean_splices:
            plan = Protocol(name=CLEAN, reads="clean", sites=frozenset())
            self._clean_splices = [self._splice(each, each.wiring.write_sites, plan) for each in self.crosscoders]
        return self._clean_splices

    def clean_hooks(self) -> dict[Site, Hook]:
        """Hooks that replace each site from clean reads; any part of them is a splice of fewer sites."""
        if not self._clean_hooks:
            self._clean_hooks = {s: hook for splice in self.clean_splices() for s, hook in splice.hooks().items()}
        return self._clean_hooks

    def reconstruction(self, site: Site) -> Tensor:
        """Reconstruction `[R, D]` of a written site from clean reads; tokens not replaced keep their own."""
        x_BTD = self.clean[site].view(*self.tokens_BT.shape, -1)
        y_BTD = self.clean_hooks()[site](x_BTD)
        assert y_BTD is not None
        return y_BTD.flatten(0, 1)

    def _splice(self, crosscoder: Crosscoder, sites: frozenset[Site] | tuple[Site, ...], protocol: Protocol) -> Splice:
        return Splice(
            self.lm,
            crosscoder,
            self.tokens_BT,
            sites=sites,
            reads=protocol.reads,
            errors=protocol.errors,
            keep_BT=self.keep_BT,
            clean=self.clean,
        )

    def _constants(self, means: Mapping[Site, Tensor] | None) -> dict[Site, Hook]:
        """Hooks that set every written site to its mean, or to 0."""
        hooks: dict[Site, Hook] = {}
        for each, mask_BT in zip(self.crosscoders, self.replaced_BT, strict=True):
            for site in each.wiring.write_sites:
                hooks[site] = _constant(mask_BT, None if means is None else means[site])
        return hooks


def crosscoders_of(model: ReplacementModel) -> list[Crosscoder]:
    """The one or two crosscoders of a replacement model."""
    return list(model.crosscoders.values())


def _constant(mask_BT: Tensor, value_D: Tensor | None) -> Hook:
    def hook(x_BTD: Tensor) -> Tensor:
        flat_BTD = x_BTD.flatten(2)
        new_D = torch.zeros_like(flat_BTD[0, 0]) if value_D is None else value_D.to(flat_BTD)
        return torch.where(mask_BT[..., None], new_D, flat_BTD).view_as(x_BTD)

    return hook
