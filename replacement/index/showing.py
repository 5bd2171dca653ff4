"""What `replacement features` shows: features in the terminal, and searches. Imports no torch, so that it answers at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from replacement.console import finite, pairs, section, table
from replacement.index.claims import printable
from replacement.index.records import Example, FeatureRecord, Label, TokenWeight
from replacement.index.store import FILE_NAME, FeatureIndex, Match

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "artifacts"
_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN_BEFORE, _SHOWN_AFTER = 60, 24
"""Characters of an example on both sides of its peak."""
_NAME = re.compile(r"(\d{1,9})/(\d{1,9})")


def file_of(given: str) -> Path:
    """The file of an index: `demo`, the file itself, or the folder of its crosscoder or of the training run."""
    path = DEMO_FOLDER if given == DEMO else Path(given)
    if not path.is_dir():
        return path
    inside = path / "crosscoder"
    return (inside if inside.is_dir() else path) / FILE_NAME


def is_feature(text: str) -> bool:
    """Whether a text is meant to name a feature, such as `2/345`, and not a file."""
    return _NAME.fullmatch(text.strip()) is not None and not Path(text).exists()


def feature_name(text: str) -> tuple[int, int]:
    """Layer and index of a feature named like `2/345`.

    Raises:
        ValueError: another form.
    """
    match = _NAME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a feature as LAYER/INDEX such as 2/345, given {text!r:.50}")
    return int(match[1]), int(match[2])


def show_or_search(
    file: Path, names: Sequence[str], search: str | None, limit: int
) -> tuple[RenderableType, dict[str, Any]]:
    """The page, and the same as a JSON value: features by name, or those that a search finds.

    Raises:
        ValueError: no feature index, neither names nor a search, or both, or a feature that does not exist.
    """
    if bool(names) == (search is not None):
        raise ValueError("expected features such as 2/345, or --search TEXT, one of them")
    with FeatureIndex.open(file) as index:
        if search is not None:
            matches = index.search(search, limit)
            labels = index.labels((match.layer, match.index) for match in matches)
            found = [{**asdict(match), "label": _plain(labels.get((match.layer, match.index)))} for match in matches]
            return _matches_page(matches, labels, search), {"features": found}
        records = [index.feature(*feature_name(name)) for name in names]
    features = [finite(asdict(record)) for record in records]
    return Group(*map(feature_page, records)), {"features": features}


def _plain(label: Label | None) -> dict[str, Any] | None:
    return None if label is None else asdict(label)


def _matches_page(matches: Sequence[Match], labels: dict[tuple[int, int], Label], search: str) -> RenderableType:
    if not matches:
        return Text(f"no feature has {printable(search)} in its label, fires on it, reads it or promotes it")
    rows = []
    for match in matches:
        label = labels.get((match.layer, match.index))
        rows.append((f"{match.layer}/{match.index}", *_label_cells(label), printable(match.reason)))
    return table("feature", "label", "F1", "found because", rows=rows, texts=("label", "found because"))


def _label_cells(label: Label | None) -> tuple[str, str]:
    if label is None:
        return "", ""
    return printable(label.text), "" if label.f1 is None else f"{label.f1:.2f}"


# One feature -------------------------------------------------------------------------------------------------------------


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
