"""What a crosscoder reads while training on whole rows of tokens. R rows, T tokens per row, B tokens kept, D width.

Trained on clean activations a crosscoder never meets the errors of its own earlier layers, which is what it reads inside a
replacement model. Here some or all of its layers are spliced in while the stream is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.splice import Splice
from replacement.splicing.splice_options import possible_reads
from replacement.training.build import Models
from replacement.training.config import RunConfig, TrainingConfig
from replacement.training.scaling import Batch, Statistics, sites_of


class RowsRead(NamedTuple):
    """The rows of tokens behind a batch, for losses that run the language model on them."""

    tokens_RT: Int[Tensor, "R T"]
    """Token ids."""
    keep_RT: Bool[Tensor, "R T"]
    """Which of them the batch is made of."""

    def positions(self) -> Tensor:
        """Position of every token in its row, `[R T]`."""
        n_rows, n_positions = self.tokens_RT.shape
        return torch.arange(n_positions, device=self.tokens_RT.device).repeat(n_rows)


def choose_reads(config: TrainingConfig, wiring: Wiring, models: Models) -> str:
    """What the crosscoder of a run reads: as the settings say, or else what suits its wiring.

    Trained on clean activations, a cross-layer transcoder is worse where it is used, with its own errors upstream; trained
    on random subsets of replaced layers it is good everywhere (measured by `examples/read_modes.py`). Autoencoders and
    other crosscoders that write what they read stand alone, and read clean activations.

    Raises:
        ValueError: the settings ask for a splice (by `reads` or by a loss that needs whole rows), but the wiring cannot be
            spliced into one model.
    """
    can_splice = models.only is not None and "propagated" in possible_reads(wiring)
    reads = config.reads
    if reads is None:
        stands_alone = bool(set(wiring.read_sites) & set(wiring.write_sites)) or wiring.n_groups == 1
        reads = "subset" if can_splice and not stands_alone else "clean"
    needs_rows = [loss.name for loss in config.losses if loss.needs_rows]
    if (reads != "clean" or needs_rows) and not can_splice:
        what = f"reads={reads!r}" if reads != "clean" else f"the loss {needs_rows[0]}"
        raise ValueError(f"{what} needs a causal crosscoder of one model, not one with the wiring {wiring.name}")
    return reads


def takes_shuffled_tokens(config: RunConfig, reads: str) -> bool:
    """Whether steps take shuffled tokens; otherwise whole rows, to run the model on them or to attend over them."""
    needs_rows = any(loss.needs_rows for loss in config.training.losses) or config.crosscoder.wiring == "lorsa"
    return reads == "clean" and not needs_rows and config.language_model is None


def replaced_sites(crosscoder: Crosscoder, reads: str, *, seed: int, step: int) -> tuple[Site, ...]:
    """Written sites that are replaced in a step: none, all, a random subset of a random size, or a random one.

    The choice is a function of (seed, step), so that a resumed run draws the same.
    """
    sites = crosscoder.wiring.write_sites
    if reads == "clean":
        return ()
    if reads == "propagated":
        return sites
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    count = 1 if reads == "one" else int(torch.randint(len(sites) + 1, (), generator=generator))
    chosen = torch.randperm(len(sites), generator=generator)[:count].tolist()
    return tuple(sites[place] for place in sorted(chosen))


@torch.no_grad()
def read_rows(
    language_model: LanguageModel,
    crosscoder: Crosscoder,
    statistics: Statistics,
    rows: RowsRead,
    *,
    replaced: tuple[Site, ...],
) -> tuple[Batch, Batch]:
    """Clean activations of the kept tokens at every site (of all tokens where prompts are read whole), and what the crosscoder
    reads with some sites replaced.

    Targets are always the clean activations: a propagated stream is to be led back to the original model's outputs.
    """
    clean = language_model.read(rows.tokens_RT, sites_of(crosscoder))
    batch = kept_rows(crosscoder, {site: x_RTD.flatten(0, 1) for site, x_RTD in clean.items()}, rows.keep_RT)
    if not replaced:
        return batch, batch
    return batch, read_spliced(language_model, crosscoder, statistics, rows, replaced=replaced)


@torch.no_grad()
def read_spliced(
    language_model: LanguageModel,
    crosscoder: Crosscoder,
    statistics: Statistics,
    rows: RowsRead,
    *,
    replaced: tuple[Site, ...],
) -> Batch:
    """What the crosscoder reads with some sites replaced."""
    splice = Splice(
        language_model, crosscoder, rows.tokens_RT, sites=replaced, scales=statistics.scales, keep_BT=rows.keep_RT
    )
    splice.read()
    return kept_rows(crosscoder, splice.inputs, rows.keep_RT)


def kept_rows(
    crosscoder: Crosscoder, activations: Mapping[Site, Tensor], keep_RT: Bool[Tensor, "R T"]
) -> dict[Site, Tensor]:
    """Activations of the kept tokens, `[B, D]`; those of all tokens at the read sites where prompts are read whole."""
    whole = crosscoder.wiring.read_sites if crosscoder.reads_prompts else ()
    keep_R = keep_RT.flatten()
    return {site: x_RD if site in whole else x_RD[keep_R] for site, x_RD in activations.items()}
