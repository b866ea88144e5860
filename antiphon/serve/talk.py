"""One spoken conversation of the server: who speaks, what is said when, and what is remembered.

    sound ──> Detector ──started──> interrupt ──cut to what was heard──┐
                 │ while speaking: to the call, which reads along      v
                 ├─paused──> Call.guess          the call of the engine, settled
                 └─stopped─> commit ──> answer ──events──> Happenings

What the client sends is done in order by one task; an answer is given by another. Whatever the call does not hold as
the items tell it (an item was deleted, the instructions changed) is told it anew before the next answer: rare, exact.

Shapes: N samples.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from antiphon.audio import Samples, pcm16
from antiphon.engine import Call
from antiphon.engine.engine import LIVE_WINDOW
from antiphon.errors import AntiphonError, InputError
from antiphon.generate import Options, Reply
from antiphon.serve.happenings import (
    Added,
    Answer,
    AnswerBegun,
    AnswerEnded,
    Cleared,
    Committed,
    Deleted,
    Finished,
    Happening,
    Heard,
    HeardMore,
    Item,
    Manner,
    NotHeard,
    OutputBegun,
    OutputEnded,
    Part,
    Retrieved,
    SpeechStarted,
    SpeechStopped,
    TimedOut,
    Truncated,
    Usage,
)
from antiphon.serve.house import House, settled
from antiphon.serve.logs import note
from antiphon.serve.refusals import Refused
from antiphon.serve.retelling import retell
from antiphon.serve.sounds import wire_rate
from antiphon.serve.speaker import Speaker
from antiphon.serve.transcriptions import Recording, Written, pieces
from antiphon.serve.vad import Detector, Sign
from antiphon.serve.wire import new_id

LEAST_MS = 100  # of sound, that a turn needs
PATIENCE = 0.4  # seconds that a client which was interrupted has to say how much of the answer was heard


@dataclass
class Inbox:
    """The user's turn as it comes in."""

    item: str = field(default_factory=lambda: new_id("item"))
    pieces: list[Samples] = field(default_factory=list)
    count: int = 0  # samples
    fed: int = 0  # pieces that the call has heard

    def add(self, samples: Samples) -> None:
        """More of it."""
        self.pieces.append(samples)
        self.count += len(samples)

    @property
    def samples(self) -> Samples:
        """All of it [N]."""
        return np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.float32)


def _told(manner: Manner) -> tuple[Any, ...]:
    """What of a manner is in the conversation's system turn, or its memory."""
    return manner.instructions, manner.tools, manner.choice == "none", manner.retention


@dataclass
class Cut:
    """An answer that was interrupted and is to be cut to what was heard, by our clock until the client says better."""

    item: Item
    ms: int
    told: asyncio.Event = field(default_factory=asyncio.Event)


class Talk:
    """A conversation.

    Args:
        house: the engine and what is beside it.
        call: the engine's conversation, which is this one's alone.
        manner: how it is held; `configure` changes it.
        who: whose it is.
        happened: takes what happens, in order; may make it wait.
    """

    def __init__(
        self, house: House, call: Call, manner: Manner, who: str, happened: Callable[[Happening], Awaitable[None]]
    ) -> None:
        self.house, self.call, self.manner, self.who, self.happened = house, call, manner, who, happened
        self.items: list[Item] = []
        self.inbox = Inbox()
        self.answer: Answer | None = None  # that is being given
        self._answering: asyncio.Task[None] | None = None
        self._answers_by = call
        self._spoken: tuple[Item, float, float] | None = None  # last spoken item, when it began to be heard, seconds
        self._cut: Cut | None = None
        self._cutting: asyncio.Task[None] | None = None
        self._idle: asyncio.Task[None] | None = None
        self._hearing = asyncio.Lock()  # what the user said is written down one turn after another
        self._tasks = set[asyncio.Task[None]]()
        self._stale = False  # the call does not hold what the items say
        self._owed = False  # a turn ended while an answer was given, and is to be answered after it
        self._known = 0  # positions that were read by the last answer
        self._guessed = False  # an answer was begun in case the turn is over: the call must hear nothing more
        self._listen_anew()

    # -------------------------------------------------------------------------------------- how it is held

    async def configure(self, manner: Manner) -> None:
        """Hold it in another manner from now on."""
        old, self.manner = self.manner, manner
        self._stale |= _told(manner) != _told(old)
        if (manner.heard_as, manner.taking) != (old.heard_as, old.taking):
            self._stale |= self.inbox.fed > 0
            self._listen_anew()
        if self._stale and not self.items and self.answer is None:
            await self._refresh()

    def _listen_anew(self) -> None:
        self.rate = wire_rate(self.manner.heard_as)
        self.inbox = Inbox()
        taking = self.manner.taking
        self._detector = Detector(taking, self.rate) if taking else None
        self._rest = np.zeros(0, np.float32)  # of a step of the detector
        self._before: list[Samples] = []  # a turn that begins now
        self._position = 0  # samples judged so far

    # ------------------------------------------------------------------------------------------- the user

    async def hear(self, samples: Samples) -> None:
        """More of what the user's microphone hears [N], in pieces of any length.

        Raises:
            Refused: the turn is longer than the limit.
        """
        most = self.house.settings.audio_seconds
        if (self.inbox.count + len(samples)) > most * self.rate:
            raise Refused(f"a turn is longer than the limit of {most:g} seconds; commit or clear it", code="too_long")
        if self._detector is None:
            self.inbox.add(samples)
            self._feed()
            return
        self._rest = np.concatenate([self._rest, samples])
        while self._detector is not None and len(self._rest) >= self._detector.step:
            step, self._rest = self._rest[: self._detector.step], self._rest[self._detector.step :]
            await self._judge(self._detector, step)
        self._feed()

    async def _judge(self, detector: Detector, step: Samples) -> None:
        """What one step of the detector means for the turn."""
        sign = detector.push(step)
        self._position += len(step)
        if sign is Sign.STARTED:
            await self._begin_turn(detector, step)
        elif detector.speaking or sign is Sign.STOPPED:
            self.inbox.add(step)
        else:
            self._before.append(step)
            del self._before[: len(self._before) - round(detector.before_ms * self.rate / 1000) // len(step) - 1]
        if sign is Sign.PAUSED:
            self._feed()
            if detector.taking.likely is not None and not self._stale:
                self._background(self._judge_pause(detector, self.call.recent()))
            self._guess()
        elif sign is Sign.RESUMED:
            self._guessed = False
        elif sign is Sign.STOPPED:
            await self._end_turn(detector)

    async def _judge_pause(self, detector: Detector, recent: Future[Tensor]) -> None:
        """Whether the turn is over, by what was said before this pause."""
        with suppress(AntiphonError):
            detector.judged(self.house.model.turn_end(await settled(recent)))

    async def _begin_turn(self, detector: Detector, step: Samples) -> None:
        for piece in [*self._before, step]:
            self.inbox.add(piece)
        self._before = []
        self._stop_idle()
        begun = max(0, self._ms() - round(1000 * self.inbox.count / self.rate))
        await self.happened(SpeechStarted(self.inbox.item, begun))
        if detector.taking.interrupt:
            self.interrupt()

    async def _end_turn(self, detector: Detector) -> None:
        await self.happened(SpeechStopped(self.inbox.item, self._ms()))
        await self._commit()
        if self.manner.answers and detector.taking.create:
            await self._answer_or_owe()

    def _ms(self) -> int:
        return round(1000 * self._position / self.rate)

    def _feed(self) -> None:
        """Let the call hear what has come of the turn, unless it has to wait."""
        if self._cut is not None or self._stale or self._guessed or not self.manner.answers:
            return
        new = self.inbox.pieces[self.inbox.fed :]
        if new:
            self.inbox.fed = len(self.inbox.pieces)
            self._background(self._fed(self.call.append_audio(np.concatenate(new), self.rate)))

    async def _fed(self, heard: Future[None]) -> None:
        """Where the call could not hear it, it is told anew."""
        try:
            await settled(heard)
        except AntiphonError:
            self._stale = True

    def _guess(self) -> None:
        """Begin the answer in case the turn is over."""
        taking = self.manner.taking
        is_ready = self.answer is None and self._cut is None and not self._stale and self.manner.answers
        if is_ready and taking is not None and taking.create:
            self.call.guess(self._options())
            self._guessed = True

    async def commit(self) -> None:
        """The user's turn is over, says the client.

        Raises:
            Refused: there is too little sound.
        """
        if self._detector is not None and self._detector.speaking:
            self._detector.reset()
        if 1000 * self.inbox.count < LEAST_MS * self.rate:
            raise Refused(
                f"the turn has {1000 * self.inbox.count / self.rate:.0f} ms of sound; it needs {LEAST_MS} ms",
                code="input_audio_buffer_commit_empty",
            )
        await self._commit()

    async def _commit(self) -> None:
        await self._finish_cut()
        self._feed()
        self._guessed = False
        inbox, self.inbox = self.inbox, Inbox()
        item = Item(inbox.item, "user", [Part("", bytearray(pcm16(inbox.samples)), self.rate)])
        await self.happened(Committed(item.id, self._last()))
        await self._add(item)
        if self.manner.answers and not self._stale:
            self.call.commit()
        if self.manner.language is not None:
            self._background(self._write_down(item, inbox.samples, self.rate, self.manner.language))

    async def clear(self) -> None:
        """What was sent of the turn is void."""
        self._stale |= self.inbox.fed > 0
        self.inbox, self._guessed = Inbox(), False
        self._before, self._rest = [], np.zeros(0, np.float32)
        if self._detector is not None:
            self._detector.reset()
        await self.happened(Cleared())

    async def _write_down(self, item: Item, samples: Samples, rate: int, language: str) -> None:
        """Tell the client what the user said."""
        written = Written([])
        try:
            async with (
                self._hearing,
                aclosing(pieces(self.house, Recording(samples, rate, language), written, aside=True)) as text,
            ):
                async for delta in text:
                    await self.happened(HeardMore(item.id, delta))
            item.parts[0].text = written.text()
            await self.happened(Heard(item.id, written.text(), written.heard, written.asked, written.said))
        except Exception as error:
            await self.happened(NotHeard(item.id, error))
        if not self.manner.answers:
            item.parts[0].sound = None  # nobody will hear it again

    # ------------------------------------------------------------------------------------------ being cut off

    def interrupt(self) -> None:
        """The user speaks: the answer stops, and is cut to what was heard of it."""
        if self.answer is not None and self.answer.in_conversation:
            self.answer.reason = "turn_detected"
            self.call.cancel()
        elif self.answer is not None:
            return
        if self._spoken is None or self._cut is not None:
            return
        item, begun, seconds = self._spoken
        heard = time.perf_counter() - begun
        if (self.answer is None and heard < seconds) or (self.answer is not None and item in self.answer.items):
            self._cut = Cut(item, round(1000 * heard))
            self._cutting = self._background(self._cut_off(self._cut))

    async def _cut_off(self, cut: Cut) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(cut.told.wait(), PATIENCE)
        await self._until_answered()
        await self._cut_to(cut.item, min(cut.ms, round(1000 * cut.item.parts[0].seconds)))
        self._cut, self._spoken = None, None
        self._feed()

    async def _finish_cut(self) -> None:
        if self._cut is not None and self._cutting is not None:
            self._cut.told.set()
            await self._cutting

    async def truncate(self, id: str, ms: int) -> None:
        """Cut an answer to what was heard of it, says the client.

        Raises:
            Refused: no such answer, or it is shorter.
        """
        item = self.find(id)
        if item.role != "assistant" or not item.parts or item.parts[0].sound is None:
            raise Refused(f"{id} is no spoken answer", code="invalid_value", param="item_id")
        if self.answer is not None and item in self.answer.items:
            self.answer.reason = self.answer.reason or "client_cancelled"
            self.call.cancel()
            await self._until_answered()
        most = round(1000 * item.parts[0].seconds)
        if not 0 <= ms <= most:
            raise Refused(f"{id} has {most} ms of sound", code="invalid_value", param="audio_end_ms")
        if self._cut is not None and self._cut.item is item:
            self._cut.ms = ms
            await self._finish_cut()
        else:
            await self._cut_to(item, ms)
        await self.happened(Truncated(id, ms))

    async def _cut_to(self, item: Item, ms: int) -> None:
        part = item.parts[0]
        share, whole = ms / max(1.0, 1000 * part.seconds), part.text
        part.sound = (part.sound or bytearray())[: 2 * (ms * part.rate // 1000)]
        try:
            if self._stale or self._last() != item.id or self.inbox.fed:
                raise InputError("other things were said since")
            part.text = await settled(self.call.truncate(ms))
        except AntiphonError:
            words = whole.split(" ")
            part.text, self._stale = " ".join(words[: int(share * len(words))]), True

    # -------------------------------------------------------------------------------------------- items

    def find(self, id: str) -> Item:
        """An item.

        Raises:
            Refused: there is none of that id.
        """
        for item in self.items:
            if item.id == id:
                return item
        raise Refused(f"there is no item {id!r}", code="item_retrieve_invalid_item_id", param="item_id")

    async def retrieve(self, id: str) -> None:
        """Show an item."""
        await self.happened(Retrieved(self.find(id)))

    async def create(self, item: Item, after: str | None) -> None:
        """Add an item of the client's; `after` is the item before it, "root" the beginning, None the end.

        Raises:
            Refused: its id is taken, or there is no such item before it.
        """
        if any(item.id == other.id for other in self.items):
            raise Refused(f"there is an item {item.id!r} already", code="item_create_duplicate_id", param="item.id")
        if item.role == "result" and not any(i.role == "call" and i.call_id == item.call_id for i in self.items):
            raise Refused(f"no function was called as {item.call_id!r}", code="invalid_value", param="item.call_id")
        place = len(self.items) if after is None else 0 if after == "root" else self.items.index(self.find(after)) + 1
        await self._finish_cut()
        at_end = place == len(self.items) and self.answer is None and not self.inbox.fed
        await self._add(item, place)
        if at_end and not self._stale:
            await retell(self.call, [item])
        else:
            self._stale = True

    async def delete(self, id: str) -> None:
        """Forget an item.

        Raises:
            Refused: there is none.
        """
        self.items.remove(self.find(id))
        self._stale = True
        await self.happened(Deleted(id))

    async def _add(self, item: Item, place: int | None = None, done: bool = True) -> None:
        place = len(self.items) if place is None else place
        after = self.items[place - 1].id if place else None
        self.items.insert(place, item)
        self._forget_sound()
        await self.happened(Added(item, after, done))

    def _forget_sound(self) -> None:
        """Keep no more of what was said than the limit, the oldest first: the call has heard it."""
        sizes = [(part, len(part.sound or b"")) for item in self.items[:-1] for part in item.parts]
        over = sum(size for _, size in sizes) - self.house.settings.history_bytes
        for part, size in sizes:
            if over <= 0:
                return
            over -= size
            part.sound = None

    def _last(self) -> str | None:
        return self.items[-1].id if self.items else None

    async def _refresh(self) -> None:
        """Tell the call anew what the items say, and what has come of the user's turn."""
        manner = self.manner
        tools = () if manner.choice == "none" else manner.tools
        begun = await asyncio.to_thread(
            self.house.engine.begun, manner.instructions or None, tools, LIVE_WINDOW, manner.retention
        )
        await settled(self.call.become(begun))
        self._stale, self.inbox.fed, self._known = False, 0, 0
        await retell(self.call, self.items)
        self._feed()

    # ------------------------------------------------------------------------------------------- answers

    async def respond(self, answer: Answer, instructions: str | None = None) -> None:
        """Answer, says the client; `instructions` are for this answer and are told right before it.

        Raises:
            Refused: an answer is being given.
        """
        self._check_free()
        if not self.items and not instructions:
            raise Refused("there is nothing to answer; say something first", code="invalid_value")
        await self._finish_cut()
        if self._stale:
            await self._refresh()
        if instructions:
            await settled(self.call.append_message({"role": "system", "content": instructions}))
        self._start(answer, self.call)

    async def respond_aside(self, answer: Answer, items: Sequence[Item], instructions: str | None) -> None:
        """Answer other items, beside the conversation.

        Raises:
            Refused: an answer is being given.
        """
        self._check_free()
        system = instructions or self.manner.instructions or None
        call = await asyncio.to_thread(
            lambda: self.house.engine.open(system, self.manner.tools, LIVE_WINDOW, aside=True)
        )
        await retell(call, items)
        self._start(answer, call)

    def _check_free(self) -> None:
        if self.answer is not None:
            raise Refused("an answer is being given; cancel it first", code="conversation_already_has_active_response")

    async def _answer_or_owe(self) -> None:
        if self.answer is not None:
            self._owed = True
            return
        await self.respond(Answer(new_id("resp"), self._options()))

    def _options(self) -> Options:
        return self.manner.options

    def _start(self, answer: Answer, call: Call) -> None:
        self.answer, self._answers_by = answer, call
        self._stop_idle()
        self._answering = self._background(self._give(answer, call))

    async def _give(self, answer: Answer, call: Call) -> None:
        """Give an answer from its first event to its last."""
        speaker = Speaker(self, answer, call, self.manner.said_as)
        await self.happened(AnswerBegun(answer))
        try:
            events = call.respond(answer.options, ahead=self.house.settings.ahead)
            async with aclosing(self.house.events(events)) as found:
                async for event in found:
                    await speaker.take(event)
        except Exception as error:
            answer.status, answer.error = "failed", error
            await speaker.close()
            self._stale = self._stale or answer.in_conversation
        if not answer.in_conversation:
            call.close()
        await self.happened(AnswerEnded(answer))
        self.answer = None
        await self._after_answer()

    async def _after_answer(self) -> None:
        if self._owed and self._detector is not None and not self._detector.speaking:
            self._owed = False
            await self._answer_or_owe()
        elif self._detector is not None and self._detector.taking.idle_ms is not None:
            self._idle = self._background(self._wait_for_somebody(self._detector.taking.idle_ms))

    async def _wait_for_somebody(self, idle_ms: int) -> None:
        """Where nobody says anything after an answer, the model is asked to go on."""
        _, begun, seconds = self._spoken or (None, 0.0, 0.0)
        await asyncio.sleep(max(0.0, begun + seconds - time.perf_counter()) + idle_ms / 1000)
        self._idle = None
        if self.answer is not None or (self._detector is not None and self._detector.speaking):
            return
        least = np.zeros(round(2 * LEAST_MS * self.rate / 1000), np.float32)
        for piece in self._before or [least]:
            self.inbox.add(piece)
        self._before = []
        await self.happened(TimedOut(self.inbox.item, max(0, self._ms() - idle_ms), self._ms()))
        self._feed()
        await self._commit()
        await self._answer_or_owe()

    def _stop_idle(self) -> None:
        if self._idle is not None and self._idle is not asyncio.current_task():
            self._idle.cancel()
        self._idle = None

    async def cancel(self, id: str | None) -> None:
        """Stop the answer, says the client.

        Raises:
            Refused: none is being given, or another.
        """
        answer = self.answer
        if answer is None or (id is not None and answer.id != id):
            raise Refused("no answer is being given", code="response_cancel_not_active")
        answer.reason = answer.reason or "client_cancelled"
        self._answers_by.cancel()

    async def _until_answered(self) -> None:
        if self._answering is not None and self._answering is not asyncio.current_task():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(self._answering)

    async def finish(self) -> None:
        """Wait for the end of what is being said."""
        await self._until_answered()

    def close(self) -> None:
        """Leave the engine."""
        for task in self._tasks:
            task.cancel()
        self._answers_by.close()
        self.call.close()

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            note("failed", level=logging.ERROR, error=error)

    # ------------------------------------------------------------------------------- of an answer, to Speaker

    def spoke(self, item: Item, begun: float, seconds: float) -> None:
        """So much of an item's sound has been sent, of which the first could be heard at `begun`."""
        self._spoken = (item, begun, seconds)

    def usage(self, call: Call, reply: Reply) -> Usage:
        """Tokens of an answer that is over."""
        session, said = call.session, call.session.answer
        prompt = session.ids[: said.start] if said else []
        audio = prompt.count(session.model.config.audio_token_id)
        cached, self._known = min(self._known, len(prompt)), len(prompt) + len(reply.text_ids)
        left = session.thinker.capacity - len(session.ids)
        return Usage(len(prompt) - audio, audio, cached, len(reply.text_ids), len(reply.codes), left)

    async def add_output(self, answer: Answer, item: Item) -> None:
        """An item of an answer begins."""
        answer.items.append(item)
        await self.happened(OutputBegun(answer, item, len(answer.items) - 1))
        if answer.in_conversation:
            await self._add(item, done=False)

    async def end_output(self, answer: Answer, item: Item) -> None:
        """An item of an answer is whole."""
        await self.happened(OutputEnded(answer, item, answer.items.index(item)))
        if answer.in_conversation and item in self.items:
            place = self.items.index(item)
            await self.happened(Finished(item, self.items[place - 1].id if place else None))
