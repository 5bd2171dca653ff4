"""Why a head attends: the score of one key at one query as an exact sum over pairs of nodes.

With norm scales frozen, query and key are linear in the nodes below their layer, so the score is bilinear:

    score(q, k) = scale (R_q query(x_q)) . (R_k key(x_k)) = sum_{n, m} Q_n . K_m

`Q_n` is what node n puts into the scaled and rotated query, `K_m` what node m puts into the rotated key, along all paths
through lower attention layers whose patterns are frozen. Nodes are tokens, learned positions, errors and features; each
side has one more entry, last, for all constants. The K channels of a query are K targets of the same transport that
attributes features.

The query-key groups of low-rank sparse attention (`Lorsa`) have scores of the same form.

Frozen are the scales of all norms, also of those of queries and keys (Gemma 3, Qwen 3). The score is the one before a
soft-cap (Gemma 2). Softmax only sees differences between keys: a contrast subtracts the score at another key, or the mean
over the other visible keys, and what all keys share cancels. N query nodes, M key nodes.

Source: Kamath, Ameisen et al. 2025, Tracing Attention Computation Through Feature Interactions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.columns import source_table
from circuits.attribution.direct_effects import Transport
from circuits.attribution.direct_effects_with_attention import ResidualTransport
from circuits.attribution.identity import check_identity
from circuits.attribution.labels import FeatureLabels, node_labels, open_indexes
from circuits.attribution.readers import Targets
from circuits.attribution.targets import check_model, check_position
from circuits.graph.nodes import NodeKind
from circuits.heads.qk_result import QKAttribution, SourceNode, summed_magnitudes
from replacement import ReplacementModel
from replacement.language_model.prompts import Prompt
from replacement.language_model.queries_and_keys import FrozenQueryKey
from replacement.number_checks import integer
from replacement.splicing.intervention import PARTS
from replacement.splicing.lorsa_scores import freeze_query_key_groups
from replacement.splicing.splice_options import check_choice

Read = Callable[[int, int], tuple[Tensor, Tensor]]
"""Of a head and a position: how its query or key reads the stream, `[K, D]`, and its constant, `[K]`."""
NUMBERS_AT_ONCE = 2**24
"""Effects held at once: channels x positions x sources (128 MiB in float64)."""


class QKAttributor:
    """Attributes attention scores of one prompt; what they share is made once."""

    def __init__(self, model: ReplacementModel, prompt: Prompt) -> None:
        """Freeze the prompt.

        Raises:
            ValueError: a prompt the model cannot read.
        """
        check_model(model)
        lm = model.language_model
        self.model = model
        self.tokens_T = lm.tokens(prompt)
        with torch.no_grad():
            self.local = model.localize(self.tokens_T)
            self.transport = Transport(self.local) if self.local.attention is None else ResidualTransport(self.local)
        self._table = source_table(self.local)
        self._frozen: dict[tuple[str, int], FrozenQueryKey] = {}

    def frozen(self, layer: int, *, heads: str = "original") -> FrozenQueryKey:
        """Queries and keys of one layer; its `pattern_HTT` says which heads attend where.

        Args:
            heads: the model's own (`original`), or the query-key groups of the low-rank sparse attention that replaces them
                (`replaced`).

        Raises:
            ValueError: no such layer, an architecture whose scores are not a product of queries and keys alone, or no low-rank
                sparse attention.
        """
        check_choice("heads", heads, ("original", "replaced"))
        if (heads, layer) not in self._frozen:
            self._frozen[heads, layer] = (
                self.model.language_model.freeze_query_key(self.tokens_T, layer=layer)
                if heads == "original"
                else freeze_query_key_groups(self.local, layer=layer)
            )
        return self._frozen[heads, layer]

    @torch.no_grad()
    def score(
        self,
        *,
        layer: int,
        head: int,
        query: int = -1,
        key: int | None = None,
        contrast: int | str | None = None,
        heads: str = "original",
    ) -> QKAttribution:
        """Attribute one score; see `attribute_score`."""
        frozen = self.frozen(integer("layer", layer), heads=heads)
        kind = "head" if heads == "original" else "query-key group"
        if not 0 <= integer("head", head) < len(frozen.pattern_HTT):
            raise ValueError(f"layer {layer} has no {kind} {head}: it has {len(frozen.pattern_HTT)} {kind}s")
        query = check_position(query, len(self.tokens_T), name="query")
        pattern_T = frozen.pattern_HTT[head, query]
        key = int(pattern_T.argmax()) if key is None else self._visible("key", key, frozen, query)
        others = self._others(contrast, frozen, query, key)
        weights = {key: 1.0} | {other: -1 / len(others) for other in others}
        queries_CK = self._vectors(frozen.query, layer, head, {query: 1.0})
        keys_CK = self._vectors(frozen.key, layer, head, weights)
        scores_T = frozen.scores_HTT[head, query].double()
        parts = [weight * float(scores_T[position]) for position, weight in weights.items()]
        value = sum(parts)
        (query_nodes, queries_NK), (key_nodes, keys_MK) = self._nodes(queries_CK), self._nodes(keys_CK)
        identity_error = check_identity(
            value,
            float(queries_NK.sum(0) @ keys_MK.sum(0)),
            summed_magnitudes(queries_NK, keys_MK) + sum(abs(part) for part in parts),
            dtype=self.local.dtype,
            n_layers=self.local.shape.n_layers,
            name=lambda _: f"the score of {kind} {layer}.{head} for query {query} and key {key}",
        )
        return QKAttribution(
            layer=layer,
            head=head,
            heads=heads,
            query=query,
            key=key,
            contrast=contrast if contrast is None or isinstance(contrast, str) else others[0],
            score=float(scores_T[key]),
            pattern=float(pattern_T[key]),
            value=value,
            query_nodes=query_nodes,
            key_nodes=key_nodes,
            query_vectors_NK=queries_NK,
            key_vectors_MK=keys_MK,
            identity_error=identity_error,
            _labels=self._label,
        )

    def _vectors(self, read: Read, layer: int, head: int, weights: dict[int, float]) -> np.ndarray:
        """float64[C + 1, K]: what every source, and last the constants, put into queries or keys at weighted positions."""
        positions = list(weights)
        K = len(read(head, positions[0])[1])
        sum_KC = torch.zeros(
            K, self.transport.sources.columns.n_columns + 1, dtype=torch.float64, device=self.local.device
        )
        step = max(1, NUMBERS_AT_ONCE // sum_KC.numel())
        for start in range(0, len(positions), step):
            chosen = positions[start : start + step]
            reads = [read(head, position) for position in chosen]
            vectors_ND = torch.cat([vectors_KD for vectors_KD, _ in reads]).contiguous()
            position_N = torch.tensor(chosen, device=vectors_ND.device).repeat_interleave(K)
            effects_NC, bias_N = self.transport.attribute(
                Targets(vectors_ND, torch.full_like(position_N, 2 * layer), position_N)
            )
            constant_N = bias_N + torch.cat([constant_K for _, constant_K in reads])
            vectors_PKC = torch.cat([effects_NC, constant_N[:, None]], 1).unflatten(0, (-1, K)).double()
            sum_KC += torch.einsum(
                "p,pkc->kc", vectors_PKC.new_tensor([weights[place] for place in chosen]), vectors_PKC
            )
        return sum_KC.T.cpu().numpy()

    def _nodes(self, vectors_CK: np.ndarray) -> tuple[tuple[SourceNode, ...], np.ndarray]:
        """Nodes with an effect, then the constants, and their rows."""
        kept = np.flatnonzero(vectors_CK[:-1].any(1))
        columns = [self._table[name][kept].tolist() for name in ("kind", "part", "layer", "position", "index")]
        nodes = [
            SourceNode(NodeKind(kind), PARTS[part], layer, position, index, column=int(column))
            for kind, part, layer, position, index, column in zip(*columns, kept, strict=True)
        ]
        return (*nodes, SourceNode(None)), vectors_CK[[*kept, -1]]

    def _label(self, columns: Sequence[int]) -> list[str]:
        kept = np.zeros(len(self._table["kind"]), dtype=bool)
        kept[list(columns)] = True
        with open_indexes(self.model) as indexes:
            return node_labels(FeatureLabels(self.model, self.local, indexes), [], self._table, kept)

    def _others(self, contrast: int | str | None, frozen: FrozenQueryKey, query: int, key: int) -> list[int]:
        """Key positions whose mean score is subtracted."""
        if contrast is None:
            return []
        if contrast == "mean":
            others = [other for other in torch.nonzero(frozen.visible_TT[query])[:, 0].tolist() if other != key]
            if not others:
                raise ValueError(f"no contrast: position {key} is the only key that position {query} sees")
            return others
        if isinstance(contrast, str):
            raise ValueError(f"contrast must be a key position, 'mean' or None, got {contrast!r}")
        other = self._visible("contrast", contrast, frozen, query)
        if other == key:
            raise ValueError(f"contrast needs another key than position {key}")
        return [other]

    def _visible(self, name: str, position: int, frozen: FrozenQueryKey, query: int) -> int:
        position = check_position(position, len(self.tokens_T), name=name)
        if position > query:
            raise ValueError(f"{name} position {position} lies after query position {query}, which cannot attend to it")
        if not frozen.visible_TT[query, position]:
            raise ValueError(f"{name} position {position} lies outside the attention window of query position {query}")
        return position


def attribute_score(
    model: ReplacementModel,
    prompt: Prompt,
    *,
    layer: int,
    head: int,
    query: int = -1,
    key: int | None = None,
    contrast: int | str | None = None,
    heads: str = "original",
) -> QKAttribution:
    """Divide a head's attention score among pairs of a query node and a key node; for several scores, `QKAttributor`.

    Args:
        model: language model with a crosscoder spliced in.
        prompt: text, or a list or 1-D tensor of token ids.
        layer: layer of the head.
        head: query head; it shares its key head with others where the model has fewer of those.
        query: position that attends; negative counts from the end.
        key: position attended to, at most `query`; by default the one with the largest attention probability.
        contrast: subtract the score at this key position, or with `mean` the mean over the other visible keys. It costs
            K targets per key position.
        heads: `original` for the model's own heads; `replaced` for the query-key groups of the low-rank sparse attention that
            replaces attention, of which `head` then is the number.

    Raises:
        ValueError: a prompt the model cannot read, a layer, head or position it does not have, a key the query does not
            see, an architecture whose scores are not a product of queries and keys alone (ALiBi), or no low-rank sparse
            attention.
        IdentityError: the pairs do not sum to the score.

    >>> attribution = attribute_score(model, prompt, layer=2, head=3, contrast="mean")  # doctest: +SKIP
    >>> attribution.top(3)                                                             # doctest: +SKIP
    """
    attributor = QKAttributor(model, prompt)
    return attributor.score(layer=layer, head=head, query=query, key=key, contrast=contrast, heads=heads)
