"""Hints: what a feature reads and promotes in one prompt, in a few tokens, where no label is known.

A hint begins with `~` and reads `tokens read → tokens promoted`: the tokens whose embeddings excite the feature most along the
one path that excites it most in this prompt (its own token's stream, or one attention head), and those whose logits its decoder
vectors raise most. Both leave out what other features add: `replacement/index/token_effects.py`, which does the same from
weights alone, says what that means.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from circuits.attribution.readers import head_reads, read_vectors
from circuits.graph.feature_labels import HINT
from circuits.graph.text import printable
from replacement import Decomposition, LocalReplacement, ReplacementModel
from replacement.index.token_effects import CHUNK, Vocabulary
from replacement.splicing.skip import read_depth
from replacement.token_texts import quoted

WORDS = 3
"""Tokens on each side of a hint, where there is room for them."""
LONGEST = 96
"""Characters of a hint, and of any label."""
_LONGEST_WORD = 30
"""Longer words are left out of hints."""
_LONE_BYTES = re.compile(r"\ufffd|<[0-9A-F]{2}>")
_TRIED = 4 * WORDS
"""Tokens compared for a side of a hint: pieces that cannot be read and repetitions are left out."""


class Hints:
    """Makes the hints of one prompt's features."""

    def __init__(self, model: ReplacementModel, local: LocalReplacement) -> None:
        self._model, self._local = model, local

    def of(self, part: Decomposition, chosen_S: Tensor) -> list[str]:
        """Hints of some active features.

        Args:
            part: the decomposition that they are of.
            chosen_S: numbers into `part.features`.
        """
        local, vocabulary, hints = self._local, self._vocabulary, list[str]()
        group_S = part.features.group[chosen_S]
        reads_SD = torch.empty(len(chosen_S), local.shape.d_model, dtype=local.dtype, device=local.device)
        writes_SD = torch.zeros_like(reads_SD)
        for group in torch.unique(group_S).tolist():
            places = torch.nonzero(group_S == group)[:, 0]
            reads_SD[places] = _strongest_reads(local, part, *self._streams_and_values, group, chosen_S[places])
            for site in part.crosscoder.wiring.writes[group]:
                writes_SD[places] += part.crosscoder.decoder_vectors(group, part.features.index[chosen_S[places]], site)
        for reads_ND, writes_ND in zip(reads_SD.split(CHUNK), writes_SD.split(CHUNK), strict=True):
            read = vocabulary.strongest(vocabulary.read(reads_ND), _TRIED)
            promoted = vocabulary.strongest(vocabulary.promoted(writes_ND), _TRIED)
            sides = ([[token for token, _ in row] for row in rows] for rows in (read, promoted))
            hints += [_hint(*pair) for pair in zip(*sides, strict=True)]
        return hints

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._model.language_model)

    @cached_property
    def _streams_and_values(self) -> tuple[list[Tensor], list[Tensor]]:
        """The stream `[T, D]` in front of every layer, and value vectors `[H, T, K]` of every layer."""
        streams = self._local.streams()
        values = [
            (x_TD @ attention.weights.W_V_XD.T).unflatten(1, (attention.weights.n_heads, -1)).transpose(0, 1)
            for x_TD, attention in zip(streams[:-1], self._local.frozen.attentions, strict=True)
        ]
        return streams, values


def _hint(read: Sequence[str], promoted: Sequence[str]) -> str:
    """As many tokens of each side as fit, at most `WORDS`; pieces of characters and texts that look alike are left out."""
    sides = [_readable(read) or ["…"], _readable(promoted) or ["…"]]
    shown = [side[:1] for side in sides]
    for n_words in range(1, WORDS):
        for place, side in enumerate(sides):
            more = [*shown[:place], [*shown[place], *side[n_words : n_words + 1]], *shown[place + 1 :]]
            shown = more if len(_joined(more)) <= LONGEST else shown
    return _joined(shown)


def _joined(sides: Sequence[Sequence[str]]) -> str:
    return HINT + " → ".join(", ".join(side) for side in sides)


def _readable(tokens: Sequence[str]) -> list[str]:
    words = dict.fromkeys(printable(token).strip() or "␣" for token in tokens if not _LONE_BYTES.search(token))
    return [quoted(word) for word in words if len(word) <= _LONGEST_WORD]


def _strongest_reads(
    local: LocalReplacement,
    part: Decomposition,
    streams: Sequence[Tensor],
    values: Sequence[Tensor],
    group: int,
    chosen_N: Tensor,
) -> Tensor:
    """Vectors `[N, D]` that features of a group read from embeddings along the path that excites each of them most: its own
    token's stream, or one attention head below it.

    Args:
        streams: the stream `[T, D]` in front of every layer.
        values: value vectors `[H, T, K]` of every layer.
        chosen_N: numbers into `part.features`.
    """
    if part.kind == "attn_out":
        targets = head_reads(local, part, chosen_N, group)
        best_N = targets.read(streams[targets.layer]).sum(-1).argmax(1)
        return targets.vectors_NPD[torch.arange(len(best_N), device=best_N.device), best_N]
    index_N, position_N, reads = (
        part.features.index[chosen_N],
        part.features.row[chosen_N],
        part.crosscoder.wiring.reads,
    )
    sites = reads[group]
    best_ND = torch.stack([read_vectors(local, group, site, index_N, position_N)[0] for site in sites]).sum(0)
    depth = max(read_depth(site, local.shape) for site in sites)
    attentions = local.frozen.attentions[: (depth + 1) // 2]  # below the point where the feature reads
    if not attentions:
        return best_ND
    readings = [best_ND @ attention.weights.W_O_XD.T for attention in attentions]
    scores = [
        _head_scores(attention.kernel_HTT, values_HTK, u_NX, position_N)
        for attention, values_HTK, u_NX in zip(attentions, values, readings, strict=False)
    ]
    score_N, number_N = torch.cat(scores, 1).max(1)
    through_head_N = score_N > (best_ND * streams[0][position_N]).sum(-1)
    for number in torch.unique(number_N[through_head_N]).tolist():
        rows = torch.nonzero(through_head_N & (number_N == number))[:, 0]
        layer, head = divmod(number, local.shape.n_heads)
        weights = attentions[layer].weights
        W_V_KD = weights.W_V_XD.unflatten(0, (weights.n_heads, -1))[head]
        best_ND[rows] = readings[layer].unflatten(1, (weights.n_heads, -1))[rows, head] @ W_V_KD
    return best_ND


def _head_scores(kernel_HTT: Tensor, values_HTK: Tensor, u_NX: Tensor, position_N: Tensor) -> Tensor:
    """What vectors that read `attn_z` at one position get from every head, `[N, H]`."""
    mixed_NHK = (kernel_HTT[:, position_N] @ values_HTK).transpose(0, 1)
    return (u_NX.view_as(mixed_NHK) * mixed_NHK).sum(-1)
