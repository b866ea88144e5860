import hashlib
from typing import Any

import numpy as np
import pytest

from antiphon.errors import AudioError, ConfigError
from antiphon.train.augment import (
    Augment,
    augment,
    change_speed,
    chatter,
    coloured,
    draw_noise,
    lose_packets,
    reverberate,
    room,
    telephone,
)
from antiphon.train.recipe import read_fields

RATE = 24000
NOTHING: dict[str, Any] = {
    name: 0.0 for name in ("speed", "reverberation", "noise", "gain", "clipping", "telephone", "gaps")
}
EFFECTS = tuple(NOTHING)


def only(effect, **strengths):
    return Augment(**{**NOTHING, effect: 1.0, **strengths})


def sound(seconds=1.5, rate=RATE):
    """Three tones that come and go like syllables, rms about 0.1."""
    t = np.arange(round(seconds * rate)) / rate
    tones = np.sin(2 * np.pi * 220 * t) + np.sin(2 * np.pi * 1000 * t) + 0.5 * np.sin(2 * np.pi * 5000 * t)
    return (0.1 * tones * (0.2 + np.sin(2 * np.pi * 2 * t) ** 2)).astype(np.float32)


def power(samples, hz, rate=RATE):
    """At one frequency, dB."""
    t = np.arange(len(samples)) / rate
    return 20 * np.log10(np.abs(np.mean(samples * np.exp(-2j * np.pi * hz * t))) + 1e-12)


def rng(seed=0):
    return np.random.default_rng(seed)


def digest(samples):
    return hashlib.sha256(samples.tobytes()).hexdigest()


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize("effect", EFFECTS)
def test_every_effect_changes_the_sound_and_follows_from_the_seed(effect, rate):
    x = sound(rate=rate)
    before = x.copy()
    plan = only(effect)
    first, again, other = (augment(x, rate, rng(seed), plan) for seed in (1, 1, 2))
    np.testing.assert_array_equal(x, before)  # the input is left alone
    assert first.dtype == np.float32
    assert len(first) == len(x) or effect == "speed"
    assert np.abs(first).max() <= 1
    assert first.std() > 0.01
    assert digest(first) == digest(again)
    assert digest(first) != digest(x)
    assert digest(first) != digest(other) or effect == "telephone"  # which has no parameter


def test_another_process_does_the_same(elsewhere):
    x = np.sin(np.arange(24000) / 9).astype(np.float32) / np.float32(2)
    given = x, 24000, rng(3), Augment(1, 1, 1, 1, 1, 1, 1), [x]
    assert digest(elsewhere(augment, *given)) == digest(augment(*given))


def test_no_effect_is_no_change():
    x = sound()
    np.testing.assert_array_equal(augment(x, RATE, rng(), Augment(**NOTHING)), x)


def test_probabilities_are_kept():
    x = sound(0.2)
    plan = Augment(**{**NOTHING, "gaps": 0.3})
    changed = [digest(augment(x, RATE, rng(seed), plan)) != digest(x) for seed in range(400)]
    assert 0.22 < np.mean(changed) < 0.38


def test_speed():
    x = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    fast = change_speed(x, RATE, 1.25)
    assert len(fast) == pytest.approx(RATE / 1.25, abs=1)
    assert np.abs(np.fft.rfft(fast * np.hanning(len(fast)))).argmax() * RATE / len(fast) == pytest.approx(1250, abs=2)


@pytest.mark.parametrize("decay", [0.2, 0.6])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_rooms_decay_as_told(decay, rate):
    response = room(rate, rng(), decay, 6.0)
    assert 10 * np.log10(1 / np.sum(response[1:] ** 2)) == pytest.approx(6, abs=0.01)
    start, stop = round(0.3 * decay * rate), round(0.7 * decay * rate)
    left = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1])  # Schroeder's integral
    slope = (left[stop] - left[start]) / (0.4 * decay)
    assert 60 / -slope == pytest.approx(decay, rel=0.25)


def test_reverberation_keeps_time_and_loudness():
    x = np.zeros(RATE, np.float32)
    x[5000] = 0.5
    wet = reverberate(x, room(RATE, rng(), 0.3, 3.0))
    assert np.abs(wet).argmax() == 5000
    assert np.abs(wet[:5000]).max() < 1e-6
    assert np.sqrt(np.sum(wet**2)) == pytest.approx(0.5, rel=1e-3)
    expected = np.convolve(sound(0.3), (response := room(RATE, rng(), 0.2, 3.0)))[:7200]
    found = reverberate(sound(0.3), response)
    np.testing.assert_allclose(found * (expected.std() / found.std()), expected, atol=1e-5)


def test_noise_has_the_ratio_asked_for():
    x = sound()
    for seed in range(8):
        noisy = augment(x, RATE, rng(seed), only("noise", snr_db=(10.0, 10.0)))
        assert 20 * np.log10(x.std() / (noisy - x).std()) == pytest.approx(10, abs=0.3)


@pytest.mark.parametrize(("slope", "expected"), [(0.0, 0.0), (1.0, -10 * np.log10(8))])
def test_colours(slope, expected):
    spectrum = np.abs(np.fft.rfft(coloured(1 << 17, RATE, rng(), slope))) ** 2
    hz = np.fft.rfftfreq(1 << 17, 1 / RATE)
    low, high = (spectrum[(hz > f / 1.1) & (hz < f * 1.1)].mean() for f in (1000, 8000))
    assert 10 * np.log10(high / low) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("rate", [8000, 24000])
def test_all_kinds_of_noise_are_drawn(rate):
    clips = [sound(0.4, rate)]
    for n in (1, 700, 3 * rate):
        for seed in range(12):
            noise = draw_noise(n, rate, rng(seed), clips)
            assert noise.shape == (n,)
            assert np.isfinite(noise).all()
    assert len({digest(draw_noise(rate, rate, rng(seed), clips)) for seed in range(12)}) == 12


def test_babble_is_made_of_the_clips():
    t = np.arange(RATE) / RATE
    clips = [np.sin(2 * np.pi * hz * t).astype(np.float32) for hz in (300, 700)]
    mixed = chatter(2 * RATE, rng(), clips)
    assert len(mixed) == 2 * RATE
    outside = power(mixed, 1100)
    assert max(power(mixed, 300), power(mixed, 700)) > outside + 40


def test_telephones_pass_their_band_only():
    t = np.arange(RATE) / RATE
    tones = np.stack([np.sin(2 * np.pi * hz * t) for hz in (100, 1000, 2500, 3900, 6000)])
    x = (0.12 * tones.sum(0)).astype(np.float32)
    line = telephone(x, RATE)
    assert len(line) == len(x)
    assert power(line, 1000) == pytest.approx(power(x, 1000), abs=0.5)
    assert power(line, 2500) == pytest.approx(power(x, 2500), abs=0.5)
    for hz in (100, 3900, 6000):
        assert power(line, hz) < power(x, hz) - 20


def test_the_mu_law_has_256_steps():
    ramp = np.sin(2 * np.pi * 500 * np.arange(8000) / 8000).astype(np.float32) * np.linspace(
        0, 1, 8000, dtype=np.float32
    )
    levels = np.unique(telephone(ramp, 8000))
    assert 150 < len(levels) <= 256
    assert np.diff(levels).min() < 0.001  # fine near silence
    assert np.diff(levels).max() > 0.02  # coarse where it is loud


def test_gain_never_clips():
    x = sound() / np.abs(sound()).max()
    for seed in range(10):
        loud = augment(x, RATE, rng(seed), only("gain", gain_db=(6.0, 40.0)))
        np.testing.assert_allclose(loud, x, atol=1e-6)
    soft = augment(x, RATE, rng(), only("gain", gain_db=(-20.0, -20.0)))
    np.testing.assert_allclose(soft, 0.1 * x, atol=1e-6)


def test_clipping_cuts_the_peaks():
    x = sound()
    clipped = augment(x, RATE, rng(), only("clipping", clip_level=(0.5, 0.5)))
    limit = 0.5 * np.abs(x).max()
    np.testing.assert_allclose(clipped, x.clip(-limit, limit), atol=1e-6)


def test_lost_packets_are_silent():
    x = np.ones(10 * RATE, np.float32)
    plan = Augment(gaps_a_second=2.0, gap_seconds=(0.02, 0.06))
    lost = lose_packets(x, RATE, rng(), plan)
    edges = np.flatnonzero(np.diff(np.concatenate([[1], lost, [1]])))
    lengths = (edges[1::2] - edges[::2]) / RATE
    assert 10 < len(lengths) < 30
    assert lengths.min() >= 0.0199
    assert np.percentile(lengths, 80) <= 0.0601  # the longest may be two that touch
    assert set(np.unique(lost)) == {0, 1}


def test_plans_come_from_recipes():
    plan = read_fields(Augment, {"noise": 1, "snr_db": [0, 10]}, "augment")
    assert plan == Augment(noise=1.0, snr_db=(0.0, 10.0))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"noise": 1.5}, "augment.noise is 1.5; expected a probability"),
        ({"gaps": float("nan")}, "augment.gaps is nan; expected a probability"),
        ({"snr_db": (20.0, 5.0)}, r"augment.snr_db is \[20.0, 5.0\]; expected two numbers from -40 on, going up"),
        ({"speed_factor": (0.0, 1.0)}, "augment.speed_factor"),
        ({"decay_seconds": (0.1, float("inf"))}, "augment.decay_seconds"),
        ({"gaps_a_second": -1.0}, "augment.gaps_a_second is -1.0; expected 0 or more"),
    ],
)
def test_impossible_plans(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Augment(**settings)


def test_what_cannot_be_augmented():
    with pytest.raises(AudioError, match="silence cannot be mixed"):
        augment(np.zeros(2400, np.float32), RATE, rng(), only("noise"))
    with pytest.raises(AudioError, match="is empty"):
        augment(np.zeros(0, np.float32), RATE, rng())
    with pytest.raises(AudioError, match="sample rate"):
        augment(sound(), 0, rng())


def test_the_shortest_sounds_pass():
    everything = Augment(1, 1, 1, 1, 1, 1, 1)
    for n in (2, 10, 300):
        for seed in range(10):
            assert np.isfinite(augment(np.full(n, 0.1, np.float32), RATE, rng(seed), everything)).all()
