"""Transcriptions, speech and voices over the wire, asked by OpenAI's own client."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile

from antiphon.audio import Samples, from_pcm16, read_audio, write_audio
from antiphon.generate import collect
from antiphon.serve.settings import Settings
from antiphon.serve.sounds import MEDIA, Encoder, WireOut, decode, from_wire, whole_file
from antiphon.transcripts import longest_piece, transcribe
from tests.serving import Served, serving, tiny, until

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


def wav(samples: Samples, rate: int) -> bytes:
    file = io.BytesIO()
    write_audio(file, samples, rate)
    return file.getvalue()


def tone(seconds: float, rate: int = 24000) -> Samples:
    return (0.3 * np.sin(np.arange(round(seconds * rate)) * 0.05)).astype(np.float32)


def same_sound(pcm: bytes, samples: Samples) -> None:
    np.testing.assert_allclose(from_pcm16(pcm), samples.clip(-1, 1), atol=1e-3)


# ------------------------------------------------------------------------------------------ transcriptions


@pytest.fixture(scope="module")
def long() -> tuple[Samples, int]:
    """Two questions with a pause, longer than one piece."""
    samples, rate = read_audio(EXAMPLES / "question.wav")
    silence = np.zeros(round(longest_piece(tiny()) * rate * 0.6), np.float32)
    return np.concatenate([samples, silence, samples, silence]), rate


def test_a_transcript_is_that_of_the_command_line(server, long):
    said = transcribe(tiny(), *long)
    assert len(said.pieces) > 1
    client, file = server.client(), ("lie.mp3", wav(*long))
    reply = client.audio.transcriptions.create(model="tiny", file=file)
    assert reply.text == said.text
    assert reply.usage.input_token_details.audio_tokens > 20
    verbose = client.audio.transcriptions.create(model="tiny", file=file, response_format="verbose_json")
    assert [segment.text for segment in verbose.segments] == [piece.text for piece in said.pieces]
    assert verbose.duration == pytest.approx(said.seconds)
    srt = client.audio.transcriptions.create(model="tiny", file=file, response_format="srt")
    assert srt.count(" --> ") == len(said.pieces)
    assert client.audio.transcriptions.create(model="tiny", file=file, response_format="vtt").startswith("WEBVTT")
    assert client.audio.transcriptions.create(model="tiny", file=file, response_format="text").strip() == said.text


def test_a_transcript_comes_as_it_forms(server, long):
    stream = server.client().audio.transcriptions.create(model="tiny", file=("x", wav(*long)), stream=True)
    events = [*stream]
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    done = events[-1]
    assert done.type == "transcript.text.done"
    assert len(deltas) > 1
    assert "".join(deltas) == done.text == transcribe(tiny(), *long).text
    assert done.usage.output_tokens > 1


def test_chinese_is_asked_for_in_chinese(server):
    data = (EXAMPLES / "question-zh.wav").read_bytes()
    reply = server.client().audio.transcriptions.create(model="tiny", file=("x.wav", data), language="zh")
    assert reply.text == transcribe(tiny(), *read_audio(EXAMPLES / "question-zh.wav"), language="zh").text


@pytest.mark.parametrize(
    ("fields", "data", "words"),
    [
        ({"model": "tiny"}, b"", "not readable sound"),
        ({"model": "tiny"}, b"RIFF" + bytes(100), "not readable sound"),
        ({"model": "tiny", "language": "tlh"}, wav(tone(1), 24000), "no language 'tlh'"),
        ({"model": "tiny", "response_format": "docx"}, wav(tone(1), 24000), "no format 'docx'"),
        ({"model": "whisper-1"}, wav(tone(1), 24000), "no model 'whisper-1'"),
        ({"model": "tiny"}, None, "send the sound as a file in the field file"),
        ({"model": "tiny", "timestamp_granularities[]": "word"}, wav(tone(1), 24000), "no times of words"),
        ({"model": "tiny", "stream": "perhaps"}, wav(tone(1), 24000), 'stream is "perhaps"; expected true or false'),
    ],
)
def test_what_cannot_be_written_down_is_said(server, fields, data, words):
    files = {"file": ("../../etc/passwd", data)} if data is not None else {"other": ("x", b"x")}
    with server.http() as http:
        refused = http.post("/v1/audio/transcriptions", data=fields, files=files)
        assert refused.status_code in (400, 404)
        assert words in refused.json()["error"]["message"]
        assert http.post("/v1/audio/transcriptions", json=fields).status_code == 400


def test_a_small_file_of_much_sound_is_not_decoded_to_its_end():
    bomb = io.BytesIO()
    soundfile.write(bomb, np.zeros(60 * 192000, np.int16), 192000, format="FLAC")  # a minute, at four times the rate
    assert len(bomb.getvalue()) < 200_000
    with serving(Settings(file_seconds=50)) as served, pytest.raises(openai.BadRequestError, match="longer than"):
        served.client().audio.transcriptions.create(model="tiny", file=("x", bomb.getvalue()))
    with serving(Settings(audio_seconds=50)) as served, served.http() as http:
        data = base64.b64encode(bomb.getvalue()).decode()
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        asked = {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
        voice = {"data": {"name": "bomb"}, "files": {"audio_sample": ("x", bomb.getvalue())}}
        for refused in (http.post("/v1/chat/completions", json=asked), http.post("/v1/audio/voices", **voice)):
            assert refused.status_code == 400
            assert "longer than" in refused.json()["error"]["message"]
    wide = io.BytesIO()
    soundfile.write(wide, np.zeros((100, 64), np.int16), 24000, format="WAV")
    with pytest.raises(Exception, match="64 channels"):
        decode(wide.getvalue(), 10)


def test_a_header_that_lies_about_its_length_changes_nothing():
    data = bytearray(wav(tone(1), 24000))
    data[40:44] = (0xFFFFFFF0).to_bytes(4, "little")
    assert len(decode(bytes(data), 10)[0]) == 24000


# ------------------------------------------------------------------------------------------------- speech


@pytest.mark.parametrize("form", MEDIA)
def test_text_is_said_in_every_format(server, form):
    said = collect(tiny().speak("Today is Monday", voice="ethan"))
    response = server.client().audio.speech.create(
        model="tiny", voice="ethan", input="Today is Monday", response_format=form
    )
    data = response.read()
    assert response.response.headers["content-type"] == MEDIA[form]
    if form == "pcm":
        same_sound(data, said.audio)
        return
    samples, rate = read_audio(known_length(data, len(said.audio)) if form == "flac" else data)
    assert rate == 24000
    assert len(samples) == pytest.approx(len(said.audio), abs=3000)
    assert np.abs(samples).max() == pytest.approx(np.abs(said.audio).max(), rel=0.5)


def known_length(flac: bytes, frames: int) -> bytes:
    """A streamed FLAC file with its length written into its header: libsndfile wants it, players do not."""
    assert flac[:4] == b"fLaC"
    assert int.from_bytes(flac[21:26], "big") & (1 << 36) - 1 == 0
    return flac[:22] + frames.to_bytes(4, "big") + flac[26:]


def test_sound_is_sent_from_its_first_frame_on(server):
    with server.client().audio.speech.with_streaming_response.create(
        model="tiny", voice="nova", input="Today is Monday", response_format="wav"
    ) as response:
        sizes = [len(piece) for piece in response.iter_bytes()]
    assert len(sizes) > 3, "it came in one piece"


def test_speech_as_events(server):
    with server.http() as http:
        body = {"model": "tiny", "voice": "ethan", "input": "Hello", "response_format": "pcm", "stream_format": "sse"}
        text = http.post("/v1/audio/speech", json=body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line]
    sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    same_sound(sound, collect(tiny().speak("Hello", voice="ethan")).audio)
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"]["output_tokens"] == len(sound) / 3840


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speed": 1.5}, "its own speed"),
        ({"response_format": "aac"}, "aac is not written here"),
        ({"response_format": "docx"}, "response_format"),
        ({"input": " "}, "nothing to say"),
        ({"input": "x" * 5000}, "longer than the limit"),
        ({"voice": "nobody"}, "there is no voice"),
        ({"model": "tts-1"}, "no model"),
        ({"input": 7}, "input"),
    ],
)
def test_what_cannot_be_said_is_said(server, changes, words):
    with server.http() as http:
        body = {"model": "tiny", "voice": "ethan", "input": "Hello", **changes}
        refused = http.post("/v1/audio/speech", json=body)
    assert refused.status_code in (400, 404)
    assert words in refused.json()["error"]["message"]


def test_who_stops_listening_leaves_nothing_behind(server):
    with server.client().audio.speech.with_streaming_response.create(
        model="tiny", voice="ethan", input="Today is Monday and tomorrow is Tuesday", response_format="pcm"
    ) as response:
        next(iter(response.iter_bytes()))
    until(lambda: not server.engine.calls)


# ------------------------------------------------------------------------------------------------- voices


def test_a_voice_is_cloned_used_and_forgotten():
    reference = (EXAMPLES / "reference.wav").read_bytes()
    with serving(Settings(keys=("anna", "bert"), voices=1)) as served:
        anna, bert = served.client("anna"), served.client("bert")
        voice = anna.audio.voices.create(name="mine", audio_sample=("r.wav", reference), consent="cons_1")
        assert voice.object == "audio.voice"
        said = collect(tiny().speak("Hello", voice=tiny().clone(*read_audio(EXAMPLES / "reference.wav"))))
        for name in ("mine", voice.id):
            sound = anna.audio.speech.create(model="tiny", voice=name, input="Hello", response_format="pcm").read()
            same_sound(sound, said.audio)
        for other in (lambda: bert.audio.speech.create(model="tiny", voice=voice.id, input="Hello"),):
            with pytest.raises(openai.BadRequestError, match="there is no voice"):
                other()
        with served.http(headers={"authorization": "Bearer bert"}) as http:
            listed = {one["name"] for one in http.get("/v1/audio/voices").json()["data"]}
            assert listed == set(tiny().voices)
            assert http.delete(f"/v1/audio/voices/{voice.id}").status_code == 404
            full = http.post("/v1/audio/voices", data={"name": "x"}, files={"audio_sample": ("r", reference)})
            assert full.status_code == 429
        with served.http(headers={"authorization": "Bearer anna"}) as http:
            assert "mine" in {one["name"] for one in http.get("/v1/audio/voices").json()["data"]}
            assert http.delete(f"/v1/audio/voices/{voice.id}").json()["deleted"] is True


@pytest.mark.parametrize(("seconds", "name"), [(2.0, "short"), (31.0, "long"), (3.5, "ethan"), (3.5, "")])
def test_a_voice_needs_three_to_thirty_seconds_and_a_name_of_its_own(server, seconds, name):
    with server.http() as http:
        files = {"audio_sample": ("r.wav", wav(tone(seconds, 16000), 16000))}
        refused = http.post("/v1/audio/voices", data={"name": name}, files=files)
    assert refused.status_code == 400


# ------------------------------------------------------------------------------------------------- sounds


@pytest.mark.parametrize("form", MEDIA)
def test_a_whole_file_has_its_length_in_its_header(form):
    x = tone(2)
    data = whole_file(form, x, 24000)
    if form == "pcm":
        assert np.allclose(from_pcm16(data), x, atol=1e-4)
        return
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert len(samples) == pytest.approx(len(x), abs=3000)


@pytest.mark.parametrize("form", ["wav", "pcm", "flac", "mp3"])
def test_a_file_that_is_being_made_is_given_away_at_once(form):
    encoder = Encoder(form, 24000)
    sizes = [len(encoder.push(tone(0.08))) for _ in range(6)]
    assert sum(sizes) > 100
    assert sum(size > 0 for size in sizes) >= 3


@pytest.mark.parametrize("form", ["audio/pcmu", "audio/pcma", "audio/pcm"])
@pytest.mark.parametrize("rate", [24000, 16000])
def test_telephones_hear_and_are_heard(form, rate):
    x = tone(1, rate)
    out = WireOut(form, rate)
    data = b"".join(out.push(piece) for piece in np.array_split(x, 13)) + out.push(np.zeros(0, np.float32), True)
    back = from_wire(form, data)
    assert len(back) == (24000 if form == "audio/pcm" else 8000)
    assert np.sqrt(np.mean(back**2)) == pytest.approx(np.sqrt(np.mean(x**2)), rel=0.05)
    assert len(from_wire(form, b"")) == 0
