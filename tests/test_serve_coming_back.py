"""Realtime over the wire: what is kept of a session, clients that come back, and a server that stops."""

import asyncio
import base64
import gc
import json
import logging
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import openai
import pytest
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from antiphon.audio import Samples
from antiphon.engine import Call
from antiphon.errors import InputError
from antiphon.generate import collect
from antiphon.serve.kept import Shelves
from antiphon.serve.logs import JsonLines
from antiphon.serve.realtime import Lobby
from antiphon.serve.settings import Settings
from antiphon.serve.talk import Talk
from tests.realtime_line import Line, as_sent, at_24k, line, quiet, text_of
from tests.serving import Served, engine, make_talkative, serving, tiny, until

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


# ---------------------------------------------------------------------------------------- what is kept


def test_what_cannot_be_written_down_is_told_and_the_next_turn_is(server, monkeypatch):
    question = at_24k(EXAMPLES / "question.wav")
    append = Call.append_clip

    def failing(self: Call, samples: Any, rate: int) -> Any:
        monkeypatch.setattr(Call, "append_clip", append)
        raise InputError("this cannot be heard")

    with line(server) as c:
        c.update(audio={"input": {"turn_detection": None, "transcription": {"model": "whisper-1"}}})
        monkeypatch.setattr(Call, "append_clip", failing)
        c.append(question, 9)
        c.send("input_audio_buffer.commit")
        item = c.last("conversation.item.added")["item"]["id"]
        failed = c.last("conversation.item.input_audio_transcription.failed")
        assert (failed["item_id"], failed["content_index"]) == (item, 0)
        assert failed["error"]["message"] == "this cannot be heard"
        assert failed["error"]["type"] == "invalid_request_error"
        c.append(question, 9)
        c.send("input_audio_buffer.commit")
        assert c.last("conversation.item.input_audio_transcription.completed")["transcript"]


class Far(dict[Any, Any]):
    """A shelf in another process: what is put there stays as it was."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, deepcopy(value))


@pytest.fixture
def shelves(monkeypatch) -> Shelves:
    """Where a server keeps its sessions for others."""
    shelves = Shelves(sessions=Far(), said=Far())
    monkeypatch.setattr("antiphon.serve.app.Shelves", lambda: shelves)
    return shelves


def test_older_sound_is_forgotten_beyond_a_limit_and_told_as_it_was_written_down(shelves):
    question = at_24k(EXAMPLES / "question.wav")
    with serving(Settings(history_bytes=2 * len(question) + 100)) as served, line(served) as c:
        c.update(output_modalities=["text"], audio={"input": {"turn_detection": None, "transcription": {"model": "x"}}})
        users, texts = [], []
        for _ in range(3):
            c.append(question, 3)
            c.send("input_audio_buffer.commit")
            users.append(c.last("conversation.item.added")["item"]["id"])
            texts.append(c.last("conversation.item.input_audio_transcription.completed")["transcript"])
        kept = []
        for id in users:
            c.send("conversation.item.retrieve", item_id=id)
            kept.append("audio" in c.last("conversation.item.retrieved")["item"]["content"][0])
        assert kept == [False, True, True]  # what was said last stands outside of the limit
        until(lambda: [item.sound_bytes > 0 for item in shelves.said.values()] == kept)  # a moment after it was told
        until(lambda: [item.parts[0].text for item in shelves.said.values()] == texts)
        c.send("conversation.item.delete", item_id=users[1])  # so that it is told anew
        c.send("response.create")
        session = tiny().session(window=2)
        session.append_message({"role": "user", "content": texts[0]})
        session.append_message({"role": "user", "content": [{"type": "audio", "audio": (as_sent(question), 24000)}]})
        assert text_of(c.until("response.done")) == collect(session.respond(audio=False)).text


def test_a_transcription_session_only_writes_down(shelves):
    question = at_24k(EXAMPLES / "question.wav")
    with serving() as server, line(server, intent="transcription") as c:
        assert c.events[0]["session"]["type"] == "transcription"
        c.append(np.concatenate([quiet(0.5), question, quiet(1.0)]), 30)
        events = c.until("conversation.item.input_audio_transcription.completed")
        assert events[-1]["transcript"]
        assert not [event for event in events if event["type"].startswith("response")]
        c.send("response.create")
        assert "no answers" in c.last("error")["error"]["message"]
        # it is told first and put on the shelves next
        kept = [(0, events[-1]["transcript"])]
        until(lambda: [(item.sound_bytes, item.parts[0].text) for item in shelves.said.values()] == kept)


def test_who_sends_minutes_at_once_holds_nobody_up(server, monkeypatch):
    """Judging them takes seconds; between their pieces others are served."""
    heard, hear = list[int](), Talk.hear

    async def slow(self: Talk, samples: Samples) -> None:
        heard.append(len(samples))
        time.sleep(0.05)  # on the event loop, as the detector
        await hear(self, samples)

    with line(server) as one, line(server) as other:
        monkeypatch.setattr(Talk, "hear", slow)
        one.append(quiet(20))
        until(lambda: bool(heard))
        other.send("conversation.item.retrieve", item_id="nothing")
        other.last("error")
        assert 0 < sum(heard) < 20 * 24000, "the other had to wait for all of it"
        one.send("conversation.item.retrieve", item_id="nothing")
        one.last("error")
        assert sum(heard) == 20 * 24000


# ---------------------------------------------------------------------------------------- coming and going


def test_a_lost_connection_is_taken_up_again(server):
    with line(server) as c:
        session = c.events[0]["session"]
        c.say("What is three plus four?")
        c.until("conversation.item.done")
        c.socket.close(1011)
    who = {"session_id": session["id"], "resume_token": session["antiphon"]["resume_token"]}
    with pytest.raises(InvalidStatus, match="404"), line(server, **{**who, "resume_token": "wrong"}):
        pass
    with line(server, fresh=False, **who) as c:
        c.send("response.create", response={"output_modalities": ["text"]})
        said = tiny().generate([{"role": "user", "content": "What is three plus four?"}], audio=False)
        assert text_of(c.until("response.done")) == said.text
        c.socket.close(1000)
    with pytest.raises(InvalidStatus, match="404"), line(server, **who):
        pass
    until(lambda: not server.engine.calls)


def test_who_comes_back_too_late_begins_anew():
    with serving(Settings(resume_seconds=0.2)) as served:
        with line(served) as c:
            session = c.events[0]["session"]
            assert session["antiphon"]["resume_seconds"] == 0.2
            c.socket.close(1011)
        until(lambda: not served.engine.calls)
        who = {"session_id": session["id"], "resume_token": session["antiphon"]["resume_token"]}
        with pytest.raises(InvalidStatus, match="404"), line(served, None, False, **who):
            pass


def test_who_comes_back_before_the_server_knows_that_he_was_gone_takes_the_session_over(server):
    with line(server) as c:
        c.say("What is three plus four?")
        c.until("conversation.item.done")
        session = c.events[0]["session"]
        who = {"session_id": session["id"], "resume_token": session["antiphon"]["resume_token"]}
        with pytest.raises(InvalidStatus, match="404"), line(server, **{**who, "resume_token": "wrong"}):
            pass
        with line(server, None, False, **who) as again:
            again.send("response.create", response={"output_modalities": ["text"]})
            said = tiny().generate([{"role": "user", "content": "What is three plus four?"}], audio=False)
            assert text_of(again.until("response.done")) == said.text
            with pytest.raises(ConnectionClosed) as closed:
                c.until("never")
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1000
            again.send("response.cancel")
            assert again.last("error")["error"]["code"] == "response_cancel_not_active"
            again.socket.close(1000)
    until(lambda: not server.engine.calls)


def test_sessions_have_a_limit_and_lost_ones_make_room(monkeypatch):
    lost = tell_of_lost(monkeypatch)
    with serving(Settings(keys=("one", "two"), sessions=1), lambda: engine(2)) as served:
        with line(served, "one") as c:
            with pytest.raises(InvalidStatus, match="429"), line(served, "one"):
                pass
            with line(served, "two"):
                pass
            c.socket.close(1011)
        assert lost.wait(30)
        with line(served, "one"):
            pass
        with pytest.raises(InvalidStatus, match="401"), line(served, "three"):
            pass
    with (
        serving(make=lambda: engine(1)) as served,
        line(served),
        pytest.raises(InvalidStatus, match="503"),
        line(served),
    ):
        pass


def test_lost_sessions_make_room_for_other_requests(monkeypatch):
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "What day is it?"}]}
    lost = tell_of_lost(monkeypatch)
    with serving(make=lambda: engine(1)) as served:
        with line(served) as c:
            with pytest.raises(openai.InternalServerError, match="503"):
                served.client().chat.completions.create(**ask)
            c.socket.close(1011)
        assert lost.wait(30)
        assert served.client().chat.completions.create(**ask).choices[0].message.content


def tell_of_lost(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a session has lost its connection."""
    lose, lost = Lobby.lose, threading.Event()
    monkeypatch.setattr(Lobby, "lose", lambda self, session: (lose(self, session), lost.set()))
    return lost


def test_a_message_beyond_the_limit_ends_its_connection_and_the_session_can_be_taken_up():
    with serving(Settings(message_bytes=20_000)) as served, line(served) as other:
        with line(served) as c:
            session = c.events[0]["session"]
            c.send("input_audio_buffer.append", audio="A" * 30_000)
            with pytest.raises(ConnectionClosed) as closed:
                c.until("never")
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
        again = {"session_id": session["id"], "resume_token": session["antiphon"]["resume_token"]}
        with line(served, fresh=False, **again) as c:
            c.send("response.cancel")
            assert c.last("error")["error"]["code"] == "response_cancel_not_active"
        other.say("What day is it?")
        assert other.last("conversation.item.done")


def test_the_caches_of_sessions_that_have_ended_are_gone_without_the_collector(server, monkeypatch):
    held, begin = WeakSet[Call](), Call.__init__

    def noted(self: Call, *how: Any) -> None:
        held.add(self)
        begin(self, *how)

    monkeypatch.setattr(Call, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            with line(server) as c:
                c.say("What day is it?")
                c.send("response.create")
                c.until("response.done")
        until(lambda: len(held) <= 1, 10)  # a lane may remember the last one it stepped
    finally:
        gc.enable()


def test_who_says_nothing_for_long_is_closed():
    with serving(Settings(idle_seconds=0.3)) as served, line(served) as c:
        with pytest.raises(ConnectionClosed) as closed:
            c.until("never")
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000
        until(lambda: not served.engine.calls)


def test_nothing_that_is_said_is_logged(server, caplog):
    caplog.set_level(logging.DEBUG)
    secret: Any = {"role": "user", "content": "sesame"}
    with line(server) as c:
        c.say("sesame")
        c.send("response.create")
        said = text_of(c.until("response.done"))
        c.send("sesame", sesame="sesame")
        c.last("error")
        c.update(instructions="sesame")
    answer = server.client().chat.completions.create(model="tiny", messages=[secret]).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="sesame"):
        server.client().chat.completions.create(model="tiny", messages=[secret], seed="sesame")  # type: ignore[call-overload]
    told = [JsonLines().format(record) for record in caplog.records if record.name.startswith("antiphon")]
    assert len(told) > 2
    assert not [text for text in told if any(word in text for word in ("sesame", said, answer))]


def stop_while_it_speaks(served: Served, c: Line) -> None:
    """Stop a server in the middle of an answer; its sessions end in order."""
    c.say("What is three plus four?")
    c.send("response.create")
    c.until("response.output_audio.delta")
    served.stop()
    with pytest.raises(ConnectionClosed) as closed:
        c.until("never")
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1001


def test_a_stopped_server_finishes_its_sentence():
    with serving(Settings(stop_seconds=60)) as served, line(served) as c:
        stop_while_it_speaks(served, c)
        done = next(event for event in c.events if event["type"] == "response.done")
        assert done["response"]["status"] == "completed"


def test_a_sentence_without_end_does_not_keep_a_server_from_stopping(monkeypatch):
    make_talkative(monkeypatch)
    with serving(Settings(stop_seconds=0.3)) as served, line(served) as c:
        stop_while_it_speaks(served, c)


def test_a_session_whose_client_is_gone_does_not_keep_a_server_from_stopping(monkeypatch):
    lost = tell_of_lost(monkeypatch)
    with serving(Settings(stop_seconds=120)) as served, line(served) as c:  # which waits less long for it to end
        c.socket.close(1011)
        assert lost.wait(30)


def test_who_is_gone_before_being_let_in_leaves_no_session_behind(monkeypatch):
    async def gone(socket: WebSocket, *how: Any, **named: Any) -> None:
        raise RuntimeError("the client is gone")

    with serving(make=lambda: engine(1)) as served:
        with monkeypatch.context() as patch:
            patch.setattr(WebSocket, "accept", gone)
            with pytest.raises(InvalidStatus, match="500"), line(served):
                pass
        with line(served) as c:
            c.say("What day is it?")
            assert c.last("conversation.item.done")


def test_pages_of_others_may_not_open_one(server):
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://{server.host}/v1/realtime?model=tiny", origin=Origin("http://evil.example"))
    with pytest.raises(InvalidStatus, match="404"):
        connect(f"ws://{server.host}/v1/realtime?model=other")


def test_a_browser_gives_its_key_as_a_subprotocol():
    with serving(Settings(keys=("secret",))) as served:
        offered = [Subprotocol("realtime"), Subprotocol("openai-insecure-api-key.secret")]
        with connect(f"ws://{served.host}/v1/realtime?model=tiny", subprotocols=offered) as socket:
            assert socket.subprotocol == "realtime"
            assert json.loads(socket.recv())["type"] == "session.created"


async def _openai_turn(server: Served) -> tuple[str, int]:
    client = server.async_client()
    async with client.realtime.connect(model="tiny") as connection:
        await connection.session.update(session={"type": "realtime", "instructions": "You are brief."})
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What day is it?"}]}
        )
        await connection.response.create()
        text, sound = "", 0
        async for event in connection:
            if event.type == "response.output_audio_transcript.delta":
                text += event.delta
            elif event.type == "response.output_audio.delta":
                sound += len(base64.b64decode(event.delta))
            elif event.type == "response.done":
                break
    return text, sound


def test_openais_own_client_holds_a_conversation(server):
    text, sound = asyncio.run(_openai_turn(server))
    assert text
    assert sound > 3840
