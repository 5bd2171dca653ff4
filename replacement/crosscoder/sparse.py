"""Sparse products of the crosscoder. B rows, D width, F features, W written sites, S active features sorted by row.

Every product visits only the S active features, forward and backward, one block of D columns at a time: a block of a
weight and a block of an output both fit a cache, and no intermediate is larger than an input, an output or a weight.
Sums run in a fixed order, so that repeated runs agree bit for bit.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_ROWS_PER_GATHER = 2048


class Pattern(NamedTuple):
    """Which entries of a sparse `[B, F]` matrix are not zero, sorted by row."""

    row_S: Int[Tensor, " S"]
    """Row of each entry."""
    index_S: Int[Tensor, " S"]
    """Column of each entry."""
    offsets: Int[Tensor, " B_plus_1"]
    """CSR offsets: row b holds the entries `offsets[b]` to `offsets[b + 1]`."""

    @classmethod
    def of(cls, row_S: Int[Tensor, " S"], index_S: Int[Tensor, " S"], n_rows: int) -> Pattern:
        """Add the offsets to sorted rows."""
        row_S = row_S.contiguous()
        return cls(row_S, index_S, torch.searchsorted(row_S, torch.arange(n_rows + 1, device=row_S.device)))

    def transposed(self, n_columns: int) -> tuple[Pattern, Int[Tensor, " S"]]:
        """The same entries sorted by column, and the permutation that sorts them."""
        by_column_S, order_S = self.index_S.sort(stable=True)
        return Pattern.of(by_column_S, self.row_S[order_S], n_columns), order_S


class Block(NamedTuple):
    """One term of `add_blocks`: `out[target] += A[source] @ W[weight][:, place]`."""

    target: int
    source: int
    weight: int
    place: int


def weighted_rows(
    weight_FD: Float[Tensor, "F D"],
    index_S: Int[Tensor, " S"],
    scale_S: Float[Tensor, " S"],
    offsets: Int[Tensor, " B_plus_1"],
) -> Float[Tensor, "B D"]:
    """`out[b] = sum of scale[s] * weight[index[s]]` over `offsets[b] <= s < offsets[b + 1]`.

    Args:
        weight_FD: may have another dtype than the scales, or rows apart from each other: the rows needed are then copied.
        offsets: CSR offsets, `[B + 1]`, ending in S.
    """
    if weight_FD.dtype != scale_S.dtype or not weight_FD.is_contiguous():
        weight_FD = weight_FD[index_S].to(scale_S.dtype)
        index_S = torch.arange(len(index_S), device=index_S.device)
    return functional.embedding_bag(
        index_S, weight_FD, offsets, mode="sum", per_sample_weights=scale_S, include_last_offset=True
    )


def dots(left_BD: Float[Tensor, "B D"], right_FD: Float[Tensor, "F D"], pattern: Pattern) -> Float[Tensor, " S"]:
    """`left[row[s]] . right[index[s]]` for every entry of a pattern, in the dtype of `left`."""
    row_S, index_S, offsets = pattern
    # On a CPU the sampled product is part of MKL, which not every build of torch has (on ARM, for one).
    has_kernel = left_BD.is_cuda or (left_BD.device.type == "cpu" and torch.backends.mkl.is_available())
    has_kernel = has_kernel and left_BD.dtype == right_FD.dtype in (torch.float32, torch.float64)
    if has_kernel and len(row_S):
        _expect_sparse_tensors()
        shape = (len(left_BD), len(right_FD))
        zeros_S = left_BD.new_zeros(len(row_S))
        zeros_BF = torch.sparse_csr_tensor(offsets, index_S, zeros_S, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(zeros_BF, left_BD, right_FD.T, beta=0.0).values()
    chunks = zip(row_S.split(_ROWS_PER_GATHER), index_S.split(_ROWS_PER_GATHER), strict=True)
    products = [torch.linalg.vecdot(left_BD[row_C], right_FD[index_C].to(left_BD.dtype)) for row_C, index_C in chunks]
    return torch.cat(products)


def add_blocks(
    blocks: Sequence[Block],
    patterns: Sequence[Pattern],
    scales: Sequence[Float[Tensor, " _"]],
    weights: Sequence[Float[Tensor, "F _ _"]],
) -> tuple[Float[Tensor, "B _"], ...]:
    """Sums of products of sparse matrices A (a pattern and its values) and blocks of weights; see `Block`.

    Differentiable once, in the values and the weights.

    Args:
        blocks: the terms, with targets 0 to n - 1 for n outputs.
        patterns, scales: the sparse matrices and their values.
    """
    return _AddBlocks.apply(tuple(blocks), tuple(patterns), *scales, *weights)


class _AddBlocks(torch.autograd.Function):
    """Sparse products by gathering rows; the gradient of a weight gathers rows of the output's gradient."""

    @staticmethod
    def forward(
        ctx: Any, blocks: tuple[Block, ...], patterns: tuple[Pattern, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.patterns = blocks, patterns
        scales, weights = tensors[: len(patterns)], tensors[len(patterns) :]
        sums = _outputs(blocks, patterns, weights, scales)
        filled: set[int] = set()
        for target, source, weight, place in blocks:
            weight_XD, pattern = _at_place(weights[weight], place, patterns[source])
            y_BD = weighted_rows(weight_XD, pattern.index_S, scales[source], pattern.offsets)
            if target in filled:
                sums[target].add_(y_BD)
            else:
                sums[target].copy_(y_BD)
                filled.add(target)
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n, needed = len(ctx.patterns), ctx.needs_input_grad[2:]
        scales, weights = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        grad_scales = [torch.zeros_like(scale_S) if needed[i] else None for i, scale_S in enumerate(scales)]
        grad_weights = _slices(weights, needed[n:])
        for source, pattern in enumerate(ctx.patterns):
            blocks = [block for block in ctx.blocks if block.source == source and grads[block.target] is not None]
            if any(needed[n + block.weight] for block in blocks):
                transposed, order_S = pattern.transposed(len(weights[blocks[0].weight]))
                scale_S = scales[source][order_S]
            for target, _, weight, place in blocks:
                grad_BD = grads[target].contiguous()
                if (sum_S := grad_scales[source]) is not None:
                    sum_S.add_(dots(grad_BD, *_at_place(weights[weight], place, pattern)))
                if (slices := grad_weights[weight]) is not None:
                    slices.add(place, weighted_rows(grad_BD, transposed.index_S, scale_S, transposed.offsets))
        return None, None, *grad_scales, *(slices and slices.finish() for slices in grad_weights)


def _outputs(
    blocks: Sequence[Block], patterns: Sequence[Pattern], weights: Sequence[Tensor], scales: Sequence[Tensor]
) -> list[Tensor]:
    """Room for the targets of some blocks, in one piece of memory like that of `_slices`; not views to autograd, so that
    each may be worked on in place."""
    if not blocks:
        return []
    shapes = {
        block.target: (len(patterns[block.source].offsets) - 1, weights[block.weight].shape[-1]) for block in blocks
    }
    sizes = [math.prod(shapes[target]) for target in range(len(shapes))]
    parts = scales[0].new_empty(sum(sizes)).split(sizes)
    return [part.view(shapes[target]).detach() for target, part in enumerate(parts)]


def _at_place(weight_FWD: Tensor, place: int, pattern: Pattern) -> tuple[Tensor, Pattern]:
    """A view with one row per (feature, place), and the pattern in its terms: a place is reached without a copy."""
    return weight_FWD.flatten(0, 1), pattern._replace(index_S=pattern.index_S * weight_FWD.shape[1] + place)


class _Slices:
    """A tensor `[F, W, D]` that is filled place by place; places never filled are zero in the end."""

    def __init__(self, whole_FWD: Tensor) -> None:
        self.whole_FWD = whole_FWD
        self.filled: set[int] = set()

    def add(self, place: int, part_FD: Tensor) -> None:
        if place in self.filled:
            self.whole_FWD[:, place] += part_FD
        else:
            self.whole_FWD[:, place] = part_FD
            self.filled.add(place)

    def finish(self) -> Tensor:
        for place in set(range(self.whole_FWD.shape[1])) - self.filled:
            self.whole_FWD[:, place] = 0
        return self.whole_FWD


def _slices(weights: Sequence[Tensor], needed: Sequence[bool]) -> list[_Slices | None]:
    """Room for gradients, in one piece of memory: many pieces that come and go in every step leave gaps between them."""
    sizes = [weight.numel() if need else 0 for weight, need in zip(weights, needed, strict=True)]
    parts = weights[0].new_empty(sum(sizes)).split(sizes)
    return [
        _Slices(part.view(weight.shape)) if need else None
        for part, weight, need in zip(parts, weights, needed, strict=True)
    ]


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
        pattern = Pattern.of(row_S, index_S, len(x_BD))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_x = weighted_rows(weight_FD, index_S, grad_S, pattern.offsets)
        if ctx.needs_input_grad[2]:
            # The transposed product: the same sum with the roles of rows and features exchanged.
            transposed, order_S = pattern.transposed(len(weight_FD))
            grad_weight = weighted_rows(x_BD, transposed.index_S, grad_S[order_S], transposed.offsets)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_S.new_zeros(len(weight_FD)).index_add_(0, index_S, grad_S)
        return grad_S, grad_x, grad_weight, grad_bias, None, None


@functools.cache
def _expect_sparse_tensors() -> None:
    """Torch announces once per process that CSR tensors are new; callers cannot do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int64), empty[:0], torch.zeros(0), (1, 1), check_invariants=False
        )
