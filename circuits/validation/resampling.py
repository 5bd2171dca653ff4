"""Runs of a prompt in which some of its features are left out, and features of other prompts stand in their place.

Every active feature of the prompt has a share between 0 (left out) and 1 (kept). A kept feature follows the stream: it has the
activation that the crosscoder reads off the run. In the place of one that is left out stands the feature of another prompt that
has the same rank by size at the same layer and position, with the activation it has there. So a run writes about as much as the
prompt does: with nothing kept what the other prompt's features write, with everything kept it is the clean run. Features are
resampled and not set to zero, because zero would show the model streams that it never sees. Attention and norms are live;
embeddings are the prompt's own, as tokens belong to every circuit.

Where the two prompts have different numbers of features, ranks are compared as shares of the number. Where the prompt has none,
the other's largest are taken, as large a share of them as is left out on average.

S active features of the prompt, O other prompts, M sets of features, T positions, E entries of a table of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.nodes import NodeKind
from circuits.validation.effects import TOKENS_AT_ONCE
from replacement import Features, ReplacementModel
from replacement.splicing.clean_run import CleanRun, Conditions
from replacement.splicing.feature_changes import Change
from replacement.splicing.splice_options import check_choice
from replacement.validation.metrics import kl_divergence


@dataclass(frozen=True, slots=True)
class _Group:
    """Features of one group: the prompt's, and the other prompts' with the one in whose place each would stand."""

    key_S: Tensor
    """`position * F + index` of the prompt's features, ascending."""
    number_S: Tensor
    """Their numbers among the active features of all parts."""
    other: Features
    """Features of the other prompts; row = prompt * T + position."""
    owner_E: Tensor
    """For each of those the number of the feature in whose place it stands; -1 where the prompt has none there."""
    place_E: Tensor
    """For those without an owner: rank by size, as a share of the other prompt's number of features there."""
    same_E: Tensor
    """Number of the prompt's feature that is the same feature at the same position; -1 for none."""


class Resampler:
    """Runs of one graph's prompt with features of other prompts put in."""

    def __init__(
        self,
        model: ReplacementModel,
        grounding: Grounding,
        others: Sequence[Tensor],
        *,
        errors: str = "keep",
        ablation: str = "resample",
        conditions: Conditions | None = None,
    ) -> None:
        """Run the prompt and all others.

        Args:
            others: token ids of other prompts, each as long as the graph's.
            errors: `keep` the prompt's own error terms in every run, or `resample` those too, as part of no circuit.
            ablation: `resample`, or `zero` to put nothing in the place of features that are left out.
            conditions: what is held in every run; by default nothing.

        Raises:
            ValueError: the graph explains no logits, no other prompts, one of another length, or another choice for an option.
        """
        if not grounding.logits:
            raise ValueError("the graph explains features, not logits: there is no output to be faithful to")
        check_choice("errors", errors, ("keep", "resample"))
        check_choice("ablation", ablation, ("resample", "zero"))
        tokens_T = grounding.local.frozen.tokens_T
        if not others or any(len(other) != len(tokens_T) for other in others):
            lengths = sorted({len(other) for other in others})
            raise ValueError(f"expected other prompts of {len(tokens_T)} tokens, given {lengths or 'none'}")
        self.model, self.grounding, self.n_others = model, grounding, len(others)
        self._conditions, self._fills = conditions or Conditions(), ablation == "resample"
        self.n_features = sum(len(part.features) for part in grounding.local.decompositions)
        lm = model.language_model
        self.clean = CleanRun(lm, model.crosscoders, tokens_T[None])
        other_runs = CleanRun(lm, model.crosscoders, lm.batch(torch.stack([lm.tokens(other) for other in others])))
        self._errors = other_runs.errors if errors == "resample" else None
        self._groups, first = {}, 0
        for part, decomposition in zip(model.crosscoders, grounding.local.decompositions, strict=True):
            features = decomposition.features
            for group in range(features.n_groups):
                number_S = torch.nonzero(features.group == group)[:, 0]
                own, other = features.select(features.group == group), other_runs.features[part].of(group)
                self._groups[part, group] = _group(own, number_S + first, other)
            first += len(features)

    def logits(self, kept_MS: np.ndarray, *, keep_errors: bool = False) -> Tensor:
        """`[M * O, T, V]`, one run for every set of kept features and every other prompt.

        Args:
            kept_MS: masks over the active features of all parts, or the share that each is kept with.
            keep_errors: keep the prompt's own error terms, whatever `errors` said.
        """
        share_BS = self._tensor(np.atleast_2d(kept_MS)).repeat_interleave(self.n_others, 0)
        return self._run(share_BS, keep_errors=keep_errors)

    def measure(self, kept_MS: np.ndarray, *, keep_errors: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Output and KL (nats, from the clean run, at the last target's position), means over the other prompts, float64[M]."""
        size = max(1, TOKENS_AT_ONCE // (self.n_others * self.clean.tokens_BT.shape[1]))
        position, figures = self.grounding.logits[-1].position, []
        clean_V = self.clean.logits[0, position]
        for begin in range(0, len(kept_MS), size):
            logits_BTV = self.logits(kept_MS[begin : begin + size], keep_errors=keep_errors)
            both = torch.stack([self.output(logits_BTV), kl_divergence(clean_V, logits_BTV[:, position])])
            figures.append(both.view(2, -1, self.n_others).mean(-1).cpu().numpy())
        output_M, kl_M = np.concatenate(figures, axis=1)
        return output_M, kl_M

    def output(self, logits_BTV: Tensor) -> Tensor:
        """float64[B], what the graph explains, summed with its output weights."""
        nodes = self.grounding.graph.nodes
        logits_BTV = self.model.language_model.parts.before_soft_cap(logits_BTV)  # as the graph explains them
        weights = nodes.output_weight[nodes.mask(NodeKind.LOGIT)].tolist()
        terms = zip(weights, self.grounding.logits, strict=True)
        return sum(weight * target.read(logits_BTV[:, target.position].double()) for weight, target in terms)

    def gradient(self, share_S: np.ndarray) -> np.ndarray:
        """float64[S], derivative of the mean output by the share that every feature is kept with.

        Kept features react to each other, attention and norms are live: what a feature does to attention patterns counts too.
        With every share at 1 this is gradient times activation in the clean run.
        """
        share_OS = self._tensor(share_S).repeat(self.n_others, 1).requires_grad_()
        with torch.enable_grad():
            output = self.output(self._run(share_OS, gradients=True)).mean()
            (gradient_OS,) = torch.autograd.grad(output, share_OS)
        return np.asarray(gradient_OS.double().sum(0).cpu().numpy())

    def _tensor(self, share: np.ndarray) -> Tensor:
        crosscoder = next(iter(self.model.crosscoders.values()))
        return torch.from_numpy(share).to(crosscoder.device, crosscoder.dtype)

    def _run(self, share_BS: Tensor, *, keep_errors: bool = False, gradients: bool = False) -> Tensor:
        """Logits of runs with shares of features kept; every run takes the next of the other prompts, in turn."""
        copies, errors = torch.arange(len(share_BS), device=share_BS.device) % self.n_others, None
        if self._errors is not None and not keep_errors:
            errors = {site: x_RD.repeat(len(copies) // self.n_others, 1) for site, x_RD in self._errors.items()}
        changes = {part: self._change(part, share_BS, copies) for part in self.model.crosscoders}
        run = self.clean.run(self._conditions, changes, n_copies=len(copies), errors=errors, gradients=gradients)
        return run.logits_BTV

    def _change(self, part: str, share_BS: Tensor, copies: Tensor) -> Change:
        T = self.clean.tokens_BT.shape[1]

        def at(number: Tensor, copy: Tensor) -> Tensor:
            """Share of features by number; 0 for -1."""
            return torch.where(number >= 0, share_BS[copy, number.clamp(min=0)], 0.0)

        def change(group: int, features: Features, current: Features) -> Features:
            own, F = self._groups[part, group], features.n_features
            kept = at(_look_up(own.key_S, own.number_S, features.row % T * F + features.index), features.row // T)
            other = own.other
            copy, entry = torch.nonzero((copies[:, None] == other.row // T) & self._fills, as_tuple=True)
            owner = own.owner_E[entry]
            without_owner = (own.place_E[entry] < 1 - share_BS.detach().mean(1)[copy]).to(share_BS.dtype)
            taken = torch.where(owner >= 0, 1 - at(owner, copy), without_owner) * (1 - at(own.same_E[entry], copy))
            row = torch.cat([features.row, copy * T + other.row[entry] % T])
            index = torch.cat([features.index, other.index[entry]])
            activation = torch.cat([features.activation * kept, other.activation[entry] * taken])
            row, index, activation = row[activation != 0], index[activation != 0], activation[activation != 0]
            key, place = (row * F + index).unique(return_inverse=True)
            total = activation.new_zeros(len(key)).index_add(0, place, activation)
            return Features(
                torch.full_like(key, group), key // F, key % F, total, features.n_rows, features.n_groups, F
            )

        return change


def _group(own: Features, number_S: Tensor, other: Features) -> _Group:
    T, F = own.n_rows, own.n_features
    rank_S, count_T = _ranks(own)
    rank_E, count_R = _ranks(other)
    position_E = other.row % T
    place_E = (rank_E + 0.5) / count_R[other.row]
    slot_E = (place_E * count_T[position_E]).long()  # the middle of the rank, among the prompt's own ranks
    width = int(count_T.max()) + 1 if len(own) else 1
    table = torch.full((T * width,), -1, device=number_S.device)
    table[own.row * width + rank_S] = number_S
    owner_E = table[position_E * width + slot_E]
    key_S = own.row * F + own.index
    same_E = _look_up(key_S, number_S, position_E * F + other.index)
    return _Group(key_S, number_S, other, owner_E, place_E, same_E)


def _ranks(features: Features) -> tuple[Tensor, Tensor]:
    """Rank by size of every feature of one group in its row, from 0, and the number of features of every row."""
    by_size = features.activation.abs().argsort(descending=True, stable=True)
    order = by_size[features.row[by_size].argsort(stable=True)]
    row = features.row[order]
    count_R = torch.bincount(row, minlength=features.n_rows)
    rank = torch.empty_like(row)
    rank[order] = torch.arange(len(row), device=row.device) - (count_R.cumsum(0) - count_R)[row]
    return rank, count_R


def _look_up(key_S: Tensor, number_S: Tensor, wanted: Tensor) -> Tensor:
    """Numbers of the features with these keys; -1 where there is none."""
    if not len(key_S):
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(key_S, wanted).clamp(max=len(key_S) - 1)
    return torch.where(key_S[place] == wanted, number_S[place], -1)
