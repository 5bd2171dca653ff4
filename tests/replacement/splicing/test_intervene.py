"""Interventions: exact in the frozen linear model, by hand where the last layer is changed, and while generating."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from replacement import (
    Intervention,
    JointTopK,
    JumpReLU,
    LocalReplacement,
    ReplacementModel,
    Site,
    TopK,
    UnknownFeatureError,
    Wiring,
    swap,
)
from replacement.crosscoder.activation import Activation

FROZEN = {"patterns": "frozen", "norms": "frozen"}


def model_of(lm: Any, **options: Any) -> ReplacementModel:
    """A replacement model with a random crosscoder."""
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options))


def three_changes(local: LocalReplacement, wiring: Any) -> tuple[list[Intervention], Tensor]:
    """One feature set, one scaled, one added to, in different layers; and all activations after that."""
    activation_S = local.features.activation.clone()
    interventions = []
    groups = range(wiring.n_groups)
    for how, group in zip(
        ({"activation": 0.7}, {"scale": -1.5}, {"add": 0.4}), [*groups, *groups, *groups], strict=False
    ):
        number = int(torch.nonzero(local.features.group == group)[4 + 3 * len(interventions), 0])
        place = {
            "layer": group,
            "position": int(local.features.row[number]),
            "index": int(local.features.index[number]),
        }
        interventions.append(Intervention(**place, **how))
        multiple, constant = interventions[-1].terms
        activation_S[number] = multiple * activation_S[number] + constant
    return interventions, activation_S


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_change_as_the_local_linear_model_says(language_model: Any, architecture: str, skip: bool) -> None:
    lm = language_model(architecture, torch.float64)
    model = model_of(lm, skip=skip)
    local = model.localize(tiny.random_tokens())
    interventions, activation_S = three_changes(local, model.crosscoder.wiring)
    layers = range(lm.shape.n_layers)
    for mlps in ("replaced", "original"):  # all are held: nobody computes them
        found = model.intervene(tiny.random_tokens(), interventions, constrained_layers=layers, mlps=mlps, **FROZEN)
        expected = lm.parts.soft_cap(local.logits(activation_S))
        torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.clean_logits, lm(tiny.random_tokens()), rtol=0, atol=1e-9)
    assert float((found.logits - found.clean_logits).abs().max()) > 1e-2
    live = model.intervene(tiny.random_tokens(), interventions, constrained_layers=layers)
    assert float((live.logits - found.logits).abs().max()) > 1e-6  # norms and patterns do react


@pytest.mark.parametrize("activation", [JumpReLU(), TopK(30, relu=False)], ids=str)
def test_negative_activations_are_changed_like_others(language_model: Any, activation: Activation) -> None:
    lm, tokens = language_model("gpt2", torch.float64), tiny.random_tokens()
    crosscoder = tiny.crosscoder_for(lm, activation=activation)
    if crosscoder.threshold is not None:
        crosscoder.threshold.data.fill_(-0.7)
    model = ReplacementModel(lm, crosscoder)
    local = model.localize(tokens)
    negative_S = torch.nonzero(local.features.activation < 0)[:, 0]
    number = int(negative_S[0])
    place = [int(column[number]) for column in (local.features.group, local.features.index, local.features.row)]
    change = Intervention(layer=place[0], index=place[1], position=place[2], scale=3.0)
    activation_S = local.features.activation.clone()
    activation_S[number] *= 3
    found = model.intervene(tokens, [change], constrained_layers=range(3), **FROZEN)
    torch.testing.assert_close(found.logits, local.logits(activation_S), rtol=0, atol=1e-9)
    torch.testing.assert_close(model(tokens, errors="keep"), lm(tokens), rtol=0, atol=1e-9)
    dense = {site: local.frozen.activations[site] for site in crosscoder.wiring.read_sites}
    for group in range(crosscoder.n_groups):
        pre_TF = crosscoder.pre_activations(dense, group)
        floor_T1 = -0.7 if crosscoder.threshold is not None else pre_TF.topk(30).values.amin(1, keepdim=True) - 1e-12
        torch.testing.assert_close(local.features.dense(group), pre_TF * (pre_TF > floor_T1))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox"])
def test_logits_change_so_too_where_the_norm_is_read_before_its_gain(language_model: Any, architecture: str) -> None:
    lm, tokens = language_model(architecture, torch.float64), tiny.random_tokens()
    model = model_of(lm, wiring=Wiring.strictly_causal(lm, read="mlp_normalized"), skip=True)
    local = model.localize(tokens)
    interventions, activation_S = three_changes(local, model.crosscoder.wiring)
    found = model.intervene(tokens, interventions, constrained_layers=range(3), **FROZEN)
    expected = lm.parts.soft_cap(local.logits(activation_S))
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-9)
    assert float((found.logits - found.clean_logits).abs().max()) > 1e-2


def test_skip_terms_that_read_behind_a_layer_follow_too(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    reads = tuple((Site(layer, "resid_post"),) for layer in (0, 1))
    writes = tuple((Site(layer, "mlp_out"),) for layer in (1, 2))
    width = lm.shape.d_model
    wiring = Wiring("by hand", reads, writes, {"resid_post": width, "mlp_out": width})
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=wiring, skip=True))
    local = model.localize(tiny.random_tokens())
    interventions, activation_S = three_changes(local, wiring)
    found = model.intervene(tiny.random_tokens(), interventions, constrained_layers=range(3), **FROZEN)
    torch.testing.assert_close(found.logits, local.logits(activation_S), rtol=0, atol=1e-9)
    assert float((found.logits - found.clean_logits).abs().max()) > 1e-3


def test_the_same_where_attention_has_features_too(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm))
    model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=attention)
    local = model.localize(tiny.random_tokens())
    interventions, activation_S = three_changes(local, model.crosscoder.wiring)
    found = model.intervene(tiny.random_tokens(), interventions, constrained_layers=range(3), **FROZEN)
    torch.testing.assert_close(found.logits, local.logits(activation_S), rtol=0, atol=1e-9)
    assert found.attention_features is not None
    assert local.attention is not None
    head = local.attention.features
    off = [
        Intervention(layer=2, index=int(index), position=int(row), scale=0.0, part="attention")
        for group, row, index in zip(head.group, head.row, head.index, strict=True)
        if group == 2
    ]
    vectors = {site: attention.decode_contribution(head.of(2), groups=[2])[site] for site in [Site(2, "attn_out")]}
    expected = lm.run(tiny.random_tokens(), {site: lambda x, y=y: x - y for site, y in vectors.items()})
    held = model.intervene(tiny.random_tokens(), off, constrained_layers=[0, 1], mlps="original")
    torch.testing.assert_close(held.logits, lm(tiny.random_tokens()), rtol=0, atol=1e-9)  # writes behind the range only
    found = model.intervene(tiny.random_tokens(), off, mlps="original")
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-9)
    assert found.attention_features is not None
    assert not len(found.attention_features.of(2))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "neox"])
def test_own_mlps_are_steered(language_model: Any, architecture: str) -> None:
    """Hand-written: the decoder vectors times the change are added to the outputs, and everything reacts."""
    lm = language_model(architecture, torch.float64)
    model, tokens = model_of(lm), tiny.random_tokens()
    first = model.localize(tokens).features.of(1).select(slice(12, 13))
    position, index = int(first.row), int(first.index)
    vectors = {
        site: model.crosscoder.decoder(1, site)[index] * first.activation for site in model.crosscoder.wiring.writes[1]
    }

    def steer(layers: tuple[int, ...]) -> Tensor:
        clean = lm.read(tokens, [Site(layer, "mlp_out") for layer in range(3)])

        def hook(x: Tensor, site: Site) -> Tensor:
            x = clean[site][None].clone() if site.layer in (held or ()) else x.clone()
            if site in vectors and site.layer in layers:
                x[0, position] += vectors[site]
            return x

        return lm.run(tokens, {site: (lambda x, site=site: hook(x, site)) for site in clean})

    double = Intervention(layer=1, index=index, position=position, scale=2.0)
    for held, layers in ((None, (1, 2)), ([0, 1], (1,))):
        found = model.intervene(tokens, [double], mlps="original", constrained_layers=held)
        torch.testing.assert_close(found.logits, steer(layers), rtol=0, atol=1e-9)


def test_propagated_with_errors_equals_the_replacement_model(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model, tokens = model_of(lm, undecomposed_positions=1), tiny.random_tokens()
    on = [Intervention(layer=0, index=3, position=4, activation=2.0)]
    for errors in ("keep", "drop"):
        for patterns in ("live", "frozen"):
            found = model.intervene(tokens, on, errors=errors, patterns=patterns)
            expected = model(tokens, interventions=on, errors=errors, patterns=patterns)
            torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-11)
            clean = model(tokens, errors=errors, patterns=patterns)
            torch.testing.assert_close(found.clean_logits, clean, rtol=0, atol=1e-11)
    at = (found.features.group == 0) & (found.features.row == 4) & (found.features.index == 3)
    assert found.features.activation[at].tolist() == [2.0]


def test_a_feature_can_be_changed_everywhere_also_while_generating(language_model: Any) -> None:
    lm = language_model("llama", torch.float64)
    model, tokens = model_of(lm, undecomposed_positions=1), tiny.random_tokens(6)
    steer = [Intervention(layer=1, index=7, position=None, add=3.0)]
    found = model.intervene(tokens, steer, generate=3)
    assert found.tokens.shape == (9,)
    assert torch.equal(found.tokens[:6], tokens)
    assert found.logits.shape == found.clean_logits.shape == (9, 97)
    for length in range(6, 9):  # every new token is the best one of a single pass over those before
        every = [Intervention(layer=1, index=7, position=p, add=3.0) for p in range(1, length)]
        single = model.intervene(found.tokens[:length], every)
        assert int(single.logits[-1].argmax()) == int(found.tokens[length])
        torch.testing.assert_close(found.logits[:length], single.logits, rtol=0, atol=1e-9)
    changed = found.features.select((found.features.group == 1) & (found.features.index == 7))
    assert changed.row.tolist() == list(range(1, 9))
    plain = lm(tokens)
    assert int(model.intervene(tokens, [], generate=1).tokens[-1]) == int(plain[-1].argmax())


def test_swap_exchanges_activations(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model, tokens = model_of(lm), tiny.random_tokens()
    local = model.localize(tokens)
    features, active = local.features, local.features.of(0)
    index, position = int(active.index[3]), int(active.row[3])
    known = features.index[(features.group == 2) & (features.row == 5)].tolist()
    inactive = next(i for i in range(48) if i not in known)
    changed = model.intervene(tokens, swap(local, (0, index, position), (2, inactive, 5))).features
    at_first = (changed.group == 0) & (changed.row == position) & (changed.index == index)
    at_second = (changed.group == 2) & (changed.row == 5) & (changed.index == inactive)
    assert not at_first.any()
    assert changed.activation[at_second].tolist() == [float(active.activation[3])]


def test_layers_name_features_of_a_single_transcoder_and_positions_count_from_the_end(language_model: Any) -> None:
    """The only group of a transcoder of layer 1 has number 0: interventions speak of the layer."""
    lm = language_model("gpt2", torch.float64)
    model, tokens = model_of(lm, wiring=Wiring.transcoder(lm, layer=1)), tiny.random_tokens()
    from_start, from_end = (
        model.intervene(tokens, [Intervention(layer=1, index=3, position=position, activation=2.0)]).logits
        for position in (9, -1)
    )
    assert torch.equal(from_start, from_end)
    assert float((from_start - lm(tokens)).abs().max()) > 1e-3
    with pytest.raises(UnknownFeatureError, match="layer 0: the crosscoder has features in layers 1"):
        model.intervene(tokens, [Intervention(layer=0, index=3, position=9, activation=2.0)])
    with pytest.raises(UnknownFeatureError, match="position -11: expected 0 to 9"):
        model.intervene(tokens, [Intervention(layer=1, index=3, position=-11, activation=2.0)])


def test_text_prompts_and_layers_without_a_crosscoder(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    model = model_of(lm, wiring=Wiring.transcoder(lm, layer=1))
    found = model.intervene("w5 w6 w7", [], constrained_layers=range(3), **FROZEN)
    torch.testing.assert_close(found.logits, lm(lm.tokenize("w5 w6 w7")), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"layer": 3}, "layer 3: the crosscoder has features in layers 0, 1, 2"),
        ({"position": 10}, "position 10: expected 1 to 9"),
        ({"position": 0}, "position 0: expected 1 to 9"),
        ({"index": 48}, "index 48: expected 0 to 47"),
    ],
)
def test_features_that_do_not_exist(language_model: Any, place: dict[str, int], message: str) -> None:
    model = model_of(language_model("gpt2"), undecomposed_positions=1)
    one = Intervention(**{"layer": 0, "position": 2, "index": 1, **place}, activation=1.0)
    for run in (model.intervene, lambda tokens, given: model(tokens, interventions=given)):
        with pytest.raises(UnknownFeatureError, match=message):
            run(tiny.random_tokens(), [one])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": "add"}, "errors must be 'drop' or 'keep', got 'add'"),
        ({"patterns": "held"}, "patterns must be 'live' or 'frozen', got 'held'"),
        ({"norms": "held"}, "norms must be 'live', 'frozen' or 'final', got 'held'"),
        ({"mlps": "none"}, "mlps must be 'replaced' or 'original', got 'none'"),
        ({"constrained_layers": [1, 3]}, "constrained_layers holds 3: the model has layers 0 to 2"),
        ({"generate": 23}, "generate must be 0 to 22 after 10 tokens, got 23"),
        (
            {"interventions": [Intervention(layer=0, index=1, position=1, scale=float("inf"))]},
            "scale=inf is not a finite number",
        ),
        (
            {
                "interventions": [
                    Intervention(layer=0, index=1, position=1, scale=0.0),
                    Intervention(layer=0, index=1, position=None, add=1.0),
                ]
            },
            "set the same feature",
        ),
        (
            {"interventions": [Intervention(layer=0, index=1, position=1, scale=0.0, part="attention")]},
            "a feature of attention, which is not replaced",
        ),
    ],
)
def test_bad_options(language_model: Any, options: dict[str, Any], message: str) -> None:
    model = model_of(language_model("gpt2"))
    with pytest.raises(ValueError, match=message):
        model.intervene(tiny.random_tokens(), options.pop("interventions", []), **options)


def test_an_intervention_changes_a_feature_in_exactly_one_way() -> None:
    with pytest.raises(ValueError, match="exactly one of activation, scale and add, got none"):
        Intervention(layer=0, index=0, position=0)
    with pytest.raises(ValueError, match="exactly one of activation, scale and add, got activation, scale"):
        Intervention(layer=0, index=0, position=0, activation=1.0, scale=2.0)
    with pytest.raises(ValueError, match="part of an intervention must be 'mlp' or 'attention', got 'heads'"):
        Intervention(layer=0, index=0, position=0, add=1.0, part="heads")


@pytest.mark.parametrize("activation", [TopK(5), JointTopK(15)], ids=str)
def test_clean_reads_do_not_react(language_model: Any, activation: Activation) -> None:
    """By hand: what the changed feature writes is added to the clean outputs, and only attention and norms react."""
    lm, tokens = language_model("gpt2", torch.float64), tiny.random_tokens()
    model = model_of(lm, activation=activation)
    first = model.localize(tokens).features.of(1).select(slice(7, 8))
    index, position = int(first.index), int(first.row)
    off = Intervention(layer=1, index=index, position=position, scale=0.0)
    outputs = lm.read(tokens, [Site(layer, "mlp_out") for layer in range(3)])
    for site in model.crosscoder.wiring.writes[1]:
        outputs[site][position] -= model.crosscoder.decoder(1, site)[index] * first.activation
    expected = lm.run(tokens, {site: lambda x, y=y: y[None] for site, y in outputs.items()})
    found = model.intervene(tokens, [off], reads="clean")
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-9)
    assert len(found.features) == len(found.clean_features) - 1
    if isinstance(activation, JointTopK):
        with pytest.raises(ValueError, match="spliced with reads='clean' only"):
            model.intervene(tokens, [off])
