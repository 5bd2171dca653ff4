"""The server's pages in a browser: the table, labels that are saved, traces and interventions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import circuits
from circuits import CircuitGraph

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = "<img src=x onerror=alert(1)> </script> שלום \u202eevil\u202c 🙂"
PROMPT = "w5 w6 w7 w8 w5"


@pytest.fixture
def open_at(visit: Callable[..., Page]) -> Callable[..., Page]:
    """`open_at(client, path)`: a page of a server, which may be asked for that server's answers alone."""

    def open_at(client: Any, path: str = "/") -> Page:
        address = str(client.base_url).rstrip("/")
        return visit(f"{address}{path}", origin=address, viewport={"width": 1440, "height": 900})

    return open_at


def prompts(page: Page) -> list[str]:
    """Texts of the table's links, from top to bottom."""
    return page.locator("tbody td.prompt a").all_inner_texts()


def saved(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def until(page: Page, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never came to that")


def select(page: Page, node: str) -> None:
    page.evaluate("(id) => crosstrace.store.update({selected: crosstrace.data.numberOf.get(id)})", node)


def label(page: Page, **texts: str) -> None:
    """Give labels, as the detail pane does."""
    page.evaluate(
        """(texts) => {
          const {data, store} = crosstrace, labels = new Map(store.state.labels);
          for (const [id, text] of Object.entries(texts)) labels.set(data.numberOf.get(id), text);
          store.update({labels});
        }""",
        {f"{name.lstrip('n')}": text for name, text in texts.items()},
    )


def test_the_table_is_searched_and_sorted(serve, folder, build_graph, small, open_at) -> None:
    output = {
        "kind": 4,
        "layer": 3,
        "index": 5,
        "label": " z",
        "probability": 0.25,
        "output_weight": 1.0,
        "expanded": True,
    }
    rows = [{"kind": 0, "index": 1, "label": HOSTILE}, output]
    build_graph(rows, [(1, 0, 1.0)], targets=[{"token": HOSTILE, "probability": 0.25}]).save(folder / "<b>.safetensors")
    small.prune(nodes=0.3).save(folder / "other.safetensors")
    (folder / "bad.json").write_text("{}")
    page = open_at(serve(folder))
    page.wait_for_selector("#count:text-is('4 graphs')")
    assert page.locator("tr:has-text('bad.json') .error").inner_text().startswith("bad.json: ")
    assert page.locator("tr:has-text('<b>.safetensors') .answer").inner_text() != ""
    page.click("th button:text-is('Probability')")
    assert prompts(page)[-1] == HOSTILE
    page.click("th button:text-is('Probability')")
    assert prompts(page)[0] == HOSTILE
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Probability")
    page.keyboard.press("/")
    page.keyboard.type("OTHER safe")
    assert page.locator("#count").inner_text() == "1 of 4 graphs"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector(".group.server")
    assert page.url.split("#")[0].endswith("/graph/other.safetensors")
    page.go_back()
    page.wait_for_selector("#count:text-is('1 of 4 graphs')")
    page.fill("#search", "nothing of the kind")
    assert "No graph fits the search." in page.locator("tbody").inner_text()


def test_a_file_is_added(serve, folder, small, open_at, tmp_path) -> None:
    page = open_at(serve(folder))
    page.set_input_files("#upload", [small.save(tmp_path / "new.safetensors")])
    page.wait_for_selector("#message:text-is('added new.safetensors')")
    page.wait_for_selector("#count:text-is('2 graphs')")
    assert CircuitGraph.load(folder / "new.safetensors") == small


def test_labels_and_supernodes_are_saved_and_shown_again(serve, folder, small, open_at) -> None:
    client = serve(folder)
    path = "/graph/toy.safetensors?full"
    page = open_at(client, path)
    page.wait_for_selector(".group.server")
    label(page, n1_3_1=HOSTILE)
    page.evaluate(
        """() => {
          const {data, store} = crosstrace, members = ["0_7_0", "1_3_1"].map((id) => data.numberOf.get(id));
          store.update({groups: [{id: "g", name: "cities", members}], pinned: new Set(members)});
        }"""
    )
    page.wait_for_selector(".saved:text-is('saved')")
    state = saved(folder, "toy.safetensors")
    assert state["labels"] == {"1_3_1": HOSTILE}
    assert state["groups"] == [{"id": "g", "name": "cities", "members": ["0_7_0", "1_3_1"]}]
    other = open_at(client, path)
    other.wait_for_selector(".group.server")
    until(other, lambda: other.evaluate("crosstrace.store.toJSON()")["labels"] == {"1_3_1": HOSTILE})
    assert other.evaluate("crosstrace.store.toJSON()")["groups"] == state["groups"]
    assert sorted(other.evaluate("crosstrace.store.toJSON()")["pinned"]) == ["0_7_0", "1_3_1"]
    label(other, n0_7_0="of the other page")
    other.wait_for_selector(".saved:text-is('saved')")
    label(page, n1_3_1="changed")
    until(
        page, lambda: saved(folder, "toy.safetensors")["labels"] == {"1_3_1": "changed", "0_7_0": "of the other page"}
    )
    until(page, lambda: page.evaluate("crosstrace.store.toJSON()")["labels"].get("0_7_0") == "of the other page")
    assert not page.evaluate("crosstrace.store.undo()"), "a step back would drop the other page's label"
    page.evaluate(
        """() => {
          const {data, store} = crosstrace, labels = new Map(store.state.labels);
          labels.delete(data.numberOf.get("1_3_1"));
          store.update({labels, groups: []});
        }"""
    )
    until(page, lambda: saved(folder, "toy.safetensors")["groups"] == [])
    assert saved(folder, "toy.safetensors")["labels"] == {"0_7_0": "of the other page"}
    page.evaluate("crosstrace.store.undo()")
    until(
        page, lambda: saved(folder, "toy.safetensors")["labels"] == {"1_3_1": "changed", "0_7_0": "of the other page"}
    )


def test_what_a_circuit_does_not_show_stays_saved(serve, folder, small, open_at) -> None:
    """A label of the full graph's, and a supernode with a member that the circuit lacks."""
    circuit = small.prune(nodes=0.3)
    circuit.save(folder / "cut.safetensors")
    gone = min(set(small.nodes.ids()) - set(circuit.nodes.ids()))
    group = {"id": "g", "name": "both", "members": [gone, "1_3_1"]}
    state = {"version": 1, "pinned": [gone], "groups": [group], "labels": {gone: "unseen"}}
    (folder / "cut.safetensors.state.json").write_text(json.dumps(state))
    page = open_at(serve(folder), "/graph/cut.safetensors")
    page.wait_for_selector(".group.server")
    until(page, lambda: page.evaluate("crosstrace.store.toJSON()")["groups"] != [])
    page.evaluate(
        "() => crosstrace.store.update({groups: crosstrace.store.state.groups.map((group) => ({...group, name: 'renamed'}))})"
    )
    until(page, lambda: saved(folder, "cut.safetensors")["groups"][0]["name"] == "renamed")
    after = saved(folder, "cut.safetensors")
    assert sorted(after["groups"][0]["members"]) == sorted(group["members"])
    assert (after["labels"], after["pinned"]) == ({gone: "unseen"}, [gone])


def test_a_save_that_fails_is_said(serve, folder, open_at) -> None:
    page = open_at(serve(folder), "/graph/toy.safetensors")
    page.wait_for_selector(".group.server")
    page.wait_for_timeout(700)
    page.evaluate("() => { window.fetch = () => Promise.reject(new Error('gone')); }")
    label(page, n1_3_1="x")
    page.wait_for_selector(".saved.error")
    expected = "not saved: the server does not answer: is `circuits serve` still running?"
    assert page.locator(".saved").inner_text() == expected


def test_a_prompt_is_traced_and_its_features_are_changed(serve, folder, model, open_at) -> None:
    page = open_at(serve(folder, model))
    page.fill("#trace textarea", PROMPT)
    page.keyboard.press("Enter")
    page.click("#jobs li.done a", timeout=60_000)
    page.wait_for_selector(".group.server")
    graph = CircuitGraph.load(folder / "w5-w6-w7-w8-w5" / "circuit.safetensors")
    said = page.locator(".group.server span").first.inner_text()
    assert said.startswith(f"{len(graph.nodes)} of ")
    feature = next(row for row in graph.features() if row.position > 0)
    select(page, feature.id)
    page.click("text=Change features…")
    page.locator("#interventions select").select_option("scale")
    page.locator("#interventions input[type=number]").fill("-3")
    page.click("#interventions .main")
    page.wait_for_selector("#interventions table", timeout=60_000)
    run = model.intervene(PROMPT, [feature.intervention(scale=-3.0)])
    after = run.logits[-1].softmax(-1)
    text = model.language_model.token_strings([int(after.argmax())])[0]
    cells = page.locator("#interventions tbody tr").filter(has=page.locator(f"bdi:text-is('{text}')")).locator("td")
    assert cells.nth(2).inner_text() == f"{100 * float(after.max()):.1f} %"
    page.keyboard.press("Escape")
    assert not page.locator("#interventions").is_visible()
    page.click("text=full graph")
    page.wait_for_selector("text=circuit only")
    assert page.evaluate("crosstrace.data.nodes.count") == len(circuits.trace(model, PROMPT).nodes)


def test_a_large_graph_is_cut_and_says_so(serve, folder, open_at, monkeypatch) -> None:
    monkeypatch.setattr("circuits.server.pages.MOST_EDGES", 5)
    page = open_at(serve(folder), "/graph/toy.safetensors?full")
    said = page.locator(".group.server span").first.inner_text()
    assert said.startswith("too large for a page, the most influential part: ")
    assert "of 8 edges" in said


def test_a_mistake_is_a_page(client) -> None:
    answer = client.get("/graph/none")
    assert answer.status_code == 404
    assert "there is no graph &#x27;none&#x27; in this folder" in answer.text
    assert client.get("/api/none").json() == {"error": "there is no such page"}
