"""The verdict follows from the numbers, and tables and plots call a layer by one name."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replacement.validation.tables import layer_name, protocol_name
from replacement.validation.verdict import headline, verdicts


def facts() -> dict[str, Any]:
    """The parts of a validation that a verdict reads; every claim is kept."""
    kl = {"mean": 0.01, "p99": 0.1, "max": 1.0}
    output = {"kl": kl, "agreement": {"all": 0.95, "right_but_unsure": 0.92}}
    return {
        "model": {"dtype": "float32"},
        "protocols": {
            "clean": {"kl": {"mean": 0.005}},
            "propagated": output,
            "errors kept": {"kl": {"max": 1e-9}},
        },
        "reconstruction": {
            "unexplained": 0.01,
            "crosscoders": [{"dead": 10, "groups": [{"n_features": 50}, {"n_features": 50}]}],
        },
        "slices": [
            {"name": "whole", "kl": kl},
            {"name": "code", "kl": {"mean": 0.09}},
            {"name": "poems", "kl": {"mean": 0.02}},
        ],
        "controls": [
            {"kl": 0.01, "is_oracle": False},
            {"kl": 4.0, "is_oracle": False},
            {"kl": 0.5, "is_oracle": False},
            {"kl": 0.001, "is_oracle": True},  # sees the output that it replaces: no yardstick
        ],
    }


def put(given: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(given)
    *way, last = place
    inner: Any = changed
    for key in way:
        inner = inner[key]
    inner[last] = value
    return changed


KL = ("protocols", "propagated", "kl")
CLAIMS = [
    ("it predicts what the model predicts", (*KL, "mean"), 0.05, 0.0501),
    ("its first choice is the model's", ("protocols", "propagated", "agreement", "all"), 0.9, 0.899),
    ("also where the model is unsure", ("protocols", "propagated", "agreement", "right_but_unsure"), 0.9, 0.899),
    ("few tokens are far off", (*KL, "p99"), 0.5, 0.51),
    ("errors do not build up from layer to layer", (*KL, "mean"), 0.055, 0.056),
    ("layers are reconstructed", ("reconstruction", "unexplained"), 0.05, 0.051),
    ("most features fire on this text, so that they are tested", ("reconstruction", "crosscoders", 0, "dead"), 25, 26),
    ("text of other kinds is predicted as well", ("slices", 2, "kl", "mean"), 0.1, 0.11),
    ("no arbitrary dictionary does as well", ("controls", 2, "kl"), 0.02, 0.0199),
    ("with the errors added back it is the model", ("protocols", "errors kept", "kl", "max"), 1e-6, 1.1e-6),
]


def test_every_claim_is_kept_by_good_numbers() -> None:
    found = verdicts(facts())
    assert [verdict.claim for verdict in found] == [claim for claim, *_ in CLAIMS]
    assert {verdict.word for verdict in found} == {"yes"}
    assert headline(found) == "10 of 10 claims may be trusted."


@pytest.mark.parametrize(("claim", "place", "good", "bad"), CLAIMS)
def test_each_number_decides_its_claim(claim: str, place: tuple[Any, ...], good: float, bad: float) -> None:
    def word(value: float) -> str:
        (verdict,) = [verdict for verdict in verdicts(put(facts(), place, value)) if verdict.claim == claim]
        return verdict.word

    assert (word(good), word(bad)) == ("yes", "no")
    assert claim in headline(verdicts(put(facts(), place, bad)))


def test_the_measured_number_and_its_rule_are_told() -> None:
    told = {verdict.claim: (verdict.measured, verdict.rule) for verdict in verdicts(facts())}
    assert told["it predicts what the model predicts"] == ("mean KL 0.01 nats", "at most 0.05 nats")
    assert told["text of other kinds is predicted as well"][0] == "worst slice (code): KL 0.09 nats"
    dead = told["most features fire on this text, so that they are tested"]
    assert dead == ("never fire: 10 of 100, 10.0 %", "at most 25 %")


def test_what_is_undefined_is_not_trusted() -> None:
    found = verdicts(put(facts(), (*KL, "mean"), None))
    assert found[0].word == "not measured"
    assert "it predicts what the model predicts" in headline(found)
    without = {**facts(), "controls": [], "slices": facts()["slices"][:1]}
    assert len(verdicts(without)) == 8, "claims about what was not measured are not made"


def test_16_bit_numbers_are_not_blamed_for_rounding() -> None:
    coarse = put(put(facts(), ("model", "dtype"), "bfloat16"), ("protocols", "errors kept", "kl", "max"), 5e-3)
    assert verdicts(coarse)[-1].word == "yes"


@given(st.integers(0, 40))
def test_layers_have_one_name(layer: int) -> None:
    assert layer_name(f"mlp_out.{layer}") == f"layer {layer}"
    assert layer_name(f"attn_out.{layer}") == f"attention {layer}"
    assert protocol_name(f"single mlp_out.{layer}") == f"layer {layer} alone"
    assert protocol_name(f"first {layer + 1} layers") == f"layers up to {layer}"
