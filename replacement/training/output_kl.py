"""The output of the spliced model as a training loss. R rows, T tokens per row, K kept tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.splicing.splice import Splice
from replacement.training.losses import Loss, StepState
from replacement.validation.metrics import kl_divergence


@dataclass(frozen=True)
class OutputKL(Loss):
    """`mean_k KL(p_k || q_k)` from the original next-token distribution to that of the spliced model, in nats.

    Every written site is replaced and the crosscoder reads its own stream, so the gradient reaches each group through all
    that follows it in the model ("end-to-end" training: Braun et al. 2024, "Identifying Functionally Important Features").
    Costs two forward passes of the language model and one backward pass.
    """

    name: ClassVar[str] = "output_kl"
    needs_rows: ClassVar[bool] = True

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient *` the mean over kept tokens.

        Raises:
            ValueError: the step has no language model or tokens, or the crosscoder cannot be spliced into one model.
        """
        lm, tokens_RT, keep_RT = state.language_model, state.tokens_RT, state.keep_RT
        if lm is None or tokens_RT is None or keep_RT is None:
            raise ValueError(f"the loss {self.name} needs the language model and whole rows of tokens in every step")
        threshold = state.crosscoder.threshold
        before = None if threshold is None else threshold.detach().clone()
        splice = Splice(lm, state.crosscoder, tokens_RT, scales=state.scales, keep_BT=keep_RT)
        spliced_KV = splice.run()[keep_RT]
        if threshold is not None and before is not None and not threshold.requires_grad:
            threshold.copy_(before)  # the step itself has measured BatchTopK's running threshold
        with torch.no_grad():
            original_KV = lm(tokens_RT)[keep_RT]
        return self.coefficient * kl_divergence(original_KV, spliced_KV, dtype=spliced_KV.dtype).sum() / state.n_rows
