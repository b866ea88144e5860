"""The server as an ASGI application: which path is whose.

client ──> Gate ──> endpoint ──> House: calls of the engine
                              <── events, on the event loop
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from openai.types import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from antiphon.engine import Engine
from antiphon.serve.chat import chat
from antiphon.serve.gate import Gate
from antiphon.serve.house import House, house_of
from antiphon.serve.kept import Shelves
from antiphon.serve.meters import summed
from antiphon.serve.openapi import document, page
from antiphon.serve.realtime import Lobby, realtime
from antiphon.serve.refusals import Refused
from antiphon.serve.settings import Settings
from antiphon.serve.speech import add_voice, delete_voice, list_voices, speech
from antiphon.serve.transcriptions import transcriptions

PAGE = Path(__file__).parent / "page"


def create_app(settings: Settings, prepare: Callable[[], Engine], shelves: Shelves | None = None) -> Starlette:
    """The server; `prepare` makes the engine, started and warm, while /health already answers 503.

    `shelves` are what it keeps things on, where other processes share them.
    """
    house = House(settings, prepare, shelves or Shelves())

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(house.warm())
        yield
        warming.cancel()
        await house.stop()

    routes: list[BaseRoute] = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", lambda request: JSONResponse(document())),
        Route("/docs", lambda request: HTMLResponse(page())),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
        Route("/v1/audio/speech", speech, methods=["POST"]),
        Route("/v1/audio/voices", list_voices, methods=["GET"]),
        Route("/v1/audio/voices", add_voice, methods=["POST"]),
        Route("/v1/audio/voices/{voice_id}", delete_voice, methods=["DELETE"]),
        WebSocketRoute("/v1/realtime", realtime),
        Route("/v1/realtime", not_a_socket, methods=["GET", "POST"]),
        WebSocketRoute("/{path:path}", not_spoken),
    ]
    if PAGE.is_dir():
        routes.append(Mount("/", StaticFiles(directory=PAGE, html=True)))
    app = Starlette(
        routes=routes,
        lifespan=life,
        middleware=[Middleware(Gate, house=house)],
        exception_handlers={HTTPException: _http},
    )
    app.state.house, app.state.lobby = house, Lobby(house)
    return app


async def health(request: Request) -> Response:
    """200 when it can answer at once."""
    warm = house_of(request).is_warm
    return JSONResponse({"status": "ok" if warm else "warming"}, 200 if warm else 503)


async def metrics(request: Request) -> Response:
    """For Prometheus: of all workers together."""
    house = house_of(request)
    others = [text for name, text in house.shelves.metrics.items() if name != house.settings.worker]
    return Response(summed([house.meters.text(), *others]), media_type="text/plain; version=0.0.4; charset=utf-8")


async def not_a_socket(request: Request) -> Response:
    """Realtime, asked for in the wrong way."""
    told = "Realtime is spoken over a WebSocket; connect to ws://… (wss:// behind TLS) instead of http://"
    return Refused(told, 426, "websocket_needed").response()


async def models(request: Request) -> Response:
    """The one model there is, under all its names."""
    house = house_of(request)
    data = [_model(house, name).model_dump() for name in house.settings.names]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """One model."""
    name = house_of(request).check_model(request.path_params["name"])
    return JSONResponse(_model(house_of(request), name).model_dump())


def _model(house: House, name: str) -> Model:
    return Model(id=name, created=house.began, object="model", owned_by="antiphon")


async def _http(request: Request, error: Exception) -> Response:
    """What the router refuses, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    path, scope = request.url.path, request.scope
    near = [r for r in request.app.routes if isinstance(r, Route) and r.matches(scope)[0] is Match.PARTIAL]
    if methods := sorted({method for route in near for method in route.methods or ()}):
        told = f"{path} does not take {request.method}; use {' or '.join(methods)}"
        return Refused(told, 405, "method_not_allowed").response()
    if error.status_code in (404, 405):  # of the page's files, where all other paths end
        return _nothing(path).response()
    return Refused(error.detail, error.status_code).response()


async def not_spoken(socket: WebSocket) -> None:
    """A WebSocket that nobody is at."""
    raise _nothing(socket.url.path)


def _nothing(path: str) -> Refused:
    return Refused(f"there is no {path}; /docs lists what there is", 404, "not_found")
