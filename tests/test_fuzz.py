"""Requests, files and events that nobody sends on purpose: never an internal error, never a session that dies without a
word, never what belongs to another. The short form is the same in every run; the long one looks further.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import schemathesis
import soundfile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks
from websockets.sync.client import ClientConnection, connect

from antiphon.audio import pcm16
from antiphon.bench.commands import tone
from antiphon.errors import AudioError
from antiphon.serve.openapi import ENDPOINTS
from antiphon.serve.realtime import KINDS
from antiphon.serve.settings import Settings
from antiphon.serve.sounds import MEDIA, decode, whole_file
from tests.realtime_line import ORACLE, Line, line
from tests.serving import Served, engine, serving

CHECKS: Any = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
LENGTHS = pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    # one session after another, none of which is kept for its client to come back to: there is always a place
    with serving(Settings(sessions=64, resume_seconds=0), lambda: engine(64)) as served:
        yield served


def always_the_same(examples: int) -> Callable[[Any], Any]:
    """As many examples, none shrunk, in the same order in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


# -------------------------------------------------------------------------------------------------- HTTP


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda one: f"{one.method} {one.path}")
@LENGTHS
def test_every_request_is_answered_as_the_description_says(server, endpoint, mode, examples):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[endpoint.path][endpoint.method.upper()]
    seen, wav = set[int](), whole_file("wav", tone()[:16000], 24000)

    @always_the_same(examples)
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def ask(case: Any, deep: bool) -> None:
        if deep and isinstance(case.body, dict):  # past the first questions, and not for minutes
            case.body |= {"model": "tiny", "voice": "ethan", "max_completion_tokens": 3}
            if case.media_type == "multipart/form-data":
                case.body |= {name: wav for name in ("file", "audio_sample") if name in case.body}
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKS)
        seen.add(response.status_code)

    ask()
    assert seen


def sounds() -> dict[str, bytes]:
    """A little sound in every format."""
    samples = tone()[:4800]
    return {form: whole_file(form, samples, 24000) for form in MEDIA if form != "pcm"}


@LENGTHS
def test_a_damaged_sound_file_is_heard_or_refused(examples):
    known = sounds()

    @always_the_same(10 * examples)
    @given(st.sampled_from(sorted(known)), st.data())
    def damage(form: str, data: st.DataObject) -> None:
        file = bytearray(known[form])
        for _ in range(data.draw(st.integers(1, 6))):
            place = data.draw(st.integers(0, min(len(file) - 1, 200)))
            file[place] = data.draw(st.integers(0, 255))
        end = data.draw(st.integers(0, len(file)))
        try:
            samples, rate = decode(bytes(file[:end]), seconds=5)
        except AudioError:
            return
        assert len(samples) <= 5 * rate
        assert np.isfinite(samples).all()

    damage()


# ---------------------------------------------------------------------------------------------- Realtime

SOUND = base64.b64encode(pcm16(tone()[:16000])).decode()
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
Made = st.SearchStrategy[Any]


def mostly(right: Made) -> Made:
    """`right`, and now and then anything at all."""
    return st.integers(0, 19).flatmap(lambda n: right if n else JUNK)


def one_of(*values: Any) -> Made:
    return mostly(st.sampled_from(values))


def some(needed: dict[str, Made], **more: Made) -> Made:
    return mostly(st.fixed_dictionaries(needed, optional=more))


TEXT = one_of("", "hello", "\x00", "<tool_call>", "<|im_end|>", "x" * 5000, "é\U0001f600")
AUDIO = one_of(SOUND, SOUND, "", "AA==", "AAA", "AAAA", "====", "ünï", SOUND * 40, SOUND[:-1], "A" * 1_000_003)
SPOKEN = {"text": TEXT, "audio": AUDIO, "transcript": TEXT}
CONTENT = some(
    {"type": one_of("input_text", "input_audio", "output_text", "output_audio", "input_image", "text")}, **SPOKEN
)
VAD = some(
    {"type": one_of("server_vad", "semantic_vad", "none")},
    threshold=one_of(0.5, 0, 1.5, -1e308),
    silence_duration_ms=one_of(500, 0, 20000),
    prefix_padding_ms=one_of(300, 0, -1),
    idle_timeout_ms=one_of(None, 1000, 1),
    eagerness=one_of("auto", "high", "wild"),
    create_response=one_of(True, False),
)
FORMAT = one_of({"type": "audio/pcm", "rate": 24000}, {"type": "audio/pcmu"}, {"type": "audio/pcm", "rate": 8000}, {})
MODALITIES = one_of(["text"], ["audio"], [], ["audio", "text"], ["smell"])
PARAMETERS = one_of(
    *({}, {"type": "object", "properties": {"x": {"type": "string"}}}, {"type": 7}, {"anyOf": 5}, {"enum": []}),
    *({"$ref": "#"}, {"properties": []}, {"required": 3, "properties": {"x": {}}}, {"items": 1, "type": ["array"]}),
)
TOOL = some({"type": one_of("function", "function", "mcp"), "name": one_of("f", "")}, parameters=PARAMETERS)
CHOICE = one_of("auto", "none", "required", "other", {"type": "function", "name": "f"}, {"type": "function"})
MOST = one_of(1, 3, 3, 0, -1, 1.5)
HELLO = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
RIGHT = [  # so that there is a conversation which the others disturb
    {"type": "conversation.item.create", "item": HELLO},
    {"type": "conversation.item.create", "item": HELLO | {"id": "a"}},
    {"type": "response.create", "response": {"max_output_tokens": 3}},
    {"type": "response.create", "response": {"max_output_tokens": 30}},
    {"type": "session.update", "session": {"type": "realtime", "output_modalities": ["text"]}},
    {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}},
    {"type": "input_audio_buffer.append", "audio": SOUND},
    {"type": "input_audio_buffer.commit"},
    {"type": "conversation.item.truncate", "item_id": "a", "content_index": 0, "audio_end_ms": 0},
    {"type": "conversation.item.delete", "item_id": "a"},
    {"type": "response.cancel"},
]
OFTEN = ["conversation.item.create", "response.create", "session.update", "input_audio_buffer.append"]
IDS = ("a", "b", "root", "", "x" * 3000)


def fields(ids: Made) -> dict[str, Made]:
    """Every field of a client's event, with what it may hold and what it may not."""
    role = one_of("user", "assistant", "system", "root")
    content = mostly(st.lists(CONTENT, max_size=3))
    item = st.one_of(
        some({"type": one_of("message"), "role": role, "content": content}, id=ids, status=TEXT),
        some({"type": one_of("message"), "role": st.just("user"), "content": content}, id=ids),
        some({"type": one_of("function_call"), "name": TEXT, "arguments": TEXT}, id=ids, call_id=one_of("c", "d")),
        some({"type": one_of("function_call_output"), "call_id": one_of("c", "d"), "output": TEXT}, id=ids),
        some({"type": one_of("mcp_call", "item_reference")}, id=ids),
    )
    tools = mostly(st.lists(TOOL, max_size=2))
    said = some({}, format=FORMAT, voice=TEXT, speed=one_of(1.0, 9.0))
    heard = some({}, format=FORMAT, turn_detection=VAD, transcription=one_of(None, {}, {"language": "x"}))
    session = some(
        {"type": one_of("realtime", "realtime", "realtime", "transcription")},
        audio=some({}, input=heard, output=said),
        output_modalities=MODALITIES,
        instructions=TEXT,
        tools=tools,
        tool_choice=CHOICE,
        max_output_tokens=MOST,
        truncation=one_of("auto", "disabled", {"type": "retention_ratio", "retention_ratio": 0.5}, {}),
    )
    response = some(
        {"max_output_tokens": MOST},
        output_modalities=MODALITIES,
        instructions=TEXT,
        conversation=one_of("auto", "none"),
        metadata=one_of({"n": "1"}, {}),
        input=mostly(st.lists(item, max_size=2)),
        tools=tools,
    )
    return {
        **{"event_id": TEXT, "audio": AUDIO, "item_id": ids, "previous_item_id": ids, "response_id": ids},
        **{"content_index": one_of(0, 1, -1), "audio_end_ms": one_of(0, 80, -1, 10**12), "item": item},
        **{"session": session, "response": response},
    }


def messages(ids: Made) -> st.SearchStrategy[str | bytes]:
    """What may come over a client's line."""
    known = fields(ids)

    def event(kind: str) -> Made:
        asked = {name: field for name, field in KINDS[kind].model_fields.items() if name != "type"}
        needed = {name: known[name] for name, field in asked.items() if field.is_required()}
        more = {name: known[name] for name in asked if name not in needed}
        return st.fixed_dictionaries({"type": st.just(kind), **needed}, optional=more)

    near = st.sampled_from(OFTEN * 3 + sorted(KINDS)).flatmap(event)
    wrong = st.fixed_dictionaries({"type": JUNK | st.sampled_from(sorted(KINDS))}, optional=dict.fromkeys(known, JUNK))
    right, text, bad = st.sampled_from(RIGHT).map(json.dumps), near.map(json.dumps), wrong.map(json.dumps)
    cut = st.tuples(text, st.floats(0, 1)).map(lambda both: both[0][: round(both[1] * len(both[0]))])
    odd = st.sampled_from(["", "null", "[]", "[" * 100_000, '{"type":' * 3000, "NaN", '{"type":"\\ud800"}', "1e999"])
    kinds = [*[right] * 4, *[text] * 3, bad, cut, odd, st.binary(max_size=50)]
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


@contextmanager
def stranger(server: Served) -> Iterator[ClientConnection]:
    with connect(f"ws://{server.host}/v1/realtime?model=tiny", max_size=None) as socket:
        yield socket


def told(socket: ClientConnection, sent: int) -> list[str]:
    """All that comes until the server has come to the end of what was sent."""
    socket.send(json.dumps({"type": "conversation.item.retrieve", "item_id": "last", "event_id": f"last {sent}"}))
    got = [str(socket.recv(60))]
    while json.loads(got[-1]).get("error", {}).get("event_id") != f"last {sent}":
        got.append(str(socket.recv(60)))
    return got


@LENGTHS
def test_whatever_events_come_the_session_lives_and_keeps_to_itself(server, examples):
    with line(server) as witness:
        witness.say("the secret is sesame")
        item = witness.last("conversation.item.done")["item"]["id"]
        session = witness.events[0]["session"]["id"]
        ids = one_of(item, *IDS)

        @always_the_same(2 * examples)
        @given(st.lists(messages(ids), min_size=4, max_size=16))
        def talk(sent: list[str | bytes]) -> None:
            with stranger(server) as socket:
                for message in sent:
                    socket.send(message)
                got = told(socket, len(sent))
            events = [json.loads(text) for text in got]
            for event in events:
                ORACLE.validate_python(event)
            codes = [event["error"]["code"] for event in events if event["type"] == "error"]
            assert "internal_error" not in codes, codes
            assert sum(isinstance(message, bytes) for message in sent) <= codes.count("invalid_json")
            assert not any("sesame" in text or session in text for text in got)

        talk()
        owns(witness, item)


def owns(witness: Line, item: str) -> None:
    """It has its item as it was."""
    witness.send("conversation.item.retrieve", item_id=item)
    assert witness.last("conversation.item.retrieved")["item"]["content"][0]["text"] == "the secret is sesame"


def test_the_formats_that_are_damaged_are_all_there():
    for form, data in sounds().items():
        assert soundfile.info(io.BytesIO(data)).frames > 1000, form
