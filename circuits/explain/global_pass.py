"""`global_circuits`: one pass over a corpus, prompt by prompt, in bounded memory; reads as the algorithm.

F features of all parts and layers, P pairs of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuits.attribution.limits import memory_bytes
from circuits.attribution.metadata import crosscoder_fingerprint
from circuits.attribution.targets import check_model
from circuits.explain.feature_numbers import FeatureNumbers
from circuits.explain.global_circuits import MEMORY, NEIGHBOURS, OF_EDGES, GlobalCircuits
from circuits.explain.global_edges import PromptEdges
from circuits.explain.pair_sums import BYTES_PER_PAIR, PairSums
from replacement import ReplacementModel
from replacement.files import atomic_file, check_file
from replacement.index.firings import counted_tokens
from replacement.language_model.prompts import Prompt
from replacement.memory import size_text
from replacement.number_checks import whole_number

PATHS = ("all", "direct")
SAVE_EVERY_S = 60.0
"""Seconds between two savings of a pass that can be resumed."""
_SUMMED = ("firings", "pre_activation", "inflow", "tokens", "errors", "bias")


def global_circuits(
    model: ReplacementModel,
    prompts: Iterable[Prompt],
    *,
    paths: str = "all",
    neighbours: int = NEIGHBOURS,
    memory: str | int = MEMORY,
    corpus: str = "the prompts given",
    state: str | Path | None = None,
    progress: Callable[[int], None] = lambda n_tokens: None,
) -> GlobalCircuits:
    """Expected direct effects between features over a corpus, in one pass.

    Every prompt's graph is made in full, every active feature expanded, as `circuits.trace(..., coverage=1.0)` does, and its
    edges are summed by the features at their ends: over the tokens where the target is active, and over the positions of the
    source. Divided by the tokens where the target is active, that is the mean effect of an edge; features that are never
    active together have none, whatever the inner product of their weights. Special tokens are no targets, as in the feature
    index. The part along the residual stream, divided by all tokens, is the expected residual attribution (ERA) of Ameisen
    et al. 2025, "Circuit Tracing"; Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits", have it too.

    Args:
        model: with a crosscoder that `circuits.trace` can attribute.
        prompts: texts or rows of token ids, read once.
        paths: `all`, or `direct` for the residual stream at the target's own position alone, which needs no pass through
            attention: the choice for large models.
        neighbours: edges kept into each feature, those of largest |direct| + |through attention|.
        memory: most bytes for the table of pairs. Where the pairs that occur need more, the smallest ones are forgotten on the
            way: `features["error"]` then bounds by how much any edge is off; it is 0 where nothing was forgotten.
        corpus: what the prompts are, for the file.
        state: a file in which the pass is saved every minute and from which it goes on if it is there; removed in the end.
        progress: called with the number of tokens of each prompt.

    Raises:
        ValueError: settings outside their range, too little memory, a state of other settings, a prompt that the model cannot
            read, or prompts without a token that counts.
        IdentityError: the edges of a feature do not sum to its pre-activation.
    """
    check_model(model)
    if paths not in PATHS:
        raise ValueError(f"paths: expected {' or '.join(map(repr, PATHS))}, got {paths!r:.50}")
    whole_number("neighbours", neighbours, least=1)
    parts = [(list(crosscoder.wiring.layers), crosscoder.n_features) for crosscoder in model.crosscoders.values()]
    numbers = FeatureNumbers(tuple((tuple(layers), n_features) for layers, n_features in parts))
    lm = model.language_model
    facts = {
        "parts": parts,
        "paths": paths,
        "neighbours": neighbours,
        "corpus": corpus,
        "model": lm.name,
        "model_fingerprint": lm.fingerprint,
        "crosscoder_fingerprint": crosscoder_fingerprint(model),
        **({} if model.loaded_from is None else {"loaded_from": dict(model.loaded_from)}),
        "memory": memory_bytes(memory),
    }
    gathered = _Gathered(numbers, _pairs(numbers.n_features, neighbours, memory_bytes(memory)))
    file = None if state is None else check_file(state)
    n_done, saved_at = 0 if file is None else gathered.restore(file, facts), time.monotonic()
    for number, prompt in enumerate(prompts):
        tokens_T = lm.tokens(prompt)
        if number >= n_done:
            gathered.add(model, tokens_T, paths)
            if file is not None and time.monotonic() - saved_at > SAVE_EVERY_S:
                gathered.save(file, facts, number + 1)
                saved_at = time.monotonic()
        progress(len(tokens_T))
    if not gathered.n_tokens:
        raise ValueError(f"expected tokens to count features on, got none in {corpus}")
    if file is not None:
        file.unlink(missing_ok=True)
    return gathered.result(facts, neighbours)


def _pairs(n_features: int, neighbours: int, memory: int) -> int:
    """Pairs that fit; at least twice the ones that are to be kept must."""
    least = 2 * n_features * neighbours
    if memory < least * BYTES_PER_PAIR:
        raise ValueError(
            f"memory: expected at least {size_text(least * BYTES_PER_PAIR)} for {neighbours} neighbours of each of "
            f"{n_features:,} features, got {size_text(memory)}: keep fewer neighbours, or allow more memory"
        )
    return memory // BYTES_PER_PAIR


@dataclass(slots=True)
class _Gathered:
    """What the prompts so far give."""

    numbers: FeatureNumbers
    capacity: int
    n_prompts: int = 0
    n_tokens: int = 0
    identity_error: float = 0.0
    features: dict[str, np.ndarray] = field(init=False)
    pairs: PairSums = field(init=False)

    def __post_init__(self) -> None:
        F = self.numbers.n_features
        self.features = {name: np.zeros(F, np.int64 if name == "firings" else np.float64) for name in _SUMMED}
        self.pairs = PairSums(F, len(OF_EDGES), capacity=self.capacity)

    @torch.no_grad()
    def add(self, model: ReplacementModel, tokens_T: torch.Tensor, paths: str) -> None:
        """Add the edges of one prompt."""
        undecomposed = max(crosscoder.undecomposed_positions for crosscoder in model.crosscoders.values())
        counted_T = counted_tokens(model.language_model, tokens_T[None].cpu(), undecomposed_positions=undecomposed)[
            0
        ].numpy()
        self.n_prompts, self.n_tokens = self.n_prompts + 1, self.n_tokens + int(counted_T.sum())
        edges = PromptEdges(model.localize(tokens_T), self.numbers, counted_T, paths=paths)
        for sums in edges:
            for name in _SUMMED:
                self.features[name][sums.feature_U] += sums.of_features[name]
            self.pairs.add(sums.key_P, sums.sums_CP)
        self.identity_error = max(self.identity_error, edges.identity_error)

    def result(self, facts: dict[str, Any], neighbours: int) -> GlobalCircuits:
        """The edges that are kept, sorted by target."""
        pairs, F = self.pairs, self.numbers.n_features
        pairs.merge()
        error_F, n_seen = pairs.lost_F, len(pairs.key_P)
        pairs.keep(neighbours)
        target, source = np.divmod(pairs.key_P, F)
        counts = {
            "n_prompts": self.n_prompts,
            "n_tokens": self.n_tokens,
            "n_pairs": n_seen,
            "identity_error": self.identity_error,
        }
        return GlobalCircuits(
            features={**self.features, "error": error_F, "omitted": pairs.lost_F},
            indptr=np.searchsorted(target, np.arange(F + 1)),
            source=source.astype(np.int32),
            edges={name: column.astype(np.float32) for name, column in zip(OF_EDGES, pairs.sums_CP, strict=True)},
            metadata={**facts, **counts, "is_exact": not error_F.any()},
        )

    # Saving ---------------------------------------------------------------------------------------------------------

    def save(self, file: Path, facts: dict[str, Any], n_done: int) -> None:
        """Save all of it, with what it was made of."""
        counts = {name: getattr(self, name) for name in ("n_prompts", "n_tokens", "identity_error")}
        text = json.dumps({"facts": facts, "n_done": n_done, "counts": counts})
        with atomic_file(file) as scratch, scratch.open("wb") as opened:
            np.savez(opened, state=np.array(text), **self.features, **self.pairs.arrays())  # type: ignore[arg-type]

    def restore(self, file: Path, facts: dict[str, Any]) -> int:
        """Go on from what was saved, if anything was; returns the number of prompts that it holds.

        Raises:
            ValueError: a damaged file, or one of other settings, which may hold hours of work and is not overwritten.
        """
        if not file.is_file():
            return 0
        try:
            with np.load(file, allow_pickle=False) as arrays:
                state = json.loads(str(arrays["state"]))
                made_by, now = state["facts"], json.loads(json.dumps(facts))
                self.features = {name: arrays[name] for name in _SUMMED}
                self.pairs.restore(arrays)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it to start again") from None
        if other := [name for name in now if made_by.get(name) != now[name]]:
            given = f"{made_by.get(other[0])!r:.60}, now {now[other[0]]!r:.60}"
            raise ValueError(f"{file} is of a pass with another {other[0]} ({given}): remove it to start again")
        for name, value in state["counts"].items():
            setattr(self, name, value)
        return int(state["n_done"])
