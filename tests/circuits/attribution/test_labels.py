"""Labels of features: only where they are shown, the same whenever they are made, and right by a slow oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

import circuits
from circuits.attribution import trace as tracing
from circuits.graph.nodes import NodeKind
from replacement import ReplacementModel, Wiring


def model_of(lm: Any, *, attention: bool = False, **options: Any) -> ReplacementModel:
    of_attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm, **options), attention_crosscoder=of_attention)


@pytest.mark.parametrize("attention", [False, True], ids=["linear", "features"])
def test_only_the_most_influential_features_are_labelled(
    language_model: Any, monkeypatch: pytest.MonkeyPatch, attention: bool
) -> None:
    model, tokens = model_of(language_model("llama"), attention=attention), tiny.random_tokens()
    monkeypatch.setattr(tracing, "LABELLED", 10**6)
    full = circuits.trace(model, tokens)
    features = full.nodes.mask(NodeKind.FEATURE)
    assert all(np.array(full.nodes.label, dtype=bool)[features])
    monkeypatch.setattr(tracing, "LABELLED", 9)
    graph = circuits.trace(model, tokens)
    labelled = np.array([bool(label) for label in graph.nodes.label]) & features
    assert labelled.sum() == 9 < features.sum()
    influence = np.where(features, graph.influence(), 0)
    assert influence[labelled].min() >= influence[features & ~labelled].max()
    assert all(label for label, feature in zip(graph.nodes.label, features, strict=True) if not feature)
    assert circuits.with_labels(model, graph).nodes.label == full.nodes.label
    assert circuits.with_labels(model, graph.prune()).nodes == full.prune().nodes


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_labels_are_those_of_a_slow_oracle(language_model: Any, architecture: str) -> None:
    """Every path is followed on its own, and every word compared on its own."""
    lm = language_model(architecture, torch.float64)
    model, tokens = model_of(lm), tiny.random_tokens(6)
    graph, local = circuits.with_labels(model, circuits.trace(model, tokens, coverage=1.0)), model.localize(tokens)
    labels = {
        (layer, position, index): label
        for kind, layer, position, index, label in zip(
            graph.nodes.kind, graph.nodes.layer, graph.nodes.position, graph.nodes.index, graph.nodes.label, strict=True
        )
        if kind == NodeKind.FEATURE
    }
    E, crosscoder, streams = lm.parts.bridge.W_E, local.crosscoder, local.streams()
    centred = torch.nn.functional.normalize(E - E.mean(0), dim=1)
    special = set(getattr(lm.tokenizer, "all_special_ids", None) or ())

    def words(scores_V: torch.Tensor) -> str:
        order = [token for token in scores_V.argsort(descending=True).tolist() if token not in special][:3]
        return ", ".join(text.strip() or repr(text) for text in lm.token_strings(order))

    checked = 0
    for group, position, index in zip(local.features.group, local.features.row, local.features.index, strict=True):
        layer = crosscoder.wiring.group_layer(int(group))
        if (layer, int(position), int(index)) not in labels:
            continue
        (site,) = crosscoder.wiring.reads[int(group)]
        v_D = crosscoder.encoder(int(group), site)[index]
        if site.kind == "mlp_in":
            v_D = local.frozen.norms_mlp[layer].pull_back(v_D[None], position[None])[0]
        paths = [(float(v_D @ streams[0][position]), v_D)]
        below = layer + (site.kind in ("mlp_in", "resid_mid") and not local.shape.parallel)
        for lower in range(below):
            attention = local.frozen.attentions[lower]
            for head in range(local.shape.n_heads):
                rows = slice(head * local.shape.d_head, (head + 1) * local.shape.d_head)
                u_D = v_D @ attention.weights.W_O_XD[rows].T @ attention.weights.W_V_XD[rows]
                paths.append((float(attention.kernel_HTT[head, position] @ (streams[lower] @ u_D)), u_D))
        _, read_D = max(paths, key=lambda path: path[0])
        written_D = sum(crosscoder.decoder(int(group), write)[index] for write in crosscoder.wiring.writes[int(group)])
        norm = lm.parts.norm_weights("ln_final")
        normed_D = (written_D - written_D.mean() if norm.centred else written_D) * norm.weight_D
        expected = f"~ {words(centred @ read_D)} → {words(normed_D @ local.W_U)}"
        assert labels[layer, int(position), int(index)] == expected
        checked += 1
    assert checked > 20
