"""Everyday sounds of the synthetic corpus, from recipes with parameters: rain, a siren, a clock, and so on.

Every rendering draws new parameters; those of held-out sounds lie outside the ranges of training. A sound begins at
once and tells what it is within a second and a half.

Samples are mono float32 [N] at `RATE`, a function of the generator's state and the arguments. In the recipes n is the
number of samples, hz frequencies and the other lengths seconds.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

from antiphon.audio import Samples
from antiphon.errors import AudioError, InputError
from antiphon.train.music import Ends, Floats, Timbres, harmonics

RATE = 24000  # Hz
LEVEL = 0.1  # rms, unless a peak would pass PEAK
PEAK = 0.9
SHORTEST = 0.1  # seconds

BACKGROUND_DB = (-55, -35)  # the room's hiss below the sound, whatever that is
Rng = np.random.Generator


def render(kind: str, seconds: float, rng: Rng, timbres: Timbres = "train") -> Samples:
    """A new rendering of one of `KINDS`.

    Raises:
        InputError: a kind or a set of timbres that there is not, or less than `SHORTEST` seconds.
    """
    if kind not in SOUNDS:
        raise InputError(f"there is no sound {kind!r}; choose one of {', '.join(KINDS)}")
    if timbres not in ("train", "held-out"):
        raise InputError(f"there are no timbres {timbres!r}; choose train or held-out")
    if not SHORTEST <= seconds < math.inf:
        raise InputError(f"a sound of {seconds} seconds; give at least {SHORTEST}")
    sound, first = SOUNDS[kind], 0 if timbres == "train" else 2
    drawn = {name: float(rng.uniform(ends[first], ends[first + 1])) for name, ends in sound.ranges.items()}
    n = round(seconds * RATE)
    wave = sound.recipe(n, rng, **drawn)
    wave += wave.std() * 10 ** (rng.uniform(*BACKGROUND_DB) / 20) * rng.standard_normal(n)
    gain = min(LEVEL / np.sqrt(np.mean(wave**2)), PEAK / np.abs(wave).max())
    return (wave * gain).astype(np.float32)


def mix(speech: Samples, noise: Samples, snr_db: float) -> Samples:
    """Speech [N] with noise under it, so much weaker by their rms; softer as a whole if a peak would pass full scale.

    Noise that is longer is cut and shorter noise is repeated.

    Raises:
        AudioError: speech or noise without sound.
    """
    noise = np.resize(noise, len(speech))
    power, noise_power = (float(np.mean(np.square(x, dtype=np.float64))) if len(x) else 0.0 for x in (speech, noise))
    if not power or not noise_power:
        raise AudioError("silence cannot be mixed at a signal-to-noise ratio; give sound on both sides")
    mixed = speech + noise * math.sqrt(power / noise_power * 10 ** (-snr_db / 10))
    return (mixed / max(1.0, np.abs(mixed).max())).astype(np.float32)


# ------------------------------------------------------------------------------------------------- recipes


def rain(n: int, rng: Rng, low_hz: float, high_hz: float, drops: float, patter: float) -> Floats:
    """A steady hiss with drops that strike something near by."""
    hiss = band(n, rng, low_hz, high_hz)
    near = strikes(n, rng, drops, [ping(rng.uniform(1500, 5000), 0.002, 0.012) for _ in range(12)])
    return hiss + patter * near


def siren(n: int, rng: Rng, low_hz: float, high_hz: float, rate: float, bright: float) -> Floats:
    """A horn that wails (slowly), yelps (quickly) or changes between two tones."""
    t = times(n)
    style = rng.choice(["wail", "yelp", "two tones"])
    turn = rate * (6.0 if style == "yelp" else 1.6) * t + rng.random()
    height = (np.floor(2 * turn) % 2) if style == "two tones" else 0.5 - 0.5 * np.cos(2 * np.pi * turn)
    phase = sweep(low_hz * (high_hz / low_hz) ** height)
    return harmonics(np.power(bright, [0.0, 1, 2, 3, 4]), np.ones(n), phase)


def clock(n: int, rng: Rng, period: float, hz: float, body_hz: float, lame: float) -> Floats:
    """Ticks and tocks, the tock a little lower and late."""
    wave = np.zeros(n)
    for beat in range(math.ceil(n / RATE / period) + 1):
        tock = beat % 2
        tick = ping(hz * (0.85 if tock else 1), 0.003, 0.03) + 0.5 * ping(body_hz, 0.012, 0.08)[: round(0.03 * RATE)]
        place(wave, tick * rng.uniform(0.8, 1.0), (beat + lame * tock) * period + 0.02)
    return wave


def engine(n: int, rng: Rng, hz: float, rev: float, rough: float, cut_hz: float) -> Floats:
    """Firing strokes whose rate goes up and down, and the noise they make."""
    speed = hz * (1 + rev * drift(n, rng, 0.8))
    phase = sweep(speed)
    k = np.arange(1, 25)
    weights = rng.uniform(0.4, 1.0, len(k)) * rng.choice([-1, 1], len(k)) / (1 + (k * hz / cut_hz) ** 2)
    strokes = harmonics(weights, np.ones(n), phase)
    hiss = band(n, rng, 100, 3 * cut_hz) * (0.4 + 0.6 * np.clip(np.sin(phase), 0, None))
    return (strokes / strokes.std() + rough * hiss) * (1 + 0.3 * np.sin(phase / 4))


def bird(n: int, rng: Rng, hz: float, width: float, syllable: float, pause: float) -> Floats:
    """Phrases of whistled syllables that slide quickly."""
    wave, at = np.zeros(n), 0.03
    while at < n / RATE:
        slide, count = rng.uniform(-width, width), int(rng.integers(3, 8))
        for _ in range(count):
            m = round(syllable * rng.uniform(0.8, 1.2) * RATE)
            shape = np.linspace(-1, 1, m)
            tone = np.sin(sweep(hz * 2 ** (slide * shape + 0.15 * width * np.sin(9 * shape))))
            place(wave, tone * np.hanning(m), at)
            at += m / RATE * 1.25
        at += pause * rng.uniform(0.8, 1.3)
    return wave


def dog(n: int, rng: Rng, hz: float, bark: float, gap: float, hoarse: float) -> Floats:
    """Barks: a voice that jumps up and falls, through an open mouth."""
    wave, at = np.zeros(n), 0.02
    while at < n / RATE:
        m = round(bark * rng.uniform(0.85, 1.15) * RATE)
        u = np.arange(m) / m
        phase = sweep(hz * (0.75 + 0.6 * np.sin(np.pi * np.minimum(1, 1.6 * u)) * np.exp(-u)))
        voice = harmonics(mouth(np.linspace(hz, 13 * hz, 13)), np.ones(m), phase)
        voice += hoarse * voice.std() * rng.standard_normal(m)
        place(wave, voice * np.minimum(1, u / 0.08) * np.exp(-3.5 * u) * np.minimum(1, (1 - u) / 0.1), at)
        at += m / RATE + gap * rng.uniform(0.8, 1.5)
    return wave


def wind(n: int, rng: Rng, hz: float, whistle: float, gust: float, howl: float) -> Floats:
    """Low noise in gusts and a howl whose pitch follows them."""
    strength = 0.5 + 0.5 * drift(n, rng, gust)
    rumble = band(n, rng, 40, hz) * (0.3 + strength)
    narrow = band(n, rng, 1, 25) * np.sin(sweep(whistle * (0.7 + 0.6 * strength)))  # noise around a moving pitch
    return rumble + howl * narrow * strength


def sea(n: int, rng: Rng, period: float, rumble: float, foam_hz: float, depth: float) -> Floats:
    """Waves that rise, break with foam and draw back."""
    turn = (times(n) / period + rng.uniform(0.0, 0.6)) % 1
    low = math.exp(-0.55 * 4)  # what is left of a wave when the next one begins
    rise = np.where(turn < 0.45, low + (1 - low) * (turn / 0.45) ** 2, np.exp(-(turn - 0.45) * 4))
    foam = band(n, rng, foam_hz, 4 * foam_hz) * rise**1.5
    water = band(n, rng, 60, foam_hz) * (1 - depth + depth * rise)
    return foam + rumble * water


def door_knock(n: int, rng: Rng, hz: float, spacing: float, pause: float, hard: float) -> Floats:
    """Two to four knocks on a wooden door, and again after a pause."""
    wave, at = np.zeros(n), 0.02
    wood = [(hz * ratio * rng.uniform(0.95, 1.05), 1 / ratio) for ratio in (1.0, 1.6, 2.4, 3.7)]
    while at < n / RATE:
        for _ in range(int(rng.integers(2, 5))):
            knock = sum((w * ping(f, 0.025 * w + 0.006, 0.15) for f, w in wood), np.zeros(round(0.15 * RATE)))
            knock[:60] += hard * rng.standard_normal(60) * np.hanning(120)[60:]
            place(wave, knock * rng.uniform(0.8, 1.0), at)
            at += spacing * rng.uniform(0.9, 1.1)
        at += pause * rng.uniform(0.9, 1.2)
    return wave


def telephone(n: int, rng: Rng, hz: float, interval: float, trill: float, on: float, off: float) -> Floats:
    """Rings: two bells that a hammer strikes in turn, or two tones in turn."""
    t = times(n)
    side = np.floor(2 * trill * t) % 2
    struck = t * trill * 2 % 1 / (2 * trill)  # seconds since the last stroke
    if rng.random() < 0.5:
        bells = [np.sin(2 * np.pi * hz * r * t) + 0.5 * np.sin(2 * np.pi * hz * 2.63 * r * t) for r in (1, interval)]
        ring = np.where(side == 0, bells[0], bells[1]) * (0.3 + 0.7 * np.exp(-struck / 0.015))
    else:
        ring = np.sin(sweep(hz * interval**side)) + 0.25 * np.sin(3 * sweep(hz * interval**side))
    turn = t % (on + off)
    gate = np.clip(np.minimum(turn / 0.005, (on - turn) / 0.03), 0, 1)
    return ring * gate


def applause(n: int, rng: Rng, hands: float, hz: float, clap: float, near: float) -> Floats:
    """Many hands, each with its own sound, a few of them near."""
    sounds = [burst(rng, hz * rng.uniform(0.6, 1.8), clap * rng.uniform(0.7, 1.4)) for _ in range(16)]
    return strikes(n, rng, hands, sounds) + near * strikes(n, rng, 9.0, sounds[:3])


def alarm(n: int, rng: Rng, hz: float, beep: float, gap: float, pause: float, edge: float) -> Floats:
    """Groups of two to four equal beeps."""
    wave, at, count = np.zeros(n), 0.02, int(rng.integers(2, 5))
    tone = np.sin(2 * np.pi * hz * times(round(beep * RATE)))
    tone += edge * np.sin(3 * 2 * np.pi * hz * times(len(tone)))
    tone *= np.clip(np.minimum(np.arange(len(tone)), np.arange(len(tone))[::-1]) / (0.003 * RATE), 0, 1)
    while at < n / RATE:
        for _ in range(count):
            place(wave, tone, at)
            at += beep + gap
        at += pause
    return wave


# --------------------------------------------------------------------------------------------- ingredients


def times(n: int) -> Floats:
    """Of n samples, in seconds."""
    return np.arange(n) / RATE


def sweep(hz: Floats) -> Floats:
    """The phase of a tone with this frequency at each sample."""
    return 2 * np.pi / RATE * np.cumsum(hz)


def band(n: int, rng: Rng, low_hz: float, high_hz: float) -> Floats:
    """Noise of unit rms between two frequencies, falling by 12 dB an octave outside."""
    size = next_fast_len(n, real=True)
    hz = np.maximum(rfftfreq(size, 1 / RATE), 1e-3)
    gain = 1 / np.sqrt((1 + (low_hz / hz) ** 4) * (1 + (hz / high_hz) ** 4))
    spectrum = np.asarray(rfft(rng.standard_normal(size)))
    noise = np.asarray(irfft(spectrum * gain, size))[:n]
    return noise / noise.std()


def drift(n: int, rng: Rng, hz: float) -> Floats:
    """A smooth curve from -1 to 1 that turns about `hz` times a second."""
    knots = math.ceil(n / RATE * hz * 2) + 2
    values, place = rng.uniform(-1, 1, knots), np.linspace(0, knots - 1, n, endpoint=False)
    at = np.minimum(place.astype(int), knots - 2)
    ease = 0.5 - 0.5 * np.cos(np.pi * (place - at))
    return values[at] * (1 - ease) + values[at + 1] * ease


def ping(hz: float, decay: float, seconds: float) -> Floats:
    """A struck thing of one mode."""
    t = times(round(seconds * RATE))
    return np.sin(2 * np.pi * hz * t) * np.exp(-t / decay)


def burst(rng: Rng, hz: float, seconds: float) -> Floats:
    """A clap: noise around a frequency that dies away."""
    n = round(8 * seconds * RATE)
    return band(n, rng, 0.7 * hz, 1.4 * hz) * np.exp(-times(n) / seconds)


def strikes(n: int, rng: Rng, a_second: float, sounds: list[Floats]) -> Floats:
    """The sounds at random moments and strengths, of unit rms."""
    wave = np.zeros(n)
    for at in rng.uniform(0, n / RATE, max(1, rng.poisson(a_second * n / RATE))):
        place(wave, rng.uniform(0.3, 1.0) * sounds[int(rng.integers(len(sounds)))], at)
    return wave / wave.std()


def mouth(hz: Floats) -> Floats:
    """How well a dog's open mouth lets frequencies pass."""
    return 0.05 + np.exp(-(((hz - 900) / 400) ** 2)) + 0.5 * np.exp(-(((hz - 2100) / 500) ** 2))


def place(wave: Floats, sound: Floats, seconds: float) -> None:
    """Add the sound to the wave from then on, as far as it fits."""
    start = round(seconds * RATE)
    part = sound[: max(0, len(wave) - start)]
    wave[start : start + len(part)] += part


# ------------------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Sound:
    """A recipe and how its parameters vary."""

    recipe: Callable[..., Floats]
    ranges: Mapping[str, Ends]


# fmt: off
SOUNDS = {
    "rain": Sound(rain, dict(
        low_hz=(900, 2000, 2100, 2600), high_hz=(6000, 9500, 5000, 5900), drops=(30, 90, 95, 130),
        patter=(0.5, 0.9, 0.95, 1.1),
    )),
    "siren": Sound(siren, dict(
        low_hz=(450, 650, 660, 750), high_hz=(1000, 1450, 1470, 1650), rate=(0.35, 0.6, 0.61, 0.7),
        bright=(0.3, 0.55, 0.56, 0.62),
    )),
    "clock": Sound(clock, dict(
        period=(0.3, 0.5, 0.51, 0.6), hz=(2500, 4500, 4600, 5400), body_hz=(500, 1000, 1020, 1300),
        lame=(0.0, 0.05, 0.06, 0.1),
    )),
    "engine": Sound(engine, dict(
        hz=(28, 60, 62, 75), rev=(0.05, 0.2, 0.21, 0.3), rough=(0.2, 0.5, 0.52, 0.65), cut_hz=(180, 400, 410, 520),
    )),
    "bird": Sound(bird, dict(
        hz=(2600, 4800, 4900, 5800), width=(0.15, 0.4, 0.41, 0.5), syllable=(0.05, 0.1, 0.101, 0.13),
        pause=(0.2, 0.5, 0.1, 0.19),
    )),
    "dog": Sound(dog, dict(
        hz=(260, 480, 490, 580), bark=(0.15, 0.24, 0.245, 0.29), gap=(0.15, 0.35, 0.36, 0.45),
        hoarse=(0.1, 0.3, 0.31, 0.45),
    )),
    "wind": Sound(wind, dict(
        hz=(150, 320, 325, 420), whistle=(300, 600, 610, 750), gust=(0.3, 0.7, 0.71, 0.9), howl=(0.3, 0.8, 0.81, 1.0),
    )),
    "sea": Sound(sea, dict(
        period=(2.2, 3.8, 3.85, 4.6), rumble=(0.25, 0.5, 0.51, 0.6), foam_hz=(500, 900, 910, 1100),
        depth=(0.5, 0.8, 0.81, 0.9),
    )),
    "door knock": Sound(door_knock, dict(
        hz=(110, 210, 215, 260), spacing=(0.14, 0.24, 0.245, 0.29), pause=(0.35, 0.7, 0.71, 0.85),
        hard=(0.2, 0.6, 0.62, 0.8),
    )),
    "telephone": Sound(telephone, dict(
        hz=(850, 1500, 1510, 1650), interval=(1.15, 1.28, 1.285, 1.35), trill=(9, 14, 14.2, 15.5),
        on=(0.6, 1.2, 1.21, 1.4), off=(0.3, 0.8, 0.22, 0.29),
    )),
    "applause": Sound(applause, dict(
        hands=(70, 180, 185, 240), hz=(1000, 1700, 1720, 2000), clap=(0.004, 0.008, 0.0082, 0.01),
        near=(0.2, 0.5, 0.51, 0.65),
    )),
    "alarm": Sound(alarm, dict(
        hz=(1600, 3200, 3230, 3500), beep=(0.07, 0.14, 0.141, 0.16), gap=(0.05, 0.09, 0.092, 0.11),
        pause=(0.2, 0.45, 0.46, 0.6), edge=(0.0, 0.25, 0.26, 0.35),
    )),
}
# fmt: on
KINDS = tuple(SOUNDS)
