"""Labels of all features: claims found in a sample of the text, scored on held-out text, with what each feature promotes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from replacement.index.claims import SHORT, Claim, printable
from replacement.index.contexts import Contexts, TokenTexts
from replacement.index.evidence import Sample
from replacement.index.firings import Firings
from replacement.index.labeller import Answer, question
from replacement.index.labelling import propose_claims
from replacement.index.records import UNCLEAR, UNCLEAR_BELOW, FeatureRecord, Label
from replacement.index.scoring import DetectorCounts
from replacement.index.word_lists import WordLists, heading
from replacement.token_texts import quoted, visible

UNSCORED = "not scored"
"""Text of a label whose feature never fires in the held-out text."""
MOST_FIRINGS = 8_000_000
"""Firings of a sample; bounds memory."""
SELDOM = 20
"""A feature that fires at fewer places of the sample is looked for in more rows."""


@dataclass(eq=False)
class Labelling:
    """Makes the labels of a crosscoder's features.

    >>> labelling = Labelling(texts, layers=(0, 1, 2), n_features=4096)                # doctest: +SKIP
    >>> labelling.propose(firings_of(model, rows) for rows in sample)                  # doctest: +SKIP
    >>> labelling.score((firings_of(model, rows) for rows in held_out), promoted)      # doctest: +SKIP
    >>> for layer, index, label in labelling: ...                                      # doctest: +SKIP
    """

    texts: TokenTexts
    layers: Sequence[int]
    """Layers that have features, ascending."""
    n_features: int
    """Features per layer."""
    word_lists: WordLists = field(default_factory=dict)
    """Names for claims about the words of a list."""
    claims: dict[int, Claim] = field(default_factory=dict, init=False)
    """The claim that fits best, by number of the feature; features that do not fire in the sample have none."""
    fires_F: np.ndarray = field(init=False)
    """Places of the held-out text where each feature fires."""
    _labels: dict[int, list[Label]] = field(default_factory=dict, init=False)

    def propose(
        self, sample: Iterable[Firings], rows_with: Callable[[np.ndarray], Iterable[Firings]] | None = None
    ) -> None:
        """Find the claim that fits each feature best.

        Args:
            sample: batches of rows of one length, drawn as they come; no more are read once `MOST_FIRINGS` are seen.
            rows_with: gives more rows, in which some features (their numbers, `place of the layer * n_features + index`) fire.
                It is asked for those that fire at fewer than `SELDOM` places of the sample. In the sample and these rows
                together they fire too often, so that their claims come out somewhat too wide.
        """
        batches = list(_first(sample))
        everything = self._sample(batches)
        claims = dict(enumerate(propose_claims(everything)))
        seldom_F = np.bincount(everything.feature_S, minlength=len(claims)) < SELDOM
        if rows_with is not None and seldom_F.any():
            batches += _first(rows_with(np.flatnonzero(seldom_F)))
            claims |= {
                number: claim for number, claim in enumerate(propose_claims(self._sample(batches, seldom_F))) if claim
            }
        self.claims = {number: claim for number, claim in claims.items() if claim is not None}

    def score(self, held_out: Iterable[Firings], promoted: Callable[[int, int], str | None]) -> None:
        """Score every claim as a detector of its feature, batch by batch in constant memory, and make labels of them.

        Args:
            held_out: batches of text that the sample is not from.
            promoted: text of the token that a feature (layer, index) promotes most, if any.
        """
        counts = self._count(self.claims, held_out)
        self.fires_F = counts.fires_F
        self._labels = {number: [Label(UNCLEAR, "rule")] for number in np.flatnonzero(self.fires_F).tolist()}
        for (number, claim), scores in zip(self.claims.items(), _each(counts), strict=True):
            token = promoted(*self._feature(number))
            arrow = "" if token is None else f" → {quoted(printable(token.strip() or visible(token)))}"
            head = heading(claim, self.word_lists)
            text = head + claim.short(max(SHORT // 2, SHORT - len(arrow))) + arrow
            self._labels[number] = [_label(text, "rule", claim.text(), scores)]

    def ask(
        self,
        labeller: Callable[[Iterable[dict[str, Any]]], list[Answer]],
        record_of: Callable[[int, int], FeatureRecord],
        held_out: Iterable[Firings],
    ) -> None:
        """Ask a labeller about every feature with a claim, and score the claims that it makes.

        Args:
            labeller: such as `labeller.ask` of a command.
            record_of: what the index knows of a feature (layer, index).
            held_out: the batches that `score` read, once more.

        Raises:
            ValueError: see `labeller.ask`.
        """
        answers = labeller(
            question(record_of(*self._feature(number)), claim, self._labels[number][0])
            for number, claim in self.claims.items()
        )
        numbers = {self._number(answer.layer, answer.index): answer for answer in answers}
        claims = {number: answer.claim for number, answer in numbers.items() if answer.claim is not None}
        for (number, claim), scores in zip(claims.items(), _each(self._count(claims, held_out)), strict=True):
            text = numbers[number].label
            self._labels[number].append(_label(text, "language model", f"{text}: {claim.text()}", scores))
        for number in numbers.keys() - claims.keys():
            self._labels[number].append(Label(numbers[number].label, "language model", numbers[number].label))

    def __iter__(self) -> Iterator[tuple[int, int, Label]]:
        """(layer, index, label) of every label, by feature; those of rules first."""
        for number in sorted(self._labels):
            for label in self._labels[number]:
                yield (*self._feature(number), label)

    def facts(self) -> dict[str, Any]:
        """How good the best labels are, as a plain JSON value.

        `alive` features fire in the held-out text. One without a claim, because it does not fire in the sample, has F1 0 here.
        """
        alive = np.flatnonzero(self.fires_F).tolist()
        f1_N = np.array([max((label.f1 or 0.0) for label in self._labels[number]) for number in alive])
        return {
            "alive": len(alive),
            "not_scored": len(self._labels) - len(alive),
            "mean_f1": float(f1_N.mean()) if alive else None,
            "mean_f1_by_firing": float(np.average(f1_N, weights=self.fires_F[alive])) if alive else None,
            "unclear": float((f1_N < UNCLEAR_BELOW).mean()) if alive else None,
        }

    def _sample(self, batches: Sequence[Firings], chosen_F: np.ndarray | None = None) -> Sample:
        """Batches as one sample, with the firings of all features or of some."""
        n, offsets = len(self.layers) * self.n_features, np.cumsum([0, *(batch.tokens_RT.size for batch in batches)])
        columns = [self._firings(batch) for batch in batches]
        feature_S = np.concatenate([feature_S for feature_S, _ in columns])
        place_S = np.concatenate([place_S + offset for (_, place_S), offset in zip(columns, offsets, strict=False)])
        if chosen_F is not None:
            feature_S, place_S = feature_S[chosen_F[feature_S]], place_S[chosen_F[feature_S]]
        contexts = Contexts(np.concatenate([batch.tokens_RT for batch in batches]), self.texts)
        return Sample(contexts, feature_S, place_S, n, np.concatenate([batch.counted_RT.ravel() for batch in batches]))

    def _count(self, claims: dict[int, Claim], batches: Iterable[Firings]) -> DetectorCounts:
        feature_C = np.array(list(claims), dtype=np.int64)
        counts = DetectorCounts(list(claims.values()), feature_C, len(self.layers) * self.n_features)
        for batch in batches:
            counts.add(Contexts(batch.tokens_RT, self.texts), *self._firings(batch), batch.counted_RT.ravel())
        return counts

    def _firings(self, batch: Firings) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the features that fire, and the places of the flattened rows."""
        feature_S = np.searchsorted(self.layers, batch.layer) * self.n_features + batch.index
        return feature_S, batch.row * batch.tokens_RT.shape[1] + batch.position

    def _feature(self, number: int) -> tuple[int, int]:
        place, index = divmod(number, self.n_features)
        return self.layers[place], index

    def _number(self, layer: int, index: int) -> int:
        return self.layers.index(layer) * self.n_features + index


def _first(batches: Iterable[Firings]) -> Iterator[Firings]:
    """The first batches, until they hold `MOST_FIRINGS`."""
    n_firings = 0
    for batch in batches:
        yield batch
        n_firings += len(batch)
        if n_firings >= MOST_FIRINGS:
            return


_Scores = tuple[float | None, float | None, float | None]


def _each(counts: DetectorCounts) -> list[_Scores]:
    """(precision, recall, F1) of every claim; None where a score has no value."""
    scores = counts.scores()
    columns = (scores.precision_C, scores.recall_C, scores.f1_C)
    return [
        tuple(None if np.isnan(value) else float(value) for value in row)  # type: ignore[misc]
        for row in zip(*columns, strict=True)
    ]


def _label(text: str, source: Literal["rule", "language model"], claim: str, scores: _Scores) -> Label:
    f1 = scores[2]
    return Label(UNSCORED if f1 is None else UNCLEAR if f1 < UNCLEAR_BELOW else text, source, claim, *scores)
