"""What the textbook hears in music and sounds: the baselines that a model's descriptions are compared with.

Tempo and mode are rules; instruments and sounds are those of the nearest training clip by statistics of its MFCC.
Clips are lhotse cuts with the labels of `antiphon corpus` in their supervision's custom fields.

Shapes: N samples or clips, D statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from antiphon.audio import Samples
from antiphon.errors import InputError
from antiphon.evaluate.judges import RATE, Floats, heard, needs_extra
from antiphon.train.data import load_samples
from antiphon.train.music import TEMPOS

WITHIN = 0.04  # relative error of a tempo that counts as right
BEAT_HOP = 64  # samples: at 512 the steps between tempos would be larger than WITHIN
BEAT_SECONDS = 4.0  # about as long as the clips
ANY_TEMPO = 10.0  # octaves: librosa's usual 1 prefers tempos near 120
COEFFICIENTS = 20
HOP = 320  # samples: 20 ms

# how well the twelve tones fit into a key, from the tonic up (Krumhansl and Kessler 1982)
KEYS = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}


def hear_tempo(samples: Any, rate: int) -> float:
    """Beats a minute, by librosa's autocorrelation of onset strength, as its beat tracker starts from.

    Raises:
        AudioError: samples that are no sound.
        InputError: the extra is missing.
    """
    with needs_extra():
        import librosa
    rises = librosa.onset.onset_strength(y=heard(samples, rate), sr=RATE, hop_length=BEAT_HOP)
    fastest = TEMPOS[1] * (1 + WITHIN)
    tempo = librosa.feature.tempo(
        onset_envelope=rises,
        sr=RATE,
        hop_length=BEAT_HOP,
        std_bpm=ANY_TEMPO,
        max_tempo=fastest,
        ac_size=BEAT_SECONDS,
    )
    return float(tempo[0])


def hear_mode(samples: Any, rate: int) -> str:
    """Major or minor, whichever of the 24 keys correlates best with how strong the twelve tones are.

    Raises:
        AudioError: samples that are no sound.
        InputError: the extra is missing.
    """
    with needs_extra():
        import librosa
    tones = librosa.feature.chroma_stft(y=heard(samples, rate), sr=RATE, n_fft=4096, hop_length=1024, tuning=0).mean(1)
    fits = {mode: max(np.corrcoef(np.roll(key, n), tones)[0, 1] for n in range(12)) for mode, key in KEYS.items()}
    return max(fits, key=fits.__getitem__)


def statistics(samples: Any, rate: int) -> Floats:
    """What a clip sounds like [D], how loud and how long it is left out: means, deviations and movement of its MFCC.

    Raises:
        AudioError: samples that are no sound.
        InputError: the extra is missing.
    """
    with needs_extra():
        import librosa
    mfcc = librosa.feature.mfcc(y=heard(samples, rate), sr=RATE, n_mfcc=COEFFICIENTS, hop_length=HOP)
    moves = np.diff(mfcc, axis=1, append=mfcc[:, -1:])
    return np.concatenate([mfcc[1:].mean(1), mfcc.std(1), moves.std(1), np.abs(moves).mean(1)])


def nearest_class(known: Floats, names: Sequence[str], unknown: Floats) -> list[str]:
    """For each of the unknown [M, D] the name of the nearest known one [N, D]; every statistic counts alike.

    Raises:
        InputError: nothing is known.
    """
    if not len(known):
        raise InputError("there is no training clip to learn the classes from; give at least one of each")
    scale = known.std(0) + 1e-8
    known, unknown = known / scale, unknown / scale
    # |a - b|^2 without |a|^2, which is the same for all known ones
    apart = (known**2).sum(1) - 2 * unknown @ known.T
    return [names[int(i)] for i in apart.argmin(1)]


def music_baseline(train: Sequence[Any], test: Sequence[Any]) -> dict[str, float]:
    """Accuracy of tempo (within `WITHIN`), mode and instrument over the test cuts; instruments as in the training cuts.

    Raises:
        InputError: no test cuts, a cut without these labels, or the extra is missing.
    """
    classes = _classes(train, test, "instrument")
    clips = [_samples(cut) for cut in test]
    tempos = [abs(hear_tempo(x, RATE) / label(cut, "tempo") - 1) <= WITHIN for x, cut in zip(clips, test, strict=True)]
    modes = [hear_mode(x, RATE) == label(cut, "mode") for x, cut in zip(clips, test, strict=True)]
    return {"tempo": float(np.mean(tempos)), "mode": float(np.mean(modes)), **classes}


def sound_baseline(train: Sequence[Any], test: Sequence[Any]) -> dict[str, float]:
    """Accuracy of the kind of sound over the test cuts; kinds as in the training cuts.

    Raises:
        InputError: no test cuts, a cut without this label, or the extra is missing.
    """
    return _classes(train, test, "sound")


def label(cut: Any, name: str) -> Any:
    """What a cut's supervision says of it.

    Raises:
        InputError: it does not say.
    """
    for supervision in cut.supervisions:
        if supervision.custom and name in supervision.custom:
            return supervision.custom[name]
    raise InputError(f"cut {cut.id} has no label {name!r}; give cuts that antiphon corpus made")


def _classes(train: Sequence[Any], test: Sequence[Any], name: str) -> dict[str, float]:
    names, wanted = ([label(cut, name) for cut in cuts] for cuts in (train, test))
    if not names or not wanted:
        raise InputError(f"there are no cuts to learn or to judge {name!r} by; give at least one of each")
    known, unknown = (np.stack([statistics(_samples(cut), RATE) for cut in cuts]) for cuts in (train, test))
    said = nearest_class(known, names, unknown)
    return {name: float(np.mean([a == b for a, b in zip(said, wanted, strict=True)]))}


def _samples(cut: Any) -> Samples:
    return load_samples(cut, RATE)
