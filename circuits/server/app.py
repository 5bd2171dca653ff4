"""The server's addresses, and what each answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from circuits.server.folder import UPLOAD_BYTES, Folder, UnknownGraphError
from circuits.server.guards import Guard, Refusal, chunks, json_object, refuse
from circuits.server.jobs import Job, JobQueue
from circuits.server.pages import POLICY, ViewerPages
from circuits.server.saved_state import SavedStates
from circuits.server.summaries import Summaries
from circuits.viewer.page import palette

if TYPE_CHECKING:
    from circuits.server.model_work import ModelWork

ASSETS = {
    "palette.css": "text/css",
    "table.js": "text/javascript",
    "jobs.js": "text/javascript",
    "interventions.js": "text/javascript",
    "server_hooks.js": "text/javascript",
    "table.css": "text/css",
    "server_hooks.css": "text/css",
}
"""Files that pages may load, and their types."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """What the addresses answer from."""

    folder: Folder
    states: SavedStates
    summaries: Summaries
    pages: ViewerPages
    jobs: JobQueue
    work: ModelWork | None

    # Pages ---------------------------------------------------------------------------------------------------------------

    def table(self, request: Request) -> Response:
        """The table of graphs."""
        return HTMLResponse(asset("table.html"))

    def viewer(self, request: Request) -> Response:
        """The viewer of a graph: its circuit, or with `?full` the full graph."""
        page = self.pages.page(self.folder.graph(request.path_params["name"]), full="full" in request.query_params)
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    def asset(self, request: Request) -> Response:
        """A script or style of the pages."""
        name = request.path_params["name"]
        if name not in ASSETS:
            raise refuse(404, "there is no such page")
        content = palette() if name == "palette.css" else asset(name)
        return Response(content, media_type=ASSETS[name])

    # Graphs and what is saved for them -----------------------------------------------------------------------------------

    def graphs(self, request: Request) -> Response:
        """The rows of the table."""
        model = None if self.work is None else self.work.model.language_model.name
        facts = {"folder": str(self.folder.path), "model": model, "upload_bytes": UPLOAD_BYTES}
        return as_json({**facts, "graphs": self.summaries.rows()})

    def state(self, request: Request) -> Response:
        """What is saved for a graph."""
        return as_json(self.states.load(self.folder.graph(request.path_params["name"])))

    async def save_state(self, request: Request) -> Response:
        """Merge labels and supernodes into what is saved."""
        given = await json_object(request)
        graph = await run_in_threadpool(self.folder.graph, request.path_params["name"])
        return as_json(await run_in_threadpool(self.states.save, graph, given))

    async def upload(self, request: Request) -> Response:
        """Keep a graph file; its name is in the query."""
        content = chunks(request, content_type="application/octet-stream", most=UPLOAD_BYTES)
        graph = await self.folder.receive(request.query_params.get("name", ""), content)
        return as_json({"graph": graph.name}, 201)

    # The model -----------------------------------------------------------------------------------------------------------

    async def trace(self, request: Request) -> Response:
        """Queue a trace."""
        title, work = self._model().trace(await json_object(request))
        return self._queued(title, work)

    async def intervene(self, request: Request) -> Response:
        """Queue a run of a graph's prompt with features changed."""
        given = await json_object(request)
        graph = await run_in_threadpool(self.folder.graph, request.path_params["name"])
        title, work = self._model().intervene(given, graph.path)
        return self._queued(title, work)

    def job_list(self, request: Request) -> Response:
        """All jobs, the oldest first."""
        return as_json({"jobs": self.jobs.facts()})

    def cancel(self, request: Request) -> Response:
        """Cancel a job."""
        job = self.jobs.get(request.path_params["id"])
        if job is None:
            raise refuse(404, "there is no such job")
        self.jobs.cancel(job)
        return as_json({})

    def _model(self) -> ModelWork:
        if self.work is None:
            raise refuse(409, "no model is loaded: start `circuits serve` with --model")
        return self.work

    def _queued(self, title: str, work: Callable[[Job], dict[str, Any]]) -> Response:
        return as_json({"job": self.jobs.add(title, work).id}, 202)


def make_app(folder: Folder, *, port: int, work: ModelWork | None = None) -> Starlette:
    """The app for a folder, reached at a port of the loopback interface.

    Args:
        work: for traces and interventions; without it they are refused.
    """
    states = SavedStates()
    server = Server(
        folder=folder,
        states=states,
        summaries=Summaries(folder, states),
        pages=ViewerPages(has_model=work is not None),
        jobs=JobQueue(folder.message),
        work=work,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.jobs.close()
        server.summaries.close()

    def failed(request: Request, error: Exception) -> Response:
        return _failed(request, error, folder)

    routes = [
        Route("/", server.table),
        Route("/graph/{name}", server.viewer),
        Route("/assets/{name}", server.asset),
        Route("/api/graphs", server.graphs),
        Route("/api/graphs/{name}/state", server.state),
        Route("/api/graphs/{name}/state", server.save_state, methods=["POST"]),
        Route("/api/graphs/{name}/interventions", server.intervene, methods=["POST"]),
        Route("/api/upload", server.upload, methods=["POST"]),
        Route("/api/traces", server.trace, methods=["POST"]),
        Route("/api/jobs", server.job_list),
        Route("/api/jobs/{id}/cancel", server.cancel, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, ValueError, FileExistsError), failed)
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, port=port)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )


def as_json(value: Any, status: int = 200) -> Response:
    """A JSON answer in ASCII, which can hold any text of a graph."""
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")


def asset(name: str) -> str:
    """Text of a file of `assets/`."""
    return files("circuits.server").joinpath("assets", name).read_text(encoding="utf-8")


def _failed(request: Request, error: Exception, folder: Folder) -> Response:
    """One line that says what is wrong: as JSON for scripts, as a page for people."""
    status, message, headers = 400, folder.message(error), {}
    if isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        message = "there is no such page" if error.detail == "Not Found" else error.detail
    elif isinstance(error, UnknownGraphError):
        status = 404
    elif isinstance(error, FileExistsError):
        status = 409
    if not request.url.path.startswith("/api/"):
        return HTMLResponse(asset("error.html").replace("{{ message }}", escape(message)), status, headers)
    return Refusal(json.dumps({"error": message}), status, headers, "application/json")
