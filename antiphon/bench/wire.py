"""The same load on any server that speaks OpenAI's protocols: Realtime (ws) by push-to-talk, streaming chat (http).

    question ──pieces──> Spoken: input_audio_buffer.append … commit, response.create ──> deltas
                    └──> Asked: one request with all of it ──> chunks

Events are taken from the wire as they are, without a client's own work between them. What a server says of itself at
/metrics (its own clock, its memory) stands beside what was seen from here.

Shapes: N samples.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from openai import APIError, APIStatusError, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import connect

from antiphon.audio import Resampler, Samples, from_pcm16, pcm16, write_audio
from antiphon.bench.figures import Run, summary
from antiphon.bench.load import Answered, Conversation, Load, Question, measure
from antiphon.errors import BusyError, InputError
from antiphon.generate import AudioDelta, Event, TextDelta

RATE = 24000  # Hz, of sound on OpenAI's wire
KEY = "OPENAI_API_KEY"  # in the environment
VOICE = "alloy"  # chat wants one to be named
FULL = (429, 503)  # statuses of a server that takes nobody in now
PATIENCE = 60.0  # seconds without an event
OWN = "antiphon_turn_seconds"  # the engine's own clock, of a server that is ours
RESIDENT = "process_resident_memory_bytes"  # as most servers call it


@dataclass(frozen=True)
class Server:
    """A server.

    Args:
        url: ws://host:port for Realtime, http://host:port for chat; with a path where it is not /v1.
        model: what it calls the model.

    Raises:
        InputError: another kind of URL.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("ws", "wss", "http", "https") or not parts.hostname:
            raise InputError(f"{self.url} is no server; give ws://host:port for Realtime or http://host:port for chat")

    @property
    def base(self) -> str:
        """Where its endpoints are."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/realtime").removesuffix("/chat/completions") or "/v1"
        return f"{parts.scheme}://{parts.netloc}{path}"

    @property
    def key(self) -> str:
        """What lets us in; servers without keys pass it over."""
        return os.environ.get(KEY, "none")

    def open(self, *, window: int | None = None) -> Conversation:
        """A conversation; `window` is the server's own affair.

        Raises:
            BusyError, InputError: it takes nobody in now; there is no such server.
        """
        return Spoken(self) if self.url.startswith("ws") else Asked(self)

    def told(self) -> dict[str, float]:
        """What it says of itself: sum and count of its times to the first sound, its memory; {} if nothing."""
        parts = urlsplit(self.url)
        place = f"{parts.scheme.replace('ws', 'http')}://{parts.netloc}/metrics"
        asked = urllib.request.Request(place, headers={"authorization": f"Bearer {self.key}"})
        try:
            with urllib.request.urlopen(asked, timeout=10) as response:
                families = [*text_string_to_metric_families(response.read().decode())]
        except (OSError, ValueError):
            return {}
        return {
            sample.name: sample.value
            for family in families
            for sample in family.samples
            if sample.name == RESIDENT or (sample.name.startswith(OWN) and sample.labels == {"phase": "first_audio"})
        }


def run(server: Server, questions: Sequence[Question], loads: Sequence[Load]) -> Iterator[Run]:
    """Every load in turn."""
    questions = [at_wire_rate(*question) for question in questions]
    for load in loads:
        before = server.told()
        begun = time.perf_counter()
        answers = measure(server, questions, load)
        seconds = time.perf_counter() - begun
        yield Run(summary(load, answers, seconds) | beside(answers, before, server.told()), answers, [])


def beside(answers: Sequence[Answered], before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """The server's memory, and the mean time to the first packet: seen from here, and by the engine's own clock.

    Means, since those of the same turns differ by exactly what the wire costs.
    """
    seen = [1000 * (a.code - a.asked) for a in answers if a.packets and not a.error]
    count = after.get(f"{OWN}_count", 0) - before.get(f"{OWN}_count", 0)
    found: dict[str, Any] = {"wire_ms": float(np.mean(seen)) if seen else None, "own_ms": None}
    if count == len(seen) > 0:  # else others were there too
        found["own_ms"] = 1000 * (after[f"{OWN}_sum"] - before.get(f"{OWN}_sum", 0.0)) / count
    if RESIDENT in after:
        found["memory_mb"] = after[RESIDENT] / 2**20
    return found


def at_wire_rate(samples: Samples, rate: int) -> Question:
    """A question [N] as it goes over the wire."""
    return Resampler(rate, RATE)(torch.from_numpy(samples)[None])[0].numpy(), RATE


class Spoken:
    """A conversation over Realtime: the question goes out while it is spoken, and we say when it is over.

    Raises:
        BusyError, InputError: it is refused; there is no such server.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        headers = {"authorization": f"Bearer {server.key}"}
        try:
            self.socket = connect(
                f"{server.base}/realtime?model={server.model}", additional_headers=headers, max_size=None
            )
        except InvalidStatus as error:
            raise _refused(server, error.response.status_code, error.response.body.decode(errors="replace")) from None
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise _gone(server, error) from None
        form = {"type": "audio/pcm", "rate": RATE}
        audio = {"input": {"format": form, "turn_detection": None}, "output": {"format": form}}
        self._send("session.update", session={"type": "realtime", "output_modalities": ["audio"], "audio": audio})
        while self._next()["type"] != "session.updated":
            pass

    def append_audio(self, samples: Samples, rate: int) -> None:
        """More of a question [N], at the wire's rate."""
        assert rate == RATE
        self._send("input_audio_buffer.append", audio=base64.b64encode(pcm16(samples)).decode())

    def respond(self, *, max_frames: int, **more: Any) -> Iterator[Event]:
        """The answer as it comes; its limit counts as the server counts tokens.

        Raises:
            InputError: what the server answers with instead.
        """
        self._send("input_audio_buffer.commit")
        self._send("response.create", response={"max_output_tokens": max_frames})
        frame = 0
        while (event := self._next())["type"] != "response.done":
            if event["type"] in ("response.output_audio_transcript.delta", "response.output_text.delta"):
                yield TextDelta(event["delta"])
            elif event["type"] == "response.output_audio.delta":
                yield AudioDelta(from_pcm16(base64.b64decode(event["delta"])), frame, RATE)
                frame += 1
        if event["response"]["status"] == "failed":
            raise InputError(f"the server did not answer: {event['response'].get('status_details')}")

    def close(self) -> None:
        """Leave in order."""
        self.socket.close()

    def _send(self, kind: str, **fields: Any) -> None:
        try:
            self.socket.send(json.dumps({"type": kind, **fields}))
        except ConnectionClosed as error:
            raise _gone(self.server, error) from None

    def _next(self) -> dict[str, Any]:
        try:
            event = json.loads(self.socket.recv(PATIENCE))
        except (ConnectionClosed, TimeoutError) as error:
            raise _gone(self.server, error) from None
        if event["type"] == "error":
            raise InputError(f"the server says: {event['error'].get('message')}")
        return event


class Asked:
    """A conversation over streaming chat: a question goes out when all of it has been spoken."""

    def __init__(self, server: Server) -> None:
        self.server, self.client = server, OpenAI(api_key=server.key, base_url=server.base, max_retries=0)
        self.pieces: list[Samples] = []
        self.messages: list[Any] = []

    def append_audio(self, samples: Samples, rate: int) -> None:
        """More of a question [N]."""
        assert rate == RATE
        self.pieces.append(samples)

    def respond(self, *, seed: int, max_frames: int, **more: Any) -> Iterator[Event]:
        """The answer as it comes; its limit counts as the server counts tokens.

        Raises:
            BusyError, InputError: it is refused, or breaks off.
        """
        file = io.BytesIO()
        write_audio(file, np.concatenate(self.pieces), RATE)
        sound = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
        self.messages.append({"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]})
        self.pieces, text, frame = [], "", 0
        try:
            chunks = self.client.chat.completions.create(
                model=self.server.model,
                messages=self.messages,
                modalities=["text", "audio"],
                audio={"voice": VOICE, "format": "pcm16"},
                max_completion_tokens=max_frames,
                seed=seed,
                stream=True,
            )
            for delta in (choice.delta for chunk in chunks for choice in chunk.choices):
                said = delta.content or (delta.audio and delta.audio.transcript) or ""
                if said:
                    text += said
                    yield TextDelta(said)
                if delta.audio and delta.audio.data:
                    yield AudioDelta(from_pcm16(base64.b64decode(delta.audio.data)), frame, RATE)
                    frame += 1
        except APIStatusError as error:
            raise _refused(self.server, error.status_code, error.message) from None
        except APIError as error:
            raise _gone(self.server, error) from None
        self.messages.append({"role": "assistant", "content": text})

    def close(self) -> None:
        """Leave."""
        self.client.close()


def _refused(server: Server, status: int, told: str) -> BusyError | InputError:
    message = f"{server.url} answers {status}: {told[:500]}"
    return BusyError(message, 0.0) if status in FULL else InputError(message)


def _gone(server: Server, error: Exception) -> InputError:
    return InputError(f"{server.url} does not answer ({error or type(error).__name__}); see that it runs")
