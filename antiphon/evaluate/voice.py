"""How well a model speaks: what is understood of it, by itself and by judges of others, and whose voice it is.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from antiphon.audio import Samples
from antiphon.codec import Codec
from antiphon.error_rates import error_rates
from antiphon.errors import AntiphonError
from antiphon.evaluate.judges import (
    cepstra,
    dnsmos,
    is_nearest_voice,
    nearest_rendering,
    pesq,
    pesq_is_installed,
    similarity,
    voice_print,
)
from antiphon.evaluate.trial import Row, Trial, by_language, mean, percent, sound
from antiphon.generate import Omni, collect
from antiphon.train import espeak
from antiphon.train.data import resample
from antiphon.train.dialog import DIALOG_LANGUAGES
from antiphon.train.world import LANGUAGES, Sentence, sentences
from antiphon.weights import load_codec

JUDGED = 12  # clips whose quality is judged
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
    """New sentences in the preset voices: read back, and found again among other sentences' renderings."""
    model, codec = trial.model, codec_of(trial.model)
    read: dict[str, list[tuple[str, str, str | None]]] = {"said": [], "coded": [], "recorded": []}
    found: dict[str, dict[str, list[bool]]] = {"said": {}, "coded": {}}
    quality: list[tuple[Sound, Sound, Sound]] = []
    for language in DIALOG_LANGUAGES:
        examples = trial.examples("test-sentence", (language,))
        renderings = [cepstra(*sound(e)) for e in examples]
        for i, e in enumerate(trial.track(examples, f"speaking {language}")):
            clips = {"recorded": sound(e), "coded": again(model, codec, *sound(e))}
            clips["said"] = said(model, e.text, model.voices[i % len(model.voices)])
            for kind, clip in clips.items():
                read[kind].append((e.text, trial.heard(*clip, e.language), e.language))
            for kind, right in found.items():
                right.setdefault(language, []).append(nearest_rendering(cepstra(*clips[kind]), renderings).index == i)
            if i == 0 and len(quality) < JUDGED:
                quality.append((clips["recorded"], clips["coded"], clips["said"]))
    rates = {kind: error_rates(pairs) for kind, pairs in read.items()}
    seen = {kind: f"{percent(mean(r))} ({by_language(r)})" for kind, r in rates.items()}
    yield Row("speaking, read back", seen["said"], "<= ceiling + 5 points")
    yield Row("its ceiling, the codec alone", seen["coded"])
    yield Row(
        "error added by the codec", f"{100 * (mean(rates['coded']) - mean(rates['recorded'])):.1f} points", "<= 3"
    )
    for kind, what, target in (
        ("said", "nearest rendering is the sentence", ">= 95 %"),
        ("coded", "the codec alone", ""),
    ):
        shares = {language: float(np.mean(right)) for language, right in found[kind].items()}
        yield Row(what, f"{percent(mean(shares))} ({by_language(shares)})", target)
    yield from qualities(quality)


def qualities(clips: list[tuple[Sound, Sound, Sound]]) -> Iterator[Row]:
    """DNSMOS of clips as recorded, coded and said, and PESQ of the coded ones."""
    scores = np.array([[dnsmos(*clip).overall for clip in row] for row in clips]).mean(0)
    yield Row("DNSMOS", "recorded {:.2f}, coded {:.2f}, said {:.2f}".format(*scores))
    if not pesq_is_installed():
        yield Row("PESQ of the codec", "not measured: pip install pesq needs a C compiler")
        return
    values = []
    for (recorded, rate), (coded, other), _ in clips:
        try:
            values.append(pesq(resample(recorded, rate, other), coded, other))
        except AntiphonError:  # it hears no speech in one of them
            continue
    yield Row("PESQ of the codec", f"{np.mean(values):.2f} over {len(values)} clips" if values else "no speech heard")


def cloning(trial: Trial) -> Iterator[Row]:
    """Voices that were never heard, taken from one language and speaking another."""
    references = [rendered(voice, DIALOG_LANGUAGES[i % 10], i, 3.0) for i, voice in enumerate(UNHEARD)]
    prints = [voice_print(*reference) for reference in references]
    near, ceiling, floor, nearest = [], [], [], []
    for i, voice in enumerate(trial.track(UNHEARD, "cloning")):
        language = DIALOG_LANGUAGES[(i + 1 + i // 10) % 10]
        text = sentence_of(language, i).text
        made = voice_print(*said(trial.model, text, trial.model.clone(*references[i])))
        others = [p for j, p in enumerate(prints) if UNHEARD[j].variant != voice.variant]
        near.append(similarity(made, prints[i]))
        ceiling.append(similarity(voice_print(*rendered(voice, language, i, 0.0)), prints[i]))
        floor.append(float(np.mean([similarity(p, prints[i]) for p in others])))
        nearest.append(is_nearest_voice(made, prints[i], others))
    yield Row("cloned voices nearer to the target than to other speakers", percent(float(np.mean(nearest))), ">= 80 %")
    seen = f"{np.mean(near):.3f}, ceiling {np.mean(ceiling):.3f}, floor {np.mean(floor):.3f}"
    yield Row("similarity to the target", seen, "within 0.1 of the ceiling")


def sentence_of(language: str, number: int) -> Sentence:
    """A sentence of the tests."""
    return sentences(language, "sentence", 40, SEED)[number]


def rendered(voice: espeak.Voice, language: str, number: int, seconds: float) -> Sound:
    """Test sentences in a voice, one at least and as many as fill `seconds`."""
    parts: list[Samples] = []
    while not parts or sum(map(len, parts)) < seconds * espeak.RATE:
        spoken = sentence_of(language, (number + len(parts)) % 40).spoken
        parts.append(espeak.say(spoken, LANGUAGES[language].espeak, voice))
    return np.concatenate(parts), espeak.RATE
