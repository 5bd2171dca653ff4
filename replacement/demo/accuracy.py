"""How often a language model answers the probes of each behaviour, from its logits alone."""

from collections.abc import Callable, Iterable
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


def _answer_ids(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> list[int]:
    ids = [int(tokenizer.convert_tokens_to_ids(answer)) for answer in probe.answers]  # type: ignore[arg-type]
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"every answer must be one token, but {probe.answers} has an answer outside the vocabulary")
    return ids


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
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for index, probe in enumerate(probes):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(probe.prompt, add_special_tokens=False)]
        by_length.setdefault(len(ids), []).append((index, ids))

    outcomes: dict[int, Outcome] = {}
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            tokens_BT = torch.tensor([ids for _, ids in batch])
            p_BV = logits_of(tokens_BT)[:, -1].float().softmax(-1)
            for (index, _), p_V in zip(batch, p_BV, strict=True):
                answers = _answer_ids(tokenizer, probes[index])
                top = int(p_V.argmax())
                prediction = str(tokenizer.convert_ids_to_tokens(top))
                outcomes[index] = Outcome(probes[index], prediction, top in answers, float(p_V[answers].sum()))
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
