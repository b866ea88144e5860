"""Requests as OpenAI's types state them, and small things that every endpoint writes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse

from antiphon.serve.refusals import Refused, refusal

Read = TypeVar("Read")
DEEPEST = 100  # levels of a JSON document


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(12)}"


async def read_json(request: Request, kind: TypeAdapter[Read]) -> Read:
    """The body of a request.

    Raises:
        Refused: no JSON, or not of this kind; the first field that is wrong is named.
    """
    return checked(parsed(await request.body()), kind)


async def form_of(request: Request) -> FormData:
    """The fields of a form with an upload.

    Raises:
        Refused: it is no form.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused("send the fields as multipart/form-data", code="invalid_form")
    try:
        return await request.form(max_files=2, max_fields=50)
    except HTTPException as error:
        raise Refused(f"the form cannot be read: {error.detail}", code="invalid_form") from None


def form_text(form: FormData, name: str) -> str:
    """A field of a form; empty where there is none.

    Raises:
        Refused: it is a file.
    """
    value = form.get(name, "")
    if not isinstance(value, str):
        raise Refused(f"{name} is a file; send text", param=name, code="invalid_type")
    return value


async def uploaded(file: UploadFile | str | None, name: str) -> bytes:
    """The bytes of an upload; its name is of no interest.

    Raises:
        Refused: there is none.
    """
    if not isinstance(file, UploadFile):
        raise Refused(f"send a sound file as {name}", param=name, code="missing_required_parameter")
    return await file.read()


def parsed(body: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Refused: it is none.
    """
    try:
        value = from_json(body, allow_inf_nan=False)  # half a surrogate pair could be neither read nor sent back
    except ValueError:
        raise Refused("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object", code="invalid_json")
    if _is_deeper(value, DEEPEST):
        raise Refused(f"the body is nested more than {DEEPEST} levels deep", code="invalid_json")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            part
            for whole in level
            if isinstance(whole, dict | list)
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
    return bool(level)


def checked(value: Any, kind: TypeAdapter[Read]) -> Read:
    """`value` as OpenAI's type has it.

    Raises:
        Refused: it is of another form; the first field that is wrong is named.
    """
    try:
        return _whole(kind.validate_python(value))
    except ValidationError as error:
        raise wrong_field(error) from None


def wrong_field(error: ValidationError, at: tuple[str, ...] = ()) -> Refused:
    """The first field that is wrong, in OpenAI's form; `at` is where the value stands that was checked."""
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    path = ".".join([*at, *(str(part) for part in first["loc"] if not _is_branch(part))]) or None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    return Refused(f"{path or 'the body'}: {first['msg']}", param=path, code=code)


def _is_branch(part: int | str) -> bool:
    """Whether a part of a path names an alternative of a union and not a field."""
    return isinstance(part, str) and not part.replace("_", "").islower()


def _whole(value: Any, at: tuple[str, ...] = ()) -> Any:
    """`value` with what pydantic would check only when it is gone through, gone through."""
    if isinstance(value, dict):
        return {name: _whole(part, (*at, str(name))) for name, part in value.items()}
    if not isinstance(value, list | tuple | Iterator):
        return value
    try:
        return [_whole(part, (*at, str(i))) for i, part in enumerate(value)]
    except ValidationError as error:
        raise wrong_field(error, at) from None


def as_json(value: BaseModel) -> str:
    """A wire object as JSON: the fields that were set."""
    return value.model_dump_json(exclude_unset=True)


def server_event(value: BaseModel | str) -> bytes:
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else as_json(value)}\n\n".encode()


async def streamed(pieces: AsyncIterator[bytes], media: str) -> StreamingResponse:
    """A response of pieces as they come; what goes wrong before the first is an error like any other."""
    first = await anext(pieces, b"")

    async def all_of_them() -> AsyncIterator[bytes]:
        yield first
        try:
            async for piece in pieces:
                yield piece
        except Exception as error:
            told = refusal(error)
            if media != "text/event-stream":
                raise
            yield server_event(to_json(told.body()).decode())

    return StreamingResponse(all_of_them(), media_type=media, headers={"cache-control": "no-store"})
