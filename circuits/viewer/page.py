"""A circuit as one HTML file: template, style, scripts and payload in one text that loads nothing.

The page's security policy allows its own script, by hash, and no connection. Texts of the graph are in the payload alone, and
the scripts put them into the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from circuits.graph.edges import GraphData
from circuits.graph.exporters import register
from circuits.viewer.columns import payload
from circuits.viewer.evidence import Indexes, evidence

SCRIPTS = (
    "elements",
    "data",
    "evidence",
    "scores",
    "paths",
    "store",
    "layout",
    "drawing",
    "graph_drawing",
    "picture",
    "graph_tools",
    "graph_pane",
    "links_pane",
    "subgraph",
    "subgraph_layout",
    "subgraph_drawing",
    "subgraph_input",
    "subgraph_pane",
    "detail_pane",
    "search",
    "controls",
    "keyboard",
    "help",
    "main",
)
"""Files of `assets/`, joined in this order into one function's body: each may use what the others declare."""
_ESCAPES = {code: f"\\u{code:04x}" for code in (*map(ord, "<>&\u2028\u2029"), *range(0xD800, 0xE000))}
"""What could end the element or a line, and surrogates that UTF-8 has no bytes for."""
_PLACE = re.compile(r"\{\{ (\w+) \}\}")


@register("html", suffix=".html", description="interactive page; opens in a browser without a network")
def to_html(graph: GraphData, *, index: Indexes = None, head: str = "") -> str:
    """The viewer of a graph as the text of one HTML file.

    Args:
        index: feature indexes whose labels and examples are shown, by default those beside the crosscoders that the graph was
            traced with; `()` for none.
        head: HTML that the local server puts into the head; the page may then load its scripts and styles, and ask it.

    Raises:
        ValueError: the index is of another crosscoder.
    """
    script = _script()
    own, asks = (" 'self'", "; connect-src 'self'") if head else ("", "")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    parts = {
        "policy": f"default-src 'none'; script-src 'sha256-{digest}'{own}; style-src 'unsafe-inline'{own}; img-src data: blob:"
        f"{asks}",
        "head": head,
        "style": palette() + _asset("style.css") + _asset("panes.css"),
        "payload": as_script_data({**payload(graph), "features": evidence(graph, index)}),
        "script": script,
    }
    return _PLACE.sub(lambda place: parts[place[1]], _asset("page.html"))


def as_script_data(value: Any) -> str:
    """JSON that can stand inside a `script` element: it cannot end the element, nor a line of a script."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES)


def palette() -> str:
    """Style sheet of the colours, light and dark, and of the font."""
    return _asset("palette.css")


@cache
def _script() -> str:
    bodies = "\n".join(f"// {name}.js\n{_asset(f'{name}.js')}" for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{bodies}\n}})();\n'


def _asset(name: str) -> str:
    return files("circuits.viewer").joinpath("assets", name).read_text(encoding="utf-8")
