"""Answers as they are given, one at a time: from the engine's events to their last happening."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Literal

from antiphon.engine import Call
from antiphon.serve.happenings import Answer, AnswerBegun, AnswerEnded
from antiphon.serve.history import History
from antiphon.serve.refusals import Refused
from antiphon.serve.sounds import Wire
from antiphon.serve.speaker import Playback, Speaker


class Answers:
    """Gives one answer at a time.

    Args:
        history: where they belong.
        ended: called after each, when another may be given.
    """

    def __init__(self, history: History, ended: Callable[[], Awaitable[None]]) -> None:
        self.history, self.ended = history, ended
        self.current: Answer | None = None
        self.playback = Playback()
        self._by = history.call  # who gives it
        self._giving: asyncio.Task[None] | None = None

    def check_free(self) -> None:
        """Raise Refused if one is being given."""
        if self.current is not None:
            raise Refused("an answer is being given; cancel it first", code="conversation_already_has_active_response")

    def begin(self, answer: Answer, call: Call, form: Wire) -> None:
        """Give an answer.

        Raises:
            Refused: another is being given.
        """
        self.check_free()
        self.current, self._by = answer, call
        self._giving = self.history.background.do(self._give(answer, call, form))

    async def _give(self, answer: Answer, call: Call, form: Wire) -> None:
        """Give an answer from its first event to its last."""
        history = self.history
        speaker = Speaker(history, answer, call, form, self.playback)
        await history.happened(AnswerBegun(answer))
        try:
            events = call.respond(answer.options, ahead=history.house.settings.ahead)
            async with aclosing(history.house.events(events)) as found:
                async for event in found:
                    await speaker.take(event)
        except Exception as error:
            answer.status, answer.error = "failed", error
            await speaker.close()
            if answer.in_conversation:
                history.changed()
        if call is not history.call:
            call.close()
            if answer.in_conversation:
                history.changed()  # it knows nothing of this answer
        await history.happened(AnswerEnded(answer))
        self.current = None
        await self.ended()

    def stop(self, reason: Literal["turn_detected", "client_cancelled"]) -> None:
        """The answer comes to its end within a frame."""
        if self.current is not None:
            self.current.reason = self.current.reason or reason
            self._by.cancel()

    def cancel(self, id: str | None) -> None:
        """Stop the answer, says the client.

        Raises:
            Refused: none is being given, or another.
        """
        if self.current is None or (id is not None and self.current.id != id):
            raise Refused("no answer is being given", code="response_cancel_not_active")
        self.stop("client_cancelled")

    async def until_over(self) -> None:
        """Wait for the end of the answer."""
        if self._giving is not None and self._giving is not asyncio.current_task():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(self._giving)

    def close(self) -> None:
        """Leave the engine."""
        self._by.close()
