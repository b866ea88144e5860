"""Happenings as the server events of OpenAI's Realtime protocol, and items in both directions."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from openai.types import realtime as wire
from openai.types.realtime import conversation_item_input_audio_transcription_completed_event as completed
from openai.types.realtime import conversation_item_input_audio_transcription_failed_event as failed
from openai.types.realtime import rate_limits_updated_event as limits
from openai.types.realtime import realtime_conversation_item_assistant_message as assistant
from openai.types.realtime import realtime_conversation_item_system_message as system
from openai.types.realtime import realtime_conversation_item_user_message as user
from openai.types.realtime import realtime_response_status as status
from openai.types.realtime import response_content_part_added_event as part_added
from openai.types.realtime import response_content_part_done_event as part_done
from openai.types.realtime.realtime_response_usage_input_token_details import RealtimeResponseUsageInputTokenDetails
from openai.types.realtime.realtime_response_usage_output_token_details import RealtimeResponseUsageOutputTokenDetails
from openai.types.realtime.realtime_server_event import ConversationItemRetrieved
from pydantic import BaseModel, TypeAdapter

from antiphon.audio import pcm16
from antiphon.serve.happenings import (
    Added,
    Answer,
    AnswerBegun,
    AnswerEnded,
    Cleared,
    Committed,
    Deleted,
    Faded,
    Finished,
    Happening,
    Heard,
    HeardMore,
    Item,
    NotHeard,
    OutputBegun,
    OutputEnded,
    Part,
    Problem,
    Retrieved,
    Said,
    Sounded,
    SpeechStarted,
    SpeechStopped,
    TimedOut,
    Truncated,
)
from antiphon.serve.refusals import Refused, refusal
from antiphon.serve.sounds import Wire, from_wire, wire_rate
from antiphon.serve.wire import checked, new_id

ITEM = TypeAdapter[wire.ConversationItem](wire.ConversationItem)


class Scribe:
    """Writes what happens in one session."""

    def __init__(self, conversation: str) -> None:
        self.conversation = conversation  # its id
        self._opened = set[str]()  # items whose content part was announced

    def write(self, happening: Happening) -> Iterator[BaseModel]:
        """The events of one happening, in order."""
        match happening:
            case SpeechStarted(item, ms):
                kind = "input_audio_buffer.speech_started"
                yield wire.InputAudioBufferSpeechStartedEvent(
                    type=kind, event_id=_id(), item_id=item, audio_start_ms=ms
                )
            case SpeechStopped(item, ms):
                kind = "input_audio_buffer.speech_stopped"
                yield wire.InputAudioBufferSpeechStoppedEvent(type=kind, event_id=_id(), item_id=item, audio_end_ms=ms)
            case TimedOut(item, start, stop):
                kind = "input_audio_buffer.timeout_triggered"
                yield wire.InputAudioBufferTimeoutTriggered(
                    type=kind, event_id=_id(), item_id=item, audio_start_ms=start, audio_end_ms=stop
                )
            case Committed(item, after):
                kind = "input_audio_buffer.committed"
                yield wire.InputAudioBufferCommittedEvent(
                    type=kind, event_id=_id(), item_id=item, previous_item_id=after
                )
            case Cleared():
                yield wire.InputAudioBufferClearedEvent(type="input_audio_buffer.cleared", event_id=_id())
            case HeardMore() | Heard() | NotHeard():
                yield from self._heard(happening)
            case Faded():
                return  # the protocol has no word for it
            case Added() | Finished() | Truncated() | Deleted() | Retrieved():
                yield from self._items(happening)
            case Problem(error):
                yield problem(refusal(error))
            case _:
                yield from self._answer(happening)

    def _items(self, happening: Added | Finished | Truncated | Deleted | Retrieved) -> Iterator[BaseModel]:
        match happening:
            case Added(item, after, done):
                kind = "conversation.item.added"
                yield wire.ConversationItemAdded(
                    type=kind, event_id=_id(), item=wire_item(item), previous_item_id=after
                )
                if done:
                    yield from self._items(Finished(item, after))
            case Finished(item, after):
                kind = "conversation.item.done"
                yield wire.ConversationItemDone(type=kind, event_id=_id(), item=wire_item(item), previous_item_id=after)
            case Truncated(id, ms):
                kind = "conversation.item.truncated"
                yield wire.ConversationItemTruncatedEvent(
                    type=kind, event_id=_id(), item_id=id, content_index=0, audio_end_ms=ms
                )
            case Deleted(id):
                yield wire.ConversationItemDeletedEvent(type="conversation.item.deleted", event_id=_id(), item_id=id)
            case Retrieved(item):
                kind = "conversation.item.retrieved"
                yield ConversationItemRetrieved(type=kind, event_id=_id(), item=wire_item(item, sound=True))

    def _heard(self, happening: HeardMore | Heard | NotHeard) -> Iterator[BaseModel]:
        match happening:
            case HeardMore(item, text):
                kind = "conversation.item.input_audio_transcription.delta"
                yield wire.ConversationItemInputAudioTranscriptionDeltaEvent(
                    type=kind, event_id=_id(), item_id=item, content_index=0, delta=text
                )
            case Heard(item, text, heard, asked, said):
                kind = "conversation.item.input_audio_transcription.completed"
                usage = completed.UsageTranscriptTextUsageTokens(
                    type="tokens",
                    input_tokens=heard + asked,
                    output_tokens=said,
                    total_tokens=heard + asked + said,
                    input_token_details=completed.UsageTranscriptTextUsageTokensInputTokenDetails(
                        audio_tokens=heard, text_tokens=asked
                    ),
                )
                yield wire.ConversationItemInputAudioTranscriptionCompletedEvent(
                    type=kind, event_id=_id(), item_id=item, content_index=0, transcript=text, usage=usage
                )
            case NotHeard(item, error):
                told = refusal(error)
                kind = "conversation.item.input_audio_transcription.failed"
                yield wire.ConversationItemInputAudioTranscriptionFailedEvent(
                    type=kind,
                    event_id=_id(),
                    item_id=item,
                    content_index=0,
                    error=failed.Error(type=told.kind, code=told.code, message=told.message),
                )

    def _answer(
        self, happening: AnswerBegun | OutputBegun | Said | Sounded | OutputEnded | AnswerEnded
    ) -> Iterator[BaseModel]:
        match happening:
            case AnswerBegun(answer):
                yield wire.ResponseCreatedEvent(
                    type="response.created", event_id=_id(), response=self._response(answer)
                )
            case OutputBegun(answer, item, place):
                yield wire.ResponseOutputItemAddedEvent(
                    type="response.output_item.added",
                    event_id=_id(),
                    response_id=answer.id,
                    output_index=place,
                    item=wire_item(item),
                )
            case Said(answer, item, place, text):
                yield from self._said(answer, item, place, text)
            case Sounded(answer, item, place, data):
                yield from self._open(answer, item, place)
                yield wire.ResponseAudioDeltaEvent(
                    type="response.output_audio.delta",
                    delta=base64.b64encode(data).decode(),
                    **_where(answer, item, place),
                )
            case OutputEnded(answer, item, place):
                yield from self._ended(answer, item, place)
            case AnswerEnded(answer):
                yield wire.ResponseDoneEvent(type="response.done", event_id=_id(), response=self._response(answer))
                if answer.usage is not None:
                    left, used = answer.usage.left, answer.usage.text_in + answer.usage.audio_in
                    limit = limits.RateLimit(name="tokens", limit=left + used, remaining=max(0, left), reset_seconds=0)
                    yield wire.RateLimitsUpdatedEvent(type="rate_limits.updated", event_id=_id(), rate_limits=[limit])

    def _said(self, answer: Answer, item: Item, place: int, text: str) -> Iterator[BaseModel]:
        if item.role == "call":
            yield wire.ResponseFunctionCallArgumentsDeltaEvent(
                type="response.function_call_arguments.delta",
                call_id=item.call_id,
                delta=text,
                **_output(answer, item, place),
            )
            return
        yield from self._open(answer, item, place)
        if item.parts[0].sound is None:
            yield wire.ResponseTextDeltaEvent(
                type="response.output_text.delta", delta=text, **_where(answer, item, place)
            )
        else:
            yield wire.ResponseAudioTranscriptDeltaEvent(
                type="response.output_audio_transcript.delta", delta=text, **_where(answer, item, place)
            )

    def _open(self, answer: Answer, item: Item, place: int) -> Iterator[BaseModel]:
        """Announce an item's content, before the first of it."""
        if item.id in self._opened:
            return
        self._opened.add(item.id)
        is_text = item.parts[0].sound is None
        part = part_added.Part(type="text", text="") if is_text else part_added.Part(type="audio", transcript="")
        yield wire.ResponseContentPartAddedEvent(
            type="response.content_part.added", part=part, **_where(answer, item, place)
        )

    def _ended(self, answer: Answer, item: Item, place: int) -> Iterator[BaseModel]:
        if item.role == "call":
            yield wire.ResponseFunctionCallArgumentsDoneEvent(
                type="response.function_call_arguments.done",
                call_id=item.call_id,
                name=item.name,
                arguments=item.text,
                **_output(answer, item, place),
            )
        elif item.id in self._opened:
            self._opened.discard(item.id)
            yield from _part_done(answer, item, place)
        yield wire.ResponseOutputItemDoneEvent(
            type="response.output_item.done",
            event_id=_id(),
            response_id=answer.id,
            output_index=place,
            item=wire_item(item),
        )

    def _response(self, answer: Answer) -> wire.RealtimeResponse:
        response = wire.RealtimeResponse(
            id=answer.id,
            object="realtime.response",
            status=answer.status,
            status_details=_details(answer),
            output=[wire_item(item) for item in answer.items],
            output_modalities=["audio" if answer.options.audio else "text"],
            conversation_id=self.conversation if answer.in_conversation else None,
            metadata=answer.metadata,
            usage=None,
        )
        if answer.usage is not None:
            used = answer.usage
            read, made = used.text_in + used.audio_in, used.text_out + used.audio_out
            response.usage = wire.RealtimeResponseUsage(
                input_tokens=read,
                output_tokens=made,
                total_tokens=read + made,
                input_token_details=RealtimeResponseUsageInputTokenDetails(
                    text_tokens=used.text_in, audio_tokens=used.audio_in, cached_tokens=used.cached
                ),
                output_token_details=RealtimeResponseUsageOutputTokenDetails(
                    text_tokens=used.text_out, audio_tokens=used.audio_out
                ),
            )
        return response


def problem(error: Refused, event: str | None = None) -> wire.RealtimeErrorEvent:
    """An error event; `event` is the id of the client's event that it is about."""
    about = wire.RealtimeError(
        type=error.kind, code=error.code, message=error.message, param=error.param, event_id=event
    )
    return wire.RealtimeErrorEvent(type="error", event_id=_id(), error=about)


def _details(answer: Answer) -> status.RealtimeResponseStatus | None:
    match answer.status:
        case "in_progress":
            return None
        case "failed":
            told = refusal(answer.error or Exception())
            return status.RealtimeResponseStatus(type="failed", error=status.Error(type=told.kind, code=told.code))
        case "completed":
            return status.RealtimeResponseStatus(type="completed")
        case kind:
            return status.RealtimeResponseStatus(type=kind, reason=answer.reason)


def _part_done(answer: Answer, item: Item, place: int) -> Iterator[BaseModel]:
    where, part = _where(answer, item, place), item.parts[0]
    if part.sound is None:
        yield wire.ResponseTextDoneEvent(type="response.output_text.done", text=part.text, **where)
        done = part_done.Part(type="text", text=part.text)
    else:
        yield wire.ResponseAudioDoneEvent(type="response.output_audio.done", **where)
        where = _where(answer, item, place)
        yield wire.ResponseAudioTranscriptDoneEvent(
            type="response.output_audio_transcript.done", transcript=part.text, **where
        )
        done = part_done.Part(type="audio", transcript=part.text)
    yield wire.ResponseContentPartDoneEvent(type="response.content_part.done", part=done, **_where(answer, item, place))


def _id() -> str:
    return new_id("event")


def _output(answer: Answer, item: Item, place: int) -> dict[str, Any]:
    return {"event_id": _id(), "response_id": answer.id, "item_id": item.id, "output_index": place}


def _where(answer: Answer, item: Item, place: int) -> dict[str, Any]:
    return {**_output(answer, item, place), "content_index": 0}


# ------------------------------------------------------------------------------------------------- items


def wire_item(item: Item, sound: bool = False) -> wire.ConversationItem:
    """An item on the wire; with its sound only when that is asked for."""
    common: dict[str, Any] = {"id": item.id, "object": "realtime.item", "status": item.status}
    match item.role:
        case "user":
            content = [_heard_part(part, sound) for part in item.parts]
            return wire.RealtimeConversationItemUserMessage(type="message", role="user", content=content, **common)
        case "assistant":
            said = [_said_part(part, sound) for part in item.parts if part.text or part.sound]
            return wire.RealtimeConversationItemAssistantMessage(
                type="message", role="assistant", content=said, **common
            )
        case "system":
            told = [system.Content(type="input_text", text=part.text) for part in item.parts]
            return wire.RealtimeConversationItemSystemMessage(type="message", role="system", content=told, **common)
        case "call":
            return wire.RealtimeConversationItemFunctionCall(
                type="function_call", name=item.name, call_id=item.call_id, arguments=item.text, **common
            )
        case "result":
            return wire.RealtimeConversationItemFunctionCallOutput(
                type="function_call_output", call_id=item.call_id, output=item.text, **common
            )


def _heard_part(part: Part, sound: bool) -> user.Content:
    if part.sound is None and not part.rate:
        return user.Content(type="input_text", text=part.text)
    content = user.Content(type="input_audio", transcript=part.text or None)
    if sound and part.sound:
        content.audio = base64.b64encode(part.sound).decode()
    return content


def _said_part(part: Part, sound: bool) -> assistant.Content:
    if part.sound is None:
        return assistant.Content(type="output_text", text=part.text)
    content = assistant.Content(type="output_audio", transcript=part.text)
    if sound:
        content.audio = base64.b64encode(part.sound).decode()
    return content


def read_items(items: Any, form: Wire, known: Callable[[str], Item]) -> list[Item]:
    """Items as JSON that a client sent, or referred to by their id; their sound is in the session's format.

    Raises:
        Refused, AudioError: an item of a kind that there is not, or sound that is none.
    """
    if not isinstance(items, list):
        raise Refused("input is a list of items", code="invalid_type", param="response.input")
    return [
        known(str(item.get("id")))
        if isinstance(item, Mapping) and item.get("type") == "item_reference"
        else read_item(checked(item, ITEM, ("response", "input", str(i))), form)
        for i, item in enumerate(items)
    ]


def read_item(item: Any, form: Wire) -> Item:
    """An item that a client sent.

    Raises:
        Refused, AudioError: of a kind that there is not, or sound that is none.
    """
    id = item.id or new_id("item")
    match item:
        case wire.RealtimeConversationItemUserMessage():
            return Item(id, "user", [_read_part(content, form) for content in item.content])
        case wire.RealtimeConversationItemAssistantMessage():
            text = [Part(content.text or content.transcript or "") for content in item.content]
            return Item(id, "assistant", text)
        case wire.RealtimeConversationItemSystemMessage():
            return Item(id, "system", [Part(content.text or "") for content in item.content])
        case wire.RealtimeConversationItemFunctionCall():
            call_id = item.call_id or new_id("call")
            return Item(id, "call", name=item.name, call_id=call_id, text=item.arguments)
        case wire.RealtimeConversationItemFunctionCallOutput():
            return Item(id, "result", call_id=item.call_id, text=item.output)
    told = f"items of type {item.type} are not supported; send message, function_call or function_call_output"
    raise Refused(told, code="unsupported_value", param="item.type")


def _read_part(content: user.Content, form: Wire) -> Part:
    if content.type == "input_text":
        return Part(content.text or "")
    if content.type != "input_audio":
        told = f"content of type {content.type} is not supported; send input_text or input_audio"
        raise Refused(told, code="unsupported_value", param="item.content")
    if not content.audio:
        told = "there is no sound in input_audio; give it as base64 in audio"
        raise Refused(told, code="missing_required_parameter", param="item.content")
    samples = from_wire(form, read_sound(content.audio, "item.content.audio"))
    return Part(content.transcript or "", bytearray(pcm16(samples)), wire_rate(form))


def read_sound(text: str, param: str) -> bytes:
    """Bytes of base64.

    Raises:
        Refused: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        told = f"{param} is not base64; encode the bytes of the sound, without a data: prefix"
        raise Refused(told, code="invalid_value", param=param) from None
