"""An answer as it is given: the engine's events become items of the conversation, and happenings.

Shapes: N samples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from antiphon.audio import Samples, pcm16
from antiphon.chat import ToolCall
from antiphon.engine import Call
from antiphon.generate import AudioDelta, Done, Reply, TextDelta
from antiphon.serve.calls import Splitter, arguments_text
from antiphon.serve.happenings import Answer, Item, OutputBegun, OutputEnded, Part, Said, Sounded
from antiphon.serve.history import History
from antiphon.serve.sounds import Wire, WireOut
from antiphon.serve.wire import new_id


@dataclass
class Playback:
    """The spoken item that the user hears, by our clock: it is played as it comes."""

    item: Item | None = None
    begun: float = 0.0  # when the first of it could be heard
    seconds: float = 0.0  # of it that have been sent

    @property
    def heard(self) -> float:
        """Seconds of it that have been heard by now, if so many were sent."""
        return time.perf_counter() - self.begun

    @property
    def left(self) -> float:
        """Seconds until all that was sent has been heard."""
        return max(0.0, self.seconds - self.heard)


class Speaker:
    """Turns the engine's events of one answer into items."""

    def __init__(self, history: History, answer: Answer, call: Call, form: Wire, playback: Playback) -> None:
        self.history, self.answer, self.call, self.playback = history, answer, call, playback
        self.form: Wire = form
        self.splitter = Splitter()
        self.message: Item | None = None
        self.begun = 0.0  # when the first sound was sent
        self.out: WireOut | None = None

    async def take(self, event: TextDelta | AudioDelta | Done) -> None:
        """One more event."""
        if isinstance(event, TextDelta):
            for part in self.splitter.push(event.text):
                await (self.call_tool(part) if isinstance(part, ToolCall) else self.say(part))
        elif isinstance(event, AudioDelta):
            await self.sound(event.samples, event.sample_rate)
        else:
            for part in self.splitter.flush():
                await (self.call_tool(part) if isinstance(part, ToolCall) else self.say(part))
            await self.end(event.reply)

    async def open(self) -> tuple[Item, int]:
        """The message, and its place among the answer's items."""
        if self.message is None:
            code2wav = self.call.session.model.config.code2wav
            part = Part("", bytearray(), code2wav.sample_rate) if self.answer.options.audio and code2wav else Part()
            self.message = Item(new_id("item"), "assistant", [part], "in_progress")
            await self.begin(self.message)
        return self.message, self.answer.items.index(self.message)

    async def say(self, text: str) -> None:
        """More text for people."""
        item, place = await self.open()
        item.parts[0].text += text
        await self.history.happened(Said(self.answer, item, place, text))

    async def sound(self, samples: Samples, rate: int, final: bool = False) -> None:
        """More sound [N]."""
        item, place = await self.open()
        self.begun = self.begun or time.perf_counter()
        self.out = self.out or WireOut(self.form, rate)
        part = item.parts[0]
        assert part.sound is not None
        part.sound += pcm16(samples)
        self.playback.item, self.playback.begun, self.playback.seconds = item, self.begun, part.seconds
        if data := self.out.push(samples, final):
            await self.history.happened(Sounded(self.answer, item, place, data))

    async def call_tool(self, call: ToolCall) -> None:
        """A function is to be called."""
        item = Item(new_id("item"), "call", status="in_progress", name=call.name, call_id=new_id("call"))
        await self.begin(item)
        item.text = arguments_text(call)
        await self.history.happened(Said(self.answer, item, len(self.answer.items) - 1, item.text))
        item.status = "completed"
        await self.finish(item)

    async def begin(self, item: Item) -> None:
        """An item of the answer begins."""
        self.answer.items.append(item)
        await self.history.happened(OutputBegun(self.answer, item, len(self.answer.items) - 1))
        if self.answer.in_conversation:
            await self.history.add(item, done=False)

    async def finish(self, item: Item) -> None:
        """An item of the answer is whole."""
        await self.history.happened(OutputEnded(self.answer, item, self.answer.items.index(item)))
        if self.answer.in_conversation:
            await self.history.finish(item)

    async def end(self, reply: Reply) -> None:
        """The answer is over."""
        answer = self.answer
        if self.out is not None and reply.finish != "cancelled":
            await self.sound(np.zeros(0, np.float32), reply.sample_rate, final=True)
        answer.usage = self.history.usage(self.call, reply)
        if reply.finish == "cancelled":
            answer.status, answer.reason = "cancelled", answer.reason or "client_cancelled"
        elif reply.finish == "length":
            answer.status, answer.reason = "incomplete", "max_output_tokens"
        else:
            answer.status, answer.reason = "completed", None
        await self.close()

    async def close(self) -> None:
        """End the message."""
        if self.message is not None:
            self.message.status = "completed" if self.answer.status == "completed" else "incomplete"
            await self.finish(self.message)
