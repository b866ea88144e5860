"""POST /v1/audio/speech: a text said aloud, sent from its first 80 ms on; and /v1/audio/voices."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from openai.types.audio import SpeechCreateParams
from openai.types.audio.voice import Voice as WireVoice
from openai.types.audio.voice_deleted import VoiceDeleted
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from antiphon.errors import AudioError
from antiphon.generate import AudioDelta, Done, Options
from antiphon.serve.house import House, house_of
from antiphon.serve.kept import OPENAI, REFERENCE, Voice
from antiphon.serve.refusals import Refused
from antiphon.serve.sounds import MEDIA, Encoder, decode
from antiphon.serve.wire import form_of, form_text, read_json, server_event, streamed, uploaded

KIND = TypeAdapter[SpeechCreateParams](SpeechCreateParams)
NAME_CHARS = 100  # of an uploaded voice's name


@dataclass(frozen=True)
class Say:
    """A request, read and checked."""

    text: str
    form: str
    options: Options
    as_events: bool


async def speech(request: Request) -> Response:
    """The endpoint."""
    house = house_of(request)
    say = read_request(house, await read_json(request, KIND), request.state.who)
    if say.as_events:
        return await streamed(events(house, say), "text/event-stream")
    return await streamed(sound(house, say), MEDIA[say.form])


def read_request(house: House, body: SpeechCreateParams, who: str) -> Say:
    """A request.

    Raises:
        Refused: what is asked for cannot be given.
    """
    text, form, voice = body["input"], body.get("response_format", "mp3"), body["voice"]
    house.check_model(body["model"])
    house.check_speech("model")
    if not text.strip():
        raise Refused("there is nothing to say; give some text", code="invalid_value", param="input")
    if len(text) > house.settings.spoken_chars:
        raise Refused(
            f"the text is longer than the limit of {house.settings.spoken_chars} characters",
            code="string_above_max_length",
            param="input",
        )
    if form not in MEDIA:
        raise Refused(
            f"{form} is not written here; there are {', '.join(MEDIA)}",
            code="unsupported_value",
            param="response_format",
        )
    if body.get("speed", 1.0) != 1.0:
        raise Refused("the model speaks at its own speed; leave speed at 1", code="unsupported_value", param="speed")
    name = voice["id"] if isinstance(voice, Mapping) else voice
    options = Options(voice=house.voices.find(name, who, house.model, "voice"))
    return Say(text, form, options, body.get("stream_format") == "sse")


async def sound(house: House, say: Say) -> AsyncGenerator[bytes]:
    """A sound file, as it is made."""
    encoder = Encoder(say.form, house.sample_rate)
    async with house.call() as call, aclosing(house.events(call.speak(say.text, say.options))) as found:
        async for event in found:
            if isinstance(event, AudioDelta) and (data := encoder.push(event.samples)):
                yield data
    if data := encoder.end():
        yield data


async def events(house: House, say: Say) -> AsyncGenerator[bytes]:
    """The same as server-sent events, with what it cost."""
    encoder = Encoder(say.form, house.sample_rate)
    async with house.call() as call, aclosing(house.events(call.speak(say.text, say.options))) as found:
        async for event in found:
            data = encoder.push(event.samples) if isinstance(event, AudioDelta) else b""
            if isinstance(event, Done):
                data = encoder.end()
            if data:
                yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
            if isinstance(event, Done):
                read, made = len(event.reply.text_ids), len(event.reply.codes)
                usage = {"input_tokens": read, "output_tokens": made, "total_tokens": read + made}
                yield _event({"type": "speech.audio.done", "usage": usage})


def _event(value: object) -> bytes:
    return server_event(TypeAdapter(object).dump_json(value).decode())


# --------------------------------------------------------------------------------------------- voices


async def list_voices(request: Request) -> Response:
    """The checkpoint's voices, OpenAI's names for them, and what the caller uploaded."""
    house = house_of(request)
    preset = [
        {"id": name, "name": name, "object": "audio.voice", "created_at": house.began} for name in house.model.voices
    ]
    own = [_wire(voice).model_dump() for voice in house.voices.of(request.state.who)]
    return JSONResponse({"object": "list", "data": preset + own, "aliases": list(OPENAI) if preset else []})


async def add_voice(request: Request) -> Response:
    """Clone a voice."""
    house, form, who = house_of(request), await form_of(request), request.state.who
    name = form_text(form, "name").strip()
    if not name or len(name) > NAME_CHARS:
        raise Refused(f"give the voice a name of 1 to {NAME_CHARS} characters", param="name", code="invalid_value")
    taken = {*house.model.voices, *OPENAI, *(voice.name for voice in house.voices.of(who))}
    if name in taken:
        raise Refused(f"there is a voice {name!r} already; choose another name", param="name", code="invalid_value")
    house.check_speech("model")
    house.voices.check_room()
    data = await uploaded(form.get("audio_sample") or form.get("file"), "audio_sample")
    async with house.decoders:
        vector = await asyncio.to_thread(clone, house, data)
    return JSONResponse(_wire(house.voices.add(name, who, vector)).model_dump())


def clone(house: House, data: bytes) -> Tensor:
    """The voice [W] of an uploaded recording.

    Raises:
        AudioError: it is too short, too long, or no sound.
    """
    shortest, longest = REFERENCE
    samples, rate = decode(data, 2 * longest)
    if not shortest <= (seconds := len(samples) / rate) <= longest:
        raise AudioError(
            f"the recording is {seconds:.1f} s long; give {shortest:g} to {longest:g} seconds of one voice"
        )
    return house.model.clone(samples, rate)


async def delete_voice(request: Request) -> Response:
    """Forget a voice."""
    id = request.path_params["voice_id"]
    house_of(request).voices.remove(id, request.state.who)
    return JSONResponse(VoiceDeleted(id=id, deleted=True, object="audio.voice.deleted").model_dump())


def _wire(voice: Voice) -> WireVoice:
    return WireVoice(id=voice.id, name=voice.name, created_at=voice.created, object="audio.voice", type="audio_sample")
