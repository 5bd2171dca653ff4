"""How faithful a crosscoder is on rows of text: reconstruction, sparsity, and the output with it spliced in.

R rows, T tokens per row, B rows of one pass, K measured tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replacement.crosscoder.checkpoint import check_fits
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook, LanguageModel
from replacement.splicing.splice import Splice, check_together, possible_reads, read_rows, run_together
from replacement.validation.fidelity_metrics import (
    Mean,
    VarianceUnexplained,
    kl_divergence,
    l0,
    next_token_loss,
    top1_agreement,
)
from replacement.validation.passes import evaluating, measured, passes, with_next, zero_hooks


class Fidelity(NamedTuple):
    """Measured over the tokens kept, but for positions the crosscoder leaves undecomposed.

    What follows `unexplained` compares outputs; it is None for a model-diffing crosscoder, which no one model can hold.
    Crosscoders measured together have their groups and written sites one after the other.
    """

    l0: tuple[float, ...]
    """Active features per token of each group, on clean activations."""
    unexplained: tuple[float, ...]
    """Fraction of variance unexplained of each written site, on clean activations."""
    kl: float | None
    """Mean KL from the original's next-token distribution to the spliced model's, nats."""
    agreement: float | None
    """Top-1 agreement where the original's top token has probability 0.5 or more; None if nowhere."""
    agreement_all: float | None
    """Top-1 agreement on every token."""
    cross_entropy_original: float | None
    """Mean loss of the original model on the next token, nats; None where no token has a next one."""
    cross_entropy: float | None
    """The same with every written site replaced."""
    cross_entropy_zero: float | None
    """The same with every written site set to 0."""
    n_tokens: int
    """Tokens measured."""

    @property
    def total_l0(self) -> float:
        """Active features per token over all groups."""
        return sum(self.l0)

    @property
    def mean_unexplained(self) -> float:
        """Mean over written sites of the fraction of variance unexplained."""
        return sum(self.unexplained) / len(self.unexplained)

    @property
    def cross_entropy_recovered(self) -> float | None:
        """`(zero - spliced) / (zero - original)`: 1 is as good as the original, 0 no better than zeroed sites."""
        if self.cross_entropy is None or self.cross_entropy_zero is None or self.cross_entropy_original is None:
            return None
        gap = self.cross_entropy_zero - self.cross_entropy_original
        return (self.cross_entropy_zero - self.cross_entropy) / gap if gap else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value, with what follows from the measurements."""
        return {
            "total_l0": self.total_l0,
            "mean_unexplained": self.mean_unexplained,
            "cross_entropy_recovered": self.cross_entropy_recovered,
            **self._asdict(),
        }


@torch.no_grad()
def measure_fidelity(
    language_model: LanguageModel,
    crosscoder: Crosscoder | Sequence[Crosscoder],
    rows_RT: Tensor,
    *,
    rows_per_pass: int = 64,
    keep_RT: Tensor | None = None,
    scales: Mapping[Site, float] | None = None,
    second_model: LanguageModel | None = None,
) -> Fidelity:
    """Run the original and the spliced model over rows of tokens and compare.

    The splice replaces every written site and reads its own stream; that of an acausal crosscoder reads the clean one.

    Args:
        crosscoder: of any wiring; measured in evaluation mode and left in the mode it came in. Several are spliced into one
            pass; each is measured on the tokens it decomposes, the output on all that some crosscoder does.
        rows_RT: token ids, best held out from training.
        rows_per_pass: rows per forward pass; bounds memory.
        keep_RT: bool mask of the tokens measured and replaced, all by default; the others (padding, special tokens) keep
            their own output. A loss counts where the next token is kept too.
        scales: scale of each site, for a crosscoder that lives in scaled activations; see `Splice`.
        second_model: the second model of a model-diffing crosscoder.

    Raises:
        ValueError: a crosscoder of another model, rows or a mask of the wrong shape, no token to measure, a model-diffing
            crosscoder without its second model, or several crosscoders that cannot be spliced together.
    """
    crosscoders = (crosscoder,) if isinstance(crosscoder, Crosscoder) else tuple(crosscoder)
    by_undecomposed = _check(crosscoders, language_model)
    sums = [_Sums(each) for each in crosscoders]
    outputs = _OutputSums()
    with evaluating(*crosscoders):
        for chunk_BT, keep_BT in passes(by_undecomposed[-1], rows_RT, keep_RT, rows_per_pass):
            tokens_BT = language_model.batch(chunk_BT)
            original, clean = _read(language_model, second_model, crosscoders, tokens_BT)
            splices: list[Splice] = []
            zeros: dict[Site, Hook] = {}
            for each, own in zip(crosscoders, sums, strict=True):
                mask_BT = measured(each, tokens_BT, keep_BT)
                own.add(clean, mask_BT, scales or {})
                zeros |= zero_hooks(each, mask_BT)
                if possible := possible_reads(each.wiring):
                    splice = Splice(
                        language_model,
                        each,
                        tokens_BT,
                        reads=possible[0],
                        scales=scales,
                        keep_BT=keep_BT,
                        clean=clean,
                    )
                    splices.append(splice)
            mask_BT = measured(by_undecomposed[0], tokens_BT, keep_BT)
            outputs.n_tokens += int(mask_BT.sum())
            if splices:
                logits = (original, run_together(splices), language_model.run(tokens_BT, zeros))
                outputs.add(tokens_BT, mask_BT, with_next(mask_BT, keep_BT), logits)
    return outputs.result(sums)


class _Sums:
    """What the passes add up to for one crosscoder, on clean activations."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        self.unexplained = {site: VarianceUnexplained() for site in crosscoder.wiring.write_sites}
        self.l0 = [Mean() for _ in range(crosscoder.n_groups)]

    def add(self, clean: Mapping[Site, Tensor], mask_BT: Tensor, scales: Mapping[Site, float]) -> None:
        """Sparsity and reconstruction on clean activations `[R, D]`."""
        crosscoder, row_K = self.crosscoder, mask_BT.flatten().nonzero()[:, 0]
        sites = {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites}
        kept = {site: clean[site][row_K].to(crosscoder.device, crosscoder.dtype) for site in sites}
        inputs = {site: kept[site] * scales.get(site, 1.0) for site in crosscoder.wiring.read_sites}
        outputs, features = crosscoder(inputs, positions=row_K.to(crosscoder.device) % mask_BT.shape[1])
        for site, error in self.unexplained.items():
            error.update(kept[site], outputs[site] / scales.get(site, 1.0))
        if len(row_K):
            for mean, count in zip(self.l0, l0(features), strict=True):
                mean.update(count.expand(len(row_K)))


class _OutputSums:
    """What the passes add up to for the outputs of the original, the spliced and the zeroed model."""

    def __init__(self) -> None:
        self.kl = Mean()
        self.losses = [Mean(), Mean(), Mean()]
        self.n_tokens = self.n_agreed = self.n_confident = self.n_confident_agreed = 0

    def add(self, tokens_BT: Tensor, mask_BT: Tensor, mask_next: Tensor, logits: tuple[Tensor, Tensor, Tensor]) -> None:
        """Divergence, agreement and losses of the original's, the spliced and the zeroed logits `[B, T, V]`."""
        original_KV, spliced_KV = (logits_BTV[mask_BT] for logits_BTV in logits[:2])
        self.kl.update(kl_divergence(original_KV, spliced_KV))
        confident, everything = (top1_agreement(original_KV, spliced_KV, min_probability=p) for p in (0.5, 0.0))
        self.n_confident_agreed += confident.agreed
        self.n_confident += confident.counted
        self.n_agreed += everything.agreed
        for mean, logits_BTV in zip(self.losses, logits, strict=True):
            mean.update(next_token_loss(logits_BTV, tokens_BT)[mask_next])

    def result(self, sums: Sequence[_Sums]) -> Fidelity:
        """Divide once."""
        original, spliced, zeroed = (mean.value() if mean.count else None for mean in self.losses)
        return Fidelity(
            l0=tuple(mean.value() for own in sums for mean in own.l0),
            unexplained=tuple(error.value() for own in sums for error in own.unexplained.values()),
            kl=self.kl.value() if self.kl.count else None,
            agreement=self.n_confident_agreed / self.n_confident if self.n_confident else None,
            agreement_all=self.n_agreed / self.kl.count if self.kl.count else None,
            cross_entropy_original=original,
            cross_entropy=spliced,
            cross_entropy_zero=zeroed,
            n_tokens=self.n_tokens,
        )


def _check(crosscoders: Sequence[Crosscoder], language_model: LanguageModel) -> list[Crosscoder]:
    """The crosscoders by their undecomposed positions, after checking that they can be measured, together and here."""
    if not crosscoders:
        raise ValueError("expected at least one crosscoder to measure, got none")
    for each in crosscoders:
        check_fits(each, language_model)
    check_together(crosscoders)
    alone = [each.wiring.name for each in crosscoders if not possible_reads(each.wiring)]
    if alone and len(crosscoders) > 1:
        raise ValueError(f"a {alone[0]} crosscoder involves a second model: it cannot be measured with others")
    return sorted(crosscoders, key=lambda each: each.undecomposed_positions)


def _read(
    language_model: LanguageModel,
    second_model: LanguageModel | None,
    crosscoders: Sequence[Crosscoder],
    tokens_BT: Tensor,
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits of the original and activations `[R, D]` of both models at every site, one run each."""
    sites = {site for each in crosscoders for site in (*each.wiring.read_sites, *each.wiring.write_sites)}
    logits_BTV, clean = read_rows(language_model, tokens_BT, {site for site in sites if site.model == 0})
    others = {Site(site.layer, site.kind): site for site in sites if site.model == 1}
    if others and second_model is None:
        raise ValueError(f"this {crosscoders[0].wiring.name} crosscoder reads a second model: give second_model")
    if others and second_model is not None:
        rows = read_rows(second_model, tokens_BT, others)[1]
        clean |= {others[site]: x_RD.to(logits_BTV.device) for site, x_RD in rows.items()}
    return logits_BTV, clean
