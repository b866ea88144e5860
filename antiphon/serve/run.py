"""The life of the process: uvicorn, with an end that lets answers finish their sentence."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from antiphon.engine import Engine
from antiphon.serve.app import create_app
from antiphon.serve.house import House
from antiphon.serve.logs import note, to_standard_error
from antiphon.serve.settings import Settings

PING = 20.0  # seconds between signs of life of a WebSocket


class Server(uvicorn.Server):
    """uvicorn, which before it closes connections asks the house to end its conversations."""

    def __init__(self, config: uvicorn.Config, house: House) -> None:
        super().__init__(config)
        self.house = house

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        places = [place.getsockname() for server in self.servers for place in server.sockets]
        if places:
            note("listening", places=[f"{host}:{port}" for host, port, *_ in places])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish sentences, then close."""
        note("stopping")
        await self.house.drain()
        await super().shutdown(sockets)


class Http(H11Protocol):
    """HTTP, where a connection is closed that takes longer than the keep-alive time over the head of a request.

    uvicorn itself waits for as long as some of it comes.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._slow is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there."""
        super().connection_lost(exc)
        self._stop()

    def _wait(self) -> None:
        self._slow = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _stop(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None


def config_of(app: Starlette, port: int) -> uvicorn.Config:
    """How uvicorn serves the application."""
    settings: Settings = app.state.house.settings
    return uvicorn.Config(
        app,
        host=settings.host,
        port=port,
        log_config=None,
        access_log=False,
        http=Http,
        timeout_keep_alive=settings.head_seconds,
        ws="websockets-sansio",
        ws_max_size=settings.message_bytes,
        ws_ping_interval=PING,
        ws_ping_timeout=PING,
        ws_per_message_deflate=False,  # sound does not shrink, and a message of zeros would grow
        timeout_graceful_shutdown=round(settings.stop_seconds),
        server_header=False,
    )


def server_of(settings: Settings, port: int, prepare: Callable[[], Engine]) -> Server:
    """A server that is ready to `run`."""
    app = create_app(settings, prepare)
    return Server(config_of(app, port), app.state.house)


def run(settings: Settings, port: int, prepare: Callable[[], Engine]) -> None:
    """Serve until told to stop."""
    to_standard_error()
    server_of(settings, port, prepare).run()
