"""antiphon label without Ray: recordings in, cuts out; what is broken is told, and nothing is done twice."""

import base64
import gzip
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, RecordingSet

import antiphon.scale.segments
from antiphon.audio import read_audio, write_audio
from antiphon.errors import ConfigError, InputError
from antiphon.generate import Omni, collect, load
from antiphon.scale import label as jobs
from antiphon.scale.filters import Rules, agreement, language_of, verdict
from antiphon.scale.gather import CUTS, QUARANTINE, Figures, gather
from antiphon.scale.label import Job, Spread, identity, label
from antiphon.scale.report import write_report
from antiphon.scale.segments import (
    CRASHES,
    PAUSE,
    STEP,
    Segment,
    blocks_of,
    read_segments,
    read_shard,
    speech_probabilities,
    speech_spans,
    stretches,
)
from antiphon.scale.sources import Item, find_items, read_item
from antiphon.scale.teachers import Heard, TeacherAt, find_teacher, hear_each, language_named
from antiphon.serve.vad import RATE
from antiphon.train.data import Mix, load_samples, read_cuts, resample
from antiphon.train.espeak import PRESETS, say
from antiphon.train.espeak import RATE as SAID_RATE
from antiphon.train.recipe import Data, Source
from antiphon.train.talks import WHICH_LANGUAGE
from antiphon.transcripts import transcribe
from tests.models import sound
from tests.test_train_label import DECODER, place, taught

__all__ = ["place", "taught"]
pyarrow = pytest.importorskip("pyarrow")
LINES = ["The fish is old", "We buy water and bread", "It is ten in the morning", "Peter lives in Egypt"]


@pytest.fixture(scope="module")
def spoken() -> list[np.ndarray]:
    """`LINES` at `RATE`, as a file of 16 bits holds them."""
    waves = [resample(say(line, "en-us", PRESETS["ethan"]), SAID_RATE, RATE) for line in LINES]
    return [np.round(wave * 32767).astype(np.float32) / 32768 for wave in waves]


@pytest.fixture
def sources(tmp_path, spoken) -> list[str]:
    """The four lines in a folder, a tar, Parquet and a manifest, each beside something broken."""
    folder = tmp_path / "in" / "folder"
    folder.mkdir(parents=True)
    write_audio(folder / "a.wav", spoken[0], RATE)
    (folder / "broken.wav").write_bytes(b"RIFF no sound")
    (folder / "empty.flac").write_bytes(b"")
    (folder / "notes.txt").write_text("not a recording")
    write_audio(folder / "silence.wav", np.zeros(RATE, np.float32), RATE)
    with tarfile.open(tmp_path / "in" / "b.tar", "w") as tar:
        for name, data in {"b.wav": encoded(spoken[1]), "torn.wav": b"?"}.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    (tmp_path / "in" / "torn.tar").write_bytes(b"x" * 700)
    write_parquet(tmp_path / "in" / "c.parquet", [encoded(spoken[2]), None, encoded(spoken[0])])  # the last: again
    write_audio(tmp_path / "in" / "whole.wav", np.concatenate([spoken[0], spoken[3]]), RATE)
    recording = Recording.from_file(tmp_path / "in" / "whole.wav", recording_id="whole")
    start = len(spoken[0]) / RATE
    cut = recording.to_cut().truncate(offset=start, preserve_id=True)
    lost = replace(cut, id="lost", recording=replace(recording, id="lost", sources=[source_at(tmp_path / "gone.wav")]))
    CutSet.from_cuts([cut, lost]).to_jsonl(tmp_path / "in" / "d.jsonl.gz")
    return [str(tmp_path / "in" / name) for name in ("folder", "b.tar", "torn.tar", "c.parquet", "d.jsonl.gz")]


def source_at(path: Path):
    from lhotse import AudioSource

    return AudioSource("file", [0], str(path))


def encoded(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    write_audio(file, wave, RATE)
    return file.getvalue()


def write_parquet(path: Path, sounds: list[bytes | None]) -> None:
    import pyarrow.parquet

    rows = [{"audio": {"bytes": data, "path": f"{i}.wav"}} for i, data in enumerate(sounds)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


# ---------------------------------------------------------------------------------------------------- sources


def test_a_recording_is_the_same_in_every_container(sources, spoken):
    found = {Path(item.name).name: item for item in find_items(sources)}
    names = {"folder/a.wav": 0, "b.tar#b.wav": 1, "c.parquet#0.0": 2, "c.parquet#1.0": 0}
    for name, line in names.items():
        samples, rate = read_item(next(i for i in found.values() if i.name.endswith(name)))
        assert rate == RATE
        np.testing.assert_array_equal(samples, read_audio(encoded(spoken[line]))[0])
    cut, _ = read_item(next(i for i in found.values() if i.kind == "cut" and not i.name.endswith("lost")))
    assert len(cut) == len(spoken[3])
    assert len({item.key for item in found.values()}) == len(found) == 12


def test_a_source_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.doc").write_text("?")
    (tmp_path / "none").mkdir()
    for source, told in (("gone", "there is no "), ("a.doc", "no known form"), ("none", "there is no recording")):
        with pytest.raises(InputError, match=told):
            find_items([str(tmp_path / source)])
    with pytest.raises(InputError, match="cannot be reached"):
        find_items(["nowhere://a"])


def test_manifests_of_recordings_are_read_and_what_is_wrong_with_one_is_told(tmp_path, spoken):
    write_audio(tmp_path / "a.wav", spoken[0], RATE)
    recording = Recording.from_file(tmp_path / "a.wav", recording_id="a")
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "recordings.jsonl.gz")
    (item,) = find_items([str(tmp_path / "recordings.jsonl.gz")])
    np.testing.assert_array_equal(read_item(item)[0], spoken[0])
    silent = MonoCut("silent", 0.0, 1.0, 0)
    CutSet.from_cuts([recording.to_cut(), silent]).to_file(tmp_path / "cuts.jsonl")
    _, item = find_items([str(tmp_path / "cuts.jsonl")])
    with pytest.raises(InputError, match=r"^the cut has no recording$"):
        read_item(item)
    whole = (tmp_path / "recordings.jsonl.gz").read_bytes()
    for torn in (whole[:-9], b'{"id": 3}\n', b'{"start": "no"\n'):
        (tmp_path / "torn.jsonl.gz").write_bytes(torn if torn in whole else gzip.compress(torn))
        (item,) = find_items([str(tmp_path / "torn.jsonl.gz")])
        with pytest.raises(
            InputError, match=r"torn.jsonl.gz cannot be read from line [12] on .*; expected lhotse cuts"
        ):
            read_item(item)


def test_a_file_that_changed_is_another_item(tmp_path, spoken):
    write_audio(tmp_path / "a.wav", spoken[0], RATE)
    (before,) = find_items([str(tmp_path)])
    write_audio(tmp_path / "a.wav", spoken[1], RATE)
    (after,) = find_items([str(tmp_path)])
    assert (before.name, before.key == after.key) == (after.name, False)


def test_sources_and_what_is_made_of_them_may_be_in_a_store(tmp_path, sources, service, spoken):
    """All of them in memory, as fsspec has it; and a mix that reads the result from there."""
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "in"), "/in", recursive=True)
    (tmp_path / "in" / "whole.wav").unlink()  # the manifest names it as it was on disk
    cut = read_cuts("memory://in/d.jsonl.gz")[0]
    cut.recording.sources[0].source = "whole.wav"
    store.pipe("/in/d.jsonl", json.dumps(cut.to_dict()).encode())
    far = [f"memory://in/{name}" for name in ("folder", "b.tar", "c.parquet", "d.jsonl")]
    found = {item.name: item for item in find_items(far)}
    np.testing.assert_array_equal(read_item(found["memory:///in/d.jsonl#whole"])[0], spoken[3])
    figures = done(job_at(tmp_path / "out", service), far)
    assert names(figures.quarantine) == [name for name in BROKEN if "torn.tar" not in name and "lost" not in name]
    assert len(figures.kept) == len(LINES)
    store.put(str(tmp_path / "out"), "/out", recursive=True)
    mix = Mix(Data((), batch_seconds=20.0), [Source(f"memory://out/{CUTS}")], tmp_path, seed=0)
    here = {cut.id: cut for cut in read_cuts(tmp_path / "out" / CUTS)}
    for example in mix.examples:
        assert example.cut.recording.sources[0].source.startswith("memory://out/shards/")
        np.testing.assert_array_equal(load_samples(example.cut, RATE), load_samples(here[example.cut.id], RATE))


# ---------------------------------------------------------------------------------------------------- segments


def test_speech_is_cut_out_of_silence(spoken):
    pause = np.zeros(2 * RATE, np.float32)
    wave = np.concatenate([pause, spoken[0], pause, spoken[1], pause])
    (spans,) = speech_spans([wave], 30.0)
    first, second = 2 * RATE, 4 * RATE + len(spoken[0])
    assert len(spans) == 2
    for (start, stop), begun, said in zip(spans, (first, second), spoken[:2], strict=True):
        assert abs(start - begun) < 0.5 * RATE
        assert abs(stop - begun - len(said)) < 0.6 * RATE
    assert speech_spans([pause, 0.001 * sound(1.0)[:RATE].astype(np.float32)], 30.0) == [[], []]


def test_no_segment_is_longer_than_asked_for_and_no_speech_is_lost(spoken):
    wave = np.concatenate(spoken)
    (whole,), (pieces,) = speech_spans([wave], 30.0), speech_spans([wave], 1.5)
    assert max(stop - start for start, stop in pieces) <= 1.5 * RATE
    assert sum(b - a for a, b in pieces) == sum(b - a for a, b in whole)


def test_recordings_are_judged_alike_alone_and_side_by_side(spoken):
    together = speech_probabilities(spoken)
    for wave, speech in zip(spoken, together, strict=True):
        np.testing.assert_allclose(speech_probabilities([wave])[0], speech, atol=1e-4)
    assert max(speech.max() for speech in together) > 0.9


def test_a_pause_ends_a_stretch_and_a_click_makes_none():
    pause, words = [0.0] * round(PAUSE / STEP), [0.9] * 20
    assert stretches(np.array(words + pause + words, np.float32)) == [(0, 20), (20 + len(pause), 40 + len(pause))]
    assert stretches(np.array(words + pause[:-1] + words, np.float32)) == [(0, 39 + len(pause))]
    assert stretches(np.array([0.0] * 9 + [0.9] * 2 + pause, np.float32)) == []


def test_blocks_that_are_finished_do_not_move_the_others():
    rng = np.random.default_rng(5)
    items = [Item(f"{i}", "place", "file", size=int(rng.integers(1, 9 << 20))) for i in range(300)]
    blocks = blocks_of(items, "s")
    assert len(blocks) > 4
    assert [item for block in blocks for item in block.items] == items
    done = {0, 2, len(blocks) - 2}
    left = [item for i, block in enumerate(blocks) if i not in done for item in block.items]
    assert blocks_of(left, "s") == [block for i, block in enumerate(blocks) if i not in done]
    assert {b.name for b in blocks_of(items, "t")}.isdisjoint(b.name for b in blocks)


def test_an_identity_says_what_was_heard_where_and_by_whom(monkeypatch):
    segment, at = Segment(0, 10, 0, "c"), TeacherAt("tiny", "checkpoint", "v")
    others = [("b", segment, at), ("a", replace(segment, start=1), at), ("a", replace(segment, stop=11), at)]
    others += [("a", segment, replace(at, name="large")), ("a", segment, replace(at, version="w"))]
    names = {identity("a", segment, at), *(identity(*other) for other in others)}
    assert identity("a", replace(segment, offset=77), at) in names
    monkeypatch.setattr(jobs, "VERSION", 2)
    assert len(names | {identity("a", segment, at)}) == 7


# ---------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("text", "language", "seconds", "fault"),
    [
        ("The weather is fine today.", "en", 2.0, ""),
        ("", "en", 2.0, "empty"),
        ("… ?!", "en", 2.0, "empty"),
        ("thank you " * 9, "en", 5.0, "repetition"),
        ("so it goes and so it goes on and " * 6 + "then stops", "en", 20.0, "repetition"),
        ("The weather is fine today.", "", 2.0, "language"),
        ("Das Wetter ist heute schön.", "de", 2.0, "language"),
        ("Погода сегодня хорошая", "en", 2.0, "script"),
        ("今天天气很好", "zh", 2.0, ""),
        ("今天天气很好啊我们去公园", "en", 2.0, "script"),
        ("การเดินทางวันนี้ดีมาก", "th", 2.0, ""),
        ("yes", "en", 9.0, "rate"),
        ("The weather is fine today, and nobody knows for how long.", "en", 1.0, "rate"),
        ("今天天气很好我们去公园吧好不好", "zh", 1.0, "rate"),
    ],
)
def test_labels_are_judged_by_their_text(text, language, seconds, fault):
    assert verdict(text, language, seconds, Rules(languages=("en", "zh", "th"))) == fault


def test_teachers_agree_as_far_as_their_words_do():
    assert agreement("The fish, is old", "the fish is old", "en") == 1
    assert agreement("the fish is old", "the dish is old", "en") == 0.75
    assert agreement("今天很好", "今天好", "zh") == 0.75
    assert agreement("one", "", "en") == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [("The weather is fine today", "en"), ("今天天气很好，我们去公园", "zh"), ("Wie ist das Wetter", "de"), (" ", "")],
)
def test_the_language_of_a_text(text, code):
    assert language_of(text) == code


# ---------------------------------------------------------------------------------------------------- teachers


def test_a_checkpoint_writes_in_batches_what_it_writes_alone(spoken):
    at = find_teacher("tiny")
    heard = hear_each(at.open(), spoken, [True] * len(spoken))
    model = load("antiphon/tiny", dtype=torch.float32)
    assert [one.text for one in heard] == [transcribe(model, wave, RATE).text for wave in spoken]
    assert [one.language for one in heard] == [language_named(asked(model, wave)) for wave in spoken]
    assert {one.language for one in heard} & {"en"}
    assert all(one.sure is not None and one.sure < 0 for one in heard)
    assert len({one.text for one in heard}) == len(spoken)


def asked(model: Omni, wave: np.ndarray) -> str:
    """What a session answers to the question which language that is."""
    session = model.session()
    session.append_clip(wave, RATE)
    session.append_text(WHICH_LANGUAGE)
    return collect(session.respond(audio=False, max_text_tokens=12)).text


def test_a_run_writes_what_the_label_stage_writes(taught, tmp_path, spoken):
    course = tmp_path / "course"
    course.mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "course").symlink_to(taught[1])
    recipe = {"stage": "label", "init": {"aut": "teacher", "decoder": "teacher"}, "data": {"mix": []}}
    recipe["options"] = {"decoder": DECODER, "out": "x", "window": 2}
    (course / "label.yaml").write_text(json.dumps(recipe))
    at = find_teacher(str(course / "label.yaml"), runs=str(tmp_path / "runs"))
    heard = at.open().hear(spoken[:2])
    assert [type(one.sure) for one in heard] == [float, float]
    assert at.version not in ("", find_teacher("tiny").version)
    (course / "other.yaml").write_text(json.dumps({**recipe, "init": {}}))
    with pytest.raises(ConfigError, match="no recipe of a label stage"):
        find_teacher(str(course / "other.yaml"))


def test_a_pipeline_of_transformers_is_a_teacher(tmp_path, spoken):
    transformers = pytest.importorskip("transformers")
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefg"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"conv_dim": (8, 8), "conv_stride": (20, 20), "conv_kernel": (20, 20), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": len(vocabulary)}
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes)).save_pretrained(tmp_path)
    at = find_teacher(f"transformers:{tmp_path}")
    heard = at.open().hear(spoken[:2])
    assert at.version
    assert [(type(one.text), one.sure, one.reason) for one in heard] == [(str, None, "")] * 2


def test_an_endpoint_needs_a_model():
    with pytest.raises(InputError, match="names no model"):
        find_teacher("http://localhost:1/v1")


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Service(BaseHTTPRequestHandler):
    """Transcriptions as OpenAI gives them: more words for a longer clip; refuses one length while `sick`."""

    sick: int | None = None  # samples of the clip that is refused
    calls = 0

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        form: Any = message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + data)
        parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
        samples, _ = read_audio(parts["file"].get_payload(decode=True))
        Service.calls += 1
        words = " ".join(WORDS[: 1 + len(samples) * 3 // RATE])
        segment = {"id": 0, "seek": 0, "start": 0, "end": 1, "text": words, "tokens": [1, 2], "temperature": 0}
        segment |= {"avg_logprob": -0.25, "compression_ratio": 1, "no_speech_prob": 0}
        answer = {"text": words, "language": "english", "duration": 1.0, "segments": [segment]}
        refused = len(samples) == Service.sick
        body = json.dumps({"error": {"message": "I am sick of it"}} if refused else answer).encode()
        self.send_response(400 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    """An endpoint's spec."""
    Service.sick, Service.calls = None, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1#ear"
        server.shutdown()


class Once:
    """Hears clips, but not two at a time, and not one that is too short."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def hear(self, clips):
        self.asked.append(len(clips))
        if len(clips) > 1 or len(clips[0]) < 2 * RATE:
            raise RuntimeError("too much\n or too little")
        return [Heard(f"{len(clips[0])} samples")]


def test_a_clip_that_a_teacher_fails_at_is_found_and_the_others_are_heard():
    clips = [np.zeros(n * RATE, np.float32) for n in (3, 1, 2)]
    heard = hear_each(Once(), clips, [True] * 3)
    assert [one.text for one in heard] == ["48000 samples", "", "32000 samples"]
    assert [one.reason for one in heard] == ["", "too much or too little", ""]
    teacher = Once()
    assert hear_each(teacher, clips, [False] * 3) == [Heard()] * 3
    assert not teacher.asked


# ---------------------------------------------------------------------------------------------------- the job


def job_at(out: Path, *specs: str, **changes) -> Job:
    return replace(Job(out, tuple(find_teacher(spec) for spec in specs)), **changes)


def done(job: Job, sources: list[str], rules: Rules = Rules(sure=-9.0)) -> Figures:
    return gather(job, rules, label(sources, job, Spread()))


def written(out: Path) -> dict[str, int]:
    """Every file of blocks, and when it was written."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for name in jobs.FOLDERS for p in (out / name).iterdir()}


def names(rows: list[dict[str, str]]) -> list[str]:
    return sorted(Path(row["name"]).name for row in rows)


BROKEN = ["b.tar#torn.wav", "broken.wav", "c.parquet#0.1", "d.jsonl.gz#lost", "empty.flac", "torn.tar"]


def test_recordings_become_cuts_that_recipes_read(tmp_path, sources, service, spoken):
    out = tmp_path / "out"
    job = job_at(out, service)
    figures = done(job, sources)
    quarantine = [json.loads(line) for line in (out / QUARANTINE).read_text().splitlines()]
    assert names(quarantine) == BROKEN
    assert all(row["reason"] for row in quarantine)
    assert figures.recordings == 12
    assert [one.fault for one in figures.judged if one.fault] == ["duplicate"]
    cuts = read_cuts(out / CUTS)
    assert len(cuts) == len(LINES)
    for cut in cuts:
        (said,) = cut.supervisions
        assert said.custom == {
            "label_source": "pseudo",
            "teacher": service,
            "score": -0.25,
            "source": said.custom["source"],
        }
        assert said.text.startswith("one two")
        assert said.language == "en"
    wanted = {read_item(item)[0].tobytes() for item in find_items(sources) if item.name.endswith(("a.wav", "b.wav"))}
    heard = b"".join(load_samples(cut, RATE).tobytes() for cut in cuts)
    assert all(sound[RATE * 2 : RATE * 3] in heard for sound in wanted)  # a stretch in the middle, to the bit
    mix = Mix(Data((), batch_seconds=20.0), [Source(str(out / CUTS))], out, seed=0)
    assert len(mix.examples) == len(LINES)
    assert mix.draw(0)[0].custom("label_source") == "pseudo"


def test_a_rerun_does_only_what_is_missing(tmp_path, sources, service, spoken):
    out = tmp_path / "out"
    job = job_at(out, service)
    first, calls = done(job, sources), Service.calls
    manifest, files = (out / CUTS).read_bytes(), written(out)
    assert calls == 4, "what sounds the same in a block is heard once"
    done(job, sources)
    assert (Service.calls, written(out)) == (calls, files)
    assert (out / CUTS).read_bytes() == manifest

    next((out / "labels").iterdir()).unlink()  # as if killed before
    assert done(job, sources).judged == first.judged
    assert (Service.calls, set(written(out))) == (2 * calls, set(files))
    assert (out / CUTS).read_bytes() == manifest

    write_audio(tmp_path / "in" / "folder" / "aa.wav", spoken[2], RATE)  # new, though its sound is not
    write_audio(tmp_path / "in" / "folder" / "z.wav", np.concatenate([spoken[1], spoken[0]]), RATE)
    more = done(job, sources)
    assert Service.calls == 2 * calls + 2, "what is new is heard, in one batch with what sounds as something known"
    assert len(more.kept) > len(first.kept)
    assert files.keys() < written(out).keys()


def test_killed_between_the_shard_and_its_table(tmp_path, sources, service):
    """Half of a block is nothing: it is made again, and what was left of the process is cleared."""
    out = tmp_path / "out"
    job = job_at(out, service)
    done(job, sources)
    manifest = (out / CUTS).read_bytes()
    for folder in ("segments", "labels"):
        next((out / folder).iterdir()).unlink()
    (out / "segments" / "x.parquet.12.part").write_bytes(b"half")
    done(job, sources)
    assert (out / CUTS).read_bytes() == manifest
    assert not list(out.rglob("*.part"))


def crash(sources: list[str], job: Job, victim: str) -> int:
    """Exit status of a process that dies when it reads the victim."""

    def read(item: Item):
        if item.name.endswith(victim):
            os._exit(77)
        return read_item(item)

    def run() -> None:
        antiphon.scale.segments.read_item = read
        label(sources, job, Spread())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_a_recording_that_crashes_its_reader_is_left_out_after_a_few_times(tmp_path, sources, service):
    job = job_at(tmp_path / "out", service)
    assert [crash(sources, job, "b.wav") for _ in range(CRASHES)] == [77] * CRASHES
    figures = done(job, sources)
    assert names(figures.quarantine) == sorted([*BROKEN, "b.tar#b.wav"])
    assert any("the process died 3 times" in row["reason"] for row in figures.quarantine)
    assert len(figures.kept) == len(LINES) - 1
    assert not list((tmp_path / "out").rglob("*.reading"))
    assert names(done(replace(job, retry=True), sources).quarantine) == BROKEN


def test_a_second_teacher_hears_what_the_first_one_heard(tmp_path, sources, service):
    out = tmp_path / "out"
    done(job_at(out, service), sources)
    files, calls = written(out), Service.calls
    figures = done(job_at(out, "tiny", service, longest=30.0), sources, Rules(agree=0.0))
    assert Service.calls == calls
    assert files.items() < written(out).items()
    (said,) = read_cuts(out / CUTS)[0].supervisions
    assert (said.custom["teacher"], said.custom["agrees_with"]) == ("tiny", service)
    assert 0 <= said.custom["score"] < 1
    assert {one.fault for one in done(job_at(out, "tiny", service), sources, Rules(agree=1.0)).judged} == {"unsure"}
    assert figures.kept


def test_a_teacher_that_fails_puts_the_segment_in_quarantine_until_it_is_tried_again(tmp_path, sources, service):
    out = tmp_path / "out"
    job = job_at(out, service)
    done(job, sources)
    block = next((out / "segments").iterdir()).stem
    spans = {r.name: r.segments for r in read_segments(out, block) if r.segments}
    name, (segment,) = next((n, s) for n, s in spans.items() if n.endswith("b.wav"))
    assert len(read_shard(out, block)) == sum(s.stop - s.start for (s,) in spans.values())
    other = job_at(tmp_path / "other", service)
    Service.sick = segment.stop - segment.start
    figures = done(other, sources)
    (failed,) = [row for row in figures.quarantine if "teacher" in row]
    assert failed["name"].startswith(name)
    assert "sick of it" in failed["reason"]
    assert len(figures.kept) == len(LINES) - 1
    Service.sick = None
    assert len(done(other, sources).kept) == len(LINES) - 1, "not without being asked to"
    (tmp_path / "in" / "folder" / "broken.wav").write_bytes(b"RIFF still none")
    assert len(done(replace(other, retry=True), sources).kept) == len(LINES)
    assert names(done(other, sources).quarantine) == BROKEN


def test_a_folder_is_one_jobs_at_a_time_and_keeps_its_settings(tmp_path, sources, service):
    out = tmp_path / "out"
    done(job_at(out, service), sources)
    with jobs.alone(out), pytest.raises(InputError, match="another antiphon label is at work"):
        label(sources, job_at(out, service), Spread())
    with pytest.raises(InputError, match=r"of at most 30 s .* of at most 8 s"):
        label(sources, job_at(out, service, longest=8.0), Spread())


def test_the_report_tells_hours_costs_and_lets_one_listen(tmp_path, sources, service):
    job = job_at(tmp_path / "out", service)
    figures = done(job, sources)
    write_report(job, figures)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:audio/flac") == len(LINES) + 1
    assert page.count("<svg") == 3
    for told in ("Hours in and out", "for 20,000,000 hours", "the same sound as another segment"):
        assert told in page
    start = page.index("data:audio/flac;base64,") + len("data:audio/flac;base64,")
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(page[start : page.index('"', start)])))
    assert rate == RATE
    assert np.abs(wave).max() > 0.05
