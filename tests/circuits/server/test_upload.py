"""A graph file that is added to the folder: checked by loading it, kept as it is, never in place of another."""

from __future__ import annotations

import time
from urllib.parse import quote

import httpx
import pytest

from circuits import CircuitGraph
from circuits.server import app


def upload(client: httpx.Client, name: str, content: object) -> httpx.Response:
    headers = {"Content-Type": "application/octet-stream"}
    return client.post(f"/api/upload?name={quote(name, safe='')}", content=content, headers=headers)


def test_graphs_of_every_kind_are_kept_as_they_are(client, folder, small) -> None:
    exported = small.export("neuronpedia", folder.parent / "np.json")
    contents = {"new.safetensors": (folder / "toy.safetensors").read_bytes(), "np.json": exported.read_bytes()}
    for name, content in contents.items():
        answer = upload(client, name, content)
        assert (answer.status_code, answer.json()) == (201, {"graph": name})
        assert (folder / name).read_bytes() == content
        assert client.get(f"/graph/{name}").status_code == 200
    assert CircuitGraph.load(folder / "new.safetensors") == small
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "new.safetensors", "np.json", "toy.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "", "a", "a.txt", ".a.json", "../a.json", "..\\a.json", "a/b.json", "/a.json", "a\x00.json", "a\n.json", "a.state.json",
        "x" * 200 + ".json", "%2e%2e%2fa.json", "é.json", "a.json ", "a.JSON", "-a.json", "~a.json",
    ],
)  # fmt: skip
def test_other_names_are_refused_before_the_file_is_read(client, folder, name) -> None:
    before = sorted(folder.parent.rglob("*"))
    answer = upload(client, name, (folder / "toy.safetensors").read_bytes())
    assert answer.status_code == 400
    expected = "name: expected letters, digits, dots, dashes and a suffix of .safetensors, .json, .pt, given "
    assert answer.json()["error"].startswith(expected)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", b""),
        ("a.safetensors", b"nonsense"),
        ("a.safetensors", "cut"),
        ("a.safetensors", "flipped"),
        ("a.json", b"{}"),
        ("a.json", b'{"nodes": ['),
        ("a.json", b"[" * 100_000),
        ("a.pt", b"PK\x03\x04nonsense"),
    ],
)
def test_a_damaged_graph_is_refused_by_name_and_not_kept(client, folder, name, content) -> None:
    whole = (folder / "toy.safetensors").read_bytes()
    content = {"cut": whole[:-4], "flipped": whole[:-4] + b"\xff\xff\xff\xff"}.get(content, content)
    answer = upload(client, name, content)
    assert answer.status_code == 400
    expected = {
        "a.safetensors": "expected a circuit file",
        "a.json": "",
        "a.pt": "circuit-tracer .pt file: damaged or cut off",
    }
    assert answer.json()["error"].startswith(f"{name}: {expected[name]}")
    assert str(folder) not in answer.text
    assert [path.name for path in folder.iterdir()] == ["toy.safetensors"]


def test_nothing_is_overwritten(client, folder, small) -> None:
    before = (folder / "toy.safetensors").read_bytes()
    (folder / "dangling.json").symlink_to(folder / "nowhere")
    for name in ("toy.safetensors", "dangling.json"):
        answer = upload(client, name, small.prune().save(folder.parent / "other.safetensors").read_bytes())
        assert (answer.status_code, answer.json()["error"]) == (
            409,
            f"name: {name} is there already, and is never overwritten",
        )
    assert (folder / "toy.safetensors").read_bytes() == before


def test_a_file_that_appears_meanwhile_is_not_overwritten(client, folder, small, monkeypatch) -> None:
    content = (folder / "toy.safetensors").read_bytes()

    def load(path: object) -> CircuitGraph:
        (folder / "new.safetensors").write_text("mine")
        return small

    monkeypatch.setattr("circuits.server.folder.CircuitGraph.load", load)
    assert upload(client, "new.safetensors", content).status_code == 409
    assert (folder / "new.safetensors").read_text() == "mine"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_file_is_refused(client, folder, monkeypatch, is_chunked) -> None:
    content = (folder / "toy.safetensors").read_bytes()
    monkeypatch.setattr(app, "UPLOAD_BYTES", len(content) - 1)
    answer = upload(client, "new.safetensors", iter([content[:100], content[100:]]) if is_chunked else content)
    assert answer.status_code == 413
    assert answer.json()["error"] == f"body: expected at most {len(content) - 1:,} bytes"
    assert [path.name for path in folder.iterdir()] == ["toy.safetensors"]
    monkeypatch.setattr(app, "UPLOAD_BYTES", len(content))
    assert upload(client, "new.safetensors", iter([content]) if is_chunked else content).status_code == 201


def test_an_upload_that_breaks_off_leaves_nothing(client, folder) -> None:
    content = (folder / "toy.safetensors").read_bytes()

    def half() -> object:
        yield content[:100]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        upload(client, "new.safetensors", half())
    assert client.get("/api/jobs").status_code == 200
    for _ in range(200):
        if [path.name for path in folder.iterdir()] == ["toy.safetensors"]:
            return
        time.sleep(0.02)
    pytest.fail("something was left")
