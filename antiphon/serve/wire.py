"""Requests as OpenAI's types state them, and small things that every endpoint writes."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json
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
        told = f"send the sound as a file in the field {name} (curl -F {name}=@sound.wav)"
        raise Refused(told, param=name, code="missing_required_parameter")
    return await file.read()


def form_flag(form: FormData, name: str) -> bool:
    """A field of a form that is true or false; false where there is none.

    Raises:
        Refused: it is neither.
    """
    text = form_text(form, name).lower()
    if text not in ("", "true", "1", "false", "0"):
        raise Refused(f"{name} is {shortly(text)}; expected true or false", param=name, code="invalid_type")
    return text in ("true", "1")


def parsed(body: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Refused: it is none.
    """
    try:
        value = from_json(body, allow_inf_nan=False)  # half a surrogate pair could be neither read nor sent back
    except ValueError as error:
        raise Refused(f"this is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused("this is JSON, but no object; send {…}", code="invalid_json")
    if _is_deeper(value, DEEPEST):
        raise Refused(f"the JSON is nested more than {DEEPEST} levels deep; make it flatter", code="invalid_json")
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


def checked(value: Any, kind: TypeAdapter[Read], at: tuple[str, ...] = ()) -> Read:
    """`value`, which stands at `at`, as OpenAI's type has it.

    Raises:
        Refused: it is of another form; the first field that is wrong is named.
    """
    try:
        return _whole(kind.validate_python(value), at)
    except ValidationError as error:
        raise wrong_field(error, at) from None


def wrong_field(error: ValidationError, at: tuple[str, ...] = ()) -> Refused:
    """The field that is wrong, in OpenAI's form: what is there and what is expected; `at` is where the value stands."""
    found = _telling(error.errors(include_url=False), 0)
    first = found[0]
    path = ".".join([*at, *(str(part) for part in first["loc"] if not _is_branch(part))])
    if first["type"] == "missing":
        return Refused(f"{path} is missing; give it a value", param=path, code="missing_required_parameter")
    wanted = dict.fromkeys(map(_expected, found))
    told = f"{path or 'the body'} is {shortly(first['input'])}; expected {' or '.join(wanted)}"
    return Refused(told, param=path or None, code="invalid_type")


def _telling(errors: Sequence[ErrorDetails], level: int) -> Sequence[ErrorDetails]:
    """Errors of the first field that is wrong; where it may be one of several things, of the one that was meant.

    `level` is how much of their paths has been gone along.
    """
    if here := [one for one in errors if len(one["loc"]) == level]:
        return here
    ways: dict[int | str, list[ErrorDetails]] = {}
    for one in errors:
        ways.setdefault(one["loc"][level], []).append(one)
    if not any(map(_is_branch, ways)):
        return _telling(next(iter(ways.values())), level + 1)
    best = max(_fits(errors, level + 1) for errors in ways.values())
    meant = [errors for errors in ways.values() if _fits(errors, level + 1) == best]
    if best[0] == MEANT:
        return _telling(meant[0], level + 1)
    if best[0] == UNTAGGED:
        return [one for errors in meant for one in errors if one["loc"][level + 1 :] == (TAGS[best[1]],)]
    return [one for errors in meant for one in errors if len(one["loc"]) == level + 1]


OTHER, UNTAGGED, MEANT = range(3)  # how near a value is to an alternative: another kind, another `type`, this one
TAGS = ("type", "role", "stream")  # fields that tell one alternative from the others, the first first


def _fits(errors: Sequence[ErrorDetails], level: int) -> tuple[int, int]:
    """How near a value is to the alternative that has these errors at `level`; of the equally near, fewer errors."""
    if any(len(one["loc"]) == level for one in errors):
        return OTHER, 0
    for place, tag in enumerate(TAGS):
        if any(one["loc"][level:] == (tag,) for one in errors):
            return UNTAGGED, place
    return MEANT, -len(errors)


LABELS = ("str", "int", "float", "bool", "bytes", "dict", "none")  # of alternatives, that could be names of fields


def _is_branch(part: int | str) -> bool:
    """Whether a part of a path names an alternative of a union and not a field."""
    return isinstance(part, str) and (part in LABELS or not re.fullmatch("[a-z0-9_]+", part))


EXPECTED = {"string": "text", "int": "an integer", "float": "a number", "bool": "true or false", "list": "a list"}
EXPECTED |= {"iterable": "a list", "dict": "an object", "model": "an object"}


def _expected(error: ErrorDetails) -> str:
    """What is expected where something else was found."""
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        return "true or false" if expected in ("True", "False") else expected
    return EXPECTED.get(error["type"].split("_")[0], error["msg"])


def shortly(value: Any) -> str:
    """A value that a client sent, in a few characters."""
    if isinstance(value, Mapping):
        return "an object"
    return (
        "a list"
        if isinstance(value, list | tuple)
        else to_json(value[:60] if isinstance(value, str) else value).decode()
    )


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
