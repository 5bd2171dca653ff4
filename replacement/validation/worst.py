"""The tokens where a replacement is farthest from the original, with what stood before them. B rows, T tokens per row."""

from __future__ import annotations

import heapq
from typing import Any

from replacement.language_model.language_model import LanguageModel
from replacement.validation.outputs import Compared, Original

CONTEXT_BEFORE = 10
"""Tokens shown before the one measured."""


class WorstTokens:
    """Keeps the n tokens of largest KL of a stream, and no others."""

    def __init__(self, n: int) -> None:
        self._n, self._seen = n, 0
        self._heap: list[tuple[float, tuple[int, int], dict[str, Any]]] = []

    def add(self, original: Original, changed: Compared) -> None:
        """Look at one pass."""
        first = self._seen
        self._seen += len(original.tokens_BT)
        kl_K, place_K = changed.kl_K.topk(min(self._n, len(changed.kl_K)))
        where_K2 = original.asked_BT.nonzero()
        for kl, place in zip(kl_K.tolist(), place_K.tolist(), strict=True):
            row, position = where_K2[place].tolist()
            before = original.tokens_BT[row, max(0, position - CONTEXT_BEFORE) : position + 1].tolist()
            found = {
                "row": first + row,
                "position": position,
                "kl": kl,
                "ids": before,
                "next": int(original.next_K[place]),
                "best": int(original.best_K[place]),
                "best_probability": float(original.p_KV[place].max()),
                "replaced_best": int(changed.best_K[place]),
            }
            entry = (kl, (-first - row, -position), found)
            if len(self._heap) < self._n:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def facts(self, lm: LanguageModel) -> list[dict[str, Any]]:
        """Plain JSON values, the largest KL first."""
        rows = []
        for _, _, found in sorted(self._heap, key=lambda entry: entry[:2], reverse=True):
            words = lm.token_strings(found["ids"])
            names = {
                key: None if found[key] < 0 else lm.token_strings([found[key]])[0]
                for key in ("next", "best", "replaced_best")
            }
            rows.append(
                {
                    "kl": found["kl"],
                    "row": found["row"],
                    "position": found["position"],
                    "before": words[:-1],
                    "token": words[-1],
                    "next": names["next"],
                    "original": names["best"],
                    "original_probability": found["best_probability"],
                    "replacement": names["replaced_best"],
                }
            )
        return rows
