"""The toys of the literature reproduce: each finding is held against a fact that needs no trained crosscoder."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

TOYS = Path(__file__).parent.parent / "examples" / "toys"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`toy(name)`: a script as a module."""
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.syspath_prepend(str(TOYS.parent))
    return importlib.import_module


@pytest.mark.parametrize("kind", ["SAE", "crosscoder"])
def test_topk_of_two_finds_colours_and_shapes_where_amplitudes_vary(kind: str, toy: Any) -> None:
    composed, reached = toy("composed"), 0
    for seed in range(2):
        made = composed.make(kind, varied=True, seed=seed)
        crosscoder = composed.train_one(made, "TopK 2", 4, seed=seed)
        # Four atoms, two at a time, cover four two-dimensional cones only if they are the cones' edges; some runs get stuck.
        if composed.measure(crosscoder, made.data).unexplained < 1e-3:
            decoder_FD = crosscoder.decoder(0, crosscoder.wiring.write_sites[0]).detach()
            assert float((normalize(decoder_FD) @ made.atoms_4D.T).amax(dim=0).min()) > 0.95
            assert composed.count(crosscoder, made)[:2] == (4, 0)
            reached += 1
    assert reached >= 1


@pytest.mark.parametrize("kind", ["transcoder of a sum"])
def test_l1_finds_the_combinations_which_cost_less(kind: str, toy: Any) -> None:
    composed = toy("composed")
    made = composed.make(kind, varied=False)
    crosscoder = composed.train_one(made, "L1 0.03", 8, seed=0)
    found = composed.count(crosscoder, made)
    assert (found.product, found.composed) == (0, 4)
    # Every row is one of four corners of a square around the mean: one step of length 1, or two of sqrt(1/2) each.
    features = crosscoder.encode(made.data)
    norms_F = crosscoder.decoder_norms()[0].detach()[:, 0]
    cost = float((features.activation.detach() * norms_F[features.index]).sum()) / features.n_rows
    assert 0.9 < cost < 1.05 < math.sqrt(2)


def test_two_bases_with_the_same_rows_have_the_same_loss(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    composed = toy("composed")
    first_4D, second_4D, first_ND, second_ND = composed.same_rows_two_bases()
    torch.testing.assert_close(first_ND, second_ND, atol=1e-6, rtol=0)
    assert float(torch.cosine_similarity(first_4D, second_4D).max()) < 0.5  # no atom of one is an atom of the other
    losses = composed.print_two_bases(range(1), n_steps=200)
    for first, second in losses:
        assert first == pytest.approx(second, abs=1e-5)
        assert first < 0.01  # and it is not that both fail
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder"])
def test_a_skip_connection_leaves_features_nothing_of_a_rotation(kind: str, toy: Any) -> None:
    curve = toy("curve")
    made = curve.make(kind, "rotation")[1]
    trained = [curve.train_one(kind, "rotation", "L1 0.1", skip=skip, seed=0, n_steps=500) for skip in (False, True)]
    without, with_skip = (curve.measure_use(crosscoder, made) for crosscoder in trained)
    assert without.used > 15
    assert without.unexplained < 0.02
    assert with_skip.used <= 1
    assert with_skip.unexplained < 1e-3
    assert with_skip.unexplained_by_skip < 1e-3
    if kind == "transcoder":
        cos, sin = math.cos(curve.TURN), math.sin(curve.TURN)
        wiring = trained[1].wiring
        skip_22 = trained[1].skip_matrix(0, wiring.read_sites[0], wiring.write_sites[0]).detach()
        torch.testing.assert_close(skip_22, torch.tensor([[cos, -sin], [sin, cos]]), atol=0.01, rtol=0)


def test_features_remain_where_the_map_is_not_linear(toy: Any) -> None:
    curve = toy("curve")
    made = curve.make("transcoder", "doubled angle")[1]
    crosscoder = curve.train_one("transcoder", "doubled angle", "L1 0.1", skip=True, seed=0, n_steps=500)
    use = curve.measure_use(crosscoder, made)
    assert use.used > 10
    # No matrix does it: the best one, by least squares, leaves more than half.
    x_N2, y_N2 = made.values()
    ones_N3 = torch.cat([x_N2, torch.ones(len(x_N2), 1)], dim=1)
    best_N2 = ones_N3 @ torch.linalg.lstsq(ones_N3, y_N2).solution
    assert float((y_N2 - best_N2).square().sum() / (y_N2 - y_N2.mean(dim=0)).square().sum()) > 0.5
    assert use.unexplained_by_skip > 0.5


def test_a_repeated_point_is_remembered_unless_jacobians_are_matched(toy: Any) -> None:
    absolute = toy("absolute")
    trained = {c: absolute.train_one(3, jacobian=c, n_steps=600) for c in (0.0, 0.3)}
    plain, matched = (absolute.measure_memory(crosscoder, 3) for crosscoder in trained.values())
    assert plain.remembered > 0.6
    assert matched.remembered < 0.1
    # One feature for all m coordinates costs 1 / sqrt(m) of m features; less would not reconstruct.
    assert math.sqrt(1 / 3) - 0.02 < plain.l1_ratio < 0.7 < matched.l1_ratio
    assert plain.jacobian_error > 4 * matched.jacobian_error
    assert 0 < plain.begin < 0.9  # it fires on one side, although |x| has two


def test_nothing_is_remembered_where_it_saves_nothing(toy: Any) -> None:
    absolute = toy("absolute")
    memory = absolute.measure_memory(absolute.train_one(1, n_steps=400), 1)
    assert abs(memory.remembered) < 0.05
    assert math.isnan(memory.begin)


def test_the_measure_of_memory_knows_the_exact_solution(toy: Any) -> None:
    absolute = toy("absolute")
    crosscoder = absolute.Crosscoder(
        absolute.WIRING, n_features=2 * absolute.WIDTH, activation=absolute.ReLU(), seed=0
    ).requires_grad_(False)
    identity_DD = torch.eye(absolute.WIDTH)
    crosscoder.encoder(0, absolute.READ).copy_(torch.cat([identity_DD, -identity_DD]))
    crosscoder.decoder(0, absolute.WRITE).copy_(torch.cat([identity_DD, identity_DD]))
    assert absolute.measure_memory(crosscoder, 3)[:3] == (0, 0, 0)
    assert absolute.measure_memory(crosscoder, 3).l1_ratio == 1
    # One feature that writes all of p and none else at p: rank 1 in place of 3, at a cost of 1 / sqrt(3).
    p_D = absolute.point(3)
    crosscoder.encoder(0, absolute.READ).zero_()[0] = p_D / 3
    crosscoder.decoder(0, absolute.WRITE)[0] = p_D
    memory = absolute.measure_memory(crosscoder, 3)
    assert memory.remembered == pytest.approx(1)
    assert memory.jacobian_error == pytest.approx(2 / 3)
    assert memory.l1_ratio == pytest.approx(1 / math.sqrt(3))


def test_l1_claims_shared_features_as_exclusive_and_batchtopk_does_not(toy: Any) -> None:
    diffing = toy("diffing")
    truth = diffing.make_truth(*(size // 8 for size in diffing.REGIMES["450 of 4096"]), seed=0)
    assert torch.bincount(truth.owner_F).tolist() == [456, 28, 28]
    l1, few = (
        diffing.judge(diffing.train_one(truth, name, n_steps=600), truth) for name in ("L1 0.03", "BatchTopK 12")
    )
    assert l1.by_norm.shared > 3 * few.by_norm.shared + 3
    assert few.by_norm.precision > 0.9 > l1.by_norm.precision
    assert l1.by_scaling.shared < l1.by_norm.shared / 2
    assert l1.by_scaling.recall == l1.by_norm.recall  # no true claim is taken back


def test_truth_of_model_diffing(toy: Any) -> None:
    diffing = toy("diffing")
    truth = diffing.make_truth(64, 20, 16, seed=0)
    norms_FM = truth.vectors_FMD.norm(dim=2)
    assert torch.equal(norms_FM[:, 0] == 0, truth.owner_F == diffing.SECOND)
    assert torch.equal(norms_FM[:, 1] == 0, truth.owner_F == diffing.FIRST)
    shared_F = truth.owner_F == diffing.SHARED
    assert float((norms_FM[shared_F, 0] / norms_FM[shared_F, 1]).min()) > 0.2
    acts_NF, data = diffing.sample(truth, 4000, seed=1)
    assert float((acts_NF > 0).float().sum(dim=1).mean()) == pytest.approx(diffing.ACTIVE, rel=0.05)
    for model, x_ND in enumerate(data.values()):
        torch.testing.assert_close(x_ND, acts_NF @ truth.vectors_FMD[:, model])


def test_every_toy_prints_a_table_and_draws(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    composed, curve, absolute, diffing = map(toy, ("composed", "curve", "absolute", "diffing"))
    sweeps = [composed.sweep(["SAE"], range(2), varied=varied, n_steps=4) for varied in (False, True)]
    composed.draw(dict(zip(("fixed", "varied"), sweeps, strict=True)), tmp_path / "composed")
    assert len(curve.print_table(range(1), tmp_path / "rows" / "curve.json", n_steps=4)) == 24
    curve.draw(tmp_path / "curve", n_steps=4)
    assert len(absolute.print_table(range(1), n_steps=4)) == len(absolute.SETTINGS)
    absolute.draw(tmp_path / "absolute", n_steps=4)
    found = diffing.results(32, range(1), tmp_path / "rows" / "diffing.json", n_steps=4)
    diffing.print_table(found)
    diffing.draw(found, tmp_path / "diffing")
    pictures = [path.suffix for path in tmp_path.iterdir() if path.is_file()]
    assert sorted(pictures) == [".png"] * 4 + [".svg"] * 4
    assert len(capsys.readouterr().out.splitlines()) == 2 * 10 + 2 + 24 + 1 + len(absolute.SETTINGS) + 1 + 12
