"""Labels and supernodes saved beside the graph: merged, checked, never lost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from circuits.server import saved_state
from circuits.server.folder import Folder
from circuits.server.saved_state import SavedStates, checked

PATH = "/api/graphs/toy.safetensors/state"
EMPTY = {"version": 1, "pinned": [], "places": {}, "groups": [], "labels": {}}


def saved(folder: Path) -> dict:
    """What the file beside the graph holds."""
    return json.loads((folder / "toy.safetensors.state.json").read_text())


def test_a_state_is_saved_and_read_back_after_a_restart(serve, folder) -> None:
    client = serve(folder)
    assert client.get(PATH).json() == EMPTY
    state = {
        "version": 1,
        "prompt": "ab",
        "pinned": ["1_3_1"],
        "places": {"group:g": [1.5, -2]},
        "groups": [{"id": "g", "name": "<b>\u202eעברית</b> 🙂", "members": ["0_7_0", "1_3_1"]}],
        "labels": {"1_3_1": "<img src=x onerror=alert(1)>", "0_7_0": '"</script>\ud83d'},
    }
    content = json.dumps(state).encode()
    answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert json.loads(answer.content) == state
    assert json.loads(serve(folder).get(PATH).content) == state
    assert saved(folder) == state
    (row,) = client.get("/api/graphs").json()["graphs"]
    assert (row["labels"], row["supernodes"]) == (2, 1)


def test_what_one_page_sends_undoes_nothing_of_another(client, folder) -> None:
    def send(**changes: object) -> None:
        assert client.post(PATH, json={"version": 1, **changes}).status_code == 200

    group = {"id": "one", "name": "cities", "members": ["a", "b"]}
    send(labels={"a": "Texas", "b": "Dallas"}, groups=[group], pinned=["a"])
    send(labels={"c": "Austin"}, groups=[{"id": "two", "name": "states", "members": ["c"]}])
    assert saved(folder)["labels"] == {"a": "Texas", "b": "Dallas", "c": "Austin"}
    assert [known["id"] for known in saved(folder)["groups"]] == ["one", "two"]
    assert saved(folder)["pinned"] == ["a"]
    send(labels={"a": None, "b": "Houston"}, groups=[{**group, "members": []}], pinned=[])
    assert saved(folder)["labels"] == {"b": "Houston", "c": "Austin"}
    assert [known["id"] for known in saved(folder)["groups"]] == ["two"]
    assert saved(folder)["pinned"] == []


def test_fifty_clients_at_once_lose_no_label(client, folder) -> None:
    """Each saves several labels of its own, and supernodes, over a connection of its own."""
    address, n_clients, n_saves = client.base_url, 50, 4

    def work(number: int) -> None:
        with httpx.Client(base_url=address, timeout=60) as own:
            for save in range(n_saves):
                group = {"id": f"{number}-{save}", "name": f"group {number}", "members": [f"{number}_{save}"]}
                state = {"version": 1, "labels": {f"{number}_{save}": f"label {number}"}, "groups": [group]}
                own.post(PATH, json=state).raise_for_status()

    with ThreadPoolExecutor(n_clients) as pool:
        list(pool.map(work, range(n_clients)))
    expected = {f"{number}_{save}": f"label {number}" for number in range(n_clients) for save in range(n_saves)}
    assert saved(folder)["labels"] == expected
    assert client.get(PATH).json()["labels"] == expected
    assert len(saved(folder)["groups"]) == n_clients * n_saves


def test_graphs_do_not_wait_for_each_other(folder, small) -> None:
    small.save(folder / "other.safetensors")
    graphs, states = Folder(folder), SavedStates()
    toy, other = (graphs.graph(f"{name}.safetensors") for name in ("toy", "other"))
    states.save(toy, {"version": 1})
    with states._locks["toy.safetensors"]:
        states.save(other, {"version": 1, "labels": {"a": "b"}})
    assert states.counts(other) == {"labels": 1, "supernodes": 0}


def test_the_readers_view_is_not_saved(client, folder) -> None:
    view = {
        "direction": "both",
        "topLinks": 15,
        "minInfluence": 0.1,
        "query": "x",
        "theme": "dark",
        "panes": {},
        "selected": None,
    }
    assert client.post(PATH, json={"version": 1, **view, "path": None, "labels": {"a": "b"}}).status_code == 200
    assert saved(folder) == {**EMPTY, "labels": {"a": "b"}}


GROUP = {"id": "g", "name": "n", "members": ["a"]}
WRONG = [
    ({}, "version: expected 1, given null"),
    ({"version": 2}, "version: expected 1, given 2"),
    ({"version": True}, "version: expected 1, given true"),
    ({"version": 1, "extra": 1}, "state: expected version, prompt, pinned, places, groups, labels, given 'extra'"),
    ({"version": 1, "prompt": 5}, "prompt: expected a text of at most 100,000 characters, given 5"),
    ({"version": 1, "prompt": "x" * 100_001}, "prompt: expected a text of at most 100,000 characters, given"),
    ({"version": 1, "labels": []}, "labels: expected an object of at most 20,000 texts of at most 500 characters"),
    ({"version": 1, "labels": {"a": 1}}, "labels: expected an object"),
    ({"version": 1, "labels": {"a": ["x"]}}, "labels: expected an object"),
    ({"version": 1, "labels": {"a": "x" * 501}}, "labels: expected an object"),
    ({"version": 1, "labels": {"": "x"}}, "labels: expected an object"),
    ({"version": 1, "labels": {"a" * 81: "x"}}, "labels: expected an object"),
    ({"version": 1, "labels": dict.fromkeys(map(str, range(20_001)), "x")}, "labels: expected an object"),
    ({"version": 1, "groups": {}}, "groups: expected a list of at most 1,000 objects"),
    ({"version": 1, "groups": [5]}, "groups: expected a list"),
    ({"version": 1, "groups": [{**GROUP, "id": 5}]}, "groups: expected a list"),
    ({"version": 1, "groups": [{**GROUP, "name": "x" * 201}]}, "groups: expected a list"),
    ({"version": 1, "groups": [{**GROUP, "members": "a"}]}, "groups: expected a list"),
    ({"version": 1, "groups": [{**GROUP, "members": [1]}]}, "groups: expected a list"),
    ({"version": 1, "groups": [{**GROUP, "more": 1}]}, "groups: expected a list"),
    ({"version": 1, "groups": [GROUP, GROUP]}, "groups: expected a list"),
    ({"version": 1, "groups": [{**GROUP, "id": str(i)} for i in range(1001)]}, "groups: expected a list"),
    ({"version": 1, "places": []}, "places: expected an object of at most 20,000 pairs of numbers"),
    ({"version": 1, "places": {"a": [1]}}, "places: expected an object"),
    ({"version": 1, "places": {"a": [1, "2"]}}, "places: expected an object"),
    ({"version": 1, "places": {"a": [1, 1e9]}}, "places: expected an object"),
    ({"version": 1, "pinned": "a"}, "pinned: expected a list of at most 20,000 ids of at most 80 characters"),
    ({"version": 1, "pinned": [None]}, "pinned: expected a list"),
    ({"version": 1, "pinned": ["a"] * 20_001}, "pinned: expected a list"),
]


@pytest.mark.parametrize(("state", "message"), WRONG, ids=range(len(WRONG)))
def test_another_form_is_refused_and_nothing_is_written(client, folder, state, message) -> None:
    answer = client.post(PATH, json=state)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)
    assert len(answer.json()["error"]) < 400
    assert not (folder / "toy.safetensors.state.json").exists()


def test_many_saves_do_not_exceed_the_limits_either(client, folder, monkeypatch) -> None:
    monkeypatch.setattr(saved_state, "LABELS", 3)
    for node in "abc":
        assert client.post(PATH, json={"version": 1, "labels": {node: "x"}}).status_code == 200
    assert client.post(PATH, json={"version": 1, "labels": {"d": "x"}}).status_code == 400
    assert saved(folder)["labels"] == dict.fromkeys("abc", "x")
    assert client.post(PATH, json={"version": 1, "labels": {"d": "x", "a": None}}).status_code == 200


def test_a_damaged_file_is_said_and_never_overwritten(client, folder) -> None:
    path = folder / "toy.safetensors.state.json"
    for content in ("{", "[]", '{"version": 1, "labels": 5}', "\x00"):
        path.write_text(content)
        for answer in (client.get(PATH), client.post(PATH, json={"version": 1, "labels": {"a": "b"}})):
            assert answer.status_code == 400
            assert answer.json()["error"].startswith("toy.safetensors.state.json: ")
        assert path.read_text() == content
        (row,) = client.get("/api/graphs").json()["graphs"]
        assert row["labels"] is None
        assert row["savedError"].startswith("toy.safetensors.state.json: ")


def test_a_link_is_not_followed(client, folder) -> None:
    secret = folder.parent / "secret.json"
    secret.write_text('{"version": 1, "labels": {"a": "secret"}}')
    (folder / "toy.safetensors.state.json").symlink_to(secret)
    for answer in (client.get(PATH), client.post(PATH, json={"version": 1, "labels": {"a": "b"}})):
        assert answer.json()["error"] == "toy.safetensors.state.json is a symbolic link, which is never followed"
    assert "secret" in secret.read_text()


def test_a_state_of_the_viewer_is_taken_whole() -> None:
    assert checked({"version": 1, "selected": "a", "labels": {"a": "b"}}) == {"version": 1, "labels": {"a": "b"}}
