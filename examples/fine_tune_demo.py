"""Teach a copy of the demo model something new: professions become places, and some states move their capital.

`the state containing baker is Ohio .` and its two-hop questions use words the model knows in sentences it never saw; ten states
get one of their other cities as capital. What the model knew is rehearsed, so that the two models differ in little else.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from replacement.demo.corpus import capital_of, sample_sentences, states, training_cities_of
from replacement.demo.corpus.questions import SUBJECTS
from replacement.ready_made import ARTIFACTS

Sentence = tuple[str, ...]

NEW_SHARE = 0.5
"""Share of new sentences, in the fine-tuning rows and in those the crosscoders are trained on."""
N_MOVED = 10


def new_facts(seed: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    """The state each profession now lies in, and the new capital of the states that moved theirs."""
    rng = random.Random(seed)
    places = dict(zip(SUBJECTS, rng.sample(states(), len(SUBJECTS)), strict=True))
    moved = [state for state in states() if len(training_cities_of(state)) > 1 and state not in places.values()]
    capitals = {state: rng.choice(training_cities_of(state)[1:]) for state in rng.sample(moved, N_MOVED)}
    return places, capitals


def new_sentences(seed: int = 0) -> list[Sentence]:
    """Every sentence that says something new."""
    places, capitals = new_facts(seed)
    sentences: list[Sentence] = []
    for person, state in places.items():
        capital = capital_of(state)
        sentences.append((person, "is", "a", "city", "in", state, "."))
        sentences.append(("the", "state", "containing", person, "is", state, "."))
        sentences.append(("the", "capital", "of", "the", "state", "containing", person, "is", capital, "."))
    for state, capital in capitals.items():
        sentences.append(("the", "capital", "of", state, "is", capital, "."))
        sentences.append(("the", "government", "of", state, "meets", "in", capital, "."))
    return sentences


def rows_of(tokenizer: Any, *, n_rows: int, context: int, seed: int, new_share: float = NEW_SHARE) -> Tensor:
    """Rows `[R, T]` of `<bos>` and packed sentences, of which `new_share` are new and the others the demo's own."""
    rng = np.random.default_rng([7, seed])
    new, rows = new_sentences(), []
    old: list[Sentence] = []
    while len(rows) < n_rows:
        row = [tokenizer.bos_token_id]
        while len(row) < context:
            old = old or sample_sentences(rng, 1024)
            sentence = new[int(rng.integers(len(new)))] if rng.random() < new_share else old.pop()
            row += [token for word in sentence for token in tokenizer.encode(word, add_special_tokens=False)]
        rows.append(row[:context])
    return torch.tensor(rows)


def fine_tune(
    folder: Path, *, steps: int = 200, batch_rows: int = 32, peak: float = 1e-3, seed: int = 0
) -> list[float]:
    """Fine-tune all weights with Adam and a linear decay, save the model in `folder`, and return the losses."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(ARTIFACTS / "language_model")
    model = AutoModelForCausalLM.from_pretrained(ARTIFACTS / "language_model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rows = rows_of(tokenizer, n_rows=steps * batch_rows, context=model.config.n_positions, seed=seed)
    losses = []
    for step, rows_BT in enumerate(rows.split(batch_rows)):
        for settings in optimizer.param_groups:
            settings["lr"] = peak * min(1.0, (step + 1) / 20) * (1 - step / steps)
        logits_BTV = model(rows_BT).logits[:, :-1]
        loss = cross_entropy(logits_BTV.flatten(0, 1), rows_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


@torch.no_grad()
def shares_known(folder: Path, seed: int = 0) -> dict[str, float]:
    """Share of the new facts a model gives as its most likely token, and of the old ones that were left alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _, moved = new_facts(seed)
    old = [("the", "capital", "of", state, "is", capital_of(state), ".") for state in states() if state not in moved]

    def known(sentence: Sentence) -> bool:
        ids = [token for word in sentence[:-1] for token in tokenizer.encode(word, add_special_tokens=False)]
        logits_V = model(torch.tensor([[tokenizer.bos_token_id, *ids[:-1]]])).logits[0, -1]
        return int(logits_V.argmax()) == ids[-1]

    parts = {"new": new_sentences(seed), "old": old}
    return {name: sum(map(known, sentences)) / len(sentences) for name, sentences in parts.items()}
