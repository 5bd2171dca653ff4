"""Sparse products against dense matrices and their automatic derivatives in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import replacement.crosscoder.encoder
from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.sparse import Block, Pattern, add_blocks, dots, weighted_rows, with_encoder_gradient
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.crosscoder.wiring import Wiring

N_ROWS, N_FEATURES, WIDTH = 6, 9, 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pattern(n_rows: int = N_ROWS, n_features: int = N_FEATURES, *, density: float = 0.4, seed: int = 0) -> Pattern:
    chosen_BF = torch.rand(n_rows, n_features, generator=torch.Generator().manual_seed(seed)) < density
    return Pattern.of(*torch.nonzero(chosen_BF, as_tuple=True), n_rows)


def dense(where: Pattern, values_S: Tensor, n_features: int = N_FEATURES) -> Tensor:
    zeros_BF = values_S.new_zeros(len(where.offsets) - 1, n_features)
    return zeros_BF.index_put((where.row_S, where.index_S), values_S)


DENSITIES = pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])


@DENSITIES
def test_a_transposed_pattern_is_sorted_by_column(density: float) -> None:
    where = pattern(density=density)
    transposed, order_S = where.transposed(N_FEATURES)
    values_S = random(len(where.row_S))
    assert torch.equal(dense(transposed, values_S[order_S], N_ROWS), dense(where, values_S).T)
    assert bool((transposed.row_S.diff() >= 0).all())
    assert transposed.offsets.diff().tolist() == where.index_S.bincount(minlength=N_FEATURES).tolist()


@DENSITIES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dots_are_the_entries_of_a_dense_product(density: float, dtype: torch.dtype) -> None:
    where = pattern(density=density)
    left_BD, right_FD = random(N_ROWS, WIDTH, seed=1, dtype=dtype), random(N_FEATURES, WIDTH, seed=2, dtype=dtype)
    expected_S = (left_BD.double() @ right_FD.double().T)[where.row_S, where.index_S]
    found_S = dots(left_BD, right_FD, where)
    assert found_S.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found_S.double(), expected_S, rtol=tolerance, atol=tolerance)


BLOCKS = {
    # Two sources that write two places of their own weight each; the second target is shared.
    "own weights": [Block(0, 0, 0, 0), Block(1, 0, 0, 1), Block(1, 1, 1, 0), Block(2, 1, 1, 1)],
    # Both sources write through one weight, as with tied decoders.
    "one weight": [Block(0, 0, 0, 0), Block(0, 1, 0, 0), Block(1, 1, 0, 1)],
    # Place 1 of weight 0, source 1 and weight 1 are not used at all.
    "part of a weight": [Block(0, 0, 0, 0)],
}


def run_blocks(blocks: list[Block], scales: list[Tensor], weights: list[Tensor], where: list[Pattern]) -> list[Tensor]:
    """The formula of `add_blocks` with dense matrices."""
    sums = [weights[0].new_zeros(N_ROWS, WIDTH) for _ in range(1 + max(block.target for block in blocks))]
    for target, source, weight, place in blocks:
        sums[target] = sums[target] + dense(where[source], scales[source]) @ weights[weight][:, place]
    return sums


@DENSITIES
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=list(BLOCKS))
def test_blocks_and_their_gradients_equal_dense_products(blocks: list[Block], density: float) -> None:
    where = [pattern(density=density, seed=seed) for seed in (0, 1)]
    scales = [random(len(p.row_S), seed=3 + i).requires_grad_() for i, p in enumerate(where)]
    weights = [random(N_FEATURES, 2, WIDTH, seed=5 + i).requires_grad_() for i in range(2)]
    found, expected = add_blocks(blocks, where, scales, weights), run_blocks(blocks, scales, weights, where)
    directions = [random(N_ROWS, WIDTH, seed=7 + i) for i in range(len(expected))]

    def gradients(outputs: Any) -> tuple[Tensor, ...]:
        total = sum((y_BD * direction).sum() for y_BD, direction in zip(outputs, directions, strict=True))
        return torch.autograd.grad(total, [*scales, *weights], allow_unused=True, materialize_grads=True)

    for y_BD, expected_BD in zip(found, expected, strict=True):
        torch.testing.assert_close(y_BD, expected_BD, rtol=1e-12, atol=1e-12)
    for found_grad, expected_grad in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_outputs_without_a_gradient_and_frozen_inputs_are_left_out() -> None:
    where = [pattern(seed=seed) for seed in (0, 1)]
    scales = [random(len(p.row_S), seed=3 + i) for i, p in enumerate(where)]
    weights = [random(N_FEATURES, 2, WIDTH, seed=5 + i) for i in range(2)]
    scales[0].requires_grad_()
    weights[1].requires_grad_()
    blocks = BLOCKS["own weights"]
    found, expected = add_blocks(blocks, where, scales, weights), run_blocks(blocks, scales, weights, where)
    for actual, wanted in zip(
        *(torch.autograd.grad(outputs[1].sum(), [scales[0], weights[1]]) for outputs in (found, expected)), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_outputs_may_be_worked_on_in_place() -> None:
    """They share one piece of memory, which neither autograd nor the other outputs may notice."""
    where = [pattern(seed=seed) for seed in (0, 1)]
    scales = [random(len(p.row_S), seed=3 + i).requires_grad_() for i, p in enumerate(where)]
    weights = [random(N_FEATURES, 2, WIDTH, seed=5 + i).requires_grad_() for i in range(2)]
    bias_D = random(WIDTH, seed=9).requires_grad_()
    found, expected = (
        function(BLOCKS["own weights"], *order)
        for function, order in (
            (add_blocks, (where, scales, weights)),
            (run_blocks, (scales, weights, where)),
        )
    )
    found[0].add_(bias_D)
    found[2].mul_(3.0)
    expected = [expected[0] + bias_D, expected[1], 3 * expected[2]]
    for y_BD, expected_BD in zip(found, expected, strict=True):
        torch.testing.assert_close(y_BD, expected_BD, rtol=1e-12, atol=1e-12)
    inputs = [*scales, *weights, bias_D]
    totals = [sum((i + 1) * y_BD.square().sum() for i, y_BD in enumerate(outputs)) for outputs in (found, expected)]
    for actual, wanted in zip(*(torch.autograd.grad(total, inputs) for total in totals), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_no_blocks_have_no_outputs() -> None:
    assert add_blocks([], [], [], []) == ()


def test_a_second_derivative_is_refused() -> None:
    where, scale_S = pattern(), random(len(pattern().row_S)).requires_grad_()
    weight_FWD = random(N_FEATURES, 1, WIDTH).requires_grad_()
    (y_BD,) = add_blocks([Block(0, 0, 0, 0)], [where], [scale_S], [weight_FWD])
    (grad_S,) = torch.autograd.grad(y_BD.square().sum(), [scale_S], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_S.sum().backward()


@DENSITIES
def test_encoder_gradient_equals_that_of_a_dense_product(density: float) -> None:
    where = pattern(density=density)
    leaves = [random(N_ROWS, WIDTH), random(N_FEATURES, WIDTH, seed=1), random(N_FEATURES, seed=2)]
    x_BD, weight_FD, bias_F = (leaf.requires_grad_() for leaf in leaves)
    dense_S = (x_BD @ weight_FD.T + bias_F)[where.row_S, where.index_S]
    sparse_S = with_encoder_gradient(dense_S.detach(), x_BD, weight_FD, bias_F, where.row_S, where.index_S)
    assert torch.equal(sparse_S, dense_S)
    found, expected = (torch.autograd.grad(pre_S.square().sum(), leaves) for pre_S in (sparse_S, dense_S))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_repeated_runs_agree_bit_for_bit() -> None:
    """Many rows per feature and many features per row, in fp32, where another order of summation would show."""
    where = pattern(500, 40, density=0.5)

    def run() -> tuple[Tensor, ...]:
        scale_S = random(len(where.row_S), seed=1, dtype=torch.float32).requires_grad_()
        weight_FWD = random(40, 3, 16, seed=2, dtype=torch.float32).requires_grad_()
        outputs = add_blocks([Block(w, 0, 0, w) for w in range(3)], [where], [scale_S], [weight_FWD])
        torch.stack([y_BD.square().sum() for y_BD in outputs]).sum().backward()
        assert scale_S.grad is not None
        assert weight_FWD.grad is not None
        return (*outputs, scale_S.grad, weight_FWD.grad)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_rows_without_entries_are_zero() -> None:
    offsets = torch.tensor([0, 0, 2, 2])
    out_BD = weighted_rows(torch.eye(3), torch.tensor([2, 0]), torch.tensor([5.0, 7.0]), offsets)
    assert out_BD.tolist() == [[0, 0, 0], [7, 0, 5], [0, 0, 0]]


@given(st.integers(0, 5), st.sampled_from([1, 7, 48, 64, 100, 256, 1000]), st.integers(1, 9), st.booleans(), st.data())
def test_topk_of_wide_rows(n_rows: int, n_features: int, k: int, ties: bool, data: st.DataObject) -> None:
    """Blocks of columns are searched instead of whole rows; where values are equal any k of the largest will do."""
    k = min(k, n_features)
    pre_BF = random(n_rows, n_features, seed=data.draw(st.integers(0, 99)))
    pre_BF = pre_BF.mul(2).round() if ties else pre_BF
    row_S, index_S = TopK(k).select(pre_BF, None)
    key_S = row_S * n_features + index_S
    assert bool((key_S.diff() > 0).all())
    for row, values_F in enumerate(pre_BF):
        largest = values_F.sort(descending=True).values[:k]
        found = values_F[index_S[row_S == row]].sort(descending=True).values
        assert torch.equal(found, largest[largest > 0])


@given(st.integers(0, 5), st.sampled_from([1, 7, 48, 64, 256, 1000]), st.integers(1, 9), st.booleans(), st.data())
def test_batchtopk_of_wide_rows(n_rows: int, n_features: int, k: int, ties: bool, data: st.DataObject) -> None:
    """The positive entries that fewer than k B others exceed."""
    k = min(k, n_features)
    # Rows of different size, so that one row may hold most of what is kept.
    pre_BF = random(n_rows, n_features, seed=data.draw(st.integers(0, 99))) * torch.arange(1, n_rows + 1)[:, None]
    pre_BF = (pre_BF.mul(2).round() if ties else pre_BF) + data.draw(st.sampled_from([-3, 0, 3]))
    selection = BatchTopK(k).select(pre_BF, torch.zeros(1), training=True)
    n_larger_BF = (pre_BF.flatten() > pre_BF[..., None]).sum(dim=-1)
    assert torch.equal(torch.stack(selection, dim=1), torch.nonzero((n_larger_BF < k * n_rows) & (pre_BF > 0)))


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), TopK(3), BatchTopK(3)], ids=lambda a: a.name)
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
def test_rows_may_be_encoded_in_chunks(
    activation: Any, training: bool, random_crosscoder: Any, random_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 3 rows, the last one shorter, choose the same features as the whole batch."""
    wiring = Wiring.acausal(ModelShape(n_layers=3, d_model=8, n_heads=2, d_head=5))
    inputs = random_inputs(wiring, n_rows=10)
    with torch.no_grad():
        whole = random_crosscoder(wiring, activation=activation).train(training).encode(inputs)
        monkeypatch.setattr(replacement.crosscoder.encoder, "_ROWS_AT_ONCE", 3)
        chunked = random_crosscoder(wiring, activation=activation).train(training).encode(inputs)
    assert len(whole) > 0
    assert torch.equal(chunked.row, whole.row)
    assert torch.equal(chunked.index, whole.index)
    torch.testing.assert_close(chunked.activation, whole.activation, rtol=1e-12, atol=1e-12)


def test_no_rows_have_no_features(random_crosscoder: Any, random_inputs: Any) -> None:
    wiring = Wiring.strictly_causal(ModelShape(n_layers=3, d_model=8, n_heads=2, d_head=5))
    outputs, features = random_crosscoder(wiring)(random_inputs(wiring, n_rows=0))
    assert len(features) == 0
    assert all(y_BD.shape == (0, 8) for y_BD in outputs.values())


def test_dots_without_mkl_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of torch without MKL gather the rows instead."""
    row_S, index_S = torch.tensor([0, 0, 2]), torch.tensor([1, 3, 0])
    pattern = Pattern.of(row_S, index_S, 3)
    left_BD, right_FD = random(3, 5, seed=0), random(4, 5, seed=1)
    expected_S = (left_BD @ right_FD.T)[row_S, index_S]
    torch.testing.assert_close(dots(left_BD, right_FD, pattern), expected_S)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.testing.assert_close(dots(left_BD, right_FD, pattern), expected_S)
