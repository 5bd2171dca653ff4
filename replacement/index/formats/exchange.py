"""What `replacement features` does with files of other tools: a whole index written for them, their explanations as labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from replacement.files import check_folder
from replacement.index import formats
from replacement.index.records import UNCLEAR
from replacement.index.store import FeatureIndex

NAME = "crosstrace"
"""Of the set of features in files that are written."""


def exchange(file: Path, *, export: str | None, out: Path | None, import_from: Path | None) -> dict[str, Any]:
    """Import labels, then export, whichever is asked for; returns facts to show.

    Raises:
        ValueError: a layout without a folder or a folder without a layout; as `import_labels` and `export_index`.
    """
    if (export is None) != (out is None):
        raise ValueError("export: expected --export LAYOUT with --out FOLDER, given one of them")
    facts = {} if import_from is None else import_labels(file, import_from)
    return facts if export is None or out is None else facts | export_index(file, out, layout=export)


def export_index(file: Path, folder: Path, *, layout: str) -> dict[str, Any]:
    """Write every feature of an index in a layout of `formats.LAYOUTS`; returns facts to show.

    Raises:
        ValueError: no feature index, an unknown layout, or a folder that cannot be written.
    """
    formats.check_layout(layout)
    with FeatureIndex.open(file) as index:
        model_id = re.sub(r"[^A-Za-z0-9._-]+", "-", index.facts["model"]) or "model"
        formats.write(index, check_folder(folder), layout=layout, model_id=model_id, name=NAME)
        return {"features": len(index.layers) * index.n_features, "layout": layout, "folder": str(folder)}


def import_labels(file: Path, source: Path) -> dict[str, Any]:
    """Store the explanations of Neuronpedia's feature JSON as people's labels of an index; returns facts to show.

    What a rule of ours wrote, or says that it is unclear, is passed over: the index has rules of its own.

    Raises:
        ValueError: no feature index, files that cannot be read, or a feature that the index does not have.
    """
    stored = 0
    with FeatureIndex.open(file, writable=True) as index:
        for record in formats.read(source):
            for label in filter(None, (record.label, *record.other_labels)):
                if label.source != "rule" and label.text.strip() and label.text != UNCLEAR:
                    index.add_person_label(record.layer, record.index, label.text)
                    stored += 1
    return {"labels": stored, "index": str(file)}
