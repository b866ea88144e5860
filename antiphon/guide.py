"""Tool calls that keep to what was declared: a grammar over the bytes of a call, and which tokens may come next.

A JSON schema becomes symbols; a state is the set of places in them where the text so far may stand. A token may come
if its bytes lead to another place. What is held: types, properties and which are required (in the declared order),
items, enum, const, anyOf and oneOf, references into the schema. What is not: ranges, lengths, patterns, formats.

Shapes: V ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from antiphon.errors import InputError
from antiphon.tokenizer import Tokenizer

LIKELY = 256  # ids of the best scores that are tried first
ENOUGH = 16  # ids to be drawn from, where none of the likely may come
MOST_PLACES = 10_000  # where a text may stand in a grammar

# ------------------------------------------------------------------------------------------------ grammar


@dataclass(frozen=True, eq=False)
class Word:
    """These bytes."""

    text: bytes


@dataclass(frozen=True, eq=False)
class OneOf:
    """One byte of these."""

    bytes: frozenset[int]


@dataclass(frozen=True, eq=False)
class Either:
    """One of several sequences."""

    ways: tuple[Sequence_, ...]


@dataclass(frozen=True, eq=False)
class Many:
    """A sequence, any number of times."""

    what: Sequence_


@dataclass(frozen=True, eq=False)
class Later:
    """A sequence that is made when it is needed: schemas may contain themselves."""

    make: Callable[[], Sequence_]


Symbol: TypeAlias = Word | OneOf | Either | Many | Later
Sequence_: TypeAlias = tuple[Symbol, ...]
Place: TypeAlias = Sequence_  # what has still to come
State: TypeAlias = frozenset[Place]


def start(grammar: Sequence_) -> State:
    """Before the first byte."""
    return frozenset(_opened(grammar))


def after(state: State, text: bytes) -> State:
    """After more bytes; empty where they cannot come."""
    for byte in text:
        state = frozenset(place for before in state for place in _stepped(before, byte))
        if not state:
            break
    return state


def _stepped(place: Place, byte: int) -> Iterable[Place]:
    first, rest = place[:1], place[1:]
    match first:
        case (Word(text),) if text[0] == byte:
            return _opened((Word(text[1:]), *rest)) if len(text) > 1 else _opened(rest)
        case (OneOf(bytes),) if byte in bytes:
            return _opened(rest)
    return ()


def _opened(place: Place) -> list[Place]:
    """Places that begin with bytes, or are at the end.

    Raises:
        InputError: there are too many, or a schema is nothing but itself.
    """
    opened, left = list[Place](), [place]
    for _ in range(MOST_PLACES):
        if not left:
            return opened
        place = left.pop()
        match place[:1]:
            case (Either(ways),):
                left += [(*way, *place[1:]) for way in ways]
            case (Many(what),):
                left += [place[1:], (*what, *place)]
            case (Later(make),):
                left.append((*make(), *place[1:]))
            case _:
                opened.append(place)
    raise InputError("a tool's JSON schema is too intricate; leave some of its alternatives out")


# --------------------------------------------------------------------------------------------------- JSON


def _bytes(*spans: tuple[int, int]) -> OneOf:
    return OneOf(frozenset(byte for low, high in spans for byte in range(low, high + 1)))


TAIL = _bytes((0x80, 0xBF))
CHARACTER = Either(  # of a string: UTF-8, and no control characters
    (
        (_bytes((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F)),),
        (_bytes((0xC2, 0xDF)), TAIL),
        (Word(b"\xe0"), _bytes((0xA0, 0xBF)), TAIL),
        (_bytes((0xE1, 0xEC), (0xEE, 0xEF)), TAIL, TAIL),
        (Word(b"\xed"), _bytes((0x80, 0x9F)), TAIL),
        (Word(b"\xf0"), _bytes((0x90, 0xBF)), TAIL, TAIL),
        (_bytes((0xF1, 0xF3)), TAIL, TAIL, TAIL),
        (Word(b"\xf4"), _bytes((0x80, 0x8F)), TAIL, TAIL),
        (Word(b"\\"), OneOf(frozenset(b'"\\/bfnrt'))),
        (Word(b"\\u"), *[_bytes((0x30, 0x39), (0x41, 0x46), (0x61, 0x66))] * 4),
    )
)
STRING: Sequence_ = (Word(b'"'), Many((CHARACTER,)), Word(b'"'))
DIGIT = _bytes((0x30, 0x39))
INTEGER: Sequence_ = (Either(((), (Word(b"-"),))), Either(((Word(b"0"),), (_bytes((0x31, 0x39)), Many((DIGIT,))))))
FRACTION = Either(((), (Word(b"."), DIGIT, Many((DIGIT,)))))
EXPONENT = Either(((), (OneOf(frozenset(b"eE")), Either(((), (OneOf(frozenset(b"+-")),))), DIGIT, Many((DIGIT,)))))
NUMBER: Sequence_ = (*INTEGER, FRACTION, EXPONENT)
BOOLEAN: Sequence_ = (Either(((Word(b"true"),), (Word(b"false"),))),)
NULL: Sequence_ = (Word(b"null"),)
SPACE = Either(((), (Word(b" "),)))
COMMA: Sequence_ = (Word(b","), SPACE)
COLON: Sequence_ = (Word(b":"), SPACE)


def _list(item: Sequence_, least: int = 0) -> Sequence_:
    some = (*item, Many((*COMMA, *item)))
    return (Word(b"["), *((Either(((), some)),) if not least else some), Word(b"]"))


def _any_object() -> Sequence_:
    pair = (*STRING, *COLON, Later(lambda: ANY))
    return (Word(b"{"), Either(((), (*pair, Many((*COMMA, *pair))))), Word(b"}"))


ANY: Sequence_ = (Either((STRING, NUMBER, BOOLEAN, NULL, (Later(lambda: _list(ANY)),), (Later(_any_object),))),)
SIMPLE: Mapping[str, Sequence_] = {
    "string": STRING,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": BOOLEAN,
    "null": NULL,
}


def grammar_of(schema: Any, root: Mapping[str, Any] | None = None) -> Sequence_:
    """What a JSON schema admits.

    Raises:
        InputError: it is no schema, or refers to what is not there.
    """
    if schema is True or schema == {}:
        return ANY
    if not isinstance(schema, Mapping):
        raise InputError(f"a JSON schema is an object, not {schema!r}")
    root = schema if root is None else root
    if "$ref" in schema:
        found = _found(schema["$ref"], root)
        return (Later(lambda: grammar_of(found, root)),)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return (Either(tuple(grammar_of(one, root) for one in _some(schema, name))),)
    if "const" in schema:
        return (_literal(schema["const"]),)
    if "enum" in schema:
        return (Either(tuple((_literal(value),) for value in _some(schema, "enum"))),)
    if schema.get("type") is None:
        return _of_kind("object", schema, root) if "properties" in schema else ANY
    kinds = [schema["type"]] if isinstance(schema["type"], str) else _some(schema, "type")
    return (Either(tuple(_of_kind(kind, schema, root) for kind in kinds)),)


def _some(schema: Mapping[str, Any], name: str) -> Sequence[Any]:
    """A list that a schema has.

    Raises:
        InputError: it is none, or empty.
    """
    if not isinstance(schema[name], list | tuple) or not schema[name]:
        raise InputError(f"{name} of a JSON schema is a list, and not empty; it is {schema[name]!r}")
    return schema[name]


def _of_kind(kind: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Sequence_:
    if kind == "array":
        return _list(grammar_of(schema.get("items", True), root), schema.get("minItems", 0))
    if kind != "object":
        if not isinstance(kind, str) or kind not in SIMPLE:
            raise InputError(f"a JSON schema has type {kind!r}; there are {', '.join(SIMPLE)}, array and object")
        return SIMPLE[kind]
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
        raise InputError("properties of a JSON schema are an object, and required is a list of their names")
    if not properties:
        return _any_object() if schema.get("additionalProperties", True) else (Word(b"{}"),)
    made = [((_literal(n), *COLON, *grammar_of(p, root)), n in required) for n, p in properties.items()]
    return (Word(b"{"), *_pairs(made, first=True), Word(b"}"))


def _pairs(left: Sequence[tuple[Sequence_, bool]], first: bool) -> Sequence_:
    """The properties from here on: each in its turn, what is not required perhaps not."""
    if not left:
        return ()
    (pair, needed), rest = left[0], left[1:]
    given = (*(() if first else COMMA), *pair, Later(lambda: _pairs(rest, first=False)))
    return given if needed else (Either((given, (Later(lambda: _pairs(rest, first)),))),)


def _found(path: Any, root: Mapping[str, Any]) -> Any:
    where: Any = root
    for part in filter(None, str(path).removeprefix("#").split("/")):
        if not isinstance(where, Mapping) or part not in where:
            raise InputError(f"a JSON schema refers to {path!r}, which is not in it")
        where = where[part]
    return where


def _literal(value: Any) -> Word:
    return Word(json.dumps(value, ensure_ascii=False).encode())


def call_grammar(tools: Iterable[Mapping[str, Any]]) -> Sequence_:
    """What stands between the marks of a tool call, of functions in OpenAI's form.

    Raises:
        InputError: parameters that are no JSON schema.
    """
    ways = []
    for tool in tools:
        function = tool["function"]
        arguments = grammar_of(function.get("parameters") or {"type": "object"})
        head = b'\n{"name": ' + _literal(function["name"]).text + b', "arguments": '
        ways.append((Word(head), *arguments, Word(b"}\n")))
    return (Either(tuple(ways)),)


# -------------------------------------------------------------------------------------------------- tokens


@dataclass(eq=False)
class Guide:
    """Which tokens of an answer may come next, so that what it calls was declared.

    Args:
        tokenizer: of the model.
        tools: that may be called, in OpenAI's form.
        required: the answer is a call.
        parallel: several may follow each other.

    Raises:
        InputError: parameters that are no JSON schema, or a tokenizer without the marks of a call.
    """

    tokenizer: Tokenizer
    tools: Sequence[Mapping[str, Any]]
    required: bool = False
    parallel: bool = True

    def __post_init__(self) -> None:
        opening, closing = (self.tokenizer.token_id(mark) for mark in ("<tool_call>", "</tool_call>"))
        if opening is None or closing is None:
            raise InputError("this checkpoint's tokenizer has no marks for tool calls, so it cannot call any")
        self._open, self._close = opening, closing
        self._end = self.tokenizer.config.im_end_token_id
        self._start = start(call_grammar(self.tools))
        self._known: tuple[tuple[int, ...], State | None] = ((), None)  # an answer's beginning, and where it is in it

    def masked(self, ids: Sequence[int], scores: Tensor) -> Tensor:
        """Scores [1, V] with -inf at what must not follow the answer's `ids`."""
        state = self._state_after(tuple(ids))
        if state is None:
            return self._between(ids, scores)
        best = scores[0].topk(min(LIKELY, scores.shape[-1])).indices.tolist()
        allowed = [token for token in best if self._fits(state, token)]
        if not allowed:
            for token in scores[0].argsort(descending=True).tolist():
                allowed += [token] * self._fits(state, token)
                if len(allowed) == ENOUGH:
                    break
        return _only(scores, allowed or [self._close])

    def _between(self, ids: Sequence[int], scores: Tensor) -> Tensor:
        """Outside of a call."""
        called = self._close in ids
        if self.required and not called:
            return _only(scores, [self._open])
        if not called:
            return scores
        if self.required and ids[-1] != self._close:
            return _only(scores, [self._open])
        line_end = self.tokenizer.encode("\n")
        if self.required:
            return _only(scores, [self._end, *line_end[: int(self.parallel)]])
        return scores if self.parallel else _without(scores, [self._open])

    def _fits(self, state: State, token: int) -> bool:
        if token == self._close:
            return () in state
        piece = self.tokenizer.piece(token) if token not in (self._open, self._end) else b""
        return bool(piece) and bool(after(state, piece))

    def _state_after(self, ids: tuple[int, ...]) -> State | None:
        """Where in a call the answer is; None outside. What is known of its beginning is not gone through again."""
        known, state = self._known
        if ids[: len(known)] != known:
            known, state = (), None
        for token in ids[len(known) :]:
            if token == self._open:
                state = self._start
            elif token == self._close:
                state = None
            elif state is not None:
                state = after(state, self.tokenizer.piece(token))
        self._known = ids, state
        return state


def _only(scores: Tensor, ids: Sequence[int]) -> Tensor:
    kept = torch.full_like(scores, -math.inf)
    kept[:, list(ids)] = scores[:, list(ids)]
    return kept


def _without(scores: Tensor, ids: Sequence[int]) -> Tensor:
    left = scores.clone()
    left[:, list(ids)] = -math.inf
    return left
