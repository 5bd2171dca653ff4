"""Rows of training tokens: `<bos>` followed by packed sentences of all behaviours.

Seed convention: training rows come from the random stream `[0, seed]`, held-out rows from `[1, seed]` and probes from
`[2, seed, behaviour]`; NumPy's seed sequences make streams with different leading words independent for every seed.
"""

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
    "geography": (geography.sample, 0.14, 7.0),
    "antonyms": (antonyms.sample, 0.26, 7.0),
    "addition": (addition.sample, 0.36, 6.0),
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


def _rows(
    tokenizer: PreTrainedTokenizerBase, n_rows: int, context: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    ids_of = cache(partial(tokenizer.encode, add_special_tokens=False))  # of a word; a year is two tokens
    rows: list[list[int]] = []
    marks: list[list[bool]] = []
    row, mark = [tokenizer.bos_token_id], [False]
    while len(rows) < n_rows:
        for sentence in sample_sentences(rng, _BLOCK):
            for word, is_determined in zip(sentence, determined(sentence), strict=True):
                ids = ids_of(word)
                row.extend(ids)
                mark.extend([is_determined] * len(ids))
            if len(row) >= context:
                # The rest of a cut sentence is dropped, so that every row opens with a whole one.
                rows.append(row[:context])
                marks.append(mark[:context])
                row, mark = [tokenizer.bos_token_id], [False]
    return np.array(rows[:n_rows], dtype=np.int64), np.array(marks[:n_rows], dtype=bool)


def sample_rows(tokenizer: PreTrainedTokenizerBase, *, n_rows: int, context: int, seed: int) -> np.ndarray:
    """Training rows, int64 of shape [n_rows, context], each `<bos>` and packed sentences (the last one may be cut)."""
    return sample_marked_rows(tokenizer, n_rows=n_rows, context=context, seed=seed)[0]


def sample_marked_rows(
    tokenizer: PreTrainedTokenizerBase, *, n_rows: int, context: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `sample_rows` and, of the same shape, whether each token is determined by those before it."""
    return _rows(tokenizer, n_rows, context, np.random.default_rng([_TRAINING_STREAM, seed]))


def held_out_rows(tokenizer: PreTrainedTokenizerBase, *, n_rows: int, context: int, seed: int) -> np.ndarray:
    """Rows like those of `sample_rows` from a random stream that training never uses."""
    return _rows(tokenizer, n_rows, context, np.random.default_rng([_HELD_OUT_STREAM, seed]))[0]
