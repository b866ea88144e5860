import hashlib

import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.errors import InputError
from antiphon.train import music
from antiphon.train.music import DIRECTIONS, INSTRUMENTS, LEAD_IN, MODES, NOTES, RATE, TEMPOS, Music, compose, score

TIMBRES = ("train", "held-out")


def melody_and_chord(piece, seed):
    notes = score(piece, np.random.default_rng(seed))
    return notes[:-3], notes[-3:]


pieces = st.builds(
    lambda tempo, notes, mode, direction, tonic: Music(
        "piano", tempo, mode, min(notes, music.most_notes(tempo)), direction, tonic, "train"
    ),
    st.integers(*TEMPOS),
    st.integers(*NOTES),
    st.sampled_from(tuple(MODES)),
    st.sampled_from(DIRECTIONS),
    st.integers(33, 72),
)


@settings(max_examples=200, deadline=None)
@given(pieces, st.integers(0, 2**32))
def test_the_score_says_what_the_labels_say(piece, seed):
    melody, chord = melody_and_chord(piece, seed)
    onsets = np.array([note.onset for note in melody] + [chord[0].onset])
    assert len(melody) == piece.notes
    np.testing.assert_allclose(60 / np.diff(onsets), piece.tempo, rtol=1e-9)
    third = 4 if piece.mode == "major" else 3
    assert [note.pitch - piece.tonic for note in chord] == [0, third, 7]
    assert {note.onset for note in chord} == {chord[0].onset}
    in_scale = {(piece.tonic + step) % 12 for step in MODES[piece.mode]}
    assert {note.pitch % 12 for note in melody} <= in_scale
    steps = np.diff([note.pitch for note in melody])
    if piece.direction == "up":
        assert (steps > 0).all()
    elif piece.direction == "down":
        assert (steps < 0).all()
    else:
        assert steps.sum() == 0
        assert np.abs(np.cumsum(steps)).max() <= 2
    assert max(note.pitch for note in melody) - piece.tonic < 24


def heard_tempo(samples):
    """Beats a minute by the autocorrelation of rises in log energy, 40 mel bands."""
    mel = librosa.feature.melspectrogram(y=samples, sr=RATE, n_fft=1024, hop_length=120, n_mels=40)
    log = np.log(mel + 1e-4 * mel.max())
    rise = np.maximum(0, log[:, 6:] - log[:, :-6]).mean(0)
    shared = librosa.autocorrelate(rise - rise.mean())
    frames = RATE / 120 * 60
    first, last = int(frames / TEMPOS[1] * 0.96), int(frames / TEMPOS[0] * 1.04)
    return frames / (first + np.argmax(shared[first:last]))


def heard_mode(samples, piece):
    """The stronger third of the chord."""
    close = round((LEAD_IN + piece.notes * 60 / piece.tempo) * RATE)
    chroma = librosa.feature.chroma_stft(y=samples[close:], sr=RATE, n_fft=8192, tuning=0).sum(1)
    return "major" if chroma[(piece.tonic + 4) % 12] > chroma[(piece.tonic + 3) % 12] else "minor"


@pytest.mark.parametrize("timbres", TIMBRES)
@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_labels_are_heard(instrument, timbres):
    tempos, modes = [], []
    for seed in range(6):
        samples, piece = compose(np.random.default_rng(seed), timbres, instrument=instrument)
        assert (piece.instrument, piece.timbres) == (instrument, timbres)
        assert samples.dtype == np.float32
        assert 1.8 < len(samples) / RATE < 5.5
        assert np.abs(samples).max() <= music.PEAK + 1e-6
        assert 0.05 < samples.std() <= music.LEVEL * 1.01
        beats = heard_tempo(samples) / piece.tempo * np.array([1, 2])  # half the tempo is the same beat
        tempos.append(np.abs(beats - 1).min() < 0.04)
        modes.append(heard_mode(samples, piece) == piece.mode)
    assert np.mean(modes) == 1
    assert np.mean(tempos) >= 5 / 6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions_are_heard(direction):
    for seed in range(5):
        samples, piece = compose(np.random.default_rng(seed), instrument="clarinet", direction=direction)
        beat = 60 / piece.tempo
        middles = [LEAD_IN + (n + 0.5) * beat for n in (0, piece.notes - 1)]
        first, last = (
            np.median(
                librosa.yin(samples[round((t - 0.12) * RATE) :][: round(0.24 * RATE)], fmin=100, fmax=1200, sr=RATE)
            )
            for t in middles
        )
        semitones = 12 * np.log2(last / first)
        assert {"up": semitones > 0.8, "down": semitones < -0.8, "level": abs(semitones) < 0.5}[direction]


def test_registers_overlap():
    low = max(i.tonics[0] for name, i in INSTRUMENTS.items() if name != "bass")
    high = min(i.tonics[1] for name, i in INSTRUMENTS.items() if name != "bass")
    assert high - low >= 8
    assert INSTRUMENTS["bass"].tonics[1] > min(i.tonics[0] for name, i in INSTRUMENTS.items() if name != "bass")


def test_held_out_timbres_never_occur_in_training():
    for instrument in INSTRUMENTS.values():
        for name, (low, high, held_low, held_high) in instrument.ranges.items():
            unused = low == high == held_low == held_high == 0
            assert unused or name == "breath" or high < held_low or held_high < low, name


def test_given_labels_are_kept_and_others_drawn():
    _, piece = compose(np.random.default_rng(0), instrument="bell", tempo=150, mode="minor", notes=8, direction="down")
    assert (piece.instrument, piece.tempo, piece.mode, piece.notes, piece.direction) == (
        "bell",
        150,
        "minor",
        8,
        "down",
    )
    drawn = [compose(np.random.default_rng(seed), notes=8)[1] for seed in range(10)]
    assert {piece.notes for piece in drawn} == {8}
    assert len({piece.tempo for piece in drawn}) > 3


def digest(seed):
    samples, piece = compose(np.random.default_rng(seed), "held-out")
    return hashlib.sha256(samples.tobytes() + repr(piece).encode()).hexdigest()


def test_another_process_plays_the_same(elsewhere):
    found = [elsewhere(digest, seed) for seed in range(6)]
    assert found == [digest(seed) for seed in range(6)]
    assert len(set(found)) == 6


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"instrument": "lute"}, "no instrument 'lute'; choose one of piano"),
        ({"mode": "dorian"}, "no mode 'dorian'; choose one of major, minor"),
        ({"direction": "left"}, "no direction 'left'"),
        ({"tempo": 59}, "tempo is 59; give 60 to 180"),
        ({"tempo": 60, "notes": 8}, "8 notes at tempo 60; give 3 to 3 notes"),
        ({"notes": 9}, "9 notes at tempo"),
        ({"notes": 2}, "2 notes at tempo"),
        ({"timbres": "test"}, "no timbres 'test'; choose train or held-out"),
    ],
)
def test_what_cannot_be_played(labels, sentence):
    with pytest.raises(InputError, match=sentence):
        compose(np.random.default_rng(0), **labels)
