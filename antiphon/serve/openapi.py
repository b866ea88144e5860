"""The server's own description: /openapi.json from the types of the `openai` package, and a page of it."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any

from openai.types import Model
from openai.types.audio import SpeechCreateParams, Transcription
from openai.types.audio.voice import Voice
from openai.types.audio.voice_deleted import VoiceDeleted
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParams
from pydantic import TypeAdapter

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
EVENTS = "text/event-stream"
BINARY = {"type": "string", "contentMediaType": "application/octet-stream"}


@dataclass(frozen=True)
class Endpoint:
    """One path and method."""

    path: str
    method: str
    summary: str
    request: Any = None  # a type of JSON
    form: dict[str, Any] = field(default_factory=dict)  # fields of multipart/form-data, required ones first
    response: Any = None  # a type of JSON
    media: str = "application/json"
    also: tuple[str, ...] = ()  # other media types, if it is asked for them
    params: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (400, 401, 403, 408, 413, 503)


ENDPOINTS = (
    Endpoint("/health", "get", "200 when it can answer at once, 503 before", statuses=(503,)),
    Endpoint("/metrics", "get", "Counters for Prometheus", media="text/plain", statuses=(401, 403)),
    Endpoint("/v1/models", "get", "The model that is served, under all its names"),
    Endpoint("/v1/models/{model}", "get", "One model", response=Model, params=("model",), statuses=(401, 403, 404)),
    Endpoint(
        "/v1/chat/completions",
        "post",
        "Answer messages in text, or in text and sound; streamed as server-sent events",
        CompletionCreateParams,
        response=ChatCompletion,
        also=(EVENTS,),
        statuses=(400, 401, 403, 404, 408, 413, 503),
    ),
    Endpoint(
        "/v1/audio/transcriptions",
        "post",
        "Write down what is said in a recording of any length",
        form={
            "file": BINARY,
            "model": {"type": "string"},
            "language": {"type": "string"},
            "prompt": {"type": "string"},
            "response_format": {"enum": ["json", "text", "srt", "verbose_json", "vtt"]},
            "stream": {"type": "boolean"},
        },
        response=Transcription,
        also=(EVENTS, "text/plain"),
        statuses=(400, 401, 403, 404, 408, 413, 503),
    ),
    Endpoint(
        "/v1/audio/speech",
        "post",
        "Say a text; the sound is sent from its first 80 ms on",
        SpeechCreateParams,
        media="audio/*",
        also=(EVENTS,),
        statuses=(400, 401, 403, 404, 408, 413, 503),
    ),
    Endpoint("/v1/audio/voices", "get", "The checkpoint's voices and those that you uploaded"),
    Endpoint(
        "/v1/audio/voices",
        "post",
        "Clone a voice from a recording of 3 to 30 seconds",
        form={"name": {"type": "string"}, "audio_sample": BINARY},
        response=Voice,
        statuses=(400, 401, 403, 408, 413, 429, 503),
    ),
    Endpoint(
        "/v1/audio/voices/{voice_id}",
        "delete",
        "Forget an uploaded voice",
        response=VoiceDeleted,
        params=("voice_id",),
        statuses=(401, 403, 404),
    ),
)


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    schemas: dict[str, Any] = {"Error": ERROR}
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Antiphon", "version": version("antiphon")},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _operation(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    answer = {} if endpoint.response is None else _schema(endpoint.response, schemas)
    content = {endpoint.media: {"schema": answer}} | {media: {} for media in endpoint.also}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in endpoint.params
        ],
        "responses": {"200": {"description": "done", "content": content}}
        | {str(status): {"description": "refused", "content": error} for status in endpoint.statuses},
    }
    if endpoint.request is not None:
        body = {"application/json": {"schema": _schema(endpoint.request, schemas)}}
        operation["requestBody"] = {"required": True, "content": body}
    if endpoint.form:
        form = {"type": "object", "properties": endpoint.form, "required": list(endpoint.form)[:2]}
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    return operation


def _schema(kind: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type of the `openai` package; what it refers to goes into `schemas`."""
    schema = TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    return schema


def page() -> str:
    """The endpoints as a page, which loads nothing from elsewhere."""
    rows = "".join(
        f"<tr><td><code>{one.method.upper()}</code></td><td><code>{html.escape(one.path)}</code></td>"
        f"<td>{html.escape(one.summary)}</td></tr>"
        for one in ENDPOINTS
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Antiphon</title>"
        "<meta name=viewport content='width=device-width'><meta name=color-scheme content='light dark'>"
        "<style>body{font:16px/1.5 system-ui;max-width:50em;margin:3em auto;padding:0 1em}"
        "td{padding:.3em 1em .3em 0;vertical-align:top}</style>"
        f"<h1>Antiphon</h1><p>OpenAI's endpoints; the whole description is <a href=/openapi.json>openapi.json</a>.</p>"
        f"<table>{rows}<tr><td><code>WS</code></td><td><code>/v1/realtime</code></td>"
        "<td>A spoken conversation: OpenAI's Realtime events</td></tr></table></html>"
    )
