"""Credit through the non-linearity, against integrals, brute force over permutations, and the rules' own identities."""

from __future__ import annotations

import importlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.heads.relu_credit import DEFAULT_RULE, RULES, Credit, activation, credit

MODULE = importlib.import_module("circuits.heads.relu_credit")
EIGHTHS = st.integers(-24, 24).map(lambda n: n / 8)  # sums of these are exact, and often meet a threshold exactly
THRESHOLDS = st.sampled_from([0.0, 0.0, 0.5, 1.25])
ANY_SIGN = THRESHOLDS | st.sampled_from([-0.5, -1.25, -math.inf])
REALS = st.floats(-1e6, 1e6)


def arrays(elements: st.SearchStrategy[float], largest: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(elements, max_size=largest).map(lambda numbers: np.array(numbers, dtype=np.float64))


def gain(c_J: np.ndarray, bias: float, threshold: float) -> float:
    """f(h) - f(b)."""
    return float(activation(bias + c_J.sum(), threshold) - activation(bias, threshold))


def all_orders(c_J: np.ndarray, bias: float, threshold: float) -> np.ndarray:
    """Shapley values by their definition."""
    total, count = [0.0] * len(c_J), 0
    for order in itertools.permutations(range(len(c_J))):
        h, count = bias, count + 1
        for j in order:
            before = h if h > threshold else 0.0
            h += c_J[j]
            total[j] += (h if h > threshold else 0.0) - before
    return np.array(total) / count


def exact_shapley(monkeypatch: pytest.MonkeyPatch, c_J: np.ndarray, **options: float) -> Credit:
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "EXACT_PLAYERS", 20)
        return credit(c_J, rule="shapley", **options)


def test_activation_is_strictly_above_its_threshold() -> None:
    np.testing.assert_array_equal(activation(np.array([-1.0, 0.5, 1.0, 1.5]), 1.0), [0, 0, 0, 1.5])
    np.testing.assert_array_equal(activation(np.array([-1.0, 0.0, 1.0]), 0.0), [0, 0, 1])
    assert activation(2.0, 1.0) == 2.0


def test_the_default_is_the_rule_that_predicts_removals_best() -> None:
    assert DEFAULT_RULE == credit(np.array([1.0]), bias=0.0).rule == "ablation"


# path


@settings(max_examples=50)
@given(arrays(EIGHTHS, 8), EIGHTHS)
def test_path_is_the_integral_of_the_relu_gradient(c_J, bias) -> None:
    steps = 4096
    midpoints = (np.arange(steps) + 0.5) / steps
    gradient = (bias + midpoints * c_J.sum() > 0).mean()  # the same for every player
    np.testing.assert_allclose(credit(c_J, bias=bias, rule="path").credit_J, c_J * gradient, atol=3 / steps)


@settings(max_examples=50)
@given(arrays(EIGHTHS, 8), EIGHTHS, THRESHOLDS, st.integers(0, 2**32 - 1))
def test_path_is_a_stieltjes_sum_along_an_uneven_walk(c_J, bias, threshold, seed) -> None:
    """Each step's change of f is divided in proportion to what the players change in that step."""
    times = np.sort(np.append(np.random.default_rng(seed).random(500), [0.0, 1.0]))
    h_T = bias + times * c_J.sum()
    step_T = np.diff(h_T)
    slope_T = np.divide(np.diff(activation(h_T, threshold)), step_T, out=np.zeros_like(step_T), where=step_T != 0)
    expected = c_J * (slope_T * np.diff(times)).sum()
    if c_J.sum() == 0:
        expected = c_J * (bias > threshold)
    np.testing.assert_allclose(credit(c_J, bias=bias, threshold=threshold, rule="path").credit_J, expected, atol=1e-9)


@pytest.mark.parametrize("bias", [-1.0, 0.9, 1.5, 6.0])
def test_path_with_a_jump_is_the_limit_of_smooth_integrated_gradients(bias) -> None:
    """f smoothed to h sigmoid((h - theta) / width), whose gradient is analytic and holds the jump as a narrow peak."""
    c_J, threshold, width, steps = np.array([2.0, -4.5, 0.25, -1.5]), 1.0, 1e-3, 400_000
    h_T = bias + (np.arange(steps) + 0.5) / steps * c_J.sum()
    gate_T = 0.5 * (1 + np.tanh((h_T - threshold) / (2 * width)))
    gradient = (gate_T + h_T * gate_T * (1 - gate_T) / width).mean()
    np.testing.assert_allclose(
        credit(c_J, bias=bias, threshold=threshold, rule="path").credit_J, c_J * gradient, atol=1e-4
    )


@pytest.mark.parametrize(("bias", "factor"), [(2.0, 1), (0.5, 0), (0.25, 0)])
def test_path_of_players_that_cancel_is_the_gradient_at_the_bias(bias, factor) -> None:
    c_J = np.array([3.0, -1.0, -2.0])
    np.testing.assert_array_equal(credit(c_J, bias=bias, threshold=0.5, rule="path").credit_J, factor * c_J)
    nearly = credit(
        c_J - 1e-9, bias=bias, threshold=0.5, rule="path"
    )  # the limit from below: at the threshold, from the off side
    np.testing.assert_allclose(nearly.credit_J, factor * c_J, atol=1e-8)


def test_path_across_a_jump_can_be_large() -> None:
    found = credit(np.array([1.0, -0.875]), bias=0.9375, threshold=1.0, rule="path")
    np.testing.assert_allclose(found.credit_J, [8.5, -7.4375])
    assert found.credit_J.sum() == pytest.approx(1.0625)


# shapley


@settings(max_examples=60, deadline=None)
@given(arrays(EIGHTHS, 5), EIGHTHS, ANY_SIGN)
def test_shapley_equals_all_orders(c_J, bias, threshold) -> None:
    found = credit(c_J, bias=bias, threshold=threshold, rule="shapley")
    np.testing.assert_allclose(found.credit_J, all_orders(c_J, bias, threshold), atol=1e-10)
    np.testing.assert_array_equal(found.standard_error_J, 0)


@pytest.mark.parametrize("threshold", [0.0, 0.7, -0.7])
@pytest.mark.parametrize("seed", range(8))
def test_shapley_of_six_players_equals_all_orders(seed, threshold) -> None:
    rng = np.random.default_rng(seed)
    c_J, bias = rng.normal(size=6), float(rng.normal())
    found = credit(c_J, bias=bias, threshold=threshold, rule="shapley")
    np.testing.assert_allclose(found.credit_J, all_orders(c_J, bias, threshold), atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(arrays(EIGHTHS, 10), EIGHTHS, THRESHOLDS, EIGHTHS, st.integers(0, 2**32 - 1))
def test_shapley_axioms(c_J, bias, threshold, twin, seed) -> None:
    c_J = np.append(c_J, [twin, 0.0, twin])
    found = credit(c_J, bias=bias, threshold=threshold, rule="shapley").credit_J
    assert found[-3] == found[-1]  # symmetric players
    np.testing.assert_array_equal(found[c_J == 0], 0)  # null players
    np.testing.assert_allclose(found.sum(), gain(c_J, bias, threshold), atol=1e-10)
    shuffle = np.random.default_rng(seed).permutation(len(c_J))
    again = credit(c_J[shuffle], bias=bias, threshold=threshold, rule="shapley").credit_J
    np.testing.assert_array_equal(again, found[shuffle])


def test_null_players_do_not_count_towards_the_exact_limit() -> None:
    c_J = np.zeros(500)
    c_J[[3, 100, 400]] = 2.0, -1.0, 0.5
    found = credit(c_J, bias=-0.5, rule="shapley")
    np.testing.assert_allclose(found.credit_J[[3, 100, 400]], all_orders(c_J[[3, 100, 400]], -0.5, 0.0))
    assert np.count_nonzero(found.credit_J) == 3
    assert not found.standard_error_J.any()


@pytest.mark.parametrize(("n_players", "threshold"), [(18, 0.0), (18, 2.0), (20, 0.5)])
def test_sampled_shapley_is_within_its_error_of_the_exact_one(monkeypatch, n_players, threshold) -> None:
    c_J = np.random.default_rng(n_players).normal(size=n_players)
    options = {"bias": -0.5 - c_J.sum() / 2, "threshold": threshold}
    exact = exact_shapley(monkeypatch, c_J, **options)
    found = credit(c_J, rule="shapley", **options)
    z_J = (found.credit_J - exact.credit_J) / found.standard_error_J
    assert np.abs(z_J).max() < 4.5
    assert 0.2 < np.sqrt((z_J**2).mean()) < 1.6  # neither too small nor a bound that says nothing
    assert found.credit_J.sum() == pytest.approx(gain(c_J, **options), abs=1e-10)
    assert (np.diff(found.credit_J[np.argsort(c_J)]) >= 0).all()
    assert found.standard_error_J.max() < 0.05 * np.abs(exact.credit_J).max()


def test_sampling_error_falls_with_samples_and_is_reproducible() -> None:
    c_J = np.random.default_rng(0).normal(size=30)
    few, many = (credit(c_J, bias=-1.0, rule="shapley", samples=n) for n in (256, 4096))
    np.testing.assert_allclose(few.standard_error_J / many.standard_error_J, 4.0, rtol=0.4)
    again, other = (credit(c_J, bias=-1.0, rule="shapley", samples=256, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(few.credit_J, again.credit_J)
    assert (few.credit_J != other.credit_J).any()


def test_chunks_of_samples_add_up(monkeypatch) -> None:
    c_J = np.random.default_rng(0).normal(size=17)
    whole = credit(c_J, bias=-1.0, rule="shapley", samples=50)
    monkeypatch.setattr(MODULE, "_CHUNK", 17 * 7)
    parts = credit(c_J, bias=-1.0, rule="shapley", samples=50)
    np.testing.assert_allclose(parts.credit_J, whole.credit_J, rtol=1e-12)
    np.testing.assert_allclose(parts.standard_error_J, whole.standard_error_J, rtol=1e-12)


def test_the_projection_matters_and_brings_few_samples_closer(monkeypatch) -> None:
    c_J = np.random.default_rng(1).normal(size=18)
    exact = exact_shapley(monkeypatch, c_J, bias=-1.0).credit_J
    ordered = [credit(c_J, bias=-1.0, rule="shapley", samples=4, seed=seed).credit_J for seed in range(10)]
    monkeypatch.setattr(MODULE, "_project_on_order", lambda values_J, c_J: values_J)
    raw = [credit(c_J, bias=-1.0, rule="shapley", samples=4, seed=seed).credit_J for seed in range(10)]
    for before, after in zip(raw, ordered, strict=True):
        assert ((after - exact) ** 2).sum() <= ((before - exact) ** 2).sum() * (1 + 1e-12)
        assert after.sum() == pytest.approx(before.sum(), abs=1e-12)
    assert max(np.abs(after - before).max() for before, after in zip(raw, ordered, strict=True)) > 0.01


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=12))
def test_pooling_equals_the_min_max_formula(values) -> None:
    values_J = np.array(values)
    n = len(values_J)
    expected = [max(min(values_J[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    np.testing.assert_allclose(MODULE._project_on_order(values_J, np.arange(1.0, n + 1)), expected, atol=1e-12)


def test_reverses_cancel_what_order_does_to_a_feature_that_switches_half_way() -> None:
    """The k-th of 17 to join adds 0 before the middle, 0.5 there and 1 after: 0.5 on average with its mirror image."""
    found = credit(np.ones(17), bias=-8.5, rule="shapley", samples=20)
    np.testing.assert_array_equal(found.credit_J, 0.5)
    np.testing.assert_array_equal(found.standard_error_J, 0)


@pytest.mark.parametrize("n_players", [16, 3000])
def test_memory_is_bounded(n_players) -> None:
    c_J = np.random.default_rng(0).normal(size=n_players)
    tracemalloc.start()
    try:
        credit(c_J, bias=0.5, rule="shapley", samples=1000)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


# all rules


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_players", [10, 18])
def test_rounding_does_not_switch_a_feature_at_its_threshold(rule, n_players) -> None:
    """Sums in another order may come out above the threshold; the pre-activation is the sum that is rounded once."""
    for seed in range(10):
        c_J = np.random.default_rng(seed).random(n_players)
        found = credit(c_J, bias=0.0, threshold=math.fsum(c_J), rule=rule, samples=50)
        assert found.residual == 0
        np.testing.assert_array_equal(found.credit_J, 0)


def test_path_is_complete_beside_a_large_bias() -> None:
    found = credit(np.array([0.3]), bias=1e6 - 0.1, threshold=1e6, rule="path")
    assert abs(found.residual) < 1e-8


def check_order(c_J: np.ndarray, credit_J: np.ndarray) -> None:
    """A larger contribution never gets the smaller credit, equal ones get equal credit, none gets the other sign."""
    order = np.argsort(c_J, kind="stable")
    steps = np.diff(credit_J[order])
    assert (steps >= 0).all()
    assert (steps[np.diff(c_J[order]) == 0] == 0).all()
    assert (credit_J * np.sign(c_J) >= 0).all()
    assert (credit_J[c_J == 0] == 0).all()


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(c_J=arrays(REALS, 8) | arrays(EIGHTHS, 8), bias=REALS | EIGHTHS, threshold=st.floats(0.0, 1e3) | THRESHOLDS)
def test_no_rule_reorders_players_within_an_activation(rule, c_J, bias, threshold) -> None:
    check_order(c_J, credit(c_J, bias=bias, threshold=threshold, rule=rule).credit_J)


@settings(max_examples=30, deadline=None)
@given(st.lists(REALS, min_size=17, max_size=25), REALS, THRESHOLDS)
def test_sampling_does_not_reorder_players_either(c_J, bias, threshold) -> None:
    c_J = np.array(c_J)
    check_order(c_J, credit(c_J, bias=bias, threshold=threshold, rule="shapley", samples=4).credit_J)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("gate", [1, 2]), ("path", [1 / 3, 2 / 3]), ("shapley", [0.5, 0.5]), ("ablation", [1, 1])],
)
def test_some_rules_flatten_the_order(rule, expected) -> None:
    """h = -2 + 1 + 2 = 1: neither player suffices and neither can be spared, whatever its size."""
    c_J = np.array([1.0, 2.0])
    np.testing.assert_allclose(credit(c_J, bias=-2.0, rule=rule).credit_J, expected)
    np.testing.assert_array_equal(credit(c_J, bias=-4.0, rule=rule).credit_J, 0)  # inactive: nothing to share


@pytest.mark.parametrize("rule", RULES)
@given(c_J=arrays(EIGHTHS, 8), bias=EIGHTHS, threshold=ANY_SIGN)
@settings(max_examples=60, deadline=None)
def test_residual_is_what_each_rule_leaves(rule, c_J, bias, threshold) -> None:
    found = credit(c_J, bias=bias, threshold=threshold, rule=rule)
    h = bias + c_J.sum()
    f_b, f_h = (float(activation(one, threshold)) for one in (bias, h))
    expected = {
        "gate": f_h - f_b - (h - bias) * (h > threshold),
        "path": 0.0,
        "shapley": 0.0,
        "ablation": f_h - f_b - sum(f_h - float(activation(h - one, threshold)) for one in c_J),
    }
    assert found.residual == pytest.approx(expected[rule], abs=1e-10)
    assert found.credit_J.sum() + found.residual == pytest.approx(f_h - f_b, abs=1e-10)
    assert found.rule == rule
    assert found.credit_J.dtype == found.standard_error_J.dtype == np.float64


@given(arrays(EIGHTHS, 8), EIGHTHS, THRESHOLDS)
def test_gate_equals_ablation_of_players_without_which_it_stays_on(c_J, bias, threshold) -> None:
    gate, ablation = (credit(c_J, bias=bias, threshold=threshold, rule=rule).credit_J for rule in ("gate", "ablation"))
    h = bias + c_J.sum()
    stays = (h > threshold) & (h - c_J > threshold)
    np.testing.assert_array_equal(gate[stays], ablation[stays])


@pytest.mark.parametrize("rule", RULES)
def test_rules_agree_where_nothing_is_cut_off(rule) -> None:
    c_J = np.array([1.0, -0.5, 2.0, -0.25])
    found = credit(c_J, bias=4.0, threshold=0.5, rule=rule)
    np.testing.assert_allclose(found.credit_J, c_J)
    assert found.residual == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "expected", "residual"),
    [
        ("gate", [6, -3], -2),  # sums to 3 = h - b, three times the activation: the negative bias has no share
        ("path", [2, -1], 0),  # a third of each: h is above 0 on the last third of the way from -2 to 1
        ("shapley", [2.5, -1.5], 0),  # +4 or +1 for the first player, 0 or -3 for the second
        ("ablation", [1, -3], 3),  # no more than the whole activation can be lost
    ],
)
def test_an_inhibited_feature_by_hand(rule, expected, residual) -> None:
    """h = -2 + 6 - 3 = 1."""
    found = credit(np.array([6.0, -3.0]), bias=-2.0, rule=rule)
    np.testing.assert_allclose(found.credit_J, expected)
    assert found.residual == pytest.approx(residual, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_no_players_no_credit(rule) -> None:
    found = credit(np.array([]), bias=3.0, rule=rule)
    assert found.credit_J.shape == found.standard_error_J.shape == (0,)
    assert found.residual == 0.0


@pytest.mark.parametrize(
    ("contributions", "options", "message"),
    [
        ([1.0], {"rule": "magic"}, "expected a rule among gate, path, shapley, ablation, given 'magic'"),
        ([[1.0, 2.0]], {}, r"expected contributions of shape \[J\], given shape \[1, 2\]"),
        ([1.0, np.nan], {}, "expected finite contributions, given nan for player 1"),
        ([1.0], {"bias": np.inf}, "expected a finite bias, given inf"),
        ([1.0], {"threshold": np.inf}, "expected a finite threshold, given inf"),
        ([1.0], {"threshold": np.nan}, "expected a finite threshold, given nan"),
        ([1e308, 1e308], {}, r"expected contributions with a finite sum, given sizes up to 1e\+308"),
        ([1.0], {"samples": 1}, "expected at least 2 samples, given 1"),
    ],
)
def test_bad_input_is_named(contributions, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        credit(np.array(contributions), **{"bias": 0.0, **options})
