"""A server on a free local port, in a thread, as clients of the tests meet it."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import httpx2
import openai
import pytest
import torch
from torch import Tensor

from antiphon.engine import Call, Engine
from antiphon.engine.call import Turn
from antiphon.engine.speaking import Speaking
from antiphon.generate import Omni, load
from antiphon.serve.run import server_of
from antiphon.serve.settings import Settings


@cache
def tiny() -> Omni:
    return load("tiny", dtype=torch.float32)


def engine(capacity: int = 8) -> Engine:
    return Engine(tiny(), capacity).start()


@dataclass
class Served:
    """A running server."""

    host: str  # with its port
    engine: Engine
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=60)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=60)

    def http(self, **how: object) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **how)  # type: ignore[arg-type]


@contextmanager
def serving(
    settings: Settings = Settings(), make: Callable[[], Engine] = engine, wait: bool = True
) -> Iterator[Served]:
    """A server that answers; with `wait` False, one that may still be warming."""
    made: list[Engine] = []

    def prepare() -> Engine:
        made.append(make())
        return made[0]

    server = server_of(settings, 0, prepare)
    place = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([place])), daemon=True)
    thread.start()
    host = f"127.0.0.1:{place.getsockname()[1]}"
    until(lambda: server.started)
    if wait:
        with httpx2.Client(base_url=f"http://{host}") as http:
            until(lambda: http.get("/health").status_code == 200)

    def stop() -> None:
        server.should_exit = True

    try:
        yield Served(host, made[0] if made else Engine(tiny()), stop)
    finally:
        stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def until(true: Callable[[], bool], seconds: float = 60, every: float = 0.01) -> None:
    """Wait for something that another thread does, looking `every` so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)


def make_talkative(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The Talker does not come to an end by itself, until the function that is returned is called."""
    give, endless = Speaking.give, [True]

    def more(self: Speaking, call: Call, turn: Turn, codes: Tensor, *rest: Tensor) -> None:
        stop = self.speech.talker.config.codec_eos_token_id
        give(self, call, turn, codes.masked_fill(codes == stop, 5) if endless[0] else codes, *rest)

    monkeypatch.setattr(Speaking, "give", more)
    return lambda: endless.__setitem__(0, False)
