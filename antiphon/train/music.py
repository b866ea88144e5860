"""Music of the synthetic corpus: a short melody and its closing chord, with labels that can be heard.

    labels ── score ──> notes ── strike or blow, one patch for the piece ──> samples

One note falls on each beat, so onsets tell the tempo; a melody climbs, falls or comes back to where it began; the
chord after it is the tonic triad, which decides between major and minor.

Instruments are physical recipes: what is struck or plucked is a sum of damped modes, what is blown or bowed is a
polynomial in w(t) = brightness(t) exp(i phase(t)), whose k-th power is the k-th harmonic. Their parameters are drawn
for every piece from ranges; the ranges of held-out timbres lie outside those of training, breath apart. Registers
overlap, so it is the timbre that tells an instrument.

Samples are mono float32 [N] at `RATE`, a function of the generator's state and the arguments. Shapes: K harmonics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from antiphon.audio import Samples
from antiphon.errors import InputError

RATE = 24000  # Hz
Timbres = Literal["train", "held-out"]
Floats = NDArray[np.float64]

MODES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # semitones of the scale
DIRECTIONS = ("up", "down", "level")
TEMPOS = (60, 180)  # beats a minute
NOTES = (3, 8)  # of the melody
MELODY_SECONDS = 3.6  # at most, and so fewer notes where the tempo is slow
CHORD_SECONDS = (0.8, 1.1)
LEAD_IN = 0.05  # seconds before the first note
LEVEL = 0.1  # rms, unless a peak would pass PEAK
PEAK = 0.9


@dataclass(frozen=True)
class Music:
    """What a piece is; everything in it can be heard."""

    instrument: str
    tempo: int  # beats, and notes, a minute
    mode: str  # major or minor
    notes: int  # of the melody, the chord not counted
    direction: str  # up, down or level
    tonic: int  # MIDI number of the chord's root
    timbres: Timbres


@dataclass(frozen=True)
class Note:
    """One note of a score: when it starts and how long it sounds in seconds, and its MIDI number."""

    onset: float
    seconds: float
    pitch: int


# ---------------------------------------------------------------------------------------------- composing


def compose(
    rng: np.random.Generator,
    timbres: Timbres = "train",
    *,
    instrument: str | None = None,
    tempo: int | None = None,
    mode: str | None = None,
    notes: int | None = None,
    direction: str | None = None,
) -> tuple[Samples, Music]:
    """A piece of 2 to 5.4 seconds and its labels; those that are not given are drawn.

    Raises:
        InputError: a label that there is not, or more notes than the tempo leaves time for.
    """
    instrument = _label(rng, "instrument", instrument, tuple(INSTRUMENTS))
    mode = _label(rng, "mode", mode, tuple(MODES))
    direction = _label(rng, "direction", direction, DIRECTIONS)
    tempo, notes = _pace(rng, tempo, notes)
    low, high = INSTRUMENTS[instrument].tonics
    music = Music(instrument, tempo, mode, notes, direction, int(rng.integers(low, high + 1)), timbres)
    return render(score(music, rng), instrument, timbres, rng), music


def most_notes(tempo: int) -> int:
    """How many notes a melody may have at a tempo."""
    return min(NOTES[1], int(MELODY_SECONDS * tempo / 60))


def score(music: Music, rng: np.random.Generator) -> list[Note]:
    """The melody, a note on each beat, and on the next beat the three notes of the tonic triad."""
    beat = 60 / music.tempo
    scale = MODES[music.mode]
    melody = [music.tonic + 12 * (d // 7) + scale[d % 7] for d in _degrees(music, rng)]
    line = [Note(LEAD_IN + n * beat, beat, pitch) for n, pitch in enumerate(melody)]
    close, ring = LEAD_IN + music.notes * beat, float(rng.uniform(*CHORD_SECONDS))
    return line + [Note(close, ring, music.tonic + scale[degree]) for degree in (0, 2, 4)]


def _pace(rng: np.random.Generator, tempo: int | None, notes: int | None) -> tuple[int, int]:
    """A tempo and a number of notes that fit together."""
    if tempo is None:
        fitting = [t for t in range(TEMPOS[0], TEMPOS[1] + 1) if (notes or NOTES[0]) <= most_notes(t)]
        tempo = int(rng.choice(fitting or TEMPOS))
    if not TEMPOS[0] <= tempo <= TEMPOS[1]:
        raise InputError(f"the tempo is {tempo}; give {TEMPOS[0]} to {TEMPOS[1]} beats a minute")
    if notes is None:
        notes = int(rng.integers(NOTES[0], most_notes(tempo) + 1))
    if not NOTES[0] <= notes <= most_notes(tempo):
        raise InputError(f"a melody of {notes} notes at tempo {tempo}; give {NOTES[0]} to {most_notes(tempo)} notes")
    return tempo, notes


def _degrees(music: Music, rng: np.random.Generator) -> list[int]:
    """The melody in steps of the scale above the tonic."""
    if music.direction == "level":  # around one note, which begins and ends it
        centre, length = int(rng.choice([0, 2, 4])), music.notes
        between = [centre + (-1) ** n * int(rng.integers(0, 2)) for n in range(length - 2)]
        return [centre, *between, centre]
    climb = np.cumsum([0, *rng.integers(1, 3, music.notes - 1)])
    climb = np.minimum(climb, np.arange(music.notes) + 4)  # within an octave and a half
    return [int(d) for d in (climb if music.direction == "up" else climb[::-1])]


def _label(rng: np.random.Generator, name: str, value: str | None, known: tuple[str, ...]) -> str:
    drawn = known[int(rng.integers(len(known)))]
    if value is not None and value not in known:
        raise InputError(f"there is no {name} {value!r}; choose one of {', '.join(known)}")
    return drawn if value is None else value


# ---------------------------------------------------------------------------------------------- rendering


def render(notes: list[Note], instrument: str, timbres: Timbres, rng: np.random.Generator) -> Samples:
    """The notes played by one instrument in one timbre."""
    patch = draw_patch(instrument, timbres, rng)
    sounds = [(round(note.onset * RATE), patch.play(hertz(note.pitch), note.seconds, rng)) for note in notes]
    mix = np.zeros(max(start + len(sound) for start, sound in sounds))
    for start, sound in sounds:
        loudness = rng.uniform(0.85, 1.15) / np.sqrt(np.mean(sound**2))
        mix[start : start + len(sound)] += loudness * sound
    gain = min(LEVEL / np.sqrt(np.mean(mix**2)), PEAK / np.abs(mix).max())
    return (mix * gain).astype(np.float32)


def hertz(pitch: int) -> float:
    """The frequency of a MIDI number."""
    return 440 * 2 ** ((pitch - 69) / 12)


@dataclass(frozen=True)
class Struck:
    """A string, bar or bell that rings: modes that start together and decay each at its own rate."""

    modes: tuple[float, ...]  # multiples of the fundamental
    slope: float  # mode k starts with k^-slope
    place: float  # of its length where a string is struck or plucked
    stretch: float  # of a stiff string: mode k is sharp by sqrt(1 + stretch k^2)
    decay: float  # of the fundamental at middle C, nepers a second
    damping: float  # more for each multiple of the fundamental
    detune: float  # cents between the two strings of a note
    contact: float  # seconds until the hammer, mallet or finger is off
    knock: float  # its noise
    release: float  # seconds in which the note dies when it is let go

    def play(self, hz: float, seconds: float, rng: np.random.Generator) -> Floats:
        """One note [N]."""
        n = round((seconds + self.release) * RATE)
        k = np.array(self.modes)
        k = k[k * hz < HIGHEST]
        weights = k**-self.slope * np.abs(np.sin(np.pi * k * self.place))
        decays = self.decay * np.sqrt(hz / MIDDLE_C) + self.damping * (k - 1)
        away = k * hz * np.sqrt(1 + self.stretch * k**2)
        string = 2 ** (self.detune / 2400)
        wave = damped(away * string, decays, weights, n)
        wave += 0.5 * damped(away / string, 0.4 * decays, weights, n)  # a second string takes over the sound's end
        t = np.arange(n) / RATE
        knock = self.knock * np.abs(wave).max() * rng.standard_normal(n) * np.exp(-t / KNOCK_SECONDS)
        return (wave * (1 - np.exp(-t / self.contact)) + knock) * let_go(n, self.release)


@dataclass(frozen=True)
class Blown:
    """A wind or bowed instrument, or an organ pipe: harmonics that last as long as the note."""

    harmonics: tuple[float, ...]
    slope: float  # harmonic k has k^-slope
    even: float  # times this if k is even
    body: float  # gain of the instrument's own resonance
    body_hz: float
    dark: float  # how much duller a soft sound is: how the harmonics follow the fundamental's swell
    attack: float  # seconds
    release: float
    vibrato: float  # cents
    tremolo: float  # of the loudness
    rate: float  # of both, Hz
    detune: float  # cents between two ranks of pipes
    breath: float  # noise of air or bow

    def play(self, hz: float, seconds: float, rng: np.random.Generator) -> Floats:
        """One note [N]."""
        n = round((HELD * seconds + self.release) * RATE)
        t = np.arange(n) / RATE
        swell = (1 - np.exp(-t / self.attack)) * let_go(n, self.release)
        wobble = np.sin(2 * np.pi * (self.rate * t + rng.random())) * np.minimum(1, t / WOBBLE_SECONDS)
        phase = 2 * np.pi * hz / RATE * np.cumsum(2 ** (self.vibrato / 1200 * wobble))
        brightness = 1 - self.dark * (1 - swell)
        weights = self._weights(hz)
        wave = harmonics(weights, brightness, phase)
        if self.detune:
            wave += harmonics(weights, brightness, phase * 2 ** (self.detune / 1200))
        air = lfilter([1, -0.9], [1, -0.6], rng.standard_normal(n))  # little of it is low
        return (wave + self.breath * np.abs(wave).max() * air) * swell * (1 + self.tremolo * wobble)

    def _weights(self, hz: float) -> Floats:
        """Of harmonics 1 to K, those that the instrument lacks being zero."""
        k = np.arange(1, min(int(self.harmonics[-1]), int(HIGHEST / hz)) + 1)
        present = np.isin(k, self.harmonics) * np.where(k % 2 == 0, self.even, 1)
        return present * k**-self.slope * (1 + self.body * np.exp(-(((k * hz - self.body_hz) / BODY_WIDTH) ** 2)))


def damped(hz: Floats, decays: Floats, weights: Floats, n: int) -> Floats:
    """The sum of n samples of weight exp(-decay t) sin(2 pi hz t) over all modes; [K], [K], [K] -> [n]."""
    block = 256
    step = (2j * np.pi * hz - decays)[:, None] / RATE
    within = np.exp(step * np.arange(block))  # [K, block]
    starts = weights[:, None] * np.exp(step * block * np.arange(-(-n // block)))  # [K, blocks]
    wave = np.zeros((starts.shape[1], block))
    for start, real, imag in zip(starts, np.real(within).copy(), np.imag(within).copy(), strict=True):
        wave += start.real[:, None] * imag + start.imag[:, None] * real
    return wave.ravel()[:n]


def harmonics(weights: Floats, brightness: Floats, phase: Floats) -> Floats:
    """The sum of weight_k (brightness^k) sin(k phase), by Horner's rule; [K], [n], [n] -> [n]."""
    w = (brightness * np.exp(1j * phase)).astype(np.complex64)
    wave = np.zeros_like(w)
    for weight in weights[::-1]:
        wave += np.float32(weight)
        wave *= w
    return wave.imag.astype(np.float64)


def let_go(n: int, release: float) -> Floats:
    """Ones, and at the end a half cosine down to nothing within `release` seconds."""
    down = min(n, round(release * RATE))
    return np.concatenate([np.ones(n - down), 0.5 + 0.5 * np.cos(np.pi * np.arange(1, down + 1) / down)])


# -------------------------------------------------------------------------------------------- instruments

HIGHEST = 11000.0  # Hz, below which all modes and harmonics stay
MIDDLE_C = 262.0
KNOCK_SECONDS = 0.006
WOBBLE_SECONDS = 0.4  # until vibrato is in full swing
HELD = 0.85  # of a note's time it is blown or bowed, so that a repeated note begins anew
BODY_WIDTH = 400.0  # Hz

STRING = tuple(float(k) for k in range(1, 25))
BAR = (1.0, 3.97, 9.4)  # a marimba's bar, its underside cut so that the second mode is two octaves up
BELL = (0.5, 1.0, 2.0, 2.76, 3.01, 4.12, 5.43, 6.79)  # without a church bell's minor third, which would blur the mode
PIPE = tuple(float(k) for k in range(1, 31))
RANKS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # organ stops from 8 to 1/2 foot

Ends = tuple[float, float, float, float]  # of a parameter: training timbres from, to; held-out timbres from, to


@dataclass(frozen=True)
class Instrument:
    """Where it plays, how it sounds, and what varies from one to the next."""

    tonics: tuple[int, int]  # MIDI numbers
    kind: type[Struck] | type[Blown]
    partials: tuple[float, ...]
    ranges: Mapping[str, Ends]


# fmt: off
INSTRUMENTS = {
    "piano": Instrument((45, 67), Struck, STRING, dict(
        slope=(1.0, 1.4, 1.45, 1.6), place=(0.11, 0.14, 0.085, 0.105), stretch=(0.0002, 0.0005, 0.00055, 0.0008),
        decay=(0.9, 1.6, 1.7, 2.2), damping=(0.25, 0.4, 0.42, 0.55), detune=(0.5, 1.5, 1.7, 2.5),
        contact=(0.002, 0.004, 0.0045, 0.006), knock=(0.05, 0.1, 0.02, 0.04), release=(0.06, 0.12, 0.13, 0.18),
    )),
    "guitar": Instrument((45, 67), Struck, STRING, dict(
        slope=(0.7, 1.0, 0.5, 0.65), place=(0.17, 0.26, 0.28, 0.34), stretch=(0.0, 2e-05, 3e-05, 6e-05),
        decay=(1.8, 2.8, 3.0, 3.6), damping=(0.5, 0.9, 0.95, 1.2), detune=(0.0, 0.2, 0.25, 0.4),
        contact=(0.0003, 0.0008, 0.001, 0.0014), knock=(0.1, 0.2, 0.22, 0.3), release=(0.04, 0.08, 0.1, 0.14),
    )),
    "bass": Instrument((33, 52), Struck, STRING, dict(
        slope=(1.8, 2.3, 2.4, 2.7), place=(0.2, 0.3, 0.32, 0.38), stretch=(0.0, 5e-05, 6e-05, 0.0001),
        decay=(1.0, 1.6, 0.7, 0.95), damping=(1.2, 2.0, 2.1, 2.6), detune=(0.0, 0.2, 0.25, 0.4),
        contact=(0.004, 0.008, 0.009, 0.012), knock=(0.02, 0.05, 0.06, 0.09), release=(0.05, 0.09, 0.1, 0.14),
    )),
    "bell": Instrument((57, 72), Struck, BELL, dict(
        slope=(0.3, 0.6, 0.65, 0.8), place=(0.05, 0.07, 0.075, 0.09), stretch=(0.0, 0.0001, 0.0002, 0.0003),
        decay=(0.8, 1.4, 1.5, 2.0), damping=(0.2, 0.4, 0.45, 0.6), detune=(2.0, 5.0, 6.0, 9.0),
        contact=(0.0003, 0.0006, 0.0007, 0.001), knock=(0.01, 0.03, 0.035, 0.05), release=(0.3, 0.5, 0.52, 0.6),
    )),
    "marimba": Instrument((48, 67), Struck, BAR, dict(
        slope=(1.2, 1.6, 1.7, 2.0), place=(0.2, 0.24, 0.25, 0.29), stretch=(0.0, 0.0001, 0.0002, 0.0003),
        decay=(5.0, 8.0, 8.5, 11.0), damping=(3.0, 6.0, 6.5, 8.0), detune=(0.0, 0.5, 0.6, 1.0),
        contact=(0.001, 0.002, 0.0022, 0.003), knock=(0.04, 0.08, 0.09, 0.12), release=(0.05, 0.09, 0.1, 0.14),
    )),
    "violin": Instrument((50, 69), Blown, PIPE, dict(
        slope=(0.9, 1.2, 0.75, 0.85), even=(0.9, 1.0, 0.8, 0.88), body=(1.5, 3.0, 3.2, 4.5),
        body_hz=(2200, 2900, 3000, 3400), dark=(0.3, 0.5, 0.52, 0.6), attack=(0.025, 0.045, 0.048, 0.065),
        release=(0.06, 0.1, 0.105, 0.13), vibrato=(15, 28, 30, 38), tremolo=(0.02, 0.05, 0.055, 0.08),
        rate=(5.2, 6.2, 6.4, 7.2), detune=(0.0, 0.0, 0.0, 0.0), breath=(0.005, 0.025, 0.005, 0.025),
    )),
    "flute": Instrument((52, 71), Blown, PIPE, dict(
        slope=(2.0, 2.6, 2.7, 3.2), even=(0.6, 0.9, 0.95, 1.1), body=(0.1, 0.3, 0.32, 0.5),
        body_hz=(800, 1200, 1250, 1500), dark=(0.2, 0.4, 0.42, 0.5), attack=(0.02, 0.035, 0.037, 0.05),
        release=(0.05, 0.08, 0.085, 0.11), vibrato=(3, 8, 9, 13), tremolo=(0.04, 0.09, 0.095, 0.13),
        rate=(4.4, 5.4, 5.5, 6.2), detune=(0.0, 0.0, 0.0, 0.0), breath=(0.03, 0.09, 0.03, 0.09),
    )),
    "trumpet": Instrument((50, 69), Blown, PIPE, dict(
        slope=(0.5, 0.8, 0.35, 0.48), even=(0.95, 1.05, 1.06, 1.15), body=(1.5, 2.5, 2.6, 3.5),
        body_hz=(1000, 1400, 1450, 1800), dark=(0.55, 0.75, 0.4, 0.52), attack=(0.012, 0.025, 0.026, 0.035),
        release=(0.04, 0.06, 0.065, 0.09), vibrato=(1, 5, 6, 9), tremolo=(0.0, 0.04, 0.05, 0.08),
        rate=(4.8, 5.8, 5.9, 6.5), detune=(0.0, 0.0, 0.0, 0.0), breath=(0.002, 0.015, 0.002, 0.015),
    )),
    "clarinet": Instrument((48, 69), Blown, PIPE, dict(
        slope=(0.9, 1.2, 0.78, 0.88), even=(0.02, 0.1, 0.105, 0.15), body=(0.3, 0.8, 0.9, 1.3),
        body_hz=(1400, 1800, 1900, 2200), dark=(0.3, 0.5, 0.2, 0.28), attack=(0.015, 0.03, 0.031, 0.04),
        release=(0.04, 0.06, 0.065, 0.09), vibrato=(0.0, 3, 4, 6), tremolo=(0.0, 0.04, 0.05, 0.08),
        rate=(4.8, 5.8, 5.9, 6.5), detune=(0.0, 0.0, 0.0, 0.0), breath=(0.003, 0.02, 0.003, 0.02),
    )),
    "organ": Instrument((45, 67), Blown, RANKS, dict(
        slope=(0.3, 0.6, 0.65, 0.9), even=(0.8, 1.1, 1.15, 1.4), body=(0.0, 0.2, 0.25, 0.4),
        body_hz=(1500, 2500, 2600, 3000), dark=(0.0, 0.1, 0.12, 0.2), attack=(0.006, 0.012, 0.013, 0.02),
        release=(0.02, 0.04, 0.045, 0.07), vibrato=(0.0, 1, 1.5, 3), tremolo=(0.0, 0.03, 0.04, 0.07),
        rate=(5.4, 6.4, 6.5, 7.0), detune=(4, 8, 9, 13), breath=(0.001, 0.008, 0.001, 0.008),
    )),
}
# fmt: on


def draw_patch(instrument: str, timbres: Timbres, rng: np.random.Generator) -> Struck | Blown:
    """One timbre of an instrument.

    Raises:
        InputError: a set of timbres that there is not.
    """
    if timbres not in ("train", "held-out"):
        raise InputError(f"there are no timbres {timbres!r}; choose train or held-out")
    made = INSTRUMENTS[instrument]
    first = 0 if timbres == "train" else 2
    return made.kind(made.partials, **{name: rng.uniform(e[first], e[first + 1]) for name, e in made.ranges.items()})
