"""Predicted logits with the final norm live: exact where everything else is frozen, in every kind of final norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

import circuits
from circuits.attribution.grounding import Grounding
from circuits.graph.nodes import NodeKind
from circuits.validation.effects import Effects
from circuits.validation.final_norm import with_final_norm
from circuits.validation.prediction import predicted_changes, scaled_alone
from replacement import ReLU, ReplacementModel


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "neox"])
def test_logits_follow_the_final_norm_exactly(language_model: Any, architecture: str, total: bool) -> None:
    """ReLU features scaled up, patterns and inner norms frozen: held outputs directly, reacting features through all paths."""
    lm = language_model(architecture, torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, activation=ReLU()))
    graph = circuits.trace(model, tiny.random_tokens(), coverage=1.0)
    nodes, effects = graph.nodes, Effects(model, Grounding.of(model, graph))
    logits, features = (np.flatnonzero(nodes.mask(kind)) for kind in (NodeKind.LOGIT, NodeKind.FEATURE))
    changed = features[nodes.layer[features] == (nodes.layer[features].max() if total else 0)][:6]
    changes = scaled_alone(changed, 0.5)
    held_BN = predicted_changes(graph, changes, total=total)
    live_BN = with_final_norm(effects.grounding, changes, held_BN, total=total)
    effects.clean.norm_scales.pop("ln_final")  # all other norms stay frozen
    measured = effects.measure(changed, 1.5, "propagated" if total else "constrained", "frozen", norms="frozen")
    measured_BM = measured.change_BN[:, logits]
    np.testing.assert_allclose(live_BN[:, logits], measured_BM, atol=1e-5 * np.abs(measured_BM).max())
    assert np.abs(held_BN[:, logits] - measured_BM).max() > 0.01 * np.abs(measured_BM).max()
    np.testing.assert_array_equal(live_BN[:, features], held_BN[:, features])


def test_a_removed_token_takes_its_embedding_out_of_the_stream(language_model: Any) -> None:
    """What is left of the last stream without the last token is computed by hand."""
    lm = language_model("gpt2", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, activation=ReLU()))
    graph = circuits.trace(model, tiny.random_tokens(), coverage=1.0)
    grounding, nodes = Grounding.of(model, graph), graph.nodes
    last = int(nodes.position[nodes.mask(NodeKind.TOKEN)].max())
    token = int(np.flatnonzero(nodes.mask(NodeKind.TOKEN) & (nodes.position == last))[0])
    held_BN = predicted_changes(graph, [{token: -1.0}], total=False)
    live_BN = with_final_norm(grounding, [{token: -1.0}], held_BN, total=False)
    frozen, local = grounding.local.frozen, grounding.local
    without = frozen.token_embedding_TD.clone()
    without[last] = 0
    stream_D = local.streams()[-1][last]
    # Linear attention carries the embedding on: push it through the frozen layers with nothing else in the stream.
    push_TD = frozen.token_embedding_TD - without
    for attention in frozen.attentions:
        push_TD = push_TD + attention.mix(push_TD) @ attention.weights.W_O_XD
    scale = frozen.norm_final.scale_T[last]
    logits_N = np.flatnonzero(nodes.mask(NodeKind.LOGIT))
    changed_D = stream_D - push_TD[last]
    variance, changed_variance = (x_D.var(unbiased=False) for x_D in (stream_D, changed_D))
    new_scale = (scale**2 - variance + changed_variance).sqrt()
    for node, logit in zip(logits_N.tolist(), grounding.logits, strict=True):
        gain_D = frozen.norm_final.gain_TD[last] * scale
        before, after = (
            ((x_D - x_D.mean()) * gain_D / s) @ logit.direction_D
            for x_D, s in ((stream_D, scale), (changed_D, new_scale))
        )
        assert live_BN[0, node] == pytest.approx(float(after - before), rel=1e-5)
