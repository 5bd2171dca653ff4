"""One feature of an index as a page for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from replacement.console import pairs, section, table
from replacement.index.claims import printable

if TYPE_CHECKING:
    from replacement.index.records import Example, FeatureRecord, Label, TokenWeight

_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN_BEFORE, _SHOWN_AFTER = 60, 24
"""Characters of an example on both sides of its peak."""


def feature_page(record: FeatureRecord) -> RenderableType:
    """One feature: labels, how often and how strongly it fires, what its weights say of tokens, and examples."""
    labels = [record.label, *record.other_labels] if record.label is not None else []
    facts: list[tuple[object, object]] = [("label", _label_line(label)) for label in labels] or [("label", "none")]
    facts.append(("fires on", f"{record.density:.3%} of the tokens, with at most {record.max_activation:.3g}"))
    if record.histogram_counts:
        edges = record.histogram_edges
        facts.append(("activations", f"{edges[0]:g} {_sparks(record.histogram_counts)} {edges[-1]:g}"))
    effects = record.effects
    through = "reads through a head" if effects.head is None else "reads through head {}.{}".format(*effects.head)
    lists = {"promotes": effects.promoted, "suppresses": effects.suppressed, "reads": effects.read}
    lists[through] = effects.read_through_heads
    facts += [(name, _tokens(tokens)) for name, tokens in lists.items() if tokens]
    examples = table(
        "activation", "", "strongest examples", rows=_example_rows(record), texts=("", "strongest examples")
    )
    body = Group(pairs(facts), Text(), examples) if record.top_examples else pairs(facts)
    return section(f"feature {record.layer}/{record.index}", body)


def _label_line(label: Label) -> str:
    scores = ""
    if label.f1 is not None:
        parts = {"F1": label.f1, "precision": label.precision, "recall": label.recall}
        scores = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value is not None)
    source = "" if label.source == "rule" else f"by a {label.source}"
    claim = f"claim: {label.claim}" if label.claim and label.claim != label.text else ""
    details = "; ".join(filter(None, (source, scores, claim)))
    return printable(label.text + (f" ({details})" if details else ""))


def _sparks(counts: Sequence[int]) -> str:
    """Bars of a height that grows with the logarithm of the count."""
    heights = [count.bit_length() for count in counts]
    return "".join(_BARS[-(-height * 8 // max(heights))] for height in heights)


def _tokens(tokens: Iterable[TokenWeight]) -> str:
    return ", ".join(f"{visible(text)} {weight:.2g}" for text, weight in tokens)


def visible(text: str) -> str:
    """A token's text with its spaces as `␣`, and characters that are not printed as escapes; `∅` for no text."""
    return printable(text.replace(" ", "␣")) or "∅"


def _example_rows(record: FeatureRecord) -> Iterator[tuple[str, str, Text]]:
    for example in record.top_examples:
        yield f"{example.activations[example.peak]:.3g}", "", _example_text(example, record.max_activation)
    for example in record.quantile_examples:
        quantile = f"above {example.quantile:.0%}"
        yield f"{example.activations[example.peak]:.3g}", quantile, _example_text(example, record.max_activation)


def _example_text(example: Example, largest: float) -> Text:
    """The text around the peak, which is in brackets; tokens are brighter the more the feature fires on them."""
    separator = "" if any(token.startswith(" ") for token in example.tokens) else " "
    pieces = [printable(token) for token in example.tokens]
    before, after = separator.join(pieces[: example.peak]), separator.join(pieces[example.peak + 1 :])
    first, last = example.peak, example.peak
    n_before, n_after = len(before), len(after)
    while n_before > _SHOWN_BEFORE and first:
        n_before -= len(pieces[example.peak - first])
        first -= 1
    while n_after > _SHOWN_AFTER and last + 1 < len(pieces):
        last += 1
        n_after -= len(pieces[-(last - example.peak)])
    begin, end = example.peak - first, len(pieces) - (last - example.peak)
    text = Text("…" if begin else "")
    for place in range(begin, end):
        text.append(separator if place > begin else "")
        share = example.activations[place] / largest if largest else 0.0
        style = "bold red" if share > 0.5 else "yellow" if share > 0 else ""
        text.append(
            f"[{pieces[place].strip() or visible(pieces[place])}]" if place == example.peak else pieces[place], style
        )
    text.append("…" if end < len(pieces) else "")
    return text
