"""OpenAI's own client, synchronous and asynchronous: Realtime, chat, transcription and speech."""

import asyncio
import base64
import io
import json
import wave
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.conformance.conftest import (
    FRAME,
    TIMER,
    Server,
    check_kept,
    check_retold,
    check_same,
    spoken,
    told,
    wav,
)

SESSION: Any = {
    "type": "realtime",
    "audio": {"input": {"turn_detection": None, "transcription": {"model": "tiny"}}},
}
TOOL = {"type": "function", **TIMER}
CHAT_TOOL: Any = {"type": "function", "function": TIMER}
DONE = '{"done": true}'


@dataclass
class Turn:
    """What a client was sent in one turn."""

    heard: str = ""
    said: str = ""
    deltas: str = ""
    sound: bytes = b""
    calls: list[Any] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # of its items
    ended: int = 0  # of its two ends: the answer's and the transcription's

    def take(self, event: Any) -> None:
        match event.type:
            case "error":
                raise AssertionError(event.error.message)
            case "conversation.item.input_audio_transcription.completed":
                self.heard, self.ended = event.transcript, self.ended + 1
            case "conversation.item.added":
                self.ids.append(event.item.id)
            case "response.output_audio_transcript.delta":
                self.deltas += event.delta
            case "response.output_audio_transcript.done":
                self.said = event.transcript
            case "response.output_audio.delta":
                self.sound += base64.b64decode(event.delta)
            case "response.done":
                assert event.response.status == "completed"
                self.calls = [item for item in event.response.output if item.type == "function_call"]
                self.ended += 1
            case _:
                pass


def result_of(call: Any) -> Any:
    return {"type": "function_call_output", "call_id": call.call_id, "output": DONE}


def converse(server: Server, questions: Sequence[bytes]) -> tuple[list[Turn], list[dict[str, Any]]]:
    """Two answers, a call, and the answer to its result; and all items."""
    turns: list[Turn] = []
    with server.client().realtime.connect(model="tiny") as connection:

        def take(ends: int) -> None:
            turns.append(turn := Turn())
            while turn.ended < ends:
                turn.take(connection.recv())

        connection.session.update(session=SESSION)
        for question in questions:
            if question is questions[-1]:
                connection.session.update(session={"type": "realtime", "tools": [TOOL], "tool_choice": "required"})  # type: ignore[list-item]
            connection.input_audio_buffer.append(audio=base64.b64encode(question).decode())
            connection.input_audio_buffer.commit()
            connection.response.create()
            take(2)
        connection.conversation.item.create(item=result_of(turns[-1].calls[0]))
        connection.session.update(session={"type": "realtime", "tool_choice": "none"})
        connection.response.create()
        take(1)
        items: list[dict[str, Any]] = []
        for id in (id for turn in turns for id in turn.ids):
            connection.conversation.item.retrieve(item_id=id)
            kept = next(event for event in connection if event.type == "conversation.item.retrieved")
            items.append(kept.item.model_dump(exclude_none=True))
    return turns, items


async def converse_async(server: Server, questions: Sequence[bytes]) -> list[Turn]:
    """The same."""
    turns: list[Turn] = []
    async with server.async_client().realtime.connect(model="tiny") as connection:

        async def take(ends: int) -> None:
            turns.append(turn := Turn())
            while turn.ended < ends:
                turn.take(await connection.recv())

        await connection.session.update(session=SESSION)
        for question in questions:
            if question is questions[-1]:
                tools: Any = {"type": "realtime", "tools": [TOOL], "tool_choice": "required"}
                await connection.session.update(session=tools)
            await connection.input_audio_buffer.append(audio=base64.b64encode(question).decode())
            await connection.input_audio_buffer.commit()
            await connection.response.create()
            await take(2)
        await connection.conversation.item.create(item=result_of(turns[-1].calls[0]))
        await connection.session.update(session={"type": "realtime", "tool_choice": "none"})
        await connection.response.create()
        await take(1)
    return turns


def asked(question: bytes) -> Any:
    """A question as an item."""
    content = [{"type": "input_audio", "audio": base64.b64encode(question).decode()}]
    return {"type": "message", "role": "user", "content": content}


@pytest.fixture(scope="module")
def conversation(server: Server, questions: list[bytes]) -> tuple[list[Turn], list[dict[str, Any]]]:
    return converse(server, questions)


@pytest.fixture(scope="module")
def turns(conversation: tuple[list[Turn], list[dict[str, Any]]]) -> list[Turn]:
    return conversation[0]


def test_three_spoken_turns_and_a_tool(server, questions, conversation):
    turns, items = conversation
    assert [item["type"] for item in items] == [*5 * ["message"], "function_call", "function_call_output", "message"]
    for question, turn in zip(questions, turns, strict=False):
        assert turn.heard == server.heard(question)
        assert turn.heard
    first, second, called, last = turns
    for turn, answer in ((first, items[1]), (second, items[3]), (last, items[7])):
        assert turn.deltas == turn.said
        check_kept(server, answer, turn.said, turn.sound)
    check_retold(server, items[:2])
    check_retold(server, items)
    assert second.said == told(server, [*items[:2], asked(questions[1])])[0]
    (call,) = called.calls
    assert call.name == "set_timer"
    assert isinstance(json.loads(call.arguments)["minutes"], int)
    assert not called.sound, "a call was spoken"


def test_the_asynchronous_client_is_told_the_same(server, questions, turns):
    for one, other in zip(turns, asyncio.run(converse_async(server, questions)), strict=True):
        assert (one.heard, one.said) == (other.heard, other.said)
        check_same(one.sound, other.sound)
        assert [call.arguments for call in one.calls] == [call.arguments for call in other.calls]


def test_chat_streams_what_it_answers_at_once(server, questions, turns):
    how: Any = {"model": "tiny", "messages": [spoken(questions[0])], "modalities": ["text", "audio"]}
    whole = server.client().chat.completions.create(**how, audio={"voice": "ethan", "format": "wav"})
    audio = whole.choices[0].message.audio
    assert audio.transcript
    with wave.open(io.BytesIO(base64.b64decode(audio.data))) as file:
        assert file.getnframes() * 2 >= FRAME
    pieces = server.client().chat.completions.create(**how, audio={"voice": "ethan", "format": "pcm16"}, stream=True)
    deltas = [piece.choices[0].delta.audio for piece in pieces if piece.choices]
    assert "".join(delta.transcript or "" for delta in deltas if delta) == audio.transcript

    async def calls() -> Any:
        tools = {"tools": [CHAT_TOOL], "tool_choice": "required"}
        reply = await server.async_client().chat.completions.create(model="tiny", messages=how["messages"], **tools)
        return reply.choices[0].message.tool_calls

    (call,) = asyncio.run(calls())
    assert isinstance(json.loads(call.function.arguments)["minutes"], int)


def test_transcription_streams_what_it_writes_at_once(server, questions, turns):
    file = ("a.wav", wav(questions[0]))
    events = list(server.client().audio.transcriptions.create(model="tiny", file=file, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "transcript.text.delta")
    assert deltas == events[-1].text == turns[0].heard

    async def whole() -> str:
        return (await server.async_client().audio.transcriptions.create(model="tiny", file=file)).text

    assert asyncio.run(whole()) == turns[0].heard


def test_speech_streams_what_it_says_at_once(server):
    how: Any = {"model": "tiny", "voice": "ethan", "input": "It is Monday", "response_format": "pcm"}
    whole = server.client().audio.speech.create(**how).content
    assert len(whole) >= FRAME

    async def streamed() -> bytes:
        async with server.async_client().audio.speech.with_streaming_response.create(**how) as reply:
            return b"".join([piece async for piece in reply.iter_bytes()])

    assert asyncio.run(streamed()) == whole
