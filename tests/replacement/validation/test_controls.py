"""Controls and compute-equivalent: greedy codes by hand, models of random weights, curves with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from replacement import LanguageModel, ReplacementModel, Site, TopK, Wiring
from replacement.validation import compute_equivalent, read_curve
from replacement.validation.controls import (
    ThresholdedNeurons,
    keep_largest,
    matched_counts,
    measure_controls,
    random_weights,
)
from replacement.validation.measure import measure
from replacement.validation.protocols import BatchRun
from replacement.validation.random_dictionaries import RIDGE, OracleDictionary, RandomEncoder, matching_pursuit
from replacement.validation.slices import Batch, Slice


def tokens() -> torch.Tensor:
    """Random prompts."""
    return torch.stack([tiny.random_tokens(length=8, seed=seed) for seed in range(4)])


def part() -> Slice:
    """The prompts as a slice."""
    return Slice(name="rows", about="", batches=lambda: [Batch(tokens())], n_tokens=32)


def test_matching_pursuit_takes_the_largest_products_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    y_ND = torch.randn(200, 6, generator=generator)
    w_FD = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    for y_D, code_D in zip(y_ND, matching_pursuit(y_ND, w_FD, 3), strict=True):
        left_D = y_D.clone()
        for _ in range(3):
            product_F = w_FD @ left_D
            left_D -= product_F.max().clamp(min=0) * w_FD[product_F.argmax()]
        torch.testing.assert_close(code_D, y_D - left_D, atol=1e-5, rtol=1e-4)


def test_an_orthonormal_dictionary_is_exact_where_coefficients_are_positive() -> None:
    y_ND = torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(matching_pursuit(y_ND, torch.eye(5), 5), y_ND)


def test_the_largest_contributions_are_kept() -> None:
    acts_PM = torch.tensor([[1.0, -3.0, 2.0], [0.1, 0.2, 0.3]])
    kept_PM = keep_largest(acts_PM, torch.tensor([4.0, 1.0, 1.0]), 1)
    assert kept_PM.tolist() == [[1.0, 0.0, 0.0], [pytest.approx(0.1), 0.0, 0.0]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "native"])
def test_all_neurons_are_the_model_and_none_but_one_is_not(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    crosscoder = tiny.crosscoder_for(lm, wiring=Wiring.per_layer(lm, read="mlp_in"))
    run = BatchRun(lm, [crosscoder], Batch(tokens()))
    sites = crosscoder.wiring.write_sites
    everything = ThresholdedNeurons(lm, dict.fromkeys(sites, lm.parts.bridge.blocks[0].mlp.W_out.shape[0]))
    torch.testing.assert_close(everything.logits(run, {}), run.logits_BTV)
    for site, (target, output) in everything.stand_ins(run).items():
        torch.testing.assert_close(target, run.clean[site])
        torch.testing.assert_close(output, target)
    one = ThresholdedNeurons(lm, dict.fromkeys(sites, 1))
    target, output = one.stand_ins(run)[sites[0]]
    directions = torch.nn.functional.normalize(one.weights[0], dim=1)
    for y_D in output if one.biases[0] is None else output - one.biases[0]:
        assert float((directions @ y_D).abs().max()) == pytest.approx(float(y_D.norm()), rel=1e-6)
    assert not torch.allclose(one.logits(run, {}), run.logits_BTV)


def test_the_oracle_replaces_only_what_it_may(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, undecomposed_positions=8)
    means = {site: torch.zeros(32, dtype=torch.float64) for site in crosscoder.wiring.write_sites}
    control = OracleDictionary(dict.fromkeys(means, 2), means, 16)
    crosscoder.undecomposed_positions = 7
    run = BatchRun(lm, [crosscoder], Batch(tokens()))
    logits = control.logits(run, {})
    torch.testing.assert_close(logits[:, :7], run.logits_BTV[:, :7])
    assert not torch.allclose(logits[:, 7], run.logits_BTV[:, 7])


@pytest.mark.parametrize(
    ("wiring", "read"), [("strictly_causal", "mlp_in"), ("per_layer", "mlp_in"), ("acausal", None)]
)
def test_the_random_encoder_reads_what_the_crosscoder_reads(language_model: Any, wiring: str, read: str | None) -> None:
    """Its codes are of the inputs alone, its decoder is the ridge regression on them, and the mask is respected."""
    lm = language_model("gpt2", torch.float32)
    options = {} if read is None else {"read": read}
    crosscoder = tiny.crosscoder_for(lm, wiring=getattr(Wiring, wiring)(lm, **options))
    run = BatchRun(lm, [crosscoder], Batch(tokens()))
    site, k = crosscoder.wiring.write_sites[1], 3
    control = RandomEncoder(lm, crosscoder, dict.fromkeys(crosscoder.wiring.write_sites, k), [Batch(tokens())])
    reads = crosscoder.wiring.reads[min(1, crosscoder.n_groups - 1)]

    layer = control.layers[site]
    assert layer.reads == tuple(reads)
    x_RC = torch.cat([run.clean[read] for read in reads], -1)
    codes_RF = (x_RC - x_RC.mean(0)) @ layer.encoder_FC.T
    kth_R1 = codes_RF.topk(k, dim=1).values[:, -1:]
    codes_RF = torch.where(codes_RF >= kth_R1, codes_RF, 0.0).clamp(min=0)
    y_RD, squares = run.clean[site], codes_RF.square().sum(0).mean()
    ridge_FF = codes_RF.T @ codes_RF + RIDGE * squares * torch.eye(codes_RF.shape[1])
    expected_RD = codes_RF @ torch.linalg.solve(ridge_FF, codes_RF.T @ (y_RD - y_RD.mean(0))) + y_RD.mean(0)
    target, output = control.stand_ins(run)[site]
    torch.testing.assert_close(target, y_RD)
    torch.testing.assert_close(output, expected_RD, atol=1e-4, rtol=1e-3)

    if site not in reads:
        run.clean[site] = run.clean[site] + 1.0  # what it replaces is not seen
        torch.testing.assert_close(control.stand_ins(run)[site][1], output)
    assert not torch.allclose(control.logits(run, {}), run.logits_BTV)
    keep_BT = torch.zeros(run.tokens_BT.shape, dtype=torch.bool)
    nothing = BatchRun(lm, [crosscoder], Batch(tokens(), keep_BT))
    torch.testing.assert_close(control.logits(nothing, {}), nothing.logits_BTV)


def test_a_random_encoder_needs_rows(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float32)
    crosscoder = tiny.crosscoder_for(lm)
    with pytest.raises(ValueError, match="random encoder: expected rows to fit its decoder on, given none"):
        RandomEncoder(lm, crosscoder, dict.fromkeys(crosscoder.wiring.write_sites, 2), [])


def test_the_rest_of_a_slice_begins_where_its_start_ends(language_model: Any) -> None:
    rows_RT = torch.arange(40).view(10, 4)
    keep_RT = rows_RT % 3 > 0
    whole = Slice(
        name="rows", about="", n_tokens=40,
        batches=lambda: [Batch(rows_RT[i : i + 4], keep_RT[i : i + 4]) for i in (0, 4, 8)],
    )  # fmt: skip
    start = Slice(name="rows", about="", n_tokens=20, batches=lambda: [Batch(rows_RT[:5])])
    rest = whole.after(start)
    assert rest.n_tokens == 20
    assert torch.cat([batch.tokens_BT for batch in rest.batches()]).tolist() == rows_RT[5:].tolist()
    assert torch.cat([batch.keep_BT for batch in rest.batches()]).tolist() == keep_RT[5:].tolist()


def test_random_weights_keep_shape_and_scale_and_leave_the_original(language_model: Any) -> None:
    lm = language_model("llama", torch.float32)
    before = {name: value.clone() for name, value in lm.parts.bridge.named_parameters()}
    other = random_weights(lm)
    assert other.shape == lm.shape
    assert other.fingerprint != lm.fingerprint
    after = dict(other.parts.bridge.named_parameters())
    for name, value in lm.parts.bridge.named_parameters():
        assert torch.equal(value, before[name])
        if value.ndim > 1:
            assert not torch.allclose(after[name], value)
            assert float(after[name].std()) == pytest.approx(float(value.std()), rel=0.1)
        else:
            assert torch.equal(after[name], value)


def test_patterns_with_gradients_that_a_model_keeps_are_not_copied(model_folder: Any) -> None:
    lm, tokens_T = LanguageModel.from_pretrained(model_folder("gpt2")), tiny.random_tokens(5)
    bridge = lm.parts.bridge
    bridge.requires_grad_(True)
    bridge(tokens_T[None])
    kept = [module._pattern for module in bridge.modules() if getattr(module, "_pattern", None) is not None]
    assert len(kept) == lm.shape.n_layers
    assert all(pattern.grad_fn is not None for pattern in kept)
    assert random_weights(lm)(tokens_T).isfinite().all()
    assert [module._pattern for module in bridge.modules() if hasattr(module, "_pattern")] == kept


def test_controls_are_matched_and_measured_on_the_same_tokens(language_model: Any) -> None:
    lm = language_model("llama", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, wiring=Wiring.strictly_causal(lm, read="mlp_in"), activation=TopK((7, 2, 4)))
    model = ReplacementModel(lm, crosscoder)
    means = measure(lm, [crosscoder], part().batches(), []).means
    rows = {row["name"]: row for row in measure_controls(lm, model.crosscoder, part(), means, fitted_on=part())}
    names = ["this crosscoder", "thresholded neurons", "random encoder", "oracle dictionary", "random weights"]
    assert list(rows) == names
    assert [name for name in names if rows[name]["is_oracle"]] == ["oracle dictionary"]
    assert all(row["n_tokens"] == 32 for row in rows.values())
    assert rows["random encoder"]["l0"] == rows["thresholded neurons"]["l0"] == 13
    assert rows["this crosscoder"]["l0"] == pytest.approx(13, abs=1)
    assert rows["random weights"]["cross_entropy_increase"] is None
    assert rows["oracle dictionary"]["unexplained"] < 1
    assert rows["random encoder"]["unexplained"] < 1


def test_matched_counts_go_to_the_layer_of_the_group(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    clt = tiny.crosscoder_for(lm)
    assert matched_counts(clt, [3.4, 0.2, 1.6]) == {Site(0, "mlp_out"): 3, Site(1, "mlp_out"): 1, Site(2, "mlp_out"): 2}


def test_compute_is_interpolated_in_its_logarithm() -> None:
    curve = [(10.0, 4.0), (100.0, 3.0), (1000.0, 1.0)]
    half = compute_equivalent(curve, 1.0)
    assert half["fraction"] == pytest.approx(1000**0.5 * 10 / 1000)
    assert half["target_loss"] == 2.0
    assert compute_equivalent(curve, 0.0)["fraction"] == pytest.approx(1)
    assert compute_equivalent(curve, -0.5)["fraction"] == pytest.approx(1)
    assert compute_equivalent(curve, 2.0)["compute"] == pytest.approx(100)
    below = compute_equivalent(curve, 5.0)
    assert below["below_curve"]
    assert below["fraction"] is None


def test_a_noisy_curve_counts_where_it_first_is_as_good() -> None:
    curve = [(1.0, 5.0), (10.0, 1.5), (100.0, 2.0), (1000.0, 1.0)]
    assert compute_equivalent(curve, 0.5)["compute"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2]", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (f"[[{'9' * 5000}, 1], [1, 2]]", "is not JSON"),
        (f"[[1, 1], [{'9' * 400}, 2]]", "point 1: expected"),
        ("[[1, true], [1, 2]]", "point 0: expected"),
        ('"a curve"', "at least two"),
        ("[[1, 2]]", "at least two"),
        ('{"points": []}', "at least two"),
        ("[[1, 2], [3]]", "point 1: expected"),
        ("[[1, 2], [0, 3]]", "point 1: expected"),
        ('[[1, "2"], [1, 3]]', "point 0: expected"),
        ("[[1, NaN], [1, 3]]", "point 0: expected"),
    ],
)
def test_bad_curves_are_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_curve(file)


def test_curves_are_read_in_order(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_curve(tmp_path / "none.json")
    file = tmp_path / "curve.json"
    file.write_text(json.dumps({"curve": [[4, 1.0], [2, 3]], "unit": "tokens"}), encoding="utf-8")
    assert read_curve(file) == [(2.0, 3.0), (4.0, 1.0)]
