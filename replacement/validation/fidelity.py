"""How faithful crosscoders are on rows of tokens, in one tuple of numbers: a view of what `measure` adds up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from torch import Tensor

from replacement.console import table
from replacement.crosscoder.checkpoint import check_fits
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import LanguageModel
from replacement.notebook import repr_html
from replacement.validation.measure import measure
from replacement.validation.outputs import OutputSums
from replacement.validation.protocols import PROPAGATED, ZERO, protocols
from replacement.validation.slices import batches_of


class Fidelity(NamedTuple):
    """Measured over the tokens kept, except positions that the crosscoder leaves undecomposed.

    The fields from `kl` to `cross_entropy_zero` compare outputs; they are None for a model-diffing crosscoder, which no one
    model can hold. Groups and written sites of crosscoders measured together follow one another.
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

    def __rich__(self) -> Table:
        rows: list[tuple[str, float | None, str]] = [
            ("active features per token, all groups", self.total_l0, ""),
            ("variance unexplained, mean over sites", self.mean_unexplained, ""),
            ("KL", self.kl, "nats"),
            ("top-1 agreement where p >= 0.5", self.agreement, ""),
            ("top-1 agreement", self.agreement_all, ""),
            ("cross-entropy of the original", self.cross_entropy_original, "nats"),
            ("cross-entropy with every site replaced", self.cross_entropy, "nats"),
            ("cross-entropy recovered against zero ablation", self.cross_entropy_recovered, ""),
        ]
        shown = ((name, "–" if value is None else f"{value:.4f}", unit) for name, value, unit in rows)
        return table(f"on {self.n_tokens:,} tokens", "", "unit", rows=shown, texts=("unit",))

    def _repr_html_(self) -> str:
        return repr_html(self)

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


def measure_fidelity(
    language_model: LanguageModel,
    crosscoder: Crosscoder | Sequence[Crosscoder],
    rows_RT: Tensor,
    *,
    keep_RT: Tensor | None = None,
    scales: Mapping[Site, float] | None = None,
    others: Callable[[slice], Mapping[Site, Tensor]] | None = None,
    rows_per_pass: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Compare the original model with the spliced one, in which every written site is replaced and errors propagate.

    Args:
        crosscoder, scales: as for `measure`.
        rows_RT: token ids `[R, T]`, best held out from training.
        keep_RT: bool mask `[R, T]` of the tokens measured and replaced, all by default; the others (padding, special tokens)
            keep their own output. A loss counts where the next token is kept too.
        others: for a model-diffing crosscoder, activations `[B, T, D]` of the other models' sites at some of the rows.
        rows_per_pass: rows per forward pass, which bounds memory; by default few enough for their logits to stay small.
        progress: called after each forward pass with the tokens run so far and in all.

    Raises:
        ValueError: no crosscoder, one of another model, a written site that does not vary over the rows, or what `measure`
            raises.
    """
    crosscoders = (crosscoder,) if isinstance(crosscoder, Crosscoder) else tuple(crosscoder)
    if not crosscoders:
        raise ValueError("expected at least one crosscoder to measure, got none")
    for item in crosscoders:
        check_fits(item, language_model)
    has_output = not any(site.model for item in crosscoders for site in item.wiring.read_sites)
    chosen = [protocols(crosscoders)[name] for name in (PROPAGATED, ZERO)] if has_output else []
    batches = batches_of(rows_RT, language_model, keep_RT=keep_RT, rows_per_pass=rows_per_pass, others=others)
    n_run = 0

    def count(n_tokens: int) -> None:
        nonlocal n_run
        n_run += n_tokens
        if progress is not None:
            progress(n_run, rows_RT.numel() * (1 + len(chosen)))

    measured = measure(language_model, crosscoders, batches, chosen, scales=scales, progress=count)
    unexplained = [error.unexplained for error in measured.errors.values()]
    if None in unexplained:
        raise ValueError("a written site does not vary over the rows: its unexplained variance is not defined")
    spliced, zeroed = (measured.outputs.get(name, OutputSums()) for name in (PROPAGATED, ZERO))
    return Fidelity(
        l0=tuple(l0 for activity in measured.activity for l0 in activity.l0),
        unexplained=tuple(value for value in unexplained if value is not None),
        kl=spliced.kl.mean if spliced.kl.count else None,
        agreement=spliced.agreed_confident.value(),
        agreement_all=spliced.agreed.value(),
        cross_entropy_original=measured.original.loss.value() if has_output else None,
        cross_entropy=spliced.loss.value(),
        cross_entropy_zero=zeroed.loss.value(),
        n_tokens=measured.n_tokens,
    )
