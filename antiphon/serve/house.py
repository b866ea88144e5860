"""What all endpoints share: the engine, once it is warm, and the way from its threads to the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import HTTPConnection, Request

from antiphon.engine import Answering, Call, Engine, Failed
from antiphon.errors import BusyError, InputError
from antiphon.generate import Done, Event, Omni, Reply
from antiphon.serve.kept import Remembered, Shelves, Voices
from antiphon.serve.logs import note
from antiphon.serve.meters import Listening, Meters
from antiphon.serve.refusals import Refused
from antiphon.serve.settings import Settings

Made = TypeVar("Made")
DECODERS = 2  # uploads that are decoded at once
CLOSING = 1.0  # seconds that sessions may take to close when their answers have come to an end


class House:
    """The engine and what is kept beside it."""

    def __init__(self, settings: Settings, prepare: Callable[[], Engine], shelves: Shelves) -> None:
        self.settings, self._prepare, self.shelves = settings, prepare, shelves
        self.meters, self.began = Meters(), int(time.time())
        self.voices = Voices(settings.voices, shelves.voices)
        self.replies = Remembered(settings.replies, settings.replies_seconds, shelves.replies)
        self.decoders = asyncio.Semaphore(DECODERS)
        self.stopping = False
        self.endings = set[Callable[[], None]]()  # of Realtime sessions: asks one to come to an end
        self.give_up: Callable[[], None] = lambda: None  # ends the process that holds it
        self.make_room: Callable[[], bool] = lambda: False  # ends what nobody waits for; whether there was something
        self._engine: Engine | None = None
        self._failed = False

    @property
    def is_warm(self) -> bool:
        """Whether it can answer."""
        return self._engine is not None and not self.stopping

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            Refused: it is not warm yet.
        """
        if self._engine is None:
            raise Refused("the model is being loaded; ask /health when it is ready", 503, "warming", retry_after=2)
        return self._engine

    @property
    def model(self) -> Omni:
        """The boxes."""
        return self.engine.model

    @property
    def sample_rate(self) -> int:
        """Of what it says, in Hz."""
        code2wav = self.model.config.code2wav
        return code2wav.sample_rate if code2wav else 0

    async def warm(self) -> None:
        """Warm the engine, in a thread of its own; where that fails there is nothing to serve."""
        try:
            self._engine = await asyncio.to_thread(self._prepare)
        except Exception as error:
            note("warming failed", level=logging.ERROR, error=error)
            self._failed = True
            self.give_up()
            return
        self.meters.conversations.set_function(self._held)

    def check_warmed(self) -> None:
        """Raise InputError if the engine could not be made ready."""
        if self._failed:
            raise InputError("the model could not be made ready; the log above says why")

    def _held(self) -> int:
        return sum(not call.is_aside for call in self.engine.calls)

    @property
    def free(self) -> int:
        """Conversations that there is room for; -1 while it cannot answer at all."""
        return (self.engine.capacity or 0) - self._held() if self.is_warm else -1

    async def drain(self) -> None:
        """Take nobody in any more, and let Realtime sessions finish what they say."""
        self.stopping = True
        for end in [*self.endings]:
            end()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.stop_seconds + CLOSING):
                while self.endings:
                    await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End the engine."""
        self.stopping = True
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)

    async def open(self, **how: Any) -> Call:
        """A place in the engine; `how` is what `Engine.open` takes.

        Raises:
            BusyError: there is none.
        """
        how = {"window": self.settings.window} | how
        try:
            return await asyncio.to_thread(lambda: self.engine.open(**how))
        except BusyError:
            if not self.make_room():
                raise
            return await asyncio.to_thread(lambda: self.engine.open(**how))  # which waits until that has left

    @asynccontextmanager
    async def call(self, **how: Any) -> AsyncIterator[Call]:
        """A conversation for one request, as `open` gives it."""
        call = await self.open(**how)
        try:
            yield call
        finally:
            call.close()

    def check_model(self, name: str | None) -> str:
        """The name that a client calls the model by; the first if it gives none.

        Raises:
            Refused: it is called otherwise.
        """
        names = self.settings.names
        if name is not None and name not in names:
            known = ", ".join(names)
            raise Refused(f"there is no model {name!r} here; there is {known}", 404, "model_not_found", "model")
        return name or names[0]

    def check_speech(self, param: str) -> None:
        """Raise Refused if this checkpoint cannot speak."""
        if self.model.speech is None:
            raise Refused(f"{self.settings.name} answers in text only", param=param, code="unsupported_value")

    async def events(self, answer: Answering) -> AsyncGenerator[Event]:
        """The events of an answer, on the event loop.

        Raises:
            Exception: what the conversation failed by.
        """
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ready.set)

        answer.notify = notify
        listening = Listening(self.meters, self.engine.seconds)
        while True:
            ready.clear()
            try:
                event = answer.take(timeout=0)
            except queue.Empty:
                await ready.wait()
                continue
            if isinstance(event, Failed):
                raise event.error
            listening.note(event)
            yield event
            if isinstance(event, Done):
                return

    async def reply(self, answer: Answering) -> Reply:
        """A whole answer."""
        async for event in self.events(answer):
            if isinstance(event, Done):
                return event.reply
        raise AssertionError("an answer ends with Done or an error")


def house_of(request: HTTPConnection) -> House:
    """What all endpoints share."""
    return request.app.state.house


async def settled(future: Future[Made]) -> Made:
    """What came of a wish."""
    return await asyncio.wrap_future(future)


async def while_connected(request: Request, work: Coroutine[Any, Any, Made]) -> Made:
    """What `work` makes; it is given up when its client goes away.

    Raises:
        Refused: the client went.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused("the client went away", 499, "client_disconnected")
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
