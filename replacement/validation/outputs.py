"""How far a changed model's next-token distributions are from the original's: sums over tokens, in fp64.

B rows, T tokens per row, K measured tokens, V vocabulary. For a token with original distribution p and changed one q

    KL = sum_v p_v log p_v - sum_v p_v z_v + log sum_v exp z_v        (z: logits of q)

where log p is computed once and serves every change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replacement.validation.fidelity_metrics import Mean
from replacement.validation.histogram import LogHistogram

QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}
UNSURE_BELOW = 0.8
"""Agreement is also counted where the original is right with less probability than this: its easy tokens say little."""

_IMPOSSIBLE = 1e300
"""A larger KL comes from a token that was ruled out, with the lowest number in place of its logit."""


class Original(NamedTuple):
    """The original model's output at the measured tokens of one pass."""

    tokens_BT: Tensor
    asked_BT: Tensor
    p_KV: Tensor
    """Probabilities, fp64."""
    negative_entropy_K: Tensor
    best_K: Tensor
    """Most likely token."""
    next_K: Tensor
    """Token that follows; -1 where none does, or none that counts."""
    loss_K: Tensor
    """Loss on it; NaN where there is none."""

    @property
    def unsure(self) -> Tensor:
        """`[K]`: where the original is right, with probability below `UNSURE_BELOW`."""
        return (self.best_K == self.next_K) & (torch.exp(-self.loss_K) < UNSURE_BELOW)

    def right(self, best_K: Tensor, answers: Sequence[Sequence[int]] | None) -> Tensor:
        """Whether a prediction is the next token, or one of the row's answers; over the tokens that have one."""
        if answers is None:
            return (best_K == self.next_K)[self.next_K >= 0]
        row_K = self.asked_BT.nonzero()[:, 0].tolist()
        return torch.tensor([int(best) in answers[row] for row, best in zip(row_K, best_K.tolist(), strict=True)])


class Compared(NamedTuple):
    """One pass of a changed model, by measured token."""

    kl_K: Tensor
    loss_K: Tensor
    best_K: Tensor


def read_original(logits_BTV: Tensor, tokens_BT: Tensor, asked_BT: Tensor, keep_BT: Tensor | None) -> Original:
    """What every comparison needs of the original's logits."""
    log_p_KV = logits_BTV[asked_BT].double().log_softmax(dim=-1)
    p_KV = log_p_KV.exp()
    following_BT = torch.full_like(tokens_BT, -1)
    following_BT[:, :-1] = tokens_BT[:, 1:] if keep_BT is None else tokens_BT[:, 1:].where(keep_BT[:, 1:], -1)
    next_K = following_BT[asked_BT]
    loss_K = -log_p_KV.gather(1, next_K.clamp(min=0)[:, None])[:, 0]
    entropy_K = torch.where(p_KV > 0, p_KV * log_p_KV, 0.0).sum(dim=-1)
    loss_K = loss_K.where(next_K >= 0, torch.nan)
    return Original(tokens_BT, asked_BT, p_KV, entropy_K, p_KV.argmax(dim=-1), next_K, loss_K)


def compare(original: Original, logits_BTV: Tensor) -> Compared:
    """KL, loss and prediction of a changed model at the same tokens."""
    # A token that q rules out (logit -inf) costs nothing where p rules it out too, and an infinite KL elsewhere.
    z_KV = logits_BTV[original.asked_BT].double().clamp(min=torch.finfo(torch.float64).min)
    log_sum_K = z_KV.logsumexp(dim=-1)
    kl_K = original.negative_entropy_K - torch.einsum("kv,kv->k", original.p_KV, z_KV) + log_sum_K
    kl_K = kl_K.masked_fill(kl_K > _IMPOSSIBLE, torch.inf)
    loss_K = log_sum_K - z_KV.gather(1, original.next_K.clamp(min=0)[:, None])[:, 0]
    return Compared(kl_K, loss_K.where(original.next_K >= 0, torch.nan), z_KV.argmax(dim=-1))


class OutputSums:
    """What the passes of one changed model add up to."""

    def __init__(self) -> None:
        self.kl, self.loss, self.increase = LogHistogram(), Mean(), Mean()
        self._agreed, self._agreed_unsure, self._right = Mean(), Mean(), Mean()

    def add(self, original: Original, changed: Compared, answers: Sequence[Sequence[int]] | None = None) -> None:
        """Add one pass."""
        self.kl.update(changed.kl_K)
        has_next_K = original.next_K >= 0
        self.loss.update(changed.loss_K[has_next_K])
        self.increase.update((changed.loss_K - original.loss_K)[has_next_K])
        agreed_K = (changed.best_K == original.best_K).double()
        self._agreed.update(agreed_K)
        self._agreed_unsure.update(agreed_K[original.unsure])
        self._right.update(original.right(changed.best_K, answers).double())

    def facts(self, ablated: Mapping[str, OutputSums]) -> dict[str, Any]:
        """Plain JSON value.

        Args:
            ablated: sums with the sites set to 0 and to their mean, by those names.
        """
        increase = value_of(self.increase)
        recovered = {}
        for name, sums in ablated.items():
            gap = value_of(sums.increase)
            # (ablated - changed) / (ablated - original)
            recovered[name] = 1 - increase / gap if gap and increase is not None else None
        return {
            "n_tokens": self.kl.count,
            "cross_entropy": value_of(self.loss),
            "cross_entropy_increase": increase,
            "cross_entropy_recovered": recovered,
            "kl": {
                "mean": self.kl.mean,
                **{name: self.kl.quantile(share) for name, share in QUANTILES.items()},
                "max": self.kl.maximum,
            },
            "agreement": {"all": value_of(self._agreed), "right_but_unsure": value_of(self._agreed_unsure)},
            "accuracy": value_of(self._right),
        }


class OriginalSums:
    """The original model's own loss and accuracy."""

    def __init__(self) -> None:
        self.loss, self._right, self._unsure = Mean(), Mean(), Mean()
        self.n_tokens = 0

    def add(self, original: Original, answers: Sequence[Sequence[int]] | None = None) -> None:
        """Add one pass."""
        self.n_tokens += len(original.best_K)
        self.loss.update(original.loss_K[original.next_K >= 0])
        self._right.update(original.right(original.best_K, answers).double())
        self._unsure.update(original.unsure.double())

    def facts(self) -> dict[str, Any]:
        """Plain JSON value."""
        share = value_of(self._unsure)
        return {
            "n_tokens": self.n_tokens,
            "cross_entropy": value_of(self.loss),
            "accuracy": value_of(self._right),
            "right_but_unsure": round(share * self.n_tokens) if share is not None else 0,
        }


def value_of(mean: Mean) -> float | None:
    """The mean, or None where nothing was counted."""
    return mean.value() if mean.count else None
