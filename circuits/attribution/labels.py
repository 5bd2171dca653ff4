"""Readable names for features until an index of their examples exists: what they read and what they promote.

`reads`: tokens whose embeddings excite the feature most, along the one path that excites it most in this prompt: its own
token's stream, or one attention head. `promotes`: tokens whose logits the sum of its decoder vectors raises most, through the
final norm's weight. Both leave out what other features add, so a label is a hint, not a claim.

N features, T tokens, H heads, K d_head, X = H K, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.attribution.readers import read_vectors
from circuits.attribution.targets import LogitTarget
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.nodes import NodeKind
from replacement import Decomposition, LanguageModel, LocalReplacement, ReplacementModel
from replacement.language_model.sixteen_bits import Unembedding
from replacement.number_checks import whole_number
from replacement.splicing.skip import read_depth

WORDS = 3
CHUNK = 256
"""Features compared with the vocabulary at once; bounds memory."""


def node_labels(
    model: ReplacementModel,
    local: LocalReplacement,
    logits: Sequence[LogitTarget],
    columns: Mapping[str, np.ndarray],
    kept: np.ndarray,
    shown: np.ndarray | None = None,
) -> list[str]:
    """Readable text of every kept node.

    Args:
        columns: the node table's `kind`, `part`, `layer` and `position` for all nodes.
        kept: bool[N].
        shown: bool[N], features that get a label; all by default. The labels of the others are empty.
    """
    lm = model.language_model
    strings = [text.strip() or repr(text) for text in lm.token_strings(local.frozen.tokens_T.tolist())]
    label = np.full(len(kept), "", dtype=object)
    of_kind = {kind: np.flatnonzero(columns["kind"] == kind) for kind in NodeKind}
    label[of_kind[NodeKind.TOKEN]] = strings
    label[of_kind[NodeKind.POSITION]] = [f"position {t}" for t in columns["position"][of_kind[NodeKind.POSITION]]]
    errors = of_kind[NodeKind.ERROR]
    parts = ["attention error" if part else "error" for part in columns["part"][errors]]
    label[errors] = [f"{part} in layer {layer}" for part, layer in zip(parts, columns["layer"][errors], strict=True)]
    label[of_kind[NodeKind.LOGIT]] = [logit.label.strip() or repr(logit.label) for logit in logits]
    first = int(errors[-1]) + 1  # features follow errors
    for part in local.decompositions:
        here = slice(first, first + len(part.features))
        numbers = np.flatnonzero(kept[here] if shown is None else kept[here] & shown[here])
        label[first + numbers] = feature_labels(model, local, part, torch.from_numpy(numbers).to(local.device))
        first = here.stop
    return label[kept].tolist()


@torch.no_grad()
def with_labels(model: ReplacementModel, graph: CircuitGraph, *, most: int | None = None) -> CircuitGraph:
    """The graph with a label on every feature, or on its most influential ones.

    `trace` labels the most influential features alone, because a label costs a comparison with the whole vocabulary.

    Args:
        model: the one that the graph was traced with.
        graph: full or pruned.
        most: label at most this many of the most influential features; labels that the graph has stay.

    Raises:
        ValueError: the graph was traced with another model or crosscoder.

    >>> circuit = with_labels(model, graph.prune(nodes=0.95))  # doctest: +SKIP
    """
    features = graph.nodes.mask(NodeKind.FEATURE)
    if most is not None and whole_number("most", most) < features.sum():
        features = most_influential(graph.influence(), features, most)
    missing = np.flatnonzero(features & np.array([not label for label in graph.nodes.label], dtype=bool))
    if not len(missing):
        return graph
    grounding, label = Grounding.of(model, graph), np.array(graph.nodes.label, dtype=object)
    for part, (places, numbers_S) in zip(
        grounding.local.decompositions, grounding.feature_numbers(missing), strict=True
    ):
        label[missing[places]] = feature_labels(model, grounding.local, part, numbers_S)
    return replace(graph, nodes=replace(graph.nodes, label=tuple(label)))


def most_influential(influence: np.ndarray, among: np.ndarray, most: int) -> np.ndarray:
    """bool[N], at most `most` nodes of the largest influence among some."""
    chosen = np.zeros(len(influence), dtype=bool)
    chosen[np.argsort(-np.where(among, influence, -1.0), kind="stable")[:most]] = True
    return chosen & among


def feature_labels(
    model: ReplacementModel, local: LocalReplacement, part: Decomposition, chosen_S: Tensor
) -> list[str]:
    """Labels of some active features: `reads → promotes`, the top tokens of each side.

    Args:
        part: the decomposition that they are of.
        chosen_S: numbers into `part.features`.
    """
    if not len(chosen_S):
        return []
    features, crosscoder = part.features, part.crosscoder
    reads_SD = torch.empty(len(chosen_S), local.shape.d_model, dtype=local.dtype, device=local.device)
    writes_SD = torch.zeros_like(reads_SD)
    streams = local.streams()
    values = [
        (x_TD @ attention.weights.W_V_XD.T).unflatten(1, (attention.weights.n_heads, -1)).transpose(0, 1)
        for x_TD, attention in zip(streams[:-1], local.frozen.attentions, strict=True)
    ]  # [H, T, K] of every layer
    group_S = features.group[chosen_S]
    for group in torch.unique(group_S).tolist():
        places = torch.nonzero(group_S == group)[:, 0]
        index, position = features.index[chosen_S[places]], features.row[chosen_S[places]]
        reads_SD[places] = _strongest_reads(local, part, streams[0], values, group, index, position)
        for site in crosscoder.wiring.writes[group]:
            writes_SD[places] += crosscoder.decoder_vectors(group, index, site)
    lm = model.language_model
    embedding = Unembedding(lm.parts.bridge.W_E.detach().T, None)
    mean_D = embedding.mean()[0]
    # Cosine with centred embeddings. The unembedding needs no centring: that shifts the scores of all tokens alike.
    size_V = (embedding.square_norms() - 2 * embedding.scores(mean_D) + mean_D.square().sum()).clamp(min=1e-18).sqrt()
    read = _top_words(lm, reads_SD, embedding, mean_D, size_V)
    promoted = _top_words(lm, writes_SD * lm.parts.norm_weights("ln_final").weight_D, local.unembedding)
    return [f"{left} → {right}" for left, right in zip(read, promoted, strict=True)]


def _strongest_reads(
    local: LocalReplacement,
    part: Decomposition,
    stream_TD: Tensor,
    values: Sequence[Tensor],
    group: int,
    index_N: Tensor,
    position_N: Tensor,
) -> Tensor:
    """Vectors `[N, D]` that features of a group read from embeddings along the path that excites each of them most: its own
    token's stream, or one attention head below it.

    Args:
        stream_TD: the stream in front of the first layer.
        values: value vectors `[H, T, K]` of every layer.
    """
    crosscoder, reads = part.crosscoder, part.crosscoder.wiring.reads[group]
    if part.kind == "attn_out":
        (site,) = reads
        reading_NX = crosscoder.encoder_vectors(group, index_N, site)
        best_ND, best_N, layers = local.zeros(len(index_N), local.shape.d_model), None, [site.layer]
    else:
        best_ND = torch.stack([read_vectors(local, group, site, index_N, position_N)[0] for site in reads]).sum(0)
        best_N = (best_ND * stream_TD[position_N]).sum(-1)
        depth = max(read_depth(site, local.shape) for site in reads)
        layers = list(range((depth + 1) // 2))  # attention layers below the point where the feature reads
    if not layers:
        return best_ND
    readings = [
        reading_NX if best_N is None else best_ND @ local.frozen.attentions[layer].weights.W_O_XD.T for layer in layers
    ]
    scores = [
        _head_scores(local.frozen.attentions[layer].kernel_HTT, values[layer], u_NX, position_N)
        for layer, u_NX in zip(layers, readings, strict=True)
    ]
    score_N, number_N = torch.cat(scores, 1).max(1)
    through_head_N = torch.ones_like(score_N, dtype=torch.bool) if best_N is None else score_N > best_N
    for number in torch.unique(number_N[through_head_N]).tolist():
        rows = torch.nonzero(through_head_N & (number_N == number))[:, 0]
        place, head = divmod(number, local.shape.n_heads)
        weights = local.frozen.attentions[layers[place]].weights
        W_V_KD = weights.W_V_XD.unflatten(0, (weights.n_heads, -1))[head]
        best_ND[rows] = readings[place].unflatten(1, (weights.n_heads, -1))[rows, head] @ W_V_KD
    return best_ND


def _head_scores(kernel_HTT: Tensor, values_HTK: Tensor, u_NX: Tensor, position_N: Tensor) -> Tensor:
    """What vectors that read `attn_z` at one position get from every head, `[N, H]`."""
    mixed_NHK = (kernel_HTT[:, position_N] @ values_HTK).transpose(0, 1)
    return (u_NX.view_as(mixed_NHK) * mixed_NHK).sum(-1)


def _top_words(
    lm: LanguageModel,
    vectors_ND: Tensor,
    vocabulary: Unembedding,
    mean_D: Tensor | float = 0.0,
    size_V: Tensor | float = 1.0,
) -> list[str]:
    """For every vector the tokens whose `(token - mean) / size` it is largest on, special tokens left out."""
    special = sorted(set(getattr(lm.tokenizer, "all_special_ids", None) or ()))
    texts: list[str] = []
    for rows_ND in vectors_ND.split(CHUNK):
        scores_NV = (vocabulary.scores(rows_ND) - (rows_ND * mean_D).sum(1, keepdim=True)) / size_V
        scores_NV[:, special] = -torch.inf
        top_NK = scores_NV.topk(min(WORDS, scores_NV.shape[1]), dim=1).indices
        words = (lm.token_strings(token_ids) for token_ids in top_NK.tolist())
        texts += [", ".join(text.strip() or repr(text) for text in row) for row in words]
    return texts
