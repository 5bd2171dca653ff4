"""What files say of crosscoders, beside measurements on the demo."""

from __future__ import annotations

from typing import Any

import pytest

import replacement
from replacement.data.open_tokens import open_source
from replacement.validation.claims import L0, UNEXPLAINED, compare_with_claims
from replacement.validation.fidelity import measure_fidelity
from replacement.validation.slices import stream

N_TOKENS = 1024


@pytest.fixture(scope="module")
def demo() -> Any:
    return replacement.load("demo")


def warnings(demo: Any, facts: dict[str, Any]) -> list[str | None]:
    _, compared = compare_with_claims(demo.language_model, demo.crosscoder, facts, data="demo", n_tokens=N_TOKENS)
    return [quantity.warning() for quantity in compared]


def test_measurements_are_those_of_fidelity(demo: Any) -> None:
    lm, crosscoder = demo.language_model, demo.crosscoder
    n_tokens, (l0, unexplained) = compare_with_claims(lm, crosscoder, {}, data="demo", n_tokens=N_TOKENS)
    source = open_source("demo", lm)
    (batch,) = stream("whole", "", source, lm, n_tokens=N_TOKENS).batches()
    expected = measure_fidelity(lm, crosscoder, batch.tokens_BT, keep_RT=batch.keep_BT)
    assert n_tokens == expected.n_tokens
    assert l0.measured == pytest.approx(expected.l0)
    assert l0.total == pytest.approx(expected.total_l0)
    assert unexplained.measured == pytest.approx(expected.unexplained)
    assert unexplained.total == pytest.approx(expected.mean_unexplained)
    assert (l0.claimed_total, unexplained.claimed_total) == (None, None)


def test_only_claims_that_are_far_off_are_warned_of(demo: Any) -> None:
    _, (l0, unexplained) = compare_with_claims(demo.language_model, demo.crosscoder, {}, data="demo", n_tokens=N_TOKENS)
    assert l0.total is not None
    assert unexplained.total is not None
    per_layer = l0.total / len(l0.places)
    assert warnings(demo, {"k": per_layer * 1.4, UNEXPLAINED: unexplained.total / 1.4}) == [None, None]
    few, _ = warnings(demo, {"l0": per_layer / 1.6, "k": per_layer})
    assert few is not None
    assert few.startswith(f"{L0}, all layers together: measured ")
    _, worse = warnings(demo, {UNEXPLAINED: unexplained.total / 1.6})
    assert worse is not None
    assert worse.startswith(f"{UNEXPLAINED}, mean over sites: measured ")


def test_claims_of_each_layer_are_compared_layer_by_layer(demo: Any) -> None:
    _, (l0, _) = compare_with_claims(demo.language_model, demo.crosscoder, {}, data="demo", n_tokens=N_TOKENS)
    claims = [value or 0.0 for value in l0.measured]
    assert warnings(demo, {"l0": claims}) == [None, None]
    claims[2] *= 2
    warning, _ = warnings(demo, {"l0": claims})
    assert warning is not None
    assert warning.startswith(f"{L0}, layer 2: measured ")


@pytest.mark.parametrize("claim", ["many", None, True, [1.0], [1.0, 2.0, 3.0, "many"]])
def test_claims_that_are_no_numbers_are_left_out(demo: Any, claim: Any) -> None:
    assert warnings(demo, {"l0": claim}) == [None, None]
