"""The life of the process: uvicorn, with an end that lets answers finish their sentence."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish sentences, then close."""
        note("stopping")
        await self.house.drain()
        await super().shutdown(sockets)


def server_of(settings: Settings, port: int, prepare: Callable[[], Engine]) -> Server:
    """A server that is ready to `run`."""
    app = create_app(settings, prepare)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=port,
        log_config=None,
        access_log=False,
        ws="websockets-sansio",
        ws_max_size=settings.message_bytes,
        ws_ping_interval=PING,
        ws_ping_timeout=PING,
        ws_per_message_deflate=False,  # sound does not shrink, and a message of zeros would grow
        timeout_graceful_shutdown=round(settings.stop_seconds),
        server_header=False,
    )
    return Server(config, app.state.house)


def run(settings: Settings, port: int, prepare: Callable[[], Engine]) -> None:
    """Serve until told to stop."""
    to_standard_error()
    server_of(settings, port, prepare).run()
