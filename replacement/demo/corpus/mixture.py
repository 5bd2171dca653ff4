"""Rows of training tokens: `<bos>` followed by packed sentences of all behaviours.

Seed convention: training rows come from the random stream `[0, seed]`, held-out rows from `[1, seed]` and probes from
`[2, seed, behaviour]`; NumPy's seed sequences make streams with different leading words independent for every seed.
"""

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from transformers import PreTrainedTokenizerBase

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
from replacement.demo.corpus.sentences import Sampler, Sentence

_TRAINING_STREAM, _HELD_OUT_STREAM = 0, 1
_BLOCK = 4096  # sentences drawn at a time

TOKEN_SHARES: dict[str, tuple[Sampler, float, float]] = {
    "geography": (geography.sample, 0.20, 7.0),
    "antonyms": (antonyms.sample, 0.24, 7.0),
    "addition": (addition.sample, 0.32, 6.0),
    "indirect object": (indirect_object.sample, 0.06, 16.0),
    "induction": (induction.sample, 0.08, 17.0),
    "agreement": (agreement.sample, 0.03, 5.4),
    "questions": (questions.sample, 0.03, 7.1),
    "years": (years.sample, 0.04, 10.5),
}
"""Behaviour -> (sampler, share of the tokens, mean tokens per sentence)."""


def sample_sentences(rng: np.random.Generator, n: int) -> list[Sentence]:
    """`n` sentences of the training mixture in random order."""
    samplers, token_shares, lengths = zip(*TOKEN_SHARES.values(), strict=True)
    shares = np.array(token_shares) / lengths
    counts = rng.multinomial(n, shares / shares.sum()).tolist()
    sentences = [s for sampler, count in zip(samplers, counts, strict=True) for s in sampler(rng, count)]
    return [sentences[i] for i in rng.permutation(n).tolist()]


_INDUCTION_WORDS = frozenset(induction.WORDS)
_VERBS = frozenset((*agreement.VERBS[0], *agreement.VERBS[1]))


def determined(sentence: Sentence) -> list[bool]:
    """For every word, whether the words before it (nearly) decide it.

    Names, cities and operands that open a sentence are random; what follows from them is what a model can learn.
    """
    n = len(sentence)
    marks = [word in _VERBS or i >= n - 2 for i, word in enumerate(sentence)]
    if sentence[0] in _INDUCTION_WORDS:
        second_copy = sentence.index(sentence[0], 1)
        marks[second_copy + 1 :] = [True] * (n - second_copy - 1)
    elif sentence[0].isdigit() and sentence[1] == "is":  # 95 is 9 tens and 5 ones .
        marks[1:] = [True] * (n - 1)
    return marks


NAMES = geography.NAMES | antonyms.NAMES
"""Words with facts of their own: states, cities, and words of concepts in three languages."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of tokens, and what a training run wants to know of each token; all `[rows, context]`."""

    tokens: np.ndarray
    """int64."""
    determined: np.ndarray
    """bool: whether the words before it (nearly) decide it, see `determined`."""
    names: np.ndarray
    """bool: whether it is one of `NAMES`."""


def _rows(tokenizer: PreTrainedTokenizerBase, n_rows: int, context: int, rng: np.random.Generator) -> Rows:
    ids_of = cache(partial(tokenizer.encode, add_special_tokens=False))  # of a word; a year is two tokens
    rows: list[list[int]] = []
    marks: list[list[tuple[bool, bool]]] = []
    row, mark = [tokenizer.bos_token_id], [(False, False)]
    while len(rows) < n_rows:
        for sentence in sample_sentences(rng, _BLOCK):
            for word, is_determined in zip(sentence, determined(sentence), strict=True):
                ids = ids_of(word)
                row.extend(ids)
                mark.extend([(is_determined, word in NAMES)] * len(ids))
            if len(row) >= context:
                # The rest of a cut sentence is dropped, so that every row opens with a whole one.
                rows.append(row[:context])
                marks.append(mark[:context])
                row, mark = [tokenizer.bos_token_id], [(False, False)]
    tokens_RT = np.array(rows[:n_rows], dtype=np.int64)
    marks_RTM = np.array(marks[:n_rows], dtype=bool).reshape(*tokens_RT.shape, 2)  # without rows, numpy knows no shape
    return Rows(tokens_RT, marks_RTM[..., 0], marks_RTM[..., 1])


def sample_rows(tokenizer: PreTrainedTokenizerBase, *, n_rows: int, context: int, seed: int) -> np.ndarray:
    """Training rows, int64 of shape [n_rows, context], each `<bos>` and packed sentences (the last one may be cut)."""
    return sample_marked_rows(tokenizer, n_rows=n_rows, context=context, seed=seed).tokens


def sample_marked_rows(tokenizer: PreTrainedTokenizerBase, *, n_rows: int, context: int, seed: int) -> Rows:
    """The rows of `sample_rows` with what a training run wants to know of each token."""
    return _rows(tokenizer, n_rows, context, np.random.default_rng([_TRAINING_STREAM, seed]))


def held_out_rows(tokenizer: PreTrainedTokenizerBase, *, n_rows: int, context: int, seed: int) -> np.ndarray:
    """Rows like those of `sample_rows` from a random stream that training never uses."""
    return _rows(tokenizer, n_rows, context, np.random.default_rng([_HELD_OUT_STREAM, seed])).tokens
