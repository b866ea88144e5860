"""The engine gives every conversation what the readable loop gives it alone, and one that fails takes none along."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from antiphon.audio import Samples
from antiphon.caches import KVCache, Span
from antiphon.engine import Answering, Call, Engine
from antiphon.engine.call import CHUNK, KEPT_FRAMES, EngineSession
from antiphon.engine.sounding import Sounding
from antiphon.engine.speaking import PATIENCE, Speaking
from antiphon.engine.thinking import Thinking
from antiphon.errors import BusyError, CapacityError, InputError
from antiphon.generate import AudioDelta, Event, Reply, Session, TextDelta, collect
from antiphon.sampling import GREEDY, Sampling
from tests.models import omni

RATE = 16000
FRAMES = 14
WAYS: list[dict[str, Any]] = [
    {},
    {"text": Sampling(1.0), "speech": Sampling(1.2, 20, 0.9, 1.1)},
    {"speech": GREEDY, "residual": GREEDY},
    {"residual": Sampling(0.7, 5)},
    {"verbatim": True, "voice": "chelsie"},
]


def model():
    return omni()


def clip(seed: int, seconds: float) -> Samples:
    return (0.2 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def options(seed: int) -> dict[str, Any]:
    return {"seed": seed, "max_frames": FRAMES, "max_text_tokens": 10, **WAYS[seed % len(WAYS)]}


def same(one: Reply, other: Reply) -> None:
    """The same ids and codes, and samples within 1e-5 of the largest."""
    assert one.text_ids == other.text_ids
    assert torch.equal(one.codes, other.codes)
    assert one.spoken_ids == other.spoken_ids
    assert (one.finish, one.text) == (other.finish, other.text)
    np.testing.assert_allclose(other.audio, one.audio, atol=1e-5 * max(1e-9, np.abs(one.audio).max(initial=0)))


def say(conversation: Session | Call, seed: int) -> None:
    """A question in pieces, as it would arrive."""
    sound = clip(seed, 0.4 + 0.55 * (seed % 5))
    for start in range(0, len(sound), 3000):
        conversation.append_audio(sound[start : start + 3000], RATE)
    if seed % 3 == 0:
        conversation.append_text(f" question {seed}")


def alone(seed: int, turns: int = 1) -> list[Reply]:
    session, replies = model().session(window=1), []
    for turn in range(turns):
        say(session, seed + turn)
        replies.append(collect(session.respond(**options(seed + turn))))
    return replies


def test_a_batch_gives_what_each_gets_alone():
    engine = Engine(model())
    calls = [engine.open(window=1) for _ in range(6)]
    for turn in range(2):
        answers = []
        for seed, call in enumerate(calls):
            say(call, seed + turn)
            answers.append(call.respond(**options(seed + turn)))
        engine.run()
        for seed, events in enumerate(answers):
            same(alone(seed, turn + 1)[turn], events.reply())
    assert any(len(work.calls) > 3 for work in engine.work if work.name == "frame"), "nothing ran together"


def test_threads_give_the_same():
    with Engine(model()) as engine:
        calls = [engine.open(window=1) for _ in range(5)]
        for seed, call in enumerate(calls):
            say(call, seed)
        answers = [call.respond(**options(seed)) for seed, call in enumerate(calls)]
        for seed, events in enumerate(answers):
            same(alone(seed)[0], events.reply())


class Script:
    """A conversation that acts at random, told to the engine and to the readable loop alike."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.random = engine, np.random.default_rng(seed)
        self.call, self.session = engine.open(window=1), Session(model(), window=1)
        self.seed = seed * 100
        self.events: Answering | None = None
        self.stop_after: int | None = None

    def begin(self) -> None:
        """Ask something; some answers are to be interrupted."""
        self.seed += 1
        say(self.call, self.seed)
        say(self.session, self.seed)
        self.events = self.call.respond(**options(self.seed))
        self.stop_after = int(self.random.integers(FRAMES)) if self.random.random() < 0.4 else None

    def watch(self) -> None:
        """Interrupt when it is time, between two steps of the engine."""
        turn = self.call.turn
        if turn is not None and self.stop_after is not None and turn.frames >= self.stop_after:
            self.call.cancel()
            self.stop_after = -1

    def end(self, folder) -> None:
        """Compare, then cut the answer, save it, resume it or fork it."""
        assert self.events is not None
        reply, said = self.events.reply(), self.session.respond(**options(self.seed))
        stop = len(reply.codes) if reply.finish == "cancelled" else -1
        if stop == 0:
            self.session.cancel()
        same(collect(self._until(said, stop)), reply)
        self.events = None
        if len(reply.codes) and self.random.random() < 0.6:
            ms = float(self.random.integers(len(reply.codes) + 1)) * 80
            cut = self.call.truncate(ms)
            self.engine.run(cut.done)
            assert cut.result() == self.session.truncate(ms)
        if self.random.random() < 0.3:
            path = folder / f"{self.seed}.safetensors"
            saved = self.call.save(path)
            self.engine.run(saved.done)
            saved.result()
            self.call.close()
            self.call = self.engine.load(path)
        elif self.random.random() < 0.3:
            forked = self.call.copy()
            self.engine.run(forked.done)
            self.call.close()
            self.call = self.engine.adopt(forked.result())

    def _until(self, events: Iterator[Event], frames: int) -> Iterator[Event]:
        """The events, cancelled after so many frames."""
        for event in events:
            if isinstance(event, AudioDelta) and event.frame + 1 == frames:
                self.session.cancel()
            yield event


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_conversations_join_leave_interrupt_and_resume_at_random(seed, tmp_path):
    engine, random = Engine(model()), np.random.default_rng(seed)
    scripts: list[Script] = []
    turns = 0
    while turns < 30:
        while len(scripts) < 12 and random.random() < 0.7:
            scripts.append(Script(engine, seed * 1000 + len(scripts) + turns))
        for script in scripts:
            if script.events is None and random.random() < 0.5:
                script.begin()

        def watch() -> bool:
            for script in scripts:
                script.watch()
            return False

        engine.run(watch)
        for script in [s for s in scripts if s.events is not None]:
            script.end(tmp_path)
            turns += 1
            if random.random() < 0.2:
                script.call.close()
                scripts.remove(script)
        engine.run()
        assert {call.name for call in engine.calls} == {script.call.name for script in scripts}


def test_company_of_one_bucket_changes_no_bit():
    """Five to six rows are one bucket: who the others are changes nothing at all."""

    def reply(others: list[int]) -> Reply:
        engine = Engine(model())
        asked = []
        for seed in [0, *others]:
            call = engine.open(window=1)
            call.append_text(f"question {seed}")
            asked.append(call.respond(seed=seed, max_frames=FRAMES, max_text_tokens=30, speech=WAYS[1]["speech"]))
        engine.run()
        return asked[0].reply()

    first, second = reply([1, 2, 3, 4, 5]), reply([9, 8, 7, 6, 5])
    assert first.text_ids == second.text_ids
    count = min(len(first.codes), len(second.codes))
    assert torch.equal(first.codes[:count], second.codes[:count])


@pytest.mark.parametrize("place", ["hear", "lay_out", "thinker", "draw", "follow", "codes", "sound", "close", "wish"])
def test_one_that_raises_ends_alone(monkeypatch, place):
    engine = Engine(model())
    calls = [engine.open(window=1) for _ in range(4)]
    bad = calls[2]
    lane, name = {
        "hear": (Thinking, "hear"),
        "lay_out": (Thinking, "lay_out"),
        "close": (Thinking, "close"),
        "thinker": (Thinking, "read"),
        "draw": (Thinking, "draw"),
        "follow": (Speaking, "follow"),
        "codes": (Speaking, "codes"),
        "sound": (Sounding, "sound"),
        "wish": (EngineSession, "text_steps"),
    }[place]
    run = getattr(lane, name)

    def failing(self: Any, some: Any, *rest: Any) -> Any:
        hit = (
            self is bad.session
            if place == "wish"
            else any(bad in pair for pair in rest[0])
            if place == "codes"
            else some is bad
            if place in ("lay_out", "close")
            else bad in some
        )
        if hit and (place != "close" or (bad.turn and bad.turn.is_over)):
            raise RuntimeError("broken on purpose")
        return run(self, some, *rest)

    monkeypatch.setattr(lane, name, failing)
    for seed, call in enumerate(calls):
        say(call, 3 * seed)
    answers = [call.respond(**options(3 * seed)) for seed, call in enumerate(calls)]
    engine.run()
    monkeypatch.undo()
    for seed, events in enumerate(answers):
        if calls[seed] is not bad:
            same(alone(3 * seed)[0], events.reply())
    if place == "wish":  # a wish that cannot be met is its owner's to hear of; the conversation goes on
        assert answers[2].reply().finish
    else:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            answers[2].reply()
        assert bad not in engine.calls
        with pytest.raises(RuntimeError, match="broken on purpose"):
            bad.append_text("more").result()


def test_text_from_elsewhere_is_said_and_is_no_part_of_the_conversation():
    engine = Engine(model())
    call, other = engine.open(window=1), engine.open()
    say(call, 1)
    asked = call.respond(**options(1))
    read = call.speak("Read *this* aloud, please.", seed=3, max_frames=9)
    beside = other.speak("Something else", seed=4, max_frames=5, verbatim=True)
    engine.run()
    session = Session(model(), window=1)
    say(session, 1)
    same(collect(session.respond(**options(1))), asked.reply())
    cut = call.truncate(80)
    engine.run()
    assert cut.result() == session.truncate(80), "what was read aloud stands in the answer"
    session = Session(model(), window=1)
    say(session, 1)
    collect(session.respond(**options(1)))
    same(collect(session.speak(["Read *this* aloud, please."], seed=3, max_frames=9)), read.reply())
    same(collect(model().speak("Something else", seed=4, max_frames=5, verbatim=True)), beside.reply())
    refused = call.speak("no", audio=False)
    engine.run()
    with pytest.raises(InputError, match="speak needs audio"):
        refused.reply()


def test_wrong_input_is_told_to_who_gave_it_and_the_conversation_goes_on():
    engine = Engine(model())
    call = engine.open()
    wrong = call.append_audio(np.array([np.nan], np.float32), RATE)
    unknown = call.respond(voice="nobody")
    call.append_text("hello")
    answer = call.respond(max_frames=2, max_text_tokens=3)
    engine.run()
    with pytest.raises(Exception, match="finite"):
        wrong.result()
    with pytest.raises(InputError, match="no voice 'nobody'"):
        unknown.reply()
    assert len(answer.reply().codes) == 2


# ------------------------------------------------------------------------------------------ time and room


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_the_talker_reads_a_chunk_while_the_thinker_is_at_the_next():
    """Two workers on a clock on which every batch takes a second."""
    clock = Clock()
    engine = Engine(model(), clock=clock)
    call = engine.open()
    call.append_text("word " * 400)
    events = call.respond(max_frames=2, max_text_tokens=3)
    with torch.inference_mode():
        for second in range(40):
            clock.time = float(second)
            done = len(engine.work)
            for lane in reversed(engine.lanes):  # at the same time: the Talker sees what was there when it began
                lane.step()
            for i in range(done, len(engine.work)):
                engine.work[i] = engine.work[i]._replace(start=second, stop=second + 1)
    thought = [work for work in engine.work if work.name == "thinker"]
    read = [work for work in engine.work if work.name == "talker"]
    chunks = len(read)
    assert chunks > 2 >= 1
    assert CHUNK < 400
    for k in range(chunks - 1):
        assert read[k].start < thought[k + 1].stop, f"the Talker waits for chunk {k + 1} before it reads chunk {k}"
        assert read[k].start >= thought[k].stop, "nobody reads what has not been thought"
    assert len(events.reply().codes) == 2


def test_what_is_said_next_does_not_disturb_the_talker_at_its_reading(monkeypatch):
    def read(is_disturbed: bool) -> Tensor:
        """The Talker's past of two messages; the second, a long one, may come while it reads the first."""
        engine = Engine(model())
        call, (thinking, speaking, _) = engine.open(), engine.lanes
        call.append_message({"role": "user", "content": "one " * 60})
        while not call.following:
            thinking.step()
        call.append_message({"role": "user", "content": "two " * 300})
        span = KVCache.span

        def opened(cache: KVCache, steps: int) -> Span:
            found = span(cache, steps)
            if is_disturbed and cache is call.session.talker:
                thinking.step()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "span", opened)
            speaking.step()
        engine.run()
        talker = call.session.talker
        return talker.k[:, :, :, : talker.filled]

    assert torch.equal(read(False), read(True))


def test_lanes_in_threads_do_overlap():
    big = omni({"thinker_config.text_config.num_hidden_layers": 8, "talker_config.text_config.num_hidden_layers": 8})
    with Engine(big) as engine:
        call = engine.open()
        call.append_text("word " * 350)
        call.respond(max_frames=1, max_text_tokens=2).reply()
        thought = [work for work in engine.work if work.name == "thinker"]
        read = [work for work in engine.work if work.name == "talker"]
    assert any(t.start < r.stop and r.start < t.stop for t in thought for r in read)


def test_the_first_packet_leaves_after_the_first_frame_and_one_follows_every_step():
    engine = Engine(model())
    call = engine.open()
    call.append_text("hello")
    events = call.respond(max_frames=6, max_text_tokens=20)
    arrived = list[int]()

    def watch() -> bool:
        arrived.append(events.kept)
        return False

    engine.run(watch)
    frames = [kept for kept in arrived if kept]
    assert frames[:6] == [1, 2, 3, 4, 5, 6], "packets wait for others"


def test_a_listener_who_does_not_read_is_waited_for_and_nobody_else_is():
    engine = Engine(model())
    slow, quick = engine.open(), engine.open()
    for call in (slow, quick):
        call.append_text("hello")
    kept = slow.respond(seed=1, max_frames=KEPT_FRAMES + 20, max_text_tokens=400, verbatim=True, speech=Sampling(1.0))
    other = quick.respond(seed=2, max_frames=8, max_text_tokens=20)
    engine.run()
    assert other.reply().finish
    if slow.turn is not None:
        assert slow.turn.frames == KEPT_FRAMES
        for _ in range(30):
            kept.take()
        engine.run()
        assert slow.turn is None or slow.turn.frames > KEPT_FRAMES


def test_an_answer_that_is_ahead_of_its_listener_yields():
    clock = Clock()
    engine = Engine(model(), clock=clock)
    call = engine.open()
    call.append_text("hello")
    events = call.respond(seed=4, max_frames=40, max_text_tokens=400, verbatim=True, ahead=0.4)
    engine.run()
    assert call.turn is not None, "the answer ended early; choose another seed"
    made = call.turn.frames
    assert made == 6, "0.4 s ahead of who has just begun to listen are five frames, and one that is being heard"
    clock.time += 0.8
    engine.run()
    assert call.turn is None or call.turn.frames == made + 10
    call.cancel()
    engine.run()
    assert events.reply().finish == "cancelled"


def test_what_is_due_first_is_served_first():
    clock = Clock()
    engine = Engine(model(), clock=clock)
    first, second = engine.open(), engine.open()
    second.append_text("hello")
    early = second.respond(max_frames=3, max_text_tokens=20, ahead=1.0)
    clock.time = 0.5
    first.append_text("hello")
    late = first.respond(max_frames=3, max_text_tokens=20, ahead=1.0)
    engine.run()
    order = [work.calls for work in engine.work if work.name == "frame"]
    assert order[0][0] == second.name
    assert early.reply().finish
    assert late.reply().finish


def test_who_comes_new_does_not_make_others_stutter():
    """While somebody hears the last of what there is, frames go before a newcomer's reading, for a while."""
    clock = Clock()
    engine = Engine(model(), clock=clock)
    speaking, coming = engine.open(), engine.open()
    speaking.append_text("hello")
    heard = speaking.respond(max_frames=20, max_text_tokens=400, verbatim=True, ahead=1.0, seed=4)
    engine.run(until=lambda: speaking.turn is not None and speaking.turn.frames == 2)
    done = len(engine.work)
    clock.time += 1.0  # a player has long played two frames
    coming.append_text("hello")
    coming.respond(max_frames=3, max_text_tokens=20, ahead=1.0)
    engine.run(until=lambda: any(work.name == "talker" for work in list(engine.work)[done:]))
    order = [work.name for work in list(engine.work)[done:] if work.lane == "speaking"]
    assert order == ["frame"] * PATIENCE + ["talker"] or order == ["frame"] * PATIENCE + ["talker", "frame"]
    engine.run()
    assert heard.reply().finish


def test_one_more_than_there_is_room_for_is_refused():
    engine = Engine(model(), capacity=2)
    calls = [engine.open(), engine.open()]
    with pytest.raises(BusyError, match=r"2 conversations are being held.*try again in") as refused:
        engine.open()
    assert refused.value.retry_after > 0
    calls[0].close()
    engine.run()
    engine.open()


def test_who_comes_as_another_leaves_gets_the_place():
    with Engine(model(), capacity=1) as engine:
        for _ in range(20):
            call = engine.open()
            say(call, 3)
            call.respond(max_frames=200, max_text_tokens=200)
            call.close()


def test_the_capacity_is_what_the_machine_keeps_in_time(monkeypatch):
    """A machine on which a frame of n conversations takes 10 + 7 n ms keeps seven of them in frames of 80 ms."""
    engine = Engine(model())
    monkeypatch.setattr(engine, "_pace_of", lambda rows: 0.010 + 0.007 * rows)
    assert engine.measure() == 6  # of 1, 2, 3, 4, 6, 8, …
    monkeypatch.undo()
    assert 1 <= engine.measure(2) <= 2
    assert not engine.calls
    assert engine.capacity is not None


def test_a_shared_beginning_is_read_once():
    engine = Engine(model())
    calls = [engine.open("You are brief.") for _ in range(3)]
    lengths = {call.session.thinker.filled for call in calls}
    assert lengths.pop() > 0
    assert not lengths
    assert not any(work.name == "thinker" for work in engine.work)
    session = model().session("You are brief.")
    session.append_text("hello")
    calls[1].append_text("hello")
    answer = calls[1].respond(seed=4, max_frames=5, max_text_tokens=6)
    engine.run()
    same(collect(session.respond(seed=4, max_frames=5, max_text_tokens=6)), answer.reply())
    assert calls[0].session.thinker.filled < calls[1].session.thinker.filled


def test_closing_in_the_middle_of_a_prompt_leaves_nothing_behind():
    engine = Engine(model())
    call = engine.open()
    call.append_text("word " * 500)
    events = call.respond(max_frames=5)
    engine.run(lambda: len(engine.work) > 3)
    assert call.reading
    call.close()
    engine.run()
    assert not engine.calls
    assert events.reply().finish == "cancelled"
    with pytest.raises(InputError, match="left the engine"):
        call.append_text("more").result()


def test_a_long_upload_lets_the_others_come_between():
    engine = Engine(model())
    talking, uploading = engine.open(), engine.open(window=2)
    talking.append_text("hello")
    events = talking.respond(seed=4, max_frames=30, max_text_tokens=400, verbatim=True)
    sound = clip(1, 60)
    heard = uploading.append_message({"role": "user", "content": [{"type": "audio", "audio": (sound, RATE)}]})
    streamed = uploading.append_audio(sound, RATE)
    seen = list[tuple[bool, int]]()
    engine.run(lambda: bool(seen.append((heard.done(), events.kept))))
    assert max(frames for done, frames in seen if not done) > 20, "the answer waited for the upload"
    assert heard.result() is None
    assert streamed.result() is None
    session = Session(model(), window=2)
    session.append_message({"role": "user", "content": [{"type": "audio", "audio": (sound, RATE)}]})
    session.append_audio(sound, RATE)
    asked = uploading.respond(max_frames=4, max_text_tokens=5)
    engine.run()
    same(collect(session.respond(max_frames=4, max_text_tokens=5)), asked.reply())


def test_windows_that_close_together_are_heard_together(monkeypatch):
    batches, states = list[int](), model().aut.states
    monkeypatch.setattr(model().aut, "states", lambda windows: batches.append(len(windows.x)) or states(windows))
    engine = Engine(model())
    calls = [engine.open(window=2) for _ in range(5)]
    for seed, call in enumerate(calls):
        call.append_audio(clip(seed, 4.5), RATE)  # two windows and a tail of each
        call.commit()
    engine.run()
    assert batches == [6, 6, 6]  # the first windows, the second and the tails of five, filled up to a bucket
    monkeypatch.undo()
    for seed, call in enumerate(calls):
        session = Session(model(), window=2)
        session.append_audio(clip(seed, 4.5), RATE)
        session.commit()
        assert session.hidden is not None
        assert call.session.hidden is not None
        assert torch.allclose(session.hidden, call.session.hidden, atol=1e-5)


def test_sound_may_come_faster_and_slower_than_it_was_spoken_and_after_an_hour_of_silence():
    """Time is the listener's, not the speaker's: what is heard depends on what came, never on when."""
    hours = [0.0]
    engine = Engine(model(), clock=lambda: hours[0])
    sound, replies = clip(3, 3.0), list[Reply]()
    for pieces, wait in ((1, 0.0), (60, 0.001), (30, 120.0)):  # at once, fifty times as fast, and in an hour
        call = engine.open(window=1)
        for piece in np.array_split(sound, pieces):
            call.append_audio(piece, RATE)
            engine.run()
            hours[0] += wait
        hours[0] += 3600.0
        events = call.respond(**options(3))
        engine.run()
        replies.append(events.reply())
        call.close()
    for reply in replies[1:]:
        same(replies[0], reply)


def test_who_waits_no_longer_for_what_was_asked_hurts_nobody():
    """As a task of asyncio that is cancelled does to the Future it waits for."""
    with Engine(model()) as engine:
        one, other = engine.open(), engine.open()
        other.append_text("hello")
        answer = other.respond(max_frames=6, max_text_tokens=6)
        for what in ("good", "morning"):
            one.append_text(what).cancel()
        assert one.respond(max_frames=3, max_text_tokens=6).reply().text == told("goodmorning").text
        assert answer.reply().text == told("hello").text
        assert one.error is other.error is None


def told(text: str) -> Reply:
    """What the readable loop answers."""
    session = model().session()
    session.append_text(text)
    return collect(session.respond(max_frames=3, max_text_tokens=6))


def test_an_error_of_the_engine_itself_leaves_nobody_waiting(monkeypatch):
    def broken(self: Thinking) -> Any:
        if any(call.turn for call in self.house.calls):
            raise RuntimeError("broken on purpose")
        return {}

    monkeypatch.setattr(Thinking, "batch", broken)
    with Engine(model()) as engine:
        call = engine.open()
        call.append_text("hello")
        with pytest.raises(RuntimeError, match="broken on purpose"):
            call.respond().reply()
        monkeypatch.undo()
        other = engine.open()
        other.append_text("hello")
        assert other.respond(max_frames=2, max_text_tokens=3).reply().finish


def test_who_waits_for_an_answer_is_told_when_the_engine_stops():
    engine = Engine(model()).start()
    call = engine.open()
    call.append_text("hello")
    events = call.respond(max_frames=2000, verbatim=True, ahead=0.0)
    assert isinstance(events.take(30.0), TextDelta)
    engine.stop()
    assert events.reply().finish in ("cancelled", "stop")
    assert not engine.calls


def test_an_answer_whose_sound_ends_first_when_it_is_cancelled_comes_to_its_end():
    engine = Engine(model())
    call, (thinking, speaking, _) = engine.open(), engine.lanes
    call.append_text("hello")
    events = call.respond(max_frames=2000, verbatim=True)
    while not (call.turn and call.turn.frames):
        thinking.step()
        speaking.step()
    call.cancel()
    speaking.step()
    engine.run()
    assert call.turn is None
    assert events.reply().finish == "cancelled"


def test_a_prompt_over_the_limit_is_told_and_nobody_else_is_hurt():
    engine = Engine(model())
    long, other = engine.open(retention=None), engine.open()
    long.append_text("word " * 3000)
    other.append_text("hello")
    refused, answer = long.respond(max_frames=2), other.respond(max_frames=3, max_text_tokens=4)
    engine.run()
    with pytest.raises(CapacityError, match="its cache holds 2048; shorten it"):
        refused.reply()
    assert len(answer.reply().codes) == 3


@pytest.mark.parametrize("early", [False, True])
def test_an_answer_is_cancelled_while_what_was_asked_is_still_heard(monkeypatch, early):
    """AuT hears the end of a question after the answer was asked for: who cancels, or throws a guess away, then."""
    engine = Engine(model())
    call = engine.open()
    hear, heard = Thinking.hear, list[bool]()
    call.append_audio(clip(0, 0.7), RATE)
    engine.run()

    def interrupted(self: Thinking, calls: list[Call]) -> None:
        heard.append(True)
        call.cancel()
        hear(self, calls)

    monkeypatch.setattr(Thinking, "hear", interrupted)
    if early:
        call.guess(max_frames=FRAMES)
        engine.run()
        assert engine.calls == [call]
    else:
        events = call.respond(max_frames=FRAMES)
        engine.run()
        assert events.reply().finish == "cancelled"
    assert heard


def test_an_answer_that_is_cancelled_before_it_began_says_nothing():
    engine = Engine(model())
    call = engine.open()
    call.append_text("hello")
    events = call.respond()
    call.cancel()
    engine.run()
    reply = events.reply()
    assert reply.finish == "cancelled"
    assert not len(reply.codes)
    assert not reply.text_ids


def guessing(seed: int) -> tuple[Engine, Call]:
    """A call that has begun to answer before it was asked to."""
    engine = Engine(model())
    call = engine.open(window=1)
    say(call, seed)
    call.guess(**options(seed))
    engine.run()
    return engine, call


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_begun_early_is_the_one_that_is_asked_for(seed):
    engine, call = guessing(seed)
    before = len(engine.work)
    events = call.respond(**options(seed))
    ready = events.kept
    engine.run()
    same(alone(seed)[0], events.reply())
    assert ready == 4, "its first frames were there"
    assert not [work for work in list(engine.work)[before:] if work.name == "talker"], "the prompt was read twice"
    assert engine.calls == [call]
    say(call, seed + 1)  # and the conversation goes on from it
    answer = call.respond(**options(seed + 1))
    engine.run()
    same(alone(seed, 2)[1], answer.reply())


def test_an_answer_is_taken_over_between_two_steps_of_the_speaking_lane(monkeypatch):
    """Else the lane, which has just looked who is there, would meet the work twice: in the fork and in the call."""
    fork, step, begun, go = Engine.fork, Speaking.step, threading.Event(), threading.Event()
    at = threading.local()

    def stepping(self: Speaking) -> bool:
        at.it = True
        try:
            return step(self)
        finally:
            at.it = False

    class Slow(list[Call]):
        def __iter__(self) -> Iterator[Call]:
            if getattr(at, "it", False) and not go.is_set() and self[-1].following:
                begun.set()
                assert go.wait(30)
            return super().__iter__()

    def forking(self: Engine, call: Call) -> Call:
        made = fork(self, call)
        self.calls = Slow(self.calls)
        return made

    monkeypatch.setattr(Engine, "fork", forking)
    monkeypatch.setattr(Speaking, "step", stepping)
    with Engine(model()) as engine:
        call = engine.open(window=1)
        say(call, 1)
        call.guess(**options(1))
        assert begun.wait(30)
        events = call.respond(**options(1))
        threading.Event().wait(0.3)  # the thinking lane would have taken over by now, if it did not wait
        go.set()
        same(alone(1)[0], events.reply())


def test_an_answer_begun_early_is_forgotten_when_the_user_goes_on():
    engine, call = guessing(1)
    call.append_text(" and more")
    answer = call.respond(**options(1))
    engine.run()
    session = Session(model(), window=1)
    say(session, 1)
    session.append_text(" and more")
    same(collect(session.respond(**options(1))), answer.reply())
    assert engine.calls == [call]


def test_an_answer_begun_early_can_be_cancelled_and_asked_for_in_another_way():
    engine, call = guessing(2)
    other = call.respond(**options(3))
    engine.run()
    session = Session(model(), window=1)
    say(session, 2)
    same(collect(session.respond(**options(3))), other.reply())
    engine, call = guessing(2)
    events = call.respond(**options(2))
    call.cancel()
    engine.run()
    assert events.reply().finish == "cancelled"
    assert engine.calls == [call]


def resident() -> int:
    """Bytes of this process's memory, where the system says."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.mark.parametrize(("seconds", "pause"), [(2, 0.0), pytest.param(600, 0.1, marks=pytest.mark.long)])
def test_a_soak_leaves_no_call_no_thread_and_no_memory(seconds, pause):
    """Conversations that come, ask, leave in the middle or hear all of it; the long one leaves room for other tests."""
    threads, random, sizes = threading.active_count(), np.random.default_rng(0), []
    engine = Engine(model(), capacity=12)
    engine.warm(2)  # what is recorded stays
    with engine:
        start = engine.now()
        while engine.now() - start < seconds:
            try:
                call = engine.open("Be brief." if random.random() < 0.5 else None)
            except BusyError:
                threading.Event().wait(0.01)
                continue
            say(call, int(random.integers(20)))
            if random.random() < 0.3:
                call.guess(seed=1, max_frames=8)
            events = call.respond(seed=int(random.integers(100)), max_frames=8, max_text_tokens=8)
            if random.random() < 0.3:
                call.cancel()
            if random.random() < 0.5:
                assert events.reply().finish
            call.close()
            sizes.append(resident())
            threading.Event().wait(pause)
        for _ in range(400):
            if engine.calls:
                threading.Event().wait(0.05)
        assert not engine.calls
    assert threading.active_count() == threads
    assert sizes[-1] - sizes[len(sizes) // 5] < 60e6, "memory grows"
