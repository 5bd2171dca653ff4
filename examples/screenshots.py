"""The pictures of the README: the viewer on one circuit, a feature's evidence, a story, and the table of `circuits serve`.

    python examples/screenshots.py --out docs

Traces prompts with the demo and photographs its pages in a headless Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

import circuits
import replacement
from circuits import CircuitGraph, NodeKind
from circuits.explain.story_html import html_page
from circuits.graph.text import slug
from circuits.server.command import ADDRESS, listening, make_server
from circuits.server.folder import Folder
from circuits.viewer.page import to_html
from replacement import ReplacementModel
from replacement.demo.corpus.behaviours import behaviours

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from browser import chromium

if TYPE_CHECKING:
    from browser import OpenPage
    from playwright.sync_api import Page

PROMPT, CITY = "the capital of the state containing Dallas is", "Dallas"
COUNTERFACTUAL = "the capital of the state containing Oakland is"
SCALE = 2
"""Pixels of a picture for each of the page."""
COLOURS = 255
"""A flat page needs no more, rare colours included, and the files stay small."""
LOAD = """(state) => {
  document.querySelector("[data-action=close-hint]")?.click();
  crosstrace.store.load({version: 1, ...state});
}"""


def photograph(page: Page, path: Path, part: str = "html") -> None:
    """A part of the page as a PNG with a palette."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(700)
    with Image.open(io.BytesIO(page.locator(part).screenshot())) as image:
        flat = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
        flat.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def of_city(graph: CircuitGraph) -> str:
    """The most influential feature at the city."""
    nodes, influence = graph.nodes, graph.influence()
    at_city = [token.strip() == CITY for token in graph.metadata["tokens"]]
    features = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & np.array(at_city)[nodes.position])
    return str(nodes.ids()[features[influence[features].argmax()]])


def story(open_page: OpenPage, model: ReplacementModel, graph: CircuitGraph, folder: Path, out: Path) -> None:
    """The page of `circuits explain --html`."""
    page_file = folder / "story.html"
    page_file.write_text(html_page(circuits.explain_graph(model, graph, against=[COUNTERFACTUAL])), encoding="utf-8")
    with open_page(
        page_file.as_uri(), viewport={"width": 1000, "height": 900}, device_scale_factor=SCALE, color_scheme="light"
    ) as page:
        photograph(page, out / "story.png")


def viewer(open_page: OpenPage, graph: CircuitGraph, folder: Path, out: Path) -> None:
    """The whole page of a grouped circuit, and the detail of the selected feature."""
    page_file = folder / "circuit.html"
    page_file.write_text(to_html(graph), encoding="utf-8")
    state = {"selected": of_city(graph)}
    panes = {"column": 0.5, "left": 0.5, "right": 0.5, "full": "detail"}
    pictures = {
        "viewer.png": ({"width": 1440, "height": 900}, state, "html"),
        "feature.png": ({"width": 720, "height": 900}, {**state, "panes": panes}, "#detail-pane"),
    }
    for name, (size, shown, part) in pictures.items():
        with open_page(page_file.as_uri(), viewport=size, device_scale_factor=SCALE, color_scheme="light") as page:
            page.evaluate(LOAD, shown)
            photograph(page, out / name, part)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a server of a folder of graphs."""
    with listening(0) as listener:
        server = make_server(Folder(folder), listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://{ADDRESS}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def main() -> None:
    """Trace, open and photograph."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model = replacement.load("demo")
    with tempfile.TemporaryDirectory() as name, chromium() as open_page:
        folder = Path(name)
        graph = circuits.with_heads(model, circuits.trace(model, PROMPT))
        circuit = graph.prune()
        viewer(open_page, circuit.with_groups(circuit.group()), folder, out)
        story(open_page, model, graph, folder, out)
        graphs = folder / "graphs"
        probes = {
            behaviour.name: behaviour.probes[0].prompt for behaviour in behaviours()
        }  # held out of the training text
        prompts = {"dallas": PROMPT, **{slug(name): prompt for name, prompt in probes.items()}}
        circuits.trace_many(
            model, [circuits.PromptLine(id=name, prompt=text) for name, text in prompts.items()], graphs
        )
        size = {"width": 1200, "height": 800}
        with (
            served(graphs) as address,
            open_page(address, origin=address, viewport=size, device_scale_factor=SCALE) as page,
        ):
            page.wait_for_function(f"() => document.querySelectorAll('tbody tr').length === {len(prompts)}")
            page.wait_for_function("() => !document.querySelector('tbody').innerText.includes('…')")  # all are scored
            photograph(page, out / "graphs.png", "main")


if __name__ == "__main__":
    main()
