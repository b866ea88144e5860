"""Pairs of what a Talker says, and the Talker that learns from them which is better."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet

from antiphon.aut import TextDecoder, TextDecoderConfig
from antiphon.errors import ConfigError, InputError
from antiphon.files import write_safetensors
from antiphon.speaker import SpeakerConfig, SpeakerEncoder
from antiphon.train.data import load_samples, read_cuts
from antiphon.train.listener import Listener
from antiphon.train.loop import BEST, train
from antiphon.train.pairs import pairs
from antiphon.train.stages.common import Setting
from antiphon.train.stages.preference import PreferenceStage
from antiphon.train.stages.speech import SpeechStage
from tests.models import VOCAB
from tests.test_train_codec import RATE
from tests.test_train_speech import MODEL, SAYINGS, SPEAKER, cut, place, setting

__all__ = ["place"]
DECODER = {"layers": 1, "heads": 2, "ffn_dim": 16}
SPOKEN = {"thinker": "thinker", "aut": "thinker", "codec": "codec", "talker": "spoken", "mtp": "spoken"}
INIT = SPOKEN | {"speaker": "spoken"}
PAIRS = [{"cuts": "pairs.jsonl.gz", "task": "prefer"}]


@pytest.fixture(scope="module")
def spoken(place) -> tuple[Path, Path]:
    """The folders, with a run of the speech stage, a text decoder, and two pairs."""
    cuts, runs = place
    torch.manual_seed(8)
    speech, audio = MODEL.speaking(), MODEL.config.audio
    boxes = {"talker": speech.talker, "mtp": speech.mtp, "code2wav": speech.code2wav}
    boxes["speaker"] = SpeakerEncoder(SpeakerConfig(speech.talker.config.text.hidden_size, **SPEAKER))
    boxes["decoder"] = TextDecoder(TextDecoderConfig(vocab_size=VOCAB, **DECODER), audio.d_model)
    (runs / "spoken").mkdir()
    weights = {f"{name}.{n}": t for name, box in boxes.items() for n, t in box.state_dict().items()}
    write_safetensors(runs / "spoken" / BEST, weights, {"run": "s"})
    made = [
        cut(cuts, f"pair{i}", [0.8 + i / 5, 0.5, 0.7], [SAYINGS[i], SAYINGS[i], "a voice"], None, "chelsie")
        for i in range(2)
    ]
    CutSet.from_cuts(made).to_jsonl(cuts / "pairs.jsonl.gz")
    return cuts, runs


def preferring(spoken: tuple[Path, Path], **options: Any) -> Setting:
    return setting(spoken, "preferred", INIT, PAIRS, speaker=SPEAKER, **options)


def likelihood(stage: SpeechStage, answer: Any) -> float:
    """Of codebook 0 and the end of one answer, as the speech stage scores it."""
    loss = SpeechStage.loss(stage, "speech", stage.lay_out([answer], 0), 0)
    return -float(loss.parts["code0"]) * (len(answer.codes) + 1)


def test_the_loss_is_that_of_the_difference_that_training_made(spoken):
    stage = PreferenceStage(preferring(spoken, beta=0.3, likelihood=0.5, mtp_share=1.0))
    stage.modules.eval()
    examples = stage.mix.examples
    batch, answers = stage.collate(examples, 3), stage.answers(examples, 3)
    assert [a.text for a in answers[::2]] == [a.text for a in answers[1::2]]
    assert all(torch.equal(a.reference, b.reference) for a, b in zip(answers[::2], answers[1::2], strict=True))
    with torch.no_grad():
        begun = stage.loss("speech", batch, 0)
        assert begun.parts["preference"] == pytest.approx(math.log(2), rel=1e-6)
        then = [likelihood(stage, a) for a in answers]
        for p in (*stage.modules["talker"].parameters(), *stage.modules["mtp"].parameters()):
            p.add_(0.05 * p.std(unbiased=False) * torch.randn_like(p))
        now = [likelihood(stage, a) for a in answers]
        loss = stage.loss("speech", batch, 0)
        plain = SpeechStage.loss(stage, "speech", stage.lay_out(answers[::2], 3), 0)
    gained = [b - a for a, b in zip(then, now, strict=True)]
    margins = [better - worse for better, worse in zip(gained[::2], gained[1::2], strict=True)]
    assert max(map(abs, margins)) > 0.05
    assert float(loss.figures["margin"]) == pytest.approx(np.mean(margins), abs=2e-3)
    wanted = np.mean([math.log1p(math.exp(-0.3 * m)) for m in margins])
    assert float(loss.parts["preference"]) == pytest.approx(wanted, rel=1e-3)
    for name in ("code0", "residual"):
        assert float(loss.parts[name]) == pytest.approx(0.5 * float(plain.parts[name]), rel=1e-4)
    frames = sum(len(a.codes) for a in answers[::2])
    assert stage.counts(batch) == {"preference": 2.0, "code0": frames + 2.0, "residual": float(frames)}


def test_what_is_better_becomes_likelier_and_a_stop_does_not_forget_how_it_was(spoken, tmp_path):
    s = preferring(spoken, beta=0.5)
    plan = replace(s.recipe.optimization, steps=12, lr=3e-3, save_every=4, log_every=1, validate_every=6)
    s = replace(s, recipe=replace(s.recipe, optimization=plan))
    stage = PreferenceStage(s)
    batch, before = stage.collate(stage.mix.examples, 0), dict(stage.modules["speaker"].named_parameters())
    train(stage, s.recipe, tmp_path, quiet=True)
    after = stage.loss("speech", batch, 0)
    assert after.figures["told"] == 1
    assert after.figures["preference"] < 0.6
    assert all(p is before[n] and not p.requires_grad for n, p in stage.modules["speaker"].named_parameters())
    again = PreferenceStage(s)
    train(again, s.recipe, tmp_path, quiet=True)  # is at its end
    assert again.loss("speech", batch, 0).total.item() == after.total.item()


@pytest.mark.parametrize(
    ("change", "sources", "message"),
    [
        ({"talker": None}, PAIRS, r"^preferred: init names no talker; preferences are of what was trained$"),
        ({}, [{"cuts": "say.jsonl.gz", "task": "say"}], r"^preferred: the task 'say' has no pairs; expected 'prefer'$"),
        ({}, [{"cuts": "say.jsonl.gz", "task": "prefer"}], r"^cut say0 is no pair; expected three supervisions"),
    ],
)
def test_what_is_no_preference_is_named(spoken, change, sources, message):
    init = {name: run for name, run in (INIT | change).items() if run}
    with pytest.raises((ConfigError, InputError), match=message):
        PreferenceStage(setting(spoken, "preferred", init, sources, speaker=SPEAKER))


def test_pairs_are_the_best_and_the_worst_of_what_was_said(spoken, monkeypatch):
    """A judge that hears another word wrong in every rendition."""
    heard, waves = iter(range(10**6)), list[torch.Tensor]()

    def read(self: Listener, wave: torch.Tensor, tokenizer: Any) -> str:
        waves.append(wave)
        really(self, wave, tokenizer)
        return ("one two three", "one two four", "one five four", "six five four")[(next(heard) + 2) % 4]

    really = Listener.read
    monkeypatch.setattr(Listener, "read", read)
    init = {name: "spoken" for name in ("talker", "mtp", "code2wav", "speaker", "decoder")}
    init |= {"thinker": "thinker", "aut": "thinker"}
    options: dict[str, Any] = {"out": "made.jsonl.gz", "speaker": SPEAKER, "decoder": DECODER, "apart": 0.4}
    told = setting(spoken, "pairs", init, [{"cuts": "say.jsonl.gz"}], **options)
    made, found = pairs(told, quiet=True)
    assert (made, found) == (1, len(SAYINGS)), "the judge hears `one two three` alone"
    (pair,) = [c for c in read_cuts(spoken[0] / "made.jsonl.gz") if c.supervisions[0].text == "one two three"]
    better, worse, voice = pair.supervisions
    assert (better.custom["error"], worse.custom["error"]) == (0.0, 1.0)
    samples = load_samples(pair, RATE)
    for part, wave in ((better, waves[2]), (worse, waves[1])):
        start = round(part.start * RATE)
        np.testing.assert_allclose(samples[start : start + len(wave)], wave.numpy(), atol=1e-4)
    assert voice.end == pytest.approx(pair.duration)
    made_of = [{"cuts": "made.jsonl.gz", "task": "prefer"}]
    stage = PreferenceStage(setting(spoken, "preferred", INIT, made_of, speaker=SPEAKER))
    assert stage.loss("speech", stage.batch(0), 0).total.isfinite()
    before, count = json.loads((spoken[0] / "made/say0.json").read_text()), len(waves)
    assert pairs(told, quiet=True) == (made, found)
    assert len(waves) == count, "what was judged is not said again"
    assert before["id"] == "say0-pair"
