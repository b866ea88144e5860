"""A question in writing to `antiphon serve`, by a pipeline of pipecat's: prints the answer.

pip install 'pipecat-ai[openai]'
"""

import asyncio
from typing import Any

from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService as Service
from pipecat.workers.runner import WorkerRunner

service = Service(api_key="none", base_url="ws://127.0.0.1:8000/v1/realtime", settings=Service.Settings(model="tiny"))
pair = LLMContextAggregatorPair(LLMContext([{"role": "user", "content": "What is three plus four?"}]))
pipeline = Pipeline([pair.user(), service, pair.assistant()])  # between a transport's input() and output()


async def main() -> None:
    """Ask, and leave after the answer."""
    worker, runner = PipelineWorker(pipeline), WorkerRunner()

    @pair.assistant().event_handler("on_assistant_turn_stopped")
    async def said(aggregator: LLMContextAggregatorPair, message: Any) -> None:
        print(message.content)
        await worker.cancel()

    await runner.add_workers(worker)
    await worker.queue_frame(LLMRunFrame())
    await runner.run()


asyncio.run(main())
