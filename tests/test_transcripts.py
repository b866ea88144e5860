"""Recordings as text: cut where it is quiet, every sample in one piece, in the forms that players read."""

import json
from dataclasses import replace

import numpy as np
import pytest

from antiphon.errors import AudioError, InputError
from antiphon.transcripts import FORMATS, Piece, Transcript, certain, clock, cut_at_pauses, transcribe, uncoiled
from tests.models import omni, script, sound

RATE = 16000
SAID = Transcript([Piece(0.0, 1.5, "one two"), Piece(1.5, 3661.25, "three")], 3661.25)


def bursts(pauses: list[float]) -> np.ndarray:
    """A second of noise after each pause."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    return np.concatenate([part for p in pauses for part in (np.zeros(round(p * RATE)), noise)]).astype(np.float32)


def test_pieces_end_in_pauses_and_hold_every_sample_once() -> None:
    x = bursts([0, 0.5, 0.5, 0.5, 0.5, 0.5])
    pieces = cut_at_pauses(x, RATE, 4.0)
    assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])]
    assert pieces[-1][1] == len(x)
    assert len(pieces) == 3
    assert all(b - a <= 4.0 * RATE for a, b in pieces)
    assert all(np.abs(x[b - 800 : b + 800]).max() == 0 for _, b in pieces[:-1])


@pytest.mark.parametrize("seconds", [0.0001, 0.9, 4.0, 4.0001, 9.3])
def test_without_pauses_pieces_are_no_longer_than_asked(seconds: float) -> None:
    x = np.full(max(1, round(seconds * RATE)), 0.1, np.float32)
    pieces = cut_at_pauses(x, RATE, 4.0)
    assert sum(b - a for a, b in pieces) == len(x)
    assert all(0 < b - a <= 4.0 * RATE for a, b in pieces)
    assert len(pieces) == 1 or seconds > 4


def test_a_long_recording_is_heard_piece_by_piece() -> None:
    model, told = omni(), []
    x = np.concatenate([sound(1.2, RATE), np.zeros(RATE // 2, np.float32), sound(1.0, RATE, 1)])
    whole = transcribe(
        model, x, RATE, longest=2.0, max_text_tokens=5, progress=lambda done, of: told.append((round(done, 3), of))
    )
    (first, second) = whole.pieces
    alone = transcribe(model, x[: round(first.stop * RATE)], RATE, max_text_tokens=5)
    assert first.text == alone.text
    assert (first.start, second.start, second.stop) == (0, first.stop, whole.seconds)
    assert whole.finish == "length"
    assert told == [(round(first.stop, 3), 2.7), (2.7, 2.7)]


def test_a_model_that_goes_on_and_on_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No speech has so many words: two seconds end after 16 + 2 * 25 tokens, and the transcript says so."""
    model = omni()
    script(monkeypatch, model, " ".join(str(n * n) for n in range(400)))
    heard = transcribe(model, bursts([0, 0]), RATE)
    assert heard.finish == "length"
    assert len(model.tokenizer.encode(heard.text)) <= 66
    assert len(heard.text) > 60


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("it is April, " + "April, " * 20, "it is April,"),
        ("a" * 30, "a"),
        ("gut gut gut gut gut gut", "gut gut gut gut gut gut"),  # six times may be meant
        ("drei. " + "und dann, ja " * 9 + "Ende", "drei. und dann, ja"),
    ],
)
def test_a_transcript_that_goes_round_in_circles_ends_there(
    monkeypatch: pytest.MonkeyPatch, said: str, kept: str
) -> None:
    model = omni()
    script(monkeypatch, model, said)
    heard = transcribe(model, bursts([0, 0, 0, 0, 0, 0]), RATE)
    assert heard.text == kept
    assert heard.finish == ("loop" if kept != said else "stop")
    script(monkeypatch, model, "fine")
    assert transcribe(model, bursts([0]), RATE).text == "fine", "the next is heard as ever"


@pytest.mark.parametrize("said", ["abba" + "ab" * 9, "on the " + "cat, " * 9, "aaa b" * 8, "no no, not at all"])
def test_what_is_certain_stands_when_a_circle_is_found(said: str) -> None:
    given, text = "", ""
    for letter in said:
        once = uncoiled(text := text + letter)
        sure = certain(once or text)
        given = sure if len(sure) > len(given) else given
        assert (once or text).startswith(given)
        if once is not None:
            return
    assert said == "no no, not at all"
    assert len(given) > len(said) / 2


def test_what_cannot_be_transcribed() -> None:
    with pytest.raises(InputError, match=r"there is no language 'xx'; there are ar, de, en, .*, zh$"):
        transcribe(omni(), sound(1.0), RATE, language="xx")
    with pytest.raises(AudioError):
        transcribe(omni(), np.zeros(0, np.float32), RATE)


def test_forms() -> None:
    assert FORMATS["txt"](SAID) == "one two three\n"
    assert FORMATS["srt"](SAID) == (
        "1\n00:00:00,000 --> 00:00:01,500\none two\n\n2\n00:00:01,500 --> 01:01:01,250\nthree\n"
    )
    assert FORMATS["vtt"](SAID).startswith(
        "WEBVTT\n\nNOTE times are where pieces were cut\n\n00:00:00.000 --> 00:00:01.5"
    )
    assert json.loads(FORMATS["json"](SAID))["pieces"][1] == {"start": 1.5, "stop": 3661.25, "text": "three"}
    assert clock(59.9996, ".") == "00:01:00.000"


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        (["今天", "星期一"], "今天星期一"),
        (["오늘", "월요일"], "오늘 월요일"),
        (["", "a"], "a"),
        (["สวัสดี", "ok"], "สวัสดี ok"),
    ],
)
def test_pieces_are_joined_as_their_script_is_written(texts: list[str], whole: str) -> None:
    assert replace(SAID, pieces=[Piece(0, 1, text) for text in texts]).text == whole
