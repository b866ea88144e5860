"""Speech of the synthetic corpus: text to samples, in 19 languages by espeak-ng and in English by two other engines.

espeak-ng is the library in the wheel `espeakng-loader`, called through ctypes. It keeps far more state between two
utterances than its interface can reset (phases, filters, flutter, noise), so every utterance is spoken by a
library that was loaded for it and is unloaded afterwards: that takes a millisecond, five where the voice is found by
its name, and makes the samples a function of the arguments alone.

festival (English for training) and flite (English for tests, never trained on) are Debian's programs, and optional.

Samples are mono float32 [N] at `RATE`, trimmed to `MARGIN` seconds of silence at both ends, at one loudness.
"""

import ctypes
import os
import re
import shutil
import subprocess
import threading
from _ctypes import dlclose
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soxr

from antiphon.audio import Samples, from_pcm16, read_audio
from antiphon.errors import InputError

RATE = 24000  # Hz
MARGIN = 0.05  # seconds of silence that are kept, or added, before and after
LEVEL = 0.08  # rms of what is said, unless a peak would pass PEAK
PEAK = 0.95
AUDIBLE = 1e-3  # a peak below it is no sound
SILENCE = 0.003  # of the loudest sample; what is below at the ends counts as silence

PITCHES = (20, 80)  # the engine's units: 50 is the variant's own
SPEEDS = (120, 210)  # words a minute

# how each language is called and where the engine finds it: a file it opens directly, or a name it has to look up
LANGUAGE_VOICES = {
    "ar": "sem/ar",
    "cmn": "sit/cmn",
    "de": "gmw/de",
    "en-gb": "gmw/en",
    "en-us": "en-us",
    "es": "roa/es",
    "fr": "roa/fr",
    "id": "poz/id",
    "it": "roa/it",
    "ja": "jpx/ja",  # kana only
    "ko": "ko",
    "ms": "poz/ms",
    "nl": "gmw/nl",
    "pt": "roa/pt",
    "pt-br": "pt-br",
    "ru": "zle/ru",
    "th": "tai/th",
    "tr": "trk/tr",
    "ur": "inc/ur",
    "vi": "aav/vi",
    "yue": "sit/yue",
}

# of the wheel's variants those that are understood well and that MFCC statistics tell apart from each other
TRAIN_VARIANTS = (
    "",
    "m1",
    "m2",
    "m3",
    "m4",
    "m7",
    "Alex",
    "Denis",
    "Gene",
    "Mario",
    "max",
    "f1",
    "f2",
    "f3",
    "f4",
    "Annie",
    "belinda",
    "steph",
)
# more of them, for the ear alone: as far from those of the tests as the others are
MORE_VARIANTS = (
    "m5",
    "m6",
    "Andy",
    "Diogo",
    "Henrique",
    "Hugo",
    "Jacky",
    "Marco",
    "RicishayMax2",
    "boris",
    "ed",
    "grandpa",
    "iven2",
    "iven3",
    "marcelo",
    "michel",
    "miguel",
    "norbert",
    "pablo",
    "pedro",
    "sandro",
    "anika",
    "grandma",
    "linda",
    "shelby",
)
HELD_OUT_VARIANTS = ("Lee", "Michael", "quincy", "f5", "Alicia", "Andrea")  # three men, three women; for tests only


@dataclass(frozen=True)
class Voice:
    """How the engine speaks, in every language.

    Raises:
        InputError: a pitch or speed outside `PITCHES` or `SPEEDS`.
    """

    variant: str = ""
    pitch: int = 50
    speed: int = 165

    def __post_init__(self) -> None:
        for name, value, (low, high) in (("pitch", self.pitch, PITCHES), ("speed", self.speed, SPEEDS)):
            if not low <= value <= high:
                raise InputError(f"the {name} of a voice is {value}; give {low} to {high}")


PRESETS = {  # the product's own voices, one speaker each in all languages
    "ethan": Voice("m3", 40, 165),
    "chelsie": Voice("f2", 60, 165),
    "aiden": Voice("m7", 60, 175),
    "serena": Voice("steph", 40, 155),
}


def draw_voice(rng: np.random.Generator, variants: Sequence[str] = TRAIN_VARIANTS) -> Voice:
    """One of the variants at any pitch and speed."""
    variant = variants[int(rng.integers(len(variants)))]
    return Voice(variant, int(rng.integers(PITCHES[0], PITCHES[1] + 1)), int(rng.integers(SPEEDS[0], SPEEDS[1] + 1)))


def say(text: str, language_voice: str, voice: Voice = Voice()) -> Samples:
    """The text spoken as `LANGUAGE_VOICES` says: float32 [N] at `RATE`, the same samples in every process.

    Raises:
        InputError: a language or variant that there is not, an empty text, Japanese with kanji, a text that the engine
            has no sound for, or no engine.
    """
    if language_voice not in LANGUAGE_VOICES:
        raise InputError(f"there is no speech in {language_voice!r}; choose one of {', '.join(LANGUAGE_VOICES)}")
    if voice.variant not in variants():
        raise InputError(f"espeak-ng has no voice variant {voice.variant!r}; it has {', '.join(variants()[1:])}")
    if not text.strip():
        raise InputError("there is no text to say; give at least one word")
    if language_voice == "ja" and (kanji := re.search("[\u3400-\u9fff]", text)):
        raise InputError(f"espeak-ng reads no kanji ({kanji[0]} in {text!r}); give the text in kana")
    samples = _finish(_speak(text, LANGUAGE_VOICES[language_voice], voice), ENGINE_RATE)
    if not samples.size:
        raise InputError(f"espeak-ng has no sound for {text!r} in {language_voice!r}; give words of that language")
    return samples


@cache
def variants() -> tuple[str, ...]:
    """The voice variants of the installed engine; the first, "", is its plain voice."""
    return "", *sorted(os.listdir(os.path.join(_wheel()[1], "voices", "!v")))


def _finish(samples: Samples, rate: int) -> Samples:
    """What is sounding, at RATE, with margins and at the usual level; nothing if there is only silence."""
    samples = soxr.resample(samples, rate, RATE, "VHQ")
    peak = np.abs(samples).max(initial=0)
    if peak < AUDIBLE:
        return samples[:0]
    loud = np.flatnonzero(np.abs(samples) > SILENCE * peak)
    margin = round(MARGIN * RATE)
    samples = np.pad(samples, margin)[loud[0] : loud[-1] + 1 + 2 * margin]
    gain = min(LEVEL / np.sqrt(np.mean(samples[margin:-margin] ** 2)), PEAK / peak)
    return (samples * gain).astype(np.float32)


# ---------------------------------------------------------------------------------- the library espeak-ng

ENGINE_RATE = 22050
SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback before espeak_Synth returns
SPEED, VOLUME, PITCH = 1, 2, 3  # espeak_PARAMETER
UTF8, END_PAUSE = 1, 0x1000  # flags of espeak_Synth
HALF_VOLUME = 50  # at the usual 100, loud variants clip
SEED = 1

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_one_at_a_time = threading.Lock()  # the library's state is the process's


def _speak(text: str, place: str, voice: Voice) -> Samples:
    """What the engine gives, float32 [N] at ENGINE_RATE."""
    pieces: list[bytes] = []

    @CALLBACK
    def take(wave: "ctypes._Pointer[ctypes.c_short]", length: int, _events: int) -> int:
        if wave and length:
            pieces.append(ctypes.string_at(wave, 2 * length))
        return 0

    data = text.encode()
    with _fresh_engine() as engine:
        name = f"{place}+{voice.variant}" if voice.variant else place
        if engine.espeak_SetVoiceByName(name.encode()):
            raise InputError(f"espeak-ng has no voice {name!r}; reinstall the package espeakng-loader")
        for parameter, value in ((SPEED, voice.speed), (PITCH, voice.pitch), (VOLUME, HALF_VOLUME)):
            engine.espeak_SetParameter(parameter, value, 0)
        engine.espeak_SetSynthCallback(take)
        engine.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, UTF8 | END_PAUSE, None, None)
    return from_pcm16(b"".join(pieces))


@contextmanager
def _fresh_engine() -> Iterator[ctypes.CDLL]:
    library, data = _wheel()
    with _one_at_a_time:
        if _is_loaded(library):
            raise InputError("espeak-ng is already in use in this process by other code; say() needs it to itself")
        engine = ctypes.CDLL(library)
        try:
            engine.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), 0)
            engine.espeak_ng_SetRandSeed(ctypes.c_long(SEED))  # it starts from the time of day
            ctypes.CDLL(None).srand(SEED)  # a few variants draw from the C library instead
            yield engine
        finally:
            engine.espeak_Terminate()
            dlclose(engine._handle)


def _is_loaded(library: str) -> bool:
    try:
        dlclose(ctypes.CDLL(library, mode=os.RTLD_NOLOAD)._handle)
    except OSError:
        return False
    return True


def _wheel() -> tuple[str, str]:
    """The paths of the library and of its data."""
    try:
        import espeakng_loader
    except ImportError:
        raise InputError("synthetic speech needs espeak-ng; pip install espeakng-loader") from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


# ----------------------------------------------------------------------------- other engines, for English

FLITE_VOICES = ("awb", "rms", "slt", "kal16")  # a Scot, an American man and woman by statistics, a man by diphones
FLITE = "flite"  # the engine of the tests, as a set of the corpus names it
FESTIVAL_VOICES = ("ked",)  # an American man by diphones; festival's kal would be flite's
KED_HZ = 105.0  # his pitch at 50; it doubles over the scale's 60 steps
KED_WORDS = 165.0  # his words a minute, about

FESTIVAL = """
(voice_ked_diphone)
(define (speak file text stretch pitch)
  (Parameter.set 'Duration_Stretch stretch)
  (set! int_lr_params (list (list 'target_f0_mean pitch) '(target_f0_std 14) '(model_f0_mean 170) '(model_f0_std 34)))
  (utt.save.wave (utt.synth (eval (list 'Utterance 'Text text))) file 'riff))
"""


def flite_say(text: str, voice: str) -> Samples:
    """English by one of `FLITE_VOICES`, float32 [N] at `RATE`; for tests only, so that one engine stays unheard.

    Raises:
        InputError: flite is not installed, a voice that it has not, or no plain English text.
    """
    if voice not in FLITE_VOICES:
        raise InputError(f"flite has no voice {voice!r} that is used here; choose one of {', '.join(FLITE_VOICES)}")
    if not flite_is_installed():
        raise InputError("the speech engine of the tests is not installed; apt-get install flite")
    _check_english(text)
    with TemporaryDirectory() as folder:
        wav = Path(folder, "out.wav")
        _run(["flite", "-voice", voice, "-t", text, "-o", str(wav)])
        return _read(wav, text)


def festival_say(lines: Sequence[tuple[str, Voice]]) -> list[Samples]:
    """English by festival, each line in its voice's pitch and speed, as float32 [N] at `RATE`.

    A call starts the program once, which takes as long as speaking half a minute: give it many lines.

    Raises:
        InputError: festival or its voice is not installed, a variant that is not of `FESTIVAL_VOICES`, or no plain
            English text.
    """
    if not festival_is_installed():
        raise InputError("the second speech engine is not installed; apt-get install festival festvox-kdlpc16k")
    with TemporaryDirectory() as folder:
        wavs = [Path(folder, f"{n}.wav") for n in range(len(lines))]
        script = Path(folder, "say.scm")
        commands = [_festival_command(wav, text, voice) for wav, (text, voice) in zip(wavs, lines, strict=True)]
        script.write_text("\n".join([FESTIVAL, *commands]))
        _run(["festival", "-b", str(script)])
        return [_read(wav, text) for wav, (text, _) in zip(wavs, lines, strict=True)]


def flite_is_installed() -> bool:
    """Whether `flite_say` can speak."""
    return shutil.which("flite") is not None


def festival_is_installed() -> bool:
    """Whether `festival_say` can speak."""
    return shutil.which("festival") is not None and Path("/usr/share/festival/voices/english/ked_diphone").is_dir()


def _festival_command(wav: Path, text: str, voice: Voice) -> str:
    if voice.variant not in FESTIVAL_VOICES:
        raise InputError(f"festival has no voice {voice.variant!r}; choose one of {', '.join(FESTIVAL_VOICES)}")
    _check_english(text)
    quoted = text.replace("\\", " ").replace('"', " ")
    pitch = KED_HZ * 2 ** ((voice.pitch - 50) / (PITCHES[1] - PITCHES[0]))
    return f'(speak "{wav}" "{quoted}" {KED_WORDS / voice.speed:.4f} {pitch:.2f})'


def _check_english(text: str) -> None:
    if not (text.isascii() and any(c.isalnum() for c in text)):
        raise InputError(f"{text!r} is no plain English; give words in the letters a to z")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise InputError(f"{command[0]} failed ({done.stderr.strip()[-200:]}); reinstall it")


def _read(wav: Path, text: str) -> Samples:
    samples, rate = read_audio(wav)
    if not (samples := _finish(samples, rate)).size:
        raise InputError(f"the engine has no sound for {text!r}; give words in English")
    return samples
