"""Accuracy measurement against models whose answers are known."""

import pytest
import torch
from torch import Tensor

from replacement.demo.accuracy import answer_probes, measure_accuracy
from replacement.demo.corpus import Behaviour, Probe
from replacement.demo.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
PROBES = (
    Probe("the capital of Texas is", ("Austin",)),
    Probe("Dallas", ("Texas", "Austin")),
    Probe("the keys", ("are",)),
)


def always(word: str, score: float) -> Tensor:
    """Logits that give `word` the odds exp(score) against every other token."""
    logits = torch.zeros(len(TOKENIZER))
    logits[TOKENIZER.convert_tokens_to_ids(word)] = score
    return logits


def test_accuracy_of_a_constant_model() -> None:
    def logits_of(tokens: Tensor) -> Tensor:
        assert (tokens[:, 0] == TOKENIZER.bos_token_id).all()
        return always("Austin", 5.0).expand(*tokens.shape, -1)

    (row,) = measure_accuracy(logits_of, TOKENIZER, [Behaviour("places", "", PROBES)])
    e, n = torch.tensor(5.0).exp().item(), len(TOKENIZER)
    expected = (e + (e + 1) + 1) / (e + n - 1) / 3
    assert row.name == "places"
    assert row.n_probes == 3
    assert row.top1 == pytest.approx(2 / 3)
    assert row.probability == pytest.approx(expected, rel=1e-5)


def test_outcomes_keep_the_order_of_the_probes() -> None:
    def logits_of(tokens: Tensor) -> Tensor:
        word = {6: "Austin", 2: "Texas", 3: "were"}[tokens.shape[1]]
        return always(word, 9.0).expand(*tokens.shape, -1)

    outcomes = answer_probes(logits_of, TOKENIZER, PROBES, batch_size=1)
    assert [o.probe for o in outcomes] == list(PROBES)
    assert [o.prediction for o in outcomes] == ["Austin", "Texas", "were"]
    assert [o.correct for o in outcomes] == [True, True, False]


def test_an_answer_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="Atlantis"):
        answer_probes(lambda t: torch.zeros(*t.shape, len(TOKENIZER)), TOKENIZER, [Probe("the", ("Atlantis",))])
