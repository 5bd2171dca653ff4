"""The file of an index: what is written is read back, lazily; foreign files and other crosscoders are refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from index_file import CITY, EFFECTS, THROUGH_HEAD, WEAK, facts, write

from replacement.index import packing
from replacement.index.records import Label
from replacement.index.store import FeatureIndex


@pytest.fixture
def index(tmp_path: Path) -> Iterator[FeatureIndex]:
    with FeatureIndex.open(write(tmp_path / "features.sqlite"), writable=True) as opened:
        yield opened


def test_a_feature_is_read_back(index: FeatureIndex) -> None:
    record = index.feature(0, 1)
    assert (record.density, record.max_activation) == (10 / 40, 8.0)
    assert record.histogram_edges == (0.0, 2.0, 4.0, 6.0)
    assert record.histogram_counts == (3, 0, 300)
    (top,), (quantile,) = record.top_examples, record.quantile_examples
    assert (top.tokens, top.activations) == (("<s>", " Dallas", " the"), (0.0, 8.0, 4.0))
    assert (top.peak, top.row, top.position, top.quantile) == (1, 70, 1, None)
    assert (quantile.tokens, quantile.activations) == ((" the", "dallas", "a%b"), (0.0, 0.0, 2.0))
    assert (quantile.peak, quantile.row, quantile.position, quantile.quantile) == (2, 70, 4, 0.25)
    assert index.feature(0, 0).effects == EFFECTS
    assert index.feature(2, 1).effects == THROUGH_HEAD
    silent = index.feature(2, 2)
    assert (silent.density, silent.histogram_counts, silent.histogram_edges, silent.top_examples) == (0.0, (), (), ())
    assert [(record.layer, record.index) for record in index] == [(layer, i) for layer in (0, 2) for i in range(3)]


def test_the_best_label_comes_first_and_a_bad_one_is_unclear(index: FeatureIndex) -> None:
    assert index.labels([(2, 0), (0, 1), (2, 2)]) == {(2, 0): CITY, (2, 2): WEAK}
    assert (index.label(2, 0), index.feature(2, 0).other_labels) == (CITY, (WEAK,))
    assert index.label(0, 1) is None
    index.add_person_label(2, 0, " Texan cities ")
    person = Label("Texan cities", "person")
    assert (index.feature(2, 0).label, index.feature(2, 0).other_labels) == (person, (CITY, WEAK))
    assert index.person_labels() == {(2, 0): [person]}


def test_search_finds_labels_then_tokens(index: FeatureIndex) -> None:
    found = [(match.layer, match.index, match.reason) for match in index.search("DALLAS")]
    assert found == [(0, 1, "fires on Dallas"), (2, 1, "reads Dallas"), (0, 0, "promotes Dallas")]
    assert [match.reason for match in index.search("CIT")] == ["label: cities"]
    assert index.search("%") == index.search("a%"), "no wildcard"
    assert [match.reason for match in index.search("dallas", limit=1)] == ["fires on Dallas"]


def test_people_s_labels_are_no_part_of_the_digest(index: FeatureIndex, tmp_path: Path) -> None:
    before = index.digest()
    index.add_person_label(0, 0, "the")
    assert index.digest() == before
    for changed in (facts(n_tokens=41), facts(settings={"before": 1, "after": 1, "n_quantiles": 4})):
        with FeatureIndex.open(write(tmp_path / f"{len(changed)}{id(changed)}.sqlite", **changed)) as other:
            assert other.digest() != before


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda index: index.feature(1, 0), "there is no layer 1: .* has layers 0, 2"),
        (lambda index: index.label(2, 3), "there is no feature 2/3: layers have features 0 to 2"),
        (lambda index: index.feature(2, -1), "there is no feature 2/-1"),
        (lambda index: index.search(" "), "search: expected some text"),
        (lambda index: index.search("a", limit=0), "limit: expected at least 1, got 0"),
        (lambda index: index.add_person_label(0, 0, " "), "a label needs some text"),
    ],
)
def test_wrong_questions(index: FeatureIndex, ask: Callable[[FeatureIndex], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(index)


def test_a_file_opened_to_read_takes_no_labels(tmp_path: Path) -> None:
    with (
        FeatureIndex.open(write(tmp_path / "a.sqlite")) as index,
        pytest.raises(ValueError, match="the label could not be stored"),
    ):
        index.add_person_label(0, 0, "the")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("no database" * 100)
    sqlite3.connect(tmp_path / "other.sqlite").executescript("CREATE TABLE x (y); INSERT INTO x VALUES (1);")
    newer = write(tmp_path / "newer.sqlite", version=2)
    for path, message in [
        (tmp_path / "text.sqlite", "text.sqlite is no feature index"),
        (tmp_path / "other.sqlite", "other.sqlite is no feature index"),
        (newer, "newer.sqlite has format version 2; this library reads version 1"),
        (
            write(tmp_path / "format.sqlite", format="x"),
            "is no feature index: expected format 'crosstrace feature index'",
        ),
        (tmp_path / "none.sqlite", "none.sqlite does not exist: expected a feature index"),
        (tmp_path, "is not a file: expected a feature index"),
    ]:
        with pytest.raises(ValueError, match=message):
            FeatureIndex.open(path)


def test_an_index_of_another_crosscoder_is_refused(tmp_path: Path) -> None:
    crosscoder = tiny.crosscoder_for(tiny.native_model(torch.float32))
    path = write(tmp_path / "a.sqlite")
    message = rf"another crosscoder: of 2:abc \(tiny\), this one is {crosscoder.fingerprint} \(tiny-native\)"
    with pytest.raises(ValueError, match=message):
        FeatureIndex.open(path, crosscoder=crosscoder)
    same = write(tmp_path / "b.sqlite", crosscoder_fingerprint=crosscoder.fingerprint)
    with FeatureIndex.open(same, crosscoder=crosscoder) as index:
        assert index.layers == (0, 2)


@pytest.mark.parametrize("largest", [0, 1, 255, 256, 65_536, 2**32])
def test_counts_survive_packing(largest: int) -> None:
    counts = np.array([0, largest, 1, 0, 0])
    unpacked = packing.unpack_counts(packing.pack_counts(counts))
    assert unpacked.tolist() == [0, largest, 1]
