"""What happens to sound on its way to a microphone and through a network, for training that has to stand it.

    speed -> room -> noise -> gain -> clipping -> telephone -> packet gaps, each with its own probability

Samples are mono float32 [N], full scale ±1, and the result is a function of them, the plan and the generator's state.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.signal import butter, sosfilt

from antiphon.audio import Samples, check_samples
from antiphon.errors import ConfigError
from antiphon.train import noises
from antiphon.train.music import Floats

TELEPHONE_RATE = 8000  # Hz
TELEPHONE_BAND = (300, 3400)  # Hz
MU = 255  # of the telephone's logarithmic quantization to 8 bits
MIXING_SECONDS = 0.04  # after the direct sound: until then a room gives single reflections
REFLECTIONS = 8

Rng = np.random.Generator
Range = tuple[float, float]


@dataclass(frozen=True)
class Augment:
    """How likely each effect is, from 0 to 1, and the range its strength is drawn from.

    Raises:
        ConfigError: a probability outside 0 to 1, or a range that does not go up or is impossible.
    """

    speed: float = 0.0  # changes the length, and pitch and formants with it
    reverberation: float = 0.3
    noise: float = 0.5
    gain: float = 0.7
    clipping: float = 0.05
    telephone: float = 0.1
    gaps: float = 0.1
    speed_factor: Range = (0.9, 1.1)
    snr_db: Range = (5.0, 30.0)
    decay_seconds: Range = (0.15, 0.6)  # of the room, until 60 dB down
    direct_db: Range = (0.0, 12.0)  # the direct sound over the room's
    gain_db: Range = (-15.0, 5.0)
    clip_level: Range = (0.3, 0.7)  # of the loudest sample
    gap_seconds: Range = (0.02, 0.06)
    gaps_a_second: float = 1.0

    def __post_init__(self) -> None:
        for name in ("speed", "reverberation", "noise", "gain", "clipping", "telephone", "gaps"):
            value = dataclasses.asdict(self)[name]
            if not 0 <= value <= 1:
                raise ConfigError(f"augment.{name} is {value}; expected a probability from 0 to 1")
        for name, lowest in (
            ("speed_factor", 0.5),
            ("snr_db", -40),
            ("decay_seconds", 0.01),
            ("direct_db", -40),
            ("gain_db", -80),
            ("clip_level", 0.01),
            ("gap_seconds", 0),
        ):
            low, high = dataclasses.asdict(self)[name]
            if not lowest <= low <= high < np.inf:
                raise ConfigError(f"augment.{name} is [{low}, {high}]; expected two numbers from {lowest} on, going up")
        if not 0 <= self.gaps_a_second < np.inf:
            raise ConfigError(f"augment.gaps_a_second is {self.gaps_a_second}; expected 0 or more")


def augment(
    samples: Samples, rate: int, rng: Rng, plan: Augment = Augment(), babble: Sequence[Samples] = ()
) -> Samples:
    """The samples [N] after the effects that chance picks; only a change of speed changes N.

    Args:
        samples: mono sound.
        rate: theirs, and that of `babble`, in Hz.
        rng: what decides.
        plan: how likely and how strong each effect is.
        babble: speech of others, to be mixed as one kind of noise.

    Raises:
        AudioError: samples that are no sound, or silence that noise should be mixed with.
    """
    x = check_samples(samples, rate)
    if rng.random() < plan.speed:
        x = change_speed(x, rate, rng.uniform(*plan.speed_factor))
    if rng.random() < plan.reverberation:
        x = reverberate(x, room(rate, rng, rng.uniform(*plan.decay_seconds), rng.uniform(*plan.direct_db)))
    if rng.random() < plan.noise:
        x = noises.mix(x, draw_noise(len(x), rate, rng, babble), rng.uniform(*plan.snr_db))
    if rng.random() < plan.gain:
        x = x * min(10 ** (rng.uniform(*plan.gain_db) / 20), 1 / max(np.abs(x).max(), 1e-9))
    if rng.random() < plan.clipping:
        limit = rng.uniform(*plan.clip_level) * np.abs(x).max()
        x = x.clip(-limit, limit)
    if rng.random() < plan.telephone:
        x = telephone(x, rate)
    if rng.random() < plan.gaps:
        x = lose_packets(x, rate, rng, plan)
    return x.clip(-1, 1).astype(np.float32)


def change_speed(samples: Samples, rate: int, factor: float) -> Samples:
    """Played so many times as fast: [N / factor], and higher by that factor."""
    return soxr.resample(samples, rate * factor, rate)


def room(rate: int, rng: Rng, decay_seconds: float, direct_db: float) -> Floats:
    """The response of a made-up room [M]: the direct sound, a few reflections, and a tail that dies 60 dB in time.

    High notes die twice as fast as low ones, as in rooms with curtains.
    """
    n = round(decay_seconds * rate)
    t = np.arange(n) / rate
    low, high = butter(1, 1500, "low", fs=rate, output="sos"), butter(1, 1500, "high", fs=rate, output="sos")
    noise = rng.standard_normal(n)
    fading = np.power(10, -3 * t / decay_seconds)
    tail = np.asarray(sosfilt(low, noise)) * fading + np.asarray(sosfilt(high, noise)) * fading**2
    tail *= np.clip(t / MIXING_SECONDS, 0, 1)
    for at in rng.uniform(0.002, MIXING_SECONDS, REFLECTIONS):
        if at < decay_seconds:
            tail[int(at * rate)] += rng.choice([-1, 1]) * rng.uniform(1, 4) * 10 ** (-3 * at / decay_seconds)
    tail *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return tail


def reverberate(samples: Samples, response: Floats) -> Samples:
    """The samples in that room [N], as loud as before; what rings on after the last one is cut."""
    n = len(samples)
    size = next_fast_len(n + len(response) - 1, real=True)
    spectrum = np.asarray(rfft(samples.astype(np.float64), size)) * np.asarray(rfft(response, size))
    wet = np.asarray(irfft(spectrum, size))[:n]
    scale = np.sqrt(np.sum(samples.astype(np.float64) ** 2) / max(np.sum(wet**2), 1e-12))
    return (wet * min(scale, 1 / max(np.abs(wet).max(), 1e-12))).astype(np.float32)


def draw_noise(n: int, rate: int, rng: Rng, babble: Sequence[Samples] = ()) -> Samples:
    """Noise [n] of a kind that chance picks: white, pink, an everyday sound, or babble where there are clips."""
    kinds = ["white", "pink", "everyday", *(["babble"] if babble else [])]
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "babble":
        return chatter(n, rng, babble)
    if kind != "everyday":
        return coloured(n, rate, rng, 0.0 if kind == "white" else 1.0)
    sound = noises.KINDS[int(rng.integers(len(noises.KINDS)))]
    samples = noises.render(sound, max(n / rate + 0.01, 0.5), rng)
    return soxr.resample(samples, noises.RATE, rate)[:n] if rate != noises.RATE else samples[:n]


def coloured(n: int, rate: int, rng: Rng, slope: float) -> Samples:
    """Noise [n] of unit rms whose power falls with frequency to that power: 0 is white, 1 is pink."""
    size = next_fast_len(n, real=True)
    hz = np.maximum(rfftfreq(size, 1 / rate), 20.0)
    spectrum = np.asarray(rfft(rng.standard_normal(size)))
    noise = np.asarray(irfft(spectrum * hz ** (-slope / 2), size))[:n]
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)


def chatter(n: int, rng: Rng, clips: Sequence[Samples]) -> Samples:
    """Three to six of the clips at once [n], equally loud, each from anywhere in it."""
    wave = np.zeros(n)
    for _ in range(int(rng.integers(3, 7))):
        clip = clips[int(rng.integers(len(clips)))].astype(np.float64)
        voice = np.resize(np.roll(clip, int(rng.integers(len(clip)))), n)
        wave += voice / np.sqrt(np.mean(voice**2) + 1e-12)
    return wave.astype(np.float32)


def telephone(samples: Samples, rate: int) -> Samples:
    """The samples [N] through a telephone line: 300 to 3400 Hz at 8 kHz, quantized to 8 bits by the mu law."""
    line = soxr.resample(samples, rate, TELEPHONE_RATE)
    line = np.asarray(sosfilt(butter(4, TELEPHONE_BAND, "band", fs=TELEPHONE_RATE, output="sos"), line)).clip(-1, 1)
    steps = np.rint((np.sign(line) * np.log1p(MU * np.abs(line)) / np.log1p(MU) + 1) / 2 * MU)  # 0 to MU
    line = steps / MU * 2 - 1
    line = np.sign(line) * np.expm1(np.abs(line) * np.log1p(MU)) / MU
    out = soxr.resample(line.astype(np.float32), TELEPHONE_RATE, rate)
    return np.pad(out, (0, max(0, len(samples) - len(out))))[: len(samples)]


def lose_packets(samples: Samples, rate: int, rng: Rng, plan: Augment) -> Samples:
    """The samples [N] with silence where packets were lost."""
    out = samples.copy()
    for at in rng.integers(0, len(out), max(1, rng.poisson(plan.gaps_a_second * len(out) / rate))):
        out[at : at + round(rng.uniform(*plan.gap_seconds) * rate)] = 0
    return out
