"""Messages in OpenAI's form: what their parts say, as text or as sound."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from antiphon.audio import Samples, check_samples, read_audio
from antiphon.chat import ToolCall
from antiphon.errors import AudioError, InputError

MARKS = 64  # positions around a text, such as those of a tool's result


def parts_of(message: Mapping[str, Any], optional: bool = False) -> list[Any]:
    """Content parts of a message; text alone is one part, and `optional` allows none.

    Raises:
        InputError: content of another form.
    """
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None and optional:
        return []
    if not isinstance(content, list) or (not content and not optional):
        raise InputError("a message's content must be text or a list of parts, and not empty")
    return content


def most_positions(said: Any) -> int:
    """No text takes more positions, be it given alone or as a message.

    A token is a byte at least, composing (NFC) makes up to three of one, and what is written around it is short.
    """
    content = said.get("content") if isinstance(said, Mapping) else said
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return MARKS + sum(3 * len(text.encode(errors="replace")) for text in texts if isinstance(text, str))


def text_of(part: Any) -> str:
    """Text of a content part.

    Raises:
        InputError: the part is sound.
    """
    text = read_part(part)
    if not isinstance(text, str):
        raise InputError("only user messages may hold audio")
    return text


def read_part(part: Any) -> str | tuple[Samples, int]:
    """Text of a content part, or its samples and their rate.

    Raises:
        InputError, AudioError: a part of another form, or sound that cannot be used.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "input_audio":
        try:
            return read_audio(base64.b64decode(part["input_audio"]["data"], validate=True))
        except (KeyError, TypeError, ValueError):
            raise AudioError('input_audio needs {"data": base64 of a sound file, "format": "wav"}') from None
    if kind == "audio":
        return _sound(part.get("audio"))
    raise InputError(f"a content part has type {kind!r}; expected text, input_audio or audio")


def _sound(audio: Any) -> tuple[Samples, int]:
    if isinstance(audio, tuple):
        if len(audio) != 2:
            raise AudioError("audio given as a tuple must be (samples, rate)")
        return check_samples(*audio), audio[1]
    if not isinstance(audio, str | bytes | PathLike) and not hasattr(audio, "read"):
        raise AudioError("audio must be a path, the bytes of a sound file, or (samples, rate)")
    return read_audio(audio)


def tool_call(call: Any) -> ToolCall:
    """An assistant message's tool call, arguments parsed.

    Raises:
        InputError: a call of another form.
    """
    try:
        function = call["function"]
        arguments = function["arguments"]
        return ToolCall(function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments)
    except (KeyError, TypeError, ValueError):
        raise InputError('a tool call must have the form {"function": {"name": …, "arguments": JSON text}}') from None
