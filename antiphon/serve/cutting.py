"""Barge-in: an answer that the user speaks into stops, and is cut to what was heard of it.

What was heard is told by our clock, unless the client says better in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from antiphon.serve.answers import Answers
from antiphon.serve.happenings import Item, Truncated
from antiphon.serve.history import History
from antiphon.serve.refusals import Refused

PATIENCE = 0.4  # seconds that a client which was interrupted has to say how much of the answer was heard


@dataclass
class Cut:
    """An item that is to be cut."""

    item: Item
    ms: int
    told: asyncio.Event = field(default_factory=asyncio.Event)


class Cutting:
    """Cuts answers.

    Args:
        history: where they stand.
        answers: the one that is being given, and what of it is heard.
        done: called when an answer was cut, and the call may hear again.
    """

    def __init__(self, history: History, answers: Answers, done: Callable[[], None]) -> None:
        self.history, self.answers, self.done = history, answers, done
        self._cut: Cut | None = None
        self._whole: tuple[Item, int] | None = None  # what was cut last by our clock, and ms of sound that it had
        self._cutting: asyncio.Task[None] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether an answer is to be cut: until then the call must hear nothing."""
        return self._cut is not None

    def interrupt(self) -> None:
        """The user speaks."""
        answer, playback = self.answers.current, self.answers.playback
        if answer is not None and not answer.in_conversation:
            return
        self.answers.stop("turn_detected")
        item = playback.item
        if item is None or self._cut is not None:
            return
        if item in answer.items if answer is not None else playback.left:
            self._cut = Cut(item, round(1000 * playback.heard))
            self._cutting = self.history.background.do(self._cut_off(self._cut))

    async def _cut_off(self, cut: Cut) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(cut.told.wait(), PATIENCE)
        await self.answers.until_over()
        whole = cut.item.parts[0].ms
        self._whole = cut.item, whole
        await self.history.cut(cut.item, min(cut.ms, whole))
        self._cut, self.answers.playback.item = None, None
        self.done()

    async def finish(self) -> None:
        """Cut at once what is to be cut."""
        if self._cut is not None and self._cutting is not None:
            self._cut.told.set()
            await self._cutting

    async def truncate(self, id: str, ms: int) -> None:
        """Cut an answer to what was heard of it, says the client; if that comes late, what we cut already stays cut.

        Raises:
            Refused: no such answer, or it is shorter.
        """
        item, answer = self.history.find(id), self.answers.current
        if item.role != "assistant" or not item.parts or item.parts[0].sound is None:
            raise Refused(f"{id} is no spoken answer", code="invalid_value", param="item_id")
        if answer is not None and item in answer.items:
            self.answers.stop("client_cancelled")
            await self.answers.until_over()
        left = item.parts[0].ms
        most = self._whole[1] if self._whole is not None and self._whole[0] is item else left
        if not 0 <= ms <= most:
            raise Refused(f"{id} has {most} ms of sound", code="invalid_value", param="audio_end_ms")
        if self._cut is not None and self._cut.item is item:
            self._cut.ms = ms
            await self.finish()
        if ms < item.parts[0].ms:  # also where our clock was already at it
            await self.history.cut(item, ms)
        await self.history.happened(Truncated(id, min(ms, left)))
