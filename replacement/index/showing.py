"""What `replacement features` shows: features in the terminal, and searches. Imports no torch, so that it answers at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from replacement.console import finite, table
from replacement.index.claims import printable
from replacement.index.feature_page import feature_page
from replacement.index.records import Label
from replacement.index.store import FILE_NAME, FeatureIndex, Match

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "artifacts"
_NAME = re.compile(r"(\d{1,9})/(\d{1,9})")


def file_of(given: str) -> Path:
    """The file of an index: `demo`, the file itself, or the folder of its crosscoder or of the training run."""
    path = DEMO_FOLDER if given == DEMO else Path(given)
    if not path.is_dir():
        return path
    inside = path / "crosscoder"
    return (inside if inside.is_dir() else path) / FILE_NAME


def is_feature(text: str) -> bool:
    """Whether a text is meant to name a feature, such as `2/345`, and not a file."""
    return _NAME.fullmatch(text.strip()) is not None and not Path(text).exists()


def feature_name(text: str) -> tuple[int, int]:
    """Layer and index of a feature named like `2/345`.

    Raises:
        ValueError: another form.
    """
    match = _NAME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a feature as LAYER/INDEX such as 2/345, given {text!r:.50}")
    return int(match[1]), int(match[2])


def show_or_search(
    file: Path, names: Sequence[str], search: str | None, limit: int
) -> tuple[RenderableType, dict[str, Any]]:
    """The page, and the same as a JSON value: features by name, or those that a search finds.

    Raises:
        ValueError: no feature index, neither names nor a search, or both, or a feature that does not exist.
    """
    if bool(names) == (search is not None):
        raise ValueError("expected features such as 2/345, or --search TEXT, one of them")
    with FeatureIndex.open(file) as index:
        if search is not None:
            matches = index.search(search, limit)
            labels = index.labels((match.layer, match.index) for match in matches)
            found = [{**asdict(match), "label": _plain(labels.get((match.layer, match.index)))} for match in matches]
            return _matches_page(matches, labels, search), {"features": found}
        records = [index.feature(*feature_name(name)) for name in names]
    features = [finite(asdict(record)) for record in records]
    return Group(*map(feature_page, records)), {"features": features}


def _plain(label: Label | None) -> dict[str, Any] | None:
    return None if label is None else asdict(label)


def _matches_page(matches: Sequence[Match], labels: dict[tuple[int, int], Label], search: str) -> RenderableType:
    if not matches:
        return Text(f"no feature has {printable(search)} in its label, fires on it, reads it or promotes it")
    rows = []
    for match in matches:
        label = labels.get((match.layer, match.index))
        rows.append((f"{match.layer}/{match.index}", *_label_cells(label), printable(match.reason)))
    return table("feature", "label", "F1", "found because", rows=rows, texts=("label", "found because"))


def _label_cells(label: Label | None) -> tuple[str, str]:
    if label is None:
        return "", ""
    return printable(label.text), "" if label.f1 is None else f"{label.f1:.2f}"
