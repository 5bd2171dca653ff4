"""`FeatureIndex`, which reads of an index only what is asked for; `tables.py` says what the file holds."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from replacement.files import checked_path
from replacement.index import packing
from replacement.index.records import Example, FeatureRecord, Label, TokenEffects
from replacement.index.tables import MATCHES, label_of, read_facts, scores_of

if TYPE_CHECKING:
    from replacement.crosscoder.crosscoder import Crosscoder

FILE_NAME = "features.sqlite"
"""Of the index in a crosscoder's folder."""
ATTENTION_FILE_NAME = "attention_features.sqlite"
"""Of that of a joint crosscoder's attention features, beside the index of its MLPs' features."""
_PAIRS_PER_QUERY = 500


@dataclass(frozen=True, slots=True)
class Match:
    """A feature that a search found."""

    layer: int
    index: int
    reason: str
    """Such as `label: names of cities` or `fires on Dallas`."""


class FeatureIndex:
    """The index of a crosscoder's features, read from its file as it is asked.

    >>> index = FeatureIndex.open("crosscoder/features.sqlite")                     # doctest: +SKIP
    >>> index.label(2, 345).text, index.feature(2, 345).top_examples[0].tokens      # doctest: +SKIP

    Attributes:
        path: of the file.
        facts: what made it; see the README of `replacement/index`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, facts: dict[str, Any]) -> None:
        self.path, self.facts, self._db = path, facts, connection
        self.layers: tuple[int, ...] = tuple(facts["layers"])
        """Layers that have features."""
        self.n_features: int = facts["n_features"]
        """Features per layer."""
        self._place = {layer: place for place, layer in enumerate(self.layers)}
        self._token_dtype = packing.token_dtype(facts["vocabulary_size"])

    @classmethod
    def open(cls, path: str | Path, *, crosscoder: Crosscoder | None = None, writable: bool = False) -> FeatureIndex:
        """Open an index; nothing but its facts is read.

        Args:
            crosscoder: the one that it has to be of; any if None.
            writable: open it for people's labels.

        Raises:
            ValueError: no such file, no feature index, one of a newer version, or of another crosscoder.
        """
        path = checked_path(path)
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise ValueError(f"{path} {found}: expected a feature index, such as `replacement index` makes")
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={'rw' if writable else 'ro'}", uri=True)
        try:
            facts = read_facts(connection, path)
            if crosscoder is not None and facts["crosscoder_fingerprint"] != crosscoder.fingerprint:
                raise ValueError(
                    f"{path} is the index of another crosscoder: of {facts['crosscoder_fingerprint']} ({facts['model']}), "
                    f"this one is {crosscoder.fingerprint} ({crosscoder.model_name})"
                )
        except ValueError:
            connection.close()
            raise
        return cls(path, connection, facts)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> FeatureIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureIndex({self.path}, {len(self.layers)} layers of {self.n_features} features)"

    # Features ---------------------------------------------------------------------------------------------------

    def feature(self, layer: int, index: int) -> FeatureRecord:
        """Everything that is known of a feature.

        Raises:
            ValueError: there is no such feature.
        """
        number = self._number(layer, index)
        columns = "n_active, max_activation, bin_width, histogram, examples, effects"
        row = self._db.execute(f"SELECT {columns} FROM features WHERE id = ?", (number,)).fetchone()
        n_active, largest, bin_width, histogram, examples, effects = row
        counts = packing.unpack_counts(histogram)
        top, quantile = self._examples(examples, largest)
        label, *others = self._labels([number]).get(number, [None])
        return FeatureRecord(
            layer=layer,
            index=index,
            density=n_active / max(1, self.facts["n_tokens"]),
            max_activation=largest,
            histogram_edges=tuple((bin_width * np.arange(len(counts) + 1)).tolist()) if len(counts) else (),
            histogram_counts=tuple(counts.tolist()),
            top_examples=top,
            quantile_examples=quantile,
            effects=TokenEffects() if effects is None else self._effects(effects),
            label=label,
            other_labels=tuple(filter(None, others)),
        )

    def __iter__(self) -> Iterator[FeatureRecord]:
        """Every feature, by layer and index."""
        return (self.feature(layer, index) for layer in self.layers for index in range(self.n_features))

    def label(self, layer: int, index: int) -> Label | None:
        """The best label of a feature, or None if it has none.

        Raises:
            ValueError: there is no such feature.
        """
        return self.labels([(layer, index)]).get((layer, index))

    def labels(self, features: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Label]:
        """The best label of each feature that has one, by (layer, index).

        Raises:
            ValueError: there is no such feature.
        """
        numbers = {self._number(layer, index): (layer, index) for layer, index in features}
        return {numbers[number]: labels[0] for number, labels in self._labels(list(numbers)).items()}

    def search(self, text: str, limit: int = 20) -> list[Match]:
        """Features with a label that holds a text, then those that fire on, read or promote a token with this text, whatever
        the case and the spaces around it.

        Raises:
            ValueError: an empty text, or a limit below 1.
        """
        if not text.strip():
            raise ValueError("search: expected some text, got none")
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        pattern = "%" + "".join(f"\\{c}" if c in "\\%_" else c for c in text.strip()) + "%"
        of_labels = (
            "SELECT feature, text, 20000 + coalesce(f1, 0) AS score FROM person_labels WHERE text LIKE ?1 "
            "ESCAPE '\\' UNION ALL SELECT feature, text, coalesce(f1, 0) AS score FROM labels WHERE text LIKE ?1 "
            "ESCAPE '\\' ORDER BY score DESC, feature LIMIT ?2"
        )
        found: dict[int, str] = {}
        for number, label, _ in self._db.execute(of_labels, (pattern, limit)):
            found.setdefault(number, f"label: {label}")
        tokens = (
            "SELECT t.text, f.features FROM token_features f JOIN tokens t ON t.id = f.token "
            "WHERE trim(t.text) = ? COLLATE NOCASE ORDER BY t.id"
        )
        codes: list[tuple[int, int, str]] = []
        for token, features in self._db.execute(tokens, (text.strip(),)):
            matches = np.frombuffer(features, "<u4")
            codes += [(code % 4, code // 4, token) for code in matches.tolist()]
        for match, number, token in sorted(codes):
            found.setdefault(number, f"{MATCHES[match]} {token.strip() or repr(token)}")
        return [Match(*self._feature(number), reason) for number, reason in list(found.items())[:limit]]

    # People's labels --------------------------------------------------------------------------------------------

    def add_person_label(self, layer: int, index: int, text: str, *, score: Label | None = None) -> None:
        """Store what a person calls a feature; it is shown in place of every other label.

        Args:
            score: the claim that the text makes, and how well it does, where it is a rule.

        Raises:
            ValueError: no such feature, no text, or an index that was not opened with `writable=True` or cannot be written.
        """
        if not text.strip():
            raise ValueError("a label needs some text, got none")
        number = self._number(layer, index)
        scored = ("", None, None, None) if score is None else (score.claim, *scores_of(score))
        try:
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO person_labels VALUES (?, ?, ?, ?, ?, ?)", (number, text.strip(), *scored)
                )
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: the label could not be stored ({error})") from None

    def person_labels(self) -> dict[tuple[int, int], list[Label]]:
        """People's labels of every feature that has some."""
        rows = self._db.execute("SELECT feature, text, claim, precision, recall, f1 FROM person_labels")
        labels: dict[tuple[int, int], list[Label]] = {}
        for number, text, claim, *scores in rows:
            labels.setdefault(self._feature(number), []).append(label_of("person", text, claim, *scores))
        return labels

    def digest(self) -> str:
        """SHA-256 of all content but people's labels, whatever the order in which it was written."""
        digest = hashlib.sha256()
        for table in ("facts", "tokens", "rows", "features", "token_features", "labels"):
            for row in self._db.execute(f"SELECT * FROM {table} ORDER BY 1, 2"):
                digest.update(repr(row).encode())
        return digest.hexdigest()

    # Reading ----------------------------------------------------------------------------------------------------

    def _number(self, layer: int, index: int) -> int:
        if layer not in self._place:
            raise ValueError(
                f"there is no layer {layer!r:.30}: {self.path} has layers {', '.join(map(str, self.layers))}"
            )
        if not 0 <= index < self.n_features:
            raise ValueError(
                f"there is no feature {layer}/{index!r:.30}: layers have features 0 to {self.n_features - 1}"
            )
        return self._place[layer] * self.n_features + index

    def _feature(self, number: int) -> tuple[int, int]:
        place, index = divmod(number, self.n_features)
        return self.layers[place], index

    def _labels(self, numbers: list[int]) -> dict[int, list[Label]]:
        """Labels of features by number, the best first."""
        labels: dict[int, list[Label]] = {}
        for first in range(0, len(numbers), _PAIRS_PER_QUERY):
            chosen = numbers[first : first + _PAIRS_PER_QUERY]
            marks = ", ".join("?" * len(chosen))
            columns = "text, claim, precision, recall, f1"
            people = f"SELECT feature, 'person', {columns} FROM person_labels WHERE feature IN ({marks}) ORDER BY text"
            others = f"SELECT feature, source, {columns} FROM labels WHERE feature IN ({marks}) ORDER BY f1 DESC, place"
            for query in (people, others):
                for number, *label in self._db.execute(query, chosen):
                    labels.setdefault(number, []).append(label_of(*label))
        return labels

    def _examples(self, blob: bytes, largest: float) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """Top examples and quantile examples."""
        settings = self.facts["settings"]
        before, after, n_quantiles = (settings[name] for name in ("before", "after", "n_quantiles"))
        n = blob[0]
        heads = np.frombuffer(blob, packing.EXAMPLE, n, 1)
        neighbours = np.frombuffer(blob, packing.NEIGHBOUR, offset=1 + heads.nbytes)
        ends = np.cumsum(heads["n_active"], dtype=np.int64)
        examples: list[Example] = []
        for (row, position, quantile, n_active), end in zip(heads.tolist(), ends.tolist(), strict=True):
            first = max(0, position - before)
            tokens = self._row(row)[first : position + after + 1]
            acts = np.zeros(len(tokens))
            active = neighbours[end - n_active : end]
            acts[active["offset"]] = active["activation"].astype(np.float64) * largest
            lower = None if quantile == packing.TOP else quantile / n_quantiles
            examples.append(
                Example(tuple(self._texts(tokens)), tuple(acts.tolist()), position - first, row, position, lower)
            )
        top = tuple(example for example in examples if example.quantile is None)
        return top, tuple(example for example in examples if example.quantile is not None)

    def _row(self, number: int) -> np.ndarray:
        block = number // packing.ROWS_PER_BLOCK
        present, tokens = self._db.execute("SELECT present, tokens FROM rows WHERE block = ?", (block,)).fetchone()
        return packing.unpack_row(number, present, tokens, self._token_dtype)

    def _texts(self, tokens: np.ndarray) -> list[str]:
        ids = np.unique(tokens).tolist()
        marks = ", ".join("?" * len(ids))
        texts = dict(self._db.execute(f"SELECT id, text FROM tokens WHERE id IN ({marks})", ids))
        return [texts[token] for token in tokens.tolist()]

    def _effects(self, blob: bytes) -> TokenEffects:
        texts = self._texts(packing.effect_tokens(blob, self._token_dtype))
        return packing.unpack_effects(blob, texts, self._token_dtype)
