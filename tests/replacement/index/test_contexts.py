"""Words, names and sentences at every token, against plain Python on strings, and for real tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from replacement.index.claims import Claim
from replacement.index.contexts import Contexts, TokenTexts, text_hash
from replacement.token_texts import CLASSES

TEXTS = [
    "<bos>",
    " Dal",
    "las",
    " Houston",
    " El",
    " Pas",
    "o",
    " the",
    " is",
    ".",
    "?",
    ' "',
    "\n",
    " 17",
    "32",
    " x",
    "'s",
    " ",
]
SPECIAL = (0,)
rows = st.integers(1, 12).flatmap(
    lambda T: st.lists(st.lists(st.integers(0, len(TEXTS) - 1), min_size=T, max_size=T), min_size=1, max_size=4)
)


def read(row: list[int]) -> list[dict[str, Any]]:
    """What stands at every token of a row, read from its text piece by piece."""
    result: list[dict[str, Any]] = []
    sentence: list[list[str]] = []  # words so far, as pieces
    fresh, ended = True, True
    for number in row:
        text = TEXTS[number]
        special = number in SPECIAL
        if ended:
            sentence = []
        if fresh or special or not text[0].isalnum() or ended:
            sentence.append([])
            is_start = True
        else:
            is_start = False
        shown = text.strip() or repr(text)
        sentence[-1].append(shown)
        words = ["".join(pieces) for pieces in sentence]
        run, before = [words[-1]], [word for word in words[:-1] if word != "' '"]
        while before and before[-1][0].isupper() and run[0][0].isupper():
            run.insert(0, before.pop())
        extra = max(0, (len(run) - 1) // 3 * 3)  # runs are cut after three words
        first = next((word for word in words if word[0].isalnum()), None)
        result.append(
            {
                "current": shown if is_start else f"##{shown}",
                "word": words[-1],
                "name": " ".join(run[extra:]),
                "first": first,
                "earlier": set(words[:-1]),
            }
        )
        fresh = special or not text[-1].isalnum()
        ended = special or "\n" in text or text.strip().rstrip("\"'").endswith((".", "?"))
    return result


@given(rows)
def test_columns_equal_what_is_read_from_the_text(tokens: list[list[int]]) -> None:
    contexts = Contexts(np.array(tokens), TokenTexts(TEXTS, SPECIAL))
    for r, row in enumerate(tokens):
        seen = read(row)
        for t, here in enumerate(seen):
            for column in ("current", "word", "name", "first"):
                expected = 0 if here[column] is None else text_hash(here[column])
                assert contexts.column(column)[r, t] == expected, (column, here)
            assert contexts.column("previous")[r, t] == (text_hash(seen[t - 1]["current"]) if t else 0)
            assert contexts.text_at("word", r * len(row) + t) == here["word"]
            assert contexts.text_at("name", r * len(row) + t) == here["name"]
            for name, test in CLASSES.items():
                assert (contexts.column(f"class {name}")[r, t] != 0) == test(here["word"])
    for word in ("Dallas", "Dal", "the", "Houston"):
        expected = [[word in here["earlier"] for here in read(row)] for row in tokens]
        assert Claim.of(earlier=[word]).holds(contexts).tolist() == expected


def test_affixes_and_digits() -> None:
    contexts = Contexts(np.array([[1, 2, 13, 14, 16]]), TokenTexts(TEXTS, SPECIAL))  # Dal las 17 32 's
    assert Claim.of(ends=["las"]).holds(contexts).tolist() == [[False, True, False, False, False]]
    assert Claim.of(begins=["Da"]).holds(contexts).tolist() == [[True, True, False, False, False]]
    assert Claim.of(**{"last digit": ["2"]}).holds(contexts).tolist() == [[False, False, False, True, False]]
    assert Claim.of(**{"class": ["later piece of a word"]}).holds(contexts).tolist() == [
        [False, True, False, True, False]
    ]


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 18\), got 3 to 18"):
        Contexts(np.array([[3, 18]]), TokenTexts(TEXTS))


CORPUS = ["Dallas is in Texas . Houston is in Texas , too .", "El Paso is a city . is it ? cities , states é 日本"] * 5
TEXT = "Houston is in Texas . El Paso is a city ."


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer trained on two sentences, too small to hold the names whole."""
    options = {"special_tokens": ["<s>", "<unk>"], "show_progress": False}
    if kind == "words":
        core = Tokenizer(models.WordLevel(unk_token="<unk>"))
        core.pre_tokenizer, trainer = pre_tokenizers.WhitespaceSplit(), trainers.WordLevelTrainer(**options)
    elif kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder, trainer = decoders.WordPiece(), trainers.WordPieceTrainer(vocab_size=55, **options)
    elif kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet, **options)
    else:  # as Llama's: spaces become ▁, the first of a text is dropped when it is decoded
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=60, **options)
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["words", "wordpiece", "bytes", "metaspace"])
def test_words_are_joined_whatever_the_tokenizer(kind: str) -> None:
    made = tokenizer(kind)
    ids = [made.bos_token_id, *made.encode(TEXT, add_special_tokens=False)]
    assert kind == "words" or len(ids) > len(TEXT.split()) + 1, "names are split"
    contexts = Contexts(np.array([ids]), TokenTexts.of(made, len(made) + 3, [made.bos_token_id]))
    spaces = contexts.texts.is_space_V[contexts.tokens_RT[0]]  # a space may be a token of its own
    last = np.flatnonzero(np.append(contexts.starts_RT[0, 1:], True) & ~spaces)
    words = [contexts.text_at("word", int(place)) for place in last]
    assert words == ["<s>", *TEXT.split()]
    assert [contexts.text_at("name", int(place)) for place in last][6:8] == ["El", "El Paso"]
    assert contexts.sentence_RT[0, last].tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert contexts.texts.splits_words == (kind != "words")
    assert contexts.texts.pieces[-1] == f"#{len(made) + 2}", "a token of the model that the tokenizer does not know"


def test_lone_bytes_differ() -> None:
    made = tokenizer("bytes")
    pieces = TokenTexts.of(made, len(made), []).pieces
    assert len(set(pieces)) > 250 - 60
    assert not any("�" in piece for piece in pieces)


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    contexts = Contexts(np.array([[2, 0]]), TokenTexts.of(None, 3))
    assert contexts.text_at("word", 0) == "#2"
    assert contexts.starts_RT.all()
