"""pipecat's OpenAI Realtime service in a pipeline: hands free, interrupted while it speaks, and a tool that it runs."""

import asyncio
import base64
from typing import Any

from pipecat.adapters.llm.schemas.function_schema import FunctionSchema
from pipecat.adapters.llm.schemas.tools_schema import ToolsSchema
from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.openai.realtime import events
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.workers.runner import WorkerRunner

from tests.conformance.conftest import RATE, TIMER, Server, check_kept, check_retold

PAUSE = bytes(2 * RATE)
PIECE = 2 * RATE // 25
LIMIT = 60  # tokens: tiny's answer to a tool's result may have no end


class Watch(FrameProcessor):
    """What passes by, both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        self.frames.put_nowait(frame)
        await self.push_frame(frame, direction)

    async def until(self, *kinds: type[Frame]) -> list[Frame]:
        """All frames up to one of these."""
        seen: list[Frame] = []
        while not (seen and isinstance(seen[-1], kinds)):
            seen.append(await asyncio.wait_for(self.frames.get(), 60))
            assert not isinstance(seen[-1], ErrorFrame), seen[-1].error
        return seen


def said(frames: list[Frame]) -> str:
    return "".join(frame.text for frame in frames if isinstance(frame, TTSTextFrame))


def sound(frames: list[Frame]) -> bytes:
    return b"".join(frame.audio for frame in frames if isinstance(frame, TTSAudioRawFrame))


async def converse(server: Server, questions: list[bytes]) -> None:
    asked: list[int] = []
    tool = FunctionSchema(TIMER["name"], TIMER["description"], TIMER["parameters"]["properties"], ["minutes"])
    properties = events.SessionProperties(
        audio=events.AudioConfiguration(
            input=events.AudioInput(
                transcription=events.InputAudioTranscription(model="tiny"), turn_detection=events.TurnDetection()
            )
        ),
        tools=ToolsSchema(standard_tools=[tool]),
        tool_choice="none",
        max_output_tokens=LIMIT,
    )
    service = OpenAIRealtimeLLMService(
        api_key="none",
        base_url=f"ws://{server.host}/v1/realtime",
        settings=OpenAIRealtimeLLMService.Settings(model="tiny", session_properties=properties),
    )

    async def choose(tool_choice: Any) -> None:
        update = events.SessionUpdateEvent(session=events.SessionProperties(tool_choice=tool_choice))
        await service.send_client_event(update)

    async def set_timer(params: Any) -> None:
        asked.append(params.arguments["minutes"])
        await choose("none")
        await params.result_callback({"done": True})

    service.register_function("set_timer", set_timer)
    ids: list[str] = []  # of all items
    service.add_event_handler("on_conversation_item_created", lambda service, id, item: ids.append(id))

    async def item_of(id: str) -> dict[str, Any]:
        return (await service.retrieve_conversation_item(id)).model_dump(exclude_none=True)

    pair = LLMContextAggregatorPair(LLMContext())
    before, after = Watch(), Watch()
    pipeline = Pipeline([pair.user(), before, service, after, pair.assistant()])
    worker = PipelineWorker(pipeline, params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE))
    heard: list[tuple[str, str]] = []  # item and what it says

    async def say(pcm: bytes) -> None:
        for start in range(0, len(pcm), PIECE):
            await worker.queue_frame(InputAudioRawFrame(pcm[start : start + PIECE], RATE, 1))

    async def written() -> None:
        """What the user said last is written down."""
        *_, frame = await before.until(TranscriptionFrame)
        assert isinstance(frame, TranscriptionFrame)
        heard.append((frame.result.item_id, frame.text))

    async def talk() -> list[dict[str, Any]]:
        """Three turns; all items of the conversation."""
        await say(questions[0] + PAUSE)
        await after.until(TTSAudioRawFrame)
        await written()
        await say(PAUSE[: RATE // 2] + questions[1])  # while it speaks
        await after.until(InterruptionFrame)
        await say(PAUSE)
        await written()
        answer: list[Frame] = []
        while not said(answer):
            answer = await after.until(LLMFullResponseEndFrame)
        check_kept(server, await item_of(ids[-1]), said(answer), sound(answer))
        await choose("required")
        await say(questions[2] + PAUSE)
        await written()
        while not asked:
            await after.until(LLMFullResponseEndFrame)
        answer = []
        while not said(answer):
            answer = await after.until(LLMFullResponseEndFrame)
        assert len(asked) == 1
        for id, text in heard:
            item = await item_of(id)
            assert text == server.heard(base64.b64decode(item["content"][0]["audio"]))
        messages = [message for message in pair.user().context.get_messages() if message["role"] == "assistant"]
        assert said(answer) in [message.get("content") for message in messages]
        items = [await item_of(id) for id in ids]
        check_kept(server, items[-1], said(answer), sound(answer))
        return items

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    try:
        items = await talk()
    finally:
        await worker.cancel()
        await running
    check_retold(server, items, max_output_tokens=LIMIT)


def test_three_spoken_turns_with_barge_in_and_a_tool(server, questions):
    asyncio.run(converse(server, questions))
