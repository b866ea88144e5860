import hashlib
from typing import Any

import librosa
import numpy as np
import pytest

from antiphon.errors import AudioError, InputError
from antiphon.train import noises
from antiphon.train.noises import KINDS, RATE, SOUNDS, mix, render

TIMBRES = ("train", "held-out")


def digest(kind, seed):
    return hashlib.sha256(render(kind, 1.5, np.random.default_rng(seed), "held-out").tobytes()).hexdigest()


def centroid(samples):
    return float(np.median(librosa.feature.spectral_centroid(y=samples, sr=RATE)))


def flatness(samples):
    return float(np.median(librosa.feature.spectral_flatness(y=samples)))


def loudness(samples):
    """The rms of each 10 ms, as a share of the largest."""
    rms = np.sqrt(np.mean(samples[: len(samples) // 240 * 240].reshape(-1, 240) ** 2, axis=1))
    return rms / rms.max()


def onsets(samples):
    """How often the sound begins out of near silence, a second."""
    loud = loudness(samples) > 0.25
    return np.sum(loud[1:] & ~loud[:-1]) / (len(samples) / RATE)


def pitch(samples):
    """The strongest frequency in each frame that is not silent, Hz."""
    spectrum = np.abs(librosa.stft(samples, n_fft=2048, hop_length=480))
    loud = spectrum.max(0) > 0.3 * spectrum.max()
    return spectrum.argmax(0)[loud] * RATE / 2048


HEARD = {  # what a listener would say of each, on three seconds
    "rain": lambda x: centroid(x) > 3000 and flatness(x) > 0.05 and loudness(x).min() > 0.15,
    "siren": lambda x: np.ptp(pitch(x)) > 200 and loudness(x)[5:-5].min() > 0.5,
    "clock": lambda x: 1.3 < onsets(x) < 5 and np.mean(loudness(x) < 0.2) > 0.8,
    "engine": lambda x: centroid(x) < 1500 and loudness(x).min() > 0.05 and np.median(pitch(x)) < 500,
    "bird": lambda x: np.median(pitch(x)) > 2000 and onsets(x) > 3,
    "dog": lambda x: 1 < onsets(x) < 5 and 150 < np.median(pitch(x)) < 1800,
    "wind": lambda x: centroid(x) < 1200 and np.median(pitch(x)) < 900,
    "sea": lambda x: flatness(x) > 0.002 and loudness(librosa.resample(x, orig_sr=RATE, target_sr=2400)).min() < 0.6,
    "door knock": lambda x: np.median(pitch(x)) < 600 and 1.5 < onsets(x) < 7,
    "telephone": lambda x: 500 < np.median(pitch(x)) < 2400 and np.mean(loudness(x) < 0.1) > 0.05,
    "applause": lambda x: flatness(x) > 0.01 and 800 < centroid(x) < 5000,
    "alarm": lambda x: onsets(x) > 2 and np.ptp(np.percentile(pitch(x), [10, 90])) < 30,
}


@pytest.mark.parametrize("timbres", TIMBRES)
@pytest.mark.parametrize("kind", KINDS)
def test_sounds_are_what_they_are_called(kind, timbres):
    for seed in range(3):
        samples = render(kind, 3.0, np.random.default_rng(seed), timbres)
        assert samples.dtype == np.float32
        assert len(samples) == 3 * RATE
        assert np.abs(samples).max() <= noises.PEAK + 1e-6
        assert 0.02 < samples.std() <= noises.LEVEL * 1.01
        assert HEARD[kind](samples), seed


def statistics(samples):
    mfcc = librosa.feature.mfcc(y=samples, sr=RATE, n_mfcc=20, hop_length=480)
    moves = np.diff(mfcc, axis=1)
    return np.concatenate([mfcc[1:].mean(1), mfcc.std(1), moves.std(1), np.abs(moves).mean(1)])


def test_kinds_are_told_apart_also_held_out():
    def points(timbres, count):
        rng = np.random.default_rng(3)
        return np.stack([[statistics(render(kind, 2.0, rng, timbres)) for _ in range(count)] for kind in KINDS])

    known, unknown = points("train", 20), points("held-out", 5)
    mean, scale = known.mean((0, 1)), known.std((0, 1))
    known, unknown = ((x - mean) / scale for x in (known, unknown))
    away = np.linalg.norm(unknown[:, :, None, None] - known, axis=-1).min(-1)  # to the nearest of each kind
    right = away.argmin(-1) == np.arange(len(KINDS))[:, None]
    assert right.mean() > 0.75
    assert right.mean(1).min() >= 0.2  # the chance is 0.08


def test_held_out_sounds_never_occur_in_training():
    for kind, sound in SOUNDS.items():
        for name, (low, high, held_low, held_high) in sound.ranges.items():
            assert low < high
            assert held_low < held_high
            assert high < held_low or held_high < low, (kind, name)


def test_draws_differ_and_follow_from_the_seed(elsewhere):
    assert all(elsewhere(digest, kind, 0) == digest(kind, 0) for kind in KINDS)
    assert len({digest(kind, seed) for kind in KINDS for seed in (0, 1)}) == 2 * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_any_length(kind):
    for seconds in (noises.SHORTEST, 0.5, 7.3):
        samples = render(kind, seconds, np.random.default_rng(1))
        assert len(samples) == round(seconds * RATE)
        assert np.isfinite(samples).all()
        assert samples.std() > 1e-3


@pytest.mark.parametrize("snr_db", [-5, 0, 12.5])
def test_mixing_ratio(snr_db):
    rng = np.random.default_rng(0)
    speech = (0.1 * np.sin(np.arange(24000) / 9)).astype(np.float32)
    noise = (0.02 * rng.standard_normal(5000)).astype(np.float32)  # shorter, so it is repeated
    mixed = mix(speech, noise, snr_db)
    assert mixed.dtype == np.float32
    assert len(mixed) == len(speech)
    under = mixed - speech
    assert 20 * np.log10(speech.std() / under.std()) == pytest.approx(snr_db, abs=0.1)
    np.testing.assert_allclose(under[5000:10000], under[:5000], atol=1e-6)


def test_a_loud_mix_is_turned_down_not_clipped():
    speech = np.sin(np.arange(24000) / 9).astype(np.float32)
    noise = np.cos(np.arange(24000) / 7).astype(np.float32)
    mixed = mix(speech, noise, 0)
    assert np.abs(mixed).max() == pytest.approx(1)
    np.testing.assert_allclose(mixed, (speech + noise) * mixed[100] / (speech + noise)[100], atol=0.01)


def test_what_cannot_be_rendered():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="no sound 'thunder'; choose one of rain, siren"):
        render("thunder", 1.0, rng)
    for seconds in (0.05, float("nan"), float("inf")):
        with pytest.raises(InputError, match=rf"sound of {seconds} seconds; give at least 0\.1"):
            render("rain", seconds, rng)
    unknown: Any = "test"
    with pytest.raises(InputError, match="no timbres 'test'; choose train or held-out"):
        render("rain", 1.0, rng, unknown)


def test_silence_cannot_be_mixed():
    sound, silence = np.ones(9, np.float32), np.zeros(9, np.float32)
    for speech, noise in ((sound, silence), (silence, sound), (sound, silence[:0]), (silence[:0], sound)):
        with pytest.raises(AudioError, match="silence cannot be mixed"):
            mix(speech, noise, 10)
