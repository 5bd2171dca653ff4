"""Writing the file of a feature index; `tables.py` says what is in it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from replacement.index import packing
from replacement.index.records import UNCLEAR, Label, TokenEffects
from replacement.index.tables import FORMAT, SCHEMA, VERSION, Row, scores_of


class IndexWriter:
    """Writes a new file of an index, every method at most once and in this order.

    Args:
        path: of a file that does not exist yet.
        facts: see the README.
        texts: of every token of the vocabulary.
    """

    def __init__(self, path: Path, facts: dict[str, Any], texts: list[str]) -> None:
        self._facts, self._dtype = {"format": FORMAT, "version": VERSION, **facts}, packing.token_dtype(len(texts))
        self._place = {layer: place for place, layer in enumerate(facts["layers"])}
        self._ids = {text: number for number, text in reversed(list(enumerate(texts)))}
        self._found: list[np.ndarray] = []
        self._db = sqlite3.connect(path)
        self._db.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA}")
        self._db.executemany("INSERT INTO tokens VALUES (?, ?)", enumerate(texts))
        self._write_facts(self._facts)

    def rows(self, number_R: np.ndarray, tokens_RT: np.ndarray) -> None:
        """Write the rows that examples are from, by rising number."""
        blocks, first = np.unique(number_R // packing.ROWS_PER_BLOCK, return_index=True)
        for block, begin, end in zip(blocks.tolist(), first, [*first[1:], len(number_R)], strict=True):
            packed = packing.pack_rows(number_R[begin:end], tokens_RT[begin:end], self._dtype)
            self._db.execute("INSERT INTO rows VALUES (?, ?, ?)", (block, *packed))

    def features(self, columns: Iterable[Row]) -> None:
        """Write features: number, n_active, max_activation, bin_width, and packed histogram and examples."""
        self._db.executemany("INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, NULL)", columns)

    def effects(self, effects: Iterable[tuple[int, int, TokenEffects]]) -> None:
        """Write what features' weights say: (layer, index, effects)."""

        def packed() -> Iterator[Row]:
            for layer, index, entry in effects:
                number = self.number(layer, index)
                for role, match in (("read", 1), ("read_through_heads", 1), ("promoted", 2)):
                    tokens = [self._ids[text] for text, _ in getattr(entry, role)]
                    self._found.append(np.array([(token, number * 4 + match) for token in tokens]).reshape(-1, 2))
                yield packing.pack_effects(entry, self._ids, self._dtype), number

        self._db.executemany("UPDATE features SET effects = ? WHERE id = ?", packed())

    def fires_on(self, token_N: np.ndarray, number_N: np.ndarray) -> None:
        """Note tokens that features fire on, for searches."""
        self._found.append(np.stack([token_N, number_N * 4], 1))

    def labels(self, labels: Iterable[tuple[int, int, Label]]) -> None:
        """Write scored claims: (layer, index, label); several of one feature in the order in which they come."""
        n_labels: dict[int, int] = {}
        for layer, index, label in labels:
            number = self.number(layer, index)
            place = n_labels[number] = n_labels.get(number, -1) + 1
            text = None if label.text == UNCLEAR else label.text
            row = (number, place, label.source, text, label.claim, *scores_of(label))
            self._db.execute("INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def person_labels(self, labels: dict[tuple[int, int], list[Label]]) -> None:
        """Write people's labels."""
        for (layer, index), entries in labels.items():
            number = self.number(layer, index)
            rows = [(number, label.text, label.claim, *scores_of(label)) for label in entries]
            self._db.executemany("INSERT INTO person_labels VALUES (?, ?, ?, ?, ?, ?)", rows)

    def close(self, **facts: Any) -> None:
        """Write what is left, with more facts, and close the file."""
        self._write_facts(facts)
        pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *self._found]), axis=0)
        tokens, first = np.unique(pairs[:, 0], return_index=True)
        for token, codes in zip(tokens.tolist(), np.split(pairs[:, 1], first[1:]), strict=False):
            self._db.execute("INSERT INTO token_features VALUES (?, ?)", (token, codes.astype("<u4").tobytes()))
        self._db.commit()
        self._db.close()

    def commit(self) -> None:
        """Let the file be read by others as it is so far."""
        self._db.commit()

    def _write_facts(self, facts: dict[str, Any]) -> None:
        entries = sorted((name, json.dumps(value)) for name, value in facts.items())
        self._db.executemany("INSERT INTO facts VALUES (?, ?)", entries)

    def number(self, layer: int, index: int) -> int:
        """Number of a feature."""
        return self._place[layer] * self._facts["n_features"] + index
