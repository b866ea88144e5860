"""What was said: the items of a conversation, and the engine's call that has been told them.

Whatever the call does not hold as the items tell it (an item was deleted, the instructions changed) is told it anew
before the next answer: rare, exact.

Shapes: N samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from antiphon.audio import Samples
from antiphon.engine import Call
from antiphon.engine.engine import RETENTION
from antiphon.errors import AntiphonError, InputError
from antiphon.generate import Reply
from antiphon.serve.background import Background
from antiphon.serve.happenings import Added, Deleted, Faded, Finished, Happening, Item, Manner, Retrieved, Usage
from antiphon.serve.house import House, settled
from antiphon.serve.refusals import Refused
from antiphon.serve.retelling import retell


class Told(NamedTuple):
    """What a conversation begins with, and how much of it is remembered."""

    instructions: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    retention: float | None = RETENTION

    @classmethod
    def by(cls, manner: Manner) -> Told:
        """That of a manner."""
        return cls(manner.instructions, () if manner.choice == "none" else manner.tools, manner.retention)


class History:
    """The items and the call.

    Args:
        house: the engine and what is beside it.
        call: the engine's conversation, just opened.
        happened: tells the client.
        background: takes what nobody waits for.
    """

    def __init__(
        self, house: House, call: Call, happened: Callable[[Happening], Awaitable[None]], background: Background
    ) -> None:
        self.house, self.call, self.happened, self.background = house, call, happened, background
        self.items: list[Item] = []
        self.is_hearing = False  # the call has heard some of a turn that is no item yet
        self._is_true = True  # the call holds what the items say
        self._told: Told | None = Told()  # None: it is being told
        self._telling = asyncio.Lock()
        self._read = 0  # positions that were read by the last answer

    # ----------------------------------------------------------------------------------------- the items

    @property
    def last(self) -> str | None:
        """Id of the last item."""
        return self.items[-1].id if self.items else None

    def find(self, id: str) -> Item:
        """An item.

        Raises:
            Refused: there is none of that id.
        """
        for item in self.items:
            if item.id == id:
                return item
        raise Refused(f"there is no item {id!r}", code="item_retrieve_invalid_item_id", param="item_id")

    def place(self, item: Item, after: str | None) -> int:
        """Where a new item of the client's belongs; `after` is the one before it, "root" the beginning, None the end.

        Raises:
            Refused: its id is taken, it is the result of no call, or there is no such item before it.
        """
        if any(item.id == other.id for other in self.items):
            raise Refused(f"there is an item {item.id!r} already", code="item_create_duplicate_id", param="item.id")
        if item.role == "result" and not any(i.role == "call" and i.call_id == item.call_id for i in self.items):
            raise Refused(f"no function was called as {item.call_id!r}", code="invalid_value", param="item.call_id")
        return len(self.items) if after is None else 0 if after == "root" else self.items.index(self.find(after)) + 1

    async def add(self, item: Item, place: int | None = None, done: bool = True) -> None:
        """An item has its place; what it says the call is told elsewhere."""
        place = len(self.items) if place is None else place
        self.items.insert(place, item)
        faded = self._forget_sound()
        await self.happened(Added(item, self._before(item), done))
        for older in faded:
            await self.happened(Faded(older.id))

    async def finish(self, item: Item) -> None:
        """An item that was being made is whole."""
        if item in self.items:
            await self.happened(Finished(item, self._before(item)))

    async def retrieve(self, id: str) -> None:
        """Show an item.

        Raises:
            Refused: there is none.
        """
        await self.happened(Retrieved(self.find(id)))

    async def delete(self, id: str) -> None:
        """Forget an item.

        Raises:
            Refused: there is none.
        """
        self.items.remove(self.find(id))
        self.changed()
        await self.happened(Deleted(id))

    def _before(self, item: Item) -> str | None:
        place = self.items.index(item)
        return self.items[place - 1].id if place else None

    def _forget_sound(self) -> list[Item]:
        """Keep no more sound than the limit, the oldest goes first: the call has heard it. Items that have less now."""
        over = sum(item.sound_bytes for item in self.items[:-1]) - self.house.settings.history_bytes
        faded = list[Item]()
        for item in self.items[:-1]:
            if over > 0 and item.sound_bytes:
                over -= item.sound_bytes
                faded.append(item)
                for part in item.parts:
                    part.sound = None
        return faded

    # ------------------------------------------------------------------------------------------ the call

    def changed(self) -> None:
        """The call does not hold any more what the items say."""
        self._is_true = False

    def holds(self, manner: Manner) -> bool:
        """Whether the call holds what the items say, for an answer in this manner."""
        return self._is_true and self._told == Told.by(manner)

    async def tell(self, manner: Manner) -> None:
        """Tell the call anew what the items say, unless it holds it.

        Raises:
            AntiphonError: it is too much, or cannot be read.
        """
        async with self._telling:
            if self.holds(manner):
                return
            told, self._told, self._is_true = Told.by(manner), None, True
            window = self.house.settings.live_window
            begun = await asyncio.to_thread(
                self.house.engine.begun, told.instructions, told.tools, window, told.retention
            )
            await settled(self.call.become(begun))
            self._read, self.is_hearing = 0, False
            await retell(self.call, [*self.items])
            self._told = told

    async def tell_more(self, items: Sequence[Item]) -> None:
        """Tell the call what was added at the end."""
        await retell(self.call, items)

    def hear(self, samples: Samples, rate: int) -> None:
        """More of the user's turn [N], for the call."""
        self.is_hearing = True
        self.background.do(self._confirm(self.call.append_audio(samples, rate)))

    async def _confirm(self, heard: Future[None]) -> None:
        """Where the call could not hear it, it is told anew."""
        try:
            await settled(heard)
        except AntiphonError:
            self.changed()

    def end_turn(self, manner: Manner) -> None:
        """The user's turn is over, and an item: as far as the call was told and has heard it, the call keeps it."""
        self.is_hearing = False
        if self.holds(manner):
            self.call.commit()
        else:
            self.changed()

    def forget_turn(self) -> None:
        """The user's turn is void."""
        if self.is_hearing:
            self.changed()
        self.is_hearing = False

    async def cut(self, item: Item, ms: int) -> None:
        """Cut a spoken item to what was heard of it."""
        part = item.parts[0]
        share, whole = ms / max(1.0, 1000 * part.seconds), part.text
        part.sound = (part.sound or bytearray())[: 2 * (ms * part.rate // 1000)]
        try:
            if not self._is_true or self.last != item.id or self.is_hearing:
                raise InputError("other things were said since")
            part.text = await settled(self.call.truncate(ms))
        except AntiphonError:
            words = whole.split(" ")
            part.text = " ".join(words[: int(share * len(words))])
            self.changed()

    def usage(self, call: Call, reply: Reply) -> Usage:
        """Tokens of an answer that is over."""
        session, said = call.session, call.session.answer
        prompt = session.ids[: said.start] if said else []
        audio = prompt.count(session.model.config.audio_token_id)
        cached = 0
        if call is self.call:
            cached, self._read = min(self._read, len(prompt)), len(prompt) + len(reply.text_ids)
        left = session.thinker.capacity - len(session.ids)
        return Usage(len(prompt) - audio, audio, cached, len(reply.text_ids), len(reply.codes), left)
