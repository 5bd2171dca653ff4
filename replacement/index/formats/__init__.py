"""Features in the files of other tools: Neuronpedia's feature JSON, SAEDashboard's batches, delphi's caches.

    formats.write(index, "dashboards", layout="saedashboard", model_id="gpt2-small", name="clt-16k")
    for record in formats.read("dashboards"):
        ...

Nothing is unpickled. These files say less than an index: none of them holds what a feature reads, or the rows of the data that
examples are from, and only Neuronpedia's hold labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from replacement.files import checked_path
from replacement.index.formats import dashboards, delphi
from replacement.index.formats.dashboards import LAYOUTS
from replacement.index.formats.dashboards_writing import check_layout, write
from replacement.index.formats.delphi import Texts
from replacement.index.records import FeatureRecord

__all__ = ["LAYOUTS", "check_layout", "read", "write"]


def read(path: str | Path, *, texts: Texts | None = None) -> Iterator[FeatureRecord]:
    """Features in a file or folder of any of these layouts, one at a time.

    Args:
        path: a `.json`, `.jsonl` or `.jsonl.gz` file, a folder of such files, or the folder of a delphi cache.
        texts: for a delphi cache, which holds token ids alone, what gives their texts (`LanguageModel.token_strings`); `#id` by
            default.

    Raises:
        ValueError: nothing is there, or a file that is damaged or of another layout: names the file, the feature and the fact.
    """
    path = checked_path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected feature JSON, a folder of batches or a delphi cache")
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    if any(file.suffix == ".safetensors" for file in files):
        return delphi.read(path, texts=texts)
    files = [file for file in files if file.name.endswith(dashboards.SUFFIXES)]
    if not files:
        raise ValueError(f"{path} holds no feature JSON (.json, .jsonl, .jsonl.gz) and no delphi cache (.safetensors)")
    return (record for file in sorted(files, key=dashboards.by_number) for record in dashboards.read_file(file))
