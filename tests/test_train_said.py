"""Code2Wav on what the Talker says: drawn codes lie beside the sound that they stand for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from antiphon.errors import ConfigError
from antiphon.train.codes import key_of
from antiphon.train.data import load_samples
from antiphon.train.loop import train
from antiphon.train.stages.common import Setting
from antiphon.train.stages.said import SaidStage
from tests.test_train_codec import FRAME, RATE
from tests.test_train_preference import INIT, spoken
from tests.test_train_speech import SPEAKER, place, setting

__all__ = ["place", "spoken"]
SAY = {"cuts": "say.jsonl.gz", "task": "say"}
FRAMES = 9  # of a crop: of the clips one is as long, others are shorter and longer


def saying(folders: tuple[Path, Path], **options: Any) -> Setting:
    sizes = {"frames": FRAMES, "spectra": [256], "speech": {"speaker": SPEAKER}}
    return setting(folders, "said", INIT | {"code2wav": "spoken"}, [SAY], **sizes, **options)


def test_codes_of_a_crop_lie_beside_its_sound(spoken):
    """Those of a recording, where nothing is drawn: frame by frame, and silence where the clip is over."""
    stage = SaidStage(saying(spoken, share=0.0))
    places = set()
    for number in range(12):
        crops = stage.batch(number)
        assert crops.codes is not None
        assert crops.wave.shape == (len(crops.codes), FRAMES * FRAME)
        for example, wave, codes in zip(stage.clips(number), crops.wave, crops.codes, strict=True):
            whole = torch.zeros(20 * FRAME)
            clip = torch.from_numpy(load_samples(example.cut, RATE))
            whole[: len(clip)] = clip
            (at,) = [n for n in range(12) if torch.equal(whole[n * FRAME :][: len(wave)], wave)]
            recorded = stage.speech.codes[key_of((example, 0))]
            assert at == 0 or at + FRAMES <= len(recorded)
            assert torch.equal(codes[: len(recorded) - at], recorded[at : at + FRAMES])
            if len(recorded) < FRAMES:
                with torch.no_grad():
                    assert torch.equal(codes, stage.codec.encode(wave[None])[0])
            places.add(at)
    assert len(places) > 1


def test_what_is_said_is_drawn_frame_by_frame_after_what_was_recorded(spoken):
    """Near a temperature of nothing every code is the likeliest, residual ones after those drawn before them."""
    stage = SaidStage(saying(spoken, share=1.0)).speech
    batch = stage.collate(stage.mix.examples, 5)
    drawn = stage.said(batch, 1e-4)
    assert [len(row) for row in drawn] == batch.counts.tolist()
    with torch.no_grad():
        states, wanted, _ = stage.scores(batch)
        states, codes, speech = states[wanted[:, 0] >= 0], torch.cat(drawn), stage.boxes.speaking()
        first = speech.talker.codec_head(states)[:, : speech.mtp.config.vocab_size]
        rest = speech.mtp.logits(states, speech.talker.model.codec_embedding(codes[:, 0]), codes[:, 1:])
    assert torch.equal(codes[:, 0], first.argmax(-1))
    assert torch.equal(codes[:, 1:], rest.argmax(-1))
    warm = [torch.cat(stage.said(replace(batch, seed=seed))) for seed in (5, 5, 6)]
    assert torch.equal(warm[0], warm[1])
    assert not torch.equal(warm[1], warm[2])
    assert (warm[0] != torch.cat([stage.codes[key_of((e, 0))] for e in stage.mix.examples])).any()


def test_code2wav_alone_learns_and_comes_nearer(spoken, tmp_path):
    here = saying(spoken)
    plan = replace(here.recipe.optimization, steps=30, lr=4e-3, validate_every=30)
    stage = SaidStage(replace(here, recipe=replace(here.recipe, optimization=plan)))
    speaks = {n: t.clone() for n, t in stage.speech.modules.state_dict().items()}
    kept = {n: t.clone() for n, t in stage.modules.state_dict().items()}
    before = stage.validate()["mel"]
    train(stage, stage.setting.recipe, tmp_path, quiet=True)
    assert stage.validate()["mel"] < 0.9 * before
    assert all(torch.equal(t, speaks[n]) for n, t in stage.speech.modules.state_dict().items())
    moved = {n.split(".")[0] for n, t in stage.modules.state_dict().items() if not torch.equal(t, kept[n])}
    assert moved == {"code2wav"}


def test_conversations_are_refused(spoken):
    with pytest.raises(ConfigError, match="takes sentences alone; give its sources the task say"):
        SaidStage(setting(spoken, "said", INIT, [{"cuts": "talk.jsonl.gz", "task": "talk"}]))
