"""Whatever wiring is accepted is attributed exactly; whatever is refused is refused before any graph is made."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from autograd_oracle import compare_with_oracle
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from circuits import trace
from circuits.attribution.identity import IdentityError
from replacement import JointTopK, JumpReLU, ReLU, ReplacementModel, Site, TopK, Wiring
from replacement.crosscoder.sites import SITE_KINDS

N_LAYERS = 3
ON_THE_STREAM = ("resid_pre", "resid_mid", "resid_post", "mlp_normalized", "mlp_in")
Groups = tuple[tuple[Site, ...], ...]
RANDOM = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def sites(kinds: tuple[str, ...], *, lowest: int = 0) -> st.SearchStrategy[Site]:
    """Any site of these kinds, from a layer on."""
    return st.builds(Site, st.integers(lowest, N_LAYERS - 1), st.sampled_from(kinds))


def sites_of(kind: str) -> list[Site]:
    """The sites of one kind in all layers."""
    return [Site(layer, kind) for layer in range(N_LAYERS)]


@st.composite
def causal_groups(draw: st.DrawFn, parallel: bool) -> tuple[Groups, Groups]:
    """Reads and writes of groups that read up to three sites on the residual stream and write any MLP outputs behind them."""
    kinds = tuple(kind for kind in ON_THE_STREAM if not (parallel and kind == "resid_mid"))
    last = Site(N_LAYERS - 1, "mlp_out")
    reads, writes = [], []
    for layer in sorted(draw(st.sets(st.integers(0, N_LAYERS - 1), min_size=1))):
        possible = sites(kinds, lowest=layer).filter(lambda site: site < last)
        chosen = draw(st.sets(possible, min_size=1, max_size=3).filter(lambda s, at=layer: min(s).layer == at))
        behind = [site for site in sites_of("mlp_out") if site > max(chosen)]
        reads.append(tuple(sorted(chosen)))
        writes.append(tuple(sorted(draw(st.sets(st.sampled_from(behind), min_size=1)))))
    return tuple(reads), tuple(writes)


@st.composite
def attention_groups(draw: st.DrawFn) -> tuple[Groups, Groups]:
    """Groups that read the heads' outputs of a layer and write attention outputs of this layer and later ones."""
    layers = sorted(draw(st.sets(st.integers(0, N_LAYERS - 1), min_size=1)))
    possible = (st.sampled_from(sites_of("attn_out")[layer:]) for layer in layers)
    writes = tuple(tuple(sorted(draw(st.sets(written, min_size=1)))) for written in possible)
    return tuple((Site(layer, "attn_z"),) for layer in layers), writes


def wiring_of(groups: tuple[Groups, Groups]) -> Wiring:
    """A wiring of these reads and writes."""
    kinds = {site.kind for several in groups for group in several for site in group}
    return Wiring("random", *groups, dict.fromkeys(sorted(kinds), 32))


crosscoder_options = st.fixed_dictionaries(
    {
        "tied": st.booleans(),
        "skip": st.booleans(),
        "undecomposed_positions": st.integers(0, 2),
        "activation": st.sampled_from(
            [
                TopK(4),
                TopK(9, relu=False, scored=True),
                JointTopK(12, relu=False, scored=True, affine=True),
                JumpReLU(affine=True),
                JumpReLU(),
                ReLU(),
            ]
        ),
    }
)


@st.composite
def any_groups(draw: st.DrawFn, writes: str) -> tuple[Groups, Groups]:
    """One or two groups that read anything and write outputs of a part, or anything, anywhere."""
    n_groups, written = draw(st.integers(1, 2)), draw(st.sampled_from([(writes,), (writes,), SITE_KINDS]))

    def groups(kinds: tuple[str, ...]) -> Groups:
        chosen = st.sets(sites(kinds), min_size=1, max_size=2)
        return tuple(tuple(sorted(draw(chosen))) for _ in range(n_groups))

    return groups(SITE_KINDS), groups(written)


@RANDOM
@given(data=st.data())
@pytest.mark.parametrize("attention", [False, True], ids=["linear", "attention"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "neox"])
def test_causal_wirings_on_the_stream_are_exact(
    language_model: Any, architecture: str, attention: bool, data: st.DataObject
) -> None:
    lm = language_model(architecture, torch.float64)
    options, groups = data.draw(crosscoder_options), data.draw(causal_groups(lm.shape.parallel))
    crosscoder = tiny.crosscoder_for(lm, wiring=wiring_of(groups), n_features=24, **options)
    with torch.no_grad():
        for name in ("threshold", "score_factor", "post_scale", "post_offset"):
            if (tensor := getattr(crosscoder, name)) is not None:  # of either sign: activations below 0 have edges too
                values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5), dtype=tensor.dtype)
                tensor.copy_(values.abs() if name == "score_factor" else values)
    of_attention = None
    if attention:
        first, groups = data.draw(st.integers(0, 2)), data.draw(attention_groups())
        of_attention = tiny.crosscoder_for(lm, wiring=wiring_of(groups), n_features=24, undecomposed_positions=first)
    model = ReplacementModel(lm, crosscoder, attention_crosscoder=of_attention)
    tokens = tiny.random_tokens(data.draw(st.sampled_from([3, 6, 12])), seed=data.draw(st.integers(0, 3)))
    attributor = compare_with_oracle(model, tokens, tolerance=1e-11)
    assert 0 < attributor.rows.identity_error < 1e-13


@settings(RANDOM, max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("part", ["mlp", "attention"])
@pytest.mark.parametrize("architecture", ["llama", "neox"])
def test_any_wiring_is_exact_or_refused(language_model: Any, architecture: str, part: str, data: st.DataObject) -> None:
    lm, tokens = language_model(architecture, torch.float64), tiny.random_tokens(5)
    groups, skip = data.draw(any_groups("mlp_out" if part == "mlp" else "attn_out")), data.draw(st.booleans())
    try:
        crosscoder = tiny.crosscoder_for(lm, wiring=wiring_of(groups), n_features=24, skip=skip)
        if part == "mlp":
            model = ReplacementModel(lm, crosscoder)
        else:
            model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=crosscoder)
        trace(model, tokens, coverage=1.0)
    except IdentityError:
        raise
    except ValueError as refused:
        event(re.sub(r"\d+", "N", str(refused))[:70])
        return
    event("accepted")
    compare_with_oracle(model, tokens, tolerance=1e-11)
