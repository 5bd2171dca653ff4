"""Credit through the ReLU: what share of a feature's ACTIVATION each of its causes has.

Contributions are exact for the pre-activation, not for what comes out of the non-linearity:

    h = b + sum_j c_j          b: bias, c_j: contribution of player j (a head, the direct stream, a source)
    f(h) = h if h > theta else 0

theta = 0 is ReLU, any other theta JumpReLU. With a prompt's other features held fixed TopK and BatchTopK are JumpReLUs
too, whose threshold is the runner-up's pre-activation (with a ReLU at least 0). No rule has every property:

| rule     | credit of player j                                  | complete | order | null | single removal |
|----------|-----------------------------------------------------|----------|-------|------|----------------|
| gate     | c_j 1[h > theta]                                    | no       | yes   | yes  | if it stays on |
| path     | c_j (f(h) - f(b)) / (h - b)                         | yes      | yes   | yes  | no             |
| shapley  | mean over orders of f(after j joins) - f(before)    | yes      | yes   | yes  | no             |
| ablation | f(h) - f(h - c_j)                                   | no       | yes   | yes  | yes            |

Complete: credits sum to f(h) - f(b). Order: within one activation a larger contribution never gets the smaller credit
(f is monotone where theta >= 0; below, f jumps down at theta and only gate keeps the order), though credits may tie where
contributions differ. Null: a player with c_j = 0 gets 0. Single removal:
the credit is what the activation loses without that player, "if it stays on" where h and h - c_j both exceed theta.

Letters: J players, P pairs of permutations, S = 2^J coalitions.

Sources: Sundararajan, Taly and Yan 2017, Axiomatic Attribution for Deep Networks (integrated gradients); Shapley 1953,
A Value for n-Person Games; Castro, Gomez and Tejada 2009, Polynomial calculation of the Shapley value based on sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from replacement.number_checks import integer, whole_number

RULES: tuple[str, ...] = ("gate", "path", "shapley", "ablation")
DEFAULT_RULE = "ablation"
"""The rule that comes closest to what removing a head in the model does, on every rung of `circuits heads --check`."""
EXACT_PLAYERS = 16
"""Shapley values of at most this many players (with c_j != 0) are computed from all 2^J coalitions."""
_CHUNK = 2**19
"""Players times permutations walked at once: bounds the memory of sampling to a few tens of MB."""


@dataclass(frozen=True, slots=True)
class Credit:
    """One activation, divided among the players that caused it."""

    credit_J: np.ndarray
    """float64[J], in units of the activation."""
    standard_error_J: np.ndarray
    """float64[J], 0 unless Shapley values were sampled. It is that of the estimates before they are put in order."""
    residual: float
    """f(h) - f(b) - sum(credit): what the rule leaves unexplained."""
    rule: str
    """The rule that was used, one of `RULES`."""


def activation(h: np.ndarray | float, threshold: np.ndarray | float) -> np.ndarray:
    """f(h) = h where h > threshold, else 0, in float64 (ReLU: threshold 0); arrays go element by element."""
    h = np.asarray(h, dtype=np.float64)
    return np.where(h > threshold, h, 0.0)


def credit(
    contributions_J: np.ndarray,
    *,
    bias: float,
    threshold: float = 0.0,
    rule: str = DEFAULT_RULE,
    samples: int = 2048,
    seed: int = 0,
) -> Credit:
    """Divide the activation f(b + sum_j c_j) among its players; see the module's table for the rules.

    Args:
        contributions_J: [J], exact contributions to the pre-activation.
        bias: the pre-activation without any player, b.
        threshold: theta; minus infinity for a feature that is always active.
        rule: one of `RULES`. `path` integrates f' along the straight line from b to h, and counts a JumpReLU's jump as
            part of f'. Its factor is 1 where b and h are both active and 0 where neither is; so also at h = b, where
            it is f'(b), the limit of the quotient. When h lies just across a jump from b the factor is large: players
            that cancel then get large credits of both signs.
        samples: for `shapley` of more than `EXACT_PLAYERS` players: independent draws, each one a random permutation
            and its reverse. At least 2, so that their spread is known.
        seed: of the permutations.

    Raises `ValueError` for an unknown rule, contributions that are not 1-D, numbers or a sum of them that are not
    finite, or fewer than 2 samples.
    """
    if rule not in RULES:
        raise ValueError(f"expected a rule among {', '.join(RULES)}, given {rule!r}")
    whole_number("seed", seed)
    if integer("samples", samples) < 2:
        raise ValueError(f"expected at least 2 samples, given {samples}")
    c_J, h = _checked(contributions_J, bias=bias, threshold=threshold)
    f_b, f_h = float(activation(bias, threshold)), float(activation(h, threshold))
    standard_error_J = np.zeros_like(c_J)
    if rule == "gate":
        credit_J = c_J * float(h > threshold)
    elif rule == "path":
        switches = (h > threshold) != (bias > threshold)
        # Divided by the sum and not by h - b, which is rounded at the size of the bias.
        credit_J = c_J * ((f_h - f_b) / math.fsum(c_J) if switches else float(h > threshold))
    elif rule == "shapley":
        credit_J, standard_error_J = _shapley(c_J, bias=bias, h=h, threshold=threshold, samples=samples, seed=seed)
    else:
        credit_J = f_h - activation(h - c_J, threshold)
    residual = math.fsum([f_h, -f_b, *(-credit_J)])
    return Credit(credit_J=credit_J, standard_error_J=standard_error_J, residual=residual, rule=rule)


def _checked(contributions_J: np.ndarray, *, bias: float, threshold: float) -> tuple[np.ndarray, float]:
    """Contributions in float64 and the pre-activation, whose sum is rounded once and so has no order."""
    c_J = np.asarray(contributions_J, dtype=np.float64)
    if c_J.ndim != 1:
        raise ValueError(f"expected contributions of shape [J], given shape {list(c_J.shape)}")
    bad = np.flatnonzero(~np.isfinite(c_J))
    if len(bad):
        raise ValueError(f"expected finite contributions, given {c_J[bad[0]]} for player {bad[0]}")
    for name, number in (("bias", bias), ("threshold", 0.0 if threshold == -math.inf else threshold)):
        if not math.isfinite(number):
            raise ValueError(f"expected a finite {name}, given {number}")
    with np.errstate(over="ignore"):
        size = abs(bias) + np.abs(c_J).sum()
    if not math.isfinite(size):
        raise ValueError(f"expected contributions with a finite sum, given sizes up to {np.abs(c_J).max()}")
    return c_J, math.fsum([bias, *c_J])


def _shapley(
    c_J: np.ndarray, *, bias: float, h: float, threshold: float, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shapley values of v(S) = f(b + sum_{j in S} c_j) and their standard errors; players with c_j = 0 sit out."""
    credit_J, standard_error_J = np.zeros_like(c_J), np.zeros_like(c_J)
    players = np.flatnonzero(c_J)
    players = players[np.argsort(c_J[players], kind="stable")]  # the answer must not depend on how players are numbered
    active_J = c_J[players]
    if len(players) <= EXACT_PLAYERS:
        values_J = _exact_shapley(active_J, bias=bias, h=h, threshold=threshold)
    else:
        values_J, standard_error_J[players] = _sampled_shapley(
            active_J, bias=bias, h=h, threshold=threshold, samples=samples, seed=seed
        )
    # Below a negative threshold f is 0, above it negative at first: it is not monotone, and values have no order.
    credit_J[players] = _project_on_order(values_J, active_J) if threshold >= 0 else values_J
    return credit_J, standard_error_J


def _exact_shapley(c_J: np.ndarray, *, bias: float, h: float, threshold: float) -> np.ndarray:
    """sum over S without j of |S|! (J - 1 - |S|)! / J! (v(S + j) - v(S)), over all coalitions at once.

    Coalition number s holds player j where bit j of s is set, so a reshape puts S and S + j side by side.
    """
    n = len(c_J)
    if n == 0:
        return np.zeros(0)
    sum_S, size_S = np.array([bias]), np.zeros(1, dtype=np.int64)
    for j, contribution in enumerate(c_J):
        sum_S = np.concatenate([sum_S, sum_S + contribution])
        if j < n - 1:  # sizes of the coalitions of the other n - 1 players
            size_S = np.concatenate([size_S, size_S + 1])
    sum_S[-1] = h
    value_S = activation(sum_S, threshold)
    weight_S = np.array([1.0 / (n * math.comb(n - 1, size)) for size in range(n)])[size_S]
    values_J = np.empty(n)
    for j in range(n):
        without_with = value_S.reshape(-1, 2, 2**j)
        values_J[j] = ((without_with[:, 1] - without_with[:, 0]).ravel() * weight_S).sum()
    return values_J


def _sampled_shapley(
    c_J: np.ndarray, *, bias: float, h: float, threshold: float, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over random permutations and their reverses, and its standard error from the spread between such pairs.

    A player late in a permutation is early in its reverse, so the two are negatively correlated. The error is 0
    for a player whose marginal contribution was the same in all draws, though a rare order may give it another.
    """
    rng = np.random.default_rng(seed)
    mean_J, square_J, done = np.zeros_like(c_J), np.zeros_like(c_J), 0
    while done < samples:
        n = min(samples - done, max(1, _CHUNK // len(c_J)))
        forward_PJ, pair_PJ = rng.random((n, len(c_J))).argsort(axis=1), np.zeros((n, len(c_J)))
        for order_PJ in (forward_PJ, forward_PJ[:, ::-1]):
            sum_PJ = bias + c_J[order_PJ].cumsum(axis=1)
            sum_PJ[:, -1] = h
            added_PJ = np.diff(activation(sum_PJ, threshold), axis=1, prepend=activation(bias, threshold))
            marginal_PJ = np.empty_like(added_PJ)  # what each player adds to the activation when it joins in this order
            np.put_along_axis(marginal_PJ, order_PJ, added_PJ, axis=1)
            pair_PJ += marginal_PJ / 2
        # Running mean and sum of squared deviations, merged chunk by chunk.
        chunk_J = pair_PJ.mean(axis=0)
        pair_PJ -= chunk_J
        step_J = chunk_J - mean_J
        square_J += (pair_PJ**2).sum(axis=0) + step_J**2 * (done * n / (done + n))
        mean_J += step_J * (n / (done + n))
        done += n
    return mean_J, np.sqrt(square_J / (samples - 1) / samples)


def _project_on_order(values_J: np.ndarray, c_J: np.ndarray) -> np.ndarray:
    """The nearest values that are ordered like c, equal where c is, and of c's sign (c != 0).

    True Shapley values are all that, because f is monotone; projecting an estimate on a convex set that holds the
    truth cannot increase its squared error. Pooling adjacent violators keeps the sum; every marginal contribution has
    its player's sign already, so the last step removes rounding only. Exact values change by rounding only.
    """
    level_G, group_J, count_G = np.unique(c_J, return_inverse=True, return_counts=True)
    mean_G = np.bincount(group_J, weights=values_J, minlength=len(level_G)) / count_G
    pools: list[tuple[float, int, int]] = []  # mean, players, groups
    for mean, players in zip(mean_G.tolist(), count_G.tolist(), strict=True):
        groups = 1
        while pools and pools[-1][0] >= mean:
            before, more_players, more_groups = pools.pop()
            mean = (before * more_players + mean * players) / (more_players + players)
            players, groups = players + more_players, groups + more_groups
        pools.append((mean, players, groups))
    fitted_G = np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools]) if pools else np.zeros(0)
    return np.where(level_G > 0, np.maximum(fitted_G, 0.0), np.minimum(fitted_G, 0.0))[group_J]
