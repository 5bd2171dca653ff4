"""Sites read back what they print and sort as the forward pass meets them; wirings connect what their family says."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replacement.crosscoder.sites import SITE_KINDS, ModelShape, Site
from replacement.crosscoder.wiring import Wiring

SITES = st.builds(Site, st.integers(0, 99), st.sampled_from(SITE_KINDS), st.integers(0, 12))


@given(SITES)
def test_parse_inverts_str(site: Site) -> None:
    assert Site.parse(str(site)) == site


def test_str_names_the_second_model_only() -> None:
    assert str(Site(3, "resid_mid")) == "resid_mid.3"
    assert str(Site(3, "resid_mid", model=1)) == "resid_mid.3@1"


@given(SITES, SITES)
def test_order_is_total_and_never_against_the_timeline(a: Site, b: Site) -> None:
    assert (a < b) + (b < a) + (a == b) == 1
    if a < b:
        assert a.point <= b.point


def test_a_layer_is_met_in_forward_order() -> None:
    attention, mlp = (
        ["attn_normalized", "attn_in", "attn_z", "attn_out"],
        ["mlp_normalized", "mlp_in", "mlp_difference", "mlp_out"],
    )
    names = ["resid_pre", *attention, "resid_mid", *mlp, "resid_post"]
    assert [site.kind for site in sorted(Site(2, kind) for kind in SITE_KINDS)] == names
    assert Site(2, "resid_post").point == Site(3, "resid_pre").point


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resid_mid", "cannot read site 'resid_mid': expected 'kind.layer'"),
        ("resid_mid.-1", "cannot read site 'resid_mid.-1'"),
        ("resid_mid.3@", "cannot read site"),
        ("resid.3", "unknown site kind 'resid': expected one of resid_pre"),
        ("resid_mid.3@12345678901", "cannot read site"),
    ],
)
def test_bad_site_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Site.parse(text)


def test_bad_sizes_are_refused(shape: ModelShape) -> None:
    with pytest.raises(ValueError, match="the layer of a site must be 0 or more, got -1"):
        Site(-1, "mlp_out")
    with pytest.raises(ValueError, match="n_heads must be 1 or more, got 0"):
        ModelShape(2, 8, 0, 4)
    with pytest.raises(ValueError, match="unknown site kind 'mlp'"):
        shape.width("mlp")


def test_attn_z_has_the_width_of_all_heads(shape: ModelShape) -> None:
    assert (shape.width("attn_z"), shape.width("resid_mid")) == (10, 8)


def test_strictly_causal_writes_this_layer_and_all_above(shape: ModelShape) -> None:
    wiring = Wiring.strictly_causal(shape)
    assert [[str(site) for site in sites] for sites in wiring.writes] == [
        ["mlp_out.0", "mlp_out.1", "mlp_out.2"],
        ["mlp_out.1", "mlp_out.2"],
        ["mlp_out.2"],
    ]
    assert [str(sites[0]) for sites in wiring.reads] == ["resid_mid.0", "resid_mid.1", "resid_mid.2"]
    assert [wiring.group_layer(group) for group in range(3)] == [0, 1, 2]
    assert wiring.writers(Site(1, "mlp_out")) == (0, 1)


def test_attention_reads_the_heads_and_writes_this_layer_and_all_above(shape: ModelShape) -> None:
    wiring = Wiring.attention(shape)
    assert [str(site) for sites in wiring.reads for site in sites] == ["attn_z.0", "attn_z.1", "attn_z.2"]
    assert [[str(site) for site in sites] for sites in wiring.writes] == [
        ["attn_out.0", "attn_out.1", "attn_out.2"],
        ["attn_out.1", "attn_out.2"],
        ["attn_out.2"],
    ]
    assert (wiring.name, wiring.widths) == ("attention", {"attn_out": 8, "attn_z": 10})
    assert wiring.is_causal
    with pytest.raises(ValueError, match="this attention crosscoder spans 3 layers, the model has 4"):
        wiring.check_fits(ModelShape(4, 8, 2, 5))


def test_parallel_models_are_read_before_attention() -> None:
    shape = ModelShape(2, 8, 2, 4, parallel=True)
    assert Wiring.strictly_causal(shape).reads[1] == (Site(1, "resid_pre"),)
    with pytest.raises(ValueError, match="parallel attention has no resid_mid"):
        Wiring.per_layer(shape, read="resid_mid")
    with pytest.raises(ValueError, match="uses resid_mid, which a model with parallel attention does not have"):
        Wiring.per_layer(ModelShape(2, 8, 2, 4)).check_fits(shape)


def test_any_object_with_a_shape_will_do(shape: ModelShape) -> None:
    class Model:
        def __init__(self, shape: ModelShape) -> None:
            self.shape = shape

    assert Wiring.acausal(Model(shape)) == Wiring.acausal(shape)


def test_model_diffing_reads_and_writes_both_models(shape: ModelShape) -> None:
    wiring = Wiring.model_diffing(shape, layer=2)
    assert wiring.reads == wiring.writes == ((Site(2, "resid_post", 0), Site(2, "resid_post", 1)),)


def test_models_of_any_number_and_size_are_wired_together(shape: ModelShape) -> None:
    wide, deep = ModelShape(2, 12, 3, 4), ModelShape(9, 8, 2, 4, parallel=True)
    wiring = Wiring.model_diffing([shape, wide, deep], layer=[1, 0, 8], site="attn_z")
    assert wiring.reads == wiring.writes == ((Site(1, "attn_z"), Site(0, "attn_z", 1), Site(8, "attn_z", 2)),)
    assert wiring.widths == {"attn_z": 10, "attn_z@1": 12, "attn_z@2": 8}
    assert [wiring.width(site) for site in wiring.reads[0]] == [10, 12, 8]
    assert wiring.n_models == 3
    for number, model in enumerate((shape, wide, deep)):
        wiring.check_fits(model, number=number)
    with pytest.raises(ValueError, match="this crosscoder has width 12 at attn_z, the model has 8"):
        wiring.check_fits(deep, number=1)
    with pytest.raises(ValueError, match="this model_diffing crosscoder spans 9 layers, the model has 3"):
        wiring.check_fits(ModelShape(3, 8, 2, 4), number=2)
    assert Wiring.model_diffing([shape] * 3, layer=1).widths == {"resid_post": 8}
    with pytest.raises(ValueError, match=re.escape("one layer, or one for each of 3 models; got [1, 2]")):
        Wiring.model_diffing([shape] * 3, layer=[1, 2])
    with pytest.raises(ValueError, match="two models or more, got 1"):
        Wiring.model_diffing([shape], layer=1)
    with pytest.raises(ValueError, match="layer 2 does not exist: the model has layers 0 to 1"):
        Wiring.model_diffing([shape, wide], layer=2)
    with pytest.raises(ValueError, match="parallel attention has no resid_mid"):
        Wiring.model_diffing([shape, deep], layer=0, site="resid_mid")


def test_what_a_group_writes_is_stored_by_width(shape: ModelShape) -> None:
    wide = ModelShape(3, 12, 3, 4)
    wiring = Wiring.model_diffing([shape, wide, shape], layer=1)
    first, second, third = wiring.writes[0]
    assert wiring.write_blocks == ((0, (first, third)), (0, (second,)))
    clt = Wiring.strictly_causal(shape)
    assert clt.write_blocks == tuple(enumerate(clt.writes))


def test_wirings_survive_json(wiring: Wiring) -> None:
    assert Wiring.from_dict(json.loads(json.dumps(wiring.to_dict()))) == wiring


def test_causality_compares_reads_and_writes_on_the_timeline(shape: ModelShape) -> None:
    causal = [Wiring.per_layer(shape), Wiring.strictly_causal(shape), Wiring.weakly_causal(shape)]
    assert all(wiring.is_causal for wiring in causal)
    assert Wiring.autoencoder(shape).is_causal
    assert not Wiring.acausal(shape).is_causal
    assert Wiring.acausal(shape, layers=[1]).is_causal
    assert not Wiring.transcoder(shape, layer=1, read="mlp_in", write="attn_out").is_causal


A, B = Site(0, "resid_mid"), Site(0, "attn_z")


@pytest.mark.parametrize(
    ("reads", "writes", "message"),
    [
        ((), (), "at least one; got 0 and 0"),
        (((A,),), ((A,), (A,)), "at least one; got 1 and 2"),
        (((A,),), ((),), "group 0 writes no site"),
        (((A, A),), ((A,),), "group 0 reads a site twice: resid_mid.0, resid_mid.0"),
        (((A,),), ((Site(0, "mlp_out"),),), "no width given for site kind 'mlp_out', which group 0 writes"),
    ],
)
def test_bad_wirings_are_refused(
    reads: tuple[tuple[Site, ...], ...], writes: tuple[tuple[Site, ...], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Wiring("custom", reads, writes, {"resid_mid": 8, "attn_z": 10})


def test_bad_choices_are_refused(shape: ModelShape) -> None:
    with pytest.raises(ValueError, match="layer 3 does not exist: the model has layers 0 to 2"):
        Wiring.transcoder(shape, layer=3)
    with pytest.raises(ValueError, match="reads one of resid_mid, resid_pre, mlp_in, mlp_normalized; got 'mlp_out'"):
        Wiring.strictly_causal(shape, read="mlp_out")
    with pytest.raises(ValueError, match="reads is missing"):
        Wiring.from_dict({"name": "x"})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ModelShape(3, 16, 2, 5), "has width 8 at mlp_out, the model has 16"),
        (ModelShape(4, 8, 2, 5), "this strictly_causal crosscoder spans 3 layers, the model has 4"),
        (ModelShape(2, 8, 2, 5), "this strictly_causal crosscoder spans 3 layers, the model has 2"),
    ],
)
def test_other_models_are_refused(shape: ModelShape, other: ModelShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wiring.strictly_causal(shape).check_fits(other)


def test_one_transcoder_fits_a_deeper_model(shape: ModelShape) -> None:
    Wiring.transcoder(shape, layer=1).check_fits(ModelShape(9, 8, 2, 5))
