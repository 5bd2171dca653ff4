"""A tested story as one HTML page, which needs nothing else: a diagram of the groups, and a chart of every test.

Every text that comes from a model or a user is escaped by the template; the page holds no script and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from circuits.explain.story_page import NOT_TOLD, WITHHELD_HEADS, change, headline, legend, measured, withheld_rows
from circuits.graph.text import printable, shorten

TEMPLATE = Path(__file__).with_name("story.html.jinja")
WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT = 960, 96, 200, 46
"""Of the diagram and its boxes, in pixels."""
AXIS = 180
"""Pixels of the axis of a test."""
VERDICTS = {"held": "held", "refuted": "REFUTED", "untested": "not tested"}


def html_page(facts: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        facts: what `circuits.explain_graph` returns.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    boxes, height = _boxes(facts["groups"])
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        prompt=printable(facts["prompt"]),
        against=[printable(text) for text in facts["against"]],
        headline=headline(facts),
        legend=legend(facts),
        groups=facts["groups"],
        boxes=list(boxes.values()),
        lines=[*_lines(facts["claims"], boxes), *_lines(facts["withheld"], boxes, drawn="withheld")],
        size=(WIDTH, height),
        axis=AXIS,
        sentences=[_sentence(facts, sentence) for sentence in facts["sentences"]],
        withheld=withheld_rows(facts),
        withheld_heads=WITHHELD_HEADS,
        not_told=NOT_TOLD,
    )


def _boxes(groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], int]:
    """Every group by its name, with the place of its box: inputs below, outputs above, features by layer between them."""
    middle = [group for group in groups if group["kind"] == "features"]
    levels = sorted({sum(group["layers"]) for group in middle})
    rows: dict[int, list[Mapping[str, Any]]] = {}
    for group in groups:
        level = {"tokens": 0, "outputs": len(levels) + 1}.get(group["kind"])
        rows.setdefault(levels.index(sum(group["layers"])) + 1 if level is None else level, []).append(group)
    places, height = {}, ROW * (len(rows) - 1) + BOX_HEIGHT + 24
    for row, level in enumerate(sorted(rows)):
        members = sorted(rows[level], key=lambda group: sum(group["positions"]))
        width = min(BOX_WIDTH, WIDTH / len(members) - 12)
        for number, group in enumerate(members):
            center = WIDTH * (number + 0.5) / len(members)
            places[group["name"]] = {
                **group,
                "x": round(center - width / 2, 1),
                "y": height - ROW * row - BOX_HEIGHT - 12,
                "width": round(width, 1),
                "height": BOX_HEIGHT,
                "text": shorten(group["name"], int(width / 8.2)),
            }
    return places, height


def _lines(
    claims: Sequence[Mapping[str, Any]], boxes: Mapping[str, Mapping[str, Any]], *, drawn: str | None = None
) -> list[dict[str, Any]]:
    """A curve for every claim between groups that have boxes; drawn as its verdict or as said."""
    lines = []
    most = max((claim["influence"] for claim in claims), default=0.0)
    for claim in claims:
        if claim["source"] not in boxes:
            continue
        source, target = boxes[claim["source"]], boxes[claim["target"]]
        x1, y1 = source["x"] + source["width"] / 2, source["y"]
        x2, y2 = target["x"] + target["width"] / 2, target["y"] + target["height"]
        bend = (y1 - y2) / 2 if y1 > y2 else 40
        path = f"M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 - bend:.1f} {x2:.1f} {y2 + bend:.1f} {x2:.1f} {y2:.1f}"
        says = f"{claim['source']} {claim['says']} {claim['target']}: {'not told' if drawn else VERDICTS[claim['verdict']]}"
        stroke = 1.5 if drawn else round(1.5 + 5 * claim["influence"] / most, 1)
        lines.append({**claim, "drawn": drawn or claim["verdict"], "path": path, "stroke": stroke, "title": says})
    return lines


def _sentence(facts: Mapping[str, Any], sentence: Mapping[str, Any]) -> dict[str, Any]:
    """A sentence with the rows of its tests, on one axis for each unit."""
    claims = [facts["claims"][number] for number in sentence["claims"]]
    rows = [_row(claim, test, _extent(claims, claim["unit"])) for claim in claims for test in claim["tests"]]
    return {**sentence, "mark": VERDICTS[sentence["verdict"]], "rows": rows}


def _extent(claims: Sequence[Mapping[str, Any]], unit: str) -> float:
    """Largest number of the axis, which has 0 in its middle."""
    tests = [test for claim in claims if claim["unit"] == unit for test in claim["tests"]]
    numbers = [
        abs(value)
        for test in tests
        for value in (test["predicted"], test["replacement"], test["measured"], *(test["interval"] or ()))
    ]
    return max(numbers, default=0.0) or 1.0


def _row(claim: Mapping[str, Any], test: Mapping[str, Any], extent: float) -> dict[str, Any]:
    def x(value: float) -> float:
        return round(AXIS / 2 * (1 + 0.9 * value / extent), 1)

    return {
        **test,
        "source": shorten(claim["source"], 34),
        "predicted_text": change(test["predicted"], claim["unit"]),
        "replacement_text": change(test["replacement"], claim["unit"]) if test["condition"] == "live" else "",
        "measured_text": measured(test, claim["unit"]),
        "x_predicted": x(test["predicted"]),
        "x_replacement": x(test["replacement"]),
        "x_measured": x(test["measured"]),
        "x_interval": [x(value) for value in test["interval"]] if test["interval"] else None,
    }
