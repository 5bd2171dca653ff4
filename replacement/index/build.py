"""`build_index`: from a model and text to the file of a feature index; reads as the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.data.documents import special_ids
from replacement.data.open_tokens import open_source
from replacement.data.token_sources import TokenSource, first_rows
from replacement.files import atomic_file, check_file
from replacement.index.contexts import TokenTexts
from replacement.index.examples import feature_rows
from replacement.index.firings import Firings, crosscoder_of
from replacement.index.gathering import Progress, Share, Text, gather, together
from replacement.index.keeping import Evidence, Window
from replacement.index.labeller import Answer
from replacement.index.labels import Labelling
from replacement.index.records import Label, TokenEffects
from replacement.index.store import FeatureIndex
from replacement.index.token_effects import token_effects
from replacement.index.word_lists import WordLists, word_lists
from replacement.index.writing import IndexWriter
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.replacement_model import ReplacementModel

HELD_OUT = 0.25
"""Held-out rows for scores, as a share of those that examples are from, where there is enough text."""
SAMPLE_TOKENS = 300_000
"""Tokens of the rows that examples are from which claims are fitted to."""
SAMPLED_PER_SHOWN = 2.5
"""Firings drawn for each quantile example: the more, the closer the quantiles."""

DISTINCT = 1.5
"""A label names the token that its feature promotes most where its weight is this multiple of the last one listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """What an index is made of."""

    data: str = "demo"
    """Source of the rows, as training takes it: text files, a dataset, stored token ids, or `demo`."""
    n_tokens: int = 1_000_000
    """Tokens that examples are from, rounded down to rows."""
    context: int | None = None
    """Tokens per row; the source's own by default."""
    n_top: int = 10
    """Examples of largest activation, of each feature."""
    n_quantiles: int = 5
    """Quantiles of positive activations that other examples are drawn from."""
    per_quantile: int = 1
    """Examples drawn from each."""
    before: int = 24
    """Tokens of an example in front of its peak."""
    after: int = 8
    """Tokens behind it."""
    word_lists: str | None = None
    """File of named lists of words, see `word_lists.word_lists`; those of the demo's corpus for its data."""
    n_effects: int = 6
    """Tokens promoted, suppressed and read, of each kind."""

    def __post_init__(self) -> None:
        least = {"before": 0, "after": 0}
        for name in ("n_tokens", "context", "n_top", "n_quantiles", "per_quantile", "before", "after", "n_effects"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise ValueError(f"{name.removeprefix('n_')}: expected at least {least.get(name, 1)}, given {value}")
        if self.n_top + self.n_quantiles * self.per_quantile > 255 or self.n_quantiles > 100:
            raise ValueError("expected at most 255 examples of a feature, and at most 100 quantiles")
        if self.window.width > 255 or self.n_effects > 255:
            raise ValueError("expected windows of at most 255 tokens, and at most 255 tokens of each kind of effect")

    @property
    def window(self) -> Window:
        """Tokens of an example."""
        return Window(self.before, self.after)


def build_index(
    model: ReplacementModel,
    out: str | Path,
    settings: IndexSettings | None = None,
    *,
    part: str = "mlp",
    labeller: Callable[[Iterable[dict[str, Any]]], list[Answer]] | None = None,
    progress: Progress = lambda n_tokens: None,
) -> bool:
    """Make the index of a crosscoder's features, or make it again.

    Under `torchrun` the processes share the pass over text. Where one was killed, it goes on when it is called again with the
    same arguments. People's labels of an index that is there already are kept.

    Args:
        out: the file to write.
        part: the crosscoder whose features are meant, `mlp` or `attention`.
        labeller: asked for labels of its own, such as `labeller.ask` of a command.
        progress: called with the number of tokens after every batch.

    Returns:
        Whether this process wrote the file; of several the first one does.

    Raises:
        ValueError: a file that cannot be written, or is there and no index of this crosscoder; a source that cannot be opened
            or has too few rows.
    """
    settings, out, share = settings or IndexSettings(), check_file(out), Share.of_this_process()
    person_labels = _person_labels(out, crosscoder_of(model, part))
    names = word_lists(settings.word_lists, settings.data)
    source, n_rows = open_rows(settings, model.language_model)
    text = Text(model, part, source, n_rows)
    facts = _facts(text, settings)
    files = share.part_files(out)
    evidence = gather(
        text,
        lambda: _no_evidence(text.crosscoder, settings),
        settings.window,
        file=files[share.rank],
        made_by=facts,
        share=share,
        progress=progress,
    )
    share.wait()
    if not share.is_first:
        return False
    evidence = together(files, evidence, facts)
    facts["n_tokens"] = evidence.n_tokens
    lm = model.language_model
    with atomic_file(out) as scratch:
        writer = IndexWriter(scratch, facts, lm.token_strings(range(lm.vocabulary_size)))
        _write_evidence(writer, evidence, settings)
        promoted: dict[tuple[int, int], str] = {}
        writer.effects(_noting(promoted, token_effects(lm, text.crosscoder, n_tokens=settings.n_effects)))
        labelling = _propose(text, evidence, names, progress)
        labelling.score(_counting(text.held_out(), progress), lambda layer, index: promoted.get((layer, index)))
        if labeller is not None:
            writer.commit()
            with FeatureIndex.open(scratch) as so_far:
                labelling.ask(labeller, so_far.feature, text.held_out())
        writer.labels(labelling)
        writer.person_labels(person_labels)
        writer.close(labels=labelling.facts())
    share.remove_parts(out)
    return True


def open_rows(settings: IndexSettings, lm: LanguageModel) -> tuple[TokenSource, int]:
    """The source, with rows held out for scores, and the number of rows that examples are from.

    Where there is less text than asked for, a fifth of it is held out.

    Raises:
        ValueError: a source that cannot be opened, or has fewer than two rows.
    """
    source = open_source(settings.data, lm, context=settings.context)
    wanted = max(1, settings.n_tokens // source.context)
    n_held_out = max(1, round(wanted * HELD_OUT))
    if source.n_rows is None:
        n_there = sum(len(rows_RT) for rows_RT in first_rows(source.one_pass(), wanted + n_held_out))
    else:
        n_there = min(source.n_rows, wanted + n_held_out)
    if n_there < wanted + n_held_out:
        n_held_out = max(1, round(n_there * HELD_OUT / (1 + HELD_OUT)))
    if n_there < 2:
        raise ValueError(
            f"{source.name} has {n_there} row of {source.context} tokens: expected at least 2, one of them to score labels on"
        )
    return open_source(settings.data, lm, context=settings.context, n_held_out=n_held_out), n_there - n_held_out


def _person_labels(out: Path, crosscoder: Crosscoder) -> dict[tuple[int, int], list[Label]]:
    if not out.exists():
        return {}
    with FeatureIndex.open(out, crosscoder=crosscoder) as index:
        return index.person_labels()


def _propose(text: Text, evidence: Evidence, names: WordLists, progress: Progress) -> Labelling:
    """Claims about every feature, fitted to the first rows, and for features that seldom fire to rows of examples, too."""
    lm, crosscoder = text.model.language_model, text.crosscoder
    texts = TokenTexts.of(lm.tokenizer, lm.vocabulary_size, special_ids(lm))
    n_first = max(1, SAMPLE_TOKENS // text.source.context)

    def rows_with(features: np.ndarray) -> Iterator[Firings]:
        examples = [kept.of(features)[0].row for kept in (evidence.top, evidence.sample)]
        rows = np.unique(np.concatenate(examples))
        return text.firings([evidence.rows[row] for row in rows[rows >= n_first].tolist()])

    labelling = Labelling(texts, crosscoder.wiring.layers, crosscoder.n_features, names)
    labelling.propose(_counting(text.first(n_first), progress), rows_with)
    return labelling


def _counting(batches: Iterable[Firings], progress: Progress) -> Iterator[Firings]:
    for batch in batches:
        yield batch
        progress(batch.tokens_RT.size)


def _noting(
    promoted: dict[tuple[int, int], str], effects: Iterable[tuple[int, int, TokenEffects]]
) -> Iterator[tuple[int, int, TokenEffects]]:
    """The same effects; what each feature promotes most is noted, where that stands out from what else it promotes."""
    for layer, index, entry in effects:
        if entry.promoted and entry.promoted[0][1] >= DISTINCT * entry.promoted[-1][1]:
            promoted[layer, index] = entry.promoted[0][0]
        yield layer, index, entry


def _facts(text: Text, settings: IndexSettings) -> dict[str, Any]:
    """What decides an index's content, as JSON values."""
    lm, crosscoder = text.model.language_model, text.crosscoder
    return {
        "part": text.part,
        "crosscoder_fingerprint": crosscoder.fingerprint,
        "model": lm.name,
        "model_fingerprint": lm.fingerprint,
        "vocabulary_size": lm.vocabulary_size,
        "layers": list(crosscoder.wiring.layers),
        "n_features": crosscoder.n_features,
        "n_rows": text.n_rows,
        "n_held_out_rows": text.source.n_held_out,
        "context": text.source.context,
        "settings": asdict(settings),
    }


def _no_evidence(crosscoder: Crosscoder, settings: IndexSettings) -> Evidence:
    n_sampled = round(settings.n_quantiles * settings.per_quantile * SAMPLED_PER_SHOWN)
    n_features = crosscoder.n_groups * crosscoder.n_features
    return Evidence.empty(n_features, window=settings.window, n_top=settings.n_top, n_sampled=n_sampled)


def _write_evidence(writer: IndexWriter, evidence: Evidence, settings: IndexSettings) -> None:
    """Rows, counts, histograms, examples, and the tokens of the peaks."""
    rows = sorted(evidence.rows)
    writer.rows(np.array(rows, dtype=np.int64), np.array([evidence.rows[row] for row in rows]))
    options = {name: getattr(settings, name) for name in ("before", "n_quantiles", "per_quantile")}
    writer.features(feature_rows(evidence, **options))
    for kept in (evidence.top, evidence.sample):
        examples, _ = kept.of(np.arange(len(evidence.n_active_F)))
        place = np.searchsorted(rows, examples.row)
        tokens_RT = np.array([evidence.rows[row] for row in rows])
        writer.fires_on(tokens_RT[place, examples.position], examples.feature)
