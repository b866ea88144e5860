"""Recordings as the codec gives them back: new sound, the same words, and trained on like any others."""

import numpy as np
import pytest
import torch

from antiphon.audio import read_audio
from antiphon.code2wav import Code2Wav
from antiphon.codec import Codec
from antiphon.errors import ConfigError
from antiphon.files import read_safetensors, write_safetensors
from antiphon.train.data import load_samples, read_cuts
from antiphon.train.echo import echo
from antiphon.train.loop import BEST
from antiphon.train.stages.codec import read_codec_config
from antiphon.train.stages.thinker import ThinkerStage
from tests.models import omni
from tests.test_train_speech import SAYINGS, place, setting

__all__ = ["place"]
SAID = [{"cuts": "say.jsonl.gz"}]
BOTH = {"codec": "codec", "code2wav": "code2wav"}


@pytest.fixture
def decoded(place):
    """The folders, with a Code2Wav."""
    speech = omni(seed=41).speaking()
    (place[1] / "code2wav").mkdir(exist_ok=True)
    weights = {f"code2wav.{n}": t for n, t in speech.code2wav.state_dict().items()}
    write_safetensors(place[1] / "code2wav" / BEST, weights, {"run": "c"})
    return place


def test_the_sound_is_that_of_codec_and_code2wav_and_the_words_stay(decoded):
    told = setting(decoded, "echo", BOTH, SAID, out="coded.jsonl.gz")
    assert echo(told, quiet=True) == len(SAYINGS)
    cuts, before = read_cuts(decoded[0] / "coded.jsonl.gz"), read_cuts(decoded[0] / "say.jsonl.gz")
    assert told.config.code2wav is not None
    codec, code2wav = Codec(read_codec_config(told)), Code2Wav(told.config.code2wav)
    codec.load_state_dict({n[6:]: t for n, t in read_safetensors(decoded[1] / "codec" / BEST).items()})
    code2wav.load_state_dict({n[9:]: t for n, t in read_safetensors(decoded[1] / "code2wav" / BEST).items()})
    rate, size = codec.config.sampling_rate, codec.config.frame_samples
    for cut, old in zip(cuts, before, strict=True):
        assert [s.text for s in cut.supervisions] == [s.text for s in old.supervisions]
        samples = load_samples(cut, rate)
        assert len(samples) == round(old.duration * rate)
        wave = torch.from_numpy(load_samples(old, rate))[None]
        with torch.inference_mode():
            wanted = code2wav.eval()(codec.eval().encode(torch.nn.functional.pad(wave, (0, -wave.shape[1] % size))))
        np.testing.assert_allclose(samples, wanted[0, : len(samples)].numpy(), atol=2e-4)  # of 16 bits
        assert np.abs(samples - load_samples(old, rate)).max() > 1e-3


def test_what_is_there_is_not_made_again(decoded):
    told = setting(decoded, "echo", BOTH, SAID, out="again.jsonl.gz")
    echo(told, quiet=True)
    files = sorted((decoded[0] / "again").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    echo(told, quiet=True)
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    assert len(read_audio(files[0])[0])


def test_it_is_trained_on_like_any_other(decoded):
    echo(setting(decoded, "echo", BOTH, SAID, out="coded.jsonl.gz"), quiet=True)
    stage = ThinkerStage(setting(decoded, "thinker", {}, [{"cuts": "coded.jsonl.gz"}]))
    assert stage.batch(0).mel is not None


@pytest.mark.parametrize("missing", ["codec", "code2wav"])
def test_both_ways_are_needed(decoded, missing):
    init = {name: run for name, run in BOTH.items() if name != missing}
    with pytest.raises(ConfigError, match="init names no codec and code2wav"):
        echo(setting(decoded, "echo", init, SAID, out="coded.jsonl.gz"), quiet=True)
