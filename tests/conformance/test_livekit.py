"""LiveKit's plugin for OpenAI's Realtime, hands free, interrupted while it speaks, and without a room."""

import asyncio
import base64
import json
from typing import Any

import aiohttp
from livekit import rtc
from livekit.agents import function_tool, llm
from livekit.plugins.openai import realtime
from openai.types.realtime import AudioTranscription, ConversationItemRetrieveEvent
from openai.types.realtime.realtime_audio_input_turn_detection import ServerVad

from tests.conformance.conftest import RATE, Server, check_kept, check_retold

PAUSE = bytes(2 * RATE)
PIECE = 2 * RATE // 25


@function_tool
async def set_timer(minutes: int) -> str:
    """Set a timer."""
    return "done"


async def text_and_sound(generation: llm.GenerationCreatedEvent) -> tuple[str, bytes, list[llm.FunctionCall]]:
    """The text of an answer, its sound, and what it calls."""
    text, sound = "", b""
    async for message in generation.message_stream:
        text += "".join([str(piece) async for piece in message.text_stream])
        sound += b"".join([bytes(frame.data) async for frame in message.audio_stream])
    return text, sound, [call async for call in generation.function_stream]


async def converse(server: Server, questions: list[bytes]) -> None:
    generations: asyncio.Queue[Any] = asyncio.Queue()
    heard: asyncio.Queue[Any] = asyncio.Queue()
    kept: asyncio.Queue[Any] = asyncio.Queue()
    cut: asyncio.Queue[Any] = asyncio.Queue()
    began: asyncio.Queue[Any] = asyncio.Queue()
    ids: list[str] = []  # of all items
    voices: list[str] = []  # that the client asked for

    def raw(event: dict[str, Any]) -> None:
        if event["type"] == "error":  # an answer that the server has cut short itself cannot be cancelled any more
            assert event["error"]["code"] == "response_cancel_not_active", event
        if event["type"] == "conversation.item.truncated":
            cut.put_nowait(event["item_id"])
        if event["type"] == "conversation.item.retrieved":
            kept.put_nowait(event["item"])
        if event["type"] == "session.updated":
            voices.append(event["session"]["audio"]["output"]["voice"])
        if event["type"] == "conversation.item.added":
            ids.append(event["item"]["id"])

    async def next_of(queue: asyncio.Queue[Any]) -> Any:
        return await asyncio.wait_for(queue.get(), 60)

    async with aiohttp.ClientSession() as http:
        model = realtime.RealtimeModel(
            model="tiny",
            base_url=server.url,
            api_key="none",
            http_session=http,
            turn_detection=ServerVad(type="server_vad"),
            input_audio_transcription=AudioTranscription(model="tiny"),
            tool_choice="none",
        )
        session = model.session()
        session.on("generation_created", generations.put_nowait)
        session.on("input_audio_transcription_completed", lambda event: event.is_final and heard.put_nowait(event))
        session.on("openai_server_event_received", raw)
        await session.update_tools([set_timer])
        session.on("input_speech_started", began.put_nowait)

        def say(sound: bytes) -> None:
            for start in range(0, len(sound), PIECE):
                piece = sound[start : start + PIECE]
                session.push_audio(rtc.AudioFrame(piece, RATE, 1, len(piece) // 2))

        async def item_of(id: str) -> dict[str, Any]:
            session.send_event(ConversationItemRetrieveEvent(type="conversation.item.retrieve", item_id=id))
            return await next_of(kept)

        async def written() -> None:
            """What the user said is what the server writes down of the sound that it has kept of it."""
            user = await next_of(heard)
            item = await item_of(user.item_id)
            assert user.transcript == server.heard(base64.b64decode(item["content"][0]["audio"]))

        say(questions[0] + PAUSE)
        await next_of(began)
        first = await next_of(generations)
        message = await asyncio.wait_for(anext(aiter(first.message_stream)), 60)
        await asyncio.wait_for(anext(aiter(message.audio_stream)), 60)
        say(PAUSE[: RATE // 2] + questions[1])  # while it speaks
        await next_of(began)
        session.interrupt()  # as an agent's session does
        session.truncate(message_id=message.message_id, modalities=["audio"], audio_end_ms=80)
        assert await next_of(cut) == message.message_id
        await written()
        say(PAUSE)
        text, sound, calls = await asyncio.wait_for(text_and_sound(await next_of(generations)), 60)
        await written()
        assert not calls
        check_kept(server, await item_of(ids[-1]), text, sound)
        session.update_options(tool_choice="required")
        say(questions[2] + PAUSE)
        *_, calls = await asyncio.wait_for(text_and_sound(await next_of(generations)), 60)
        await written()
        (call,) = calls
        assert call.name == "set_timer"
        assert isinstance(json.loads(call.arguments)["minutes"], int)
        session.update_options(tool_choice="none")
        context = session.chat_ctx.copy()
        context.items.append(
            llm.FunctionCallOutput(call_id=call.call_id, name=call.name, output="done", is_error=False)
        )
        await session.update_chat_ctx(context)
        answer = await asyncio.wait_for(session.generate_reply(), 60)
        text, sound, _ = await asyncio.wait_for(text_and_sound(answer), 60)
        items = [await item_of(id) for id in ids]
        check_kept(server, items[-1], text, sound)
        await session.aclose()
    check_retold(server, items, audio={"output": {"voice": voices[-1]}})


def test_three_spoken_turns_with_barge_in_and_a_tool(server, questions):
    asyncio.run(converse(server, questions))
