"""`circuits serve` as a command: what it prints, where it listens, how it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from circuits.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: expected a folder of graphs, but there is no such folder"),
        ([".", "--port", "70000"], "Invalid value for '--port'"),
        ([".", "--port", "-1"], "Invalid value for '--port'"),
        ([".", "--host", "0.0.0.0"], "No such option: --host"),
        ([".", "--crosscoder", "demo"], "crosscoder: expected together with --model"),
        ([".", "--device", "cuda"], "device: expected together with --model"),
        ([".", "--model", "gpt2"], "crosscoder: expected a crosscoder made for gpt2, given none"),
        ([".", "--max-nodes", "0"], "max-nodes: expected at least 1, given 0"),
        ([".", "--memory", "lots"], "memory: expected a size above 0"),
        ([], "Missing argument 'folder'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_said(folder, capsys) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: port: {port} cannot be used (Address already in use)")


def started(folder: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """The running command, and its address."""
    command = [sys.executable, "-m", "circuits", "serve", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"http://127\.0\.0\.1:\d+/", line):
            return process, match[0]
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_this_machine_alone_and_ends_cleanly(folder, ending) -> None:
    process, address = started(folder)
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.get("/").status_code == 200
            assert [row["name"] for row in client.get("/api/graphs").json()["graphs"]] == ["toy.safetensors"]
            process.send_signal(ending)  # while a connection is open
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if ending == signal.SIGINT else -signal.SIGTERM)
    assert err == ""
    assert "Traceback" not in out


def test_the_socket_is_that_of_the_loopback_interface(folder) -> None:
    from circuits.server.command import listening

    with listening(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_browser_is_opened_only_if_asked_to(folder, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    assert main(["serve", str(folder)]) == 0
    assert opened == []
    assert main(["serve", str(folder), "--open"]) == 0
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", opened[0])
