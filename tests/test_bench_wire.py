"""`antiphon bench --url`: the same load and the same figures over the wire, of our server and of any other."""

import base64
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from antiphon import cli
from antiphon.bench.commands import tone
from antiphon.bench.figures import TITLES, Run, cells
from antiphon.bench.load import Load
from antiphon.bench.wire import Server, run
from antiphon.errors import InputError
from antiphon.serve.settings import Settings
from tests.serving import Served, engine, serving

QUESTION = (tone()[:8000], 16000)
QUESTIONS = Path(__file__).parent.parent / "examples"
SHORT = Load(1, turns=1, max_frames=10)
SILENCE = base64.b64encode(bytes(2 * 2400)).decode()  # a tenth of a second
LOUD = base64.b64encode(np.full(2400, 8000, "<i2").tobytes()).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def measured(url: str, load: Load) -> Run:
    (one,) = run(Server(url, "tiny"), [QUESTION], [load])
    return one


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_our_server_is_measured_from_both_ends(server, scheme):
    one = measured(f"{scheme}://{server.host}", Load(2, turns=2, max_frames=10))
    figures = one.figures
    assert (figures["answers"], figures["held"]) == (4, 2), [a.error for a in one.answers]
    assert figures["errors"] == figures["refused"] == 0
    assert figures["packets"] > 4
    for p in ("p50", "p99"):
        assert 0 < figures["text_ms"][p] <= figures["code_ms"][p] <= figures["sound_ms"][p]
    assert 0 < figures["own_ms"] < figures["wire_ms"]
    assert figures["memory_mb"] > 50
    assert len(cells(figures)) == len(TITLES)


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_who_is_refused_is_counted(scheme):
    with serving(make=lambda: engine(1)) as served:
        figures = measured(
            f"{scheme}://{served.host}", Load(None, rate=60.0, seconds=0.1, turns=1, max_frames=10)
        ).figures
    assert figures["refused"] > 0
    assert figures["errors"] == 0
    assert figures["held"] == figures["answers"] - figures["refused"] >= 1
    assert 0 <= figures["in_time"] <= figures["held"]


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_a_key_is_given(monkeypatch, scheme):
    with serving(Settings(keys=("secret",))) as served:
        assert "401" in measured(f"{scheme}://{served.host}", SHORT).answers[0].error
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert measured(f"{scheme}://{served.host}", SHORT).figures["errors"] == 0


# ------------------------------------------------------------------------------------- somebody else's server


@contextmanager
def other(answer: Callable[[ServerConnection], None]) -> Iterator[str]:
    """The URL of a server that is not ours, and how it answers."""

    def converse(socket: ServerConnection) -> None:
        for text in socket:
            kind = json.loads(text)["type"]
            if kind == "session.update":
                socket.send(json.dumps({"type": "session.updated"}))
            if kind == "response.create":
                answer(socket)

    with serve(converse, "127.0.0.1", 0) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{made.socket.getsockname()[1]}"
        made.shutdown()


def say(socket: ServerConnection, kind: str, **fields: object) -> None:
    socket.send(json.dumps({"type": kind, **fields}))


def test_the_clock_is_the_listeners_and_a_packet_lasts_as_long_as_its_sound():
    def answer(socket: ServerConnection) -> None:
        time.sleep(0.1)
        say(socket, "response.output_audio_transcript.delta", delta="Yes")
        for sound, wait in ((SILENCE, 0.05), (LOUD, 0.3), (LOUD, 0.0)):
            say(socket, "response.output_audio.delta", delta=sound)
            time.sleep(wait)
        say(socket, "response.done", response={"status": "completed"})

    with other(answer) as url:
        one = measured(url, SHORT)
    (found,) = one.answers
    assert found.error == ""
    assert 0.1 <= found.text - found.asked <= found.code - found.asked
    assert found.sound - found.code >= 0.05
    assert [round(packet.seconds, 6) for packet in found.packets] == [0.1] * 3
    assert (found.late(0.0), found.late(0.08)) == (1, 1)  # the third is due after 0.2 s and comes after 0.35
    assert one.figures["own_ms"] is None
    assert cells(one.figures)[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda socket: say(socket, "error", error={"message": "no such thing"}), "no such thing"),
        (lambda socket: say(socket, "response.done", response={"status": "failed", "status_details": "bad"}), "bad"),
        (lambda socket: socket.close(1011), "does not answer"),
    ],
)
def test_what_a_server_answers_instead_is_an_error(answer, words):
    with other(answer) as url:
        one = measured(url, Load(1, turns=3))
    assert one.figures["errors"] == one.figures["answers"] == 1
    assert words in one.answers[0].error


# ------------------------------------------------------------------------------------------- the command line


def run_command(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["antiphon", "bench", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_a_server_from_the_command_line(monkeypatch, capsys, server, tmp_path):
    out, plot = tmp_path / "figures.json", tmp_path / "latency.png"
    limits = ("-c", 1, "--turns", 1, "--max-frames", 10, "--question", QUESTIONS / "question.wav")
    limits += ("--out", out, "--plot", plot)
    assert run_command(monkeypatch, "tiny", "--url", f"ws://{server.host}", *limits) == 0
    printed, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert "| 1 at once |" in printed
    assert "by the server's own clock" in printed
    assert figures["loads"][0]["conversations"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--url", "ftp://host"), "is no server; give ws://host:port"),
        (("--url", "ws://127.0.0.1:1", "--read-back"), "only what clients see"),
    ],
)
def test_what_cannot_be_asked_of_a_server_is_refused(monkeypatch, capsys, words, sentence):
    assert run_command(monkeypatch, *words) == 1
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_where_nobody_listens_is_an_error_and_a_path_is_kept():
    one = measured("ws://127.0.0.1:1", SHORT)
    assert "does not answer" in one.answers[0].error
    assert Server("wss://host/api/v2/realtime", "m").base == "wss://host/api/v2"
    assert Server("http://host:8000", "m").base == "http://host:8000/v1"
    with pytest.raises(InputError):
        Server("localhost:8000", "m")
