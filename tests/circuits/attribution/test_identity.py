"""A sum that does not add up is never returned as a graph, and rounding is never mistaken for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from circuits import trace
from circuits.attribution import expansion
from circuits.attribution.identity import IdentityError, check_identity, identity_tolerance
from circuits.attribution.sources import LayerSources
from replacement import LanguageModel, ReLU, ReplacementModel, Site, Wiring

Fault = Callable[[Any], None]
BOTH_PARTS = pytest.mark.parametrize("attention", [False, True], ids=["linear", "attention"])
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def model_of(lm: Any, *, attention: bool, **options: Any) -> ReplacementModel:
    """A replacement model with random crosscoders."""
    of_attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=of_attention)


def change_vectors(transport: Any, part: int, layer: int, change: Callable[[LayerSources], object]) -> None:
    """Change the source vectors of one layer, which stay in memory."""
    change(transport.sources.written(part, layer))


def forget_an_mlp(transport: Any) -> None:
    """What layer 1 writes is met by no target."""
    change_vectors(transport, 0, 1, lambda written: written.vectors_SD.zero_())


def forget_an_error_term(transport: Any) -> None:
    """The error of layer 1 at position 6."""
    column = transport.sources.columns.error_columns[0] + len(transport.local.frozen.tokens_T) + 6

    def forget(written: LayerSources) -> None:
        written.vectors_SD[written.columns_S == column] = 0

    change_vectors(transport, 0, 1, forget)


def forget_attention(transport: Any) -> None:
    """What attention of layer 1 writes or moves reaches no target."""
    if transport.local.attention is not None:
        change_vectors(transport, 1, 1, lambda written: written.vectors_SD.zero_())
        return
    attention = transport.attentions[1]
    transport.attentions[1] = dataclasses.replace(attention, kernel_HTT=torch.zeros_like(attention.kernel_HTT))


def inject(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Let every transport that is made from now on have a fault."""
    for name in ("Transport", "ResidualTransport"):
        right = getattr(expansion, name)

        class Faulty(right):  # type: ignore[misc, valid-type]
            def __init__(self, local: Any) -> None:
                super().__init__(local)
                fault(self)

        monkeypatch.setattr(expansion, name, Faulty)


@BOTH_PARTS
@PRECISIONS
@pytest.mark.parametrize("fault", [forget_an_mlp, forget_an_error_term, forget_attention])
def test_a_faulty_transport_makes_no_graph(
    language_model: Any, monkeypatch: pytest.MonkeyPatch, fault: Fault, dtype: torch.dtype, attention: bool
) -> None:
    model, tokens = model_of(language_model("gpt2", dtype), attention=attention), tiny.random_tokens()
    right = trace(model, tokens, targets=["w5@6"], coverage=1.0)
    inject(monkeypatch, fault)
    with pytest.raises(IdentityError, match=r'the parts of output "w5" sum to .*, but its value is') as raised:
        trace(model, tokens, targets=["w5@6"], coverage=1.0)
    error = raised.value
    assert error.node == 'output "w5"'
    assert error.expected == pytest.approx(right.nodes.value[-1], rel=1e-5)
    assert error.gap > 100 * error.tolerance
    assert error.tolerance == identity_tolerance(dtype, 3)


@BOTH_PARTS
@pytest.mark.parametrize("part", ["feature", "attention"])
def test_the_error_names_the_feature(
    language_model: Any, monkeypatch: pytest.MonkeyPatch, attention: bool, part: str
) -> None:
    if part == "attention" and not attention:
        pytest.skip("there are no attention features")
    model, tokens = model_of(language_model("gpt2"), attention=attention), tiny.random_tokens()
    local = model.localize(tokens)
    features = local.decompositions[part == "attention"].features.of(2)
    index, position = int(features.index[-1]), int(features.row[-1])
    inject(monkeypatch, forget_an_mlp)
    expected = f"the parts of {'attention ' if part == 'attention' else ''}feature 2/{index} at {position} sum to"
    with pytest.raises(IdentityError, match=expected):
        trace(model, tokens, targets=f"{part}:2/{index}@{position}")


@BOTH_PARTS
def test_nan_makes_no_graph(language_model: Any, monkeypatch: pytest.MonkeyPatch, attention: bool) -> None:
    def spoil(transport: Any) -> None:
        change_vectors(transport, 0, 0, lambda written: written.vectors_SD[-1].fill_(float("nan")))

    inject(monkeypatch, spoil)
    with pytest.raises(IdentityError, match='NaN or infinity at output "w5": the model\'s activations'):
        trace(model_of(language_model("gpt2"), attention=attention), tiny.random_tokens(), targets=["w5"])


@PRECISIONS
def test_tolerances_are_near_what_rounding_makes(dtype: torch.dtype) -> None:
    largest_seen = 0.5 * torch.finfo(dtype).eps * 30 / 0.01
    assert 10 * largest_seen < identity_tolerance(dtype, 30) < 30 * largest_seen
    assert identity_tolerance(dtype, 30) < {torch.float32: 3e-3, torch.float64: 1e-11}[dtype]


@BOTH_PARTS
@PRECISIONS
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("place", [0, 4])
def test_massive_activations_are_not_mistaken_for_a_fault(
    tmp_path: Any, attention: bool, dtype: torch.dtype, skip: bool, place: int
) -> None:
    """One token whose embedding is 1,000 times larger than the others, as in models with attention sinks."""
    import transformers

    folder = tiny.save_model("llama", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 1000
    model.save_pretrained(folder)
    lm, tokens = LanguageModel.from_pretrained(folder, dtype=dtype), tiny.random_tokens(12)
    tokens[place] = 5
    graph = trace(model_of(lm, attention=attention, skip=skip), tokens, coverage=1.0)
    assert graph.identity_error < identity_tolerance(dtype, 3) / 10


@BOTH_PARTS
@PRECISIONS
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "neox"])
def test_small_features_are_not_mistaken_for_a_fault(
    language_model: Any, architecture: str, dtype: torch.dtype, attention: bool
) -> None:
    """ReLU keeps features whose pre-activation is a tiny remainder of large terms; rounding is relative to those."""
    lm = language_model(architecture, dtype)
    model = model_of(lm, attention=attention, activation=ReLU(), n_features=100)
    for seed in range(2):
        graph = trace(model, tiny.random_tokens(4, seed=seed), coverage=1.0)
        assert graph.identity_error < identity_tolerance(dtype, 3) / 4


def test_a_feature_of_cancelling_inner_products_is_not_mistaken_for_a_fault(language_model: Any) -> None:
    """Few sources, each nearly orthogonal to what the feature reads, leave little to measure a gap against."""
    lm = language_model("llama", torch.float64)
    reads = ((Site(0, "resid_post"), Site(1, "resid_mid")), (Site(1, "resid_pre"),), (Site(2, "resid_pre"),))
    writes = ((Site(1, "mlp_out"),), (Site(1, "mlp_out"),), (Site(2, "mlp_out"),))
    wiring = Wiring("cancelling", reads, writes, dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "mlp_out"), 32))
    model = model_of(lm, attention=False, wiring=wiring, activation=ReLU(), n_features=24)
    graph = trace(model, tiny.random_tokens(3), coverage=1.0)
    assert graph.identity_error < identity_tolerance(torch.float64, 3) / 4


@pytest.mark.parametrize("convert", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_gaps_are_relative_to_values_or_to_terms_that_cancel(convert: Any) -> None:
    def check(values: Any, sums: Any, magnitudes: Any) -> float:
        numbers = (convert(x) for x in (values, sums, magnitudes))
        return check_identity(*numbers, dtype=torch.float32, n_layers=1, name="row {}".format)

    assert check([2.0, 0.0], [2.0, 0.0], [2.0, 0.0]) == 0
    assert check([2.0, 1.0], [2.0, 1.00001], [2.0, 1.0]) == pytest.approx(1e-5, rel=0.05)
    assert check([0.01], [0.01001], [100.0]) == pytest.approx(1e-5, rel=0.05)  # of 1 % of 100
    assert check([], [], []) == 0
    with pytest.raises(
        IdentityError, match=r"the parts of row 1 sum to 1\.01, but its value is 1: a relative gap of 1\.0e-02"
    ):
        check([2.0, 1.0], [2.0, 1.01], [2.0, 1.0])
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(IdentityError, match="NaN or infinity at row 0"):
            check([wrong, 1.0], [1.0, 1.0], [1.0, 1.0])
        with pytest.raises(IdentityError, match="NaN or infinity at row 1"):
            check([1.0, 1.0], [1.0, wrong], [1.0, 1.0])


def test_one_number_alone() -> None:
    found = check_identity(1.0, 1.0 + 1e-14, 1.0, dtype=torch.float64, n_layers=30, name=lambda _: "head 2.3")
    assert found == pytest.approx(1e-14, rel=0.1)
    with pytest.raises(IdentityError, match=r"the parts of head 2\.3 sum to 1\.5"):
        check_identity(1.0, 1.5, 2.0, dtype=torch.float64, n_layers=30, name=lambda _: "head 2.3")
