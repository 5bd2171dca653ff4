"""The one engine that measures fidelity: one pass over batches of token rows, in which every sum grows.

The sums are about sites (`metrics.ReconstructionError`), features (`Activity`) and outputs (`outputs.OutputSums`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.splice_options import check_together, possible_reads
from replacement.validation.metrics import ReconstructionError
from replacement.validation.outputs import OriginalOutput, OutputSums, WorstTokens, compare
from replacement.validation.protocols import ERRORS_KEPT, MEAN, PROPAGATED, ZERO, BatchRun, Protocol
from replacement.validation.slices import Batch

Progress = Callable[[int], None]
"""Called after every forward pass with the number of tokens it ran."""

DENSE_ABOVE = 0.1
"""A feature that fires on a larger share of the tokens is called dense."""
SELF_CHECK_TOKENS = 4096
"""Tokens after which `errors kept`, which equals the original whatever the tokens, is not run any more."""


def no_progress(n_tokens: int) -> None:
    """No-op callback."""


class Activity:
    """On how many tokens each feature of a crosscoder fires.

    Attributes:
        n_tokens: tokens seen.
    """

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.wiring, self.n_features = crosscoder.wiring, crosscoder.n_features
        self.n_tokens = 0
        self._fired_GF = torch.zeros(crosscoder.n_groups, crosscoder.n_features, dtype=torch.int64)

    def add(self, features: Features, measured_P: Tensor) -> None:
        """Add the features of P tokens, counting those that are measured."""
        self.n_tokens += int(measured_P.sum())
        counted = measured_P.to(features.row.device)[features.row] & (features.activation != 0)
        place = features.group[counted] * self.n_features + features.index[counted]
        self._fired_GF += torch.bincount(place, minlength=self._fired_GF.numel()).view_as(self._fired_GF).cpu()

    @property
    def l0(self) -> list[float]:
        """Active features per token of each group."""
        return (self._fired_GF.sum(1) / max(1, self.n_tokens)).tolist()

    def facts(self) -> dict[str, Any]:
        """Plain JSON value."""
        dead_G = (self._fired_GF == 0).sum(1).tolist()
        dense_G = (self._fired_GF > DENSE_ABOVE * self.n_tokens).sum(1).tolist()
        groups = [
            {
                "group": group,
                "layer": self.wiring.group_layer(group),
                "n_features": self.n_features,
                "l0": l0,
                "dead": dead_G[group],
                "dense": dense_G[group],
            }
            for group, l0 in enumerate(self.l0)
        ]
        return {"groups": groups, "l0": sum(self.l0), "dead": sum(dead_G), "dense": sum(dense_G)}


def site_facts(errors: Mapping[Site, ReconstructionError]) -> dict[str, Any]:
    """Plain JSON value; over all sites, sums are taken before the ratio."""
    known = [error.unexplained for error in errors.values() if error.unexplained is not None]
    variance = sum(error.variance for error in errors.values())
    return {
        "sites": [
            {"site": str(site), "layer": site.layer, "unexplained": error.unexplained, "cosine": error.cosine.value()}
            for site, error in errors.items()
        ],
        "unexplained": sum(error.error for error in errors.values()) / variance if variance > 0 else None,
        "unexplained_mean": sum(known) / len(known) if known else None,
    }


class Measured:
    """Everything one pass over batches adds up.

    Attributes:
        errors: reconstruction of the sites that the crosscoders write, on clean activations.
        activity: firing of the features, one per crosscoder.
        original: the original model's output, compared with itself.
        outputs: of every protocol, by name.
        stand_ins: reconstruction by protocols that use no crosscoder (controls), by name.
        worst: tokens of largest KL with errors propagating.
    """

    def __init__(self, crosscoders: Sequence[Crosscoder], protocols: Iterable[Protocol], *, n_worst: int = 0) -> None:
        self.protocols = tuple(protocols)
        sites = [site for crosscoder in crosscoders for site in crosscoder.wiring.write_sites]
        self.errors = {site: ReconstructionError() for site in sites}
        self.activity = [Activity(crosscoder) for crosscoder in crosscoders]
        self.original = OutputSums()
        self.outputs = {protocol.name: OutputSums() for protocol in self.protocols}
        self.stand_ins: dict[str, dict[Site, ReconstructionError]] = {name: {} for name in self.outputs}
        self.worst = WorstTokens(n_worst) if n_worst else None

    @property
    def means(self) -> dict[Site, Tensor]:
        """Mean `[D]` of every written site of the original model, for mean ablation."""
        return {site: error.mean for site, error in self.errors.items()}

    @property
    def n_tokens(self) -> int:
        """Tokens measured."""
        return self.original.kl.count

    def facts(self) -> dict[str, Any]:
        """Plain JSON value of reconstruction, original and protocols."""
        ablated = {name: self.outputs[name] for name in (ZERO, MEAN) if name in self.outputs}
        crosscoders = [activity.facts() for activity in self.activity]
        return {
            "n_tokens": self.n_tokens,
            "reconstruction": {
                **site_facts(self.errors),
                "crosscoders": crosscoders,
                **{key: sum(facts[key] for facts in crosscoders) for key in ("l0", "dead", "dense")},
            },
            "original": {
                "n_tokens": self.n_tokens,
                "cross_entropy": self.original.loss.value(),
                "accuracy": self.original.right.value(),
                "right_but_unsure": self.original.agreed_unsure.count,
            },
            "protocols": {name: sums.facts(ablated) for name, sums in self.outputs.items() if sums.kl.count},
        }


def measure(
    language_model: LanguageModel,
    crosscoders: Sequence[Crosscoder],
    batches: Iterable[Batch],
    protocols: Iterable[Protocol],
    *,
    means: Mapping[Site, Tensor] | None = None,
    scales: Mapping[Site, float] | None = None,
    n_worst: int = 0,
    progress: Progress = no_progress,
) -> Measured:
    """Run the original model and every protocol over batches of rows, and add up how far they are apart.

    Args:
        crosscoders: of any wiring; measured in evaluation mode and left in the mode they came in. Several are spliced into
            one pass: reconstruction is measured on the tokens that each decomposes, outputs on all that some crosscoder does.
            What one over several models reads of the others is part of the batches.
        batches: best held out from training.
        protocols: such as some of `protocols(crosscoders)`; none for a model-diffing crosscoder, which no one model can hold.
        means: of every written site, for the protocol `mean`; such as the `means` of an earlier measurement.
        scales: scale of each site, for a crosscoder that lives in scaled activations, as while training: it reads
            `scale * x`, and what it writes is divided by the site's scale. 1 where absent.
        n_worst: number of tokens of largest KL to keep, with errors propagating.

    Raises:
        ValueError: crosscoders that share a site, rows or masks of a wrong shape, mean ablation without means, a model-diffing
            crosscoder without activations of its other models, or no token to measure.
    """
    protocols = tuple(protocols)
    _check(crosscoders, protocols, means)
    measured = Measured(crosscoders, protocols, n_worst=n_worst)
    n_positions = 0
    with evaluating(*crosscoders):
        for batch in batches:
            run = BatchRun(language_model, crosscoders, batch, scales=scales)
            n_positions = max(n_positions, run.tokens_BT.shape[1])
            progress(run.tokens_BT.numel())
            if bool(run.measured_BT.any()):
                _add(measured, run, batch, means or {}, progress)
    if not measured.n_tokens or not all(activity.n_tokens for activity in measured.activity):
        skipped = max((crosscoder.undecomposed_positions for crosscoder in crosscoders), default=0)
        raise ValueError(
            "no token to measure: expected at least one that is kept and that the crosscoder decomposes "
            f"(it leaves {skipped} positions of every row undecomposed, the rows have {n_positions})"
        )
    return measured


def _check(crosscoders: Sequence[Crosscoder], protocols: Sequence[Protocol], means: object) -> None:
    """Check that crosscoders can be measured together and in these protocols."""
    check_together(crosscoders)
    for crosscoder in crosscoders:
        if not possible_reads(crosscoder.wiring):
            involved = f"a {crosscoder.wiring.name} crosscoder involves several models"
            if len(crosscoders) > 1:
                raise ValueError(f"{involved}: it cannot be measured with others")
            if protocols:
                raise ValueError(f"{involved}: it has no spliced output")
    if means is None and any(protocol.value == "mean" for protocol in protocols):
        raise ValueError("mean ablation needs the means of the written sites: give means")


def _add(measured: Measured, run: BatchRun, batch: Batch, means: Mapping[Site, Tensor], progress: Progress) -> None:
    """Add one batch."""
    original = OriginalOutput(run.logits_BTV, run.tokens_BT, run.measured_BT, run.keep_BT, batch.answers)
    measured.original.add(original, original.unchanged)
    for activity, mask_BT, (outputs, features) in zip(measured.activity, run.masks, run.reconstructions, strict=True):
        measured_P = run.measured_BT[mask_BT]
        activity.add(features, measured_P)
        for site, y_PD in outputs.items():
            measured.errors[site].update(run.clean[site][mask_BT.flatten()][measured_P], y_PD[measured_P])
    for protocol in measured.protocols:
        sums = measured.outputs[protocol.name]
        if protocol.name == ERRORS_KEPT and sums.kl.count >= SELF_CHECK_TOKENS:
            continue
        changed = compare(original, protocol.logits(run, means))
        sums.add(original, changed)
        if measured.worst is not None and protocol.name == PROPAGATED:
            measured.worst.add(original, changed)
        measured_R = run.measured_BT.flatten()
        for site, (target_RD, output_RD) in protocol.stand_ins(run).items():
            error = measured.stand_ins[protocol.name].setdefault(site, ReconstructionError())
            error.update(target_RD[measured_R], output_RD[measured_R])
        progress(run.tokens_BT.numel())


@contextmanager
def evaluating(*crosscoders: Crosscoder) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every crosscoder is back in the mode it came in."""
    were_training = [crosscoder.training for crosscoder in crosscoders]
    for crosscoder in crosscoders:
        crosscoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for crosscoder, was_training in zip(crosscoders, were_training, strict=True):
            crosscoder.train(was_training)
