"""One spoken conversation of the server: who speaks, and what is said when.

    sound ──> Listener ──started──> Cutting: an answer that is being heard is cut short
                  │ while speaking: to History's call, which reads along
                  ├─paused──> Call.guess
                  └─stopped─> commit: an item of History ──> Answers ──events──> Happenings

What the client sends is done in order by one task; an answer is given by another.

Shapes: N samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress

from torch import Tensor

from antiphon.audio import Samples, pcm16
from antiphon.engine import Call
from antiphon.errors import AntiphonError
from antiphon.serve.answers import Answers
from antiphon.serve.background import Background
from antiphon.serve.cutting import Cutting
from antiphon.serve.happenings import (
    Answer,
    Cleared,
    Committed,
    Happening,
    Heard,
    HeardMore,
    Item,
    Manner,
    NotHeard,
    Part,
    Problem,
    SpeechStarted,
    SpeechStopped,
    TimedOut,
)
from antiphon.serve.history import History, Told
from antiphon.serve.house import House, settled
from antiphon.serve.listening import LEAST_MS, Inbox, Listener
from antiphon.serve.refusals import Refused
from antiphon.serve.retelling import retell
from antiphon.serve.transcriptions import Recording, Written, pieces
from antiphon.serve.vad import Detector, Sign
from antiphon.serve.wire import new_id


class Talk:
    """A conversation.

    Args:
        house: the engine and what is beside it.
        call: the engine's conversation, which is this one's alone.
        manner: how it is held; `configure` changes it.
        happened: takes what happens, in order; may make it wait.
    """

    def __init__(
        self, house: House, call: Call, manner: Manner, happened: Callable[[Happening], Awaitable[None]]
    ) -> None:
        self.house, self.manner, self.happened = house, manner, happened
        self.background = Background(lambda error: happened(Problem(error)))
        self.listener = Listener(manner.heard_as, manner.taking)
        self.history = History(house, call, happened, self.background)
        self.answers = Answers(self.history, self._after_answer)
        self.cutting = Cutting(self.history, self.answers, self._feed)
        self._writing = asyncio.Lock()  # what the user said is written down one turn after another
        self._idle: asyncio.Task[None] | None = None
        self._owed = False  # a turn ended while an answer was given, and is to be answered after it
        self._guessed = False  # an answer was begun in case the turn is over: the call must hear nothing more

    async def configure(self, manner: Manner) -> None:
        """Hold it in another manner from now on."""
        old, self.manner = self.manner, manner
        if (manner.heard_as, manner.taking) != (old.heard_as, old.taking):
            self.history.forget_turn()
            self._stop_idle()
            self.listener = Listener(manner.heard_as, manner.taking)
        if not self.history.items and self.answers.current is None:
            await self._be_told(manner)

    # ------------------------------------------------------------------------------------------- the user

    async def hear(self, samples: Samples) -> None:
        """More of what the user's microphone hears [N], in pieces of any length.

        Raises:
            Refused: the turn is longer than the limit.
        """
        most, listener = self.house.settings.audio_seconds, self.listener
        if listener.inbox.count + len(samples) > most * listener.rate:
            raise Refused(f"a turn is longer than the limit of {most:g} seconds; commit or clear it", code="too_long")
        for sign in listener.push(samples):
            await self._react(sign)
        self._feed()

    async def _react(self, sign: Sign) -> None:
        """What a sign of the detector means for the conversation."""
        listener, taking = self.listener, self.listener.taking
        assert taking is not None
        if sign is Sign.STARTED:
            self._stop_idle()
            await self.happened(SpeechStarted(listener.inbox.item, listener.began_ms))
            if taking.interrupt:
                self.cutting.interrupt()
            if self.answers.current is None and not self.cutting.is_pending:
                await self._be_told(self.manner)  # so that what follows is read while it is said
        elif sign is Sign.PAUSED:
            self._feed()
            self._judge_pause()
            self._guess()
        elif sign is Sign.RESUMED:
            self._guessed = False
        else:
            await self.happened(SpeechStopped(listener.inbox.item, listener.ms))
            await self._end_turn()
            if self.manner.answers and taking.create:
                await self._answer_or_owe()

    @property
    def _is_told(self) -> bool:
        """Whether the engine's call holds all that was said."""
        return self.manner.answers and self.history.holds(self.manner)

    async def _be_told(self, manner: Manner) -> None:
        """The engine's call holds all that was said from now on, and what has come of the user's turn."""
        if manner.answers and not self.history.holds(manner):
            await self.history.tell(manner)
            self.listener.inbox.heard = 0
            self._feed()

    def _feed(self) -> None:
        """Let the call hear what has come of the turn, unless it has to wait."""
        if self._is_told and not self.cutting.is_pending and not self._guessed:
            new = self.listener.inbox.unheard()
            if new is not None:
                self.history.hear(new, self.listener.rate)

    def _judge_pause(self) -> None:
        """Ask whether the turn is over, by what was said before this pause."""
        detector = self.listener.detector
        if detector is not None and detector.taking.likely is not None and self._is_told:
            self.background.do(self._judge(detector, self.history.call.recent()))

    async def _judge(self, detector: Detector, recent: Future[Tensor]) -> None:
        with suppress(AntiphonError):
            detector.judged(self.house.model.turn_end(await settled(recent)))

    def _guess(self) -> None:
        """Begin the answer in case the turn is over."""
        is_ready = self._is_told and self.answers.current is None and not self.cutting.is_pending
        if is_ready and self.listener.taking is not None and self.listener.taking.create:
            self.history.call.guess(self.manner.options)
            self._guessed = True

    async def commit(self) -> None:
        """The user's turn is over, says the client.

        Raises:
            Refused: there is too little sound.
        """
        self.listener.stop()
        inbox = self.listener.inbox
        if 1000 * inbox.count < LEAST_MS * inbox.rate:
            raise Refused(
                f"the turn has {inbox.ms} ms of sound; it needs {LEAST_MS} ms", code="input_audio_buffer_commit_empty"
            )
        await self._end_turn()

    async def _end_turn(self) -> None:
        await self.cutting.finish()
        self._feed()
        self._guessed = False
        inbox = self.listener.end_turn()
        item = Item(inbox.item, "user", [Part("", bytearray(pcm16(inbox.samples)), inbox.rate)])
        await self.happened(Committed(item.id, self.history.last))
        await self.history.add(item)
        if self.manner.answers:
            self.history.end_turn(self.manner)
        if self.manner.language is not None:
            self.background.do(self._write_down(item, inbox, self.manner.language))

    async def clear(self) -> None:
        """What was sent of the turn is void."""
        self.history.forget_turn()
        self.listener.clear()
        self._guessed = False
        await self.happened(Cleared())

    async def _write_down(self, item: Item, inbox: Inbox, language: str) -> None:
        """Tell the client what the user said."""
        written, recording = Written([]), Recording(inbox.samples, inbox.rate, language)
        try:
            async with self._writing, aclosing(pieces(self.house, recording, written, aside=True)) as text:
                async for delta in text:
                    await self.happened(HeardMore(item.id, delta))
            item.parts[0].text = written.text()
            end = Heard(item.id, written.text(), written.heard, written.asked, written.said)
        except Exception as error:
            end = NotHeard(item.id, error)
        if not self.manner.answers:
            item.parts[0].sound = None  # nobody will hear it again
        await self.happened(end)

    # ------------------------------------------------------------------------------------------- answers

    async def create(self, item: Item, after: str | None) -> None:
        """Add an item of the client's; `after` is the item before it, "root" the beginning, None the end.

        Raises:
            Refused: its id is taken, or there is no such item before it.
        """
        place = self.history.place(item, after)
        await self.cutting.finish()
        is_last = place == len(self.history.items) and self.answers.current is None and not self.history.is_hearing
        await self.history.add(item, place)
        if is_last and self._is_told:
            await self.history.tell_more([item])
        else:
            self.history.changed()

    async def respond(self, answer: Answer, manner: Manner) -> None:
        """Answer in a manner, this conversation's or one that is this answer's alone.

        Raises:
            Refused: an answer is being given, or there is nothing to answer.
            AntiphonError: what was said is too much to be told in this manner.
        """
        self.answers.check_free()
        if not self.history.items and not manner.instructions:
            raise Refused("there is nothing to answer; say something first", code="invalid_value")
        await self.cutting.finish()
        await self._be_told(manner)
        self._stop_idle()
        self.answers.begin(answer, self.history.call, manner.said_as)

    async def respond_to(self, items: Sequence[Item], answer: Answer, manner: Manner) -> None:
        """Answer other items than the conversation's.

        Raises:
            Refused: an answer is being given.
            AntiphonError: the items cannot be read.
        """
        self.answers.check_free()
        told, window = Told.by(manner), self.house.settings.live_window
        call = await asyncio.to_thread(
            lambda: self.house.engine.open(told.instructions, told.tools, window, told.retention, aside=True)
        )
        try:
            await retell(call, items)
            self.answers.begin(answer, call, manner.said_as)
        except Exception:
            call.close()
            raise
        self._stop_idle()

    async def _answer_or_owe(self) -> None:
        if self.answers.current is not None:
            self._owed = True
        else:
            await self.respond(Answer(new_id("resp"), self.manner.options), self.manner)

    async def _after_answer(self) -> None:
        taking = self.listener.taking
        if self._owed and taking is not None and not self.listener.is_speaking:
            self._owed = False
            await self._answer_or_owe()
        elif taking is not None and taking.idle_ms is not None:
            self._idle = self.background.do(self._wait_for_somebody(taking.idle_ms))

    async def _wait_for_somebody(self, idle_ms: int) -> None:
        """Where nobody says anything after an answer, the model is asked to go on."""
        await asyncio.sleep(self.answers.playback.left + idle_ms / 1000)
        self._idle = None
        if self.answers.current is not None or self.listener.is_speaking:
            return
        self.listener.begin_silent()
        item, now = self.listener.inbox.item, self.listener.ms
        await self.happened(TimedOut(item, max(0, now - idle_ms), now))
        await self._end_turn()
        await self._answer_or_owe()

    def _stop_idle(self) -> None:
        if self._idle is not None and self._idle is not asyncio.current_task():
            self._idle.cancel()
        self._idle = None

    async def finish(self) -> None:
        """Wait for the end of what is being said."""
        await self.answers.until_over()

    def close(self) -> None:
        """Leave the engine."""
        self.background.cancel()
        self.answers.close()
        self.history.call.close()
        del self.answers, self.cutting  # they call back: the caches would stay until the collector comes by
