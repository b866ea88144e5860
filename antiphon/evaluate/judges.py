"""Judges of speech that use no model of ours: was it said, in whose voice, and how does it sound?

    samples ── cepstra ──────> nearest_rendering ──> which of N renderings has the same words
            ── voice_print ──> similarity ─────────> how alike two voices are (Resemblyzer)
            ── dnsmos, pesq ───────────────────────> how it sounds, alone and beside its original

What is compared with many others is computed once: cepstra and voice prints are values. The packages come with the
extra `eval`, are imported where they are used, and bring their weights in their wheels, so nothing is downloaded.

Shapes: N samples or renderings, T frames of `HOP`, C cepstral coefficients and their slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antiphon.audio import Samples, check_samples
from antiphon.errors import AudioError, InputError
from antiphon.train import commands

RATE = 16000  # Hz, what all judges listen at
AUDIBLE = 1e-3  # a peak below it is no sound
SHORTEST = 0.1  # seconds; less has no voice

Floats = NDArray[np.floating[Any]]
needs_extra = partial(commands.needs_extra, "judging", "eval")


def heard(samples: Any, rate: int) -> Samples:
    """Samples from anywhere as mono float32 [N] at `RATE`, no louder than full scale.

    Raises:
        AudioError: samples that are no sound.
        InputError: the extra is missing.
    """
    with needs_extra():
        import soxr
    samples = check_samples(samples, rate)
    return np.clip(samples if rate == RATE else soxr.resample(samples, rate, RATE), -1, 1)


def is_silent(samples: Samples) -> bool:
    """Whether nothing can be heard in it."""
    return float(np.abs(samples).max(initial=0)) < AUDIBLE


# ------------------------------------------------------------------------------------- which judges are there

EXTRA = "pip install 'antiphon[eval]'"
APART = {  # what the extra leaves out, since it, or what it asks for, has to be compiled
    "resemblyzer": f"{EXTRA} and then pip install --no-deps Resemblyzer",
    "pesq": "pip install pesq, which needs a C compiler",
}


def unmeasured(*packages: str) -> str:
    """What to say in place of a number that needs these packages; nothing where all of them are installed."""
    for package in packages:
        if not _is_installed(package):
            return f"not measured: {package} is not installed; {APART.get(package, EXTRA)}"
    return ""


def resemblyzer_is_installed() -> bool:
    """Whether `voice_print` can judge."""
    return _is_installed("resemblyzer")


def pesq_is_installed() -> bool:
    """Whether `pesq` can judge."""
    return _is_installed("pesq")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # marked as not importable
        return False


# ------------------------------------------------------------------------------------------ what was said

HOP = 320  # samples: 20 ms
WINDOW = 512
BANDS = 40
COEFFICIENTS = 5  # more would follow the harmonics, and so the pitch of the voice
SLOPE_FRAMES = 5
EDGE_DB = 35  # what is so much softer than the loudest frame counts as silence at the ends

# steps in both clips, each counted by the frames it covers: neither clip may run more than twice as fast as the other
STEPS = np.array([[1, 1], [1, 2], [2, 1]])
WEIGHTS = np.array([2.0, 3.0, 3.0])


@dataclass(frozen=True)
class Nearest:
    """How far a clip is from each of N renderings."""

    costs: NDArray[np.float64]  # [N], 0 if alike to 2; infinite if silent or not within half to twice as long

    @property
    def index(self) -> int | None:
        """The nearest rendering; None if the clip is like none of them."""
        best = int(self.costs.argmin())
        return best if np.isfinite(self.costs[best]) else None


def cepstra(samples: Any, rate: int) -> Floats:
    """The words of a clip without its voice and channel, as directions [T, C] of length 1; T is 0 if it is silent.

    The few first cepstral coefficients and their slopes, each with the clip's own mean and deviation taken out.

    Raises:
        AudioError: samples that are no sound.
        InputError: the extra is missing.
    """
    with needs_extra():
        import librosa
    wave = heard(samples, rate)
    if is_silent(wave):
        return np.zeros((0, 2 * COEFFICIENTS))
    wave, _ = librosa.effects.trim(wave, top_db=EDGE_DB, frame_length=WINDOW, hop_length=WINDOW // 4)
    mfcc = librosa.feature.mfcc(y=wave, sr=RATE, n_mfcc=COEFFICIENTS, n_fft=WINDOW, hop_length=HOP, n_mels=BANDS)
    slopes = librosa.feature.delta(mfcc, width=SLOPE_FRAMES, mode="nearest")
    frames = np.concatenate([_standard(mfcc), _standard(slopes)]).T.astype(np.float64)
    return frames / np.maximum(np.linalg.norm(frames, axis=1, keepdims=True), 1e-8)


def _standard(x: Floats) -> Floats:
    """Rows with mean 0 and deviation 1."""
    return (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-8)


def nearest_rendering(clip: Floats, references: Sequence[Floats]) -> Nearest:
    """Which of the renderings a clip follows most closely, by dynamic time warping over `cepstra`.

    The cost of a path is the mean over its frames of one minus the cosine (Sakoe and Chiba 1978, symmetric, slope 1/2
    to 2), so that long and short renderings compete fairly.

    Raises:
        InputError: no references, or the extra is missing.
    """
    if not references:
        raise InputError("there is no rendering to compare with; give at least one")
    return Nearest(np.array([_warped(clip, reference) for reference in references]))


def _warped(a: Floats, b: Floats) -> float:
    """Mean cost of the best path through [T, C] and [T', C]."""
    with needs_extra():
        import librosa
    if not len(a) or not len(b):
        return np.inf
    apart = np.maximum(1 - a @ b.T, 0)
    total = librosa.sequence.dtw(C=apart, step_sizes_sigma=STEPS, weights_mul=WEIGHTS, backtrack=False)[-1, -1]
    return float(total) / (len(a) + len(b))


# -------------------------------------------------------------------------------------------------- voices


@cache
def _resemblyzer() -> tuple[Any, Any]:
    """Its package and its encoder of voices, on the CPU."""
    try:
        # by name, since a type checker must also pass where it is not installed
        package = import_module("resemblyzer")
    except ModuleNotFoundError as error:
        raise InputError(f"comparing voices needs {error.name}; install it with {APART['resemblyzer']}") from None
    return package, package.VoiceEncoder("cpu", verbose=False)


def voice_print(samples: Any, rate: int) -> Floats:
    """What Resemblyzer makes of a voice [256], of length 1; zeros where it hears none.

    Raises:
        AudioError: samples that are no sound.
        InputError: Resemblyzer is missing.
    """
    package, encoder = _resemblyzer()
    wave = heard(samples, rate)
    voiced = wave[:0]
    if len(wave) >= SHORTEST * RATE and not is_silent(wave):
        voiced = package.preprocess_wav(wave)
    return encoder.embed_utterance(voiced) if len(voiced) else np.zeros(encoder.linear.out_features, np.float32)


def similarity(a: Floats, b: Floats) -> float:
    """Cosine of two voice prints, 0 to 1; 0 if there is no voice in one of them."""
    return float(a @ b)


def is_nearest_voice(clip: Floats, target: Floats, others: Sequence[Floats]) -> bool:
    """Whether a voice print is nearer to the target's than to each of the others."""
    return similarity(clip, target) > max((similarity(clip, other) for other in others), default=0.0)


# ------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Mos:
    """Mean opinion scores that DNSMOS expects, 1 (bad) to 5 (excellent)."""

    overall: float
    signal: float
    background: float
    p808: float  # overall, by the older model


def dnsmos(samples: Any, rate: int) -> Mos:
    """How a clip sounds, by DNSMOS P.835 and P.808 (Reddy and others 2022); clips below 9 s are repeated.

    Raises:
        AudioError: samples that are no sound.
        InputError: the extra is missing.
    """
    with needs_extra():
        import librosa  # noqa: F401 - speechmos imports these without asking for them
        import onnxruntime  # noqa: F401
        from speechmos import dnsmos as judge
    scores: Any = judge.run(heard(samples, rate), RATE)
    return Mos(*(float(scores[f"{name}_mos"]) for name in ("ovrl", "sig", "bak", "p808")))


def pesq(reference: Any, degraded: Any, rate: int) -> float:
    """How a clip sounds beside its original, by wide-band PESQ (ITU-T P.862.2), 1 (bad) to 4.6 (the same).

    Raises:
        AudioError: samples that are no sound, or no speech in one of them.
        InputError: PESQ is not installed.
    """
    if not pesq_is_installed():
        raise InputError("PESQ is not installed; it needs a C compiler: pip install pesq")
    package = import_module("pesq")
    pair = heard(reference, rate), heard(degraded, rate)
    if any(is_silent(wave) for wave in pair):
        raise AudioError("PESQ has nothing to compare; one of the two clips is silent")
    try:
        return float(package.pesq(RATE, *pair, "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        raise AudioError("PESQ hears no speech; give two clips of at least a quarter of a second") from None
