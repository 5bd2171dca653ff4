"""What published crosscoders compute besides, against dense references: choice by scores, joint choice, scale and offset."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from replacement import Crosscoder, Features, JointTopK, JumpReLU, ReLU, Site, TopK, Wiring, checkpoint
from replacement.crosscoder.activation import Activation
from replacement.crosscoder.sites import ModelShape

SHAPE = ModelShape(n_layers=3, d_model=4, n_heads=2, d_head=2)
CLT = Wiring.strictly_causal(SHAPE)
PUBLISHED = [
    TopK(3, relu=False),
    TopK(3, scored=True),
    TopK(3, relu=False, scored=True, affine=True),
    JointTopK(7),
    JointTopK(7, relu=False, scored=True),
    JointTopK(7, scored=True, affine=True),
    ReLU(affine=True),
    JumpReLU(affine=True),
]


def rank_in_row(score_GBF: Tensor) -> Tensor:
    """Place of every feature in its row over all groups, best first; of equal ones the lower group, then the lower index."""
    n_groups, n_rows, n_features = score_GBF.shape
    rank_GBF = torch.empty_like(score_GBF, dtype=torch.int64)
    score_lists = score_GBF.tolist()
    for row in range(n_rows):
        places = [(-score_lists[g][row][f], g, f) for g in range(n_groups) for f in range(n_features)]
        for rank, (_, g, f) in enumerate(sorted(places)):
            rank_GBF[g, row, f] = rank
    return rank_GBF


def dense_activations(crosscoder: Crosscoder, inputs: dict[Site, Tensor]) -> Tensor:
    """`[G, B, F]`, written from the formulas."""
    activation = crosscoder.activation
    pre_GBF = torch.stack(
        [
            sum(inputs[site] @ crosscoder.encoder(group, site).T for site in reads) + crosscoder.b_enc[group]
            for group, reads in enumerate(crosscoder.wiring.reads)
        ]
    )
    if isinstance(activation, TopK | JointTopK):
        score_GBF = pre_GBF.detach().clone()
        if activation.scored:
            score_GBF *= crosscoder.state_dict()["score_factor"][:, None]
        if isinstance(activation, JointTopK):
            chosen_GBF = rank_in_row(score_GBF) < activation.k
        else:
            chosen_GBF = score_GBF.argsort(2, descending=True).argsort(2) < activation.k
        if activation.relu:
            chosen_GBF &= pre_GBF > 0
    else:
        threshold = crosscoder.threshold[:, None] if isinstance(activation, JumpReLU) else 0.0
        chosen_GBF = pre_GBF > threshold
    act_GBF = pre_GBF * chosen_GBF
    if activation.affine:
        tensors = crosscoder.state_dict()
        affine_GBF = act_GBF * tensors["post_scale"][:, None] + tensors["post_offset"][:, None]
        act_GBF = affine_GBF * (act_GBF != 0)
    act_GBF = act_GBF.clone()
    act_GBF[:, : crosscoder.undecomposed_positions] = 0
    return act_GBF


def dense_outputs(crosscoder: Crosscoder, act_GBF: Tensor) -> dict[Site, Tensor]:
    wiring = crosscoder.wiring
    return {
        site: sum(act_GBF[group] @ crosscoder.decoder(group, site) for group in wiring.writers(site))
        + crosscoder.decoder_bias(site)
        for site in wiring.write_sites
    }


@pytest.mark.parametrize("activation", PUBLISHED, ids=str)
def test_outputs_and_gradients_equal_those_of_the_dense_formula(
    activation: Activation, random_crosscoder: Any, random_inputs: Any
) -> None:
    crosscoder = random_crosscoder(CLT, activation=activation, undecomposed_positions=1)
    if crosscoder.threshold is not None:
        crosscoder.threshold.data.sub_(0.7)  # of either sign
    inputs = {site: x_BD.requires_grad_() for site, x_BD in random_inputs(CLT, n_rows=9).items()}
    act_GBF = dense_activations(crosscoder, inputs)
    expected = dense_outputs(crosscoder, act_GBF)
    found = crosscoder(inputs)
    for group in range(crosscoder.n_groups):
        torch.testing.assert_close(found.features.dense(group), act_GBF[group])
    for site, y_BD in expected.items():
        torch.testing.assert_close(found.reconstructions[site], y_BD)
    weights = [*inputs.values(), *crosscoder.W_enc, *crosscoder.b_enc, *crosscoder.W_dec]
    grads = [
        torch.autograd.grad(sum((y_BD**2).sum() for y_BD in outputs.values()), weights)
        for outputs in (found.reconstructions, expected)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@given(data=st.data())
def test_joint_choice_is_exact_and_deterministic_with_many_ties(data: st.DataObject) -> None:
    """Whole numbers: sums are exact, and most scores occur several times."""
    k, seed = data.draw(st.integers(1, 15)), data.draw(st.integers(0, 999))
    activation = JointTopK(k, relu=data.draw(st.booleans()), scored=data.draw(st.booleans()))
    crosscoder = Crosscoder(CLT, n_features=5, activation=activation, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in crosscoder.state_dict().items():
            lowest = 0 if name == "score_factor" else -1
            value.copy_(torch.randint(lowest, 3, value.shape, generator=generator))
    inputs = {site: torch.randint(-1, 2, (4, 4), generator=generator).double() for site in CLT.read_sites}
    pre_GBF = torch.stack([crosscoder.pre_activations(inputs, group) for group in range(3)])
    score_GBF = pre_GBF * (crosscoder.score_factor[:, None] if activation.scored else 1)
    chosen_GBF = (rank_in_row(score_GBF) < k) & ((score_GBF > 0) if activation.relu else True)
    features = crosscoder.eval().encode(inputs)
    expected = torch.nonzero(chosen_GBF)
    assert torch.equal(torch.stack([features.group, features.row, features.index], 1), expected)
    assert torch.equal(features.activation, pre_GBF[tuple(expected.T)])


def test_joint_choice_never_holds_more_than_two_best_lists(
    random_crosscoder: Any, random_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiring = Wiring.per_layer(ModelShape(n_layers=12, d_model=4, n_heads=2, d_head=2))
    crosscoder, inputs = (
        random_crosscoder(wiring, activation=JointTopK(6), n_features=64),
        random_inputs(wiring, n_rows=10),
    )
    whole = crosscoder.encode(inputs)
    sizes = []
    keep = JointTopK.keep

    def counted(self: JointTopK, row_S: Tensor, score_S: Tensor) -> Tensor:
        sizes.append(len(row_S))
        return keep(self, row_S, score_S)

    monkeypatch.setattr(JointTopK, "keep", counted)
    monkeypatch.setattr("replacement.crosscoder.encoder._ROWS_AT_ONCE", 3)
    again = crosscoder.encode(inputs)
    assert len(sizes) == 12
    assert max(sizes) <= 2 * 6 * 10
    assert torch.equal(again.index, whole.index)
    torch.testing.assert_close(again.activation, whole.activation)


@pytest.mark.parametrize("activation", PUBLISHED, ids=str)
def test_checkpoints_hold_all_of_it(
    activation: Activation, random_crosscoder: Any, random_inputs: Any, tmp_path: Path
) -> None:
    crosscoder = random_crosscoder(CLT, activation=activation)
    checkpoint.save(crosscoder, tmp_path / "c", dtype=torch.float64)
    names = {name for name in ("score_factor", "post_scale", "post_offset") if getattr(crosscoder, name) is not None}
    expected = {"post_scale", "post_offset"} if activation.affine else set()
    assert names == expected | ({"score_factor"} if getattr(activation, "scored", False) else set())
    inputs = random_inputs(CLT)
    for lazy in (False, True):
        loaded = checkpoint.load(tmp_path / "c", dtype=torch.float64, lazy=lazy)
        assert loaded.fingerprint == crosscoder.fingerprint
        assert loaded.activation == activation
        for site, y_BD in crosscoder(inputs).reconstructions.items():
            torch.testing.assert_close(loaded(inputs).reconstructions[site], y_BD)
    copy = crosscoder.to_inference()
    for name in names:
        changed = crosscoder.to_inference(dtype=torch.float32).to(torch.float64)
        changed.load_state_dict(copy.state_dict())
        getattr(changed, name)[1, 2] += 1
        assert changed.fingerprint != crosscoder.fingerprint


def test_joint_choice_of_one_group_is_refused(random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(CLT, activation=JointTopK(7))
    message = r"chooses features over all layers together \(jointtopk\).* only be replaced with reads='clean'"
    with pytest.raises(ValueError, match=message):
        crosscoder.encode_group(1, random_inputs(CLT))
    with pytest.raises(ValueError, match=message):
        crosscoder.select(torch.zeros(2, 16), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": (1, 2, 3)}, "k of jointtopk must be one number for all groups together, got (1, 2, 3)"),
        ({"k": 49}, "jointtopk keeps k=49 features, but there are only 3 groups of 16 features"),
        ({"k": 0}, "k must be 1 or more, got 0"),
    ],
)
def test_bad_numbers_of_features(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Crosscoder(CLT, n_features=16, activation=JointTopK(**arguments))


def test_score_factors_are_not_negative(random_crosscoder: Any) -> None:
    crosscoder = random_crosscoder(CLT, activation=TopK(3, scored=True))
    crosscoder.score_factor[2, 3] = -0.5
    with pytest.raises(ValueError, match=r"score factors must be 0 or more, got -0\.5"):
        crosscoder.check_finite()


def test_features_that_write_nothing_are_not_chosen_by_their_scores(random_inputs: Any, random_crosscoder: Any) -> None:
    """Decoder norms as factors, of all decoder vectors of a feature side by side."""
    crosscoder = random_crosscoder(CLT, activation=TopK(3, scored=True))
    with torch.no_grad():
        crosscoder.W_dec[0][5:] = 0
        norms = [norms_FW.square().sum(1).sqrt() for norms_FW in crosscoder.decoder_norms()]
        crosscoder.score_factor.copy_(torch.stack(norms))
    features: Features = crosscoder.encode(random_inputs(CLT, n_rows=40))
    assert int(features.of(0).index.max()) < 5
    assert int(features.of(1).index.max()) > 5
