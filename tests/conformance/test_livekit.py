"""LiveKit's plugin for OpenAI's Realtime, hands free and without a room."""

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

from tests.conformance.conftest import RATE, Server

PAUSE = bytes(2 * RATE)
PIECE = 2 * RATE // 25


@function_tool
async def set_timer(minutes: int) -> str:
    """Set a timer."""
    return "done"


async def text_and_sound(generation: llm.GenerationCreatedEvent) -> tuple[str, int, list[llm.FunctionCall]]:
    """The text of an answer, how many samples of sound it has, and what it calls."""
    text, samples = "", 0
    async for message in generation.message_stream:
        text += "".join([str(piece) async for piece in message.text_stream])
        samples += sum([frame.samples_per_channel async for frame in message.audio_stream])
    return text, samples, [call async for call in generation.function_stream]


async def converse(server: Server, questions: list[bytes]) -> None:
    generations: asyncio.Queue[Any] = asyncio.Queue()
    heard: asyncio.Queue[Any] = asyncio.Queue()
    kept: asyncio.Queue[Any] = asyncio.Queue()
    done: list[str] = []  # texts of answers as the server gives them at the end

    def raw(event: dict[str, Any]) -> None:
        assert event["type"] != "error", event
        if event["type"] == "conversation.item.retrieved":
            kept.put_nowait(event["item"])
        if event["type"] == "response.output_audio_transcript.done":
            done.append(event["transcript"])

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
        for i, question in enumerate(questions):
            if i == 2:
                session.update_options(tool_choice="required")
            sound = question + PAUSE
            for start in range(0, len(sound), PIECE):
                piece = sound[start : start + PIECE]
                session.push_audio(rtc.AudioFrame(piece, RATE, 1, len(piece) // 2))
            text, samples, calls = await asyncio.wait_for(text_and_sound(await next_of(generations)), 60)
            written = await next_of(heard)
            session.send_event(
                ConversationItemRetrieveEvent(type="conversation.item.retrieve", item_id=written.item_id)
            )
            item = await next_of(kept)
            assert written.transcript == server.heard(base64.b64decode(item["content"][0]["audio"]))
            if i < 2:
                assert text == done[-1] != ""
                assert samples > 2400
                assert not calls
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
        text, samples, _ = await asyncio.wait_for(text_and_sound(answer), 60)
        assert text == done[-1] != ""
        assert samples > 2400
        await session.aclose()


def test_three_spoken_turns_and_a_tool(server, questions):
    asyncio.run(converse(server, questions))
