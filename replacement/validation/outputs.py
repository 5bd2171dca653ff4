"""How far the next-token distributions of a changed model are from the original's: sums over tokens, in float64.

P measured tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from replacement.language_model.language_model import LanguageModel
from replacement.validation.metrics import LogHistogram, Mean, ReferenceDistribution

QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}
UNSURE_BELOW = 0.8
"""Agreement is also counted where the original is right with less probability than this: its easy tokens say little."""
CONFIDENT_FROM = 0.5
"""Agreement is also counted where the original's top token has this probability: disagreement says little elsewhere."""
CONTEXT_BEFORE = 10
"""Tokens listed before one of the worst tokens."""


class OriginalOutput:
    """The original model's output at the measured tokens of one batch.

    Attributes:
        tokens_BT, measured_BT: the batch and which of its tokens are measured.
        reference: next-token distributions `[P, V]`.
        best_P: most likely next token.
        next_P: the token that follows; -1 where none does, or none that is kept.
        loss_P: loss on it; NaN where there is none.
        probability_P: probability of the most likely token.
    """

    def __init__(
        self,
        logits_BTV: Tensor,
        tokens_BT: Tensor,
        measured_BT: Tensor,
        keep_BT: Tensor | None = None,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.tokens_BT, self.measured_BT, self._answers = tokens_BT, measured_BT, answers
        self.reference = ReferenceDistribution(logits_BTV[measured_BT])
        following_BT = torch.full_like(tokens_BT, -1)
        following_BT[:, :-1] = tokens_BT[:, 1:] if keep_BT is None else tokens_BT[:, 1:].where(keep_BT[:, 1:], -1)
        self.next_P = following_BT[measured_BT]
        loss_P = -self.reference.log_p.gather(1, self.next_P.clamp(min=0)[:, None])[:, 0]
        self.loss_P = loss_P.where(self.next_P >= 0, torch.nan)
        self.probability_P, self.best_P = self.reference.p.max(dim=-1)

    @property
    def unchanged(self) -> ChangedOutput:
        """The original as its own replacement."""
        return ChangedOutput(torch.zeros_like(self.loss_P), self.loss_P, self.best_P)

    def right(self, best_P: Tensor) -> Tensor:
        """Whether a prediction is the next token, or one of the row's answers; over the tokens that have one."""
        if self._answers is None:
            return (best_P == self.next_P)[self.next_P >= 0]
        row_P = self.measured_BT.nonzero()[:, 0].tolist()
        return torch.tensor([int(best) in self._answers[row] for row, best in zip(row_P, best_P.tolist(), strict=True)])


class ChangedOutput(NamedTuple):
    """A changed model's output at the same tokens."""

    kl_P: Tensor
    """KL from the original's distribution, nats."""
    loss_P: Tensor
    """Loss on the next token; NaN where there is none."""
    best_P: Tensor
    """Most likely next token."""


def compare(original: OriginalOutput, logits_BTV: Tensor) -> ChangedOutput:
    """KL, loss and prediction of a changed model."""
    logits_PV = logits_BTV[original.measured_BT]
    z_PV = logits_PV.double()
    log_normaliser_P = z_PV.logsumexp(dim=-1)
    loss_P = log_normaliser_P - z_PV.gather(1, original.next_P.clamp(min=0)[:, None])[:, 0]
    loss_P = loss_P.where(original.next_P >= 0, torch.nan)
    return ChangedOutput(original.reference.kl(z_PV, log_normaliser_P), loss_P, logits_PV.argmax(dim=-1))


class OutputSums:
    """What the passes of one changed model add up to."""

    def __init__(self) -> None:
        self.kl, self.loss, self.increase, self.right = LogHistogram(), Mean(), Mean(), Mean()
        self.agreed, self.agreed_confident, self.agreed_unsure = Mean(), Mean(), Mean()

    def add(self, original: OriginalOutput, changed: ChangedOutput) -> None:
        """Add one pass."""
        self.kl.update(changed.kl_P)
        has_next_P = original.next_P >= 0
        self.loss.update(changed.loss_P[has_next_P])
        self.increase.update((changed.loss_P - original.loss_P)[has_next_P])
        agreed_P = (changed.best_P == original.best_P).double()
        self.agreed.update(agreed_P)
        self.agreed_confident.update(agreed_P[original.probability_P >= CONFIDENT_FROM])
        is_right_P = original.best_P == original.next_P
        self.agreed_unsure.update(agreed_P[is_right_P & (original.probability_P < UNSURE_BELOW)])
        self.right.update(original.right(changed.best_P).double())

    def facts(self, ablated: Mapping[str, OutputSums]) -> dict[str, Any]:
        """Plain JSON value.

        Args:
            ablated: sums with the sites set to 0 and to their mean, by those names.
        """
        increase = self.increase.value()
        recovered = {}
        for name, sums in ablated.items():
            gap = sums.increase.value()
            # (ablated - changed) / (ablated - original)
            recovered[name] = 1 - increase / gap if gap and increase is not None else None
        return {
            "n_tokens": self.kl.count,
            "cross_entropy": self.loss.value(),
            "cross_entropy_increase": increase,
            "cross_entropy_recovered": recovered,
            "kl": {
                "mean": self.kl.mean,
                **{name: self.kl.quantile(share) for name, share in QUANTILES.items()},
                "max": self.kl.maximum,
            },
            "agreement": {"all": self.agreed.value(), "right_but_unsure": self.agreed_unsure.value()},
            "accuracy": self.right.value(),
        }


class WorstTokens:
    """The n tokens of largest KL of a stream, with the text before them."""

    def __init__(self, n: int) -> None:
        self._n, self._n_rows = n, 0
        self._worst: list[dict[str, Any]] = []

    def add(self, original: OriginalOutput, changed: ChangedOutput) -> None:
        """Look at one pass."""
        kl_P, place_P = changed.kl_P.topk(min(self._n, len(changed.kl_P)))
        where_P2 = original.measured_BT.nonzero()
        for kl, place in zip(kl_P.tolist(), place_P.tolist(), strict=True):
            row, position = where_P2[place].tolist()
            facts = {
                "kl": kl,
                "row": self._n_rows + row,
                "position": position,
                "ids": original.tokens_BT[row, max(0, position - CONTEXT_BEFORE) : position + 1].tolist(),
                "next": int(original.next_P[place]),
                "original": int(original.best_P[place]),
                "original_probability": float(original.probability_P[place]),
                "replacement": int(changed.best_P[place]),
            }
            self._worst.append(facts)
        self._worst.sort(key=lambda facts: (-facts["kl"], facts["row"], facts["position"]))
        del self._worst[self._n :]
        self._n_rows += len(original.tokens_BT)

    def facts(self, lm: LanguageModel) -> list[dict[str, Any]]:
        """Plain JSON values, the largest KL first, the earliest token first among equal ones."""
        rows = []
        for facts in self._worst:
            words = lm.prompt_strings(facts["ids"])
            row = {name: value for name, value in facts.items() if name != "ids"}
            row |= {"before": words[:-1], "token": words[-1]}
            for name in ("next", "original", "replacement"):
                row[name] = None if facts[name] < 0 else lm.token_strings([facts[name]])[0]
            rows.append(row)
        return rows
