"""Several processes behind one port: callers go where there is room, and a session outlives the process it was in."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus

from antiphon.serve.meters import Meters, summed
from antiphon.serve.workers import Doorkeeper, Worker
from tests.realtime_line import Line, line, text_of, types
from tests.serving import Served, tiny, until

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTION = "What is three plus four?"
TEXT = {"output_modalities": ["text"]}


@dataclass
class Group:
    """`antiphon serve --workers 2 --conversations 1`, and what it has written."""

    process: subprocess.Popen[str]
    port: int
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            if text.startswith("{"):
                self.lines.append(json.loads(text))

    @property
    def served(self) -> Served:
        return Served(f"127.0.0.1:{self.port}", None, lambda: None)  # type: ignore[arg-type]

    def process_of(self, session: str) -> int:
        """Of the worker that holds a session: the last that has let its client in."""

        def let_in() -> list[str]:
            lines = [said for said in self.lines if said["event"] == "realtime"]
            return [said["worker"] for said in lines if said["session"] == session]

        until(lambda: bool(let_in()))  # it is said a moment after the client was let in
        name = let_in()[-1]
        return next(said["process"] for said in self.lines if said["event"] == "worker" and said["name"] == name)

    def told(self, event: str) -> int:
        return sum(said["event"] == event for said in self.lines)

    def get(self, path: str) -> httpx2.Response:
        """By a connection of its own."""
        return httpx2.get(f"http://127.0.0.1:{self.port}{path}", timeout=60)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    port = free_port()
    antiphon = [sys.executable, "-c", "from antiphon.cli import main; main()"]
    command = [*antiphon, "serve", "--port", str(port), "--workers", "2", "--conversations", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    group = Group(process, port)
    reading = threading.Thread(target=group.read, daemon=True)
    reading.start()
    until(lambda: group.told("warm") == 2, 120)
    yield group
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    reading.join(10)
    assert not [said for said in group.lines if said["level"] == "error"]


def ask(c: Line) -> str:
    """A turn in writing, answered in writing."""
    c.say(QUESTION)
    c.send("response.create", response=TEXT)
    return text_of(c.until("response.done"))


def back(c: Line) -> dict[str, str]:
    """How to come back to a session."""
    session = c.events[0]["session"]
    return {"session_id": session["id"], "resume_token": session["antiphon"]["resume_token"]}


@pytest.mark.long
def test_callers_go_where_there_is_room_and_what_is_kept_is_everybodys(group):
    with line(group.served) as a, line(group.served) as b:
        ids = [c.events[0]["session"]["id"] for c in (a, b)]
        assert group.process_of(ids[0]) != group.process_of(ids[1])
        with pytest.raises(InvalidStatus, match="503"), line(group.served):
            pass
        sound = (EXAMPLES / "reference.wav").read_bytes()
        with group.served.http() as http:
            made = http.post("/v1/audio/voices", data={"name": "anna"}, files={"audio_sample": ("r", sound)}).json()
        for c in (a, b):  # whichever of them made it
            c.update(audio={"output": {"voice": {"id": made["id"]}}})
            c.say("One.")
            c.send("response.create")
            assert c.last("response.done")["response"]["status"] == "completed"
    until(lambda: "antiphon_realtime_sessions 0.0" in group.get("/metrics").text)
    assert "antiphon_packets_total" in group.get("/metrics").text


@pytest.mark.long
def test_a_session_goes_on_elsewhere_when_its_worker_is_killed_and_the_others_notice_nothing(group):
    with line(group.served) as a, line(group.served) as b:
        first = ask(a)
        os.kill(group.process_of(a.events[0]["session"]["id"]), signal.SIGKILL)
        assert ask(b) == first
        b.socket.close(1000)
        until(lambda: group.told("warm") == 3, 120)
        with line(group.served, None, True, **back(a)) as again:
            assert back(again) == back(a)
            second = ask(again)
            messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first}]
            told = [*messages, {"role": "user", "content": QUESTION}]
            assert second == tiny().generate(told, audio=False).text
        with pytest.raises(InvalidStatus, match="404"), line(group.served, session_id="sess_w1_1", resume_token="x"):
            pass


@pytest.mark.long
def test_a_session_outlives_a_second_killed_worker_and_who_comes_back_gets_to_the_one_that_holds_it(group):
    messages = list[dict[str, str]]()

    def turn(c: Line) -> None:
        messages.append({"role": "user", "content": QUESTION})
        messages.append({"role": "assistant", "content": ask(c)})
        assert messages[-1]["content"] == tiny().generate(messages[:-1], audio=False).text

    with line(group.served) as c:
        turn(c)
        who = back(c)
        c.socket.close(1011)
    session = who["session_id"]
    first = group.process_of(session)
    for _ in range(2):
        known = group.told("warm")
        os.kill(group.process_of(session), signal.SIGKILL)
        until(lambda known=known: group.told("warm") == known + 1, 120)
        with line(group.served, None, True, **who) as c:
            turn(c)
            c.socket.close(1011)
        holder = group.process_of(session)
        assert holder != first
        with line(group.served, None, False, **who) as c:
            turn(c)
            assert "session.created" not in types(c.events), "it was taken up though it was still held"
            c.socket.close(1011)
        assert group.process_of(session) == holder
    with line(group.served, None, False, **who):
        pass  # and leaves


@pytest.mark.long
def test_workers_are_renewed_while_the_conversations_of_the_old_ones_go_on(group):
    known = group.told("warm")
    with line(group.served) as a:
        old = group.process_of(a.events[0]["session"]["id"])
        group.process.send_signal(signal.SIGHUP)
        until(lambda: group.told("warm") == known + 2, 120)
        assert ask(a)
        with line(group.served) as b:
            new = group.process_of(b.events[0]["session"]["id"])
            workers = [said["process"] for said in group.lines if said["event"] == "worker"]
            assert new in workers[-2:]
            assert old not in workers[-2:]
            assert ask(b)
    until(lambda: not Path(f"/proc/{old}").exists(), 60)
    assert group.get("/health").status_code == 200


def test_a_worker_whose_word_is_older_than_who_was_sent_gets_nobody_more():
    keeper: Any = Doorkeeper(None, None, 2, 1, None, None)  # type: ignore[arg-type]
    doors = dict[str, socket.socket]()
    for name in ("a", "b", "not warm"):
        ours, doors[name] = socket.socketpair()
        for end in (ours, doors[name]):
            end.setblocking(False)
        keeper.workers.append(Worker(name, None, ours))  # type: ignore[arg-type]

    def says(name: str, free: int) -> None:
        doors[name].send(json.dumps({"free": free, "most": 1}).encode() + b"\n")
        next(w for w in keeper.workers if w.name == name).read()

    def sent_to() -> str:
        caller, there = socket.socketpair()
        with caller, there:
            keeper._hand_over(there, None)
        for name, door in doors.items():
            with contextlib.suppress(BlockingIOError):
                for handle in socket.recv_fds(door, 1, 1)[1]:
                    os.close(handle)
                return name
        raise AssertionError("nobody got the caller")

    says("a", 1)
    says("b", 1)
    first = sent_to()
    says(first, 1)  # written before the caller came
    assert {first, sent_to()} == {"a", "b"}
    assert "not warm" not in [sent_to() for _ in range(4)]
    says("a", 0)
    assert {sent_to() for _ in range(4)} == {"b"}, "who is full comes after who says that it is not"
    for end in (*doors.values(), *(w.door for w in keeper.workers)):
        end.close()


def test_what_workers_have_counted_is_added_up():
    meters = [Meters(), Meters()]
    for n, one in enumerate(meters, 1):
        one.packets.inc(n)
        one.refusals.labels("429").inc()
        one.phases.labels("total").observe(0.1 * n)
        one.sessions.set(n)
    text = summed([one.text() for one in meters])
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    values = {(s.name, *s.labels.values()): s.value for family in families.values() for s in family.samples}
    assert values["antiphon_packets_total",] == 3
    assert values["antiphon_refusals_total", "429"] == 2
    assert values["antiphon_turn_seconds_count", "total"] == 2
    assert values["antiphon_turn_seconds_bucket", "0.12", "total"] == 1
    assert values["antiphon_realtime_sessions",] == 3
    assert families["antiphon_turn_seconds"].type == "histogram"
    created = [s.value for s in families["antiphon_packets"].samples if s.name.endswith("_created")]
    assert all(value < 2**32 for value in created)
