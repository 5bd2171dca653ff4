"""How faithful a crosscoder is on rows of text: reconstruction, sparsity, and the output with it spliced in.

R rows, T tokens per row, B rows of one pass, K measured tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from replacement.checkpoint import check_fits
from replacement.crosscoder import Crosscoder
from replacement.fidelity.metrics import Mean, VarianceUnexplained, kl_divergence, l0, next_token_loss, top1_agreement
from replacement.fidelity.passes import evaluating, measured, passes, with_next, zero_hooks
from replacement.language_model import LanguageModel
from replacement.sites import Site
from replacement.splice import Splice, possible_reads, read_rows


class Fidelity(NamedTuple):
    """Measured over the tokens kept, but for positions the crosscoder leaves undecomposed.

    What follows `unexplained` compares outputs; it is None for a model-diffing crosscoder, which no one model can hold.
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


@torch.no_grad()
def measure_fidelity(
    language_model: LanguageModel,
    crosscoder: Crosscoder,
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
        crosscoder: of any wiring; measured in evaluation mode and left in the mode it came in.
        rows_RT: token ids, best held out from training.
        rows_per_pass: rows per forward pass; bounds memory.
        keep_RT: bool mask of the tokens measured and replaced, all by default; the others (padding, special tokens) keep
            their own output. A loss counts where the next token is kept too.
        scales: scale of each site, for a crosscoder that lives in scaled activations; see `Splice`.
        second_model: the second model of a model-diffing crosscoder.

    Raises:
        ValueError: a crosscoder of another model, rows or a mask of the wrong shape, no token to measure, or a
            model-diffing crosscoder without its second model.
    """
    check_fits(
        crosscoder,
        language_model.shape,
        model_name=language_model.name,
        model_fingerprint=language_model.fingerprint,
    )
    sums = _Sums(crosscoder)
    with evaluating(crosscoder):
        for chunk_BT, keep_BT in passes(crosscoder, rows_RT, keep_RT, rows_per_pass):
            tokens_BT = language_model.check_batch(chunk_BT)
            mask_BT = measured(crosscoder, tokens_BT, keep_BT)
            original, clean = _read(language_model, second_model, crosscoder, tokens_BT)
            sums.add_reconstruction(clean, mask_BT, scales or {})
            if possible := possible_reads(crosscoder.wiring):
                splice = Splice(
                    language_model,
                    crosscoder,
                    tokens_BT,
                    reads=possible[0],
                    scales=scales,
                    keep_BT=keep_BT,
                    clean=clean,
                )
                zeroed = language_model.run(tokens_BT, zero_hooks(crosscoder, mask_BT))
                sums.add_outputs(tokens_BT, mask_BT, with_next(mask_BT, keep_BT), (original, splice.run(), zeroed))
    return sums.result()


class _Sums:
    """What the passes add up to."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        self.unexplained = {site: VarianceUnexplained() for site in crosscoder.wiring.write_sites}
        self.l0 = [Mean() for _ in range(crosscoder.n_groups)]
        self.kl = Mean()
        self.losses = [Mean(), Mean(), Mean()]
        self.n_tokens = self.n_agreed = self.n_confident = self.n_confident_agreed = 0

    def add_reconstruction(self, clean: Mapping[Site, Tensor], mask_BT: Tensor, scales: Mapping[Site, float]) -> None:
        """Sparsity and reconstruction on clean activations `[R, D]`."""
        crosscoder, row_K = self.crosscoder, mask_BT.flatten().nonzero()[:, 0]
        kept = {site: x_RD[row_K].to(crosscoder.device, crosscoder.dtype) for site, x_RD in clean.items()}
        inputs = {site: kept[site] * scales.get(site, 1.0) for site in crosscoder.wiring.read_sites}
        outputs, features = crosscoder(inputs, positions=row_K.to(crosscoder.device) % mask_BT.shape[1])
        for site, error in self.unexplained.items():
            error.update(kept[site], outputs[site] / scales.get(site, 1.0))
        if len(row_K):
            for mean, count in zip(self.l0, l0(features), strict=True):
                mean.update(count.expand(len(row_K)))
        self.n_tokens += len(row_K)

    def add_outputs(
        self, tokens_BT: Tensor, mask_BT: Tensor, mask_next: Tensor, logits: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Divergence, agreement and losses of the original's, the spliced and the zeroed logits `[B, T, V]`."""
        original_KV, spliced_KV = (logits_BTV[mask_BT] for logits_BTV in logits[:2])
        self.kl.update(kl_divergence(original_KV, spliced_KV))
        confident, everything = (top1_agreement(original_KV, spliced_KV, min_probability=p) for p in (0.5, 0.0))
        self.n_confident_agreed += confident.agreed
        self.n_confident += confident.counted
        self.n_agreed += everything.agreed
        for mean, logits_BTV in zip(self.losses, logits, strict=True):
            mean.update(next_token_loss(logits_BTV, tokens_BT)[mask_next])

    def result(self) -> Fidelity:
        """Divide once."""
        original, spliced, zeroed = (mean.value() if mean.count else None for mean in self.losses)
        return Fidelity(
            l0=tuple(mean.value() for mean in self.l0),
            unexplained=tuple(error.value() for error in self.unexplained.values()),
            kl=self.kl.value() if self.kl.count else None,
            agreement=self.n_confident_agreed / self.n_confident if self.n_confident else None,
            agreement_all=self.n_agreed / self.kl.count if self.kl.count else None,
            cross_entropy_original=original,
            cross_entropy=spliced,
            cross_entropy_zero=zeroed,
            n_tokens=self.n_tokens,
        )


def _read(
    language_model: LanguageModel, second_model: LanguageModel | None, crosscoder: Crosscoder, tokens_BT: Tensor
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits of the original and activations `[R, D]` of both models at every site, one run each."""
    sites = {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites}
    logits_BTV, clean = read_rows(language_model, tokens_BT, {site for site in sites if site.model == 0})
    others = {Site(site.layer, site.kind): site for site in sites if site.model == 1}
    if others and second_model is None:
        raise ValueError(f"this {crosscoder.wiring.name} crosscoder reads a second model: give second_model")
    if others and second_model is not None:
        rows = read_rows(second_model, tokens_BT, others)[1]
        clean |= {others[site]: x_RD.to(logits_BTV.device) for site, x_RD in rows.items()}
    return logits_BTV, clean
