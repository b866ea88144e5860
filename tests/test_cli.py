"""The command line: results on standard output, one sentence on errors, flags that scripts rely on."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import typer

from antiphon import cli
from antiphon.audio import write_audio
from antiphon.evaluate import commands
from antiphon.evaluate.stages import STAGES
from antiphon.files import read_metadata, read_safetensors, write_safetensors
from antiphon.generate import Omni, load
from tests.models import script, stop_speech_after
from tests.shapes import write_shape


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_shape("base", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def question(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "question.wav"
    t = np.arange(24000) / 24000
    write_audio(path, 0.3 * np.sin(2 * np.pi * (200 + 100 * t) * t), 24000)
    return path


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A folder of files that are not what they should be, or unusual."""
    folder = tmp_path_factory.mktemp("bad")
    x = np.sin(np.arange(16000) / 10).astype(np.float32)
    sounds = {
        "silent": (x[:0], 16000),
        "nan": (x * np.nan, 16000),
        "short": (x[:100], 16000),
        "clipped": (np.clip(9 * x, -1, 1), 16000),
        "hot": (3 * x, 16000),
        "8000": (x, 8000),
        "96000": (x, 96000),
        "stereo": (np.stack([x, x / 2], 1), 16000),
    }
    for name, (samples, rate) in sounds.items():
        soundfile.write(folder / f"{name}.wav", samples, rate, subtype="FLOAT")
    (folder / "text.wav").write_text("This is a text. " * 99)
    (folder / "none.wav").write_bytes(b"")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "llama"}')
    return folder


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["antiphon", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_info_needs_only_a_config(monkeypatch, capsys, checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert run(monkeypatch, "info", tmp_path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["voices"] == ["aiden", "chelsie", "ethan"]
    assert facts["rates"]["frames_per_second"] == 12.5
    assert sum(box["parameters"] for box in facts["boxes"].values()) == facts["parameters"]
    assert run(monkeypatch, "info", tmp_path) == 0
    assert f"{facts['parameters']:,}" in capsys.readouterr().out


def test_trace_writes_every_stage(monkeypatch, checkpoint, question, tmp_path):
    limits = ("--max-text-tokens", 5, "--max-frames", 4)
    words = ("--audio", question, "--prompt", "What is it?", "--voice", "ethan", "--out", tmp_path / "t.safetensors")
    assert run(monkeypatch, "trace", checkpoint, *words, *limits) == 0
    stages = read_safetensors(tmp_path / "t.safetensors")
    assert set(stages) == set(STAGES)
    assert stages["codes"].shape == (4, 4)
    assert stages["waveform"].shape == (4 * 1920,)
    assert stages["thinker_logits"].shape == (len(stages["text_ids"]), 768)
    assert stages["talker_logits"].shape[0] == 4
    assert len(stages["thinker_hidden"]) == len(stages["prompt_ids"])


def test_verify_agrees_and_says_where_it_does_not(monkeypatch, capsys, checkpoint, tmp_path):
    golden = tmp_path / "golden.safetensors"
    assert run(monkeypatch, "verify", checkpoint, "--max-frames", 3, "--write-golden", golden) == 0
    assert "identical" in capsys.readouterr().out
    assert run(monkeypatch, "verify", checkpoint, "--max-frames", 3, "--golden", golden, "--json") == 0
    assert json.loads(capsys.readouterr().out)["agrees"] is True
    assert run(monkeypatch, "verify", checkpoint, "--max-frames", 2, "--golden", golden) == 1
    assert "max_frames: 3, and now it is 2" in capsys.readouterr().err
    stages, case = read_safetensors(golden), {name: read_metadata(golden, name) for name in ("case", "dtype")}
    stages["codes"][1, 2] = (stages["codes"][1, 2] + 1) % 64
    write_safetensors(golden, stages, case)
    assert run(monkeypatch, "verify", checkpoint, "--max-frames", 3, "--golden", golden) == 1
    out, err = capsys.readouterr()
    assert "DIFFERS" in out
    assert "of 12" in out  # codes chosen otherwise
    assert "disagreement" in err


def test_talk_and_transcribe(monkeypatch, capsys, checkpoint, question, tmp_path):
    reply = tmp_path / "reply.wav"
    limits = ("--max-text-tokens", 6, "--max-frames", 5)
    page = tmp_path / "reply.html"
    assert run(monkeypatch, "talk", question, "-m", checkpoint, "-o", reply, "--report", page, *limits) == 0
    assert f"question.wav · {checkpoint}" in page.read_text("utf-8")
    assert soundfile.info(reply).frames == 5 * 1920
    assert "RTF" in capsys.readouterr().err
    missing = tmp_path / "nothing.wav"
    limits = ("--max-text-tokens", 4, "--json")
    assert run(monkeypatch, "transcribe", question, missing, question, "-m", checkpoint, *limits) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == [str(question)] * 2  # the good files are written down all the same
    assert "nothing.wav" in err


@pytest.mark.parametrize(
    ("form", "start", "times"),
    [
        ("txt", "{file}\tone\n", 0),
        ("json", '{{"file": "{file}", "text": "one", "seconds": 1.0, ', 0),
        ("srt", "1\n00:00:00,000 --> 00:00:01,000\none\n", 1),
        ("vtt", "WEBVTT\n\nNOTE times are where pieces were cut\n\n00:00:00.000 --> 00:00:01.000\none\n", 1),
    ],
    ids=["txt", "json", "srt", "vtt"],
)
def test_transcripts_in_every_form(monkeypatch, capsys, checkpoint, question, tmp_path, form, start, times):
    """To standard output one after another, or a file of each in a folder; what times mean is said beside them."""
    script(monkeypatch, load(checkpoint), "one")
    other = tmp_path / "other.wav"
    write_audio(other, np.full(800, 0.1, np.float32), 8000)
    assert run(monkeypatch, "transcribe", question, other, "-m", checkpoint, "--format", form) == 0
    out, err = capsys.readouterr()
    assert out.startswith(start.format(file=question))
    assert out.count("one") >= 2
    assert err.count("times are of whole pieces of up to 30 s, not of words") == times
    words = ("transcribe", question, other, "-m", checkpoint, "--format", form, "--out")
    assert run(monkeypatch, *words, tmp_path) == 0
    files = [tmp_path / f"question.{form}", tmp_path / f"other.{form}"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert files[0].read_text("utf-8").startswith("one\n" if form == "txt" else start.format(file=question))
    assert run(monkeypatch, *words, tmp_path / "none") == 1
    assert "none is no folder; make it first" in " ".join(capsys.readouterr().err.split())


def test_there_are_four_forms_of_transcripts(monkeypatch, capsys, question):
    assert run(monkeypatch, "transcribe", question, "--format", "doc") == 1
    assert "there is no format 'doc'; there are txt, json, srt, vtt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "frames", "said"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', 3, "nothing in the answer is said aloud"),
        ("Good morning.", 0, "the Talker ended at once"),
    ],
)
def test_no_sound_is_no_success(monkeypatch, capsys, checkpoint, question, tmp_path, answer, frames, said):
    model = load(checkpoint)
    script(monkeypatch, model, answer)
    stop_speech_after(monkeypatch, model, frames)
    reply, page = tmp_path / "reply.wav", tmp_path / "reply.html"
    assert run(monkeypatch, "talk", question, "-m", checkpoint, "--no-heard", "-o", reply, "--report", page) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert f"error: there is no sound, and nothing was written to {reply}: {said}" in err
    assert not reply.exists()
    assert page.exists()
    assert run(monkeypatch, "talk", question, "-m", checkpoint, "--no-heard") == 0
    assert run(monkeypatch, "speak", answer, "-m", checkpoint, "-o", "-") == 1
    out, err = capsys.readouterr()
    assert not out
    assert f"nothing was written to standard output: {said}" in " ".join(err.split())


def test_the_voice_is_named(monkeypatch, capsys, checkpoint, question, tmp_path):
    monkeypatch.setattr(Omni, "clone", lambda self, samples, rate: torch.ones(32))
    limits = ("-m", checkpoint, "--max-text-tokens", 3, "--max-frames", 2, "--no-heard")
    for words, name in (((), "aiden"), (("--voice", "ethan"), "ethan"), (("--clone", question), "cloned from")):
        assert run(monkeypatch, "talk", question, *limits, *words) == 0
        assert f"0.16 s of speech · voice {name}" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "speak", "one", *limits[:2], "--max-frames", 2, "-o", tmp_path / "x.wav") == 0
    assert "0.16 s of speech · voice aiden" in capsys.readouterr().err


class Microphone:
    """The library that reaches one, which hears a second of a tone in two pieces."""

    class PortAudioError(Exception):
        pass

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def InputStream(self, rate, channels, dtype, callback):
        if self.pieces < 0:
            raise self.PortAudioError("no device")
        for _ in range(self.pieces):
            callback(np.sin(np.arange(rate // 2) / 5, dtype=np.float32)[:, None], rate // 2, None, None)
        return contextlib.nullcontext()


@pytest.mark.parametrize("typed", ["\n", ""])
def test_the_microphone_is_heard_until_enter_or_the_end_of_input(monkeypatch, capsys, checkpoint, typed):
    """What it asks for is not in the way of the sound on standard output."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(2))
    limits = ("--no-heard", "--max-text-tokens", 3, "--max-frames", 2)
    assert run(monkeypatch, "talk", "-m", checkpoint, "-o", "-", *limits) == 0
    assert "listening; press Enter when the question is over" in capsys.readouterr().err
    assert raw.getvalue()[:4] == b"RIFF"
    assert len(raw.getvalue()) == 44 + 2 * 1920 * 2


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Microphone(0), "nothing was recorded; give a sound file"),
        (Microphone(-1), "there is no microphone here (no device); give a sound file"),
        (None, "recording needs pip install 'antiphon[mic]'; or give a sound file"),
    ],
)
def test_a_microphone_that_hears_nothing(monkeypatch, capsys, checkpoint, library, said):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setitem(sys.modules, "sounddevice", library)
    assert run(monkeypatch, "talk", "-m", checkpoint) == 1
    out, err = capsys.readouterr()
    assert said in " ".join(err.split())
    assert not out


def test_speech_streams_to_standard_output(monkeypatch, checkpoint):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    assert run(monkeypatch, "speak", "hello there", "-m", checkpoint, "-o", "-", "--max-frames", 3) == 0
    data = raw.getvalue()
    assert data[:4] == b"RIFF"
    assert len(data) == 44 + 3 * 1920 * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("talk", "{question}", "-m", "{checkpoint}", "--voice", "nobody"), "aiden, chelsie, ethan"),
        (("talk", "missing.wav", "-m", "{checkpoint}"), "missing.wav"),
        (("talk", "{question}", "-m", "no/such/folder"), "no/such/folder"),
        (("talk", "{question}", "-m", "{checkpoint}", "--window", "3"), "1, 2, 4, 8"),
        (("speak", " ", "-m", "{checkpoint}"), "nothing to say"),
        (("info", "{question}"), "question.wav"),
        (("info", "{folder}"), "config.json does not exist"),
        (("info", "{folder}/other"), "model_type is 'llama'"),
        (("talk", "{folder}", "-m", "{checkpoint}"), "Is a directory"),
        (("talk", "{folder}/text.wav", "-m", "{checkpoint}"), "text.wav is not readable sound"),
        (("talk", "{folder}/none.wav", "-m", "{checkpoint}"), "none.wav is not readable sound"),
        (("talk", "{folder}/silent.wav", "-m", "{checkpoint}"), "silent.wav is empty"),
        (("talk", "{folder}/nan.wav", "-m", "{checkpoint}"), "NaN or infinite"),
        (("talk", "{folder}/short.wav", "-m", "{checkpoint}"), "longer than 12.5 ms"),
        (("talk", "{question}", "-m", "{folder}"), "config.json does not exist"),
        (("talk", "{question}", "-m", "{checkpoint}", "--device", "tpu9"), "device tpu9"),
        (("transcribe", "{question}", "-m", "{checkpoint}", "--language", "xx"), "no language 'xx'; there are ar, de"),
        (("trace", "{checkpoint}", "--audio", "{folder}/nan.wav", "--prompt", "?", "--out", "{folder}/t"), "NaN"),
        (("verify", "{checkpoint}", "--audio", "{folder}/short.wav"), "longer than 12.5 ms"),
        (("verify", "{checkpoint}", "--voice", "nobody"), "aiden, chelsie, ethan"),
        (("verify", "{checkpoint}", "--device", "tpu9"), "there is no device tpu9"),
        (("verify", "{checkpoint}", "--golden", "{folder}/golden"), "write a golden file with --write-golden"),
        (("verify", "{folder}/other"), "model_type is 'llama'"),
    ],
)
def test_an_error_is_one_sentence(monkeypatch, capsys, checkpoint, question, bad, words, said):
    filled = [word.format(checkpoint=checkpoint, question=question, folder=bad) for word in words]
    assert run(monkeypatch, *filled) == 1
    out, err = capsys.readouterr()
    assert said in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not out


@pytest.mark.parametrize(
    ("name", "said"), [("no/such/folder/x", "there is no folder"), ("", "is a folder; give the name of a file in it")]
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
    monkeypatch, capsys, checkpoint, question, bad, name, said
):
    monkeypatch.setattr(cli, "load_model", None)
    monkeypatch.setattr(commands, "load_model", None)
    monkeypatch.setattr(commands, "verify", None)
    for words in (
        ("talk", question, "-m", checkpoint, "-o"),
        ("talk", question, "-m", checkpoint, "--report"),
        ("speak", "hello", "-m", checkpoint, "-o"),
        ("trace", checkpoint, "--audio", question, "--prompt", "?", "--out"),
        ("verify", checkpoint, "--write-golden"),
    ):
        assert run(monkeypatch, *words, bad / name) == 1
        assert said in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("name", ["clipped", "hot", "8000", "96000", "stereo"])
def test_sound_of_other_kinds_is_heard(monkeypatch, capsys, checkpoint, bad, name):
    assert (
        run(monkeypatch, "talk", bad / f"{name}.wav", "-m", checkpoint, "--max-text-tokens", 3, "--max-frames", 2) == 0
    )
    err = capsys.readouterr().err
    assert "3 text tokens · 0.16 s of speech" in err
    assert "its sound was not kept: -o reply.wav writes it" in err


def test_nothing_on_standard_input_is_nothing_to_say(monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(monkeypatch, "speak", "-", "-m", checkpoint, "-o", "-") == 1
    assert "nothing to say on standard input" in capsys.readouterr().err


def test_flags_stay():
    """Scripts rely on them: a flag may be added here, and none may go."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    flags = {name: [o for p in command.params for o in p.opts] for name, command in commands.items()}
    limits, place = ["--max-text-tokens", "--max-frames"], ["--device", "--dtype"]
    frozen = {
        "info": ["model", "--json"],
        "trace": [
            *("model", "--audio", "--prompt", "--out", "--voice", *limits),
            *("--system", "--repetition-penalty", "--window", *place),
        ],
        "verify": ["model", "--audio", "--prompt", "--voice", *limits, "--golden", "--write-golden", *place, "--json"],
        "talk": [
            *("audio", "--model", "-m", "--output", "-o", "--voice", "--clone", "--prompt", "--system"),
            *("--heard", "--report", *limits, "--seed", "--window", *place),
        ],
        "transcribe": [
            *("audio", "--model", "-m", "--language", "--format", "--out", "--max-text-tokens", "--window"),
            *("--json", *place),
        ],
        "ask": ["audio", "question", "--model", "-m", "--system", "--max-text-tokens", "--window", *place],
        "speak": [
            *("text", "--model", "-m", "--output", "-o", "--voice", "--clone", "--language", "--max-frames"),
            *("--seed", *place),
        ],
    }
    assert {name: flags[name] for name in frozen} == frozen
