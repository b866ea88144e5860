"""A voice from a recording: in the speaker slot of the Talker's prompt stands its vector instead of a row."""

import numpy as np
import pytest
import torch

from antiphon.errors import AudioError, InputError
from antiphon.generate import collect, load
from antiphon.speaker import SPEAKER_FILE, SpeakerConfig, SpeakerEncoder, save_speaker
from antiphon.weights import save_checkpoint
from tests.models import omni, sound
from tests.tiny_tokenizer import write_tokenizer

VOCAB = 768


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with a speaker encoder beside it."""
    folder, boxes = tmp_path_factory.mktemp("checkpoint"), omni()
    write_tokenizer(folder, vocab_size=VOCAB)
    save_checkpoint(boxes, folder)
    torch.manual_seed(4)
    width = boxes.speaking().talker.config.text.hidden_size
    save_speaker(SpeakerEncoder(SpeakerConfig(width, 16, 4, 8, 20)), folder / SPEAKER_FILE)
    return load(folder)


def test_the_vector_of_a_preset_speaks_as_the_preset(model):
    speech = model.speaking()
    row = speech.talker.model.codec_embedding.weight[model.speaker("ethan")].clone()
    named = collect(model.speak("one two", voice="ethan", max_frames=6))
    cloned = collect(model.speak("one two", voice=row, max_frames=6))
    other = collect(model.speak("one two", voice=-row, max_frames=6))
    assert torch.equal(named.codes, cloned.codes)
    assert np.array_equal(named.audio, cloned.audio)
    assert not torch.equal(named.codes[: len(other.codes)], other.codes[: len(named.codes)])


def test_a_recording_gives_a_voice_at_any_rate(model):
    x = sound(2.0, 24000)
    voice = model.clone(x, 24000)
    assert voice.shape == (model.speaking().talker.config.text.hidden_size,)
    assert not torch.allclose(voice, model.clone(x[::-1].copy(), 24000), atol=1e-3)
    answer = model.generate([{"role": "user", "content": "hello"}], voice=voice, max_text_tokens=3, max_frames=4)
    assert len(answer.codes) == 4
    assert len(model.clone(x, 48000)) == len(voice)


def test_a_recording_that_is_no_voice(model):
    with pytest.raises(AudioError, match=r"recording is 0.5 s long; give 1 to 30 seconds$"):
        model.clone(sound(0.5, 24000), 24000)
    with pytest.raises(InputError, match=r"a cloned voice has shape \[24\] here, not \[3\]"):
        collect(model.speak("one", voice=torch.zeros(3)))
    with pytest.raises(InputError, match=r"this checkpoint has no speaker.safetensors, .* it has aiden, chelsie, eth"):
        omni().clone(sound(2.0, 24000), 24000)
