"""From firings to labels: hand-built features on text of a few words, a person's view of what is shown, and the figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from replacement.index.claims import SHORT, Claim
from replacement.index.contexts import Contexts, TokenTexts
from replacement.index.firings import Firings
from replacement.index.labeller import Answer
from replacement.index.labels import UNSCORED, Labelling
from replacement.index.records import UNCLEAR, FeatureRecord, Label

TEXTS = TokenTexts(["<bos>", " Dallas", " Houston", " Oslo", " is", " in", " a", "."], [0])
TEXAS = Claim.of(current=["Dallas", "Houston"])
LAYERS, N_FEATURES = (1, 3), 2
SILENT, RARE = (1, 1), (3, 1)
"""A feature that never fires, and one that fires in the sample alone."""


def batches(n: int, seed: int, *, rare: bool = False) -> Iterator[Firings]:
    """Feature 1/0 fires on Texan cities, 3/0 on a tenth of all tokens, 3/1 on two places if `rare`."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        tokens_RT = rng.integers(1, 8, (20, 12))
        tokens_RT[:, 0] = 0
        counted_RT = tokens_RT != 0
        texas = TEXAS.holds(Contexts(tokens_RT, TEXTS))
        noise = (rng.random(tokens_RT.shape) < 0.1) & counted_RT
        seldom = np.zeros_like(noise)
        seldom[0, 3:5] = rare
        columns = []
        for layer, index, fires_RT in ((1, 0, texas), (3, 0, noise), (3, 1, seldom)):
            row, position = np.nonzero(fires_RT)
            columns.append(np.stack([np.full_like(row, layer), np.full_like(row, index), row, position]))
        layer, index, row, position = np.concatenate(columns, axis=1)
        activation = np.ones(len(row), dtype=np.float32)
        yield Firings(tokens_RT, counted_RT, layer, index, row, position, activation)


@pytest.fixture
def labelling() -> Labelling:
    """Claims from 10 batches, scored on 5 others."""
    result = Labelling(TEXTS, LAYERS, N_FEATURES)
    result.propose(batches(10, 0, rare=True))
    result.score(batches(5, 1), promoted)
    return result


def promoted(layer: int, index: int) -> str | None:
    return {(1, 0): " Austin", (3, 0): "."}.get((layer, index))


def test_labels_and_scores(labelling: Labelling) -> None:
    labels = {(layer, index): label for layer, index, label in labelling}
    assert set(labels) == {(1, 0), (3, 0), RARE}
    texas = labels[1, 0]
    assert texas.text in ("Dallas | Houston → Austin", "Houston | Dallas → Austin")
    assert texas.claim == texas.text.removesuffix(" → Austin")
    assert (texas.source, texas.precision, texas.recall, texas.f1) == ("rule", 1.0, 1.0, 1.0)
    noise = labels[3, 0]
    assert noise.text == UNCLEAR
    assert noise.claim, "the claim is kept"
    assert noise.f1 is not None
    assert noise.f1 < 0.3
    rare = labels[RARE]
    assert (rare.text, rare.f1, rare.precision, rare.recall) == (UNSCORED, None, None, None)


def test_figures(labelling: Labelling) -> None:
    f1 = {(layer, index): label.f1 or 0.0 for layer, index, label in labelling}
    texas, noise = f1[1, 0], f1[3, 0]
    n_texas, n_noise = labelling.fires_F[[0, 2]]
    facts = labelling.facts()
    assert facts["alive"] == 2
    assert facts["not_scored"] == 1
    assert facts["unclear"] == 0.5
    assert facts["mean_f1"] == pytest.approx((texas + noise) / 2)
    assert facts["mean_f1_by_firing"] == pytest.approx((n_texas * texas + n_noise * noise) / (n_texas + n_noise))


def test_a_feature_that_the_sample_does_not_show_is_unclear() -> None:
    labelling = Labelling(TEXTS, LAYERS, N_FEATURES)
    labelling.propose(batches(3, 0))
    labelling.score(batches(3, 1, rare=True), promoted)
    labels = {(layer, index): label for layer, index, label in labelling}
    assert labels[RARE] == Label(UNCLEAR, "rule")
    assert labelling.facts()["alive"] == 3
    assert SILENT not in labels


def test_rows_are_added_for_features_that_seldom_fire() -> None:
    """Without them feature 3/1, which fires on Oslo, has no claim; claims of the others stay."""

    def with_oslo(source: Iterable[Firings]) -> Iterator[Firings]:
        for batch in source:
            row, position = np.nonzero(batch.tokens_RT == 3)
            columns = {"layer": 3, "index": 1, "row": row, "position": position, "activation": np.float32(1)}
            joined = {
                name: np.concatenate([getattr(batch, name), np.broadcast_to(value, row.shape)])
                for name, value in columns.items()
            }
            yield Firings(batch.tokens_RT, batch.counted_RT, **joined)

    asked: list[int] = []

    def rows_with(numbers: np.ndarray) -> Iterator[Firings]:
        asked.extend(numbers.tolist())
        return with_oslo(batches(2, 7))

    few = Labelling(TEXTS, LAYERS, N_FEATURES)
    few.propose(batches(10, 0))
    more = Labelling(TEXTS, LAYERS, N_FEATURES)
    more.propose(batches(10, 0), rows_with)
    assert asked == [1, 3], "1/1 and 3/1"
    assert more.claims == {**few.claims, 3: Claim.of(current=["Oslo"])}


def test_a_sample_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(source: Iterable[Firings]) -> Iterator[Firings]:
        for batch in source:
            read.append(len(batch))
            yield batch

    monkeypatch.setattr("replacement.index.labels.MOST_FIRINGS", 150)
    Labelling(TEXTS, LAYERS, N_FEATURES).propose(counted(batches(20, 0)))
    assert sum(read[:-1]) < 150 <= sum(read)


def test_a_long_claim_leaves_room_for_what_is_promoted() -> None:
    labelling = Labelling(TEXTS, LAYERS, N_FEATURES)
    labelling.claims = {0: Claim.of(word=["Constantinople", "Thessaloniki", "Antananarivo"])}
    labelling.score(batches(1, 1), lambda layer, index: " Washington")
    label = next(iter(labelling))[2]
    assert label.text == UNCLEAR
    labelling.claims = {0: Claim.of(current=["Dallas", "Houston", "x" * 50])}
    labelling.score(batches(1, 1), lambda layer, index: " Washington")
    assert next(iter(labelling))[2].text == "Dallas | Houston … → Washington"
    labelling.score(batches(1, 1), lambda layer, index: "\n")
    assert next(iter(labelling))[2].text == 'Dallas | Houston … → "⏎"'
    assert len(next(iter(labelling))[2].text) <= SHORT


def record(layer: int, index: int) -> FeatureRecord:
    return FeatureRecord(layer, index, density=0.1, max_activation=2.0)


def test_claims_of_a_labeller_are_scored_beside_those_of_rules(labelling: Labelling) -> None:
    seen: list[dict[str, Any]] = []

    def labeller(questions: Iterable[dict[str, Any]]) -> list[Answer]:
        seen.extend(questions)
        wrong = Claim.of(current=["Oslo"])
        return [Answer(1, 0, "cities of Texas", TEXAS), Answer(3, 0, "noise", wrong), Answer(3, 1, "rare", None)]

    labelling.ask(labeller, record, batches(5, 1))
    assert [(entry["layer"], entry["index"]) for entry in seen] == [(1, 0), (3, 0), RARE]
    assert seen[0]["claim"]["f1"] == 1.0
    assert Claim.from_json(seen[0]["claim"]["fires_on"]) == labelling.claims[0]
    labels = [(layer, index, label) for layer, index, label in labelling if label.source == "language model"]
    (_, _, texas), (_, _, noise), (_, _, rare) = labels
    assert (texas.text, texas.claim, texas.f1) == ("cities of Texas", "cities of Texas: Dallas | Houston", 1.0)
    assert (noise.text, noise.claim) == (UNCLEAR, "noise: Oslo")
    assert rare == Label("rare", "language model", "rare")
