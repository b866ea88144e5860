"""Who may come in, with how much: keys, web pages, hosts, sizes; and a line in the log for each request.

Everything else is behind this. What is open to everybody: /health, and the page.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from antiphon.serve.house import House
from antiphon.serve.logs import note
from antiphon.serve.refusals import Refused, refusal
from antiphon.serve.settings import LOOPBACK
from antiphon.serve.wire import new_id

GUARDED = ("/v1/", "/metrics")
IN_SUBPROTOCOL = "openai-insecure-api-key."  # how a browser, which can set no headers, gives its key
LOCAL = "local"  # who comes without a key, where none is asked for


class Gate:
    """ASGI middleware around the whole server."""

    def __init__(self, app: ASGIApp, house: House) -> None:
        self.app, self.house = app, house

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, begun = Headers(scope=scope), time.perf_counter()
        request_id = _given_id(headers) or new_id("req")
        status, begun_answer = 101 if scope["type"] == "websocket" else 500, False

        async def answer(message: Message) -> None:
            nonlocal status, begun_answer
            begun_answer = True
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if status >= 400:
                    self.house.meters.refusals.labels(str(status)).inc()
            await send(message)

        try:
            scope.setdefault("state", {}).update(request_id=request_id, who=self.admit(scope, headers))
            await self.app(scope, self.bounded(receive) if scope["type"] == "http" else receive, answer)
        except Exception as error:
            told = refusal(error)
            if told.status == 500:
                note("failed", level=logging.ERROR, error=error, id=request_id)
            if begun_answer:
                raise
            await refuse(told, scope, receive, answer)
        finally:
            path, ms = _known(scope["path"]), round(1000 * (time.perf_counter() - begun), 1)
            self.house.meters.requests.labels(path, str(status)).inc()
            level = logging.DEBUG if path in ("/health", "/metrics") else logging.INFO
            note(
                "request", level=level, id=request_id, method=scope.get("method", "WS"), path=path, status=status, ms=ms
            )

    def admit(self, scope: Scope, headers: Headers) -> str:
        """Who it is.

        Raises:
            Refused: no key where one is needed, or a web page or host that is not known.
        """
        if not scope["path"].startswith(GUARDED):
            return LOCAL
        if self.house.stopping:
            raise Refused("the server is being stopped", 503, "stopping", retry_after=5)
        self._check_origin(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.house.settings.body_bytes:
            raise self._too_large()
        return self._key(headers)

    def _key(self, headers: Headers) -> str:
        keys = self.house.settings.keys
        if not keys:
            return LOCAL
        given = _bearer(headers).encode()
        matches = [hmac.compare_digest(key.encode(), given) for key in keys]  # all, so that time tells nothing
        if not any(matches):
            raise Refused("give a valid API key: Authorization: Bearer KEY", 401, "invalid_api_key")
        return hashlib.sha256(given).hexdigest()[:12]

    def _check_origin(self, headers: Headers) -> None:
        """A web page of somebody else must not speak to a server on this machine in its user's name."""
        settings, host = self.house.settings, headers.get("host", "")
        if not settings.keys and urlsplit(f"//{host}").hostname not in {*LOOPBACK, settings.host}:
            told = f"this server does not go by the name {host!r}; call it 127.0.0.1, or start it with --keys"
            raise Refused(told, 403, "unknown_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host and origin not in settings.origins:
            raise Refused(f"pages from {origin} may not speak to this server; see --origin", 403, "unknown_origin")

    def bounded(self, receive: Receive) -> Receive:
        """`receive` of a body that neither grows too large nor comes too slowly."""
        settings, size = self.house.settings, 0
        complete = False

        async def bounded() -> Message:
            nonlocal size, complete
            try:
                message = await asyncio.wait_for(receive(), None if complete else settings.chunk_seconds)
            except TimeoutError:
                raise Refused("the body comes too slowly", 408, "timeout") from None
            complete = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > settings.body_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> Refused:
        most = self.house.settings.body_bytes
        return Refused(f"the body is larger than the limit of {most} bytes", 413, "request_too_large")


async def refuse(error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or the opening of a WebSocket, with an error."""
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(error.response())
    else:
        await error.response()(scope, receive, send)


def _bearer(headers: Headers) -> str:
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(IN_SUBPROTOCOL):
            return protocol.strip().removeprefix(IN_SUBPROTOCOL)
    return ""


def _given_id(headers: Headers) -> str | None:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else None


def _known(path: str) -> str:
    """A path as a label: without what clients put into it."""
    found = re.match(
        r"/v1/(models|chat/completions|audio/(?:transcriptions|speech|voices)|realtime)|/(health|metrics)", path
    )
    return found[0] if found else "other"
