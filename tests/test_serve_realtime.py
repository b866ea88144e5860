"""Realtime over the wire: the events in their order, turns, barge-in, tools, what is refused."""

import asyncio
import base64
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antiphon.audio import from_pcm16, read_audio, write_audio
from antiphon.engine import Call, Engine
from antiphon.generate import Omni, collect, load
from antiphon.serve.cutting import PATIENCE
from antiphon.serve.happenings import Item
from antiphon.serve.history import History
from antiphon.serve.realtime import Backlog
from antiphon.serve.settings import Settings
from antiphon.serve.sounds import WireOut, from_wire
from antiphon.serve.speaker import Playback
from antiphon.serve.talk import Talk
from antiphon.train.dialog import TOOLS
from antiphon.transcripts import transcribe
from tests.realtime_line import Line, as_sent, at_24k, line, quiet, sound_of, text_of, types
from tests.serving import Served, make_talkative, serving, tiny, until

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = Path(__file__).parent.parent / "antiphon/tiny"
POSITIONS = '"max_position_embeddings": {}'
HALF = {"type": "retention_ratio", "retention_ratio": 0.5}
PUSH_TO_TALK: Any = {"input": {"turn_detection": None}}
NO_SCHEMA = {"type": "function", "name": "f", "parameters": {"type": 7}}
NO_SOUND = {"type": "message", "role": "user", "content": [{"type": "input_audio"}]}
IMAGE = {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
ANSWER = [
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def in_order(expected: list[str], seen: list[str]) -> None:
    """Each of `expected` comes first at a later place than the one before."""
    places = [seen.index(name) for name in expected]
    assert places == sorted(places), seen


def test_a_text_turn_is_answered_aloud_event_by_event(server):
    with line(server) as c:
        assert types(c.events) == ["session.created", "conversation.created"]
        assert c.events[0]["session"]["audio"]["output"]["format"] == {"type": "audio/pcm", "rate": 24000}
        c.say("What is three plus four?")
        added = c.until("conversation.item.done")
        assert types(added) == ["conversation.item.added", "conversation.item.done"]
        c.send("response.create", response={"metadata": {"n": "1"}})
        events = c.until("response.done")
        assert events[0]["type"] == "response.created"
        assert events[0]["response"]["metadata"] == {"n": "1"}
        in_order(["response.created", *ANSWER], types(events))
        response = events[-1]["response"]
        said = tiny().generate([{"role": "user", "content": "What is three plus four?"}], window=2)
        assert response["status"] == "completed"
        assert text_of(events) == said.text == response["output"][0]["content"][0]["transcript"]
        np.testing.assert_allclose(from_pcm16(sound_of(events)), said.audio.clip(-1, 1), atol=1e-3)
        assert response["usage"]["output_token_details"] == {
            "text_tokens": len(said.text_ids),
            "audio_tokens": len(said.codes),
        }
        assert c.next()["type"] == "rate_limits.updated"


def test_push_to_talk_hears_the_question(server):
    question = at_24k(EXAMPLES / "question.wav")
    with line(server) as c:
        updated = c.update(audio={"input": {"turn_detection": None, "transcription": {"model": "whisper-1"}}})
        assert updated["session"]["audio"]["input"]["turn_detection"] is None
        c.append(question, 17)
        c.send("input_audio_buffer.commit")
        events = c.until("conversation.item.input_audio_transcription.completed")
        in_order(
            [
                "input_audio_buffer.committed",
                "conversation.item.added",
                "conversation.item.done",
                "conversation.item.input_audio_transcription.delta",
                "conversation.item.input_audio_transcription.completed",
            ],
            types(events),
        )
        item = events[0]["item_id"]
        assert {event["item_id"] for event in events if "item_id" in event} == {item}
        assert events[-1]["transcript"] == transcribe(tiny(), question, 24000).text
        c.send("response.create")
        events = c.until("response.done")
        session = tiny().session(window=2)
        session.append_audio(question, 24000)
        assert text_of(events) == collect(session.respond(audio=False)).text
        c.send("conversation.item.retrieve", item_id=item)
        sound = c.last("conversation.item.retrieved")["item"]["content"][0]["audio"]
        np.testing.assert_allclose(from_pcm16(base64.b64decode(sound)), question, atol=1e-3)


def test_one_window_for_all_gives_one_answer_in_chat_and_in_realtime():
    question, file = as_sent(at_24k(EXAMPLES / "question.wav")), io.BytesIO()
    write_audio(file, question, 24000)
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}
    asked: Any = {"messages": [{"role": "user", "content": [part]}], "modalities": ["text", "audio"]}
    sound: Any = {"voice": "ethan", "format": "pcm16"}
    with serving(Settings(window=8)) as served, line(served) as c:
        chat = served.client().chat.completions.create(model="tiny", **asked, audio=sound, max_completion_tokens=20)
        c.update(audio={**PUSH_TO_TALK, "output": {"voice": "ethan"}}, max_output_tokens=20)
        c.append(question, 17)
        c.send("input_audio_buffer.commit")
        c.send("response.create")
        spoken = from_pcm16(sound_of(c.until("response.done")))
    told = from_pcm16(base64.b64decode(chat.choices[0].message.audio.data))
    np.testing.assert_allclose(spoken, told, atol=1e-3)


def test_what_the_user_says_is_read_while_it_is_said(server):
    """Before the turn is over, the conversation holds the windows that have closed."""
    question = at_24k(EXAMPLES / "question.wav")
    for taking in (None, {"type": "server_vad"}):
        with line(server) as c:
            c.update(audio={"input": {"turn_detection": taking}})
            c.append(np.concatenate([quiet(0.2), question]), 40)
            (call,) = server.engine.calls
            until(lambda call=call: call.session.ids.count(tiny().config.audio_token_id) >= 26)  # two seconds
            c.send("conversation.item.retrieve", item_id="nothing")
            assert "input_audio_buffer.committed" not in types(c.until("error"))
        until(lambda: not server.engine.calls)


def test_the_server_hears_when_a_turn_is_over_and_answers(server):
    question = at_24k(EXAMPLES / "question.wav")
    with line(server) as c:
        c.append(np.concatenate([quiet(0.7), question, quiet(1.2)]), 60)
        events = c.until("response.done")
        in_order(
            [
                "input_audio_buffer.speech_started",
                "input_audio_buffer.speech_stopped",
                "input_audio_buffer.committed",
                "conversation.item.added",
                "response.created",
                "response.output_item.added",
                "response.output_audio.delta",
                "response.done",
            ],
            types(events),
        )
        started, stopped = events[0], events[1]
        assert 300 < started["audio_start_ms"] < 1100
        assert 0 < stopped["audio_end_ms"] - 1000 * (0.7 + len(question) / 24000) < 1000
        assert events[-1]["response"]["status"] == "completed"
        assert sound_of(events)


@pytest.mark.parametrize(
    ("likely", "eagerness", "waits"), [(0.9, "auto", False), (0.5, "low", True), (0.5, "high", False)]
)
def test_what_was_said_decides_when_a_turn_is_over(server, monkeypatch, likely, eagerness, waits):
    """An end that is likely enough is one after a fifth of a second; another is waited for."""
    monkeypatch.setattr(Omni, "hears_turns", property(lambda self: True))
    monkeypatch.setattr(Omni, "turn_end", lambda self, recent: likely if len(recent) > 10 else 0.0)
    question = at_24k(EXAMPLES / "question.wav")
    with line(server) as c:
        c.update(audio={"input": {"turn_detection": {"type": "semantic_vad", "eagerness": eagerness}}})
        c.append(np.concatenate([quiet(0.7), question]), 60)
        c.until("input_audio_buffer.speech_started")
        for _ in range(20):  # in real time, so that there is time to judge
            c.append(quiet(0.1), 1)
            time.sleep(0.1)
        c.send("conversation.item.retrieve", item_id="nothing")
        assert ("input_audio_buffer.speech_stopped" in types(c.until("error"))) is not waits


def test_a_guessed_answer_is_the_answer(server, monkeypatch):
    """The answer was begun in the pause; the turn that the guess heard is the one that is answered."""
    taken: list[bool] = []
    take_over = Call._take_over

    def noting(self: Call, guess: Any, *rest: Any) -> Any:
        taken.append(guess.call is not None)
        return take_over(self, guess, *rest)

    until(lambda: not server.engine.calls)  # of a test before this
    monkeypatch.setattr(Call, "_take_over", noting)
    with line(server) as c:
        c.append(np.concatenate([quiet(0.5), at_24k(EXAMPLES / "question-zh.wav"), quiet(0.25)]), 40)
        c.until("input_audio_buffer.speech_started")
        until(lambda: any(call.is_aside and call.turn is not None for call in server.engine.calls))
        c.append(quiet(0.6), 10)
        assert c.until("response.done")[-1]["response"]["status"] == "completed"
    assert taken == [True]


def test_text_only(server):
    with line(server) as c:
        assert c.update(output_modalities=["text"])["session"]["output_modalities"] == ["text"]
        c.say("What day is it?")
        c.until("conversation.item.done")
        c.send("response.create")
        events = c.until("response.done")
        in_order(
            ["response.content_part.added", "response.output_text.delta", "response.output_text.done", "response.done"],
            types(events),
        )
        assert not sound_of(events)
        assert events[-1]["response"]["output"][0]["content"][0]["type"] == "output_text"


def test_a_function_is_called_and_its_result_answered(server):
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    with line(server) as c:
        c.update(tools=tools)
        c.say("Set a timer for five minutes")
        c.until("conversation.item.done")
        c.send("response.create")
        events = c.until("response.done")
        in_order(
            [
                "response.output_item.added",
                "response.function_call_arguments.delta",
                "response.function_call_arguments.done",
                "response.output_item.done",
                "conversation.item.done",
                "response.done",
            ],
            types(events),
        )
        call = events[-1]["response"]["output"][-1]
        assert call["type"] == "function_call"
        assert isinstance(json.loads(call["arguments"]), dict)
        assert not sound_of(events), "a tool call was spoken"
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "OK"}
        c.send("conversation.item.create", item=result)
        c.until("conversation.item.done")
        c.update(tool_choice="none")
        c.send("response.create")
        assert text_of(c.until("response.done"))
        c.send("conversation.item.create", item={**result, "call_id": "call_other"})
        assert "no function was called" in c.last("error")["error"]["message"]


# ------------------------------------------------------------------------------------------- being cut off


def interrupted(c: Line, frames: int) -> str:
    """The item of an answer into which the user speaks, when so many frames of it have come."""
    c.say("What is three plus four?")
    c.until("conversation.item.done")
    c.send("response.create")
    item = c.last("response.output_item.added")["item"]["id"]
    for _ in range(frames):
        c.until("response.output_audio.delta")
    c.append(np.concatenate([quiet(0.3), at_24k(EXAMPLES / "question.wav")[:30000]]), 20)
    return item


def test_who_speaks_interrupts_and_the_answer_is_cut_to_what_was_heard(server, monkeypatch):
    make_talkative(monkeypatch)
    with line(server) as c:
        item = interrupted(c, 6)
        c.until("input_audio_buffer.speech_started")
        c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=240)
        events = c.until("conversation.item.truncated")
        done = next(event for event in events if event["type"] == "response.done")
        assert done["response"]["status"] == "cancelled"
        assert done["response"]["status_details"]["reason"] == "turn_detected"
        assert events[-1]["audio_end_ms"] == 240
        c.send("conversation.item.retrieve", item_id=item)
        kept = c.last("conversation.item.retrieved")["item"]
        assert kept["status"] == "incomplete"
        assert len(base64.b64decode(kept["content"][0]["audio"])) == 2 * 24 * 240
        assert len(kept["content"][0]["transcript"]) < len(done["response"]["output"][0]["content"][0]["transcript"])
        monkeypatch.undo()
        c.append(np.concatenate([at_24k(EXAMPLES / "question.wav")[30000:], quiet(1.0)]), 20)
        assert c.until("response.done")[-1]["response"]["status"] == "completed"


def test_an_answer_is_cancelled_by_its_client(server, monkeypatch):
    make_talkative(monkeypatch)
    with line(server) as c:
        c.say("What is three plus four?")
        c.until("conversation.item.done")
        c.send("response.create")
        c.until("response.output_audio.delta")
        c.send("response.create")
        assert c.last("error")["error"]["code"] == "conversation_already_has_active_response"
        c.send("response.cancel")
        done = c.last("response.done")["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
        c.send("response.cancel")
        assert c.last("error")["error"]["code"] == "response_cancel_not_active"
        monkeypatch.undo()
        c.say("What day is it?")
        c.send("response.create")
        assert c.until("response.done")[-1]["response"]["status"] == "completed"


def test_a_limit_leaves_an_answer_incomplete(server, monkeypatch):
    make_talkative(monkeypatch)
    with line(server) as c:
        c.say("What is three plus four?")
        c.send("response.create", response={"max_output_tokens": 7})
        done = c.last("response.done")["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("incomplete", "max_output_tokens")
        assert done["usage"]["output_token_details"]["audio_tokens"] == 7


def test_a_client_that_says_late_what_was_heard_is_told_what_was_kept(server, monkeypatch):
    """After the cut by our clock there is less of the answer than it knows of."""
    make_talkative(monkeypatch)
    monkeypatch.setattr(Playback, "heard", 0.08)
    with line(server) as c:
        item = interrupted(c, 6)
        c.until("response.done")
        time.sleep(PATIENCE + 0.3)
        c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=400)
        assert c.last("conversation.item.truncated")["audio_end_ms"] == 80


def test_a_client_that_says_what_was_heard_while_our_clock_cuts_is_believed(server, monkeypatch):
    make_talkative(monkeypatch)
    monkeypatch.setattr("antiphon.serve.cutting.PATIENCE", 0)
    cut = History.cut

    async def slow(self: History, item: Item, ms: int) -> None:
        await cut(self, item, ms)
        await asyncio.sleep(0.5)

    monkeypatch.setattr(History, "cut", slow)
    with line(server) as c:
        item = interrupted(c, 12)
        c.until("response.done")
        c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=80)
        assert c.last("conversation.item.truncated")["audio_end_ms"] == 80
        c.send("conversation.item.retrieve", item_id=item)
        kept = c.last("conversation.item.retrieved")["item"]["content"][0]
        assert len(base64.b64decode(kept["audio"])) == 2 * 24 * 80


def test_cuts_outside_the_answer_are_refused(server):
    with line(server) as c:
        c.say("What day is it?")
        user = c.last("conversation.item.done")["item"]["id"]
        c.send("response.create")
        item = c.last("response.done")["response"]["output"][0]["id"]
        for id, ms in ((item, 60_000), (item, -1), (user, 0), ("item_0", 0)):
            c.send("conversation.item.truncate", item_id=id, content_index=0, audio_end_ms=ms, event_id="e7")
            assert c.last("error")["error"]["event_id"] == "e7"
        c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=80)
        assert c.last("conversation.item.truncated")["audio_end_ms"] == 80


# -------------------------------------------------------------------------------------------------- items


def test_items_are_put_in_their_place_and_deleted(server):
    """What the model is told is what the items say: the answer is that of the readable loop to the same messages."""
    with line(server) as c:
        c.say("What day is it?")
        first = c.last("conversation.item.done")["item"]["id"]
        c.say("What is three plus four?")
        c.until("conversation.item.done")
        content = [{"type": "output_text", "text": "It is Monday"}]
        between = {"id": "mine", "type": "message", "role": "assistant", "content": content}
        c.send("conversation.item.create", item=between, previous_item_id=first)
        assert c.last("conversation.item.added")["previous_item_id"] == first
        c.send("conversation.item.create", item=between)
        assert c.last("error")["error"]["code"] == "item_create_duplicate_id"
        c.send("response.create", response={"output_modalities": ["text"]})
        said = text_of(c.until("response.done"))
        three: list[dict[str, Any]] = [
            {"role": "user", "content": "What day is it?"},
            {"role": "assistant", "content": "It is Monday"},
            {"role": "user", "content": "What is three plus four?"},
        ]
        assert said == tiny().generate(three, audio=False).text
        for id in (first, "mine"):
            c.send("conversation.item.delete", item_id=id)
            assert c.last("conversation.item.deleted")["item_id"] == id
        c.send("conversation.item.retrieve", item_id="mine")
        assert c.last("error")["error"]["code"] == "item_retrieve_invalid_item_id"
        c.say("What day is it?")
        c.send("response.create", response={"output_modalities": ["text"]})
        asked = [three[2], {"role": "assistant", "content": said}, three[0]]
        assert text_of(c.until("response.done")) == tiny().generate(asked, audio=False).text


def test_instructions_change_in_the_middle(server):
    with line(server) as c:
        c.say("What is three plus four?")
        c.until("conversation.item.done")
        c.update(instructions="You are brief.", output_modalities=["text"])
        c.send("response.create")
        done = c.until("response.done")
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "What is three plus four?"},
        ]
        said = tiny().generate(messages, audio=False)
        assert text_of(done) == said.text


def test_an_answer_beside_the_conversation_leaves_no_trace(server):
    with line(server) as c:
        c.say("What is three plus four?")
        c.until("conversation.item.done")
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What day is it?"}]}
        beside = {"conversation": "none", "input": [item], "output_modalities": ["text"], "metadata": {"k": "v"}}
        c.send("response.create", response=beside)
        events = c.until("response.done")
        assert not [event for event in events if event["type"].startswith("conversation.item")]
        assert text_of(events) == tiny().generate([{"role": "user", "content": "What day is it?"}], audio=False).text
        assert events[-1]["response"].get("conversation_id") is None
        c.send("response.create", response={"output_modalities": ["text"]})
        said = tiny().generate([{"role": "user", "content": "What is three plus four?"}], audio=False)
        assert text_of(c.until("response.done")) == said.text


def test_an_answer_to_other_items_is_of_the_conversation(server):
    """`input` takes the place of what was said, for one answer; items that were said may be named in it."""
    with line(server) as c:
        c.say("What is three plus four?")
        first = c.last("conversation.item.done")["item"]["id"]
        c.say("What day is it?")
        c.until("conversation.item.done")
        named = {"input": [{"type": "item_reference", "id": first}], "output_modalities": ["text"]}
        c.send("response.create", response=named)
        events = c.until("response.done")
        said = tiny().generate([{"role": "user", "content": "What is three plus four?"}], audio=False).text
        assert text_of(events) == said
        assert "conversation.item.added" in types(events)
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "What is three plus four?"},
            {"role": "user", "content": "What day is it?"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "What day is it?"},
        ]
        c.say("What day is it?")
        c.send("response.create", response={"output_modalities": ["text"]})
        assert text_of(c.until("response.done")) == tiny().generate(messages, audio=False).text
        c.send("response.create", response={"input": [{"type": "item_reference", "id": "other"}]})
        assert c.last("error")["error"]["code"] == "item_retrieve_invalid_item_id"


def test_instructions_of_one_answer_are_for_it_alone(server):
    question: dict[str, Any] = {"role": "user", "content": "What is three plus four?"}
    with line(server) as c:
        c.update(instructions="You are brief.", output_modalities=["text"])
        c.say("What is three plus four?")
        c.send("response.create", response={"instructions": "Say what day it is."})
        first = text_of(c.until("response.done"))
        assert (
            first == tiny().generate([{"role": "system", "content": "Say what day it is."}, question], audio=False).text
        )
        c.say("What is three plus four?")
        c.send("response.create")
        after = [{"role": "system", "content": "You are brief."}, question, {"role": "assistant", "content": first}]
        assert text_of(c.until("response.done")) == tiny().generate([*after, question], audio=False).text


def test_instructions_are_enough_to_begin_with(server):
    with line(server) as c:
        c.update(instructions="You are brief.", output_modalities=["text"])
        c.send("response.create")
        assert c.last("response.done")["response"]["status"] == "completed"


def test_tools_of_one_answer_are_for_it_alone(server):
    timer = next(tool for tool in TOOLS if "timer" in tool["function"]["name"])
    one = {"tools": [{"type": "function", **timer["function"]}], "tool_choice": "required"}
    with line(server) as c:
        c.update(output_modalities=["text"])
        c.say("Set a timer for five minutes")
        c.send("response.create", response=one)
        called = c.last("response.done")["response"]["output"]
        assert [item["name"] for item in called if item["type"] == "function_call"] == [timer["function"]["name"]]
        c.say("Set a timer for five minutes")
        c.send("response.create")
        answered = c.last("response.done")["response"]["output"]
        assert not [item for item in answered if item["type"] == "function_call"]


@pytest.mark.parametrize(
    ("response", "param"),
    [
        ({"prompt": {"id": "p"}}, "response.prompt"),
        ({"tool_choice": "required"}, "response.tool_choice"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "response.tools"),
        ({"max_output_tokens": 0}, "response.max_output_tokens"),
        ({"audio": {"output": {"voice": "nobody"}}}, "response.audio.output.voice"),
        ({"conversation": "conv_other"}, "response.conversation"),
        ({"input": [{"type": "message", "role": "user"}]}, "response.input.0.content"),
        ({"input": 7}, "input"),
    ],
)
def test_what_an_answer_cannot_be_given_in_is_said(server, response, param):
    with line(server) as c:
        c.say("What day is it?")
        c.until("conversation.item.done")
        c.send("response.create", response=response)
        error = c.last("error")["error"]
        assert error["type"] == "invalid_request_error"
        assert param in (error.get("param") or "")
        c.send("response.create", response={"output_modalities": ["text"]})
        assert c.last("response.done")["response"]["status"] == "completed"


def test_what_was_sent_of_a_turn_can_be_taken_back(server):
    with line(server) as c:
        c.update(audio=PUSH_TO_TALK, output_modalities=["text"])
        c.append(at_24k(EXAMPLES / "question-zh.wav"), 9)
        c.send("input_audio_buffer.clear")
        c.until("input_audio_buffer.cleared")
        c.send("input_audio_buffer.commit")
        assert c.last("error")["error"]["code"] == "input_audio_buffer_commit_empty"
        c.append(at_24k(EXAMPLES / "question.wav"), 9)
        c.send("input_audio_buffer.commit")
        c.send("response.create")
        session = tiny().session(window=2)
        session.append_clip(at_24k(EXAMPLES / "question.wav"), 24000)
        assert text_of(c.until("response.done")) == collect(session.respond(audio=False)).text


# ---------------------------------------------------------------------------------------- ways to hold one


@pytest.mark.parametrize("form", ["audio/pcmu", "audio/pcma"])
def test_telephones(server, form):
    question, rate = read_audio(EXAMPLES / "question.wav")
    data = WireOut(form, rate).push(question, final=True)
    with line(server) as c:
        how = {"format": {"type": form}}
        c.update(audio={"input": {"turn_detection": None, **how}, "output": how})
        for start in range(0, len(data), 160):
            c.send("input_audio_buffer.append", audio=base64.b64encode(data[start : start + 160]).decode())
        c.send("input_audio_buffer.commit")
        c.send("response.create")
        events = c.until("response.done")
        frames = events[-1]["response"]["usage"]["output_token_details"]["audio_tokens"]
        assert len(from_wire(form, sound_of(events))) == 640 * frames


def test_nobody_there_for_a_while(server):
    taking = {"type": "server_vad", "idle_timeout_ms": 1000}
    with line(server) as c:
        c.update(audio={"input": {"turn_detection": taking}})
        c.append(quiet(0.5))
        c.say("What day is it?")
        c.send("response.create", response={"max_output_tokens": 4})
        c.until("response.done")
        done = time.monotonic()
        events = c.until("response.done")
        assert time.monotonic() - done > 1.0
        in_order(
            ["input_audio_buffer.timeout_triggered", "input_audio_buffer.committed", "response.created"], types(events)
        )


def test_somebody_who_speaks_is_not_asked_whether_they_are_there(server):
    taking = {"type": "server_vad", "idle_timeout_ms": 1500, "create_response": False}
    with line(server) as c:
        c.update(audio={"input": {"turn_detection": taking}})
        c.say("What day is it?")
        c.send("response.create", response={"max_output_tokens": 4})
        c.until("response.done")
        c.append(np.concatenate([quiet(0.5), at_24k(EXAMPLES / "question.wav"), quiet(0.7)]), 60)
        c.until("input_audio_buffer.committed")
        time.sleep(2)
        c.send("conversation.item.retrieve", item_id="nothing")
        seen = types(c.until("error"))
        assert "input_audio_buffer.timeout_triggered" not in seen
        assert "response.created" not in seen, "create_response is false"


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory) -> Iterator[Served]:
    """A server of tiny with a quarter of its positions."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("short") / "tiny")
    config = (folder / "config.json").read_text()
    assert config.count(POSITIONS.format(8192)) == 2
    (folder / "config.json").write_text(config.replace(POSITIONS.format(8192), POSITIONS.format(2048)))
    with serving(make=lambda: Engine(load(folder, dtype=torch.float32), 2).start()) as served:
        yield served


@pytest.mark.parametrize(
    ("truncation", "status"),
    [("auto", "completed"), ({"type": "retention_ratio", "retention_ratio": 0.3}, "completed"), ("disabled", "failed")],
)
def test_a_conversation_that_is_full_forgets_its_beginning_or_says_so(forgetful, truncation, status):
    with line(forgetful) as c:
        c.update(truncation=truncation, output_modalities=["text"])
        for _ in range(9):  # more than there are positions for
            c.say("What day is it? " * 60)
        c.send("response.create", response={"max_output_tokens": 8})
        done = c.last("response.done")["response"]
        assert done["status"] in (status, "incomplete" if status == "completed" else status)
        assert status == "completed" or done["status_details"]["error"]["code"]


def test_pings_are_answered_while_something_takes_its_time(server, monkeypatch):
    """Else whoever says much at once loses the connection; what was sent meanwhile is done after it, in order."""
    begun, may_end = threading.Event(), threading.Event()
    clear = Talk.clear

    async def slowly(self: Talk) -> None:
        begun.set()
        await asyncio.to_thread(may_end.wait, 30)
        await clear(self)

    monkeypatch.setattr(Talk, "clear", slowly)
    with line(server) as c:
        c.send("input_audio_buffer.clear")
        assert begun.wait(30)
        for text in ("one", "two"):
            c.say(text)
        answered = c.socket.ping().wait(10)
        may_end.set()
        assert answered
        kinds = types(c.until("conversation.item.done"))
        assert kinds == ["input_audio_buffer.cleared", "conversation.item.added", "conversation.item.done"]
        assert c.last("conversation.item.done")["item"]["content"][0]["text"] == "two"


def test_what_waits_to_be_done_is_held_within_bounds():
    async def look() -> list[int]:
        backlog, put = Backlog(10), list[int]()

        async def fill() -> None:
            for i in range(5):
                await backlog.put({"type": "websocket.receive", "text": "1234"})
                put.append(i)

        filling = asyncio.create_task(fill())
        seen = list[int]()
        for _ in range(5):
            for _ in range(5):
                await asyncio.sleep(0)
            seen.append(len(put))
            await backlog.take()
        await filling
        return seen

    assert asyncio.run(look()) == [2, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "very"}}}}, "eagerness"),
        ({"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 3}}}}, "threshold"),
        ({"audio": {"input": {"turn_detection": {"type": "server_vad", "idle_timeout_ms": 1}}}}, "idle_timeout_ms"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}, "rate"),
        ({"audio": {"output": {"speed": 1.2}}}, "session.audio.output.speed"),
        ({"audio": {"output": {"voice": "nobody"}}}, "session.audio.output.voice"),
        ({"output_modalities": ["text", "audio"]}, "session.output_modalities"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "session.tools"),
        ({"truncation": {"type": "retention_ratio", "retention_ratio": 0.99}}, "session.truncation"),
        (
            {
                "truncation": {
                    "type": "retention_ratio",
                    "retention_ratio": 0.5,
                    "token_limits": {"post_instructions": 9},
                }
            },
            "token_limits",
        ),
        ({"prompt": {"id": "p"}}, "session.prompt"),
        ({"max_output_tokens": 5000}, "session.max_output_tokens"),
        ({"type": "transcription"}, "session.type"),
        ({"audio": {"input": {"format": {"type": "audio/mp3"}}}}, "audio.input.format.type"),
        ({"audio": {"input": {"turn_detection": {"type": "vad"}}}}, "turn_detection.type"),
        ({"voice": "ethan"}, "session.voice"),
        ({"type": "other"}, "session.type"),
        ({"instructions": 7}, "session"),
    ],
)
def test_what_cannot_be_set_is_said_and_changes_nothing(server, session, param):
    with line(server) as c:
        c.send("session.update", session={"type": "realtime", **session})
        error = c.last("error")["error"]
        assert error["type"] == "invalid_request_error"
        assert param in (error.get("param") or "")
        assert c.update()["session"]["audio"] == c.events[0]["session"]["audio"]


@pytest.mark.parametrize(
    "message",
    [
        "",
        "{",
        "[]",
        "null",
        b"\x00\x01",
        '{"type": 7}',
        '{"type": "nothing"}',
        '{"type": "response.mcp_call.completed"}',
        '{"type": "output_audio_buffer.clear"}',
        '{"type": "input_audio_buffer.append"}',
        '{"type": "input_audio_buffer.append", "audio": "?"}',
        '{"type": "input_audio_buffer.append", "audio": "AAAA"}',
        '{"type": "input_audio_buffer.append", "audio": 7}',
        '{"type": "input_audio_buffer.commit"}',
        '{"type": "conversation.item.create", "item": {"type": "nonsense"}}',
        json.dumps({"type": "conversation.item.create", "item": NO_SOUND}),
        '{"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": 7}}',
        json.dumps({"type": "conversation.item.create", "item": IMAGE}),
        '{"type": "conversation.item.create", "item": {"type": "mcp_call"}}',
        '{"type": "conversation.item.create"}',
        '{"type": "conversation.item.delete", "item_id": "x"}',
        '{"type": "response.create", "response": {"output_modalities": []}, "x": ' + "[" * 500 + "]" * 500 + "}",
        '{"type": "response.create"}',
        '{"type": "session.update", "session": 7}',
        '{"type": "response.cancel", "event_id": "\\ud800"}',
        '{"type": "conversation.item.retrieve", "item_id": "\\ud800"}',
        json.dumps({"type": "session.update", "session": {"type": "realtime", "tools": [NO_SCHEMA]}}),
    ],
)
def test_nonsense_is_answered_and_the_session_goes_on(server, message):
    with line(server) as c:
        c.socket.send(message)
        error = c.last("error")["error"]
        assert error["type"] in ("invalid_request_error",) or "nothing to answer" in str(error)
        c.say("What day is it?")
        assert c.last("conversation.item.done")
