"""Tool calls are held to the JSON schema that was declared for them."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from antiphon.chat import ToolCall, assistant_text
from antiphon.engine import Engine
from antiphon.errors import InputError
from antiphon.generate import collect
from antiphon.guide import ANY, Guide, after, call_grammar, grammar_of, start
from antiphon.sampling import Sampling
from tests.models import omni


def admits(schema: Any, text: str) -> bool:
    return () in after(start(grammar_of(schema)), text.encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(JSON, st.booleans())
def test_whatever_json_writes_is_json(value, ascii_only):
    assert () in after(start(ANY), json.dumps(value, ensure_ascii=ascii_only).encode())


@given(st.binary(max_size=12))
def test_what_is_admitted_can_be_read(text):
    if () in after(start(ANY), text):
        json.loads(text)


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", 1]}},
    },
    "required": ["name"],
}
NEXT = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": NEXT}, "required": ["next"]}},
}
SOME = {"type": "array", "minItems": 1, "items": {"type": "boolean"}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            PERSON,
            ['{"name": "é\\n"}', '{"name":"x","age":-3}', '{"name": "x", "tags": ["a", 1, "a"]}'],
            [
                "{}",
                '{"age": 3}',
                '{"name": 3}',
                '{"name": "x", "age": 3.5}',
                '{"name": "x", "other": 1}',
                '{"name": "x",}',
            ],
        ),
        (PERSON, ['{"name": "x", "age": 3, "tags": []}'], ['{"name": "x", "tags": ["b"]}', '{"age": 3, "name": "x"}']),
        (TREE, ['{"next": null}', '{"next": {"next": null}}'], ["null", '{"next": 3}', "{}"]),
        ({"type": ["integer", "null"]}, ["0", "-12", "null"], ["01", "1.0", "", "-", "true"]),
        ({"type": "number"}, ["0", "-1.5e+3", "2E8"], [".5", "1.", "1e"]),
        ({"const": {"a": [1]}}, ['{"a": [1]}'], ['{"a": [2]}']),
        (SOME, ["[true]", "[true, false]"], ["[]", "[1]", "[true,]"]),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a": 1}']),
        ({"type": "object"}, ["{}", '{"a": {"b": [1, "x"]}}'], ["[]", "{a: 1}"]),
        (True, ['[{"a": [[]]}]', "null"], ["nul", "[1 2]"]),
    ],
)
def test_a_schema_admits_what_it_says(schema, right, wrong):
    for text in right:
        assert admits(schema, text), text
    for text in wrong:
        assert not admits(schema, text), text


@pytest.mark.parametrize(
    "schema",
    [
        *(7, {"type": "what"}, {"type": 7}, {"type": [[]]}, {"type": []}, {"$ref": "#/none"}, {"$ref": "#"}),
        *({"anyOf": 5}, {"oneOf": []}, {"enum": 7}, {"enum": []}, {"type": "array", "items": 1}),
        *({"properties": [1]}, {"properties": {"x": {}}, "required": 3}, {"properties": {"x": {"type": {}}}}),
    ],
)
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(InputError):
        start(grammar_of(schema))


def test_alternatives_without_end_are_refused():
    schema: dict[str, Any] = {"$defs": {"0": {"type": "null"}}}
    for level in range(1, 30):
        below = {"$ref": f"#/$defs/{level - 1}"}
        schema["$defs"][str(level)] = {"anyOf": [below, below]}
    with pytest.raises(InputError, match="too intricate"):
        start(grammar_of({**schema, "$ref": "#/$defs/29"}))


TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": PERSON}},
    {"type": "function", "function": {"name": "wait"}},
]


def test_the_grammar_is_that_of_the_chat_template():
    text = assistant_text("", [ToolCall("look", {"name": "Anna", "age": 3})])
    inside = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert () in after(start(call_grammar(TOOLS)), inside.encode())
    assert not after(start(call_grammar(TOOLS)), b'\n{"name": "leave"')


@pytest.mark.parametrize("seed", range(4))
def test_a_model_of_random_weights_calls_as_it_must(seed):
    """In both loops alike, and several in one batch each by its own rule."""
    model = omni()
    small = [{"type": "function", "function": {"name": "f", "parameters": {"enum": [1, "b"]}}}]

    def how() -> dict[str, Any]:
        guide = Guide(model.tokenizer, small, required=True, parallel=False)
        return {"audio": False, "seed": seed, "max_text_tokens": 200, "text": Sampling(1.0), "guide": guide}

    session = model.session(window=1)
    session.append_text("?")
    reply = collect(session.respond(**how()))
    assert reply.finish == "stop"
    assert [call.name for call in reply.tool_calls] == ["f"]
    engine = Engine(model)
    calls = [engine.open(window=1) for _ in range(3)]
    for call in calls:
        call.append_text("?")
    answers = [call.respond(**how()) for call in calls[:2]] + [calls[2].respond(audio=False, max_text_tokens=9)]
    engine.run()
    assert [answer.reply().text_ids for answer in answers[:2]] == [reply.text_ids] * 2
    session = model.session(window=1)
    session.append_text("?")
    assert answers[2].reply().text_ids == collect(session.respond(audio=False, max_text_tokens=9)).text_ids


def test_without_a_rule_scores_stay_as_they_are():
    model = omni()
    guide = Guide(model.tokenizer, TOOLS)
    scores = torch.randn(1, model.config.text.vocab_size)
    assert guide.masked([], scores) is scores
    opened = model.tokenizer.token_id("<tool_call>")
    assert opened is not None
    assert not torch.isfinite(guide.masked([opened], scores)).all()
