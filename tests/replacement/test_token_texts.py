"""Texts of tokens, with vocabularies of the three kinds trained here: the pieces of a text must say the text."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from replacement.token_texts import alone, in_a_row, token_bytes, visible

TEXT = ["the cat sat on a mat", "a cat in the hat", "unaffable unhappy cats"] * 4
SPECIAL = ["<unk>", "<s>"]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2: every byte is a character of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama: `▁` for spaces, byte pieces for what the vocabulary lacks."""
    words = ["▁", "▁a", "a", "▁the", "▁cat", "the", "cat", "s", "\n"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: pieces that continue a word begin with `##`."""
    tokenizer = Tokenizer(
        models.WordPiece({"<unk>": 0, "<s>": 1, "un": 2, "##aff": 3, "##able": 4, "a": 5}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def texts(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return in_a_row(token_bytes(tokenizer, ids))


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The text that the bytes of all pieces say."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return b"".join(token_bytes(tokenizer, ids)).decode()


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_space_tells_two_tokens_apart(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    shown = [visible(text) for text in texts(make(), "cat a\na")]
    assert shown[-3:] == ["␣a", "⏎", "a"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_character_of_several_tokens_is_the_text_of_the_last(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    assert texts(tokenizer, "日€")[-6:] == ["<E6>", "<97>", "日", "<E2>", "<82>", "€"]
    ids = tokenizer("日", add_special_tokens=False)["input_ids"][-3:]
    assert alone(token_bytes(tokenizer, ids)) == ["<E6>", "<97>", "<A5>"]
    assert in_a_row(token_bytes(tokenizer, ids[1:])) == ["<97>", "<A5>"], "half of a character"


def test_word_pieces_keep_their_mark() -> None:
    assert texts(word_piece(), "unaffable a") == ["un", "##aff", "##able", "a"]


@given(text=st.text(max_size=20))
def test_the_pieces_say_the_text(text: str) -> None:
    assert whole(BYTES, text) == text
    assert whole(LLAMA, text) == f" {text}".replace("▁", " ") * bool(text), "a space in front, and ▁ is a space"


BYTES, LLAMA = byte_level(), sentencepiece()


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_are_shown_by_number(data: bytes) -> None:
    codecs.register_error(
        "by number", lambda e: ("".join(f"<{byte:02X}>" for byte in e.object[e.start : e.end]), e.end)
    )
    assert in_a_row([data]) == alone([data]) == [data.decode("utf-8", "by number")]


@given(text=st.text(max_size=8), cuts=st.lists(st.integers(0, 32)))
def test_a_text_cut_anywhere(text: str, cuts: list[int]) -> None:
    """Every character is said by the piece that holds its last byte; its other pieces show the bytes that they hold."""
    data = text.encode()
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    expected = [""] * (len(ends) - 1)
    place = 0
    for character in text:
        size = len(character.encode())
        holders = [
            next(k for k in range(len(expected)) if ends[k] <= byte < ends[k + 1])
            for byte in range(place, place + size)
        ]
        for byte, holder in enumerate(holders, place):
            if holder != holders[-1]:
                expected[holder] += f"<{data[byte]:02X}>"
        expected[holders[-1]] += character
        place += size
    assert in_a_row([data[a:b] for a, b in itertools.pairwise(ends)]) == expected


def test_special_tokens_and_ids_outside_the_vocabulary() -> None:
    for tokenizer in (BYTES, LLAMA, word_piece()):
        assert alone(token_bytes(tokenizer, [1, 10**6])) == ["<s>", "#1000000"]


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        " a": "␣a",
        "a": "a",
        "New York": "New York",
        "   ": "␣␣␣",
        "\n": "⏎",
        "\r\n\t": "␍⏎⇥",
        "\x1b[2J": "<U+001B>[2J",
        "a\u200b\u00a0": "a<U+200B><U+00A0>",
        "\u200d": "<U+200D>",
        "a\u200db \u200c": "a<U+200D>b <U+200C>",
        "\U0001f469\u200d\U0001f52c": "\U0001f469\u200d\U0001f52c",
        "\u0645\u06cc\u200c\u0631\u0648\u0645": "\u0645\u06cc\u200c\u0631\u0648\u0645",
        "␣a": "␣a",
        "": "",
    }.items(),
)
def test_nothing_is_invisible(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_tokenizers_that_join_in_another_way_are_asked() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "cat</w>": 2}, unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    assert alone(token_bytes(fast, [2])) == ["cat"]
