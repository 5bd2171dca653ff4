"""A joint crosscoder is the sum of its parts, and the parts are views of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from replacement.crosscoder import checkpoint
from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.joint import join, split
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import BatchTopK, JointTopK, TopK
from replacement.crosscoder.wiring import Wiring

K_PER_GROUP = TopK((4, 2, 1, 5, 3, 2))
ACTIVATIONS = (K_PER_GROUP, BatchTopK((4, 2, 1, 5, 3, 2)), JumpReLU(), ReLU(affine=True), TopK(3, scored=True))


def test_a_joint_wiring_has_the_groups_of_both(shape: ModelShape) -> None:
    wiring, attention = Wiring.joint(shape, read="mlp_in"), Wiring.attention(shape)
    mlps = Wiring.strictly_causal(shape, read="mlp_in")
    assert wiring.reads == mlps.reads + attention.reads
    assert wiring.writes == mlps.writes + attention.writes
    assert wiring.is_causal
    assert Wiring.from_dict(wiring.to_dict()) == wiring
    assert wiring.layers == (0, 1, 2)
    parallel = ModelShape(n_layers=2, d_model=4, n_heads=1, d_head=4, parallel=True)
    assert Wiring.joint(parallel).reads[1] == (Site(1, "resid_pre"),)
    with pytest.raises(ValueError, match="this joint crosscoder spans 2 layers, the model has 3"):
        Wiring.joint(ModelShape(n_layers=2, d_model=8, n_heads=2, d_head=5)).check_fits(shape)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"skip": True}], ids=["untied", "tied", "skip"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_the_parts_compute_what_the_whole_does(
    activation: Any, options: dict[str, bool], shape: ModelShape, random_crosscoder: Any, random_inputs: Any
) -> None:
    joint = random_crosscoder(Wiring.joint(shape), activation=activation, **options)
    inputs = random_inputs(joint.wiring)
    whole = joint(inputs)
    parts = split(joint)
    assert [part.wiring for part in parts] == [Wiring.strictly_causal(shape), Wiring.attention(shape)]
    outputs, first = {}, 0
    for part in parts:
        made = part({site: inputs[site] for site in part.wiring.read_sites})
        outputs |= made.reconstructions
        for group in range(part.n_groups):
            assert torch.equal(made.features.dense(group), whole.features.dense(first + group))
        first += part.n_groups
    assert outputs.keys() == whole.reconstructions.keys()
    assert all(torch.equal(outputs[site], y_BD) for site, y_BD in whole.reconstructions.items())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_the_parts_are_views(activation: Any, shape: ModelShape, random_crosscoder: Any) -> None:
    joint = random_crosscoder(Wiring.joint(shape), activation=activation)
    parts = split(joint)
    memory = {value.untyped_storage().data_ptr() for value in joint.state_dict().values()}
    shared = [value for part in parts for value in part.state_dict().values()]
    assert {value.untyped_storage().data_ptr() for value in shared} == memory
    assert sum(value.numel() for value in shared) == sum(value.numel() for value in joint.state_dict().values())
    before = [part.fingerprint for part in parts]
    with torch.no_grad():
        joint.decoder(4, Site(2, "attn_out")).add_(1)
    after = [part.fingerprint for part in parts]
    assert before[0] == after[0]
    assert before[1] != after[1]
    joint.train()
    assert all(part.training for part in split(joint))
    assert not any(p.requires_grad for part in split(joint.to_inference()) for p in part.parameters())


@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "in its file"])
def test_parts_have_checkpoints_of_their_own(
    lazy: bool, shape: ModelShape, random_crosscoder: Any, random_inputs: Any, tmp_path: Path
) -> None:
    joint = random_crosscoder(Wiring.joint(shape), activation=K_PER_GROUP, dtype=torch.float32, model_name="m")
    checkpoint.save(joint, tmp_path / "joint")
    loaded = checkpoint.load(tmp_path / "joint", lazy=lazy)
    assert loaded.fingerprint == joint.fingerprint
    for part, again in zip(split(joint), split(loaded), strict=True):
        checkpoint.save(again, tmp_path / part.wiring.name)
        alone = checkpoint.load(tmp_path / part.wiring.name)
        assert alone.settings() == part.settings()
        assert alone.fingerprint == part.fingerprint == again.fingerprint
        assert alone.model_name == "m"
        assert (again.in_file is not None) == lazy
        inputs = {site: x_BD.float() for site, x_BD in random_inputs(part.wiring).items()}
        expected = part(inputs).reconstructions
        for other in (alone, again):
            assert all(torch.equal(y_BD, expected[site]) for site, y_BD in other(inputs).reconstructions.items())


def test_others_are_left_whole(wiring: Wiring, random_crosscoder: Any) -> None:
    crosscoder = random_crosscoder(wiring)
    assert (split(crosscoder) == [crosscoder]) == (wiring.name != "joint")


def test_what_cannot_be_split(shape: ModelShape, random_crosscoder: Any) -> None:
    wiring = Wiring.joint(shape)
    message = "chooses features of MLPs and attention together (jointtopk): it has no parts"
    with pytest.raises(ValueError, match=re.escape(message)):
        split(random_crosscoder(wiring, activation=JointTopK(3)))
    mixed = Wiring("joint", wiring.reads[::-1], wiring.writes[::-1], wiring.widths)
    for other in (mixed, Wiring("joint", wiring.reads[:3], wiring.writes[:3], wiring.widths)):
        with pytest.raises(ValueError, match="needs groups that write MLP outputs, and behind them those of attention"):
            split(random_crosscoder(other))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"skip": True}], ids=["untied", "tied", "skip"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_joining_undoes_splitting(
    activation: Any, options: dict[str, bool], shape: ModelShape, random_crosscoder: Any, random_inputs: Any
) -> None:
    joint = random_crosscoder(Wiring.joint(shape), activation=activation, **options)
    again = join(*split(joint))
    assert again.wiring == joint.wiring
    assert all(torch.equal(value, joint.state_dict()[name]) for name, value in again.state_dict().items())
    inputs = random_inputs(joint.wiring)
    expected = joint(inputs).reconstructions
    assert all(torch.equal(y_BD, expected[site]) for site, y_BD in again(inputs).reconstructions.items())
    joint.b_enc[0].data.zero_()
    assert bool(again.b_enc[0].any())  # a copy


def test_what_cannot_be_joined(shape: ModelShape, random_crosscoder: Any) -> None:
    mlps, attention = (random_crosscoder(wiring(shape)) for wiring in (Wiring.strictly_causal, Wiring.attention))
    assert join(mlps, attention).activation == TopK((3,) * 6)
    message = "expected a strictly_causal and an attention crosscoder to join, got attention and strictly_causal"
    with pytest.raises(ValueError, match=message):
        join(attention, mlps)
    for options, message in (
        ({"n_features": 8}, "crosscoders that are joined must have the same n_features, got 16 and 8"),
        ({"activation": ReLU()}, "must have the same activation, got {'name': 'topk'} and {'name': 'relu'}"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            join(mlps, random_crosscoder(Wiring.attention(shape), **options))
