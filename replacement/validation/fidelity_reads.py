"""What a splice costs the output, by what the crosscoder reads: the original stream, its own, or one layer at a time.

R rows, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from replacement.crosscoder.checkpoint import check_fits
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook, LanguageModel
from replacement.splicing.splice import Splice, possible_reads, read_rows
from replacement.validation.fidelity_metrics import Mean, kl_divergence, next_token_loss
from replacement.validation.passes import evaluating, measured, passes, with_next


class OutputChange(NamedTuple):
    """How far the spliced model's output is from the original's."""

    kl: float
    """Mean KL from the original's next-token distribution to the spliced model's, nats."""
    cross_entropy_increase: float | None
    """Mean increase of the loss on the next token, nats; None where no token has a next one."""


def fidelity_by_reads(
    language_model: LanguageModel,
    crosscoder: Crosscoder,
    rows_RT: Tensor,
    *,
    rows_per_pass: int = 64,
    keep_RT: Tensor | None = None,
    scales: Mapping[Site, float] | None = None,
) -> dict[str, OutputChange]:
    """Output change for each way of reading; see `measure_fidelity` for the arguments.

    Returns:
        `clean`: all written sites replaced at once, encoded from the original stream. `propagated`: encoded from the stream
        that the replacement produced, so that errors propagate into features; absent for acausal crosscoders.
        `single_layer`: mean over layers, each replaced alone.

    Raises:
        ValueError: what `measure_fidelity` raises, or a crosscoder that involves a second model.
    """
    check_fits(crosscoder, language_model)
    possible = possible_reads(crosscoder.wiring)
    if not possible:
        raise ValueError(f"a {crosscoder.wiring.name} crosscoder involves a second model: it has no spliced output")
    names = ("clean", *(("propagated",) if "propagated" in possible else ()), "single_layer")
    sums = {name: (Mean(), Mean()) for name in names}
    with evaluating(crosscoder):
        for chunk_BT, keep_BT in passes(crosscoder, rows_RT, keep_RT, rows_per_pass):
            tokens_BT = language_model.batch(chunk_BT)
            mask_BT = measured(crosscoder, tokens_BT, keep_BT)
            mask_next = with_next(mask_BT, keep_BT)
            original, clean = read_rows(
                language_model, tokens_BT, {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites}
            )
            for name, hooks in _modes(language_model, crosscoder, tokens_BT, keep_BT, scales, clean):
                logits = language_model.run(tokens_BT, hooks)
                sums[name][0].update(kl_divergence(original[mask_BT], logits[mask_BT]))
                increase = next_token_loss(logits, tokens_BT) - next_token_loss(original, tokens_BT)
                sums[name][1].update(increase[mask_next])
    return {name: OutputChange(kl.value(), loss.value() if loss.count else None) for name, (kl, loss) in sums.items()}


def _modes(
    language_model: LanguageModel,
    crosscoder: Crosscoder,
    tokens_BT: Tensor,
    keep_BT: Tensor | None,
    scales: Mapping[Site, float] | None,
    clean: Mapping[Site, Tensor],
) -> list[tuple[str, dict[Site, Hook]]]:
    """Hooks of every run, with the name of the mode each counts for."""

    def hooks_of(reads: str) -> dict[Site, Hook]:
        splice = Splice(language_model, crosscoder, tokens_BT, reads=reads, scales=scales, keep_BT=keep_BT, clean=clean)
        return splice.hooks()

    together = hooks_of("clean")
    layers = sorted({site.layer for site in together})
    modes = [("clean", together)]
    modes += [("single_layer", {s: hook for s, hook in together.items() if s.layer == layer}) for layer in layers]
    if "propagated" in possible_reads(crosscoder.wiring):
        modes.append(("propagated", hooks_of("propagated")))
    return modes
