"""Readable texts of single tokens: spaces, line ends and lone bytes of a vocabulary's pieces made visible. Needs no torch.

A piece of a byte-level vocabulary (GPT-2) stands for bytes, and may hold a part of a character; so may the byte pieces of
sentencepiece vocabularies (Llama: `<0xE2>`), whose other pieces write a space as `▁`. WordPiece pieces that continue a word
keep their `##`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

SPACE = "␣"
MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
"""Characters that are shown as others."""
CLASSES: dict[str, Callable[[str], bool]] = {
    "number": str.isdigit,
    "capitalised word": lambda word: word[0].isupper(),
    "lower-case word": lambda word: word.isalpha() and word.islower(),
    "punctuation": lambda word: not any(map(str.isalnum, word)),
}
"""Classes of words, by what labels call them."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SHOWN_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that byte-level vocabularies write as the character of that number; the others follow from 256 on."""
_BYTE_OF = {chr(byte): byte for byte in _SHOWN_BYTES} | {
    chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(_SHOWN_BYTES)))
}
_JOINED = re.compile(r"(?<=[^\0-\x7f\s\u200c\u200d])[\u200c\u200d](?=[^\0-\x7f\s\u200c\u200d])")
"""A joiner or non-joiner between two characters beyond ASCII: a part of many emoji and of words of Persian and of India."""
LONGEST = 4
"""Most bytes of a character in UTF-8."""


def visible(text: str) -> str:
    """A token's text with nothing in it that cannot be seen.

    Spaces at its ends become `␣`, so that " a" and "a" differ; line ends and tabs become `⏎`, `␍` and `⇥`, and other
    characters that have no shape their number, such as `<U+200B>`; joiners inside a word or an emoji stay.

    >>> visible(" a"), visible(chr(10))
    ('␣a', '⏎')
    """
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    joiners = {match.start() for match in _JOINED.finditer(inner)}
    shown = "".join(
        MARKS.get(c) or (c if c.isprintable() or place in joiners else f"<U+{ord(c):04X}>")
        for place, c in enumerate(inner)
    )
    return SPACE * start + shown + SPACE * (len(text) - start - len(inner))


def quoted(text: str) -> str:
    """A token's text, in quotes where it holds no letter or digit: a lone `?` would read as a doubt of the text around it.

    >>> quoted("?"), quoted("Austin")
    ('"?"', 'Austin')
    """
    return text if any(map(str.isalnum, text)) else f'"{text}"'


def token_bytes(tokenizer: Any, token_ids: Sequence[int]) -> list[bytes]:
    """The bytes that each token adds to a text, in UTF-8; an id that the tokenizer does not have gives `#id`.

    Args:
        tokenizer: a Hugging Face tokenizer. Of one that is not fast, or joins pieces in another way than the vocabularies
            described above, each token is decoded alone.
    """
    joins = _joins(tokenizer)
    if joins is None:
        return [str(tokenizer.decode([token])).encode("utf-8", "replace") for token in token_ids]
    pieces = tokenizer.convert_ids_to_tokens(token_ids)
    named = ((f"#{token}" if piece is None else piece) for token, piece in zip(token_ids, pieces, strict=True))
    return [_bytes_of(piece, joins) for piece in named]


def _joins(tokenizer: Any) -> str | None:
    """How a vocabulary's pieces become text: `bytes`, `sentencepiece`, `pieces` as they are, or None for another way."""
    if not tokenizer.is_fast:
        return None
    decoder = tokenizer.backend_tokenizer.decoder
    steps = "" if decoder is None else decoder.__getstate__().decode()
    kinds = set(re.findall(r'"type":\s*"(\w+)"', steps))
    if "ByteLevel" in kinds:
        return "bytes"
    if "▁" in steps:
        return "sentencepiece"
    return None if kinds - {"WordPiece"} else "pieces"


def _bytes_of(piece: str, joins: str) -> bytes:
    if joins == "bytes" and all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    if joins == "sentencepiece":
        match = _BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(match[1]) if match else piece.replace("▁", " ").encode("utf-8", "replace")
    return piece.encode("utf-8", "replace")


def alone(pieces: Iterable[bytes]) -> list[str]:
    """The text of each piece, whatever stands beside it; bytes that are no whole character are shown, such as `<E2>`."""
    return [text for piece in pieces for text in in_a_row([piece])]


def in_a_row(pieces: Sequence[bytes]) -> list[str]:
    """The texts of pieces that follow one another: a character made of several is the text of the last of them.

    >>> in_a_row(["日".encode()[:2], "日".encode()[2:]])
    ['<E6><97>', '日']
    """
    try:
        return [piece.decode() for piece in pieces]
    except UnicodeDecodeError:
        pass
    data, texts, start = b"".join(pieces), [""] * len(pieces), 0
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    while start < len(data):
        character = _first_character(data[start : start + LONGEST])
        stop = start + max(len(character.encode()), 1)
        shown_by = owner[stop - 1] if character else -1
        for place in range(start, stop):
            if owner[place] != shown_by:
                texts[owner[place]] += f"<{data[place]:02X}>"
        if character:
            texts[shown_by] += character
        start = stop
    return texts


def _first_character(data: bytes) -> str:
    """The character that some bytes begin with; empty where they begin with none."""
    for length in range(1, len(data) + 1):
        try:
            return data[:length].decode()
        except UnicodeDecodeError:
            continue
    return ""
