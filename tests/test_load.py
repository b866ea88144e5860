"""A server in a process of its own under load, in real time, for minutes: `make load`, alone on the machine.

That packets are in time is what is promised here, so it is asserted: for as many as are asked for, or half of what the
engine finds that this machine keeps, eight at most. Those who ask are on the same machine, and its pace varies.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from antiphon.audio import read_audio
from antiphon.bench.figures import IN_TIME, TITLES, Run, cells, heading, line
from antiphon.bench.load import Load
from antiphon.bench.wire import Server, run
from tests.serving import until

pytestmark = pytest.mark.load

SECONDS = float(os.environ.get("ANTIPHON_LOAD_SECONDS", "300"))
ASKED, MOST, CROWD = os.environ.get("ANTIPHON_LOAD_CONVERSATIONS", ""), 8, 50
TURNS = 10  # of a conversation: most of a minute
GROWTH = 32  # MB by which the process may grow in the second half of the time
WIRE = 40  # ms by which the first packet may come later over the wire than from the engine
MAIN = "from antiphon.cli import main; main()"
QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
QUESTIONS = [read_audio(QUESTION)]


@pytest.fixture(scope="module")
def capacity(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Conversations at once."""
    if ASKED:
        return int(ASKED)
    found = tmp_path_factory.mktemp("measured") / "bench.json"
    words = ("bench", "tiny", "--question", QUESTION, "-c", 1, "--turns", 1, "--out", found)
    subprocess.run([sys.executable, "-c", MAIN, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    measured = json.loads(found.read_text())["capacity"]
    print(f"\nkept in time here, as measured: {measured} conversations")
    return max(1, min(MOST, measured // 2))


@pytest.fixture(scope="module")
def server(capacity: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`antiphon serve tiny`, whose log has no error at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("load") / "serve.log"
    words = ("serve", "tiny", "--port", port, "--conversations", capacity, "--sessions", CROWD)
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", MAIN, *map(str, words)], stderr=file)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as http:
            until(lambda: process.poll() is not None or answers(http), 120)
        yield Server(f"ws://127.0.0.1:{port}", "tiny")
    finally:
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM), log.read_text()[-2000:]
    lines = [json.loads(text) for text in log.read_text().splitlines() if text.startswith("{")]
    assert [one for one in lines if one["level"] == "error"] == []


def answers(http: httpx2.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx2.TransportError:
        return False


def held(server: Server, load: Load) -> Run:
    (one,) = run(server, QUESTIONS, [load])
    print("\n" + line(cells(one.figures)), end="", flush=True)
    return one


def in_time(one: Run) -> None:
    """Nobody met an error, and no packet came when a player that holds back 80 ms had nothing left."""
    late = [answer.late(IN_TIME) for answer in one.answers]
    assert [answer.error for answer in one.answers if answer.error and not answer.refused] == []
    assert sum(late) == 0, f"{sum(late)} of {one.figures['packets']} packets were late"
    assert all(answer.packets for answer in one.answers if not answer.refused)


def test_the_wire_takes_little_time(server, tmp_path):
    """The same questions with the same clocks, asked of the engine and then, by one client, of the server."""
    words = (
        "bench",
        "tiny",
        "--question",
        QUESTION,
        "-c",
        1,
        "--turns",
        TURNS,
        "--capacity",
        1,
        "--out",
        tmp_path / "x",
    )
    subprocess.run([sys.executable, "-c", MAIN, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    alone = json.loads((tmp_path / "x").read_text())["loads"][0]["code_ms"]["p50"]
    print("\n" + heading(TITLES), end="")
    wire = held(server, Load(1, turns=TURNS)).figures["code_ms"]["p50"]
    print(f"\nfirst packet, p50: {alone:.0f} ms from the engine, {wire:.0f} ms over the wire")
    assert wire - alone < WIRE


def test_as_many_as_fit_are_kept_in_time_for_minutes_and_memory_stays_as_it_is(server, capacity):
    print("\n" + heading(TITLES), end="")
    begun, memory = time.monotonic(), list[float]()
    while time.monotonic() - begun < SECONDS:
        one = held(server, Load(capacity, turns=TURNS))
        in_time(one)
        assert one.figures["answers"] == capacity * TURNS
        memory.append(one.figures["memory_mb"])
    print(f"\nmemory after each round: {', '.join(f'{mb:.0f}' for mb in memory)} MB")
    assert memory[-1] - memory[len(memory) // 2] < GROWTH


def test_who_comes_while_it_is_full_is_refused_and_the_others_stay_in_time(server, capacity):
    one = held(server, Load(CROWD, turns=2))
    in_time(one)
    assert one.figures["held"] == capacity
    assert one.figures["refused"] == CROWD - capacity
    assert held(server, Load(capacity, turns=1)).figures["refused"] == 0, "a place was not given back"
