"""A client of WS /v1/realtime for tests: every event that comes is held against OpenAI's types."""

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.sync.client import ClientConnection, connect

from antiphon.audio import Resampler, Samples, from_pcm16, pcm16, read_audio
from tests.serving import Served

ORACLE = TypeAdapter(RealtimeServerEvent)
Event = dict[str, Any]


class Line:
    """One connection."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.events = socket, list[Event]()

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self, timeout: float = 30) -> Event:
        event = json.loads(self.socket.recv(timeout))
        checked = ORACLE.validate_python(event)
        assert type(checked).__name__ != "dict"
        self.events.append(event)
        return event

    def until(self, kind: str, timeout: float = 30) -> list[Event]:
        """Events up to one of `kind`."""
        got = [self.next(timeout)]
        while got[-1]["type"] != kind:
            got.append(self.next(timeout))
        return got

    def last(self, kind: str, timeout: float = 30) -> Event:
        return self.until(kind, timeout)[-1]

    def update(self, **session: Any) -> Event:
        self.send("session.update", session={"type": "realtime", **session})
        return self.last("session.updated")

    def append(self, samples: Samples, pieces: int = 1) -> None:
        for piece in np.array_split(samples, pieces):
            self.send("input_audio_buffer.append", audio=base64.b64encode(pcm16(piece)).decode())

    def say(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})


@contextmanager
def line(server: Served, key: str | None = None, fresh: bool = True, **query: str) -> Iterator[Line]:
    """A connection, after its greeting."""
    asked = "&".join(f"{name}={value}" for name, value in {"model": "tiny", **query}.items())
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with connect(f"ws://{server.host}/v1/realtime?{asked}", additional_headers=headers, max_size=None) as socket:
        made = Line(socket)
        if fresh:
            made.until("conversation.created")
        yield made


def types(events: Sequence[Event]) -> list[str]:
    """Their types; what comes many times in a row, once."""
    names = [event["type"] for event in events]
    return [name for i, name in enumerate(names) if not i or names[i - 1] != name]


def sound_of(events: Sequence[Event]) -> bytes:
    deltas = [event["delta"] for event in events if event["type"] == "response.output_audio.delta"]
    return b"".join(map(base64.b64decode, deltas))


def text_of(events: Sequence[Event]) -> str:
    kinds = ("response.output_audio_transcript.delta", "response.output_text.delta")
    return "".join(event["delta"] for event in events if event["type"] in kinds)


def at_24k(name: str | Path) -> Samples:
    """An example's sound at the wire's rate."""
    samples, rate = read_audio(name)
    return Resampler(rate, 24000)(torch.from_numpy(samples)[None])[0].numpy()


def as_sent(samples: Samples) -> Samples:
    """Samples as they come out of the wire."""
    return from_pcm16(pcm16(samples))


def quiet(seconds: float, rate: int = 24000) -> Samples:
    return np.zeros(round(seconds * rate), np.float32)
