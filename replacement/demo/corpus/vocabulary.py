"""The closed vocabulary of the corpus, collected from the behaviours that use it."""

from replacement.demo.corpus import (
    addition,
    agreement,
    antonyms,
    geography,
    indirect_object,
    induction,
    questions,
    years,
)

BOS, UNK, PAD = "<bos>", "<unk>", "<pad>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, UNK, PAD)
PUNCTUATION: tuple[str, ...] = (".", "?", ",")

_SOURCES = (addition, years, geography, antonyms, indirect_object, agreement, questions, induction)


def vocabulary() -> tuple[str, ...]:
    """All tokens, special ones first, in id order."""
    words = [word for source in _SOURCES for word in source.words()]
    return tuple(dict.fromkeys([*SPECIAL_TOKENS, *PUNCTUATION, *words]))


def multi_word_names() -> tuple[str, ...]:
    """The tokens that contain a space, such as `New Mexico`."""
    return tuple(word for word in vocabulary() if " " in word)
