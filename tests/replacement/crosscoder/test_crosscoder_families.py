"""All families are one class: special cases of one another, and features by other names, give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.crosscoder.wiring import Wiring


def assert_same_outputs(first: dict[Site, Tensor], second: dict[Site, Tensor]) -> None:
    assert first.keys() == second.keys()
    for site, y_BD in first.items():
        torch.testing.assert_close(y_BD, second[site], rtol=1e-12, atol=1e-12)


def test_topk_of_all_features_equals_relu(wiring: Wiring, random_crosscoder: Any, random_inputs: Any) -> None:
    topk, relu = (random_crosscoder(wiring, activation=activation) for activation in (TopK(16), ReLU()))
    inputs = random_inputs(wiring)
    assert_same_outputs(topk(inputs).reconstructions, relu(inputs).reconstructions)


def test_per_layer_equals_separate_transcoders(shape: ModelShape, random_crosscoder: Any, random_inputs: Any) -> None:
    plt = random_crosscoder(Wiring.per_layer(shape), skip=True)
    inputs = random_inputs(plt.wiring)
    separate = {}
    for layer in range(shape.n_layers):
        transcoder = random_crosscoder(Wiring.transcoder(shape, layer=layer), skip=True)
        parts = [(name, getattr(plt, name)[layer]) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")]
        transcoder.load_state_dict({f"{name}.0": value for name, value in parts})
        separate |= transcoder(inputs).reconstructions
    assert_same_outputs(plt(inputs).reconstructions, separate)


def test_strictly_causal_without_cross_layer_decoders_is_per_layer(
    shape: ModelShape, random_crosscoder: Any, random_inputs: Any
) -> None:
    clt, plt = (random_crosscoder(wiring(shape)) for wiring in (Wiring.strictly_causal, Wiring.per_layer))
    with torch.no_grad():
        for group in range(shape.n_layers):
            clt.W_dec[group][:, 1:] = 0
            plt.W_dec[group].copy_(clt.W_dec[group][:, :1])
            for name in ("W_enc", "b_enc", "b_dec"):
                getattr(plt, name)[group].copy_(getattr(clt, name)[group])
    inputs = random_inputs(clt.wiring)
    assert_same_outputs(clt(inputs).reconstructions, plt(inputs).reconstructions)


def test_tied_equals_untied_with_copied_weights(wiring: Wiring, random_crosscoder: Any, random_inputs: Any) -> None:
    tied, untied = (random_crosscoder(wiring, tied=tied) for tied in (True, False))
    with torch.no_grad():
        for name, value in untied.state_dict().items():
            if not name.startswith("W_dec"):
                value.copy_(tied.state_dict()[name])
        for group, sites in enumerate(wiring.writes):
            for site in sites:
                untied.decoder(group, site).copy_(tied.decoder(group, site))
    inputs = random_inputs(wiring)
    assert_same_outputs(tied(inputs).reconstructions, untied(inputs).reconstructions)


def test_tied_strictly_causal_decodes_the_sum_of_activations(
    shape: ModelShape, random_crosscoder: Any, random_inputs: Any
) -> None:
    """Tied per target: layer l's output is one decoder applied to the summed activations of the groups up to l."""
    clt = random_crosscoder(Wiring.strictly_causal(shape), tied=True)
    outputs, features = clt(random_inputs(clt.wiring))
    for layer, site in enumerate(clt.wiring.write_sites):
        total_BF = torch.stack([features.dense(group) for group in range(layer + 1)]).sum(dim=0)
        torch.testing.assert_close(outputs[site], total_BF @ clt.W_dec[layer] + clt.b_dec[layer])


def test_weakly_causal_top_group_is_an_autoencoder(
    shape: ModelShape, random_crosscoder: Any, random_inputs: Any
) -> None:
    crosscoder = random_crosscoder(Wiring.weakly_causal(shape))
    sae = random_crosscoder(Wiring.autoencoder(shape, layers=2))
    parts = [(name, getattr(crosscoder, name)[2]) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    sae.load_state_dict({f"{name}.0": value for name, value in parts})
    inputs = random_inputs(crosscoder.wiring)
    features = crosscoder.encode(inputs)
    top = crosscoder.decode_contribution(features, groups=[2])
    assert_same_outputs(sae.decode_contribution(sae.encode(inputs)), top)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), TopK(3), BatchTopK(3)], ids=lambda a: a.name)
def test_the_order_of_features_does_not_matter(
    wiring: Wiring, activation: Any, tied: bool, random_crosscoder: Any, random_inputs: Any
) -> None:
    """Tied groups share one order, because their features write through one decoder."""
    first, second = (random_crosscoder(wiring, activation=activation, tied=tied, skip=True) for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(16, generator=generator) for _ in range(wiring.n_groups)]
    orders = [orders[0]] * wiring.n_groups if tied else orders
    with torch.no_grad():
        for group, order_F in enumerate(orders):
            for encoder_FD in second.encoders(group):
                encoder_FD.copy_(encoder_FD[order_F])
            second.b_enc[group].copy_(second.b_enc[group][order_F])
            if isinstance(activation, JumpReLU):
                second.threshold[group] = second.threshold[group, order_F]
        by_block = [orders[0]] * len(second.W_dec) if tied else [orders[group] for group, _ in wiring.write_blocks]
        for decoder, order_F in zip(second.W_dec, by_block, strict=True):
            decoder.copy_(decoder[order_F])
    inputs = random_inputs(wiring)
    expected, found = first(inputs), second(inputs)
    for group, order_F in enumerate(orders):
        expected_BF = expected.features.dense(group)[:, order_F]
        torch.testing.assert_close(found.features.dense(group), expected_BF, rtol=1e-12, atol=1e-12)
    assert_same_outputs(found.reconstructions, expected.reconstructions)


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), BatchTopK(3)], ids=lambda a: a.name)
def test_a_feature_split_into_two_equal_halves_writes_the_same(
    wiring: Wiring, activation: Any, random_crosscoder: Any, random_inputs: Any
) -> None:
    """Every feature is given a twin: both fire as it did, and each writes half of what it wrote."""
    whole = random_crosscoder(wiring, activation=activation, skip=True)
    halves = Crosscoder.like(whole, n_features=32)
    tensors = {}
    for name, value in whole.state_dict().items():
        kind = name.split(".")[0]
        if kind in ("W_enc", "b_enc"):
            value = torch.cat([value, value])
        elif kind == "W_dec":
            value = torch.cat([value, value]) / 2
        elif isinstance(activation, JumpReLU) and kind == "threshold":
            value = torch.cat([value, value], dim=1)
        tensors[name] = value
    halves.load_state_dict(tensors)
    inputs = random_inputs(wiring)
    expected, found = whole(inputs), halves(inputs)
    assert len(found.features) == 2 * len(expected.features) > 0
    assert_same_outputs(found.reconstructions, expected.reconstructions)


def test_a_transcoder_computes_the_textbook_formula() -> None:
    """One hand-made feature: fires on the first coordinate above 1, writes twice its activation to the second."""
    transcoder = Crosscoder(Wiring.transcoder(ModelShape(1, 2, 1, 2), layer=0), n_features=1, activation=ReLU(), seed=0)
    transcoder.load_state_dict(
        {
            "W_enc.0": torch.tensor([[1.0, 0.0]]),
            "b_enc.0": torch.tensor([-1.0]),
            "W_dec.0": torch.tensor([[[0.0, 2.0]]]),
            "b_dec.0": torch.tensor([0.5, 0.0]),
        }
    )
    outputs, features = transcoder({Site(0, "resid_mid"): torch.tensor([[3.0, 9.0], [1.0, 9.0]])})
    assert outputs[Site(0, "mlp_out")].tolist() == [[0.5, 4.0], [0.5, 0.0]]
    assert (features.row.tolist(), features.index.tolist(), features.activation.tolist()) == ([0], [0], [2.0])
