"""A small index file, written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from replacement.index import packing
from replacement.index.records import UNCLEAR, Label, TokenEffects
from replacement.index.writing import IndexWriter

TEXTS = ["<s>", " the", " Dallas", "dallas", "a%b", " \n"]
EFFECTS = TokenEffects(promoted=((" the", 2.0), (" Dallas", 1.5)), suppressed=(("a%b", -3.0),), read=((" \n", 0.25),))
THROUGH_HEAD = TokenEffects(read_through_heads=((" Dallas", 1.0),), head=(1, 3))
CITY = Label("cities", "rule", "cities", 0.9, 0.8, 0.8471)
WEAK = Label(UNCLEAR, "rule", "tokens a%b", 0.1, 0.2, 0.1333)


def facts(**changed: object) -> dict[str, object]:
    return {
        "crosscoder_fingerprint": "2:abc",
        "model": "tiny",
        "layers": [0, 2],
        "n_features": 3,
        "n_tokens": 40,
        "vocabulary_size": len(TEXTS),
        "settings": {"before": 2, "after": 1, "n_quantiles": 4},
        **changed,
    }


def write(path: Path, *, texts: list[str] = TEXTS, **changed: object) -> Path:
    """An index of six features: 0/1 has an example at each end of row 70, 2/0 and 2/2 have labels.

    Args:
        texts: of the six tokens; 1, 2, 4 and 5 are those of `EFFECTS`.
        changed: facts.
    """
    writer = IndexWriter(path, facts(**changed), texts)
    writer.rows(np.array([3, 70]), np.array([[0, 1, 1, 2, 5], [0, 2, 1, 3, 4]]))
    heads = np.array([(70, 1, packing.TOP, 2), (70, 4, 1, 1)], dtype=packing.EXAMPLE)
    neighbours = np.array([(1, 1.0), (2, 0.5), (2, 0.25)], dtype=packing.NEIGHBOUR)
    examples = bytes([2]) + heads.tobytes() + neighbours.tobytes()
    counts = packing.pack_counts(np.array([3, 0, 300, 0]))
    nothing = (0, 0.0, 1.0, packing.pack_counts(np.zeros(4, dtype=int)), bytes([0]))
    writer.features([(n, *((10, 8.0, 2.0, counts, examples) if n == 1 else nothing)) for n in range(6)])
    writer.effects([(0, 0, EFFECTS), (2, 1, THROUGH_HEAD)])
    writer.fires_on(np.array([2]), np.array([1]))
    writer.labels([(2, 0, WEAK), (2, 0, CITY), (2, 2, WEAK)])
    writer.close()
    return path
