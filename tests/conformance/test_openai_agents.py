"""openai-agents' realtime session: hands free, interrupted while it speaks, and a tool that it runs."""

import asyncio
import base64
from typing import Any

from agents import function_tool
from agents.realtime import RealtimeAgent, RealtimeRunner
from agents.realtime.model_inputs import (
    RealtimeModelRawClientMessage,
    RealtimeModelSendRawMessage,
)

from tests.conformance.conftest import RATE, Server, check_kept, check_retold

PAUSE = bytes(2 * RATE)
PIECE = 2 * RATE // 25


class Conversation:
    """A session and what it was sent."""

    def __init__(self, session: Any) -> None:
        self.session, self.events = session, session.__aiter__()
        self.raw: list[dict[str, Any]] = []  # events of the server since the last `until`
        self.kinds: list[str] = []  # of the session's own events, likewise
        self.sound = b""
        self.ids: list[str] = []  # of all items
        self.voice = ""  # that the client asks for

    async def say(self, pcm: bytes) -> None:
        for start in range(0, len(pcm), PIECE):
            await self.session.send_audio(pcm[start : start + PIECE])

    async def until(self, *ends: str) -> dict[str, Any]:
        """All events up to those of the server that are named; the last of them."""
        self.raw, self.kinds, self.sound = [], [], b""
        wanted = set(ends)
        while True:
            event = await asyncio.wait_for(anext(self.events), 60)
            self.kinds.append(event.type)
            if event.type == "audio":
                self.sound += event.audio.data
            elif event.type == "error":
                raise AssertionError(event.error)
            elif event.type == "raw_model_event" and event.data.type == "raw_server_event":
                self.raw.append(event.data.data)
                self._note(event.data.data)
                wanted.discard(event.data.data["type"])
                if not wanted:
                    return event.data.data

    def _note(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "conversation.item.added":
                self.ids.append(event["item"]["id"])
            case "session.updated":
                self.voice = event["session"]["audio"]["output"]["voice"]
            case _:
                pass

    async def send(self, kind: str, **fields: Any) -> None:
        message: RealtimeModelRawClientMessage = {"type": kind, "other_data": fields}
        await self.session.model.send_event(RealtimeModelSendRawMessage(message=message))

    async def item(self, id: str) -> dict[str, Any]:
        """An item as the server keeps it; the client itself asks for what was cut."""
        await self.send("conversation.item.retrieve", item_id=id)
        while (kept := await self.until("conversation.item.retrieved"))["item"]["id"] != id:
            pass
        return kept["item"]

    async def choose(self, tool_choice: str) -> None:
        await self.send("session.update", session={"type": "realtime", "tool_choice": tool_choice})

    def one(self, kind: str) -> dict[str, Any]:
        return next(event for event in self.raw if event["type"] == kind)

    def said(self) -> str:
        """What was said in the last answer; its pieces add up to the whole."""
        deltas = [event["delta"] for event in self.raw if event["type"] == "response.output_audio_transcript.delta"]
        assert "".join(deltas) == self.one("response.output_audio_transcript.done")["transcript"]
        return "".join(deltas)


HEARD = "conversation.item.input_audio_transcription.completed"


async def converse(server: Server, questions: list[bytes]) -> None:
    asked: list[int] = []

    @function_tool
    async def set_timer(minutes: int) -> str:
        """Set a timer."""
        asked.append(minutes)
        await c.choose("none")
        return "done"

    settings: Any = {
        "audio": {"input": {"turn_detection": {"type": "server_vad"}, "transcription": {"model": "tiny"}}},
        "tool_choice": "none",
    }
    runner = RealtimeRunner(RealtimeAgent(name="antiphon", tools=[set_timer]))
    how: Any = {"url": server.socket, "api_key": "none", "initial_model_settings": settings}
    async with await runner.run(model_config=how) as session:
        c = Conversation(session)
        await c.say(questions[0] + PAUSE)
        await c.until("response.output_audio.delta")
        heard = c.raw
        await c.say(PAUSE[: RATE // 2] + questions[1])  # while it speaks
        await c.until("conversation.item.truncated")
        assert "audio_interrupted" in c.kinds
        cut = c.one("conversation.item.truncated")
        await c.say(PAUSE)
        heard += c.raw
        await c.until("response.done", HEARD)
        text, sound = c.said(), c.sound
        heard += c.raw
        check_kept(server, await c.item(c.ids[-1]), text, sound)
        first, second = (event for event in heard if event["type"] == HEARD)
        assert cut["item_id"] != second["item_id"]
        for event in (first, second):
            kept = await c.item(event["item_id"])
            assert event["transcript"] == server.heard(base64.b64decode(kept["content"][0]["audio"]))
        await c.choose("required")
        await c.until("session.updated")
        await c.say(questions[2] + PAUSE)
        await c.until("response.done", HEARD)
        await c.until("response.done")
        assert len(asked) == 1
        text, sound = c.said(), c.sound
        history = [item.content[0].transcript for item in session._history if item.type == "message"]
        assert first["transcript"] in history
        assert text in history
        items = [await c.item(id) for id in c.ids]
        check_kept(server, items[-1], text, sound)
    check_retold(server, items, audio={"output": {"voice": c.voice}})


def test_three_spoken_turns_with_barge_in_and_a_tool(server, questions):
    asyncio.run(converse(server, questions))
