"""Low-rank sparse attention agrees with a loop over heads, queries and keys, and its rows are whole prompts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from replacement.crosscoder import checkpoint
from replacement.crosscoder.activation import ReLU
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.formats.layouts import writable
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.rotation import Rotary
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import JointTopK, TopK
from replacement.crosscoder.wiring import Wiring

SHAPE = ModelShape(n_layers=2, d_model=6, n_heads=2, d_head=3)
PLAIN = QueryKeys(n_groups=4, width=6)
SETTINGS = {
    "plain": PLAIN,
    "rotary": QueryKeys(n_groups=4, width=6, rotary=Rotary.of_base(4)),
    "rotary, neighbours": QueryKeys(n_groups=2, width=6, rotary=Rotary.of_base(6, base=50.0, neighbours=True)),
    "rotary and norm": QueryKeys(n_groups=2, width=6, rotary=Rotary.of_base(6), norm_epsilon=1e-5),
}
B, T, F = 3, 5, 8


def lorsa(query_keys: QueryKeys = PLAIN, *, dtype: torch.dtype = torch.float64, **options: object) -> Lorsa:
    """A Lorsa with random weights everywhere."""
    options.setdefault("activation", TopK(3))
    made = Lorsa(Wiring.lorsa(SHAPE), query_keys=query_keys, n_features=F, dtype=dtype, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def inputs(*, dtype: torch.dtype = torch.float64, n_prompts: int = B) -> tuple[dict[Site, Tensor], Tensor]:
    """What both layers read of some prompts, and positions."""
    generator = torch.Generator().manual_seed(2)
    rows = {Site(layer, "attn_in"): torch.randn(n_prompts * T, 6, generator=generator).to(dtype) for layer in (0, 1)}
    return rows, torch.arange(T).repeat(n_prompts)


def rotated(x_C: Tensor, position: int, rotary: Rotary | None) -> Tensor:
    """Turn each pair of channels in a loop."""
    y_C = x_C.clone()
    for pair, frequency in enumerate(rotary.frequencies if rotary else ()):
        half = len(rotary.frequencies)
        i, j = (2 * pair, 2 * pair + 1) if rotary.neighbours else (pair, pair + half)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        y_C[i], y_C[j] = x_C[i] * cos - x_C[j] * sin, x_C[j] * cos + x_C[i] * sin
    return y_C


def head_by_loop(crosscoder: Lorsa, layer: int, head: int, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Pattern `[T, T]` and pre-activations `[T]` of one head on one prompt."""
    settings = crosscoder.query_keys
    group = head // (F // settings.n_groups)

    def turned(name: str, position: int) -> Tensor:
        y_C = x_TD[position] @ getattr(crosscoder, f"W_{name}")[layer][group]
        y_C = y_C + getattr(crosscoder, f"b_{name}")[layer][group]
        if settings.norm_epsilon is not None:
            y_C = y_C / (y_C.square().mean() + settings.norm_epsilon).sqrt()
            y_C = y_C * getattr(crosscoder, f"gain_{name}")[layer][group]
        return rotated(y_C, position, settings.rotary)

    pattern_TT, pre_T = torch.zeros(T, T, dtype=x_TD.dtype), torch.zeros(T, dtype=x_TD.dtype)
    for query in range(T):
        scores = [float(turned("Q", query) @ turned("K", key)) / settings.width**0.5 for key in range(query + 1)]
        total = sum(math.exp(score) for score in scores)
        for key, score in enumerate(scores):
            pattern_TT[query, key] = math.exp(score) / total
            pre_T[query] += pattern_TT[query, key] * (x_TD[key] @ crosscoder.W_enc[layer][head])
        pre_T[query] += crosscoder.b_enc[layer][head]
    return pattern_TT, pre_T


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_heads_are_those_of_a_loop(name: str) -> None:
    crosscoder, (rows, positions_R) = lorsa(SETTINGS[name]), inputs()
    for layer in (0, 1):
        pattern_BQTT = crosscoder.patterns(rows, layer, positions=positions_R)
        pre_RF = crosscoder.pre_activations(rows, layer, positions=positions_R)
        for prompt, x_TD in enumerate(rows[Site(layer, "attn_in")].split(T)):
            for head in range(F):
                pattern_TT, pre_T = head_by_loop(crosscoder, layer, head, x_TD)
                group = int(crosscoder.query_key_group(torch.tensor([head])))
                torch.testing.assert_close(pattern_BQTT[prompt, group], pattern_TT, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(pre_RF[prompt * T : (prompt + 1) * T, head], pre_T, rtol=1e-11, atol=1e-11)


def test_gradients_reach_values_queries_and_keys() -> None:
    crosscoder, (rows, positions_R) = lorsa(SETTINGS["rotary and norm"], activation=TopK(2)), inputs(n_prompts=1)
    x_TD = rows[Site(0, "attn_in")].requires_grad_()
    parameters = [x_TD, *(getattr(crosscoder, name)[0] for name in ("W_enc", "b_enc", "W_Q", "b_Q", "W_K", "gain_K"))]

    def activations(*_: Tensor) -> Tensor:
        return crosscoder.encode_group(0, rows, positions=positions_R).activation

    assert len(activations()) > 5
    torch.autograd.gradcheck(activations, tuple(parameters))


@torch.no_grad()
def test_rows_that_are_not_kept_are_seen_as_keys() -> None:
    crosscoder, (rows, positions_R) = lorsa(undecomposed_positions=1), inputs()
    every = crosscoder.encode(rows, positions=positions_R)
    assert set((every.row % T).tolist()) == set(range(1, T))
    keep_R = torch.rand(B * T, generator=torch.Generator().manual_seed(3)) < 0.5
    kept = crosscoder.encode(rows, positions=positions_R, keep=keep_R)
    expected = every.select(keep_R[every.row])
    assert torch.equal(kept.row, expected.row)
    assert torch.equal(kept.index, expected.index)
    assert torch.equal(kept.activation, expected.activation)


@torch.no_grad()
def test_held_patterns_are_those_of_other_inputs() -> None:
    crosscoder, (rows, positions_R) = lorsa(activation=ReLU()), inputs()
    held = crosscoder.holding_patterns(rows, positions=positions_R)
    other = {site: x_RD + 1 for site, x_RD in rows.items()}
    for layer, site in enumerate(rows):
        pattern_BQTT = crosscoder.patterns(rows, layer, positions=positions_R)
        read_BTQD = torch.einsum("bqts,bsd->btqd", pattern_BQTT, other[site].view(B, T, 6))
        read_RFD = read_BTQD.repeat_interleave(F // 4, 2).flatten(0, 1)
        expected_RF = (read_RFD * crosscoder.W_enc[layer]).sum(-1) + crosscoder.b_enc[layer]
        pre_RF = held.pre_activations(other, layer, positions=positions_R)
        torch.testing.assert_close(pre_RF, expected_RF, rtol=1e-12, atol=1e-12)
    live = crosscoder.pre_activations(other, 0, positions=positions_R)
    assert not torch.allclose(live, held.pre_activations(other, 0, positions=positions_R))


@torch.no_grad()
def test_scales_are_folded_exactly() -> None:
    crosscoder, (rows, positions_R) = lorsa(SETTINGS["rotary and norm"]), inputs()
    scaled = {site: 3.0 * x_RD for site, x_RD in rows.items()}
    expected = crosscoder(scaled, positions=positions_R)
    crosscoder.fold_input_scale(dict.fromkeys(rows, 3.0), dict.fromkeys(crosscoder.wiring.write_sites, 2.0))
    given = crosscoder(rows, positions=positions_R)
    torch.testing.assert_close(given.features.activation, expected.features.activation, rtol=1e-12, atol=1e-12)
    for site, y_RD in given.reconstructions.items():
        torch.testing.assert_close(y_RD * 2, expected.reconstructions[site], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_gives_the_same_lorsa(name: str, tmp_path: Path) -> None:
    crosscoder = lorsa(SETTINGS[name], dtype=torch.float32)
    checkpoint.save(crosscoder, tmp_path / "lorsa")
    for lazy in (False, True):
        loaded = checkpoint.load(tmp_path / "lorsa", lazy=lazy)
        assert isinstance(loaded, Lorsa)
        assert loaded.query_keys == crosscoder.query_keys
        assert loaded.fingerprint == crosscoder.fingerprint
        rows, positions_R = inputs(dtype=torch.float32)
        expected, given = (made(rows, positions=positions_R) for made in (crosscoder, loaded))
        assert torch.equal(given.features.activation, expected.features.activation)
    double = loaded.to_inference(dtype=torch.float64)
    assert double.dtype == torch.float64
    assert {p.dtype for p in double.W_Q} == {torch.float64}
    with torch.no_grad():
        crosscoder.W_Q[1][0, 0, 0] += 1
    assert crosscoder.fingerprint != loaded.fingerprint


def test_weights_of_sixteen_bits_are_raised() -> None:
    half = lorsa(SETTINGS["rotary and norm"]).to_inference(dtype=torch.bfloat16)
    raised, rounded = half.to_inference(dtype=torch.float64), lorsa(SETTINGS["rotary and norm"])
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    rows, positions_R = inputs()
    expected, given = (made.encode(rows, positions=positions_R) for made in (rounded, raised))
    torch.testing.assert_close(given.activation, expected.activation, rtol=1e-12, atol=1e-12)
    in_half = half.encode({site: x_RD.bfloat16() for site, x_RD in rows.items()}, positions=positions_R)
    assert in_half.activation.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", sorted(writable().keys() - {"crosstrace", "llama-scope-2"}))
def test_layouts_without_queries_and_keys_refuse_it(layout: str, tmp_path: Path) -> None:
    checkpoint.save(lorsa(dtype=torch.float32), tmp_path / "lorsa")
    with pytest.raises(ValueError, match=f"the layout {layout} has no place for"):
        convert(tmp_path / "lorsa", tmp_path / "copy", to=layout)


def test_bad_input() -> None:
    rows, positions_R = inputs()
    with pytest.raises(ValueError, match="8 heads cannot share 3 query-key groups equally: expected a multiple of 3"):
        lorsa(QueryKeys(n_groups=3, width=2))
    with pytest.raises(ValueError, match="queries and keys have 2 channels, 4 are to be rotated"):
        QueryKeys(n_groups=1, width=2, rotary=Rotary.of_base(4))
    with pytest.raises(ValueError, match="low-rank sparse attention has no option skip"):
        lorsa(skip=True)
    with pytest.raises(ValueError, match="heads of low-rank sparse attention are chosen by layer, not by jointtopk"):
        lorsa(activation=JointTopK(3))
    with pytest.raises(ValueError, match="every layer of low-rank sparse attention reads one site"):
        Lorsa(Wiring.acausal(SHAPE), query_keys=PLAIN, n_features=F)
    with pytest.raises(ValueError, match="reads whole prompts of one length: expected positions 0 to T - 1 for each"):
        lorsa().encode(rows, positions=positions_R.roll(1))
    with pytest.raises(ValueError, match="this lorsa crosscoder spans 2 layers, the model has 3"):
        Wiring.lorsa(SHAPE).check_fits(ModelShape(n_layers=3, d_model=6, n_heads=2, d_head=3))
    with pytest.raises(ValueError, match="this crosscoder has width 6 at attn_in, the model has 8"):
        Wiring.lorsa(SHAPE).check_fits(ModelShape(n_layers=2, d_model=8, n_heads=2, d_head=4))
