"""Which files the server shows: the graphs of its folder, whatever a request says."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from circuits.server.folder import Folder, UnknownGraphError
from circuits.server.saved_state import SavedStates
from circuits.server.summaries import CACHE_FILE, Summaries

OUTSIDE = (
    "../secret.safetensors",
    "..%2fsecret.safetensors",
    "..%2Fsecret.safetensors",
    "%2e%2e/secret.safetensors",
    "%2e%2e%2fsecret.safetensors",
    "%252e%252e%252fsecret.safetensors",
    "..%5csecret.safetensors",
    "..\\secret.safetensors",
    "..%c0%afsecret.safetensors",
    "%ef%bc%8e%ef%bc%8e/secret.safetensors",
    "....//secret.safetensors",
    "toy.safetensors/../../secret.safetensors",
    "toy.safetensors%00",
    "%00",
    ".",
    "..",
    "%2e",
    "./toy.safetensors",
    "%2fetc%2fpasswd",
    "//etc/passwd",
    "/etc/passwd",
    "C:%5cWindows%5cwin.ini",
    "toy.safetensors%0d%0aX-Injected:%201",
    "toy.safetensors.state.json",
    "notes.txt",
    ".hidden.safetensors",
    "link-out.safetensors",
    "folder-out",
    "%ff%fe",
    "a" * 5000,
)


def ask(client, target: str, method: str = "GET", body: str = "") -> tuple[int, str]:
    """Status and answer to a target sent as it is; clients would tidy it up."""
    port = client.base_url.port
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{head}{kind}\r\n{body}".encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return int(answer.split()[1]), answer.decode("utf-8", errors="replace")


@pytest.fixture
def surrounded(folder, small) -> Path:
    """The folder with things beside and in it that are not to be served."""
    secret = small.save(folder.parent / "secret.safetensors")
    (folder.parent / "traced").mkdir()
    small.save(folder.parent / "traced" / "graph.safetensors")
    (folder / "notes.txt").write_text("mine")
    small.save(folder / ".hidden.safetensors")
    (folder / "link-out.safetensors").symlink_to(secret)
    (folder / "folder-out").symlink_to(folder.parent / "traced")
    (folder / "toy.safetensors.state.json").write_text('{"version": 1}')
    os.mkfifo(folder / "pipe.safetensors")
    return folder


def test_nothing_but_listed_graphs_is_served(serve, surrounded) -> None:
    client = serve(surrounded)
    assert ask(client, "/graph/toy.safetensors")[0] == 200
    assert [row["name"] for row in client.get("/api/graphs").json()["graphs"]] == ["toy.safetensors"]
    for name in OUTSIDE:
        for target in (f"/graph/{name}", f"/api/graphs/{name}/state", f"/assets/{name}", f"/{name}"):
            status, answer = ask(client, target)
            known = name in (".", "%2e", "..") and status == 200  # the table
            assert known or status in (400, 404), target
            assert "X-Injected: 1" not in answer.split("\r\n\r\n")[0]
            assert "root:" not in answer
            assert '"prompt"' not in answer


def test_nothing_outside_is_written(serve, surrounded) -> None:
    client = serve(surrounded)
    before = sorted(surrounded.parent.rglob("*"))
    for name in OUTSIDE:
        status, _ = ask(client, f"/api/graphs/{name}/state", "POST", '{"version": 1, "labels": {"a": "b"}}')
        assert status in (400, 404, 405), name
    assert sorted(surrounded.parent.rglob("*")) == before


def test_an_unknown_graph_is_named(client) -> None:
    answer = client.get("/api/graphs/nope/state")
    assert (answer.status_code, answer.json()) == (404, {"error": "there is no graph 'nope' in this folder"})
    answer = client.get("/graph/<img src=x>")
    assert answer.status_code == 404
    assert "there is no graph &#x27;&lt;img src=x&gt;&#x27; in this folder" in answer.text


def test_names_with_any_characters_are_reached(serve, folder, small) -> None:
    names = [
        "a b.safetensors",
        "ü%41.safetensors",
        "#?&.safetensors",
        "<b>.safetensors",
        "'\".safetensors",
        "日本.json.safetensors",
    ]
    for name in names:
        small.save(folder / name)
    client = serve(folder)
    for name in names:
        assert client.get(f"/graph/{quote(name, safe='')}").status_code == 200, name
        answer = client.post(
            f"/api/graphs/{quote(name, safe='')}/state", json={"version": 1, "labels": {"1_3_1": name}}
        )
        assert answer.status_code == 200
        assert (folder / f"{name}.state.json").is_file()


def test_a_traced_folder_is_one_graph(folder, small) -> None:
    (folder / "dallas").mkdir()
    small.save(folder / "dallas" / "graph.safetensors")
    graph = Folder(folder).graph("dallas")
    assert (graph.path, graph.circuit) == (folder / "dallas" / "graph.safetensors", None)
    small.prune().save(folder / "dallas" / "circuit.safetensors")
    graph = Folder(folder).graph("dallas")
    assert (graph.path.name, graph.circuit) == ("graph.safetensors", folder / "dallas" / "circuit.safetensors")
    assert graph.state == folder / "dallas.state.json"
    (folder / "dallas" / "graph.safetensors").unlink()
    assert Folder(folder).graph("dallas").path.name == "circuit.safetensors"
    (folder / "dallas" / "circuit.safetensors").unlink()
    with pytest.raises(UnknownGraphError, match="there is no graph 'dallas' in this folder"):
        Folder(folder).graph("dallas")


def test_a_folder_is_needed(tmp_path) -> None:
    with pytest.raises(ValueError, match="none: expected a folder of graphs, but there is no such folder"):
        Folder(tmp_path / "none")


def test_a_changed_file_has_another_version(folder, small) -> None:
    before = Folder(folder).graph("toy.safetensors").version
    assert Folder(folder).graph("toy.safetensors").version == before
    small.prune().save(folder / "toy.safetensors")
    assert Folder(folder).graph("toy.safetensors").version != before


def settled(client) -> dict[str, dict]:
    """The rows of the table by name, once all scores are there."""
    for _ in range(500):
        rows = client.get("/api/graphs").json()["graphs"]
        if not any(row["pending"] for row in rows):
            return {row["name"]: row for row in rows}
        time.sleep(0.02)
    raise AssertionError("some graphs are still pending")


def test_the_table_says_what_the_graphs_say(serve, folder, small) -> None:
    small.export("neuronpedia", folder / "np.json")
    (folder / "damaged.safetensors").write_bytes((folder / "toy.safetensors").read_bytes()[:-8])
    (folder / "foreign.json").write_text('{"a": 1}')
    (folder / "foreign.pt").write_bytes(b"nonsense")
    client = serve(folder)
    rows = settled(client)
    scores = small.scores()
    toy = rows["toy.safetensors"]
    expected = {"prompt": "ab", "answer": "␣x", "probability": 0.6, "nodes": 8, "edges": 8, "model": "toy", "labels": 0}
    assert expected.items() <= toy.items()
    assert (toy["replacement"], toy["completeness"]) == (scores.replacement, scores.completeness)
    assert toy["date"] == pytest.approx((folder / "toy.safetensors").stat().st_mtime)
    assert rows["np.json"]["prompt"] == "ab"
    assert rows["np.json"]["answer"] == "␣x"
    assert rows["np.json"]["replacement"] is not None
    assert rows["damaged.safetensors"]["error"].startswith(
        "damaged.safetensors: expected a circuit file, given one that is damaged or foreign"
    )
    assert rows["foreign.json"]["error"].startswith("foreign.json: ")
    assert rows["foreign.pt"]["error"].startswith("foreign.pt: expected a circuit file")
    for name in ("damaged.safetensors", "foreign.json", "foreign.pt"):
        answer = client.get(f"/graph/{name}")
        assert answer.status_code == 400
        assert name in answer.text
        assert str(folder) not in answer.text


def test_a_header_with_nonsense_does_not_break_the_table(serve, folder, small) -> None:
    """Its digest fits: only what it says is of another kind."""
    import json

    from safetensors.numpy import load_file, save_file

    from circuits.graph.storage import digest

    tensors = load_file(folder / "toy.safetensors")
    for number, metadata in enumerate(
        ({"top_tokens": 5}, {"targets": [7]}, {"prompt": ["\ud800"]}, {"prompt": "\ud800"})
    ):
        facts = {**small.metadata, **metadata}
        header = {
            "format": "crosstrace.circuit", "schema": "3", "labels": json.dumps(small.nodes.label),
            "metadata": json.dumps(facts),
        }  # fmt: skip
        save_file(tensors, folder / f"odd{number}.safetensors", metadata=header | {"digest": digest(tensors, header)})
    rows = settled(serve(folder))
    assert "expected top_tokens to be" in rows["odd0.safetensors"]["error"]
    assert "expected targets to be" in rows["odd1.safetensors"]["error"]
    assert "expected prompt to be text" in rows["odd2.safetensors"]["error"]
    assert rows["odd3.safetensors"]["prompt"] == "\ud800"


def test_sizes_are_there_before_the_scores(folder, small, monkeypatch) -> None:
    monkeypatch.setattr(Summaries, "_read", lambda *_: None)
    graphs = Folder(folder)
    (row,) = Summaries(graphs, SavedStates()).rows()
    assert (row["prompt"], row["nodes"], row["edges"], row["pending"]) == ("ab", 8, 8, True)
    assert "replacement" not in row


def test_scores_are_read_once(serve, folder, small, monkeypatch) -> None:
    first = settled(serve(folder))
    for _ in range(200):
        if (folder / CACHE_FILE).is_file():
            break
        time.sleep(0.02)
    monkeypatch.setattr("circuits.server.summaries.CircuitGraph.load", lambda path: pytest.fail(f"read {path} again"))
    assert settled(serve(folder)) == first
    monkeypatch.undo()
    small.prune().save(folder / "toy.safetensors")
    assert settled(serve(folder))["toy.safetensors"]["nodes"] == len(small.prune().nodes)


@pytest.mark.parametrize(
    "content", ["", "nonsense", "[]", '{"toy.safetensors": 5}', '{"toy.safetensors": [1, 2]}', "[" * 10**5]
)
def test_a_damaged_cache_is_made_anew(serve, folder, content) -> None:
    (folder / CACHE_FILE).write_text(content)
    assert settled(serve(folder))["toy.safetensors"]["nodes"] == 8


def test_large_graphs_are_not_read_for_their_scores(serve, folder, monkeypatch) -> None:
    monkeypatch.setattr("circuits.server.summaries.SCORED_EDGES", 7)
    row = settled(serve(folder))["toy.safetensors"]
    assert (row["nodes"], row["note"]) == (8, "more than 7 edges: not scored")
    assert "replacement" not in row


def test_a_thousand_graphs_are_listed_at_once(serve, folder, small) -> None:
    """The first answer has the headers' facts; it waits for no scores."""
    content = (folder / "toy.safetensors").read_bytes()
    for number in range(1000):
        (folder / f"{number}.safetensors").write_bytes(content)
    client = serve(folder)
    started = time.process_time()
    rows = client.get("/api/graphs").json()["graphs"]
    assert len(rows) == 1001
    assert all(row["nodes"] == 8 for row in rows)
    assert time.process_time() - started < 10
