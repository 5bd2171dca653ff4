"""A graph in a notebook: the page in a sandboxed frame, the picture where frames or scripts are stripped."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from html_reader import HOSTILE

from circuits import CircuitGraph, NodeKind
from circuits.graph import display
from circuits.graph.exporters import exporter

if TYPE_CHECKING:
    from playwright.sync_api import Page

T, P, E, F, L = NodeKind


class Elements(HTMLParser):
    """Attributes of every element by its name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str]]] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append({name: value or "" for name, value in attrs})


@pytest.fixture
def hostile(build_graph: Callable[..., CircuitGraph]) -> CircuitGraph:
    rows: list[dict[str, Any]] = [
        {"kind": T, "index": 1, "label": HOSTILE},
        {"kind": F, "layer": 0, "index": 2, "label": HOSTILE, "activation": 1.0, "expanded": True},
        {"kind": L, "layer": 1, "index": 3, "label": HOSTILE, "expanded": True, "output_weight": 1.0},
    ]
    return build_graph(rows, [(1, 0, 1.0), (2, 1, 1.0)], prompt=HOSTILE)


def test_the_frame_is_sandboxed_and_lies_on_the_picture(hostile: CircuitGraph) -> None:
    bundle = hostile._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/svg+xml", "text/plain"}
    assert bundle["text/plain"] == repr(hostile)
    elements = Elements(bundle["text/html"]).found
    assert set(elements) == {"div", "img", "iframe"}, "nothing that a name made"
    (frame,), (picture,) = elements["iframe"], elements["img"]
    assert frame["sandbox"] == "allow-scripts allow-downloads", "not of the notebook's origin"
    assert frame["loading"] == "lazy"
    assert set(picture) == {"alt", "src", "style"}
    page = str(exporter("html").convert(hostile))
    without = re.sub(r"(?<=<noscript>).*(?=This page)", "", frame["srcdoc"], count=1, flags=re.S)
    assert without == page
    svg = base64.b64decode(picture["src"].removeprefix("data:image/svg+xml;base64,")).decode()
    assert svg == bundle["image/svg+xml"]


def test_the_picture_fits_the_page(small: CircuitGraph) -> None:
    root = re.search(r"<svg[^>]*>", small._repr_mimebundle_()["image/svg+xml"])
    assert root is not None
    assert "viewBox=" in root[0]
    assert "max-width:100%;height:auto" in root[0]


def test_of_a_large_graph_the_circuit_is_shown(small: CircuitGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Shown is" not in small._repr_mimebundle_()["text/html"]
    monkeypatch.setattr(display, "MOST_NODES", len(small.nodes) - 1)
    circuit = small.prune(most_nodes=display.MOST_NODES, most_edges=display.MOST_EDGES)
    assert len(circuit.nodes) < len(small.nodes)
    shown = small._repr_mimebundle_()
    note = f"{len(small.nodes)} nodes and {len(small.edges)} edges. Shown is its pruned circuit: {len(circuit.nodes)} nodes"
    assert note in shown["text/html"]
    assert shown["image/svg+xml"] == circuit.to_svg()
    assert shown["text/plain"] == repr(small)


def _notebook(graph: CircuitGraph, path: Path) -> Path:
    path.write_text(f"<!doctype html><body style='width:900px'>{graph._repr_mimebundle_()['text/html']}", "utf-8")
    return path


def test_the_page_runs_in_its_frame(hostile: CircuitGraph, tmp_path: Path, visit: Callable[..., Page]) -> None:
    page = visit(_notebook(hostile, tmp_path / "notebook.html"))
    inside = page.frames[1]
    inside.wait_for_function("window.crosstrace !== undefined")
    assert inside.evaluate("crosstrace.data.nodes.count") == 3
    width, height = inside.evaluate("[innerWidth, innerHeight]")
    assert width == 900
    assert height == 720
    picture = page.locator("img").bounding_box()
    assert picture is not None
    assert picture["width"] <= 900
    assert picture["height"] <= 720, "the frame covers the picture"


def test_the_picture_stands_where_frames_are_stripped(
    hostile: CircuitGraph, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    path = _notebook(hostile, tmp_path / "notebook.html")
    path.write_text(re.sub(r"<iframe.*</iframe>", "", path.read_text("utf-8"), flags=re.S), "utf-8")
    page = visit(path)
    assert page.evaluate("document.querySelector('img').complete && document.querySelector('img').naturalWidth") > 100
