"""Chat over the wire, asked by OpenAI's own client: words, sound, streams, tools, turns and what is refused."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

from antiphon.chat import ToolCall
from antiphon.serve.calls import Splitter
from antiphon.train.dialog import TOOLS
from tests.serving import Served, engine, serving, tiny, until

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTION = base64.b64encode((EXAMPLES / "question.wav").read_bytes()).decode()
SPOKEN: Any = {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": QUESTION, "format": "wav"}}]}
ASKED: Any = {"role": "user", "content": "What is three plus four?"}
ALOUD: Any = {"modalities": ["text", "audio"], "max_completion_tokens": 6}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def test_the_words_are_those_of_the_readable_loop(server):
    reply = server.client().chat.completions.create(model="tiny", messages=[ASKED])
    said = tiny().generate([ASKED], audio=False)
    choice = reply.choices[0]
    assert choice.message.content == said.text
    assert choice.finish_reason == "stop"
    assert reply.usage.completion_tokens == len(said.text_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_spoken_question_is_answered_aloud(server):
    reply = server.client().chat.completions.create(
        model="tiny", messages=[SPOKEN], audio={"voice": "ethan", "format": "wav"}, seed=3, **ALOUD
    )
    audio = reply.choices[0].message.audio
    said = tiny().generate([SPOKEN], voice="ethan", seed=3, max_text_tokens=6, max_frames=6)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.data)), dtype="float32")
    assert (audio.transcript, rate) == (said.text, said.sample_rate)
    np.testing.assert_allclose(samples, said.audio.clip(-1, 1), atol=1e-4)
    assert reply.usage.prompt_tokens_details.audio_tokens > 20
    assert reply.usage.completion_tokens_details.audio_tokens == len(said.codes)


def test_a_stream_gives_what_one_answer_gives(server):
    client = server.client()
    whole = client.chat.completions.create(
        model="tiny", messages=[SPOKEN], audio={"voice": "ethan", "format": "pcm16"}, **ALOUD
    )
    stream = client.chat.completions.create(
        model="tiny",
        messages=[SPOKEN],
        audio={"voice": "ethan", "format": "pcm16"},
        stream=True,
        stream_options={"include_usage": True},
        **ALOUD,
    )
    text, sound, order, finish, usage = "", b"", [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            if choice.delta.audio is not None:
                text += choice.delta.audio.transcript or ""
                sound += base64.b64decode(choice.delta.audio.data or "")
                order.append("sound" if choice.delta.audio.data else "text")
    audio = whole.choices[0].message.audio
    assert text == audio.transcript
    assert sound == base64.b64decode(audio.data)
    assert order[0] == "text"
    assert order.index("sound") < len(order) - 2, "all sound came at the end"
    assert (finish, usage) == (whole.choices[0].finish_reason, whole.usage)


def test_turns_go_on_and_a_spoken_reply_is_named_by_its_id(server):
    client = server.client()
    first = client.chat.completions.create(
        model="tiny", messages=[ASKED], audio={"voice": "alloy", "format": "mp3"}, **ALOUD
    )
    audio = first.choices[0].message.audio
    again: Any = {"role": "user", "content": "What day is it?"}
    by_id: Any = [ASKED, {"role": "assistant", "audio": {"id": audio.id}}, again]
    by_text: Any = [ASKED, {"role": "assistant", "content": audio.transcript}, again]
    replies = [client.chat.completions.create(model="tiny", messages=m).usage.prompt_tokens for m in (by_id, by_text)]
    assert replies[0] == replies[1]
    with pytest.raises(openai.BadRequestError, match="there is no reply"):
        client.chat.completions.create(
            model="tiny", messages=[ASKED, {"role": "assistant", "audio": {"id": "audio_0"}}, again]
        )


def test_the_first_system_turn_and_the_seed_count(server):
    client = server.client()

    def ask(**how):
        system = [{"role": "system", "content": "You are brief."}]
        return client.chat.completions.create(model="tiny", messages=[*system, ASKED], **how)

    drawn = {ask(temperature=2.0, seed=seed, max_completion_tokens=8).choices[0].message.content for seed in range(5)}
    assert len(drawn) > 1
    again = {ask(temperature=2.0, seed=1, max_completion_tokens=8).choices[0].message.content for _ in range(2)}
    assert len(again) == 1
    assert (
        ask().usage.prompt_tokens > client.chat.completions.create(model="tiny", messages=[ASKED]).usage.prompt_tokens
    )


TIMER: Any = {"role": "user", "content": "Set a timer for five minutes"}


def test_a_tool_is_called_and_its_result_answered(server):
    client = server.client()
    stream = [*client.chat.completions.create(model="tiny", messages=[TIMER], tools=[*TOOLS], stream=True)]
    reply = client.chat.completions.create(model="tiny", messages=[TIMER], tools=[*TOOLS])
    message = reply.choices[0].message
    call = message.tool_calls[0]
    assert reply.choices[0].finish_reason == "tool_calls"
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "set_timer"
    assert [*arguments] == ["minutes"]
    assert isinstance(arguments["minutes"], int)
    calls = [c for chunk in stream for choice in chunk.choices for c in choice.delta.tool_calls or ()]
    assert [(c.function.name, c.function.arguments) for c in calls] == [(call.function.name, call.function.arguments)]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "OK"}
    told = [TIMER, message.model_dump(), result]
    after = client.chat.completions.create(model="tiny", messages=told, tools=[*TOOLS], tool_choice="none")
    assert after.choices[0].message.content
    none = client.chat.completions.create(model="tiny", messages=[TIMER], tools=[*TOOLS], tool_choice="none")
    assert not none.choices[0].message.tool_calls


def test_a_call_can_be_required_and_named(server):
    client = server.client()

    def ask(choice: Any, parallel: bool = False) -> list[tuple[str, Any]]:
        reply = client.chat.completions.create(
            model="tiny", messages=[ASKED], tools=[*TOOLS], tool_choice=choice, parallel_tool_calls=parallel
        )
        message = reply.choices[0].message
        assert not message.content
        return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]

    assert len(ask("required")) == 1
    (name, arguments), *more = ask({"type": "function", "function": {"name": "set_timer"}})
    assert (name, more) == ("set_timer", [])
    assert {key: type(value) for key, value in arguments.items()} == {"minutes": int}
    with pytest.raises(openai.BadRequestError, match="no function 'other'"):
        ask({"type": "function", "function": {"name": "other"}})
    broken: Any = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}
    with pytest.raises(openai.BadRequestError, match="too intricate"):
        client.chat.completions.create(model="tiny", messages=[ASKED], tools=[broken], tool_choice="required")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, "there is no model 'other'"),
        ({"messages": []}, "nothing to answer"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "/etc/passwd"}]}]}, "messages"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}],
                    }
                ]
            },
            "not base64",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
                    }
                ]
            },
            "not readable sound",
        ),
        ({"messages": 7}, "messages is 7; expected a list"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages.0.role is \"bot\"; expected 'developer' or 'system' or",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content is 7; expected text or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
            "content.0.type is \"sound\"; expected 'text' or",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content.0.text is missing"),
        ({"stream": "maybe"}, 'stream is "maybe"; expected true or false'),
        ({"tools": [{"type": "function"}]}, "tools.0.function is missing"),
        (
            {"tool_choice": "sometimes"},
            "tool_choice is \"sometimes\"; expected 'none', 'auto' or 'required' or an object",
        ),
        ({"n": 2}, "one choice"),
        ({"n": 0}, "one choice"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"response_format": {"type": "json_object"}}, "ask for JSON by a tool"),
        ({"modalities": ["text", "audio"]}, "audio.format"),
        (
            {"modalities": ["text", "audio"], "audio": {"voice": "nobody", "format": "wav"}},
            "there is no voice 'nobody'",
        ),
        ({"modalities": ["text", "audio"], "audio": {"voice": "ethan", "format": "wav"}, "stream": True}, "pcm16"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0; give at least 1"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_what_cannot_be_done_is_said(server, changes, words):
    with server.http() as http:
        refused = http.post("/v1/chat/completions", json={"model": "tiny", "messages": [ASKED], **changes})
    assert refused.status_code in (400, 404), refused.text
    assert words in refused.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100000, b'{"model": NaN}'])
def test_a_body_that_is_no_json_object_is_refused(server, body):
    with server.http() as http:
        refused = http.post("/v1/chat/completions", content=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_who_comes_too_late_is_told_when_to_ask_again():
    with serving(make=lambda: engine(1)) as served:
        held = served.engine.open()
        with pytest.raises(openai.InternalServerError, match="as many as this machine") as caught:
            served.client().chat.completions.create(model="tiny", messages=[ASKED])
        assert caught.value.status_code == 503
        assert float(caught.value.response.headers["retry-after"]) > 0
        held.close()


def test_a_client_that_goes_away_leaves_nothing_behind(server):
    stream = server.client().chat.completions.create(
        model="tiny", messages=[ASKED], audio={"voice": "ethan", "format": "pcm16"}, stream=True, **ALOUD
    )
    next(iter(stream))
    stream.close()
    until(lambda: not server.engine.calls)


# ------------------------------------------------------------------------------------------- the splitter


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_and_thoughts_are_told_from_text(size):
    text = (
        '<think>hm</think>\n Well < 3,\n<tool_call>\n{"name": "a", "arguments": {"x": "<"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b"}\n</tool_call> and <tool'
    )
    splitter, parts = Splitter(), []
    for start in range(0, len(text), size):
        parts += splitter.push(text[start : start + size])
    parts += splitter.flush()
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert calls == [ToolCall("a", {"x": "<"}), ToolCall("b", {})]
    assert "".join(part for part in parts if isinstance(part, str)) == "Well < 3,\nand <tool"


def test_a_call_that_is_cut_off_is_none():
    splitter = Splitter()
    assert [*splitter.push('Yes <tool_call>{"name": "a"'), *splitter.flush()] == ["Yes "]
