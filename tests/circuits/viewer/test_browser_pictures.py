"""Pictures of the page: an SVG that parses and holds the texts, a PNG of the right size."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from viewer_page import ViewerPage

from circuits import CircuitGraph, NodeKind
from circuits.graph.pruning import always_kept

SVG = "{http://www.w3.org/2000/svg}"


def saved(viewer: ViewerPage, action: str, path: Path) -> bytes:
    """What a button lets the browser save."""
    with viewer.page.expect_download() as download:
        button = viewer.page.locator(f"[data-action={action}]")
        (button if button.count() else viewer.page.locator("#controls").get_by_text(action, exact=True)).click()
    download.value.save_as(path)
    assert download.value.suggested_filename.endswith(f".{action[-3:].lower()}")
    return path.read_bytes()


def pixels(png: bytes) -> np.ndarray:
    """uint8[H, W, 3] of a PNG."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def test_the_graph_as_svg(
    hostile: CircuitGraph, capital: CircuitGraph, show: Callable[..., ViewerPage], tmp_path: Path
) -> None:
    for graph in (capital, hostile):
        viewer = show(graph)
        root = ElementTree.fromstring(saved(viewer, "SVG", tmp_path / "graph.svg"))
        assert root.tag == f"{SVG}svg"
        texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
        assert any("replacement" in text for text in texts), "the scores stand below"
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert tags <= {"svg", "rect", "clipPath", "g", "path", "text"}, "names made no elements"
    assert any("<img src=x" in text for text in texts)


def test_the_picture_shows_what_the_pane_shows(
    capital: CircuitGraph, show: Callable[..., ViewerPage], tmp_path: Path
) -> None:
    viewer = show(capital)

    def labels() -> set[str]:
        root = ElementTree.fromstring(saved(viewer, "SVG", tmp_path / "graph.svg"))
        return {
            "".join(text.itertext()).strip("\u2068\u2069") for text in root.iter(f"{SVG}text")
        }  # marks of direction

    assert {"Texas", "say Austin", "Dallas"} <= labels()
    viewer.update(labels={"1_5_3": "the state"}, minInfluence=0.05)
    assert "the state" in labels()
    assert "Texas" not in labels()
    hidden = viewer.page.locator("#hidden").inner_text().split()[0]
    assert any(text.startswith(f"{hidden} nodes") for text in labels())


def test_important_nodes_are_named_in_a_crowd(
    build_graph: Callable[..., CircuitGraph], show: Callable[..., ViewerPage], tmp_path: Path
) -> None:
    """Twelve features of one cell at the right edge: the strongest three and the selected one have their labels."""
    names = [f"label{index} of a feature with a long name" for index in range(12)]
    rows: list[dict[str, Any]] = [
        {"kind": NodeKind.TOKEN, "index": place, "position": place, "label": f"token{place}"} for place in range(4)
    ]
    feature = {"kind": NodeKind.FEATURE, "layer": 0, "position": 3, "expanded": True}
    rows += [{**feature, "index": index, "label": name, "activation": 1.0} for index, name in enumerate(names)]
    output = {"kind": NodeKind.LOGIT, "layer": 1, "position": 3, "label": "answer", "expanded": True}
    rows.append({**output, "probability": 1.0, "output_weight": 1.0})
    edges = [(4 + index, index % 4, 1.0) for index in range(12)] + [(16, 4 + index, 0.6**index) for index in range(12)]
    viewer = show(build_graph(rows, edges, n_layers=1))

    def named() -> set[str]:
        root = ElementTree.fromstring(saved(viewer, "SVG", tmp_path / "graph.svg"))
        texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
        return {text.split()[0] for text in texts if text.startswith("label")}

    assert {"label0", "label1", "label2"} <= named()
    for index in (3, 7, 11):  # Chromium lets a page save ten files by itself
        viewer.update(selected=f"0_{index}_3")
        assert f"label{index}" in named()


@pytest.mark.parametrize("scale", [1, 2])
def test_the_graph_as_png(capital: CircuitGraph, show: Callable[..., ViewerPage], tmp_path: Path, scale: int) -> None:
    """Twice as many pixels as the pane has, and the caption below; its background and its nodes are there."""
    viewer = show(capital, device_scale_factor=scale)
    image = pixels(saved(viewer, "PNG", tmp_path / "graph.png"))
    body = viewer.pane("graph").locator(".body").bounding_box()
    assert image.shape[1] == 2 * round(body["width"])
    assert 2 * round(body["height"]) < image.shape[0] < 2 * round(body["height"]) + 120
    x, y = viewer.place("5_1_4")
    colours = image[round(2 * (y - body["y"])), round(2 * (x - body["x"]))]
    assert (image[0, -1] > 240).all(), "white paper"
    assert (colours != image[0, -1]).any(), "an output"


def test_the_subgraph_as_svg_and_png(capital: CircuitGraph, show: Callable[..., ViewerPage], tmp_path: Path) -> None:
    viewer = show(capital)
    viewer.update(pinned=["1_5_3", "A2_3_4", "3_21_4"])
    root = ElementTree.fromstring(saved(viewer, "subgraph-svg", tmp_path / "subgraph.svg"))
    text = " ".join("".join(text.itertext()) for text in root.iter(f"{SVG}text"))
    for name in ("Texas", "moves the state", "say Austin"):
        assert name in text
    image = pixels(saved(viewer, "subgraph-png", tmp_path / "subgraph.png"))
    assert image.shape[:2] == (2 * int(root.attrib["height"]), 2 * int(root.attrib["width"]))


def test_nodes_are_as_opaque_as_thresholds_keep_them(
    capital: CircuitGraph, show: Callable[..., ViewerPage], tmp_path: Path
) -> None:
    """The graph says it, its legend explains it, and the detail of a node tells the share; other graphs are drawn as before."""
    inclusion = {"nodes": [0.5, 0.8], "edges": [0.98], "frequency": {"1_5_3": 0.5}}
    noted = show(CircuitGraph(capital.nodes, capital.edges, {**capital.metadata, "inclusion": inclusion}))
    assert noted.page.get_by_text("the paler, the fewer pruning thresholds keep it").count() == 1
    root = ElementTree.fromstring(saved(noted, "SVG", tmp_path / "graph.svg"))
    opacities = [float(path.get("opacity", 1)) for path in root.iter(f"{SVG}path") if path.get("fill") != "none"]
    dropped = (~always_kept(capital.nodes)).sum()
    assert sorted(opacities) == [0.2] * (dropped - 1) + [0.6] + [1] * (len(capital.nodes) - dropped)
    assert all("opacity" not in text.attrib for text in root.iter(f"{SVG}text"))
    noted.click("1_5_3")
    assert "50 % of the pruning thresholds" in noted.pane("detail").inner_text()
    plain = show(capital)
    plain.click("1_5_3")
    assert "pruning thresholds" not in plain.page.inner_text("body")
