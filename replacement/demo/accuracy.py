"""How often a language model answers the probes of each behaviour, from its logits alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from replacement.demo.corpus.behaviours import Behaviour
from replacement.demo.corpus.sentences import Probe

LogitsOf = Callable[[Tensor], Tensor]


class Accuracy(NamedTuple):
    """The result of one behaviour."""

    name: str
    n_probes: int
    top1: float
    """Share of probes whose most likely next token is an answer."""
    probability: float
    """Mean probability of all answers together."""


class Outcome(NamedTuple):
    """What a model said to one probe."""

    probe: Probe
    prediction: str
    correct: bool
    probability: float
    """Probability of all answers together."""


def answer_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """Token ids of answers.

    Raises:
        ValueError: an answer that is not one token.
    """
    ids = [int(token) for token in tokenizer.convert_tokens_to_ids(list(answers))]  # type: ignore[union-attr]
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"every answer must be one token, but {answers} has an answer outside the vocabulary")
    return ids


def token_rows(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, `<bos>` in front.

    Raises:
        ValueError: a word that the tokenizer does not know.
    """
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    for prompt, row in zip(prompts, rows, strict=True):
        if tokenizer.unk_token_id in row:
            raise ValueError(f"a probe holds a word outside the vocabulary: {prompt!r}")
    return [[tokenizer.bos_token_id, *row] for row in rows]


def batches_by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of one length together, at most `size` at a time: their numbers, and their tokens `[B, T]`."""
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            yield batch, torch.tensor([rows[number] for number in batch])


@torch.no_grad()
def answer_probes(
    logits_of: LogitsOf, tokenizer: PreTrainedTokenizerBase, probes: Iterable[Probe], *, batch_size: int = 128
) -> list[Outcome]:
    """Ask every probe, batched by prompt length so that no padding is needed.

    Args:
        logits_of: maps tokens [batch, position] to logits [batch, position, vocabulary].
        tokenizer: turns prompts into tokens; `<bos>` is put in front here.
        probes: the questions.
        batch_size: prompts per call.

    Returns:
        One outcome per probe, in the order given.
    """
    probes = list(probes)
    rows = token_rows(tokenizer, [probe.prompt for probe in probes])
    outcomes: dict[int, Outcome] = {}
    for numbers, tokens_BT in batches_by_length(rows, batch_size):
        p_BV = logits_of(tokens_BT)[:, -1].float().softmax(-1)
        for number, p_V in zip(numbers, p_BV, strict=True):
            answers = answer_ids(tokenizer, probes[number].answers)
            top = int(p_V.argmax())
            prediction = str(tokenizer.convert_ids_to_tokens(top))
            outcomes[number] = Outcome(probes[number], prediction, top in answers, float(p_V[answers].sum()))
    return [outcomes[i] for i in range(len(probes))]


def measure_accuracy(
    logits_of: LogitsOf, tokenizer: PreTrainedTokenizerBase, behaviours: Iterable[Behaviour]
) -> list[Accuracy]:
    """Accuracy on the held-out probes of every behaviour (arguments as in `answer_probes`)."""
    rows = []
    for behaviour in behaviours:
        outcomes = answer_probes(logits_of, tokenizer, behaviour.probes)
        top1 = fmean(outcome.correct for outcome in outcomes)
        rows.append(Accuracy(behaviour.name, len(outcomes), top1, fmean(outcome.probability for outcome in outcomes)))
    return rows
