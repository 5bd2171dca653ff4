"""The source columns of one prompt: everything that writes to the residual stream, numbered as in the node table.

    tokens             position
    learned positions  position                   (absent in models without them)
    errors             part, layer, position
    features           part, layer, position, index

Parts are the MLPs and, where a crosscoder writes attention outputs too, attention. Nodes of a full graph are these columns,
then logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.graph.nodes import NodeKind
from replacement import LocalReplacement


@dataclass(frozen=True, slots=True)
class Columns:
    """Where each kind of source begins: token `t` is column `t`, learned position `t` is `T + t`."""

    n_tokens: int
    learned_positions: bool
    error_columns: tuple[int, ...]
    """First error of each part; the error at (layer, position) is `layer T + position` further."""
    feature_columns: tuple[int, ...]
    """First feature of each part; its i-th active feature is i further."""
    n_columns: int
    """C."""

    @classmethod
    def of(cls, local: LocalReplacement) -> Columns:
        """The columns of one prompt."""
        T, learned = local.n_positions, local.frozen.position_embedding_TD is not None
        first = T * (1 + learned)
        errors, features = [], []
        for _ in local.decompositions:
            errors.append(first)
            first += local.shape.n_layers * T
        for part in local.decompositions:
            features.append(first)
            first += len(part.features)
        return cls(T, learned, tuple(errors), tuple(features), first)

    @property
    def features(self) -> slice:
        """Columns of all features."""
        return slice(self.feature_columns[0], self.n_columns)

    def split(self, feature_S: np.ndarray) -> list[np.ndarray]:
        """Numbers among all features as numbers into `Decomposition.features`, part by part; they rise, as given."""
        starts = [first - self.feature_columns[0] for first in self.feature_columns]
        ends = [*starts[1:], self.n_columns - self.feature_columns[0]]
        return [
            feature_S[(feature_S >= start) & (feature_S < end)] - start for start, end in zip(starts, ends, strict=True)
        ]


def source_table(local: LocalReplacement) -> dict[str, np.ndarray]:
    """Columns `kind`, `part`, `layer`, `position`, `index` and `activation` of the node table, for every source."""
    T, L = local.n_positions, local.shape.n_layers
    tokens, positions = local.frozen.tokens_T.cpu().numpy(), np.arange(T)
    blocks = [_block(NodeKind.TOKEN, positions, index=tokens)]
    if local.frozen.position_embedding_TD is not None:
        blocks.append(_block(NodeKind.POSITION, positions))
    for number, _ in enumerate(local.decompositions):
        layers = np.repeat(np.arange(L), T)
        blocks.append(_block(NodeKind.ERROR, np.tile(positions, L), part=number, layer=layers))
    for number, part in enumerate(local.decompositions):
        wiring, features = part.crosscoder.wiring, part.features.to(device="cpu")
        layers = np.array([wiring.group_layer(group) for group in range(wiring.n_groups)])
        blocks.append(
            _block(
                NodeKind.FEATURE,
                features.row.numpy(),
                part=number,
                layer=layers[features.group.numpy()],
                index=features.index.numpy(),
                activation=features.activation.float().numpy(),
            )
        )
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _block(
    kind: NodeKind,
    position: np.ndarray,
    *,
    part: int = 0,
    layer: np.ndarray | int = -1,
    index: np.ndarray | int = -1,
    activation: np.ndarray | float = 0.0,
) -> dict[str, np.ndarray]:
    columns: dict[str, Any] = {"kind": int(kind), "part": part, "layer": layer, "position": position}
    columns |= {"index": index, "activation": activation}
    return {name: np.broadcast_to(value, position.shape) for name, value in columns.items()}
