"""What a run with interventions gave, beside the same run without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from replacement.console import section, table
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.language_model.language_model import LanguageModel
from replacement.notebook import repr_html
from replacement.token_texts import visible

SHOWN = 8
"""Tokens, and features, that are shown."""
ROUNDING = 1e-4
"""Smaller changes of an activation, relative to it, are not shown."""


@dataclass(frozen=True, slots=True, eq=False)
class Intervened:
    """A run with interventions, and the same run without them.

    Features are those that the crosscoder reads off the run's stream, with the interventions applied; row = position in
    `tokens`. At constrained layers they are counterfactual: what is written there are the clean features.
    """

    tokens: Tensor
    """`[T]`, the prompt and the tokens generated."""
    logits: Tensor
    """`[T, V]`."""
    clean_logits: Tensor
    """`[T, V]`, of the same tokens without interventions."""
    features: Features
    """Of the MLPs' crosscoder."""
    clean_features: Features
    language_model: LanguageModel
    """The model that ran."""
    crosscoders: dict[str, Crosscoder]
    """Its crosscoders by part, `mlp` and `attention`."""
    attention_features: Features | None = None
    """Of the attention crosscoder; None where attention is not replaced."""
    clean_attention_features: Features | None = None

    def __repr__(self) -> str:
        return f"Intervened({len(self.tokens)} tokens, {len(self.features)} features)"

    def __rich__(self) -> Group:
        text = " ".join(map(visible, self.language_model.prompt_strings(self.tokens[-SHOWN:].tolist())))
        changed = {"mlp": self._changes("mlp", self.features, self.clean_features)}
        if self.attention_features is not None and self.clean_attention_features is not None:
            changed["attention"] = self._changes("attention", self.attention_features, self.clean_attention_features)
        rows = sorted((row for rows in changed.values() for row in rows), key=lambda row: -abs(row[2] - row[1]))
        cells = ((name, f"{clean:.4g}", f"{value:.4g}", f"{value - clean:+.4g}") for name, clean, value in rows[:SHOWN])
        features = table("feature", "clean", "with interventions", "change", rows=cells)
        title = f"Features that changed most ({min(SHOWN, len(rows))} of {len(rows)})"
        return Group(section(f"Next token after “{text}”", self._next_tokens()), section(title, features))

    _repr_html_ = repr_html

    def _next_tokens(self) -> Table:
        """The most probable next tokens of both runs."""
        clean_V, changed_V = self.clean_logits[-1].double(), self.logits[-1].double()
        p_clean_V, p_V = clean_V.softmax(0), changed_V.softmax(0)
        largest = torch.maximum(p_clean_V, p_V).topk(min(SHOWN, len(p_V))).indices.tolist()
        rows = (
            (
                visible(text),
                *(f"{float(p_V[token]):.4f}" for p_V in (p_clean_V, p_V)),
                f"{float(changed_V[token] - clean_V[token]):+.3f}",
            )
            for token, text in zip(largest, self.language_model.token_strings(largest), strict=True)
        )
        return table("token", "clean", "with interventions", "logit changes by", rows=rows)

    def _changes(self, part: str, features: Features, clean: Features) -> list[tuple[str, float, float]]:
        """(name, clean activation, activation) of every feature that differs between the runs by more than rounding."""
        wiring = self.crosscoders[part].wiring
        both: dict[tuple[int, ...], list[float]] = {}
        for place, run in enumerate((clean, features)):
            keys = zip(run.group.tolist(), run.row.tolist(), run.index.tolist(), strict=True)
            for key, activation in zip(keys, run.activation.tolist(), strict=True):
                both.setdefault(key, [0.0, 0.0])[place] = activation
        prefix = "attention:" if part == "attention" else ""
        return [
            (f"{prefix}{wiring.group_layer(group)}/{index}@{position}", before, after)
            for (group, position, index), (before, after) in both.items()
            if abs(after - before) > ROUNDING * max(abs(before), abs(after))
        ]
