"""Graphs remember which crosscoder they were traced with, in the form of this version or of earlier ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tiny import crosscoder_for, random_tokens

from circuits import trace
from circuits.attribution.grounding import Grounding
from replacement import Crosscoder, ReplacementModel, TopK


def test_graphs_of_earlier_versions_are_recognised(language_model: Any) -> None:
    lm = language_model("native")
    model = ReplacementModel(lm, crosscoder_for(lm))
    graph = trace(model, random_tokens(4))
    assert graph.metadata["crosscoder_fingerprint"] == model.crosscoder.fingerprint
    legacy = model.crosscoder.legacy_fingerprint
    old = dataclasses.replace(graph, metadata={**graph.metadata, "crosscoder_fingerprint": legacy})
    for accepted in (graph, old):
        Grounding.of(model, accepted)


def test_another_number_of_features_kept_is_another_crosscoder(language_model: Any) -> None:
    lm = language_model("native")
    crosscoder = crosscoder_for(lm)
    graph = trace(ReplacementModel(lm, crosscoder), random_tokens(4))
    other = Crosscoder.like(crosscoder, activation=TopK(7))
    other.load_state_dict(crosscoder.state_dict())
    with pytest.raises(ValueError, match="traced with another crosscoder: its weights"):
        Grounding.of(ReplacementModel(lm, other), graph)
