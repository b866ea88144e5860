"""POST /v1/audio/transcriptions: what is said in a recording of any length, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from openai.types.audio import (
    Transcription,
    TranscriptionSegment,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionVerbose,
)
from openai.types.audio.transcription import UsageTokens, UsageTokensInputTokenDetails
from openai.types.audio.transcription_text_done_event import Usage as StreamUsage
from openai.types.audio.transcription_verbose import Usage as Duration
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from antiphon.audio import Samples
from antiphon.generate import Done, Reply, TextDelta
from antiphon.serve.house import House, house_of, settled, while_connected
from antiphon.serve.refusals import Refused
from antiphon.serve.sounds import decode
from antiphon.serve.wire import form_flag, form_of, form_text, server_event, streamed, uploaded
from antiphon.transcripts import (
    FORMATS,
    HEARD,
    PROMPTS,
    Piece,
    Transcript,
    certain,
    check_language,
    cut_at_pauses,
    longest_piece,
    most_tokens,
    uncoiled,
)

FORMS = ("json", "text", "srt", "verbose_json", "vtt")


@dataclass(frozen=True)
class Recording:
    """What is to be written down."""

    samples: Samples
    rate: int
    language: str

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


@dataclass
class Written:
    """What has been written down so far."""

    pieces: list[Piece]
    heard: int = 0  # audio tokens
    asked: int = 0  # text tokens of the prompts
    said: int = 0  # text tokens

    def text(self, seconds: float = 0.0) -> str:
        """All of it."""
        return Transcript(self.pieces, seconds).text


async def transcriptions(request: Request) -> Response:
    """The endpoint."""
    house, form = house_of(request), await form_of(request)
    response_format, stream = form_text(form, "response_format") or "json", form_flag(form, "stream")
    if response_format not in FORMS:
        raise Refused(
            f"there is no format {response_format!r}; there are {', '.join(FORMS)}",
            param="response_format",
            code="unsupported_value",
        )
    if {*form.getlist("timestamp_granularities[]")} - {"segment"}:
        told = "the model names no times of words; ask for segment"
        raise Refused(told, param="timestamp_granularities", code="unsupported_value")
    house.check_model(form_text(form, "model") or None)
    recording = await read_recording(house, form)
    if stream:
        return await streamed(events(house, recording), "text/event-stream")
    written = await while_connected(request, write_down(house, recording))
    return written_as(response_format, written, recording)


async def read_recording(house: House, form: FormData) -> Recording:
    """The upload.

    Raises:
        Refused, AudioError, InputError: no sound, or a language that is not heard.
    """
    language = form_text(form, "language")
    check_language(language, HEARD)
    data = await uploaded(form.get("file"), "file")
    async with house.decoders:
        samples, rate = await asyncio.to_thread(decode, data, house.settings.file_seconds)
    return Recording(samples, rate, language)


async def pieces(house: House, recording: Recording, written: Written, aside: bool = False) -> AsyncGenerator[str]:
    """Text as it forms; what is certain of it goes into `written`. `aside` comes after what others wait for."""
    samples, rate = recording.samples, recording.rate
    cuts = await asyncio.to_thread(cut_at_pauses, samples, rate, longest_piece(house.model))
    for start, stop in cuts:
        before = written.text()
        async with house.call(aside=aside) as call:
            await settled(call.append_clip(samples[start:stop], rate))
            await settled(call.append_text(PROMPTS.get(recording.language, PROMPTS[""])))
            answer = call.respond(audio=False, max_text_tokens=most_tokens((stop - start) / rate))
            text, circles, reply = "", False, None
            async with aclosing(house.events(answer)) as found:
                async for event in found:
                    if isinstance(event, TextDelta) and not circles:
                        text += event.text
                        if (once := uncoiled(text)) is not None:
                            text, circles = once, True
                            call.cancel()
                        grown = _grown(written, Piece(start / rate, stop / rate, certain(text).strip()))
                        if grown.startswith(before) and len(grown) > len(before):
                            yield grown[len(before) :]
                            before = grown
                    elif isinstance(event, Done):
                        reply = event.reply
            assert reply is not None
            ids, audio = call.session.ids, house.model.config.audio_token_id
            heard = ids.count(audio)
            text = text if circles else reply.text
            note_piece(written, Piece(start / rate, stop / rate, text.strip()), heard, len(ids), reply)
            if (grown := written.text()).startswith(before) and len(grown) > len(before):
                yield grown[len(before) :]


def note_piece(written: Written, piece: Piece, heard: int, read: int, reply: Reply) -> None:
    """One more piece, of which `heard` of the `read` tokens are sound."""
    written.pieces.append(piece)
    written.heard += heard
    written.asked += max(0, read - heard - len(reply.text_ids))
    written.said += len(reply.text_ids)


def _grown(written: Written, piece: Piece) -> str:
    return Transcript([*written.pieces, piece], 0.0).text


async def write_down(house: House, recording: Recording) -> Written:
    """All of a recording."""
    written = Written([])
    async with aclosing(pieces(house, recording, written)) as text:
        async for _ in text:
            pass
    return written


async def events(house: House, recording: Recording) -> AsyncGenerator[bytes]:
    """A recording's text as server-sent events."""
    written = Written([])
    async with aclosing(pieces(house, recording, written)) as text:
        async for delta in text:
            yield server_event(TranscriptionTextDeltaEvent(type="transcript.text.delta", delta=delta))
    details = UsageTokensInputTokenDetails(audio_tokens=written.heard, text_tokens=written.asked)
    usage = StreamUsage.model_validate(usage_of(written, details).model_dump())
    yield server_event(TranscriptionTextDoneEvent(type="transcript.text.done", text=written.text(), usage=usage))


def usage_of(written: Written, details: UsageTokensInputTokenDetails) -> UsageTokens:
    """Tokens."""
    read = written.heard + written.asked
    return UsageTokens(
        type="tokens",
        input_tokens=read,
        output_tokens=written.said,
        total_tokens=read + written.said,
        input_token_details=details,
    )


def written_as(form: str, written: Written, recording: Recording) -> Response:
    """A transcript in the form that was asked for."""
    transcript = Transcript(written.pieces, recording.seconds)
    if form in ("text", "srt", "vtt"):
        return PlainTextResponse(FORMATS["txt" if form == "text" else form](transcript))
    if form == "json":
        details = UsageTokensInputTokenDetails(audio_tokens=written.heard, text_tokens=written.asked)
        made = Transcription(text=transcript.text, usage=usage_of(written, details))
        return JSONResponse(made.model_dump(exclude_unset=True))
    segments = [segment(i, piece) for i, piece in enumerate(transcript.pieces)]
    verbose = TranscriptionVerbose(
        duration=recording.seconds,
        language=recording.language,
        text=transcript.text,
        segments=segments,
        usage=Duration(type="duration", seconds=recording.seconds),
    )
    return JSONResponse(verbose.model_dump(exclude_unset=True) | {"task": "transcribe"})


def segment(index: int, piece: Piece) -> TranscriptionSegment:
    """A piece; what whisper alone has is 0."""
    return TranscriptionSegment(
        id=index,
        start=piece.start,
        end=piece.stop,
        text=piece.text,
        seek=0,
        tokens=[],
        temperature=0.0,
        avg_logprob=0.0,
        compression_ratio=0.0,
        no_speech_prob=0.0,
    )
