"""What `replacement index` does around a pass: check the options, show a progress bar on a terminal, and a summary."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from replacement.console import pairs
from replacement.index.build import HELD_OUT, SAMPLE_TOKENS, IndexSettings, build_index
from replacement.index.gathering import Share
from replacement.index.labeller import ask
from replacement.index.store import ATTENTION_FILE_NAME, FILE_NAME, FeatureIndex
from replacement.loading import DEMO, crosscoder_folder
from replacement.splicing.replacement_model import ReplacementModel

DATA_OF_DEMO = "demo"


def settings_of(
    *, model: str, data: str | None, tokens: int, context: int | None, word_lists: Path | None
) -> IndexSettings:
    """The settings that the options of the command mean; checked before any model is loaded.

    Raises:
        ValueError: an option outside its choices, or no data for a model other than the demo.
    """
    if data is not None and not data.strip():
        raise ValueError(f"data: expected text files, a dataset or token ids, given {data!r}")
    if data is None and model != DEMO:
        raise ValueError(f"data: expected text files, a dataset or token ids that {model} reads, given none")
    names = None if word_lists is None else str(word_lists)
    return IndexSettings(data=data or DATA_OF_DEMO, n_tokens=tokens, context=context, word_lists=names)


def index_file(crosscoder: str, *, part: str = "mlp", joint: bool = False) -> Path:
    """Where the index of a crosscoder, or of a part of a joint one, lies; named as for `replacement.load`.

    Raises:
        ValueError: a crosscoder that is not a folder.
    """
    folder = crosscoder_folder(crosscoder, shipped="crosscoder" if part == "mlp" else "attention_crosscoder")
    if not folder.is_dir():
        what = "is a file, which holds no index" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: expected the folder of a crosscoder, or the name of the index's file")
    return folder / (ATTENTION_FILE_NAME if joint and part == "attention" else FILE_NAME)


def index_with_bar(
    model: ReplacementModel, out: Path, settings: IndexSettings, *, part: str, labeller: str | None
) -> dict[str, Any] | None:
    """Make an index, with a bar on stderr where that is a terminal; its facts, or None where another process writes it."""
    total = round(settings.n_tokens * (1 + HELD_OUT)) + min(SAMPLE_TOKENS, settings.n_tokens)
    quiet = None if Share.of_this_process().is_first else True  # None: shown on a terminal only
    command = None if labeller is None else partial(ask, labeller)
    with tqdm(total=total, desc="index", unit="tok", unit_scale=True, disable=quiet) as bar:
        if not build_index(model, out, settings, part=part, labeller=command, progress=bar.update):
            return None
        bar.update(max(0, bar.total - bar.n))
    with FeatureIndex.open(out) as index:
        return {"file": str(out), "bytes": out.stat().st_size, **index.facts}


def index_page(facts: dict[str, Any]) -> Table:
    """Facts of an index, for the terminal."""
    labels = facts["labels"]
    scores = {
        "features that fire in held-out text": f"{labels['alive']:,}",
        "mean F1 of their labels": "none" if labels["mean_f1"] is None else f"{labels['mean_f1']:.3f}",
        "labels that say `unclear`": "none" if labels["unclear"] is None else f"{labels['unclear']:.1%}",
    }
    rows = {
        "file": f"{facts['file']}, {facts['bytes'] / 1e6:.2f} MB",
        "features": f"{facts['n_features']:,} in each of the layers {', '.join(map(str, facts['layers']))}",
        "tokens read": f"{facts['n_tokens']:,} of {facts['settings']['data']}",
        **scores,
    }
    return pairs(rows.items())
