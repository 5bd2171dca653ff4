"""Texts in the tokens of several tokenizers: what is aligned has read the same characters, by a brute-force oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replacement.data.aligned_texts import RowLayout, TextReader, pack_aligned
from replacement.data.documents import Piece

BOS, END = 1, 2


class Cutter:
    """A tokenizer of one's own: cuts the texts it was made for where it is told to; ids count up from 3."""

    def __init__(self, lengths: dict[str, list[int]]) -> None:
        self.lengths, self.read_so_far = lengths, 3

    def __call__(self, texts: Sequence[str], **_: object) -> dict[str, Any]:
        ids, offsets = [], []
        for text in texts:
            ends = list(accumulate(self.lengths[text]))
            ids.append(list(range(self.read_so_far, self.read_so_far + len(ends))))
            offsets.append([(end - length, end) for end, length in zip(ends, self.lengths[text], strict=True)])
            self.read_so_far += len(ends)
        return {"input_ids": ids, "offset_mapping": offsets}


@st.composite
def tokenisations(draw: st.DrawFn) -> tuple[list[Piece], list[TextReader]]:
    """Documents of different lengths, cut in two or three ways; a token may have no characters, and a text may end in
    characters that no token holds."""
    texts = ["x" * n for n in draw(st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True))]
    readers = []
    for number in range(draw(st.integers(2, 3))):
        lengths = {}
        for text in texts:
            cut, left = [], len(text) - draw(st.integers(0, min(2, len(text) - 1)))
            while left > 0:
                cut.append(min(left, draw(st.integers(0 if cut else 1, 4))))
                left -= cut[-1]
            lengths[text] = cut
        bos, separator = draw(st.sampled_from([None, BOS])), draw(st.sampled_from([None, END]))
        options = {"bos": bos, "separator": separator, "special": frozenset({BOS, END})}
        context = draw(st.integers(3, 9))
        readers.append(
            TextReader(f"reader {number}", Cutter(lengths), context=context, vocabulary_size=10_000, **options)
        )
    return [Piece(text, draw(st.booleans())) for text in texts], readers


def read_of(reader: TextReader, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Every token by its id and the characters of all documents that were read when it ended."""
    tokens, offset, number = [], 0, 3
    for piece in pieces:
        for length in accumulate(reader.tokenizer.lengths[piece.text]):
            tokens.append((number, offset + length))
            number += 1
        offset += len(piece.text) + piece.ends_document
        if piece.ends_document and reader.separator is not None:
            tokens.append((END, offset))
    return tokens


@settings(max_examples=150, deadline=None)
@given(tokenisations())
def test_alignment_equals_brute_force(case: tuple[list[Piece], list[TextReader]]) -> None:
    """In every row, two text tokens are counterparts if and only if both are the last to end at one character."""
    pieces, readers = case
    layout = RowLayout(tuple(reader.context for reader in readers))
    texts = [read_of(reader, pieces) for reader in readers]
    packed: list[np.ndarray] = []
    with contextlib.suppress(ValueError):  # where nothing is aligned: see below
        packed.extend(pack_aligned(pieces, readers))
    rows_RX = torch.from_numpy(np.concatenate([np.empty((0, sum(layout.sizes)), int), *packed]))
    ends = [{number: end for number, end in tokens if number != END} for tokens in texts]
    taken: list[list[int]] = [[] for _ in readers]
    n_aligned = 0
    for row_X in rows_RX:
        parts = layout.split(row_X[None])
        rows = [tokens_RT[0].tolist() for tokens_RT, _ in parts]
        heads = [int(reader.bos is not None) for reader in readers]
        assert all(row[:head] == [BOS] * head for row, head in zip(rows, heads, strict=True))
        chars = [[ends[m].get(number) for number in row] for m, row in enumerate(rows)]
        for m, row in enumerate(rows):
            taken[m] += [number for number in row if number in ends[m]]
        expected = []
        for p, end in enumerate(chars[0]):
            last = [[q for q, other in enumerate(row) if other == end] for row in chars]
            if end is not None and all(last) and last[0][-1] == p:
                expected.append(tuple(places[-1] for places in last))
        n_aligned += len(expected)
        if all(heads):
            expected.insert(0, (0,) * len(readers))
        places = torch.stack([place_RT[0] for _, place_RT in parts])
        found = [tuple(column.tolist()) for column in places.T if column[0] >= 0]
        assert found == expected
        assert bool(((places >= 0).all(0) == (places >= 0).any(0)).all())
    n_text, counted = layout.counts(rows_RX)
    assert counted == n_aligned
    for m, numbers in enumerate(taken):
        assert numbers == sorted(set(numbers))  # nothing twice, nothing out of order
        assert len(numbers) <= n_text[m]
    if len(rows_RX):
        # Up to the end of the last row every token of text is counted, in a row or left out; if that row ends in text.
        of_last = [end for m, chars in enumerate(ends) for number in rows[m] if (end := chars.get(number)) is not None]
        assert of_last or END in rows[0] + rows[1] + rows[-1]  # no row is empty
        for m, chars in enumerate(ends if of_last else ()):
            assert n_text[m] == sum(end <= max(of_last) for end in chars.values())


def test_rows_end_where_all_tokenizers_do_and_what_fits_no_row_is_counted() -> None:
    text = "x" * 14
    cuts = ([2, 2, 2, 2, 2, 2, 2], [4, 1, 1, 1, 1, 4, 2])
    readers = [TextReader(str(m), Cutter({text: cut}), 3, 99, None, None) for m, cut in enumerate(cuts)]
    rows = torch.from_numpy(np.concatenate(list(pack_aligned([Piece(text, False)] * 2, readers))))
    layout = RowLayout((3, 3))
    (first, first_place), (second, second_place) = layout.split(rows)
    # Tokens of both end at 4, 6, 8, 12 and 14, and in the next text at 18; with three tokens rows end at 6, 12 and 18.
    assert first.tolist()[:3] == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert second.tolist()[:3] == [[3, 4, 5], [6, 7, 8], [9, 10, 0]]
    assert first_place.tolist()[:3] == [[-1, 1, 2], [0, -1, 2], [0, -1, 2]]
    assert second_place.tolist()[:3] == [[-1, 0, 2], [1, -1, 2], [0, -1, 1]]
    assert layout.counts(rows[:3]) == ([9, 8], 6)
    cuts = ([2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 4, 4, 2])  # up to 2 and 4, and then as before
    readers = [TextReader(str(m), Cutter({text: cut}), 1, 99, None, None) for m, cut in enumerate(cuts)]
    rows = torch.from_numpy(np.concatenate(list(pack_aligned([Piece(text, False)] * 2, readers))))
    # With one token in a row only the last two characters fit; all before are left out, and counted with that row.
    assert rows.tolist()[0] == [9, 9, 0, 0, 7, 7, 1]


def test_tokenizers_that_never_agree_have_no_common_text() -> None:
    pieces = [Piece("x" * 9, False)]
    readers = [
        TextReader(name, Cutter({"x" * 9: cut}), 3, 99, None, None)
        for name, cut in {"a": [2, 4, 2], "b": [3, 4, 2]}.items()
    ]
    with pytest.raises(ValueError, match="no common text: the tokenizers of a and b never end a token at the same"):
        list(pack_aligned(pieces, readers))
