"""Encoding and sparse decoding against dense einsum and autograd in fp64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.crosscoder.wiring import Wiring

ACTIVATIONS = [ReLU(), JumpReLU(), TopK(3), BatchTopK(3)]


def dense_forward(crosscoder: Crosscoder, inputs: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """The formula of the class, written with dense matrices only."""
    wiring, outputs = crosscoder.wiring, {}
    for site in wiring.write_sites:
        outputs[site] = crosscoder.decoder_bias(site).expand(len(next(iter(inputs.values()))), -1)
    for group in range(wiring.n_groups):
        h_BF = crosscoder.b_enc[group]
        for read in wiring.reads[group]:
            h_BF = h_BF + torch.einsum("bd,fd->bf", inputs[read], crosscoder.encoder(group, read))
        match crosscoder.activation:
            case TopK(k):
                a_BF = h_BF.relu() * (h_BF >= h_BF.topk(k, dim=1).values[:, -1:])
            case JumpReLU() | BatchTopK():
                a_BF = h_BF.relu() * (h_BF > crosscoder.threshold[group])
            case _:
                a_BF = h_BF.relu()
        for write in wiring.writes[group]:
            y_BD = torch.einsum("bf,fd->bd", a_BF, crosscoder.decoder(group, write))
            for read in wiring.reads[group] if crosscoder.skip else ():
                y_BD = y_BD + torch.einsum("br,wr->bw", inputs[read], crosscoder.skip_matrix(group, read, write))
            outputs[write] = outputs[write] + y_BD
    return outputs


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_forward_and_gradients_equal_dense_einsum(
    wiring: Wiring, activation: Any, tied: bool, skip: bool, random_crosscoder: Any, random_inputs: Any
) -> None:
    crosscoder = random_crosscoder(wiring, activation=activation, tied=tied, skip=skip)
    inputs = {site: x_BD.requires_grad_() for site, x_BD in random_inputs(wiring).items()}
    # The straight-through threshold gradient has no dense autograd counterpart; test_activation covers it.
    leaves = {name: p for name, p in crosscoder.named_parameters() if name != "threshold"}
    leaves |= {str(site): x_BD for site, x_BD in inputs.items()}
    weights = {s: torch.randn(7, wiring.width(s), dtype=torch.float64) for s in wiring.write_sites}

    def run(outputs: dict[Site, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((outputs[s] * weights[s]).sum() for s in weights), list(leaves.values()))

    sparse, dense = crosscoder(inputs).reconstructions, dense_forward(crosscoder, inputs)
    assert sparse.keys() == dense.keys()
    for site, y_BD in dense.items():
        torch.testing.assert_close(sparse[site], y_BD, rtol=1e-12, atol=1e-12)
    for name, actual, expected in zip(leaves, run(sparse), run(dense), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_decode_gradient_to_activations(tied: bool, shape: ModelShape, random_crosscoder: Any) -> None:
    crosscoder = random_crosscoder(Wiring.strictly_causal(shape), tied=tied)
    features = crosscoder.encode({s: torch.randn(5, 8, dtype=torch.float64) for s in crosscoder.wiring.read_sites})
    features = features.select(torch.arange(len(features)) % 2 == 0)
    acts_S = features.activation.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a_S: tuple(crosscoder.decode(features.replace_activations(a_S)).values()), (acts_S,)
    )


def test_contributions_add_up_group_by_group(wiring: Wiring, random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(wiring, skip=True)
    inputs = random_inputs(wiring)
    whole = crosscoder(inputs).reconstructions
    sums = {site: crosscoder.decoder_bias(site).expand(7, -1) for site in wiring.write_sites}
    for group in range(wiring.n_groups):
        features = crosscoder.encode_group(group, inputs)
        parts = [crosscoder.decode_contribution(features, groups=[group])]
        parts.append(crosscoder.skip_contribution(inputs, groups=[group]))
        for part in parts:
            assert set(part) == set(wiring.writes[group])
            sums = {site: sums[site] + part.get(site, 0) for site in sums}
    for site in whole:
        torch.testing.assert_close(sums[site], whole[site], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_chosen_sites_are_decoded_alone(wiring: Wiring, tied: bool, random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(wiring, tied=tied)
    features = crosscoder.encode(random_inputs(wiring))
    whole = crosscoder.decode_contribution(features)
    for site in wiring.write_sites:
        part = crosscoder.decode_contribution(features, groups=wiring.writers(site), sites=[site])
        assert list(part) == [site]
        torch.testing.assert_close(part[site], whole[site], rtol=1e-12, atol=1e-12)


def test_decoder_vectors_and_norms(wiring: Wiring, random_crosscoder: Any) -> None:
    crosscoder = random_crosscoder(wiring)
    index_S = torch.tensor([3, 3, 15])
    for group, norms_FW in enumerate(crosscoder.decoder_norms()):
        for column, site in enumerate(wiring.writes[group]):
            vectors_SD = crosscoder.decoder_vectors(group, index_S, site)
            assert torch.equal(vectors_SD, crosscoder.decoder(group, site)[index_S])
            torch.testing.assert_close(vectors_SD.square().sum(dim=1).sqrt(), norms_FW[index_S, column])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_folding_a_scale_is_exact(wiring: Wiring, tied: bool, random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(wiring, tied=tied, skip=True, activation=JumpReLU())
    inputs = random_inputs(wiring)
    input_scale = {site: 0.3 + 0.7 * i for i, site in enumerate(wiring.read_sites)}
    output_scale = {site: 1.9 - 0.3 * i for i, site in enumerate(wiring.write_sites)}
    before = crosscoder({site: input_scale[site] * x_BD for site, x_BD in inputs.items()})
    crosscoder.fold_input_scale(input_scale, output_scale)
    after = crosscoder(inputs)
    torch.testing.assert_close(after.features.activation, before.features.activation, rtol=1e-12, atol=1e-12)
    for site, y_BD in before.reconstructions.items():
        torch.testing.assert_close(after.reconstructions[site] * output_scale[site], y_BD, rtol=1e-12, atol=1e-12)


def test_undecomposed_positions_have_no_features(shape: ModelShape, random_crosscoder: Any, random_inputs: Any) -> None:
    wiring = Wiring.strictly_causal(shape)
    inputs = random_inputs(wiring)
    every = random_crosscoder(wiring).encode(inputs)
    crosscoder = random_crosscoder(wiring, undecomposed_positions=2)
    assert torch.equal(crosscoder.encode(inputs).activation, every.activation[every.row >= 2])
    # Two prompts of 4 and 3 tokens in one batch: each has its own first positions.
    positions_B = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    rows = crosscoder.encode(inputs, positions=positions_B).row.unique().tolist()
    assert rows == [2, 3, 6]


def test_batchtopk_measures_its_threshold_while_training(shape: ModelShape, random_inputs: Any) -> None:
    wiring = Wiring.per_layer(shape)
    crosscoder = Crosscoder(wiring, n_features=16, activation=BatchTopK(2), dtype=torch.float64, seed=0)
    with torch.no_grad():  # a look without gradients does not count as training
        crosscoder.train().encode(random_inputs(wiring))
    assert crosscoder.threshold.tolist() == [[0.0]] * 3
    features = crosscoder.encode(random_inputs(wiring))
    expected = [[float(features.of(group).activation.detach().min())] for group in range(3)]
    assert crosscoder.threshold.tolist() == expected
    later = crosscoder.eval().encode(random_inputs(wiring))
    for group in range(3):
        assert bool((later.of(group).activation > expected[group][0]).all())


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        sizes = [(leaf if leaf.layout == torch.strided else leaf.values()).numel() for leaf in tensors]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_no_tensor_is_larger_than_one_groups_pre_activations_or_weights() -> None:
    shape = ModelShape(n_layers=6, d_model=8, n_heads=1, d_head=8)
    wiring, n_rows, n_features = Wiring.strictly_causal(shape), 300, 100
    crosscoder = Crosscoder(wiring, n_features=n_features, activation=TopK(2), seed=0)
    inputs = {site: torch.randn(n_rows, 8) for site in wiring.read_sites}
    with LargestTensor() as largest:
        outputs = crosscoder(inputs).reconstructions
        torch.stack([y_BD.square().sum() for y_BD in outputs.values()]).sum().backward()
    bound = max(
        n_rows * n_features, n_rows * 6 * 8, n_features * 6 * 8
    )  # pre-activations, outputs, one group's decoder
    assert largest.numel <= bound
    assert bound < n_rows * 6 * n_features / 5  # dense activations [B, G, F] would not pass


def test_no_features_decode_to_the_biases(shape: ModelShape, random_crosscoder: Any) -> None:
    crosscoder = random_crosscoder(Wiring.strictly_causal(shape))
    none = Features.empty(n_rows=4, n_groups=3, n_features=16, dtype=torch.float64)
    for site, y_BD in crosscoder.decode(none).items():
        assert torch.equal(y_BD, crosscoder.decoder_bias(site).expand(4, -1))


def test_seed_decides_the_initial_weights(shape: ModelShape) -> None:
    wiring = Wiring.per_layer(shape)
    first, same, other = (Crosscoder(wiring, n_features=16, seed=seed).W_enc[0] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3), JumpReLU(threshold=0.3)], ids=lambda a: a.name)
def test_parts_begin_as_they_do_in_the_whole(activation: Activation, shape: ModelShape) -> None:
    wiring = Wiring.acausal(shape)
    single = Crosscoder(wiring, n_features=24, activation=activation, skip=True, seed=5)
    parts = [Crosscoder.like(single, n_features=8) for _ in range(3)]
    for place, part in enumerate(parts):
        part.initialise(5, part=place, n_parts=3)
    for name, value in single.state_dict().items():
        values = [part.state_dict()[name] for part in parts]
        if values[0].shape == value.shape:
            assert all(torch.equal(own, value) for own in values), name
        else:
            assert torch.equal(torch.cat(values, dim=1 if name == "threshold" else 0), value), name
    assert bool(single.W_enc[0].any())


def test_one_like_another_shares_everything_but_memory(shape: ModelShape) -> None:
    wiring = Wiring.strictly_causal(shape)
    options: dict[str, Any] = {"tied": True, "skip": True, "undecomposed_positions": 2, "dtype": torch.float64}
    first = Crosscoder(wiring, n_features=16, model_name="m", model_fingerprint="f", seed=0, **options).eval()
    state = torch.get_rng_state()
    second = Crosscoder.like(first, activation=BatchTopK(2))
    assert torch.equal(torch.get_rng_state(), state)  # no weights are drawn
    for name in ("wiring", "n_features", "tied", "skip", "undecomposed_positions", "dtype", "model_name", "training"):
        assert getattr(second, name) == getattr(first, name), name
    assert (second.activation, second.model_fingerprint) == (BatchTopK(2), "f")
    with torch.no_grad():
        for name, value in second.state_dict().items():
            value.fill_(7)
            assert name == "threshold" or not bool((first.state_dict()[name] == 7).any())
    with pytest.raises(ValueError, match="16"):
        Crosscoder.like(first, n_features=8)


def test_a_copy_for_inference_shares_what_it_can_and_leaves_the_original_alone(
    wiring: Wiring, random_crosscoder: Any, random_inputs: Any
) -> None:
    original = random_crosscoder(wiring, activation=BatchTopK(3), skip=True, model_name="m").train()
    original.b_enc[0].requires_grad_(False)
    before = [(name, value.dtype, value.requires_grad, value.data_ptr()) for name, value in original.named_parameters()]
    copied, rounded = original.to_inference(), original.to_inference(dtype=torch.float32)
    assert original.training
    assert before == [(n, v.dtype, v.requires_grad, v.data_ptr()) for n, v in original.named_parameters()]
    for made, dtype, shared in ((copied, torch.float64, True), (rounded, torch.float32, False)):
        assert (made.training, made.dtype, made.model_name) == (False, dtype, "m")
        assert not any(value.requires_grad for value in made.parameters())
        for name, value in original.state_dict().items():
            assert torch.equal(made.state_dict()[name], value.to(dtype))
            assert (made.state_dict()[name].data_ptr() == value.data_ptr()) == shared
    inputs = random_inputs(wiring)
    expected = original.eval()(inputs).reconstructions
    assert all(torch.equal(y_BD, expected[site]) for site, y_BD in copied(inputs).reconstructions.items())


CLT_INPUTS = {Site(layer, "resid_mid"): torch.zeros(2, 8) for layer in range(3)}
OUTSIDE = Site(0, "mlp_out")
MISTAKES: list[tuple[Callable[[Crosscoder], object], str]] = [
    (
        lambda c: c.encode({Site(0, "resid_mid"): torch.zeros(2, 8)}),
        "group 1 reads resid_mid.1, but the inputs hold resid_mid.0",
    ),
    (
        lambda c: c.encode({**CLT_INPUTS, Site(1, "resid_mid"): torch.zeros(2, 9)}),
        "the input at resid_mid.1 must have shape [rows, 8], got [2, 9]",
    ),
    (lambda c: c.encoder(1, Site(0, "resid_mid")), "group 1 does not read resid_mid.0; it does read resid_mid.1"),
    (lambda c: c.decoder(2, OUTSIDE), "group 2 does not write mlp_out.0; it does write mlp_out.2"),
    (lambda c: c.skip_matrix(0, Site(0, "resid_mid"), OUTSIDE), "this crosscoder has no skip connection"),
    (
        lambda c: c.decode(Features.empty(n_rows=1, n_groups=3, n_features=9)),
        "has 3 groups of 16 features; the features given come from 3 groups of 9",
    ),
    (
        lambda c: c.decode_contribution(c.encode(CLT_INPUTS), groups=[1, 2], sites=[OUTSIDE]),
        "the groups (1, 2) do not write mlp_out.0",
    ),
    (lambda c: c.fold_input_scale({OUTSIDE: 2.0}), "expected scales for resid_mid.0, resid_mid.1"),
    (lambda c: c.fold_input_scale({Site(0, "resid_mid"): 0.0}), "the scale for resid_mid.0 must be above 0, got 0.0"),
    (lambda c: Crosscoder(c.wiring, n_features=0), "n_features must be 1 or more, got 0"),
    (
        lambda c: Crosscoder(c.wiring, n_features=4, activation=TopK(5)),
        "topk keeps k=5 features, but a group has only 4",
    ),
    (
        lambda c: Crosscoder(c.wiring, n_features=16, undecomposed_positions=-1),
        "undecomposed_positions must be 0 or more, got -1",
    ),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(mistake: Callable[[Crosscoder], object], message: str, shape: ModelShape) -> None:
    crosscoder = Crosscoder(Wiring.strictly_causal(shape), n_features=16, activation=TopK(3), seed=0)
    with pytest.raises(ValueError, match=re.escape(message)):
        mistake(crosscoder)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_check_finite_names_the_tensor(poison: float, shape: ModelShape, random_crosscoder: Any) -> None:
    crosscoder = random_crosscoder(Wiring.per_layer(shape))
    crosscoder.check_finite()
    with torch.no_grad():
        crosscoder.W_dec[1][3] = poison
    with pytest.raises(ValueError, match=r"the tensor W_dec\.1 holds NaN or infinite values"):
        crosscoder.check_finite()
