"""`circuits serve`: a folder of graphs in the browser."""

from __future__ import annotations

import socket
import sys
import webbrowser
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.attribution.limits import MAX_NODES
from circuits.trace_options import TraceOptions
from replacement.command_line import Memory, ModelOptions, model_options
from replacement.console import pairs, section, show

if TYPE_CHECKING:
    import uvicorn

    from circuits.server.folder import Folder
    from circuits.server.model_work import ModelWork

ADDRESS = "127.0.0.1"
"""The only one: no other machine reaches the server."""
LAST_PORT = 65_535
SECONDS_TO_FINISH = 3
"""What answers under way get when the server ends."""


@model_options
def serve(
    folder: Annotated[
        Path, typer.Argument(help="Folder of graphs, and of folders that `circuits trace` wrote.", show_default=False)
    ],
    *,
    port: Annotated[int, typer.Option(min=0, max=LAST_PORT, help="Port of 127.0.0.1.", show_default="a free one")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    max_nodes: Annotated[int, typer.Option(help="Most features that a trace expands.")] = MAX_NODES,
    memory: Memory = None,
    options: ModelOptions,
) -> None:
    """Show a folder of graphs in the browser and save labels there; with --model, trace prompts and change features.

    Only this machine reaches the server. Ctrl-C ends it.
    """
    tracing = TraceOptions(max_nodes=max_nodes, memory=memory)
    if options.model is None:
        for field in fields(options):
            if getattr(options, field.name) != field.default:
                raise ValueError(f"{field.name.replace('_', '-')}: expected together with --model")
    from circuits.server.folder import Folder

    graphs = Folder(folder)
    with listening(port) as listener:
        work = None
        if options.model is not None:
            from circuits.server.model_work import ModelWork

            work = ModelWork(options.use(lambda model, _: model), tracing, graphs)
        url = f"http://{ADDRESS}:{listener.getsockname()[1]}/"
        _announce(graphs.path, len(graphs.graphs()), url, work)
        if open_browser:
            webbrowser.open(url)
        make_server(graphs, listener, work).run(sockets=[listener])


def listening(port: int) -> socket.socket:
    """A socket that takes connections at a port of the loopback interface, 0 for a free one.

    Raises:
        ValueError: the port is taken, or needs other rights.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(f"port: {port} cannot be used ({error.strerror}): give another one, or none") from None
    return listener


def make_server(folder: Folder, listener: socket.socket, work: ModelWork | None = None) -> uvicorn.Server:
    """The HTTP server of a folder; `run(sockets=[listener])` serves until Ctrl-C."""
    import uvicorn

    from circuits.server.app import make_app

    config = uvicorn.Config(
        make_app(folder, port=listener.getsockname()[1], work=work),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
    )
    return uvicorn.Server(config)


def _announce(folder: Path, n_graphs: int, url: str, work: ModelWork | None) -> None:
    facts = [("address", url), ("folder", f"{folder}: {n_graphs:,} {'graph' if n_graphs == 1 else 'graphs'}")]
    model = "none: start with --model to trace prompts" if work is None else work.model.language_model.name
    show(section("Serving until Ctrl-C", pairs([*facts, ("model", model)])))
    sys.stdout.flush()
