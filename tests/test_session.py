"""A session: speech as it arrives gives what the whole gives; it forks, is saved, is cut back and goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from antiphon.caches import CACHE_BLOCK
from antiphon.errors import CapacityError, InputError, WeightsError
from antiphon.files import read_safetensors, write_safetensors
from antiphon.generate import AudioDelta, Done, Omni, Reply, Session, TextDelta, collect
from antiphon.sampling import GREEDY, Sampling
from tests.models import (
    assert_same,
    assert_same_reply,
    in_pieces,
    omni,
    recorded,
    script,
    sound,
    stage,
    stop_speech_after,
    write_checkpoint,
)

SHORT: dict[str, Any] = {"max_text_tokens": 6, "max_frames": 4, "seed": 1}
GREEDY_SPEECH: dict[str, Any] = {"speech": Sampling(0.0, repetition_penalty=1.05), "residual": GREEDY}
QUESTION = "What time is it?"
ANSWER = "It's five to seven, we'll be there soon."


@pytest.fixture
def model() -> Omni:
    return omni()


def answer(session: Session, **options: Any) -> Reply:
    return collect(session.respond(**(SHORT | options)))


def user(*parts: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": part} for part in parts
    ]
    return {"role": "user", "content": content}


def feed(session: Session, samples: np.ndarray, rate: int = 16000, seed: int = 0) -> Session:
    for piece in in_pieces(samples, rate, seed):
        session.append_audio(piece, rate)
    return session


def words(session: Session) -> str:
    return session.model.tokenizer.decode(session.ids)


# ---------------------------------------------------------------------------------------- as it arrives


@pytest.mark.parametrize(("rate", "window"), [(16000, 1), (24000, 2), (48000, 1), (16000, 8)])
def test_pieces_give_what_one_call_gives(model, rate, window):
    clip = sound(2.37, rate, seed=rate // 8000)
    whole, in_one = recorded(model, window=window)
    whole.append_audio(clip, rate)
    streamed, by_piece = recorded(model, window=window)
    feed(streamed, clip, rate)
    file, from_file = recorded(model, window=window)
    file.append_clip(clip, rate)  # its floor refers to the whole clip's peak, which is in the first window
    replies = []
    for session in (whole, streamed, file):
        session.append_text(QUESTION)
        replies.append(answer(session))
    for record, reply in ((by_piece, replies[1]), (from_file, replies[2])):
        for name in ("audio_features", "prompt_ids", "text_ids", "codes", "talker_inputs", "waveform"):
            assert_same(stage(record, name), stage(in_one, name))
        assert_same_reply(reply, replies[0])
    assert len(stage(in_one, "audio_features")) == model.config.audio.tokens(237)
    assert_same_reply(
        model.generate([user((clip, rate), QUESTION)], window=window, **SHORT),
        replies[0],
    )


def test_the_answer_depends_on_what_was_heard(model):
    replies = [model.generate([user((sound(2.3, seed=seed), 16000), QUESTION)], **SHORT) for seed in range(3)]
    assert len({tuple(reply.text_ids) for reply in replies}) == 3


def test_single_samples(model):
    clip = sound(0.05)
    session = model.session()
    for sample in clip:
        session.append_audio(sample[None])
    session.append_text(QUESTION)
    assert_same_reply(answer(session), model.generate([user((clip, 16000), QUESTION)], **SHORT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_windows_are_read_as_they_close(dtype):
    session = omni(dtype=dtype).session(window=1)
    positions = []
    for _ in range(3):
        session.append_audio(sound(0.5))
        positions.append(len(session.ids))
    opening = len(session.model.tokenizer.encode("\n")) + 3  # <|im_start|>user\n<|audio_start|>
    # the log-mel of the last 12.5 ms needs what comes next, so a second is whole only with the next one's beginning
    assert positions == [opening, opening, opening + 13]
    session.commit()
    assert len(session.ids) == opening + 13 + 7 + 3  # and <|audio_end|><|im_end|>\n
    assert session.thinker.length.tolist() == [len(session.ids)]
    assert session.talker.length.tolist() == [len(session.ids)]


def test_a_later_louder_window_shows_only_from_there_on(model):
    quiet, loud = sound(1.2) * 0.01, sound(1.0, seed=1)
    clip = np.concatenate([quiet, loud])
    (streamed, by_piece), (file, from_file) = recorded(model, window=1), recorded(model, window=1)
    feed(streamed, clip).commit()
    file.append_clip(clip, 16000)
    file.commit()
    heard, whole = stage(by_piece, "audio_features"), stage(from_file, "audio_features")
    assert (heard[:13] - whole[:13]).abs().max() > 0.01  # the first second's floor is lower than in the file
    assert_same(heard[26:], whole[26:])  # the last window knows the loudest part
    assert stage(by_piece, "prompt_ids").tolist() == stage(from_file, "prompt_ids").tolist()


def test_several_clips_and_texts_in_one_turn(model):
    first, second = sound(0.4), sound(1.1, 24000, seed=2)
    session = model.session(window=1)
    feed(session, first)
    session.append_text("and then ")
    session.append_text("this:")
    feed(session, second, 24000)
    session.commit()
    expected = user((first, 16000), "and then this:", (second, 24000))
    assert_same_reply(answer(session), model.generate([expected], window=1, **SHORT))


def test_half_a_sample_more_is_the_same_clip_in_a_stream_and_in_a_file(model):
    clip = sound(1, 32000)[:401]  # 200.5 samples at 16 kHz are 201: just long enough
    session = model.session()
    session.append_audio(clip, 32000)
    session.append_text(QUESTION)
    assert_same_reply(answer(session), model.generate([user((clip, 32000), QUESTION)], **SHORT))


# ------------------------------------------------------------------------------------------------ forks


def test_a_fork_in_a_clip_goes_its_own_way(model):
    begin, ends = sound(1.33, 24000), [sound(0.7, 24000, seed=seed) for seed in (1, 2)]
    session = feed(model.session(window=1), begin, 24000)
    fork = session.copy()
    for one, end in zip((session, fork), ends, strict=True):
        feed(one, end, 24000).append_text(QUESTION)
    replies = [answer(session), answer(fork)]
    for reply, end in zip(replies, ends, strict=True):
        alone = feed(model.session(window=1), begin, 24000)
        feed(alone, end, 24000).append_text(QUESTION)
        assert_same_reply(reply, answer(alone))
    assert replies[0].text_ids != replies[1].text_ids


def test_a_fork_after_an_answer_goes_its_own_way(model):
    def begun() -> Session:
        session = model.session("Be brief.")
        session.append_text("Hello there")
        answer(session)
        return session

    session = begun()
    fork = session.copy()
    fork.append_text("What is that?")
    elsewhere = answer(fork)
    session.append_text(QUESTION)
    reply = answer(session)
    expected = begun()
    expected.append_text(QUESTION)
    assert_same_reply(reply, answer(expected))
    assert reply.text_ids != elsewhere.text_ids
    assert fork.ids != session.ids
    cut = session.copy()
    cut.truncate(0)
    assert session.answer is not None
    assert len(session.answer.frames) == len(reply.codes)


# ------------------------------------------------------------------------------------------- saved, resumed


def mid_clip(model: Omni) -> Session:
    return feed(model.session("Be brief.", window=1), sound(1.5, 48000), 48000)


def between_turns(model: Omni) -> Session:
    session = feed(model.session(), sound(0.7))
    session.append_text("so?")
    session.commit()
    return session


def after_an_answer(model: Omni) -> Session:
    session = between_turns(model)
    answer(session, seed=3, text=Sampling(1.0))
    return session


def after_a_cut(model: Omni) -> Session:
    session = after_an_answer(model)
    session.truncate(160)
    return session


def inside_text(model: Omni) -> Session:
    session = model.session()
    session.append_text("What ")
    return session


def go_on(session: Session) -> Reply:
    if session.ear is not None:
        feed(session, sound(0.6, session.ear.rate, seed=4), session.ear.rate)
    session.append_text("and now?")
    return answer(session, seed=7, text=Sampling(1.0))


@pytest.mark.parametrize("begun", [mid_clip, between_turns, after_an_answer, after_a_cut, inside_text])
def test_a_saved_session_goes_on_identically(model, tmp_path, begun):
    session = begun(model)
    session.save(tmp_path / "session.safetensors")
    resumed = model.load_session(tmp_path / "session.safetensors")
    assert resumed.ids == session.ids
    assert resumed.nbytes == session.nbytes
    resumed.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "session.safetensors").read_bytes()
    found, expected = go_on(resumed), go_on(session)
    assert_same_reply(found, expected)
    assert np.array_equal(found.audio, expected.audio)  # the same calls in the same process: the same bits
    assert_same_reply(expected, go_on(begun(model)))  # and saving has changed nothing


def test_a_saved_answer_can_still_be_cut(model, tmp_path, monkeypatch):
    script(monkeypatch, model, ANSWER)
    session = model.session()
    session.append_text(QUESTION)
    answer(session, max_text_tokens=40, max_frames=20)
    session.save(tmp_path / "session.safetensors")
    resumed = model.load_session(tmp_path / "session.safetensors")
    assert resumed.truncate(1000) == session.truncate(1000) != ""
    assert_same_reply(go_on(resumed), go_on(session))


RESUME = """
import json, sys
import antiphon, numpy
from tests.test_session import go_on
session = antiphon.load(sys.argv[1]).load_session(sys.argv[2])
reply = go_on(session)
numpy.save(sys.argv[3], reply.audio)
print(json.dumps([reply.text_ids, reply.codes.tolist()]))
"""


def test_a_saved_session_goes_on_in_another_process(model, tmp_path):
    write_checkpoint(tmp_path / "model", model)
    session, path = mid_clip(model), tmp_path / "session.safetensors"
    session.save(path)
    arguments = [str(tmp_path / "model"), str(path), str(tmp_path / "audio.npy")]
    done = subprocess.run([sys.executable, "-c", RESUME, *arguments], capture_output=True, text=True, check=True)
    expected = go_on(session)
    assert json.loads(done.stdout) == [expected.text_ids, expected.codes.tolist()]
    assert_same(np.load(tmp_path / "audio.npy"), expected.audio)


def test_a_file_that_is_no_session_is_refused(model, tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(WeightsError, match="holds no session"):
        model.load_session(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        model.load_session(tmp_path / "text")
    with pytest.raises(WeightsError, match="nothing does not exist; check the path"):
        model.load_session(tmp_path / "nothing")
    inside_text(model).save(tmp_path / "session")
    other = omni({"thinker_config.text_config.num_key_value_heads": 4})
    after_an_answer(model).save(tmp_path / "session")
    with pytest.raises(WeightsError, match="should have shape"):
        other.load_session(tmp_path / "session")


def test_a_session_without_speech_is_saved_and_goes_on(tmp_path):
    silent = omni({"enable_audio_output": False, "talker_config": None, "code2wav_config": None})
    session = feed(silent.session(window=1), sound(1.3))
    session.save(tmp_path / "session")
    replies = []
    for one in (session, session.copy(), silent.load_session(tmp_path / "session")):
        one.append_text(QUESTION)
        replies.append(answer(one, audio=False))
        assert len(replies[-1].text_ids) == SHORT["max_text_tokens"]
        assert_same_reply(replies[-1], replies[0])
        with pytest.raises(InputError, match="no spoken answer to cut"):
            one.truncate(0)


def test_a_session_is_saved_without_what_it_does_not_need(model, tmp_path):
    session = after_an_answer(model)
    session.save(tmp_path / "session")
    held = sum(t.nbytes for t in read_safetensors(tmp_path / "session").values())
    assert held <= session.nbytes + 10_000


# ------------------------------------------------------------------------------------------- several turns


def test_turns_one_by_one_equal_the_same_messages_at_once(model, monkeypatch):
    script(monkeypatch, model, ANSWER, "Tomorrow it rains.", [])
    clip = sound(1.4, 24000)
    options = SHORT | {"max_text_tokens": 40}
    session, record = recorded(model, system="Be brief.")
    session.append_clip(clip, 24000)
    session.append_text("So?")
    first = answer(session, **options)
    assert first.text == ANSWER
    session.append_text("And the weather?")
    assert answer(session, **options).text == "Tomorrow it rains."
    session.append_clip(sound(0.5, seed=3), 16000)
    record.clear()
    monkeypatch.undo()
    last = answer(session, seed=5)

    messages = [
        {"role": "system", "content": "Be brief."},
        user((clip, 24000), "So?"),
        {"role": "assistant", "content": ANSWER},
        user("And the weather?"),
        {"role": "assistant", "content": [{"type": "text", "text": "Tomorrow it rains."}]},
        user((sound(0.5, seed=3), 16000)),
    ]
    at_once, all_read = recorded(model)
    for message in messages:
        at_once.append_message(message)
    at_once.turn = session.turn - 1  # noise is a function of the turn, too
    assert_same_reply(answer(at_once, seed=5), last)
    assert at_once.ids == session.ids
    assert_same(stage(record, "thinker_logits"), stage(all_read, "thinker_logits"))
    assert_same(stage(record, "talker_logits"), stage(all_read, "talker_logits"))

    greedy = GREEDY_SPEECH
    at_once = model.session()
    for message in messages:
        at_once.append_message(message)
    assert_same_reply(model.generate(messages, **SHORT, **greedy), answer(at_once, **greedy))


def test_the_talker_reads_all_user_turns_and_no_older_answer(model, monkeypatch):
    script(monkeypatch, model, ANSWER)
    session, record = recorded(model, system="Be brief.")
    c, user_ids = model.config, []
    for turn in range(3):
        start = len(session.ids) + len(session._ids)
        session.append_text(f"Question {turn}")
        session.append_clip(sound(0.3, seed=turn), 16000)
        session.commit()
        user_ids += session.ids[start:]
        assert session.talker.length.tolist() == [len(user_ids)] == [session.user_length]
        answer(session)
        assert session.talker.length.tolist() == [len(user_ids)]  # cut back to the end of the user's turns
    assert user_ids.count(c.user_token_id) == 3
    assert c.assistant_token_id not in user_ids
    assert c.system_token_id not in user_ids

    def prompt() -> Tensor:
        """The Talker's own view of the user turns: its inputs but for the openings of its answers (9 each)."""
        rows, openings = stage(record, "talker_inputs"), 3 * 9
        assert len(rows) == len(user_ids) + openings
        return rows

    text = model.speaking().talker.text_projection(model.thinker.embed(torch.tensor(user_ids[:4])))
    assert_same(prompt()[:4], text)


# ----------------------------------------------------------------------------------------------- cut back


def spoken_session(model: Omni, monkeypatch: pytest.MonkeyPatch, frames: int = 20) -> tuple[Session, Reply]:
    """A session that has said ANSWER and was cut off after `frames` frames."""
    script(monkeypatch, model, ANSWER)
    session = model.session()
    session.append_clip(sound(0.8), 16000)
    reply = answer(session, max_text_tokens=40, max_frames=frames)
    assert reply.text == ANSWER
    return session, reply


def next_answer(session: Session) -> Reply:
    session.append_text("Go on")
    return answer(session, **GREEDY_SPEECH)


def as_if_said(model: Omni, text: str) -> Session:
    session = model.session()
    session.append_clip(sound(0.8), 16000)
    session.append_message({"role": "assistant", "content": text})
    return session


@pytest.mark.parametrize("ms", [0, 79, 400, 1000, 1600])
def test_truncate_leaves_what_was_heard(model, monkeypatch, ms):
    session, _ = spoken_session(model, monkeypatch)
    generation = session.generation
    assert session.answer is not None
    before = session.answer.start
    heard = session.truncate(ms)
    assert ANSWER.startswith(heard)
    assert heard == "" or not ANSWER[len(heard) :][:1].isalnum() or not heard[-1].isalnum()
    assert len(model.tokenizer.encode(heard)) <= 4.5 * ms / 1000
    assert bool(heard) == (ms >= 1000)
    assert session.generation > generation
    assert session.thinker.length.tolist() == [before + len(model.tokenizer.encode(heard))]
    assert session.talker.length.tolist() == [session.user_length]
    monkeypatch.undo()
    expected = as_if_said(model, heard)
    assert_same_reply(next_answer(session), next_answer(expected))
    assert session.ids == expected.ids


def test_more_is_heard_later(model, monkeypatch):
    session, _ = spoken_session(model, monkeypatch)
    texts = [session.copy().truncate(ms) for ms in range(0, 1601, 80)]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert len(set(texts)) >= 4
    assert session.truncate(1200) == texts[15]
    assert session.truncate(400) == texts[5]  # cut again, further back
    with pytest.raises(InputError, match="lies outside"):
        session.truncate(1200)


def test_an_answer_said_to_the_end_shares_its_time_evenly(model, monkeypatch):
    stop_speech_after(monkeypatch, model, 16)
    session, reply = spoken_session(model, monkeypatch, frames=60)
    assert reply.finish == "stop"
    assert len(reply.codes) == 16
    halves = session.copy()
    count = len(reply.text_ids)
    assert 0 < len(model.tokenizer.encode(halves.truncate(640))) <= count // 2
    whole = session.copy()
    assert whole.truncate(1280) == ANSWER
    monkeypatch.undo()
    expected = as_if_said(model, ANSWER)
    assert_same_reply(next_answer(whole), next_answer(expected))
    assert_same_reply(next_answer(session), next_answer(as_if_said(model, ANSWER)))  # no cut at all
    assert whole.ids == expected.ids


def test_a_word_is_not_cut_and_a_character_neither(model, monkeypatch):
    text = "Съешь же ещё этих мягких французских булок, да выпей чаю."
    script(monkeypatch, model, text)
    session = model.session()
    session.append_text(QUESTION)
    reply = answer(session, max_text_tokens=80, max_frames=30)
    heard = ""
    for ms in range(0, 80 * len(reply.codes) + 1, 80):
        heard = session.copy().truncate(ms)
        assert text.startswith(heard)
        assert heard == "" or not (heard[-1].isalpha() and text[len(heard)].isalpha())
    assert heard.count(" ") >= 1


def test_a_whole_answer_that_reached_its_limit_is_kept_whole(model, monkeypatch):
    """The last token of an answer cut by `max_text_tokens` is not spoken, but it was said and stays in the history."""
    stop_speech_after(monkeypatch, model, 8)
    ids = model.tokenizer.encode(ANSWER)
    script(monkeypatch, model, ANSWER)
    sessions = [model.session(), model.session()]
    for session in sessions:
        session.append_text(QUESTION)
        assert answer(session, max_text_tokens=len(ids), max_frames=40).finish == "length"
    cut, uncut = sessions
    assert cut.truncate(8 * 80) == ANSWER
    monkeypatch.undo()
    assert_same_reply(next_answer(cut), next_answer(uncut))
    assert cut.ids == uncut.ids


def test_frames_given_before_the_loop_was_left_can_be_cut_at(model):
    session = model.session()
    session.append_text(QUESTION)
    given = 0
    for event in session.respond(**SHORT):
        given += isinstance(event, AudioDelta)
        if given == 3:
            break
    session.truncate(3 * 80)  # three frames were given


def test_impossible_cuts_are_refused_and_change_nothing(model):
    session = model.session()
    with pytest.raises(InputError, match="no spoken answer to cut"):
        session.truncate(0)
    session.append_text(QUESTION)
    with pytest.raises(InputError, match="no spoken answer to cut"):
        session.truncate(0)
    reply = answer(session)
    ids, generation = list(session.ids), session.generation
    for ms in (-1, 80 * len(reply.codes) + 1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="lies outside the answer"):
            session.truncate(ms)
    assert session.ids == ids
    assert session.generation == generation
    assert_same_reply(next_answer(session), next_answer(after_question(model)))


def after_question(model: Omni) -> Session:
    session = model.session()
    session.append_text(QUESTION)
    answer(session)
    return session


def test_a_text_answer_has_nothing_to_cut(model):
    session = model.session()
    session.append_text(QUESTION)
    answer(session, audio=False)
    with pytest.raises(InputError):
        session.truncate(80)


@pytest.mark.parametrize("said", ["sound", "text", "message"])
def test_once_the_user_goes_on_the_answer_cannot_be_cut(model, said):
    """Cutting now would take what the user has said since with it."""

    def go_further(session: Session) -> None:
        if said == "sound":
            session.append_audio(sound(1.2))
        elif said == "text":
            session.append_text("But why?")
        else:
            session.append_message({"role": "system", "content": "Be kind."})

    session, expected = after_question(model), after_question(model)
    go_further(session)
    with pytest.raises(InputError, match="no spoken answer to cut"):
        session.truncate(80)
    go_further(expected)
    assert_same_reply(next_answer(session), next_answer(expected))


# ------------------------------------------------------------------------------------- cancelled, left early


def test_cancel_from_inside_the_loop(model, monkeypatch):
    script(monkeypatch, model, ANSWER, "Good.")
    session = model.session()
    session.append_text(QUESTION)
    seen, reply = [], None
    for event in session.respond(max_text_tokens=40, max_frames=20):
        seen.append(event)
        if len([e for e in seen if isinstance(e, AudioDelta)]) == 3:
            session.cancel()
        if isinstance(event, Done):
            reply = event.reply
    assert reply is not None
    assert reply.finish == "cancelled"
    assert len(reply.codes) == 3
    assert len(reply.audio) == 3 * 1920
    assert "".join(e.text for e in seen if isinstance(e, TextDelta)) == reply.text
    assert ANSWER.startswith(reply.text)
    assert 0 < len(reply.text_ids) < len(model.tokenizer.encode(ANSWER))
    assert session.talker.length.tolist() == [session.user_length]

    expected = model.session()
    expected.append_text(QUESTION)
    expected.append_message({"role": "assistant", "content": reply.text})
    monkeypatch.undo()
    assert_same_reply(next_answer(session), next_answer(expected))
    assert session.ids == expected.ids


def test_cancel_before_the_first_event(model):
    session = model.session()
    session.append_text(QUESTION)
    events = session.respond(**SHORT)
    session.cancel()
    reply = collect(events)
    assert reply.finish == "cancelled"
    assert not len(reply.codes)
    assert not reply.text_ids


@pytest.mark.parametrize("how", ["text alone", "speak"])
def test_cancel_ends_text_alone_and_text_from_elsewhere(model, how):
    session = model.session()
    session.append_text(QUESTION)
    alone = how == "text alone"
    events = session.respond(audio=False, max_text_tokens=20) if alone else session.speak(ANSWER, **SHORT)
    for count, event in enumerate(events):
        if count == 1:
            session.cancel()
        if isinstance(event, Done):
            assert event.reply.finish == "cancelled"
            assert len(event.reply.text_ids if alone else event.reply.codes) == 2
    expected = model.session()
    expected.append_text(QUESTION)
    if alone:
        collect(expected.respond(audio=False, max_text_tokens=2))
    assert_same_reply(next_answer(session), next_answer(expected))


def test_what_is_said_before_the_first_event_is_answered_too(model):
    session, expected = model.session(), model.session()
    session.append_text(QUESTION)
    events = session.respond(**SHORT)
    session.append_text("Quickly, please.")
    reply = collect(events)
    for text in (QUESTION, "Quickly, please."):
        expected.append_text(text)
        expected.commit()
    assert_same_reply(reply, answer(expected))
    assert session.ids == expected.ids


def test_leaving_the_loop_early_leaves_the_session_usable(model, monkeypatch):
    script(monkeypatch, model, ANSWER)
    session = model.session()
    session.append_text(QUESTION)
    text = ""
    for event in session.respond(max_text_tokens=40, max_frames=20):
        text += event.text if isinstance(event, TextDelta) else ""
        if isinstance(event, AudioDelta) and event.frame == 4:
            break
    expected = model.session()
    expected.append_text(QUESTION)
    assert session.answer is not None
    said = model.tokenizer.decode(session.answer.text_ids)
    assert text == said
    expected.append_message({"role": "assistant", "content": said})
    monkeypatch.undo()
    assert_same_reply(next_answer(session), next_answer(expected))
    assert session.ids == expected.ids


def test_a_stream_closed_early_has_no_reply(model):
    events = model.stream([user(QUESTION)], **SHORT)
    next(events)
    assert isinstance(events, Iterator)
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="closed early"):
        collect(events)


MEDDLING = {
    "append_text": lambda s: s.append_text("wait"),
    "append_audio": lambda s: s.append_audio(sound(0.1)),
    "append_clip": lambda s: s.append_clip(sound(0.1), 16000),
    "append_message": lambda s: s.append_message({"role": "assistant", "content": "no"}),
    "respond": lambda s: collect(s.respond(**SHORT)),
    "speak": lambda s: collect(s.speak("no", **SHORT)),
    "commit": lambda s: s.commit(),
    "copy": lambda s: s.copy(),
    "save": lambda s: s.save(os.devnull),
}


@pytest.mark.parametrize("meddle", MEDDLING.values(), ids=list(MEDDLING))
@pytest.mark.parametrize("speaking", [False, True], ids=["respond", "speak"])
def test_nothing_may_come_between_the_events_of_an_answer(model, meddle, speaking):
    """Half an answer is in the caches: what else is done to them then would silently be part of it."""
    session, undisturbed = after_question(model), after_question(model)
    for one in (session, undisturbed):
        one.append_text("And then?")
    collect(undisturbed.speak("One moment.", **SHORT) if speaking else undisturbed.respond(**SHORT))
    events = session.speak("One moment.", **SHORT) if speaking else session.respond(**SHORT)
    while not isinstance(next(events), AudioDelta):
        pass
    with pytest.raises(InputError, match="answer is still being given"):
        meddle(session)
    collect(events)
    assert_same_reply(next_answer(session), next_answer(undisturbed))
    assert session.ids == undisturbed.ids


def test_an_answer_cannot_be_cut_while_it_is_given(model):
    session, undisturbed = model.session(), after_question(model)
    session.append_text(QUESTION)
    for event in session.respond(**SHORT):
        if not isinstance(event, Done):
            with pytest.raises(InputError, match=r"no spoken answer to cut|still being given"):
                session.truncate(0)
    assert_same_reply(next_answer(session), next_answer(undisturbed))


# ------------------------------------------------------------------------------------------- ten minutes


def tensors_of(value: Any, skip: set[int]) -> Iterator[Tensor]:
    """All tensors that `value` leads to, the model's left out."""
    if id(value) in skip or isinstance(value, nn.Module | str | bytes):
        return
    skip.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, skip)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_of(item, skip)
    elif is_dataclass(value) or hasattr(value, "__dict__"):
        names = [f.name for f in fields(value)] if is_dataclass(value) else []
        for item in [*(getattr(value, name) for name in names), *vars(value).values()]:
            yield from tensors_of(item, skip)


@pytest.mark.long
def test_ten_minutes_grow_by_cache_blocks_and_nothing_else():
    long = {
        "thinker_config.text_config.max_position_embeddings": 16384,
        "talker_config.text_config.max_position_embeddings": 16384,
    }
    model = omni(long)
    session = model.session()
    minute = np.concatenate([sound(2.0, seed=seed) for seed in range(30)])
    assert model.config.talker is not None
    blocks = {
        name: 2 * c.num_hidden_layers * c.num_key_value_heads * CACHE_BLOCK * c.head_dim * 4
        for name, c in (("thinker", model.config.text), ("talker", model.config.talker.text))
    }

    def sizes() -> tuple[int, int, int]:
        """Bytes of the Thinker's cache, of the Talker's, and of every other tensor the session leads to."""
        held = sum(t.untyped_storage().nbytes() for t in tensors_of(session, {id(model)}))
        assert session.nbytes <= held
        return session.thinker.nbytes, session.talker.nbytes, held - session.thinker.nbytes - session.talker.nbytes

    session.append_audio(minute[:16000])
    thinker, talker, rest = sizes()
    seen = [(thinker, talker, session.nbytes)]
    for start in range(16000, 600 * 16000, 32000):
        piece = np.take(minute, range(start, min(start + 32000, 600 * 16000)), mode="wrap")
        session.append_audio(piece)
        now = sizes()
        # the same block may be there for the Thinker before it is there for the Talker, whose turns are fewer
        assert (now[0] - seen[-1][0]) % blocks["thinker"] == 0
        assert (now[1] - seen[-1][1]) % blocks["talker"] == 0
        assert now[2] == rest, "something besides the caches grows"
        assert session.nbytes - seen[-1][2] == now[0] - seen[-1][0] + now[1] - seen[-1][1]
        seen.append((now[0], now[1], session.nbytes))
    session.commit()
    assert session.ids.count(model.config.audio_token_id) == 7800
    needed = -(-len(session.ids) // CACHE_BLOCK)
    length = session.thinker.length.nbytes
    assert session.thinker.nbytes == needed * blocks["thinker"] + length
    assert session.talker.nbytes == needed * blocks["talker"] + length
    assert len({s[0] for s in seen}) == needed  # one block at a time
    reply = answer(session)
    assert len(reply.codes) == SHORT["max_frames"]


# ---------------------------------------------------------------------------------------- long conversations


def told(session: Session, numbers: range) -> None:
    """Exchanges that have taken place: a sound and a question each, and what was answered."""
    for n in numbers:
        heard = {"type": "audio", "audio": (sound(0.5 + 0.2 * (n % 3), seed=n), 16000)}
        session.append_message({"role": "user", "content": [heard, {"type": "text", "text": f"question {n}"}]})
        session.append_message({"role": "assistant", "content": f"the answer number {n}"})


def asked(session: Session, seed: int = 5) -> Reply:
    session.append_audio(sound(0.7, seed=9), 16000)
    return collect(session.respond(seed=seed, max_frames=6, max_text_tokens=6))


def test_a_conversation_that_forgot_is_as_if_it_had_not_been_told():
    short = {f"{box}_config.text_config.max_position_embeddings": 320 for box in ("thinker", "talker")}
    model = omni(short)
    whole = model.session("Be brief.", retention=0.5)
    numbers = 0
    while not whole.lacks_room():
        told(whole, range(numbers, numbers + 1))
        numbers += 1
    forked = whole.copy()
    forgotten = whole.forget()
    kept = len(whole.ids)
    assert forgotten > 0
    assert kept <= 160
    for first in range(numbers):
        latest = model.session("Be brief.")
        told(latest, range(first, numbers))
        latest.commit()
        if latest.ids == whole.ids:
            break
    else:
        raise AssertionError("what was kept are no whole turns")
    assert first > 0
    reply = asked(whole)
    same = asked(latest)
    assert (reply.text_ids, reply.codes.tolist()) == (same.text_ids, same.codes.tolist())
    assert asked(forked).text_ids == reply.text_ids, "a turn that begins forgets by itself"


def test_a_conversation_may_go_on_for_ever():
    short = {f"{box}_config.text_config.max_position_embeddings": 240 for box in ("thinker", "talker")}
    session, lengths = omni(short).session("Be brief.", window=1, retention=0.6), []
    for turn in range(16):
        assert asked(session, turn).finish
        if turn % 3 == 1:
            session.truncate(80)
        lengths.append(len(session.ids))
    assert sum(b < a for a, b in pairwise(lengths)) >= 2
    system = omni(short).session("Be brief.")
    system.commit()
    assert session.ids[: len(system.ids)] == system.ids


def test_a_long_text_finds_room_where_older_turns_can_be_forgotten():
    short = {f"{box}_config.text_config.max_position_embeddings": 240 for box in ("thinker", "talker")}
    session, words = omni(short).session("Be brief.", retention=0.9), "word " * 30
    size = len(session.model.tokenizer.encode(words))
    assert 240 * 0.1 < size < 240 / 2
    while len(session.ids) + size <= 240:
        told(session, range(1))
    assert not session.lacks_room()
    message = {"role": "user", "content": words}
    session.append_message(message)
    assert collect(session.respond(audio=False, max_text_tokens=4)).text_ids
    assert len(session.ids) <= 240
    with pytest.raises(CapacityError, match="shorten it"):
        session.append_message({"role": "user", "content": "word " * 300})


def test_a_conversation_that_forgets_can_be_saved(tmp_path):
    short = {f"{box}_config.text_config.max_position_embeddings": 240 for box in ("thinker", "talker")}
    model = omni(short)
    session = model.session(window=1, retention=0.6)
    for turn in range(4):
        asked(session, turn)
    session.save(tmp_path / "session")
    resumed = model.load_session(tmp_path / "session")
    for turn in range(4, 9):
        assert asked(session, turn).text_ids == asked(resumed, turn).text_ids


@pytest.mark.parametrize("retention", [0.0, -1.0, 0.95, 2.0])
def test_a_retention_that_is_no_share_is_refused(retention):
    with pytest.raises(InputError, match="expected a share above 0"):
        omni().session(retention=retention)
