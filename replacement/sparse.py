"""Sparse products of the crosscoder. B rows, D width, F features, S active features sorted by row.

Both products visit only the S active features, forward and backward: no intermediate is larger than an input, an output
or a weight. Dense training would spend two thirds of its time on gradients that are almost all zero.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def weighted_rows(
    weight_FD: Float[Tensor, "F D"],
    index_S: Int[Tensor, " S"],
    scale_S: Float[Tensor, " S"],
    offsets: Int[Tensor, " B_plus_1"],
) -> Float[Tensor, "B D"]:
    """`out[b] = sum of scale[s] * weight[index[s]]` over `offsets[b] <= s < offsets[b + 1]`, differentiable.

    Arguments:
        offsets: CSR offsets, `[B + 1]`, ending in S.
    """
    return functional.embedding_bag(
        index_S, weight_FD, offsets, mode="sum", per_sample_weights=scale_S, include_last_offset=True
    )


def with_encoder_gradient(
    pre_S: Float[Tensor, " S"],
    x_BD: Float[Tensor, "B D"],
    weight_FD: Float[Tensor, "F D"],
    bias_F: Float[Tensor, " F"] | None,
    row_S: Int[Tensor, " S"],
    index_S: Int[Tensor, " S"],
) -> Float[Tensor, " S"]:
    """Return `pre_S` unchanged, carrying the gradients of `x[row] . weight[index] + bias[index]`.

    The values come from one dense product made without gradients; only the S selected entries need a backward pass.
    Gradients also flow on to `pre_S` itself, so that terms of several read sites can be chained.
    """
    return _EncoderGradient.apply(pre_S, x_BD, weight_FD, bias_F, row_S, index_S)


class _EncoderGradient(torch.autograd.Function):
    """Identity on the pre-activations; the gradient of the encoder at the selected entries."""

    @staticmethod
    def forward(
        ctx: Any,
        pre_S: Tensor,
        x_BD: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor | None,
        row_S: Tensor,
        index_S: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_BD, weight_FD, row_S, index_S)
        return pre_S.view_as(pre_S)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, weight_FD, row_S, index_S = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_x = weighted_rows(weight_FD, index_S, grad_S, _offsets(row_S, len(x_BD)))
        if ctx.needs_input_grad[2]:
            # The transposed product: the same sum with the roles of rows and features exchanged.
            by_feature_S, order_S = index_S.sort(stable=True)
            grad_weight = weighted_rows(x_BD, row_S[order_S], grad_S[order_S], _offsets(by_feature_S, len(weight_FD)))
        if ctx.needs_input_grad[3]:
            grad_bias = grad_S.new_zeros(len(weight_FD)).index_add_(0, index_S, grad_S)
        return grad_S, grad_x, grad_weight, grad_bias, None, None


def _offsets(sorted_S: Tensor, n: int) -> Tensor:
    return torch.searchsorted(sorted_S, torch.arange(n + 1, device=sorted_S.device))
