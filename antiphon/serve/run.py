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
from antiphon.errors import InputError
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
        house.give_up = lambda: setattr(self, "should_exit", True)

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


def place_of(settings: Settings, port: int) -> socket.socket:
    """Where callers will come; nobody is listened to yet.

    Raises:
        InputError: it is somebody else's, or not of this machine.
    """
    place = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((settings.host, port))
    except OSError as error:
        place.close()
        told = f"{settings.host}:{port} cannot be had ({error.strerror}); give another --host or --port"
        raise InputError(told) from None
    return place


def run(settings: Settings, place: socket.socket, prepare: Callable[[], Engine]) -> None:
    """Serve until told to stop.

    Raises:
        InputError: the engine could not be made ready.
    """
    to_standard_error()
    server = server_of(settings, 0, prepare)
    server.run(sockets=[place])
    server.house.check_warmed()
