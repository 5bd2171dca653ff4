"""The viewer in a browser as tests use it: nodes by id, acts of mouse and keyboard, and the state in plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

VIEW = {"width": 1440, "height": 900}
STATE = """() => {
  const {data, store} = window.crosstrace, {hovered, panes} = store.state;
  return {...store.toJSON(), hovered: hovered === null ? null : data.nodes.id[hovered], can: store.can()};
}"""
PLACE = """(id) => {
  const {data, panes} = window.crosstrace, {left, top} = panes.graph.element.getBoundingClientRect();
  const [x, y] = panes.graph.screenOf(data.numberOf.get(id));
  return [left + x, top + y];
}"""
FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"


class ViewerPage:
    """A page of the viewer, loaded and drawn."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.wait_for_function("() => window.crosstrace?.panes.graph.view().scene")
        self.page.evaluate(FRAMES)

    @property
    def state(self) -> dict[str, Any]:
        """What is saved of the state, and the hovered node and what `undo`, `redo`, `back` and `forward` can do."""
        self.page.evaluate(FRAMES)
        return dict(self.page.evaluate(STATE))

    def update(self, **changes: Any) -> None:
        """Change the state as a saved one would."""
        self.page.evaluate("(json) => crosstrace.store.load({version: 1, ...json})", changes)
        self.settle()

    def place(self, node: str) -> tuple[float, float]:
        """Where the middle of a node of the graph pane is on the screen."""
        x, y = self.page.evaluate(PLACE, node)
        return x, y

    def hover(self, node: str) -> None:
        """Move the mouse to a node."""
        self.page.mouse.move(*self.place(node))
        self.settle()

    def click(self, node: str, *, control: bool = False) -> None:
        """Click a node."""
        self.hover(node)
        if control:
            self.page.keyboard.down("Control")
        self.page.mouse.down()
        self.page.mouse.up()
        if control:
            self.page.keyboard.up("Control")
        self.settle()

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def pane(self, name: str) -> Locator:
        """`graph`, `links`, `subgraph` or `detail`."""
        return self.page.locator(f"#{name}-pane")

    def texts(self, locator: Locator) -> Sequence[str]:
        """The texts of all elements that are found."""
        return [text.strip() for text in locator.all_inner_texts()]
