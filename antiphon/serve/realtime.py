"""WS /v1/realtime: OpenAI's Realtime protocol over a Talk.

    client ──event──> Session.read ──> Talk ──Happening──> Scribe ──event──> outbox ──> client

A session outlives its connection for a minute: `session.id` and the token in `session.antiphon` let a client come back
to it (?session_id=…&resume_token=…), and what was not sent until then is sent. Where several processes serve, it
outlives the one that held it too: another takes it up as it was after its last turn, and begins with session.created
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
import typing
from collections.abc import Mapping
from typing import Any

from openai.types import realtime as wire
from openai.types.realtime import realtime_client_event
from openai.types.realtime.conversation_created_event import Conversation
from pydantic import BaseModel, ValidationError
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from antiphon.serve.background import Background
from antiphon.serve.happenings import (
    Added,
    Answer,
    AnswerEnded,
    Deleted,
    Faded,
    Finished,
    Happening,
    Heard,
    Manner,
    NotHeard,
    Problem,
    Truncated,
)
from antiphon.serve.house import House, house_of
from antiphon.serve.kept import Saved
from antiphon.serve.logs import note
from antiphon.serve.manners import Config, first_config, for_answer, manner_of, merged
from antiphon.serve.refusals import Refused, refusal
from antiphon.serve.scribe import Scribe, problem, read_item, read_items, read_sound
from antiphon.serve.settings import Settings
from antiphon.serve.sounds import from_wire
from antiphon.serve.talk import Talk
from antiphon.serve.wire import as_json, new_id, parsed, shortly, wrong_field

SLICE = 12000  # samples that are judged at once
OUTBOX = 256  # events that wait for a client; then the conversation waits
GOING_AWAY, NORMAL = 1001, 1000  # why a WebSocket is closed
IDLE = "idle"  # stands where a message would, after so long without one
LEAVING = 1.0  # seconds in which it becomes known why a client is gone
KINDS: Mapping[str, type[BaseModel]] = {
    typing.get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in typing.get_args(typing.get_args(realtime_client_event.RealtimeClientEvent)[0])
}


class Session:
    """One client's session, whichever connection it comes by."""

    def __init__(self, house: House, id: str, saved: Saved) -> None:
        self.house, self.id = house, id
        self.who, self.token = saved.who, saved.token
        self.config: Config = {**saved.config}
        self.scribe = Scribe(saved.conversation)
        self.outbox = asyncio.Queue[str](OUTBOX)
        self.ending = asyncio.Event()  # the server is being stopped
        self.lost_at: float | None = None  # when its connection went
        self.taken, self.free = asyncio.Event(), asyncio.Event()  # by another connection; of the one before
        self._talk: Talk | None = None

    @classmethod
    def new(cls, house: House, who: str, model: str, kind: str) -> Session:
        """A session in which nothing was said."""
        worker = house.settings.worker
        id = new_id(f"sess_{worker}" if worker else "sess")
        config = first_config(house, id, model, kind)
        return cls(house, id, Saved(who, secrets.token_urlsafe(24), config, new_id("conv"), worker))

    @property
    def talk(self) -> Talk:
        """The conversation, once it is open."""
        assert self._talk is not None
        return self._talk

    async def open(self) -> None:
        """Take a place in the engine.

        Raises:
            BusyError: there is none.
        """
        manner = manner_of(self.house, self.who, self.config)
        call = await self.house.open(window=self.house.settings.live_window)
        self._talk = Talk(self.house, call, manner, self._happened)
        self.house.endings.add(self.ending.set)

    async def keep(self, changed: str | None = None) -> None:
        """Let others know how it stands, an item that is new or has changed included."""
        if self.house.shelves.sessions is not None and self._talk is not None:
            items, worker = self._talk.history.items, self.house.settings.worker
            said = tuple(item.id for item in items)
            saved = Saved(self.who, self.token, self.config, self.scribe.conversation, worker, said)
            news = [item for item in items if item.id == changed]
            await asyncio.to_thread(self.house.shelves.keep, self.id, saved, *news)

    async def begin(self) -> None:
        """Tell the client where it is."""
        await self.send(self._about(wire.SessionCreatedEvent, "session.created"))
        conversation = Conversation(id=self.scribe.conversation, object="realtime.conversation")
        kind = "conversation.created"
        await self.send(wire.ConversationCreatedEvent(type=kind, event_id=new_id("event"), conversation=conversation))

    def close(self) -> None:
        """Leave."""
        if self._talk is not None:
            self._talk.close()
            self._talk = None  # each knows the other: the caches would stay until the collector comes by
        self.house.endings.discard(self.ending.set)

    async def send(self, event: BaseModel) -> None:
        """Put an event into the outbox."""
        await self.outbox.put(as_json(event))

    async def _happened(self, happening: Happening) -> None:
        self._note(happening)
        for event in self.scribe.write(happening):
            await self.send(event)
        match happening:
            case Added(item, done=True) | Finished(item):
                await self.keep(item.id)
            case Heard(id) | NotHeard(id) | Truncated(id) | Faded(id):
                await self.keep(id)
            case Deleted():
                await self.keep()
            case _:
                pass

    def _note(self, happening: Happening) -> None:
        """What failed by an error that nobody foresaw belongs into the log too."""
        match happening:
            case Problem(error) | NotHeard(_, error) | AnswerEnded(Answer(error=Exception() as error)):
                if refusal(error).status == 500:
                    note("failed", level=logging.ERROR, error=error, id=self.id)

    def _about(self, event: type[wire.SessionCreatedEvent | wire.SessionUpdatedEvent], kind: Any) -> BaseModel:
        resume = {"resume_token": self.token, "resume_seconds": self.house.settings.resume_seconds}
        session = self.config | {"antiphon": resume}
        return event.model_validate({"type": kind, "event_id": new_id("event"), "session": session})

    # ------------------------------------------------------------------------------------- what clients say

    async def read(self, text: str | None) -> None:
        """One message of the client; what is wrong with it is told, and the session goes on."""
        event_id = None
        try:
            if text is None:
                raise Refused("events are text messages of JSON, not binary ones", code="invalid_json")
            raw = parsed(text)
            event_id = raw["event_id"] if isinstance(raw.get("event_id"), str) else None
            await self._do(raw)
        except Exception as error:
            told = refusal(error)
            if told.status == 500:
                note("failed", level=logging.ERROR, error=error, id=self.id)
            self.house.meters.refusals.labels(told.code or "error").inc()
            await self.send(problem(told, event_id))

    async def _do(self, raw: dict[str, Any]) -> None:
        """One event.

        Raises:
            Refused, AntiphonError: it is not done.
        """
        kind = raw.get("type")
        if not isinstance(kind, str) or kind not in KINDS:
            told = f"there is no event of type {shortly(kind)}; there are {', '.join(sorted(KINDS))}"
            raise Refused(told, code="unknown_event", param="type")
        wanted = raw.get("response") or {} if kind == "response.create" else {}
        items = wanted.pop("input", None) if isinstance(wanted, dict) else None  # may hold what the types do not know
        try:
            event = KINDS[kind].model_validate(raw)
        except ValidationError as error:
            raise wrong_field(error) from None
        talk = self.talk
        match event:
            case wire.InputAudioBufferAppendEvent():
                samples = from_wire(talk.manner.heard_as, read_sound(event.audio, "audio"))
                for start in range(0, len(samples), SLICE):
                    await talk.hear(samples[start : start + SLICE])
                    await asyncio.sleep(0)  # of who sends minutes at once: others come between
            case wire.InputAudioBufferCommitEvent():
                await talk.commit()
            case wire.InputAudioBufferClearEvent():
                await talk.clear()
            case wire.SessionUpdateEvent():
                await self._update(raw["session"])
            case wire.ConversationItemCreateEvent():
                await talk.create(read_item(event.item, talk.manner.heard_as), event.previous_item_id)
            case wire.ConversationItemRetrieveEvent():
                await talk.history.retrieve(event.item_id)
            case wire.ConversationItemTruncateEvent():
                await talk.cutting.truncate(event.item_id, event.audio_end_ms)
            case wire.ConversationItemDeleteEvent():
                await talk.history.delete(event.item_id)
            case wire.ResponseCreateEvent():
                await self._respond(wanted, items)
            case wire.ResponseCancelEvent():
                talk.answers.cancel(event.response_id)
            case _:
                raise Refused(f"{kind} is for WebRTC and SIP", code="unsupported_event", param="type")

    async def _update(self, update: Mapping[str, Any]) -> None:
        config = merged(self.config, update)
        manner = manner_of(self.house, self.who, config)
        self.config = config
        await self.talk.configure(manner)
        await self.keep()
        await self.send(self._about(wire.SessionUpdatedEvent, "session.updated"))

    async def _respond(self, wanted: Mapping[str, Any], items: Any) -> None:
        """Answer as is `wanted`, to `items` where they are given and else to the conversation."""
        talk = self.talk
        if not talk.manner.answers:
            raise Refused("a transcription session gives no answers", code="invalid_value", param="type")
        beside = wanted.get("conversation") or "auto"
        if beside not in ("auto", "none", self.scribe.conversation):
            raise Refused("conversation is auto or none", code="invalid_value", param="response.conversation")
        config = for_answer(self.config, wanted)
        manner = talk.manner if config == self.config else self._manner_of_answer(config)
        answer = Answer(new_id("resp"), manner.options, beside != "none", wanted.get("metadata"))
        if items is not None:
            read = read_items(items, manner.heard_as, talk.history.find)
            await talk.respond_to(read, answer, manner)
        elif beside == "none":
            await talk.respond_to(talk.history.items, answer, manner)
        else:
            await talk.respond(answer, manner)

    def _manner_of_answer(self, config: Config) -> Manner:
        try:
            return manner_of(self.house, self.who, config)
        except Refused as error:
            error.param = error.param and error.param.replace("session.", "response.", 1)
            raise


class Lobby:
    """All sessions of a server: who has one, and who may come back to one."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.sessions: dict[str, Session] = {}
        self._losing = Background(_report)
        house.meters.sessions.set_function(lambda: len(self.sessions))
        house.make_room = lambda: self._let_go(None)

    async def enter(self, who: str, model: str, kind: str) -> Session:
        """A new session.

        Raises:
            Refused, BusyError: this key has as many as it may, or the engine has.
        """
        most = self.house.settings.sessions
        own = sum(session.who == who for session in self.sessions.values())
        if max(own, self.house.shelves.sessions_of(who)) >= most and not self._let_go(who):
            raise Refused(f"there are {most} sessions of this key; close one first", 429, "too_many_sessions")
        session = await self._open(Session.new(self.house, who, model, kind))
        await session.keep()
        return session

    async def _open(self, session: Session) -> Session:
        await session.open()
        self.sessions[session.id] = session
        return session

    async def come_back(self, who: str, id: str, token: str) -> Session:
        """A session whose connection was lost, or the process that held it.

        Raises:
            Refused: there is none, or not any more.
            BusyError: it was held elsewhere, and there is no place for it here.
        """
        session = self.sessions.get(id)
        if session is None:
            return await self._take_up(who, id, token)
        if session.who != who or not hmac.compare_digest(session.token, token):
            raise _gone()
        if session.lost_at is None:  # a client knows sooner than we do that its connection is gone
            session.taken.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.free.wait(), 2 * LEAVING)
            if not session.free.is_set() or session.id not in self.sessions:
                raise _gone()
        session.lost_at = None
        return session

    async def _take_up(self, who: str, id: str, token: str) -> Session:
        """A session as another process has left it: it is told what was said before it is answered next."""
        shelves = self.house.shelves
        saved = await asyncio.to_thread(shelves.find, id, who, token)
        if saved is None:
            raise _gone()
        said = await asyncio.to_thread(shelves.said_in, id, saved)
        session = await self._open(Session(self.house, id, saved))
        session.talk.history.items[:] = said
        session.talk.history.changed()
        await session.keep()
        await session.begin()
        return session

    def leave(self, session: Session) -> None:
        """End a session; while the server is being stopped, others may still take it up."""
        if self.sessions.pop(session.id, None) is not None:
            session.close()
            if not self.house.stopping:
                self.house.shelves.forget(session.id, self.house.settings.worker)

    def lose(self, session: Session) -> None:
        """Keep a session for its client to come back to, for a while; not while the server is being stopped."""
        self._losing.do(self._wait_for(session))

    async def _wait_for(self, session: Session) -> None:
        session.lost_at = lost_at = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(session.ending.wait(), self.house.settings.resume_seconds)
        if session.lost_at == lost_at:
            self.leave(session)

    def _let_go(self, who: str | None) -> bool:
        """End the session that was lost first, to make room; whether there was one."""
        lost = [s for s in self.sessions.values() if s.lost_at is not None and who in (None, s.who)]
        for session in sorted(lost, key=lambda s: s.lost_at or 0.0)[:1]:
            self.leave(session)
            return True
        return False


def _gone() -> Refused:
    told = "there is no session to come back to; connect without session_id to begin one"
    return Refused(told, 404, "session_not_found", "session_id")


async def _report(error: Exception) -> None:
    note("failed", level=logging.ERROR, error=error)


async def realtime(socket: WebSocket) -> None:
    """The endpoint."""
    house, asked, who = house_of(socket), socket.query_params, socket.state.who
    lobby: Lobby = socket.app.state.lobby
    if "session_id" in asked:
        session = await lobby.come_back(who, asked["session_id"], asked.get("resume_token", ""))
    else:
        kind = "transcription" if asked.get("intent") == "transcription" else "realtime"
        session = await lobby.enter(who, house.check_model(asked.get("model")), kind)
        await session.begin()
    offered = [name.strip() for name in socket.headers.get("sec-websocket-protocol", "").split(",")]
    left = None if "session_id" in asked else (NORMAL, "")  # who is not let in has no token to come back with
    session.taken.clear()
    session.free.clear()
    try:
        await socket.accept("realtime" if "realtime" in offered else None)
        note("realtime", id=socket.state.request_id, session=session.id, worker=house.settings.worker)
        left = None
        left = await converse(socket, session, house.settings)
    finally:
        session.free.set()
        if session.taken.is_set():
            left = NORMAL, "the session goes on over another connection"
        else:
            may_return = left is None and not house.stopping and house.settings.resume_seconds
            (lobby.lose if may_return else lobby.leave)(session)
    if socket.application_state is WebSocketState.CONNECTED and left is not None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.close(*left)


async def converse(socket: WebSocket, session: Session, settings: Settings) -> tuple[int, str] | None:
    """Read and write until one side ends it: how to close, or None where the connection is gone.

    A client that closes in order (1000) has ended the session.
    """
    reading = asyncio.create_task(_read(socket, session, settings))
    writing = asyncio.create_task(_write(socket, session))
    ending, taken = (asyncio.create_task(event.wait()) for event in (session.ending, session.taken))
    tasks = (reading, writing, ending, taken)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if writing.done():  # the client is gone; how it left is known when what it sent before has been read
            await asyncio.wait((reading,), timeout=LEAVING)
        if ending.done():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.talk.finish(), settings.stop_seconds)
            while not session.outbox.empty() and not writing.done():
                await asyncio.sleep(0.01)
            return GOING_AWAY, "the server is being stopped"
        return reading.result() if reading.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Backlog:
    """What has come and waits for what came before it: so many characters, and one message more."""

    def __init__(self, most: int) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._size, self._most, self._room = 0, most, asyncio.Event()

    async def put(self, message: Message) -> None:
        """Add one; returns when there is room for another."""
        self._messages.put_nowait(message)
        self._size += len(message.get("text") or "")
        while self._size > self._most:
            self._room.clear()
            await self._room.wait()

    async def take(self) -> Message:
        """The next, once there is one."""
        message = await self._messages.get()
        self._size -= len(message.get("text") or "")
        self._room.set()
        return message


async def _read(socket: WebSocket, session: Session, settings: Settings) -> tuple[int, str] | None:
    """Do what the client asks, in order. More is received meanwhile: a socket that is not read answers no ping."""
    backlog = Backlog(settings.message_bytes)
    async with asyncio.TaskGroup() as both:
        both.create_task(_receive(socket, backlog, settings.idle_seconds))
        while (message := await backlog.take())["type"] == "websocket.receive":
            await session.read(message.get("text"))
    if message["type"] == IDLE:
        return NORMAL, f"nothing was said for {settings.idle_seconds:g} seconds"
    return (NORMAL, "") if message.get("code") == NORMAL else None


async def _receive(socket: WebSocket, backlog: Backlog, idle: float) -> None:
    """Into the backlog, until the client is gone or silent."""
    message: Message = {"type": "websocket.receive"}
    while message["type"] == "websocket.receive":
        try:
            message = await asyncio.wait_for(socket.receive(), idle)
        except TimeoutError:
            message = {"type": IDLE}
        await backlog.put(message)


async def _write(socket: WebSocket, session: Session) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            await socket.send_text(await session.outbox.get())
