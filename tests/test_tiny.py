"""The checkpoint that comes with the package: small, a Qwen3-Omni checkpoint in all else, and of use."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import antiphon
from antiphon.audio import read_audio
from antiphon.cli import app
from antiphon.errors import InputError
from antiphon.evaluate.parity import verify
from antiphon.generate import Omni, collect
from antiphon.transcripts import PROMPTS
from antiphon.weights import TINY

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="tiny does not come with this build yet")
SHIPPED = 48e6  # bytes at most
VOICES = {"ethan", "chelsie", "aiden", "serena"}


@pytest.fixture(scope="module")
def tiny() -> Omni:
    return antiphon.load("tiny", dtype=torch.float32)


def test_it_is_small_and_nothing_is_missing():
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert sum(files.values()) <= SHIPPED, files
    assert {"config.json", "tokenizer.json", "codec.safetensors", "speaker.safetensors"} <= set(files)


def test_transformers_computes_the_same():
    differences, _, _ = verify(TINY, dtype=torch.float32)
    assert differences
    assert [difference for difference in differences if not difference.agrees] == []


def test_a_question_is_answered_aloud(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["talk", str(EXAMPLES / "question.wav"), "-o", "reply.wav"])
    assert result.exit_code == 0, result.output
    samples, rate = read_audio("reply.wav")
    assert rate == 24000
    assert len(samples) > 0
    assert len(samples) % 1920 == 0
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() > 0.01


@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_a_stream_is_heard_as_the_whole_is(tiny, window):
    """In pieces as at once; a whole file's floor is that of its loudest window, which a stream does not know."""
    samples, rate = read_audio(EXAMPLES / "question-zh.wav")

    def heard(pieces: int) -> str:
        session = tiny.session(window=window)
        for piece in np.array_split(samples, pieces):
            session.append_audio(piece, rate)
        session.append_text(PROMPTS["zh"])
        return collect(session.respond(audio=False)).text.strip()

    assert heard(23) == heard(1)
    assert heard(1)


def test_its_voices_are_named(tiny):
    assert set(tiny.voices) == VOICES
    with pytest.raises(InputError, match="chelsie"):
        collect(tiny.speak("hello", voice="nobody", max_frames=2))


def test_a_voice_is_cloned_from_three_seconds(tiny):
    samples, rate = read_audio(EXAMPLES / "reference.wav")
    reply = collect(tiny.speak("Guten Morgen", voice=tiny.clone(samples, rate), max_frames=6))
    assert 0 < len(reply.audio) <= 6 * 1920
    assert np.abs(reply.audio).max() > 0.001
