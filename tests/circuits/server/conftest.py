"""A real server in a thread, asked over real connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import crosscoder_for

from circuits import TraceOptions
from circuits.server.command import listening, make_server
from circuits.server.folder import Folder
from circuits.server.model_work import ModelWork
from replacement import ReplacementModel

Serve = Callable[..., httpx.Client]


@contextmanager
def served(folder: Path, model: ReplacementModel | None = None, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server of the folder."""
    graphs = Folder(folder)
    work = None if model is None else ModelWork(model, TraceOptions(**options), graphs)
    with listening(0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = make_server(graphs, listener, work)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with httpx.Client(base_url=address, timeout=60) as client:
            yield client
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(folder, model=None, **options)`: a client of a new server, which ends with the test."""
    with ExitStack() as servers:
        yield lambda *arguments, **options: servers.enter_context(served(*arguments, **options))


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """A folder with the graph `toy.safetensors`."""
    folder = tmp_path / "graphs"
    folder.mkdir()
    small.save(folder / "toy.safetensors")
    return folder


@pytest.fixture
def client(serve, folder) -> httpx.Client:
    """A client of the server of `folder`."""
    return serve(folder)


@pytest.fixture(scope="session")
def model(language_model) -> ReplacementModel:
    """A tiny model with a crosscoder."""
    lm = language_model("gpt2")
    return ReplacementModel(lm, crosscoder_for(lm))


def until_finished(client: httpx.Client, job: str, seconds: float = 60) -> dict[str, Any]:
    """The facts of a job once it is finished."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        facts = next(facts for facts in client.get("/api/jobs").json()["jobs"] if facts["id"] == job)
        if facts["state"] not in ("waiting", "running"):
            return facts
        time.sleep(0.02)
    raise AssertionError(f"job {job} is still {facts['state']}: {facts['progress']}")


@pytest.fixture(scope="session")
def wait() -> Callable[..., dict[str, Any]]:
    """`until_finished`."""
    return until_finished
