"""The tables of a feature index: one SQLite database.

| table | holds |
|---|---|
| `facts` | what made the index: crosscoder, model, data, settings; a name and a JSON value each |
| `tokens` | text of every token |
| `rows` | the rows of text that examples are from, each once, 256 to a compressed block |
| `features` | counts, histogram, examples and token effects of each feature, packed as `packing.py` says |
| `token_features` | for each token the features that fire on it, read it or promote it |
| `labels` | claims of rules and language models, scored; scores in 1/10,000 |
| `person_labels` | what people wrote; indexing again keeps it |

A feature's number in the file is `place of its layer * n_features + index`.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from replacement.index.records import UNCLEAR, Label

FORMAT = "crosstrace feature index"
VERSION = 1
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tokens (id INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE rows (block INTEGER PRIMARY KEY, present BLOB NOT NULL, tokens BLOB NOT NULL);
CREATE TABLE features (
    id INTEGER PRIMARY KEY, n_active INTEGER NOT NULL, max_activation REAL NOT NULL,
    bin_width REAL NOT NULL, histogram BLOB NOT NULL, examples BLOB NOT NULL, effects BLOB
);
CREATE TABLE token_features (token INTEGER PRIMARY KEY, features BLOB NOT NULL);
CREATE TABLE labels (
    feature INTEGER NOT NULL, place INTEGER NOT NULL, source TEXT NOT NULL, text TEXT, claim TEXT NOT NULL,
    precision INTEGER, recall INTEGER, f1 INTEGER, PRIMARY KEY (feature, place)
) WITHOUT ROWID;
CREATE TABLE person_labels (
    feature INTEGER NOT NULL, text TEXT NOT NULL, claim TEXT NOT NULL, precision INTEGER, recall INTEGER, f1 INTEGER,
    PRIMARY KEY (feature, text)
) WITHOUT ROWID;
"""
MATCHES = ("fires on", "reads", "promotes")
"""How a token leads to a feature; the number of a match in `token_features` is `feature * 4 + place in this list`."""
SCALE = 10_000
"""Stored scores are whole numbers of this part."""
Row = tuple[Any, ...]
"""Values of one row of a table."""


def read_facts(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """What made an index.

    Raises:
        ValueError: the file is no feature index, or one of another version.
    """
    try:
        facts = {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM facts")}
    except (sqlite3.Error, ValueError) as error:
        raise ValueError(f"{path} is no feature index ({error})") from None
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} is no feature index: expected format {FORMAT!r}, got {facts.get('format')!r:.50}")
    if facts.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {facts.get('version')!r:.50}; this library reads version {VERSION}"
        )
    return facts


def label_of(
    source: Any, text: str | None, claim: str, precision: int | None, recall: int | None, f1: int | None
) -> Label:
    """A label from the columns that it is stored in."""
    scores = [None if score is None else score / SCALE for score in (precision, recall, f1)]
    return Label(UNCLEAR if text is None else text, source, claim, *scores)


def scores_of(label: Label) -> Row:
    """Scores as they are stored."""
    return tuple(None if x is None else round(x * SCALE) for x in (label.precision, label.recall, label.f1))
