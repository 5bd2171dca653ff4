"""What the index knows of one feature, as plain values: what the store keeps, labels are made of, and exporters write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import RenderableType

from replacement.index.feature_page import feature_page
from replacement.notebook import repr_html

TokenWeight = tuple[str, float]
"""A token's text and a weight."""


@dataclass(frozen=True, slots=True)
class Example:
    """A window of text around one place where a feature fires."""

    tokens: tuple[str, ...]
    """Texts of the tokens, as the tokenizer decodes each."""
    activations: tuple[float, ...]
    """The feature's activation at each of them."""
    peak: int
    """Index of the token that the example was kept for."""
    row: int
    """Number of the data's row that the window is from."""
    position: int
    """Position of the peak in that row."""
    quantile: float | None = None
    """Lower end of the quantile of positive activations that the peak was drawn from; `None` among the top examples."""


@dataclass(frozen=True, slots=True)
class Label:
    """A short claim about a feature, and how well it detects the feature on text that it was not made from.

    precision = share of places where the claim holds that fire; recall = share of places that fire where it holds.
    """

    text: str
    """What is shown: the claim, or `unclear` if its F1 is below `UNCLEAR_BELOW`."""
    source: Literal["rule", "person", "language model"]
    claim: str = ""
    """The claim that was scored, whether it is shown or not."""
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    """`None` where nothing was scored: no place fired, or a person's text is no rule."""


UNCLEAR = "unclear"
UNCLEAR_BELOW = 0.5
"""A label with a lower F1 says `unclear`."""


@dataclass(frozen=True, slots=True)
class TokenEffects:
    """What a feature's weights say, whatever the text: tokens by their weight, strongest first."""

    promoted: tuple[TokenWeight, ...] = ()
    """Tokens whose logits its decoder vectors raise most, through the final norm's weight."""
    suppressed: tuple[TokenWeight, ...] = ()
    read: tuple[TokenWeight, ...] = ()
    """Tokens whose embedding at the feature's own position excites it most."""
    read_through_heads: tuple[TokenWeight, ...] = ()
    """Tokens whose embedding excites it most through the OV matrix of the attention head that carries most."""
    head: tuple[int, int] | None = None
    """(layer, head) of that head."""


@dataclass(frozen=True, slots=True)
class FeatureRecord:
    """Everything the index knows of one feature."""

    layer: int
    index: int
    density: float
    """Share of tokens on which it is active."""
    max_activation: float
    histogram_edges: tuple[float, ...] = ()
    """Bounds of the histogram's bins, one more than there are bins."""
    histogram_counts: tuple[int, ...] = ()
    """Tokens in each bin, of those on which it is active."""
    top_examples: tuple[Example, ...] = ()
    """By activation, largest first."""
    quantile_examples: tuple[Example, ...] = ()
    """Drawn from the quantiles of its positive activations, largest first."""
    effects: TokenEffects = TokenEffects()
    label: Label | None = None
    """The best one: a person's if there is one, else the one of highest F1."""
    other_labels: tuple[Label, ...] = ()

    def __repr__(self) -> str:
        label = self.label.text if self.label is not None else "no label"
        return f"FeatureRecord({self.layer}/{self.index}: {label})"

    def __rich__(self) -> RenderableType:
        return feature_page(self)

    _repr_html_ = repr_html
