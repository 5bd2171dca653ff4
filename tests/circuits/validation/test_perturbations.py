"""Perturbed streams: the local replacement model and the original, each against a loop written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import circuits
from circuits.attribution.grounding import Grounding
from circuits.validation import perturbations
from circuits.validation.effects import sample_features
from circuits.validation.perturbations import Perturbation, compare_perturbations
from replacement import ReLU, ReplacementModel, Site, Wiring
from replacement.splicing.clean_run import Conditions


def traced(lm: Any, *, wiring: Wiring | None = None, **options: Any) -> tuple[ReplacementModel, Grounding]:
    """A random replacement model with ReLU features, and the full graph of a random prompt."""
    wiring = wiring or Wiring.strictly_causal(lm, **options)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=wiring, activation=ReLU()))
    return model, Grounding.of(model, circuits.trace(model, tiny.random_tokens(), coverage=1.0))


def drawn(model: ReplacementModel, grounding: Grounding) -> list[Perturbation]:
    return perturbations._perturbations(model, grounding, sample_features(grounding, 8, seed=0), seed=0)


def local_streams(model: ReplacementModel, grounding: Grounding, given: Perturbation | None) -> dict[int, Tensor]:
    """The stream at every depth of a sequential model, layer by layer: frozen attention and norms, reacting features."""
    local, crosscoder = grounding.local, model.crosscoder
    frozen = local.frozen
    x_TD = frozen.token_embedding_TD + (0 if frozen.position_embedding_TD is None else frozen.position_embedding_TD)
    written: dict[int, Tensor] = {}
    seen = {}

    def at(depth: int, x_TD: Tensor) -> Tensor:
        if given is not None and given.depth == depth:
            x_TD = x_TD.index_add(0, torch.tensor([given.position]), given.vector_D[None])
        seen[depth] = x_TD
        return x_TD

    for layer, attention in enumerate(frozen.attentions):
        x_TD = at(2 * layer, x_TD)
        x_TD = at(2 * layer + 1, x_TD + attention.apply(x_TD))
        if not crosscoder.wiring.writers(Site(layer, "mlp_out")):
            x_TD = x_TD + local.mlp.errors_LTD[layer]  # the whole output
            continue
        group = [reads[0].layer for reads in crosscoder.wiring.reads].index(layer)
        (site,) = crosscoder.wiring.reads[group]
        read_TD = frozen.norms_mlp[layer].apply(x_TD) if site.kind == "mlp_in" else x_TD
        acts_TF = torch.relu(read_TD @ crosscoder.encoder(group, site).T + crosscoder.b_enc[group])
        for write in crosscoder.wiring.writes[group]:
            y_TD = acts_TF @ crosscoder.decoder(group, write)
            written[write.layer] = written.get(write.layer, 0) + y_TD
        x_TD = x_TD + written[layer] + crosscoder.decoder_bias(Site(layer, "mlp_out")) + local.mlp.errors_LTD[layer]
    at(2 * len(frozen.attentions), x_TD)
    return seen


@pytest.mark.parametrize("read", ["resid_mid", "mlp_in", "one layer"])
def test_the_local_replacement_model_reacts_as_a_loop_over_its_layers(language_model: Any, read: str) -> None:
    """Layers that the crosscoder does not write are errors, and stay."""
    lm = language_model("gpt2", torch.float64)
    alone = read == "one layer"
    model, grounding = traced(lm, wiring=Wiring.transcoder(lm, layer=1)) if alone else traced(lm, read=read)
    streams = perturbations._Streams(model, grounding, Conditions(patterns="frozen", norms="frozen"), local=True)
    chosen = drawn(model, grounding)
    assert {each.kind for each in chosen} == {"encoder", "random", "upstream"}
    clean = local_streams(model, grounding, None)
    for each, found in zip(chosen, streams.changes(chosen), strict=True):
        after = local_streams(model, grounding, each)
        assert set(found) == set(range(each.depth + 1, 7))
        for depth, change_TD in found.items():
            torch.testing.assert_close(change_TD, after[depth] - clean[depth], rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_the_original_reacts_as_one_run_with_the_vector_added(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    model, grounding = traced(lm)
    streams = perturbations._Streams(model, grounding, Conditions(mlps="original"))
    chosen, tokens = drawn(model, grounding), tiny.random_tokens()
    end = Site(lm.shape.n_layers - 1, "resid_post")
    for each, found in zip(chosen, streams.changes(chosen), strict=True):
        layer, middle = divmod(each.depth, 2)

        def add(x_BTD: Tensor, each: Perturbation = each) -> Tensor:
            return x_BTD.index_add(1, torch.tensor([each.position]), each.vector_D[None, None])

        seen: dict[str, Tensor] = {}
        site = Site(layer, "resid_mid" if middle else "resid_pre")
        lm.run(tokens, {site: add, end: lambda x_BTD, seen=seen: seen.update(end=x_BTD)})
        expected_TD = seen["end"][0] - lm.read(tokens, [end])[end]
        torch.testing.assert_close(found[2 * lm.shape.n_layers], expected_TD, rtol=0, atol=1e-9)


def test_what_is_added(language_model: Any) -> None:
    """`encoder` raises the feature by a tenth; `random` is as long; `upstream` takes away what the feature wrote."""
    lm = language_model("gpt2", torch.float64)
    model, grounding = traced(lm, read="mlp_in")
    changed = sample_features(grounding, 8, seed=0)
    chosen = drawn(model, grounding)
    encoder, random = (
        [each for each in chosen if each.kind == kind and each.depth % 2] for kind in ("encoder", "random")
    )
    features, crosscoder, frozen = grounding.local.features, model.crosscoder, grounding.local.frozen
    (_, numbers_S), *_ = grounding.feature_numbers(changed)
    for number, one, other in zip(numbers_S.tolist(), encoder, random, strict=True):
        layer, position, index = (int(x[number]) for x in (features.group, features.row, features.index))
        norm, vector_D = frozen.norms_mlp[layer], crosscoder.encoder(layer, Site(layer, "mlp_in"))[index]
        both_2D = torch.stack([torch.zeros_like(one.vector_D), one.vector_D])
        moved_2D = torch.stack([norm.apply(x.expand(10, -1))[position] for x in both_2D])
        rise = float(vector_D @ (moved_2D[1] - moved_2D[0]))
        assert rise == pytest.approx(0.1 * float(features.activation[number]))
        assert float(other.vector_D.norm()) == pytest.approx(float(one.vector_D.norm()))
    upstream = [each for each in chosen if each.kind == "upstream"]
    known = [number for number in numbers_S.tolist() if int(features.group[number]) < 2]
    for number, one in zip(known, upstream, strict=True):
        layer, index = int(features.group[number]), int(features.index[number])
        written_D = features.activation[number] * crosscoder.decoder(layer, Site(layer, "mlp_out"))[index]
        torch.testing.assert_close(one.vector_D, -written_D)
        assert one.depth == 2 * layer + 3


def test_rows(language_model: Any) -> None:
    model, grounding = traced(language_model("gpt2", torch.float64))
    rows = compare_perturbations(model, grounding, sample_features(grounding, 8, seed=0), seed=0)
    assert [row["patterns"] for row in rows] == sorted(row["patterns"] for row in rows)  # frozen before live
    for row in rows:
        assert -1 <= row["cosine_added"] <= 1
        assert -1 <= row["cosine"] <= 1
        assert row["nmse"] >= 0
    assert compare_perturbations(model, grounding, np.zeros(0, dtype=int), seed=0) == []
