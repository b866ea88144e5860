"""Replicas on a Ray cluster of this machine: conversations are spread, and one of them may be killed."""

import ast
import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor as Threads
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.realtime_line import Line, line, text_of
from tests.serving import Served, tiny, until
from tests.test_scale_kills import below
from tests.test_serve_workers import back, free_port

pytestmark = pytest.mark.scale
CONVERSATIONS = 6
QUESTION = "What is one hundred and twenty three plus four hundred and fifty six?"  # its answer takes seconds
FRAME, BUFFER = 0.08, 0.08  # seconds of a packet, and that a player holds back
PAUSE = 2.0  # seconds between two turns
GRACE = 20.0  # seconds that Ray Serve would let an old replica go on if it were told nothing
PATIENCE = 300.0  # seconds for what takes one or two when the machine is idle


@contextmanager
def cluster(folder: Path, *options: str) -> Iterator[tuple[int, Served]]:
    """`antiphon serve --ray local`, once all of its replicas are ready, and its process."""
    port = free_port()
    command = [sys.executable, "-c", "from antiphon.cli import main; main()", "serve", "--port", str(port)]
    log = folder / "log"
    with log.open("w") as told:
        process = subprocess.Popen([*command, "--ray", "local", *options], stdout=told, stderr=told)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        return "is ready at" in log.read_text()

    try:
        until(is_ready, 2 * PATIENCE)
        yield process.pid, Served(f"127.0.0.1:{port}", None, lambda: None)  # type: ignore[arg-type]
    finally:
        end(process, signal.SIGINT)


def end(process: subprocess.Popen[Any], how: signal.Signals) -> None:
    """End a process, and whatever it leaves behind."""
    family = [pid for pid, _ in below(process.pid)]
    process.send_signal(how)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    process.kill()
    process.wait()
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def replicas(of: int) -> set[int]:
    """The replicas' processes of a cluster that a process began."""
    return {pid for pid, title in below(of) if title.startswith("ray::ServeReplica")}


@dataclass
class Heard:
    """What came of one turn."""

    text: str = ""
    came: list[float] = field(default_factory=list)  # when each packet did
    was_cut: bool = False

    @property
    def rtf(self) -> float:
        """Seconds that a second of the answer took."""
        return (self.came[-1] - self.came[0]) / (len(self.came) - 1) / FRAME

    def late(self, since: float) -> int:
        """Packets after that moment that a player had to wait for; it begins a buffer after the first."""
        due, late = self.came[0] + BUFFER, 0
        for at in self.came[1:]:
            due += FRAME
            late += at > max(due, since)
            due = max(due, at)
        return late


def turn(c: Line, heard: Heard) -> None:
    """A question in writing and its spoken answer."""
    try:
        c.say(QUESTION)
        c.send("response.create", response={"max_output_tokens": 60})
        told = [c.next(PATIENCE)]
        while told[-1]["type"] != "response.done":
            told.append(event := c.next(PATIENCE))
            if event["type"] == "response.output_audio.delta":
                heard.came += [time.monotonic()] * round(len(base64.b64decode(event["delta"])) / 3840)
        heard.text = text_of(told)
    except ConnectionClosed:
        heard.was_cut = True


def come_back(server: Served, who: dict[str, str], stack: ExitStack) -> Line:
    """As a client does it: again until it is let in."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return stack.enter_context(line(server, None, True, **who))
        except (InvalidStatus, ConnectionClosed, OSError):
            assert time.monotonic() < end, "nobody took the session up"
            time.sleep(0.3)


def test_a_killed_replicas_conversations_go_on_and_the_others_notice_nothing(tmp_path):
    options = ("--replicas", "2", "--cpus", "1", "--conversations", str(CONVERSATIONS))
    with cluster(tmp_path, *options) as (process, server), Threads(CONVERSATIONS) as threads, ExitStack() as stack:
        lines = [stack.enter_context(line(server)) for _ in range(CONVERSATIONS)]
        holders = [c.events[0]["session"]["id"].split("_")[1] for c in lines]
        assert sorted(holders.count(name) for name in set(holders)) == [CONVERSATIONS // 2] * 2
        first, second = [Heard() for _ in lines], [Heard() for _ in lines]
        for one in [threads.submit(turn, *pair) for pair in zip(lines, first, strict=True)]:
            one.result()
        assert len({heard.text for heard in first}) == 1
        victim = min(replicas(process))
        turns = [threads.submit(turn, *pair) for pair in zip(lines, second, strict=True)]
        until(lambda: all(len(heard.came) > 2 for heard in second), PATIENCE)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        for one in turns:
            one.result()
        cut = [i for i, heard in enumerate(second) if heard.was_cut]
        assert len(cut) == CONVERSATIONS // 2
        assert len({holders[i] for i in cut}) == 1
        others = [heard for heard in second if not heard.was_cut]
        assert len({heard.text for heard in others}) == 1
        late = sum(heard.late(killed) for heard in others)
        slowest = max(heard.rtf for heard in first)  # before anything was killed
        print(f"{late} of {sum(len(h.came) for h in others)} packets late after the kill, RTF {slowest:.2f} before")
        assert not late or slowest > 0.5, "late, on a machine that has room"
        for i in cut:
            c = come_back(server, back(lines[i]), stack)
            turn(c, again := Heard())
            assert again.text == expected(first[i].text)  # the question that was cut off was kept, its answer was not


@contextmanager
def machines(env: dict[str, str]) -> Iterator[tuple[int, str]]:
    """A cluster that outlives who deploys on it: its process, and its address."""
    port = free_port()
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=8"]
    more = ["--include-dashboard=false", "--object-store-memory=200000000", "--disable-usage-stats"]
    how: dict[str, Any] = {"stderr": subprocess.DEVNULL, "text": True, "env": env}
    with subprocess.Popen([*start, *more], stdout=subprocess.PIPE, **how) as head:
        assert head.stdout is not None
        try:
            assert any("Ray runtime started" in told for told in head.stdout)
            yield head.pid, f"127.0.0.1:{port}"
        finally:
            end(head, signal.SIGKILL)  # it keeps nothing


@contextmanager
def watched(address: str, env: dict[str, str]) -> Iterator[Callable[[], dict[str, int]]]:
    """How many replicas are in which state, by Ray Serve's word of a moment ago."""
    code = (
        "import sys, time, ray; from ray import serve; ray.init(sys.argv[1], log_to_driver=False)\n"
        "while True:\n"
        "    states = serve.status().applications['antiphon'].deployments['antiphon'].replica_states\n"
        "    print('states', dict(states), flush=True); time.sleep(0.5)"
    )
    how: dict[str, Any] = {"stderr": subprocess.DEVNULL, "text": True, "env": env}
    with subprocess.Popen([sys.executable, "-c", code, address], stdout=subprocess.PIPE, **how) as process:
        assert process.stdout is not None
        told, last = process.stdout, [dict[str, int]()]

        def read() -> None:
            for line in told:
                if line.startswith("states"):
                    last[0] = ast.literal_eval(line.partition(" ")[2])

        threading.Thread(target=read, daemon=True).start()
        try:
            yield lambda: last[0]
        finally:
            process.kill()


def test_an_update_under_load_drops_no_conversation():
    """New callers come to new replicas; whoever was there goes on talking to the old ones, which end after that."""
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_worker_niceness": "0"}
    with machines(env) as (head, address), Threads(4) as threads, ExitStack() as stack:
        port = free_port()
        server = Served(f"127.0.0.1:{port}", None, lambda: None)  # type: ignore[arg-type]
        command = [sys.executable, "-c", "from antiphon.cli import main; main()", "serve", "--port", str(port)]
        command += ["--ray", address, "--replicas", "2", "--cpus", "1", "--conversations", "4"]
        subprocess.run(command, check=True, timeout=2 * PATIENCE, env=env)
        states = stack.enter_context(watched(address, env))
        lines = [stack.enter_context(line(server)) for _ in range(4)]
        old = {c.events[0]["session"]["id"].split("_")[1] for c in lines}
        before = replicas(head)
        assert len(old) == len(before) == 2
        heard: list[list[Heard]] = [[] for _ in lines]
        is_over = threading.Event()

        def talk(c: Line, own: list[Heard]) -> None:
            while not is_over.is_set():
                own.append(one := Heard())
                turn(c, one)
                time.sleep(PAUSE)

        talks = [threads.submit(talk, *pair) for pair in zip(lines, heard, strict=True)]
        stack.callback(is_over.set)  # before the threads are waited for, whatever fails
        update = subprocess.Popen([*command, "--alias", "tiny-2"], env=env)
        stack.callback(update.kill)
        until(lambda: len(replicas(head)) == 4, 2 * PATIENCE, every=0.5)
        until(lambda: states() == {"RUNNING": 2, "STOPPING": 2}, 2 * PATIENCE, every=0.1)
        assert not {holder(server) for _ in range(4)} & old
        time.sleep(1.5 * GRACE)
        told = [len(own) for own in heard]
        until(lambda: all(len(own) > n + 1 for own, n in zip(heard, told, strict=True)), PATIENCE)
        assert before <= replicas(head)
        assert update.poll() is None  # it ends with the old replicas
        is_over.set()
        for one in talks:
            one.result()
        for c in lines:
            c.socket.close(1000)
        assert update.wait(PATIENCE) == 0
        assert not before & replicas(head)
        until(lambda: states() == {"RUNNING": 2}, PATIENCE)
        assert not any(one.was_cut for own in heard for one in own)
        assert len({one.text for own in heard for one in own[:1]}) == 1
        assert all(one.text and one.came for own in heard for one in own)


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
        both = sorted((replica("a"), replica("b")), key=router.rank)
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
