"""Replicas on a Ray cluster of this machine: conversations are spread, and one of them may be killed."""

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.realtime_line import Line, line, text_of
from tests.serving import Served, tiny, until
from tests.test_serve_workers import QUESTION, back, free_port

pytestmark = pytest.mark.scale
CONVERSATIONS = 6
FRAME, BUFFER = 0.08, 0.08  # seconds of a packet, and that a player holds back


@contextmanager
def cluster(folder: Path, *options: str) -> Iterator[Served]:
    """`antiphon serve --ray local`, once all of its replicas are ready."""
    port = free_port()
    command = [sys.executable, "-c", "from antiphon.cli import main; main()", "serve", "--port", str(port)]
    log = folder / "log"
    with log.open("w") as told:
        process = subprocess.Popen([*command, "--ray", "local", *options], stdout=told, stderr=told)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        return "is ready at" in log.read_text()

    try:
        until(is_ready, 240)
        yield Served(f"127.0.0.1:{port}", None, lambda: None)  # type: ignore[arg-type]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


def replicas() -> list[int]:
    """Their processes."""
    titles = {path.parent.name: path.read_text() for path in Path("/proc").glob("[0-9]*/comm")}
    return [int(pid) for pid, title in titles.items() if title.startswith("ray::ServeRepl")]


@dataclass
class Heard:
    """What came of one turn."""

    text: str = ""
    came: list[float] = field(default_factory=list)  # when each packet did
    was_cut: bool = False

    @property
    def late(self) -> int:
        """Packets that a player would have missed."""
        return sum(at > self.came[0] + BUFFER + i * FRAME for i, at in enumerate(self.came))


def turn(c: Line, heard: Heard) -> None:
    """A question in writing and its spoken answer."""
    try:
        c.say(QUESTION)
        c.send("response.create", response={"max_output_tokens": 60})
        while (event := c.next())["type"] != "response.done":
            if event["type"] == "response.output_audio.delta":
                heard.came += [time.monotonic()] * round(len(base64.b64decode(event["delta"])) / 3840)
        heard.text = text_of(c.events[-200:])
    except ConnectionClosed:
        heard.was_cut = True


def come_back(server: Served, who: dict[str, str], stack: ExitStack) -> Line:
    """As a client does it: again until it is let in."""
    end = time.monotonic() + 40
    while True:
        try:
            return stack.enter_context(line(server, None, True, **who))
        except (InvalidStatus, ConnectionClosed, OSError):
            assert time.monotonic() < end, "nobody took the session up"
            time.sleep(0.3)


def test_a_killed_replicas_conversations_go_on_and_the_others_notice_nothing(tmp_path):
    with (
        cluster(tmp_path, "--replicas", "2", "--cpus", "1", "--conversations", str(CONVERSATIONS)) as server,
        ExitStack() as stack,
    ):
        lines = [stack.enter_context(line(server)) for _ in range(CONVERSATIONS)]
        holders = [c.events[0]["session"]["id"].split("_")[1] for c in lines]
        assert sorted(holders.count(name) for name in set(holders)) == [CONVERSATIONS // 2] * 2
        first = [Heard() for _ in lines]
        for c, heard in zip(lines, first, strict=True):
            turn(c, heard)
        assert len({heard.text for heard in first}) == 1
        second = [Heard() for _ in lines]
        threads = [threading.Thread(target=turn, args=pair) for pair in zip(lines, second, strict=True)]
        for thread in threads:
            thread.start()
        until(lambda: all(heard.came for heard in second))
        os.kill(replicas()[0], signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        cut = [i for i, heard in enumerate(second) if heard.was_cut]
        assert len(cut) == CONVERSATIONS // 2
        assert len({holders[i] for i in cut}) == 1
        assert [heard.late for heard in second if not heard.was_cut] == [0] * (CONVERSATIONS - len(cut))
        for i in cut:
            c = come_back(server, back(lines[i]), stack)
            again = Heard()
            turn(c, again)
            assert again.text == expected(first[i].text)  # the question that was cut off was kept, its answer was not


@contextmanager
def machines(env: dict[str, str]) -> Iterator[str]:
    """A cluster that outlives who deploys on it: its address."""
    port = free_port()
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=8"]
    more = ["--include-dashboard=false", "--object-store-memory=200000000", "--disable-usage-stats"]
    with subprocess.Popen(
        [*start, *more], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as head:
        assert head.stdout is not None
        try:
            assert any("Ray runtime started" in told for told in head.stdout)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()


def test_an_update_under_load_drops_no_conversation():
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with machines(env) as address, ExitStack() as stack:
        port = free_port()
        server = Served(f"127.0.0.1:{port}", None, lambda: None)  # type: ignore[arg-type]
        command = [sys.executable, "-c", "from antiphon.cli import main; main()", "serve", "--port", str(port)]
        command += ["--ray", address, "--replicas", "2", "--cpus", "1", "--conversations", "4"]
        how: dict[str, Any] = {"check": True, "timeout": 240, "env": env}
        subprocess.run(command, **how)
        lines = [stack.enter_context(line(server)) for _ in range(4)]
        old = {c.events[0]["session"]["id"].split("_")[1] for c in lines}
        assert len(old) == 2
        heard: list[Heard] = []

        def talk(c: Line) -> None:
            while not is_new.is_set() or len(heard) < 2 * len(lines):
                turn(c, one := Heard())
                heard.append(one)

        is_new = threading.Event()
        threads = [threading.Thread(target=talk, args=(c,)) for c in lines]
        for thread in threads:
            thread.start()
        subprocess.run([*command, "--alias", "tiny-2"], **how)
        until(lambda: holder(server) not in old, 60)
        is_new.set()
        for thread in threads:
            thread.join(120)
        assert not [one for one in heard if one.was_cut]
        assert all(one.text for one in heard)


def holder(server: Served) -> str:
    """Who takes a new conversation, which ends at once."""
    with line(server) as c:
        c.socket.close(1000)
        return c.events[0]["session"]["id"].split("_")[1]


def expected(first: str) -> str:
    """The answer to a question that was asked twice, after a turn."""
    question = {"role": "user", "content": QUESTION}
    told: list[dict[str, Any]] = [question, {"role": "assistant", "content": first}, question, question]
    return tiny().generate(told, audio=False, window=2).text


def test_replicas_become_more_where_places_are_few_or_somebody_was_refused():
    from antiphon.scale.serving import wanted_replicas

    def wanted(places: float, taken: float, refused: float, count: int = 2) -> int:
        figures = {
            name: {n: value / count for n in range(count)}
            for name, value in (("places", places), ("taken", taken), ("refused", refused))
        }
        context: Any = SimpleNamespace(
            aggregated_metrics=figures,
            current_num_replicas=count,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=5,
        )
        return wanted_replicas(context)[0]

    assert wanted(16, 0, 0) == 1
    assert wanted(16, 6, 0) == 1
    assert wanted(16, 12, 0) == 2
    assert wanted(16, 14, 0) == 3
    assert wanted(16, 2, 1) == 3
    assert wanted(16, 160, 1) == 5


def test_a_caller_goes_to_who_has_most_room():
    from antiphon.scale.serving import Router

    router: Any = Router.__new__(Router)
    router.initialize_state()
    stats = {"a": {"free": 3}, "b": {"free": 5}}

    def replica(name: str) -> Any:
        return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats[name])

    def next_one() -> str:
        both = sorted((replica("a"), replica("b")), key=router.room)
        router.on_request_routed(None, both[-1].replica_id, None)
        return both[-1].replica_id.unique_id

    assert [next_one() for _ in range(3)].count("b") >= 2
    stats["b"] = {"free": 1}
    assert [next_one(), next_one()] == ["a", "a"]


def test_a_shelf_is_a_dictionary():
    import ray

    from antiphon.scale.serving import Keeper, Shelf

    class Local:
        """A keeper without a cluster."""

        def __init__(self) -> None:
            self.keeper = Keeper()
            self.do = SimpleNamespace(remote=self.keeper.do)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", lambda value: value)
        shelf, other = (Shelf(keeper, name) for keeper in [Local()] for name in ("one", "two"))
        shelf["a"], shelf["b"] = 1, (2, 3)
        assert dict(shelf) == {"a": 1, "b": (2, 3)}
        assert (len(shelf), len(other)) == (2, 0)
        assert (shelf.pop("a"), shelf.pop("a", None), shelf.get("c")) == (1, None, None)
        assert [*shelf.values()] == [(2, 3)]
        del shelf["b"]
        with pytest.raises(KeyError):
            shelf["b"]
        assert json.dumps([*shelf.items()]) == "[]"
