"""Readable names of features: a scored label of a feature index where there is one, else a hint of what they read and promote.

Hints are made for one prompt (`hints.py`). Labels are short, `LONGEST` characters at most. What else is known of them is the
graph's `metadata["feature_labels"]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.attribution.hints import LONGEST, Hints
from circuits.attribution.targets import LogitTarget
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.feature_labels import FEATURE_LABELS, HINT, feature_key
from circuits.graph.nodes import NodeKind
from circuits.graph.text import shorten
from replacement import Decomposition, LocalReplacement, ReplacementModel
from replacement.index.records import UNCLEAR, Label
from replacement.index.store import ATTENTION_FILE_NAME, FILE_NAME, FeatureIndex
from replacement.loading import DEMO, crosscoder_folder
from replacement.number_checks import whole_number
from replacement.token_texts import visible

Indexes = FeatureIndex | Sequence[FeatureIndex] | None
"""An index of the MLPs' crosscoder or of attention's, or both; None for those beside the crosscoders' weights."""


@contextmanager
def open_indexes(model: ReplacementModel, given: Indexes = None) -> Iterator[dict[str, FeatureIndex]]:
    """The feature index of each part that has one, by default those in the folders that the crosscoders were loaded from.

    Raises:
        ValueError: an index of another crosscoder, or two of one.
    """
    indexes: dict[str, FeatureIndex] = {}
    with ExitStack() as opened:
        if given is None:
            for part, file in _files(model).items():
                if file.is_file():
                    found = FeatureIndex.open(file, crosscoder=model.crosscoders[part])
                    indexes[part] = opened.enter_context(found)
        parts = {crosscoder.fingerprint: part for part, crosscoder in model.crosscoders.items()}
        for index in [given] if isinstance(given, FeatureIndex) else given or ():
            part = parts.get(index.facts["crosscoder_fingerprint"], "")
            if not part or part in indexes:
                which = "the same crosscoder as another index" if part else "another crosscoder than the model's"
                raise ValueError(f"index: {index.path} is of {which}")
            indexes[part] = index
        yield indexes


def _files(model: ReplacementModel) -> dict[str, Path]:
    """Where the indexes are in the local folders that the crosscoders were loaded from, by part."""
    loaded, names = model.loaded_from or {}, {"mlp": "crosscoder", "attention": "attention_crosscoder"}
    given = {part: loaded[name] for part, name in names.items() if name in loaded}
    files = {
        part: crosscoder_folder(place, shipped=names[part]) / FILE_NAME
        for part, place in given.items()
        if place == DEMO or Path(place).is_dir()
    }
    if "mlp" in files and set(model.crosscoders) - set(given):  # both parts are those of a joint crosscoder
        files["attention"] = files["mlp"].with_name(ATTENTION_FILE_NAME)
    return files


@torch.no_grad()
def with_labels(
    model: ReplacementModel, graph: CircuitGraph, *, most: int | None = None, index: Indexes = None
) -> CircuitGraph:
    """The graph with a label on every feature, or on its most influential ones.

    `trace` labels the most influential features alone, because a hint costs a comparison with the whole vocabulary.

    Args:
        model: the one that the graph was traced with.
        graph: full or pruned.
        most: label at most this many of the most influential features; labels that the graph has stay, but for hints where an
            index is given.
        index: feature indexes of the model's crosscoders, whose labels are used where they are not `unclear`. By default those
            in the folders that the crosscoders were loaded from; `()` for hints alone.

    Raises:
        ValueError: the graph was traced with another model or crosscoder, or an index of another crosscoder.

    >>> circuit = with_labels(model, graph.prune(nodes=0.95))  # doctest: +SKIP
    """
    features = graph.nodes.mask(NodeKind.FEATURE)
    if most is not None and whole_number("most", most) < features.sum():
        features = most_influential(graph.influence(), features, most)
    unnamed = [not label or (bool(index) and label.startswith(HINT)) for label in graph.nodes.label]
    missing = np.flatnonzero(features & np.array(unnamed, dtype=bool))
    if not len(missing):
        return graph
    grounding, label = Grounding.of(model, graph), np.array(graph.nodes.label, dtype=object)
    with open_indexes(model, index) as indexes:
        made = FeatureLabels(model, grounding.local, indexes)
        for part, (places, numbers_S) in zip(
            grounding.local.decompositions, grounding.feature_numbers(missing), strict=True
        ):
            label[missing[places]] = made.labels(part, numbers_S)
    facts = {**graph.metadata, FEATURE_LABELS: {**graph.metadata.get(FEATURE_LABELS, {}), **made.facts}}
    return replace(graph, nodes=replace(graph.nodes, label=tuple(label)), metadata=facts)


def node_labels(
    made: FeatureLabels,
    logits: Sequence[LogitTarget],
    columns: Mapping[str, np.ndarray],
    kept: np.ndarray,
    shown: np.ndarray | None = None,
) -> list[str]:
    """Readable text of every kept node.

    Args:
        made: what makes the labels of features.
        columns: the node table's `kind`, `part`, `layer` and `position` for all nodes.
        kept: bool[N].
        shown: bool[N], features that get a label; all by default. The labels of the others are empty.
    """
    local = made.local
    strings = made.model.language_model.prompt_strings(local.frozen.tokens_T.tolist())
    label = np.full(len(kept), "", dtype=object)
    of_kind = {kind: np.flatnonzero(columns["kind"] == kind) for kind in NodeKind}
    label[of_kind[NodeKind.TOKEN]] = list(map(visible, strings))
    label[of_kind[NodeKind.POSITION]] = [f"position {t}" for t in columns["position"][of_kind[NodeKind.POSITION]]]
    errors = of_kind[NodeKind.ERROR]
    parts = ["attention error" if part else "error" for part in columns["part"][errors]]
    label[errors] = [f"{part} in layer {layer}" for part, layer in zip(parts, columns["layer"][errors], strict=True)]
    label[of_kind[NodeKind.LOGIT]] = [visible(logit.label) for logit in logits]
    first = int(errors[-1]) + 1  # features follow errors
    for part in local.decompositions:
        here = slice(first, first + len(part.features))
        numbers = np.flatnonzero(kept[here] if shown is None else kept[here] & shown[here])
        label[first + numbers] = made.labels(part, torch.from_numpy(numbers).to(local.device))
        first = here.stop
    return label[kept].tolist()


def most_influential(influence: np.ndarray, among: np.ndarray, most: int) -> np.ndarray:
    """bool[N], at most `most` nodes of the largest influence among some."""
    chosen = np.zeros(len(influence), dtype=bool)
    chosen[np.argsort(-np.where(among, influence, -1.0), kind="stable")[:most]] = True
    return chosen & among


class FeatureLabels:
    """Makes the labels of one prompt's features.

    Attributes:
        facts: what is known of the labels made so far, by feature: `source` (`hint`, or that of an index's label), `precision`,
            `recall` and `f1` where it was scored, and `text` where the label was too long.
    """

    def __init__(
        self,
        model: ReplacementModel,
        local: LocalReplacement,
        indexes: Mapping[str, FeatureIndex] = MappingProxyType({}),
    ) -> None:
        self.model, self.local, self._indexes = model, local, indexes
        self._hints = Hints(model, local)
        self.facts: dict[str, dict[str, Any]] = {}

    def labels(self, part: Decomposition, chosen_S: Tensor) -> list[str]:
        """Labels of some active features.

        Args:
            part: the decomposition that they are of.
            chosen_S: numbers into `part.features`.
        """
        if not len(chosen_S):
            return []
        wiring, name = part.crosscoder.wiring, "attention" if part.kind == "attn_out" else "mlp"
        groups, index_S = part.features.group[chosen_S].tolist(), part.features.index[chosen_S].tolist()
        features = [(wiring.group_layer(group), index) for group, index in zip(groups, index_S, strict=True)]
        known = self._indexes[name].labels(set(features)) if name in self._indexes else {}
        labels = {feature: label for feature, label in known.items() if label.text != UNCLEAR}
        unknown = [place for place, feature in enumerate(features) if feature not in labels]
        hints = dict(zip(unknown, self._hints.of(part, chosen_S[unknown]), strict=True))
        texts = []
        for place, feature in enumerate(features):
            label = labels.get(feature)
            text = hints[place] if label is None else label.text
            facts = {"source": "hint"} if label is None else _facts(label)
            self.facts[feature_key(name, *feature)] = facts | ({"text": text} if len(text) > LONGEST else {})
            texts.append(shorten(text, LONGEST))
        return texts


def _facts(label: Label) -> dict[str, Any]:
    scores = {name: getattr(label, name) for name in ("precision", "recall", "f1")}
    return {"source": label.source, **{name: score for name, score in scores.items() if score is not None}}
