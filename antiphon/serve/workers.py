"""Several processes behind one port: each has an engine of its own, and a doorkeeper sends callers to who has room.

    client ──connects──> Doorkeeper, the parent ──the socket itself──> Worker: uvicorn, Gate, House, Engine
                                   <── places that are free ──

The doorkeeper passes no data on: it looks at the first line of what a client sends, without taking it, and hands the
connection over. Who comes back to a Realtime session gets to the worker that holds it; everybody else to the one with
most room. What workers share lies on shelves in the memory of a process of its own, so a session whose worker died is
taken up by another. A worker that dies is replaced; SIGHUP replaces all of them, one after another, while the
conversations of the old ones go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import re
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.context import SpawnProcess
from multiprocessing.managers import SyncManager
from typing import Any

from antiphon.errors import AntiphonError, InputError
from antiphon.serve.app import create_app
from antiphon.serve.engines import Load, Prepare
from antiphon.serve.kept import Shelves
from antiphon.serve.logs import note, to_standard_error
from antiphon.serve.room import Room
from antiphon.serve.run import Server, config_of
from antiphon.serve.settings import Settings

SPAWN = multiprocessing.get_context("spawn")  # a fork would copy threads in the middle of what they do
WAITING = 2048  # callers who have not been looked at
LINE = 2048  # bytes of a request's first line that are looked at
REPORTS = 0.1  # seconds between two of a worker's words about its room
LAG = 1.0  # after which whoever was sent to a worker is in its word
COUNTS = 1.0  # and between what it has counted
RETURNS = re.compile(rb"^GET /v1/realtime\?(?:[^ ]*&)?session_id=(\w{1,100})[& ]")


@contextlib.contextmanager
def shared_shelves() -> Iterator[Shelves]:
    """Shelves that every process with a copy reaches."""
    manager = SyncManager(ctx=SPAWN)
    manager.start(signal.signal, (signal.SIGINT, signal.SIG_IGN))  # a Ctrl-C is for the workers, which need it longer
    with manager:
        yield Shelves(*(manager.dict() for _ in range(5)))


# ------------------------------------------------------------------------------------------------ a worker


class Fed(Server):
    """A server that listens nowhere: connections come through a socket, which the doorkeeper holds the other end of."""

    def __init__(self, settings: Settings, prepare: Prepare, most: int, shelves: Shelves, door: socket.socket) -> None:
        app = create_app(settings, lambda: prepare(settings, most), shelves)
        super().__init__(config_of(app, 0), app.state.house)
        self.door = door
        self._taking = set[asyncio.Task[None]]()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take what comes."""
        await super().startup([])
        loop = asyncio.get_running_loop()
        self.door.setblocking(False)
        loop.add_reader(self.door, self._take)
        self._taking.add(asyncio.create_task(self._report()))

    def _take(self) -> None:
        try:
            data, handles, _, _ = socket.recv_fds(self.door, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            data, handles = b"", []
        if not data:  # there is no doorkeeper any more
            asyncio.get_running_loop().remove_reader(self.door)
            self.should_exit = True
        for handle in handles:
            task = asyncio.ensure_future(self._serve_one(socket.socket(fileno=handle)))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)

    async def _serve_one(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        config, loop = self.config, asyncio.get_running_loop()
        make = config.http_protocol_class  # as uvicorn's own listeners call it
        state = self.lifespan.state
        with contextlib.suppress(OSError):  # it is gone already
            await loop.connect_accepted_socket(
                lambda: make(config=config, server_state=self.server_state, app_state=state, _loop=loop),  # pyright: ignore
                connection,
            )

    async def _report(self) -> None:
        """Tell the doorkeeper how much room there is, and the others what was counted."""
        house, told = self.house, 0.0
        while True:
            with contextlib.suppress(OSError):  # a doorkeeper that does not read has enough to read
                about = {"free": house.free, "most": house.engine.capacity if house.is_warm else 0}
                self.door.send(json.dumps(about).encode() + b"\n")
            told += REPORTS
            if told >= COUNTS:
                told = 0.0
                await asyncio.to_thread(house.shelves.metrics.__setitem__, house.settings.worker, house.meters.text())
            await asyncio.sleep(REPORTS)


def work(settings: Settings, load: Load, most: int, shelves: Shelves, door: socket.socket) -> None:
    """A worker's process."""
    to_standard_error()
    try:
        server = Fed(settings, load(), most, shelves, door)
        server.run()
        server.house.check_warmed()
    except AntiphonError as error:
        note("failed", error=error)
        sys.exit(1)
    except KeyboardInterrupt:  # it has ended in order before uvicorn raises it again
        pass


# -------------------------------------------------------------------------------------------- the doorkeeper


@dataclass(eq=False)
class Worker:
    """A worker, as the doorkeeper sees it."""

    name: str
    process: SpawnProcess
    door: socket.socket
    free: int = -1  # conversations that it says it has room for; -1 until it is warm
    most: int = 0  # that it holds at once
    is_leaving: bool = False  # nobody new is sent to it
    heard: bytes = b""
    room: Room = field(default_factory=lambda: Room(LAG))
    warm: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def read(self) -> None:
        """What it says about its room."""
        try:
            data = self.door.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self.door)
            self.free = -1
            self.gone.set()
            return
        *lines, self.heard = (self.heard + data).split(b"\n")
        if lines:
            about = json.loads(lines[-1])
            self.free, self.most = about["free"], about["most"] or self.most
            if self.free >= 0 and not self.warm.is_set():
                note("warm", name=self.name, conversations=self.most)
                self.warm.set()

    def give(self, connection: socket.socket) -> bool:
        """Hand a connection over; whether it was taken."""
        try:
            socket.send_fds(self.door, [b"c"], [connection.fileno()])
        except OSError:
            return False
        self.room.take()
        return True


class Doorkeeper:
    """Starts workers, sends callers to them, and replaces those that end.

    Args:
        settings: of every worker.
        load: reads the weights, and gives what makes an engine of them; it is called in each worker.
        count: workers.
        most: conversations of each at once; 0 lets each measure it.
        listener: where callers come.
    """

    def __init__(
        self,
        settings: Settings,
        load: Load,
        count: int,
        most: int,
        listener: socket.socket,
        shelves: Shelves,
    ) -> None:
        self.settings, self.load, self.count, self.most = settings, load, count, most
        self.listener, self.shelves = listener, shelves
        self.workers: list[Worker] = []
        self.stopping = asyncio.Event()
        self._made, self._failed = 0, 0  # workers, and those in a row that ended before they could answer
        self._tasks = set[asyncio.Task[None]]()

    async def run(self) -> None:
        """Until told to stop, by SIGTERM, Ctrl-C or `stopping`.

        Raises:
            InputError: a worker ended before it could answer.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: a test
                loop.add_signal_handler(number, self.stopping.set)
        with contextlib.suppress(RuntimeError, ValueError):
            loop.add_signal_handler(signal.SIGHUP, lambda: self._do(self.renew()))
        self.listener.setblocking(False)
        for _ in range(self.count):
            self._begin(self.most)
        accepting = asyncio.create_task(self._accept())
        host, port, *_ = self.listener.getsockname()
        note("listening", places=[f"{host}:{port}"], workers=self.count)
        stop = asyncio.create_task(self.stopping.wait())
        await asyncio.wait((accepting, stop), return_when=asyncio.FIRST_COMPLETED)
        for task in (accepting, stop, *self._tasks):
            task.cancel()
        self.listener.close()
        for worker in self.workers:
            worker.process.terminate()
        patience = 2 * self.settings.stop_seconds
        await asyncio.gather(*(asyncio.to_thread(_end, worker.process, patience) for worker in self.workers))
        if self._failed:
            raise InputError("a worker ended before it could answer; what it wrote above says why")

    def _begin(self, most: int) -> Worker:
        self._made += 1
        ours, theirs = socket.socketpair()
        settings = replace(self.settings, worker=f"w{self._made}")
        arguments = (settings, self.load, most, self.shelves, theirs)
        process = SPAWN.Process(target=work, args=arguments, name=settings.worker)
        process.start()
        theirs.close()
        ours.setblocking(False)
        worker = Worker(settings.worker, process, ours)
        asyncio.get_running_loop().add_reader(ours, worker.read)
        self.workers.append(worker)
        self._do(self._watch(worker))
        note("worker", name=worker.name, process=process.pid)
        return worker

    async def _watch(self, worker: Worker) -> None:
        """When a worker ends that should not: another one, and its sessions wait for their clients for a while."""
        await worker.gone.wait()
        worker.door.close()
        await asyncio.to_thread(worker.process.join)
        self.workers.remove(worker)
        if not worker.is_leaving:
            note("worker lost", name=worker.name, status=worker.process.exitcode)
            self._failed = 0 if worker.warm.is_set() else self._failed + 1
            if self._failed and not any(w.warm.is_set() for w in self.workers):
                self.stopping.set()  # none ever could
                return
            await asyncio.sleep(min(30.0, self._failed))
            self._begin(worker.most or self.most)
        self.shelves.metrics.pop(worker.name, None)
        await asyncio.sleep(self.settings.resume_seconds)
        await asyncio.to_thread(self._forget_sessions, worker.name)

    def _forget_sessions(self, name: str) -> None:
        for id, saved in [*(self.shelves.sessions or {}).items()]:
            if saved.worker == name:
                self.shelves.forget(id, name)

    async def renew(self) -> None:
        """A new worker in the place of each, one after another; conversations of the old ones go on where they are."""
        for old in [*self.workers]:
            if old.is_leaving:
                continue
            await self._begin(old.most).warm.wait()
            old.is_leaving = True
            self._do(self._let_go(old))

    async def _let_go(self, worker: Worker) -> None:
        """End a worker when nobody speaks with it any more, or after a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.renew_seconds):
                while worker.room.left(worker.free) < worker.most and not worker.gone.is_set():
                    await asyncio.sleep(REPORTS)
        worker.process.terminate()

    # --------------------------------------------------------------------------------------------- callers

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self.listener)
            self._do(self._show_in(connection))

    async def _show_in(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError, TimeoutError):  # nobody is there any more, or says what is wanted
                async with asyncio.timeout(self.settings.head_seconds):
                    line = await first_line(connection)
                if line:
                    self._hand_over(connection, await asyncio.to_thread(self._holder, line))

    def _holder(self, line: bytes) -> str | None:
        """Who holds the session that a client comes back to, if that is what it does."""
        returns = RETURNS.match(line)
        saved = (self.shelves.sessions or {}).get(returns[1].decode()) if returns else None
        return saved.worker if saved is not None else None

    def _hand_over(self, connection: socket.socket, holder: str | None) -> None:
        held = [worker for worker in self.workers if worker.name == holder]
        staying = [worker for worker in self.workers if not worker.is_leaving]
        others = sorted(staying, key=lambda worker: worker.room.rank(worker.free), reverse=True)
        for worker in (*held, *others):
            if worker.give(connection):
                return

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def first_line(connection: socket.socket) -> bytes:
    """What a client says first, left where it is; empty where it has gone."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
    while True:  # it stays readable from now on
        seen = connection.recv(LINE, socket.MSG_PEEK)
        if not seen or b"\n" in seen or len(seen) == LINE:
            return seen
        await asyncio.sleep(0.01)


def _end(process: SpawnProcess, seconds: float) -> None:
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()


def run_workers(settings: Settings, listener: socket.socket, load: Load, count: int, most: int) -> None:
    """Serve by several processes until told to stop.

    Raises:
        InputError: a worker could not be made ready.
    """
    to_standard_error()
    listener.listen(WAITING)
    with shared_shelves() as shelves:
        asyncio.run(Doorkeeper(settings, load, count, most, listener, shelves).run())
