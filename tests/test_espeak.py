import ctypes
import hashlib
import sys
import threading

import librosa
import numpy as np
import pytest

from antiphon.errors import InputError
from antiphon.train import espeak
from antiphon.train.espeak import (
    FLITE_VOICES,
    HELD_OUT_VARIANTS,
    LANGUAGE_VOICES,
    MORE_VARIANTS,
    PRESETS,
    RATE,
    TRAIN_VARIANTS,
    Voice,
    draw_voice,
    festival_is_installed,
    festival_say,
    flite_is_installed,
    flite_say,
    say,
)

SENTENCES = {  # "today is Monday, the third of October"
    "ar": "اليوم هو يوم الاثنين الثالث من أكتوبر",
    "de": "Heute ist Montag, der dritte Oktober.",
    "en-gb": "Today is Monday, the third of October.",
    "en-us": "Today is Monday, the third of October.",
    "es": "Hoy es lunes, tres de octubre.",
    "fr": "Aujourd'hui c'est lundi, le trois octobre.",
    "id": "Hari ini hari Senin, tiga Oktober.",
    "it": "Oggi è lunedì, tre ottobre.",
    "ja": "きょうは げつようび、じゅうがつ みっか です。",
    "ko": "오늘은 월요일, 시월 삼일입니다.",
    "ms": "Hari ini hari Isnin, tiga Oktober.",
    "nl": "Vandaag is het maandag, drie oktober.",
    "pt": "Hoje é segunda-feira, três de outubro.",
    "pt-br": "Hoje é segunda-feira, três de outubro.",
    "ru": "Сегодня понедельник, третье октября.",
    "th": "วันนี้เป็นวันจันทร์ที่สามตุลาคม",
    "tr": "Bugün pazartesi, üç Ekim.",
    "ur": "آج پیر ہے، تین اکتوبر",
    "vi": "Hôm nay là thứ hai, ngày ba tháng mười.",
    "yue": "今日係星期一，十月三號。",
    "cmn": "今天是星期一，十月三日。",
}


def digest(samples):
    return hashlib.sha256(samples.tobytes()).hexdigest()


def seconds(samples):
    return len(samples) / RATE


def pitch(samples):
    """Median fundamental in Hz of the loud half."""
    rms = librosa.feature.rms(y=samples, frame_length=2048, hop_length=512)[0]
    return np.median(librosa.yin(samples, fmin=50, fmax=500, sr=RATE, hop_length=512)[rms > np.median(rms)])


def timbre(samples):
    """MFCC statistics without the level: what a listener calls the voice, more or less."""
    mfcc = librosa.feature.mfcc(y=samples, sr=RATE, n_mfcc=20)[1:]
    return np.concatenate([mfcc.mean(1), mfcc.std(1)])


@pytest.mark.parametrize("language", LANGUAGE_VOICES)
def test_every_language_speaks(language):
    samples = say(SENTENCES[language], language)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert 1.5 < seconds(samples) < 5
    assert np.abs(samples).max() <= espeak.PEAK + 1e-6
    assert samples.std() > 0.05
    frames = librosa.feature.rms(y=samples, hop_length=480)[0]
    assert np.mean(frames > 0.01) > 0.6  # speech, not a click in silence
    assert not np.array_equal(samples, say(SENTENCES[language], "en-us" if language != "en-us" else "de"))


def test_the_ends_are_trimmed():
    samples = say("Hello.", "en-us")
    loud = np.flatnonzero(np.abs(samples) > espeak.SILENCE * np.abs(samples).max())
    assert loud[0] == round(espeak.MARGIN * RATE)
    assert loud[-1] == len(samples) - 1 - round(espeak.MARGIN * RATE)


@pytest.mark.parametrize("variant", ["", "f2", "steph", "whisper", "klatt", "klatt6"])
def test_what_was_said_before_changes_nothing(variant):
    voice = Voice(variant, 44, 170)
    first = digest(say(SENTENCES["en-us"], "en-us", voice))
    say("Le chat dort.", "fr", Voice("m1", 70, 200))
    ctypes.CDLL(None).srand(7)
    say("42", "ru", Voice("klatt6", 20, 120))
    assert digest(say(SENTENCES["en-us"], "en-us", voice)) == first


def test_another_process_says_the_same(elsewhere):
    for variant in ("", "Annie", "klatt"):
        given = "Guten Tag", "de", Voice(variant)
        assert digest(elsewhere(say, *given)) == digest(say(*given))


def test_threads_take_turns():
    expected, found = digest(say("one two three", "en-us")), []
    threads = [threading.Thread(target=lambda: found.append(digest(say("one two three", "en-us")))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_an_engine_in_use_by_others_is_refused():
    other = ctypes.CDLL(espeak._wheel()[0])
    try:
        with pytest.raises(InputError, match="already in use in this process"):
            say("hello", "en-us")
    finally:
        espeak.dlclose(other._handle)
    assert say("hello", "en-us").size


def test_speed_and_pitch_are_heard():
    slow, fast = (say(SENTENCES["en-us"], "en-us", Voice(speed=speed)) for speed in espeak.SPEEDS)
    assert 1.4 < seconds(slow) / seconds(fast) < 2
    low, high = (pitch(say(SENTENCES["en-us"], "en-us", Voice(pitch=value))) for value in espeak.PITCHES)
    assert high > 1.2 * low


def test_variants_exist_and_are_told_apart():
    heard = TRAIN_VARIANTS + MORE_VARIANTS
    more = range(len(TRAIN_VARIANTS), len(heard))
    chosen = heard + HELD_OUT_VARIANTS
    assert set(chosen) <= set(espeak.variants())
    assert len(set(chosen)) == len(chosen)
    assert len(TRAIN_VARIANTS) >= 12
    assert len(HELD_OUT_VARIANTS) >= 4
    points = np.stack([timbre(say(SENTENCES["en-us"], "en-us", Voice(variant))) for variant in chosen])
    points /= points.std(0)
    apart = np.sqrt(((points[:, None] - points) ** 2).mean(-1)) + 9 * np.eye(len(chosen))
    assert np.delete(np.delete(apart, more, 0), more, 1).min() > 0.3  # of those that are cloned or are like somebody
    assert apart[len(heard) :].min() > 0.5  # no held-out voice is a training voice under another name


def test_presets_are_distinct_training_voices():
    assert {"ethan", "chelsie", "aiden"} < set(PRESETS)
    assert len(PRESETS) >= 4
    assert {voice.variant for voice in PRESETS.values()} <= set(TRAIN_VARIANTS)
    assert len({voice.variant for voice in PRESETS.values()}) == len(PRESETS)


def test_a_drawn_voice_follows_from_the_seed():
    drawn = [draw_voice(np.random.default_rng(seed)) for seed in range(200)]
    assert drawn == [draw_voice(np.random.default_rng(seed)) for seed in range(200)]
    assert {voice.variant for voice in drawn} == set(TRAIN_VARIANTS)
    assert draw_voice(np.random.default_rng(0), HELD_OUT_VARIANTS).variant in HELD_OUT_VARIANTS


@pytest.mark.parametrize(
    ("text", "language", "variant", "sentence"),
    [
        ("hello", "xx", "", r"no speech in 'xx'; choose one of ar, cmn, de"),
        ("hello", "en-us", "zoe", r"no voice variant 'zoe'; it has Alex"),
        ("  \n", "en-us", "", "no text to say"),
        ("...", "en-us", "", r"no sound for '\.\.\.' in 'en-us'"),
        ("きょうは月", "ja", "", "no kanji .*in kana"),
    ],
)
def test_what_cannot_be_said(text, language, variant, sentence):
    with pytest.raises(InputError, match=sentence):
        say(text, language, Voice(variant))


@pytest.mark.parametrize("values", [{"pitch": 19}, {"pitch": 81}, {"speed": 119}, {"speed": 211}])
def test_impossible_voices(values):
    with pytest.raises(InputError, match=r"of a voice is \d+; give \d+ to \d+"):
        Voice(**values)


def test_without_the_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match="pip install espeakng-loader"):
        say("hello", "en-us")


# ----------------------------------------------------------------------------------------- other engines

needs_flite = pytest.mark.skipif(not flite_is_installed(), reason="flite is not installed")
needs_festival = pytest.mark.skipif(not festival_is_installed(), reason="festival is not installed")


@needs_flite
@pytest.mark.parametrize("voice", FLITE_VOICES)
def test_flite(voice):
    samples = flite_say(SENTENCES["en-us"], voice)
    assert samples.dtype == np.float32
    assert 1.5 < seconds(samples) < 5
    assert samples.std() > 0.05
    assert digest(flite_say(SENTENCES["en-us"], voice)) == digest(samples)


@needs_festival
def test_festival():
    text, high, slow = SENTENCES["en-us"], Voice("ked", 80, 165), Voice("ked", 50, 120)
    plain, raised, stretched = festival_say([(text, Voice("ked")), (text, high), (text, slow)])
    assert 1.5 < seconds(plain) < 5
    assert pitch(raised) == pytest.approx(pitch(plain) * 2**0.5, rel=0.15)
    assert seconds(stretched) == pytest.approx(seconds(plain) * 165 / 120, rel=0.1)
    (alone,) = festival_say([(text, slow)])
    assert digest(alone) == digest(stretched)  # what was said before changes nothing
    assert seconds(festival_say([('A "quoted" \\ (word)', slow)])[0]) > 0.5


@needs_flite
@needs_festival
def test_what_the_other_engines_cannot_say():
    with pytest.raises(InputError, match="no voice 'zoe'"):
        flite_say("hello", "zoe")
    with pytest.raises(InputError, match="no voice 'f1'; choose one of ked"):
        festival_say([("hello", Voice("f1"))])
    for text in ("", "...", "café"):
        with pytest.raises(InputError, match="no plain English"):
            flite_say(text, "awb")
        with pytest.raises(InputError, match="no plain English"):
            festival_say([(text, Voice("ked"))])


def test_absent_engines_name_their_packages(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="apt-get install flite"):
        flite_say("hello", "awb")
    with pytest.raises(InputError, match="apt-get install festival festvox-kdlpc16k"):
        festival_say([("hello", Voice("ked"))])
