"""The word-level tokenizer: names, years, punctuation, unknown words, saving."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from replacement.demo import corpus
from replacement.demo.tokenizer import build_tokenizer


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("Salt Lake City is a city in Utah .", ["Salt Lake City", "is", "a", "city", "in", "Utah", "."]),
        ("New Mexico. West Virginia Virginia", ["New Mexico", ".", "West Virginia", "Virginia"]),
        ("from 1732 to 17", ["from", "17", "32", "to", "17"]),
        ("from 1805 to 1899", ["from", "18", "05", "to", "18", "99"]),
        ("36 + 59 = 95 .", ["36", "+", "59", "=", "95", "."]),
        ("99+99=198.", ["99", "+", "99", "=", "198", "."]),
        ("went to the store, John", ["went", "to", "the", "store", ",", "John"]),
        ("who saw it?", ["who", "saw", "<unk>", "?"]),
        ("Mary mary", ["Mary", "<unk>"]),
    ],
)
def test_splitting(prompt: str, tokens: list[str]) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_special_tokens() -> None:
    tokenizer = build_tokenizer()
    assert [tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    assert tokenizer.encode("Texas", add_special_tokens=True)[0] == tokenizer.bos_token_id
    assert len(tokenizer.encode("Texas", add_special_tokens=False)) == 1
    assert tokenizer.encode("<bos> Texas", add_special_tokens=False)[0] == tokenizer.bos_token_id


def test_every_token_encodes_to_itself() -> None:
    tokenizer = build_tokenizer()
    for i, token in enumerate(corpus.vocabulary()):
        assert tokenizer.encode(token, add_special_tokens=False) == [i]
        assert tokenizer.decode([i]) == token


def test_sentences_round_trip_and_survive_saving(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) == len(corpus.vocabulary())
    assert (loaded.bos_token_id, loaded.unk_token_id, loaded.pad_token_id) == (0, 1, 2)
    for sentence in corpus.sample_sentences(np.random.default_rng(1), 2_000):
        words = " ".join(sentence)
        ids = tokenizer.encode(words, add_special_tokens=False)
        assert ids == loaded.encode(words, add_special_tokens=False)
        assert loaded.encode(words) == [0, *ids]
        assert ids == [i for word in sentence for i in tokenizer.encode(word, add_special_tokens=False)]
        if not any(word.isdigit() and len(word) == 4 for word in sentence):
            assert loaded.decode(ids) == words
