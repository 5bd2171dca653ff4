"""How fast is the page of a large graph? `python benchmarks/viewer.py`

Random circuits, with labels and with the heads of every edge, are written as pages, opened from disk in a headless Chromium
without a network, and used by pointer events as a mouse makes them. Every node is shown: the page itself begins with the most
influential ones. Latency is the time from the event's own time stamp, through the frame that is drawn after it, to the start
of the next frame, measured in the page by `performance.now()`: with nothing to draw it would be 17 to 33 ms. First paint is
counted in the same way from the start of loading, through the first frame with the graph in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from machine import machine
from rich.console import Console
from rich.table import Table

from circuits.viewer.page import to_html

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from browser import chromium
from random_circuit import random_circuit

if TYPE_CHECKING:
    from browser import OpenPage
    from playwright.sync_api import Page

SIZES = [(1_000, 20_000), (10_000, 200_000)]
BOUNDS_MS: dict[int, dict[str, float]] = {
    1_000: {"first paint": 2000, "hover": 50},
    10_000: {"hover": 200, "pan": 200},
}
"""What issue-sized graphs must keep; the other figures are information."""
VIEW = {"width": 1440, "height": 900}

WATCH = """
(() => {
  const afterFrame = (done) => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));
  const seen = window.seen = {firstPaint: null, latencies: []};
  for (const kind of ["pointermove", "pointerup", "wheel"]) {
    const watch = (event) => afterFrame((now) => seen.latencies.push(now - event.timeStamp));
    addEventListener(kind, watch, {capture: true, passive: true});
  }
  const look = () => {
    if (window.crosstrace?.panes.graph.view().scene) afterFrame((now) => { seen.firstPaint = now; });
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})();
"""


class Measured:
    """A page that is watched: what its events and its first paint took, in milliseconds."""

    def __init__(self, page: Page) -> None:
        self.page = page

    @property
    def first_paint(self) -> float:
        """From the start of loading to the first frame with the graph."""
        self.page.wait_for_function("() => seen.firstPaint !== null")
        return float(self.page.evaluate("seen.firstPaint"))

    def latency(self, act: Callable[[], None]) -> float:
        """Of the event that `act` makes."""
        self.page.evaluate("seen.latencies.length = 0")
        act()
        self.page.wait_for_function("() => seen.latencies.length > 0")
        return float(self.page.evaluate("Math.max(...seen.latencies)"))

    def points(self, count: int) -> Iterator[tuple[float, float]]:
        """Where nodes are on the screen, drawn at random."""
        found = self.page.evaluate(
            """() => {
              const {graph} = crosstrace.panes, {left, top} = graph.element.getBoundingClientRect();
              const {layout, frame} = graph.view();
              return [...layout.x.keys()].filter((node) => !Number.isNaN(layout.x[node])).map(graph.screenOf)
                .filter(([x, y]) => x > 80 && x < frame.outerWidth - 20 && y > 20 && y < frame.outerHeight - 40)
                .map(([x, y]) => [x + left, y + top]);
            }"""
        )
        for number in np.random.default_rng(0).choice(len(found), size=count).tolist():
            yield tuple(found[number])


def interactions(page: Measured, times: int) -> dict[str, list[float]]:
    """Latencies of hovering over nodes, of selecting them, of dragging the graph while a node is selected, and of zooming."""
    mouse = page.page.mouse
    took: dict[str, list[float]] = {"hover": [], "select": [], "pan": [], "zoom": []}
    for x, y in page.points(times):
        took["hover"].append(page.latency(lambda x=x, y=y: mouse.move(x, y)))
        mouse.down()
        took["select"].append(page.latency(mouse.up))
    mouse.down()
    for step in range(times):
        x, y = 500 + 12 * (step % 10), 300 + 7 * (step % 6)
        took["pan"].append(page.latency(lambda x=x, y=y: mouse.move(x, y)))
    mouse.up()
    for step in range(times):
        took["zoom"].append(page.latency(lambda step=step: mouse.wheel(0, -120 if step % 4 < 2 else 120)))
    return took


def measure(open_page: OpenPage, path: Path, *, loads: int, times: int) -> dict[str, list[float]]:
    """All figures of one page, in milliseconds."""
    firsts = []
    for _ in range(loads):
        with open_page("about:blank", viewport=VIEW) as page:
            page.add_init_script(WATCH)
            page.goto(path.as_uri())
            measured = Measured(page)
            firsts.append(measured.first_paint)
            if len(firsts) == loads:
                page.evaluate("crosstrace.store.update({minInfluence: 0})")
                page.wait_for_timeout(1500)
                took = interactions(measured, times)
    return {"first paint": firsts, **took}


def report(n_nodes: int, n_edges: int, n_bytes: int, took: dict[str, list[float]]) -> bool:
    """Print the figures of one graph; whether they are within the bounds."""
    table = Table(title=f"{n_nodes:,} nodes, {n_edges:,} edges: a page of {n_bytes / 1e6:.2f} MB", title_justify="left")
    for head in ("milliseconds", "median", "worst", "bound of the median"):
        table.add_column(head, justify="left" if head == "milliseconds" else "right")
    bounds, kept = BOUNDS_MS.get(n_nodes, {}), True
    for name, values in took.items():
        median, bound = float(np.median(values)), bounds.get(name)
        kept &= bound is None or median <= bound
        table.add_row(name, f"{median:.0f}", f"{max(values):.0f}", "" if bound is None else f"{bound:.0f}")
    Console(highlight=False).print(table)
    return kept


def main() -> None:
    """Measure the sizes asked for; exits with 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loads", type=int, default=5, help="times a page is opened")
    parser.add_argument("--times", type=int, default=40, help="events of a kind")
    parser.add_argument("--heads", type=int, default=8, help="heads of a layer; 0 for graphs without heads")
    options = parser.parse_args()
    kept = True
    with tempfile.TemporaryDirectory() as folder, chromium() as open_page:
        print(machine())
        for n_nodes, n_edges in SIZES:
            path = Path(folder) / f"{n_nodes}.html"
            path.write_text(to_html(random_circuit(n_nodes, n_edges, n_heads=options.heads)), encoding="utf-8")
            took = measure(open_page, path, loads=options.loads, times=options.times)
            kept &= report(n_nodes, n_edges, path.stat().st_size, took)
    if not kept:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
