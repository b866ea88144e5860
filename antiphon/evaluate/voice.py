"""How well a model speaks: what is understood of it, by itself and by judges of others, and whose voice it is.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from antiphon.audio import Samples
from antiphon.codec import Codec
from antiphon.error_rates import error_rates
from antiphon.errors import AudioError, InputError
from antiphon.evaluate.judges import (
    cepstra,
    dnsmos,
    is_nearest_voice,
    nearest_rendering,
    pesq,
    similarity,
    unmeasured,
    voice_print,
)
from antiphon.evaluate.trial import Row, Trial, by_language, mean, percent, sound
from antiphon.generate import Omni, collect
from antiphon.train import espeak
from antiphon.train.corpus import made_from
from antiphon.train.data import Example, resample
from antiphon.train.dialog import DIALOG_LANGUAGES
from antiphon.train.world import LANGUAGES, Sentence, check_split, sentences
from antiphon.weights import load_codec

SENTENCES = "test-sentence"  # the set whose sentences are said, and whose recordings they are found among
REFERENCE = 3.0  # seconds of a voice that is cloned
SEED = 2026  # of the sentences that clones are made of and say
PITCHES = (25, 42, 58, 75)  # of the voices that are cloned
UNHEARD = [espeak.Voice(v, pitch) for pitch in PITCHES for v in espeak.HELD_OUT_VARIANTS][:20]
Sound = tuple[Samples, int]


def codec_of(model: Omni) -> Codec:
    """The codec's encoder beside the checkpoint, in the model's type.

    Raises:
        WeightsError: it has none.
    """
    return load_codec(model.beside or ".").to(model.dtype)


@torch.inference_mode()
def again(model: Omni, codec: Codec, samples: Samples, rate: int) -> Sound:
    """Samples [N] encoded to codes and decoded by Code2Wav, and their rate."""
    wave = torch.from_numpy(resample(samples, rate, codec.config.sampling_rate))[None].to(model.dtype)
    made = model.speaking().code2wav(codec.encode(wave))[0].float().numpy()
    return made[: wave.shape[1]], codec.config.sampling_rate


def said(model: Omni, text: str, voice: Any) -> Sound:
    """`text` in a voice, cut off where it is far longer than text is spoken; silence where nothing is said."""
    reply = collect(model.speak(text, voice=voice, max_frames=40 + 4 * len(text)))
    return (reply.audio if len(reply.audio) else np.zeros(reply.sample_rate, np.float32)), reply.sample_rate


def speaking(trial: Trial) -> Iterator[Row]:
    """New sentences in the preset voices: read back, and found again among recordings of all of them.

    The ceiling of both is the codec alone: the speech engine's rendering in the same voice, encoded and decoded.
    """
    codec, deaf = codec_of(trial.model), unmeasured("librosa")
    read: dict[str, list[tuple[str, str, str | None]]] = {"said": [], "coded": [], "rendered": []}
    found: dict[str, dict[str, list[bool]]] = {"said": {}, "coded": {}}
    quality: list[dict[str, Sound]] = []
    for language in DIALOG_LANGUAGES:
        examples = trial.examples(SENTENCES, (language,))
        recordings = [] if deaf else [cepstra(*sound(e)) for e in examples]
        for i, (text, clips) in enumerate(in_presets(trial, codec, examples, language)):
            for kind, pairs in read.items():
                pairs.append((text, trial.heard(*clips[kind], language), language))
            for kind, right in found.items() if not deaf else ():
                right.setdefault(language, []).append(nearest_rendering(cepstra(*clips[kind]), recordings).index == i)
            if i == 0:
                quality.append(clips)
    rates = {kind: error_rates(pairs) for kind, pairs in read.items()}
    seen = {kind: f"{percent(mean(r))} ({by_language(r)})" for kind, r in rates.items()}
    added = 100 * (mean(rates["coded"]) - mean(rates["rendered"]))
    yield Row("speaking, read back", seen["said"], "<= ceiling + 5 points")
    yield Row("its ceiling, the codec alone", seen["coded"])
    yield Row("error added by the codec", f"{added:.1f} points", "<= 3")
    shares = {kind: {code: float(np.mean(hits)) for code, hits in right.items()} for kind, right in found.items()}
    seen = {kind: f"{percent(mean(own))} ({by_language(own)})" for kind, own in shares.items()}
    yield Row("nearest rendering is the sentence", deaf or seen["said"], ">= 95 %")
    yield Row("nearest rendering, the codec alone", deaf or seen["coded"])
    yield from qualities(quality)


def in_presets(
    trial: Trial, codec: Codec, examples: Sequence[Example], language: str
) -> Iterator[tuple[str, dict[str, Sound]]]:
    """Each test sentence in one of the preset voices: said, rendered by the speech engine, and that coded.

    Raises:
        InputError: the model has none of these voices.
    """
    voices = [name for name in espeak.PRESETS if name in trial.model.voices]
    if not voices:
        raise InputError(f"speaking is judged in the voices {', '.join(espeak.PRESETS)}; this checkpoint has none")
    s = made_from(trial.cuts / SENTENCES)
    readings = {one.text: one.spoken for one in sentences(language, check_split(s.split), s.count, s.seed)}
    for i, e in enumerate(trial.track(examples, f"speaking {language}")):
        name = voices[i % len(voices)]
        samples = espeak.say(readings[e.text], LANGUAGES[language].espeak, espeak.PRESETS[name])
        coded = again(trial.model, codec, samples, espeak.RATE)
        yield e.text, {"said": said(trial.model, e.text, name), "rendered": (samples, espeak.RATE), "coded": coded}


def qualities(clips: list[dict[str, Sound]]) -> Iterator[Row]:
    """DNSMOS of clips as rendered, coded and said, and PESQ of the coded ones."""
    why = unmeasured("librosa", "onnxruntime", "speechmos")
    kinds = ("rendered", "coded", "said")
    scores = {} if why else {kind: np.mean([dnsmos(*clip[kind]).overall for clip in clips]) for kind in kinds}
    yield Row("DNSMOS", why or ", ".join(f"{kind} {score:.2f}" for kind, score in scores.items()))
    if why := unmeasured("pesq"):
        yield Row("PESQ of the codec", why)
        return
    values = []
    for clip in clips:
        (original, rate), (coded, other) = clip["rendered"], clip["coded"]
        try:
            values.append(pesq(resample(original, rate, other), coded, other))
        except AudioError:  # it hears no speech in one of them
            continue
    yield Row("PESQ of the codec", f"{np.mean(values):.2f} over {len(values)} clips" if values else "no speech heard")


def cloning(trial: Trial) -> Iterator[Row]:
    """Voices that were never heard, taken from three seconds of one language and speaking another."""
    nearer, alike = f"cloned voice nearest its target, of {len(UNHEARD)} voices", "similarity to the target"
    if why := unmeasured("librosa", "webrtcvad", "resemblyzer"):
        yield Row(nearer, why, ">= 80 %")
        yield Row(alike, why, "within 0.1 of the ceiling")
        return
    references = [rendered(voice, DIALOG_LANGUAGES[i % 10], i, REFERENCE) for i, voice in enumerate(UNHEARD)]
    prints = [voice_print(*reference) for reference in references]
    codec = codec_of(trial.model)
    near, coded, ceiling, floor, strict, loose = [], [], [], [], [], []
    for i, voice in enumerate(trial.track(UNHEARD, "cloning")):
        language = DIALOG_LANGUAGES[(i + 1 + i // 10) % 10]
        text = sentence_of(language, i).text
        made = voice_print(*said(trial.model, text, trial.model.clone(*references[i])))
        others = prints[:i] + prints[i + 1 :]
        near.append(similarity(made, prints[i]))
        own = rendered(voice, language, i)
        coded.append(similarity(voice_print(*again(trial.model, codec, *own)), prints[i]))
        ceiling.append(similarity(voice_print(*own), prints[i]))
        floor.append(float(np.mean([similarity(p, prints[i]) for p in others])))
        strict.append(is_nearest_voice(made, prints[i], others))
        variants = [p for p, other in zip(prints, UNHEARD, strict=True) if other.variant != voice.variant]
        loose.append(is_nearest_voice(made, prints[i], variants))
    shares = f"{percent(float(np.mean(strict)))} ({percent(float(np.mean(loose)))} against other variants alone)"
    yield Row(nearer, shares, ">= 80 %")
    limits = f"the codec alone {np.mean(coded):.3f}, ceiling {np.mean(ceiling):.3f}, floor {np.mean(floor):.3f}"
    seen = f"{np.mean(near):.3f}, {limits}"
    yield Row(alike, seen, "within 0.1 of the ceiling")


def sentence_of(language: str, number: int) -> Sentence:
    """A sentence of the tests."""
    return sentences(language, "sentence", 40, SEED)[number]


def rendered(voice: espeak.Voice, language: str, number: int, seconds: float = 0.0) -> Sound:
    """A sentence of the tests in a voice; or, of as many as that takes, exactly `seconds`."""
    parts: list[Samples] = []
    while not parts or sum(map(len, parts)) < seconds * espeak.RATE:
        spoken = sentence_of(language, (number + len(parts)) % 40).spoken
        parts.append(espeak.say(spoken, LANGUAGES[language].espeak, voice))
    return np.concatenate(parts)[: round(seconds * espeak.RATE) or None], espeak.RATE
