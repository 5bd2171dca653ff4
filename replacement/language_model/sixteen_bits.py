"""Exact arithmetic with 16-bit weights: they stay as they are, and are raised to float32 piece by piece while computing.

The function computed is "these weights, float32 arithmetic". No second copy of all weights exists at any time: of a block it
lives while the block runs, of the embedding it is the rows of the prompt, of the unembedding a few thousand columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

BLOCK_BYTES = 16 << 20
"""Size of the largest piece of the unembedding that is raised at a time."""


def raised_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which weights of a dtype compute exactly: float32 for 16 bits, else the same."""
    return torch.float32 if dtype.itemsize == 2 else dtype


@contextmanager
def raised(bridge: Any, dtype: torch.dtype) -> Iterator[None]:
    """Within it the forward passes of a bridge compute in `dtype`; one block's weights are raised at a time.

    Weights outside the blocks, the two embeddings apart, are few and stay raised throughout.
    """
    output = bridge.unembed.original_component
    in_blocks = {id(module) for block in bridge.blocks for module in block.modules()}
    outside = [module for module in bridge.modules() if id(module) not in in_blocks]
    embeddings = {id(module) for part in (bridge.embed, bridge.unembed) for module in part.modules()}
    pieces = [*(_Raised(list(block.modules()), dtype) for block in bridge.blocks)]
    handles = [hook for block, piece in zip(bridge.blocks, pieces, strict=True) for hook in piece.follow(block)]
    tables = _Raised(list(bridge.embed.modules()), dtype, rows_only=True)
    handles += tables.follow(bridge.embed)
    always = _Raised([module for module in outside if id(module) not in embeddings], dtype)
    if isinstance(output, nn.Linear):
        output.forward = _blockwise_forward(output)  # type: ignore[method-assign, assignment]
    else:
        unembed = _Raised(list(bridge.unembed.modules()), dtype)
        handles += unembed.follow(bridge.unembed)
        pieces.append(unembed)
    try:
        always.up()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for piece in (*pieces, tables, always):
            piece.down()
        output.__dict__.pop("forward", None)


class _Raised:
    """The 16-bit parameters and buffers of some modules, put back when their float32 copies are no longer needed."""

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype, *, rows_only: bool = False) -> None:
        self.modules, self.dtype, self.rows_only = modules, dtype, rows_only
        self._stored: list[tuple[dict[str, Any], str, Tensor]] = []

    def follow(self, module: nn.Module) -> tuple[Any, Any]:
        """Raise the weights whenever `module` runs, and no longer than that."""
        return (
            module.register_forward_pre_hook(
                lambda _, args, kwargs: self.up((*args, *kwargs.values())), with_kwargs=True
            ),
            module.register_forward_hook(lambda *_: self.down(), always_call=True),
        )

    def up(self, inputs: tuple[Any, ...] = ()) -> None:
        """Put float32 copies in the place of the weights; of a table of embeddings, only of the rows that are read."""
        copies: dict[int, Tensor] = {}
        for module in self.modules:
            places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for place in places:
                for name, stored in place.items():
                    if stored is None or raised_dtype(stored.dtype) == stored.dtype or not stored.is_floating_point():
                        continue
                    if id(stored) not in copies:
                        copies[id(stored)] = self._copy(stored, inputs)
                    self._stored.append((place, name, stored))
                    copy = copies[id(stored)]
                    place[name] = nn.Parameter(copy, requires_grad=False) if place is module._parameters else copy

    def down(self) -> None:
        """Put the stored weights back."""
        while self._stored:
            place, name, stored = self._stored.pop()
            place[name] = stored

    def _copy(self, stored: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        ids = [x for x in inputs if isinstance(x, Tensor) and not x.is_floating_point()]
        if not (self.rows_only and ids and stored.ndim == 2):
            return stored.detach().to(self.dtype)
        row_N = ids[0].unique()
        copy = stored.new_empty(stored.shape, dtype=self.dtype)  # memory that is never touched is never used
        copy[row_N] = stored.detach()[row_N].to(self.dtype)
        return copy


def _blockwise_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        return _blockwise(input, linear.weight, linear.bias)

    return forward


def _blockwise(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float = 1.0) -> Tensor:
    """`x @ weight.T + bias`, with some rows of a 16-bit weight raised to the dtype of `x` at a time."""
    if weight_VD.dtype == x.dtype:
        y = nn.functional.linear(x, weight_VD, None if bias_V is None else bias_V.to(x.dtype))
        return y if scale == 1 else y * scale
    y = x.new_empty(*x.shape[:-1], len(weight_VD))
    size = max(1, BLOCK_BYTES // (weight_VD.shape[1] * x.element_size()))
    for start in range(0, len(weight_VD), size):
        columns = slice(start, start + size)
        b = None if bias_V is None else bias_V[columns].to(x.dtype)
        y[..., columns] = nn.functional.linear(x, weight_VD[columns].to(x.dtype), b)
    return y if scale == 1 else y * scale


@dataclass(frozen=True, slots=True)
class Unembedding:
    """The map from the final norm's output to the logits: `(x @ W_U + b_U)`, in at least 32 bits."""

    stored_DV: Float[Tensor, "D V"]
    """`W_U` as the model stores it, in its dtype and without the factor."""
    bias_V: Float[Tensor, " V"] | None
    """`b_U` without the factor; None where it is zero."""
    scale: float = 1.0
    """Factor of all logits (Granite, Cohere)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what the methods return."""
        return raised_dtype(self.stored_DV.dtype)

    def logits(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Logits, before any soft-cap, of the final norm's output."""
        return _blockwise(x, self.stored_DV.T, self.bias_V, self.scale)

    def scores(self, direction: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """How much a direction of the final norm's output raises each logit: `logits` without the bias."""
        return _blockwise(direction, self.stored_DV.T, None, self.scale)

    def token(self, token_id: int) -> tuple[Float[Tensor, " D"], float]:
        """Direction and bias of one token's logit."""
        bias = 0.0 if self.bias_V is None else float(self.bias_V[token_id])
        return self.stored_DV[:, token_id].to(self.dtype) * self.scale, bias * self.scale

    def mean(self) -> tuple[Float[Tensor, " D"], float]:
        """Direction and bias of the mean logit."""
        bias = 0.0 if self.bias_V is None else float(self.bias_V.mean(dtype=self.dtype))
        total_D = self.stored_DV.new_zeros(len(self.stored_DV), dtype=self.dtype)
        for block_DV in self._blocks():
            total_D += block_DV.to(self.dtype).sum(1)
        return total_D * (self.scale / self.stored_DV.shape[1]), bias * self.scale

    def square_norms(self) -> Float[Tensor, " V"]:
        """Squared length of every token's direction."""
        blocks = (torch.linalg.vector_norm(block_DV.to(self.dtype), dim=0) for block_DV in self._blocks())
        return torch.cat(list(blocks)).square() * self.scale**2

    def _blocks(self) -> tuple[Tensor, ...]:
        """Columns, as many at a time as may be raised together: reductions to another dtype would raise all of them."""
        return self.stored_DV.split(max(1, BLOCK_BYTES // (len(self.stored_DV) * self.dtype.itemsize)), dim=1)

    def matrix(self) -> Float[Tensor, "D V"]:
        """`W_U`; a copy where the weights have 16 bits or there is a factor."""
        W_DV = self.stored_DV.to(self.dtype)
        return W_DV if self.scale == 1 else W_DV * self.scale
