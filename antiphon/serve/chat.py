"""POST /v1/chat/completions.

request ──> Question ──> a call of the engine ──> events ──> Splitter ──> chunks, or one completion
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionAudio, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat import ChatCompletionMessageFunctionToolCall as Called
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaAudio,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_message_function_tool_call import Function
from openai.types.chat.completion_create_params import CompletionCreateParams
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from antiphon.audio import pcm16
from antiphon.chat import ToolCall
from antiphon.engine import Call
from antiphon.generate import AudioDelta, Done, Options, Reply, TextDelta
from antiphon.sampling import GREEDY, THINKER, Sampling
from antiphon.serve.calls import Splitter, arguments_text, guide_of
from antiphon.serve.house import House, house_of, settled, while_connected
from antiphon.serve.refusals import Refused
from antiphon.serve.sounds import MEDIA, decode, whole_file
from antiphon.serve.wire import new_id, read_json, server_event, streamed

KIND = TypeAdapter[CompletionCreateParams](CompletionCreateParams)
# what would change an answer and is not done; harmless wishes (user, metadata, store, …) are passed over
UNSUPPORTED = (
    *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "stop", "prediction"),
    *("functions", "function_call", "web_search_options", "moderation"),
)


@dataclass(frozen=True)
class Question:
    """A request, read and checked."""

    model: str
    system: str | None
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    options: Options
    form: str | None  # of the sound of the answer
    stream: bool
    usage: bool  # also at the end of a stream


async def chat(request: Request) -> Response:
    """The endpoint."""
    house, who = house_of(request), request.state.who
    body = await read_json(request, KIND)
    question = await read_question(house, dict(body), who)
    if question.stream:
        return await streamed(chunks(house, who, question), "text/event-stream")
    completion = await while_connected(request, complete(house, who, question))
    return JSONResponse(completion.model_dump(exclude_unset=True))


# ------------------------------------------------------------------------------------------- the question


async def read_question(house: House, body: Mapping[str, Any], who: str) -> Question:
    """A request.

    Raises:
        Refused, InputError, AudioError: what is asked for cannot be given.
    """
    for name in UNSUPPORTED:
        if body.get(name) not in (None, False, 0, [], {}):
            raise Refused(f"{name} is not supported; leave it out", code="unsupported_parameter", param=name)
    if body.get("n") not in (None, 1):
        raise Refused("one choice is given; leave n at 1", code="unsupported_value", param="n")
    if (body.get("response_format") or {"type": "text"})["type"] != "text":
        raise Refused("answers are text; ask for JSON by a tool", code="unsupported_value", param="response_format")
    messages, left = [], [house.settings.audio_seconds]
    for message in body["messages"]:
        messages.append(await read_message(house, message, who, left))
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    stream, audio = bool(body.get("stream")), "audio" in (body.get("modalities") or ())
    tools, choice = read_tools(body)
    parallel = body.get("parallel_tool_calls", True)
    guide = guide_of(house.model.tokenizer, tools, choice, parallel, "tool_choice")
    return Question(
        model=house.check_model(body["model"]),
        system=system,
        tools=tools,
        messages=messages,
        options=replace(read_options(house, body, who, audio), guide=guide),
        form=read_form(house, body, stream) if audio else None,
        stream=stream,
        usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


async def read_message(house: House, message: Mapping[str, Any], who: str, left: list[float]) -> dict[str, Any]:
    """A message as the engine takes it: sound decoded; `left` is the seconds of it that are still allowed."""
    role, content = message["role"], message.get("content")
    if role == "function":
        raise Refused("the role function is not supported; use tool", code="unsupported_value", param="messages")
    if role == "user" and not isinstance(content, str):
        parts = [await read_part(house, part, left) for part in content or ()]
        return {"role": "user", "content": parts}
    text = content if isinstance(content, str) else "".join(_text(part) for part in content or ())
    if role == "assistant":
        if not text and message.get("audio"):
            text = house.replies.find(message["audio"]["id"], who)
        return {"role": role, "content": text, "tool_calls": message.get("tool_calls") or []}
    return {"role": "system" if role == "developer" else role, "content": text}


async def read_part(house: House, part: Mapping[str, Any], left: list[float]) -> dict[str, Any]:
    """A part of a user's message."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "input_audio":
        raise Refused(f"parts of type {part['type']} are not supported; send text or input_audio", param="messages")
    try:
        data = base64.b64decode(part["input_audio"]["data"], validate=True)
    except (binascii.Error, ValueError):
        told = "input_audio.data is not base64; encode the bytes of the file, without a data: prefix"
        raise Refused(told, code="invalid_value", param="messages") from None
    async with house.decoders:
        samples, rate = await asyncio.to_thread(decode, data, left[0])
    left[0] -= len(samples) / rate
    return {"type": "audio", "audio": (samples, rate)}


def _text(part: Mapping[str, Any]) -> str:
    if part["type"] != "text":
        raise Refused(f"only a user's message may hold {part['type']}", code="invalid_value", param="messages")
    return part["text"]


def read_tools(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The functions that are declared, and which is to be called: auto, none, required, or a name.

    Raises:
        Refused: tools that are no functions, or a choice of another kind.
    """
    choice, tools = body.get("tool_choice") or "auto", body.get("tools") or []
    if any(tool["type"] != "function" for tool in tools):
        raise Refused("only tools of type function are supported", code="unsupported_value", param="tools")
    if isinstance(choice, Mapping):
        if choice["type"] != "function":
            raise Refused("tool_choice names a function", code="unsupported_value", param="tool_choice")
        choice = choice["function"]["name"]
    return ([] if choice == "none" else tools), choice


def read_options(house: House, body: Mapping[str, Any], who: str, audio: bool) -> Options:
    """How to answer."""
    if audio:
        house.check_speech("modalities")
    wanted = (body.get("audio") or {}).get("voice")
    name = wanted["id"] if isinstance(wanted, Mapping) else wanted
    limits = {name: body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None}
    param, most = next(iter(limits.items()), ("", None))
    if most is not None and most < 1:
        raise Refused(f"{param} is {most}; give at least 1", code="invalid_value", param=param)
    return Options(
        voice=house.voices.find(name, who, house.model, "audio.voice") if audio else None,
        audio=audio,
        seed=body.get("seed") or 0,
        text=read_sampling(body),
        **({} if most is None else {"max_text_tokens": most, "max_frames": most}),
    )


def read_sampling(body: Mapping[str, Any]) -> Sampling:
    """How the text is drawn: greedy unless a temperature is given."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is None and top_p is None:
        return THINKER
    return GREEDY if temperature == 0 else Sampling(1.0 if temperature is None else temperature, top_p=top_p or 1.0)


def read_form(house: House, body: Mapping[str, Any], stream: bool) -> str:
    """The format of the answer's sound.

    Raises:
        Refused: none is given, or one that there is not.
    """
    form = (body.get("audio") or {}).get("format", "")
    known = ("pcm16",) if stream else ("pcm16", *(form for form in MEDIA if form != "pcm"))
    if form not in known:
        how = "streamed sound is" if stream else "sound is one of"
        raise Refused(f"{how} {', '.join(known)}; set audio.format", code="unsupported_value", param="audio.format")
    return form


# --------------------------------------------------------------------------------------------- the answer


async def begin(call: Call, question: Question) -> None:
    """Tell the call what was said.

    Raises:
        InputError, AudioError, CapacityError: it cannot be used.
    """
    for message in question.messages:
        await settled(call.append_message(message))


def usage_of(call: Call, reply: Reply) -> CompletionUsage:
    """Tokens, of an answer that is over."""
    answer = call.session.answer
    prompt = call.session.ids[: answer.start] if answer else []
    heard, text, frames = prompt.count(call.session.model.config.audio_token_id), len(reply.text_ids), len(reply.codes)
    return CompletionUsage(
        prompt_tokens=len(prompt),
        completion_tokens=text + frames,
        total_tokens=len(prompt) + text + frames,
        prompt_tokens_details=PromptTokensDetails(audio_tokens=heard, cached_tokens=0),
        completion_tokens_details=CompletionTokensDetails(audio_tokens=frames, reasoning_tokens=0),
    )


def finish_of(reply: Reply, calls: int) -> Any:
    """Why an answer ended."""
    return "tool_calls" if calls else "length" if reply.finish == "length" else "stop"


async def complete(house: House, who: str, question: Question) -> ChatCompletion:
    """The whole answer at once."""
    async with house.call(system=question.system, tools=question.tools) as call:
        await begin(call, question)
        reply = await house.reply(call.respond(question.options))
        usage = usage_of(call, reply)
    parts = [*_both(Splitter(), reply.text)]
    text = "".join(part for part in parts if isinstance(part, str))
    calls = [_called(part) for part in parts if isinstance(part, ToolCall)]
    message = ChatCompletionMessage(role="assistant", content=text or None, refusal=None)
    if calls:
        message.tool_calls = [*calls]
    if question.form is not None and len(reply.audio):
        message.audio, message.content = await spoken(house, who, question.form, reply, text), None
    choice = Choice(index=0, message=message, finish_reason=finish_of(reply, len(calls)), logprobs=None)
    return ChatCompletion(
        id=new_id("chatcmpl"),
        object="chat.completion",
        created=int(time.time()),
        model=question.model,
        choices=[choice],
        usage=usage,
    )


async def spoken(house: House, who: str, form: str, reply: Reply, text: str) -> ChatCompletionAudio:
    """An answer's sound, as a file."""
    name = "pcm" if form == "pcm16" else form
    data = await asyncio.to_thread(whole_file, name, reply.audio, reply.sample_rate)
    id = new_id("audio")
    until = house.replies.add(id, who, text)
    return ChatCompletionAudio(id=id, data=base64.b64encode(data).decode(), expires_at=until, transcript=text)


def _both(splitter: Splitter, text: str) -> Iterator[str | ToolCall]:
    yield from splitter.push(text)
    yield from splitter.flush()


def _called(call: ToolCall) -> Called:
    return Called(id=new_id("call"), type="function", function=Function(name=call.name, arguments=arguments_text(call)))


# ------------------------------------------------------------------------------------------- streamed


async def chunks(house: House, who: str, question: Question) -> AsyncIterator[bytes]:
    """The answer as it comes, as server-sent events."""
    begun, id, audio_id = int(time.time()), new_id("chatcmpl"), new_id("audio")

    def chunk(choices: Sequence[ChunkChoice], **more: Any) -> bytes:
        made = ChatCompletionChunk(
            id=id, object="chat.completion.chunk", created=begun, model=question.model, choices=[*choices], **more
        )
        return server_event(made)

    def delta(finish: Any = None, **what: Any) -> bytes:
        return chunk([ChunkChoice(index=0, delta=ChoiceDelta(**what), finish_reason=finish)])

    def said(part: str | ToolCall, index: int) -> bytes:
        if isinstance(part, ToolCall):
            function = ChoiceDeltaToolCallFunction(name=part.name, arguments=arguments_text(part))
            tool = ChoiceDeltaToolCall(index=index, id=new_id("call"), type="function", function=function)
            return delta(tool_calls=[tool])
        if question.form is None:
            return delta(content=part)
        return delta(audio=ChoiceDeltaAudio(id=audio_id, transcript=part))

    text, calls, splitter = "", 0, Splitter()
    async with house.call(system=question.system, tools=question.tools) as call:
        await begin(call, question)
        answer = call.respond(question.options)
        async with aclosing(house.events(answer)) as events:
            async for event in events:
                if isinstance(event, AudioDelta):
                    data = base64.b64encode(pcm16(event.samples)).decode()
                    yield delta(audio=ChoiceDeltaAudio(id=audio_id, data=data))
                    continue
                if calls == 0 and not text and isinstance(event, TextDelta):
                    yield delta(role="assistant", content="" if question.form is None else None)
                for part in splitter.push(event.text) if isinstance(event, TextDelta) else splitter.flush():
                    yield said(part, calls)
                    calls += isinstance(part, ToolCall)
                    text += part if isinstance(part, str) else ""
                if isinstance(event, Done):
                    if question.form is not None and text:
                        until = house.replies.add(audio_id, who, text)
                        yield delta(audio=ChoiceDeltaAudio(id=audio_id, expires_at=until))
                    yield delta(finish_of(event.reply, calls))
                    if question.usage:
                        yield chunk([], usage=usage_of(call, event.reply))
    yield server_event("[DONE]")
