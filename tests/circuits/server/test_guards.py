"""Who may ask the server for what: every refusal by its message, over real connections."""

from __future__ import annotations

import http.client
import json
import socket
from importlib.resources import files

import pytest

from circuits.server.app import ASSETS
from circuits.server.guards import HEADERS, JSON_BYTES

STATE = "/api/graphs/toy.safetensors/state"
SAVED = {"version": 1, "labels": {"1_3_1": "mine"}}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "localhost:1",
        "127.0.0.1:{port}.evil.example",
        "[::1]:{port}",
    ],
)
def test_a_foreign_host_is_refused(client, host) -> None:
    port = client.base_url.port
    for method, path in (("GET", "/"), ("GET", "/api/graphs"), ("POST", STATE)):
        answer = client.request(method, path, headers={"Host": host.format(port=port)})
        assert answer.status_code == 403
        expected = f"Host: expected 127.0.0.1:{port} or localhost:{port}, given {host.format(port=port)}"
        assert answer.text == expected
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def raw(client, request: str) -> str:
    """The answer to a request written by hand."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(request.encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer.decode()


def test_two_hosts_or_none_are_refused(client) -> None:
    port = client.base_url.port
    own = f"Host: 127.0.0.1:{port}\r\n"
    for hosts in ("", own + "Host: evil.example\r\n"):
        answer = raw(client, f"GET / HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n")
        assert answer.startswith(("HTTP/1.1 400", "HTTP/1.1 403"))
    assert "expected 127.0.0.1" in raw(client, "GET / HTTP/1.0\r\n\r\n")


def test_both_names_of_this_machine_are_taken(client) -> None:
    for host in ("localhost", "LocalHost", "127.0.0.1"):
        assert client.get("/", headers={"Host": f"{host}:{client.base_url.port}"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Origin": "https://evil.example"}, "Origin: expected http://127.0.0.1:{port}, given https://evil.example"),
        ({"Origin": "null"}, "Origin: expected http://127.0.0.1:{port}, given null"),
        ({"Origin": "http://127.0.0.1:1"}, "Origin: expected http://127.0.0.1:{port}, given http://127.0.0.1:1"),
        (
            {"Origin": "http://localhost:{port}"},
            "Origin: expected http://127.0.0.1:{port}, given http://localhost:{port}",
        ),
        (
            {"Origin": "https://127.0.0.1:{port}"},
            "Origin: expected http://127.0.0.1:{port}, given https://127.0.0.1:{port}",
        ),
        ({"Sec-Fetch-Site": "cross-site"}, "Sec-Fetch-Site: expected same-origin, given cross-site"),
        ({"Sec-Fetch-Site": "same-site"}, "Sec-Fetch-Site: expected same-origin, given same-site"),
        ({"Sec-Fetch-Site": "none"}, "Sec-Fetch-Site: expected same-origin, given none"),
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        STATE,
        "/api/upload?name=a.json",
        "/api/traces",
        "/api/jobs/1/cancel",
        "/api/graphs/toy.safetensors/interventions",
    ],
)
def test_other_sites_change_nothing(client, folder, path, headers, message) -> None:
    port = client.base_url.port
    before = sorted(folder.iterdir())
    answer = client.post(path, json=SAVED, headers={name: text.format(port=port) for name, text in headers.items()})
    assert (answer.status_code, answer.text) == (403, message.format(port=port))
    assert sorted(folder.iterdir()) == before


def test_the_pages_themselves_and_programs_of_the_user_may(client) -> None:
    own = f"http://127.0.0.1:{client.base_url.port}"
    for headers in ({}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}):
        assert client.post(STATE, json=SAVED, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_what_a_form_can_send_is_refused(client, content_type) -> None:
    """Such requests need no leave of the browser."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post(STATE, content=json.dumps(SAVED).encode(), headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"] == f"Content-Type: expected application/json, given {content_type or 'none'}"
    answer = client.post("/api/upload?name=a.json", content=b"{}", headers=headers)
    assert answer.json()["error"] == f"Content-Type: expected application/octet-stream, given {content_type or 'none'}"


def test_other_methods_are_refused(client) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, STATE).status_code == 405
    assert client.post("/", json={}).status_code == 405
    assert client.get("/api/traces").status_code == 405


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_is_refused_before_it_was_read(client, is_chunked) -> None:
    """With a length, before any of it; without one, once there is too much."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    connection.putrequest("POST", STATE)
    connection.putheader("Content-Type", "application/json")
    if is_chunked:
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        piece = b" " * 2**16
        for _ in range(JSON_BYTES // len(piece) + 1):
            connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
    else:
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders()
    answer = connection.getresponse()  # though the body has no end yet
    assert answer.status == 413
    assert json.load(answer) == {"error": "body: expected at most 1,048,576 bytes"}
    connection.close()


def test_a_body_of_the_largest_size_is_taken(client) -> None:
    text = json.dumps(SAVED).encode()
    headers = {"Content-Type": "application/json"}
    assert client.post(STATE, content=text.ljust(JSON_BYTES), headers=headers).status_code == 200
    assert client.post(STATE, content=text.ljust(JSON_BYTES + 1), headers=headers).status_code == 413


@pytest.mark.parametrize("length", ["-1", "abc", "1_0", "9" * 100, "٣"])
def test_a_length_that_is_none_is_refused(client, length) -> None:
    port = client.base_url.port
    head = f"POST {STATE} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    assert raw(client, f"{head}Content-Length: {length}\r\n\r\n").startswith(("HTTP/1.1 400", "HTTP/1.1 413"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: expected JSON ("),
        (b"{", "body: expected JSON ("),
        (b"\xff\xfe{", "body: expected JSON ("),
        (b'{"labels": NaN}', "body: expected JSON (NaN is no number of JSON)"),
        (b"[" * 100_000, "body: expected JSON ("),
        (b"1" * 10_000, "body: expected JSON ("),
        (b"[]", "body: expected a JSON object, given list"),
        (b"null", "body: expected a JSON object, given NoneType"),
    ],
)
def test_broken_json_is_refused(client, body, message) -> None:
    for path in (STATE, "/api/graphs/toy.safetensors/state"):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(message)


def test_every_answer_has_the_headers(client) -> None:
    pages = [
        "",
        "graph/toy.safetensors",
        "graph/none",
        "assets/table.js",
        "assets/none",
        "none",
        "api/graphs",
        "api/none",
    ]
    for page in pages:
        answer = client.get(f"/{page}")
        for name, value in HEADERS.items():
            if name != "Content-Security-Policy":
                assert answer.headers[name] == value, page
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers


def test_every_asset_is_served_or_a_page() -> None:
    folder = files("circuits.server").joinpath("assets")
    own = {file.name for file in folder.iterdir()} - {"table.html", "error.html"}
    assert own == ASSETS.keys() - {"palette.css"}, "that one is the viewer's"
