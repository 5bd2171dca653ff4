"""What every request must pass, and the headers that every response gets.

The server listens on the loopback interface alone, but pages of other sites that are open in the same browser can send requests
there. `Host` is checked against DNS rebinding; `Origin` and `Sec-Fetch-Site` keep other sites from changing anything.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
READING = ("GET", "HEAD")
"""Methods that change nothing."""
JSON_BYTES = 2**20
"""Most bytes of a JSON body."""
BODY_IS_READ = "crosstrace.body_is_read"
"""Key of a request's scope: whether its body was read to the end."""
LINGER = 2.0
"""Seconds in which a client that sends too much may read the answer."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""A response may have another policy of its own."""


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, *, port: int) -> None:
        """Guard an app that is reached at a port of the loopback interface."""
        self.app = app
        self.hosts = [f"{host}:{port}" for host in HOSTS] + ([*HOSTS] if port == 80 else [])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that may not pass with 403; hand on any other."""

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope[BODY_IS_READ] = not {"content-length", "transfer-encoding"} & set(headers)

        async def noted() -> Message:
            message = await receive()
            scope[BODY_IS_READ] = not message.get("more_body")
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answered.setdefault(name, value)
            await send(message)

        complaint = self.complaint(scope["method"], headers)
        app = self.app if complaint is None else Refusal(complaint, 403, media_type="text/plain")
        await app(scope, noted, send_with_headers)

    def complaint(self, method: str, headers: Headers) -> str | None:
        """Why a request is refused; None for one that may pass.

        Browsers send `Origin` with whatever changes something, so a request without it comes from a program of the user.
        """
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return f"Host: expected {' or '.join(self.hosts)}, given {', '.join(hosts)[:80] or 'none'}"
        if method in READING:
            return None
        for origin in headers.getlist("origin"):
            if origin.lower() != f"http://{hosts[0].lower()}":
                return f"Origin: expected http://{hosts[0]}, given {origin[:80]}"
        for site in headers.getlist("sec-fetch-site"):
            if site != "same-origin":
                return f"Sec-Fetch-Site: expected same-origin, given {site[:80]}"
        return None


def refuse(status: int, message: str) -> HTTPException:
    """An answer with a one-line message."""
    return HTTPException(status, message)


class Refusal(Response):
    """An answer that may come before the body was read to its end; the connection then ends after it.

    A connection that is closed while the client still sends is reset, and the client may never see the answer. So for some
    seconds what it sends is thrown away.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, then read what is left of the body."""
        if not scope[BODY_IS_READ]:
            self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with anyio.move_on_after(LINGER):
            while not scope[BODY_IS_READ]:
                await receive()
        await send({"type": "http.response.body", "body": b""})


async def chunks(request: Request, *, content_type: str, most: int) -> AsyncIterator[bytes]:
    """The body piece by piece.

    Args:
        content_type: the only one that is taken; none that a plain form of another site can send.
        most: bytes.

    Raises:
        HTTPException: 415 for another content type, 413 as soon as there is more than `most`, 400 for a body that ends early.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != content_type:
        raise refuse(415, f"Content-Type: expected {content_type}, given {given[:80] or 'none'}")
    too_large = refuse(413, f"body: expected at most {most:,} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > most:
        raise too_large
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > most:
                raise too_large
            yield chunk
    except ClientDisconnect:
        raise refuse(400, "body: it ended early") from None


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        HTTPException: as `chunks`, or 400 for anything else than a JSON object.
    """
    body = b"".join([chunk async for chunk in chunks(request, content_type="application/json", most=JSON_BYTES)])
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise refuse(400, f"body: expected JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(value, dict):
        raise refuse(400, f"body: expected a JSON object, given {type(value).__name__}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
