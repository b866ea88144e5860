"""The page of one answer: what it holds is what happened, nothing in it can break out, and it appears whole."""

import base64
import io
import json
import re
import tomllib
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import antiphon.generate
import antiphon.report
from antiphon.audio import normalize, read_audio
from antiphon.errors import InputError
from antiphon.generate import Omni, Reply, Session, collect
from antiphon.report import report_data, sentences, write_report
from antiphon.spoken import spoken
from tests.models import CODEBOOK, CODEBOOKS, VOCAB, omni, script, sound, stop_speech_after

VOID = {"meta", "link", "br", "input", "img", "hr"}
SECONDS, FRAMES = 3.3, 12
CLIP = sound(SECONDS, 24000)
WORDS = '**Good** morning </script> & "it is" <!-- 🙂 five to seven'


class Page(HTMLParser):
    """Elements of a page, and the text of its scripts; fails where they are not nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        if "id" in named:
            self.ids.append(named["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        for name in ("src", "href"):
            assert not re.match(r"\w+:(?!,)|//", named.get(name) or ""), f"{tag} loads {named[name]}"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def answered(model: Omni, window: int | None = None, **options: Any) -> tuple[Session, Reply]:
    """A session that heard CLIP, and its answer."""
    session = model.session("Be brief.", window=window, record={})
    session.append_clip(CLIP, 24000)
    session.append_text("What is it?")
    return session, collect(session.respond(**options))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Omni:
    """One that says WORDS, and speaks for some frames more than these have tokens."""
    model = omni()
    script(monkeypatch, model, WORDS)
    choose, end = antiphon.generate.choose, model.speaking().talker.config.codec_eos_token_id

    def going_on(logits, sampling, noise=None, seen=None, suppress=None):
        if suppress is not None:
            suppress = suppress | (torch.arange(len(suppress)) == end)
        return choose(logits, sampling, noise, seen, suppress)

    monkeypatch.setattr(antiphon.generate, "choose", going_on)
    stop_speech_after(monkeypatch, model, FRAMES)
    return model


def written(path: Path, session: Session, reply: Reply, title: str = "") -> Page:
    write_report(path, session, CLIP, 24000, reply, title)
    return Page(path.read_text("utf-8"))


def raw(source: dict[str, Any]) -> np.ndarray:
    """Levels [frames, bins] of a log-mel in the page."""
    return np.frombuffer(base64.b64decode(source["levels"]), np.uint8).reshape(source["frames"], -1)


def test_the_page_holds_what_happened(model, tmp_path):
    session, reply = answered(model, window=2)
    page = written(tmp_path / "reply.html", session, reply, "a question")
    data, speech = page.data, page.data["speech"]
    assert data["title"] == "a question"
    assert speech["codes"] == reply.codes.tolist()
    assert (len(speech["codes"]), len(speech["codes"][0])) == (FRAMES, CODEBOOKS)
    assert len(np.unique(reply.codes)) > 5
    heard, rate = read_audio(base64.b64decode(speech["wav"]))
    assert rate == reply.sample_rate
    assert np.abs(heard - reply.audio.clip(-1, 1)).max() < 1e-4
    assert soundfile.info(io.BytesIO(base64.b64decode(data["question"]["wav"]))).duration == pytest.approx(SECONDS)
    assert data["text"] == reply.text == WORDS

    mel, recorded = data["mel"], session.record["mel"][0]  # type: ignore[index]
    levels = raw(mel)
    assert levels.shape == recorded.shape
    heard_by_aut = normalize(recorded, recorded.max()).numpy()
    off = np.abs(levels / 255 * 2 - (heard_by_aut - heard_by_aut.max() + 2)).max()
    assert off < 0.005, "a byte is 80 dB / 255, the range that AuT hears"
    assert levels.std() > 20
    assert mel["tokens"] == len(session.record["audio_features"][0])  # type: ignore[index]
    assert (mel["window"], mel["chunk_frames"], mel["chunk_tokens"], mel["token_frames"]) == (2, 100, 13, 8)
    assert raw(speech).shape == (100 * FRAMES * 0.08, len(speech["hertz"]))
    assert all(a < b for a, b in pairwise(speech["hertz"]))


def test_tokens_are_those_that_were_read_and_said(model, tmp_path):
    session, reply = answered(model)
    data = written(tmp_path / "reply.html", session, reply).data
    prompt = torch.cat(session.record["prompt_ids"]).tolist()  # type: ignore[index]
    audio = session.model.config.audio_token_id
    ids = [
        i for entry in data["prompt"] for i in ([audio] * entry["count"] if entry["kind"] == "audio" else [entry["id"]])
    ]
    assert ids == prompt
    assert [entry["count"] for entry in data["prompt"] if entry["kind"] == "audio"] == [prompt.count(audio)]
    end = session.model.config.im_end_token_id
    assert [entry["id"] for entry in data["answer"]] == [*reply.text_ids, end]
    assert data["answer"][-1] == {"id": end, "kind": "kept", "text": "<|im_end|>", "control": True}

    spoken = session.model.tokenizer.decode(reply.spoken_ids)
    assert spoken.startswith("Good morning")
    assert len(reply.spoken_ids) == FRAMES + 1, "the Talker takes one for each frame and one for its end"
    said = [entry["id"] for entry in data["answer"] if entry["kind"] == "said"]
    assert said == [i for i in reply.spoken_ids if i in said]
    kinds = [entry["kind"] for entry in data["answer"]]
    assert kinds[0] == "kept", "the mark before the first word"
    assert set(kinds[-9:]) == {"kept"}, "the Talker stopped before these"
    assert len(data["speech"]["words"]) == len(reply.spoken_ids)


def test_all_of_the_answer_that_is_plain_goes_to_the_talker(monkeypatch, tmp_path):
    model = omni()
    script(monkeypatch, model, "Good morning.")
    session, reply = answered(model, max_frames=20)
    kinds = [entry["kind"] for entry in written(tmp_path / "x.html", session, reply).data["answer"]]
    assert kinds == ["said"] * len(reply.spoken_ids) + ["kept"] * (len(reply.text_ids) + 1 - len(reply.spoken_ids))


def test_tokens_that_reached_the_talker_without_their_marks_are_told_apart(monkeypatch, tmp_path):
    model = omni()
    script(monkeypatch, model, "It is **bold** or bold.")
    session, reply = answered(model)
    reply.spoken_ids[:] = spoken(reply.text_ids, model.tokenizer)
    answer = written(tmp_path / "x.html", session, reply).data["answer"]
    runs = [
        (kind, "".join(entry["text"] for entry in run)) for kind, run in groupby(answer, lambda entry: entry["kind"])
    ]
    assert runs == [("said", "It is"), ("changed", " **bold**"), ("said", " or bold."), ("kept", "<|im_end|>")]


def test_every_unit_of_work_has_its_time(model, tmp_path):
    session, reply = answered(model)
    data = written(tmp_path / "reply.html", session, reply).data
    spans, speech = data["spans"], data["speech"]
    assert list(spans) == ["aut", "prefill", "thinker", "talker", "mtp", "code2wav"]
    assert len(spans["aut"]) == 2, "log-mel, then AuT"
    assert spans["aut"][0][1] < 0, "the clip was whole before an answer was asked for"
    assert len(spans["thinker"]) == len(reply.text_ids) + 1
    assert len(spans["talker"]) == FRAMES + 1
    assert len(spans["mtp"]) == len(spans["code2wav"]) == FRAMES
    ordered = sorted(span for spans in spans.values() for span in spans)
    assert all(stop <= start + 1e-5 for (_, stop), (start, _) in pairwise(ordered)), "one thing at a time"
    for name, each in spans.items():
        assert sum(stop - start for start, stop in each) == pytest.approx(reply.timings[name], abs=2e-5 * len(each))
    assert speech["ready"] == [stop for _, stop in spans["code2wav"]]
    assert speech["ready"][0] <= speech["first_audio"] + 1e-5
    assert speech["rtf"] == pytest.approx(reply.timings["total"] / (0.08 * FRAMES))


def test_hearing_has_a_lane_of_its_own(model, tmp_path):
    """A question that streams in is heard piece by piece, its open window after it has ended, and then read."""
    session, pieces = model.session(window=1), np.split(CLIP[:67200], 7)
    for piece in pieces:
        session.append_audio(piece, 24000)
    other = session.copy()
    reply = collect(session.respond())
    spans = written(tmp_path / "reply.html", session, reply).data["spans"]
    runs = len(pieces) + 2 + 2  # log-mel of every piece and AuT of two windows that close, then both of what is left
    assert len(spans["aut"]) == runs
    assert [stop < 0 for _, stop in spans["aut"]] == [True] * (runs - 2) + [False] * 2
    (read, _), *_ = spans["prefill"]
    assert spans["aut"][-1][1] <= read + 1e-5
    assert sum(stop - start for start, stop in spans["aut"]) == pytest.approx(reply.timings["aut"], abs=1e-3)

    session.append_text("And then?")
    assert "aut" not in collect(session.respond(audio=False)).timings, "what was heard belongs to its own turn"
    forked = collect(other.respond(audio=False))
    assert len([span for span in forked.spans if span.name == "aut"]) == runs


def test_packets_on_time_are_counted_from_the_first(model):
    session, reply = answered(model)
    decoded = [span for span in reply.spans if span.name == "code2wav"]
    others = [span for span in reply.spans if span.name != "code2wav"]
    late = [span._replace(stop=1.0 + 0.08 * i + (0.01 if i in (3, 4) else 0.0)) for i, span in enumerate(decoded)]
    reply.spans[:] = [*others, *late]
    reply.timings["first_audio"] = 1.001
    assert report_data(session, CLIP, 24000, reply)["speech"]["on_time"] == FRAMES - 2


def test_text_cannot_break_out_of_the_page(model, tmp_path):
    session, reply = answered(model)
    page = written(tmp_path / "reply.html", session, reply, title="</script><script>alert(1)</script>")
    assert len(page.scripts) == 2
    assert "<" not in page.scripts[0]
    assert page.data["title"] == "</script><script>alert(1)</script>"
    assert page.tags.count("audio") == 2
    assert len(page.ids) == len(set(page.ids))
    text = (tmp_path / "reply.html").read_text("utf-8")
    assert "http" not in text.replace("http-equiv", ""), "nothing is loaded from elsewhere"
    assert "{{" not in text


def test_an_answer_without_speech_has_no_sections_of_it(model, tmp_path):
    session, reply = answered(model, audio=False)
    silent = written(tmp_path / "reply.html", session, reply)
    mute = omni({"enable_audio_output": False, "talker_config": None, "code2wav_config": None})
    text_only = written(tmp_path / "mute.html", *answered(mute, audio=False, max_text_tokens=3))
    for page in (silent, text_only):
        assert "speech" not in page.data
        assert list(page.data["spans"]) == ["aut", "prefill", "thinker"]
        assert page.data["about"].keys() == {"aut", "thinker"}
        assert page.tags.count("audio") == 1
        assert {"mel", "thinker", "lanes"} <= set(page.ids)
        assert not {"codes", "reply", "reply-sound"} & set(page.ids)
    assert {entry["kind"] for entry in silent.data["answer"]} == {"kept"}


def test_sizes_are_those_of_the_model():
    changes = {"code2wav_config.sliding_window": 7, "thinker_config.text_config.num_experts_per_tok": 3}
    said = sentences(omni(changes).config, window=4)
    assert "window of 4 s" in said["aut"]
    assert "3 of 4 experts" in said["thinker"]
    assert f"other {CODEBOOKS - 1} codes" in said["mtp"]
    assert f"one of {CODEBOOK}" in said["talker"]
    assert f"{CODEBOOKS} codebooks of {CODEBOOK} codes, 12.5 frames a second" in said["codec"]
    assert "looking back 7 frames" in said["code2wav"]


def test_silence_is_dark_and_a_very_short_question_is_drawn():
    model = omni()
    for clip, dark in ((np.zeros(16000, np.float32), True), (sound(0.02), False)):
        session = model.session()
        session.append_audio(clip, 16000)
        reply = collect(session.respond(max_text_tokens=2, max_frames=2))
        data = report_data(session, clip, 16000, reply)
        assert (raw(data["mel"]).max() == 0) == (raw(data["question"]).max() == 0) == dark


def test_a_token_inside_a_character_is_spelled_in_bytes(model):
    tokens = [antiphon.report._token(i, "text", model.tokenizer) for i in range(VOCAB)]
    assert any(re.fullmatch(r"‹[0-9A-F]{2}(-[0-9A-F]{2})*›", token["text"]) for token in tokens)
    assert not any("�" in token["text"] for token in tokens)
    assert all(token["text"] for token in tokens)


def test_the_file_appears_whole_or_not_at_all(model, tmp_path, monkeypatch):
    path = tmp_path / "reply.html"
    session, reply = answered(model)
    write_report(path, session, CLIP, 24000, reply)
    before = path.read_bytes()
    real = Path.write_text

    def half(self, data, *rest):
        real(self, data[:100], *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(InputError, match="No space left"):
        write_report(path, session, CLIP, 24000, reply)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_there_is_no_page_before_an_answer(model, tmp_path):
    _, reply = answered(model)
    with pytest.raises(InputError, match="follows respond"):
        write_report(tmp_path / "x.html", model.session(), CLIP, 24000, reply)
    assert not list(tmp_path.iterdir())


def test_the_template_is_part_of_the_package():
    settings = tomllib.loads((Path(antiphon.report.__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
    assert "report.html" in settings["tool"]["setuptools"]["package-data"]["antiphon"]
