"""audio.py: sound files and raw samples, the resampler against soxr, log-mel against the released front end.

Levels in dB are powers relative to the signal; `law` is the state contract: pieces give what the whole gives.
"""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from antiphon.audio import (
    HOTTEST,
    MAX_SECONDS,
    LogMel,
    Resampler,
    check_samples,
    from_pcm16,
    load_audio,
    mel_filters,
    normalize,
    pcm16,
    polyphase,
    read_audio,
    write_audio,
)
from antiphon.config import MelConfig
from antiphon.errors import AudioError, CapacityError

MEL = MelConfig(num_mel_bins=128)
PAIRS = [(rate, 16000) for rate in (8000, 11025, 22050, 24000, 44100, 48000, 96000)] + [(16000, 24000), (16000, 16000)]
CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def noise(rows, samples, dtype=torch.float64, seed=0):
    return torch.randn(rows, samples, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 0.1


def stream(box, x, sizes):
    """Outputs of `box` for x [R, N] in pieces of `sizes`, what is left being the last."""
    state = box.init_state(len(x), CPU, x.dtype)
    *pieces, last = x.split([*sizes, x.shape[1] - sum(sizes)], dim=1)
    return [*(box(piece, state) for piece in pieces), box(last, state, final=True)]


def assert_same(found, expected):
    assert found.shape == expected.shape
    if expected.numel():
        worst = ((found - expected).abs().max() / expected.abs().max()).item()
        assert worst <= TOLERANCE[expected.dtype], f"differs by {worst:.1e} of the largest value"


@st.composite
def cuts(draw, longest):
    """Piece sizes, many of them one sample or none, and the length that they and a last piece make."""
    sizes = draw(st.lists(st.one_of(st.sampled_from([0, 1, 1, 2]), st.integers(0, longest // 4)), max_size=12))
    return sizes, sum(sizes) + draw(st.integers(0, longest // 4))


dtypes = st.sampled_from([torch.float64, torch.float32])
law = settings(max_examples=40, deadline=None)


# -------------------------------------------------------------------------------------------------- the law


@law
@given(st.sampled_from(PAIRS), cuts(6000), dtypes)
def test_resampler_law(rates, cut, dtype):
    sizes, length = cut
    x, box = noise(2, length, dtype), Resampler(*rates)
    assert_same(torch.cat(stream(box, x, sizes), 1), box(x))


@law
@given(cuts(6000).filter(lambda cut: cut[1] > MEL.n_fft // 2), dtypes)
def test_log_mel_law(cut, dtype):
    sizes, length = cut
    x, box = noise(2, length, dtype), LogMel(MEL)
    assert_same(torch.cat(stream(box, x, sizes), 1), box(x))


@pytest.mark.parametrize("box", [Resampler(24000, 16000), Resampler(44100, 16000), LogMel(MEL)])
def test_single_samples_and_empty_pieces(box):
    x = noise(1, 1500)
    assert_same(torch.cat(stream(box, x, [1] * 1499), 1), box(x))
    assert_same(torch.cat(stream(box, x, [1] * 1500), 1), box(x))  # the last piece is empty
    assert_same(torch.cat(stream(box, x, [0, 700, 0, 1, 0]), 1), box(x))


@pytest.mark.parametrize("length", [201, 202, 319, 320, 321, 359, 360, 361, 400, 479, 480, 560])
def test_log_mel_law_at_both_reflections(length):
    x, box = noise(1, length), LogMel(MEL)
    assert box(x).shape == (1, length // MEL.hop, MEL.num_mel_bins)
    for first in range(0, length + 1, 7):
        assert_same(torch.cat(stream(box, x, [first]), 1), box(x))


def boxes():
    return [(Resampler(44100, 16000), 44100), (Resampler(16000, 24000), 16000), (LogMel(MEL), 16000)]


@pytest.mark.parametrize(("box", "rate"), boxes())
def test_an_output_given_never_changes(box, rate):
    x, other = noise(1, rate // 4), noise(1, rate // 4, seed=1)
    half = x.shape[1] // 2
    state = box.init_state(1, CPU, x.dtype)
    given_early = box(x[:, :half], state)
    kept = given_early.clone()
    box(other, state, final=True)
    assert torch.equal(given_early, kept)  # nor does it share memory with the state
    for future in (x[:, half:], other):
        whole = box(torch.cat([x[:, :half], future], 1))
        assert_same(given_early, whole[:, : given_early.shape[1]])


@pytest.mark.parametrize(("box", "rate"), boxes())
def test_outputs_come_as_soon_as_their_samples_have(box, rate):
    state = box.init_state(1, CPU, torch.float64)
    heard = given_out = 0
    for piece in noise(1, rate // 2).split(rate // 50, 1):
        heard, given_out = heard + piece.shape[1], given_out + box(piece, state).shape[1]
        if isinstance(box, LogMel):
            assert given_out == (heard - MEL.n_fft // 2) // MEL.hop + 1
        else:
            late = heard / rate - given_out * box.filter.down / box.filter.up / rate
            assert 0 <= late < 0.0155  # the filter's wing and one group


@pytest.mark.parametrize(("box", "rate"), boxes())
def test_rows_are_independent(box, rate):
    x = noise(3, rate // 10)
    together = torch.cat(stream(box, x, [700, 1, 300]), 1)
    for row in range(3):
        assert_same(box(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize(("box", "rate"), boxes())
def test_reset_forgets_one_row_and_views_step_it(box, rate):
    x = noise(2, rate // 10)
    state = box.init_state(2, CPU, x.dtype)
    box(x.flip(1), state)
    state.reset([1])
    with pytest.raises(CapacityError, match="different places"):
        box(x, state)
    assert_same(box(x[1:], state.view(1, 2), final=True), box(x[1:]))
    state.reset()
    assert all(not tensor.any() for tensor in state.tensors().values())
    assert_same(box(x, state, final=True), box(x))


@pytest.mark.parametrize(("box", "rate"), boxes())
def test_a_copy_is_a_fork_and_a_saved_state_resumes(box, rate):
    x = noise(2, rate // 10)
    middle = x.shape[1] // 3
    state = box.init_state(2, CPU, x.dtype)
    first = box(x[:, :middle], state)
    fork, saved = state.copy(), save(state.tensors())
    box(x.flip(1), state)
    resumed = box.init_state(2, CPU, x.dtype)
    resumed.load(load(saved))
    for other in (fork, resumed):
        assert_same(torch.cat([first, box(x[:, middle:], other, final=True)], 1), box(x))


def test_buffers_stay_out_of_checkpoints():
    assert not Resampler(48000, 16000).state_dict()
    assert not LogMel(MEL).state_dict()


# -------------------------------------------------------------------------------------------- the resampler


def level(error, signal):
    """Power of `error` relative to `signal`, in dB."""
    return 10 * np.log10((error**2).mean() / (signal**2).mean())


def fade(t, seconds):
    return 0.5 - 0.5 * np.cos(2 * np.pi * t / seconds)


def sines(t, top, seconds=1.0):
    """Sixty sines up to `top` Hz at the instants t; faded, as an abrupt start has no upper frequency."""
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, 60)
    parts = (np.sin(2 * np.pi * f * t + p) for f, p in zip(np.linspace(20, top, 60), phases, strict=True))
    return sum(parts, np.zeros_like(t)) / 60 * fade(t, seconds)


def band_noise(rate, top):
    spectrum = np.fft.rfft(np.random.default_rng(1).standard_normal(rate))
    spectrum[int(top) :] = 0  # one second: bins are Hz
    return np.fft.irfft(spectrum, rate) * 0.1 * fade(np.arange(rate) / rate, 1.0)


def resampled(x, rates, *sizes):
    return torch.cat(stream(Resampler(*rates), torch.from_numpy(x)[None], sizes), 1)[0].numpy()


@pytest.mark.parametrize("rates", PAIRS[:-1])
def test_resampler_against_the_truth(rates):
    source, target = rates
    top = 0.9 * min(rates) / 2
    y = resampled(sines(np.arange(source) / source, top), rates)
    truth = sines(np.arange(target) / target, top)
    error = level(y - truth, truth)
    assert error < -110, f"{rates}: {error:.1f} dB"


@pytest.mark.parametrize("rates", PAIRS[:-1])
@pytest.mark.parametrize("signal", ["sines", "noise"])
def test_resampler_against_soxr(rates, signal):
    # for ratios with 11025 in them soxr itself droops, 0.006 dB at 0.9 of Nyquist, which is 60 dB from the truth
    source, _ = rates
    top = (0.9 if source % 8000 == 0 else 0.5) * min(rates) / 2
    x = sines(np.arange(source) / source, top) if signal == "sines" else band_noise(source, top)
    expected = soxr.resample(x, *rates, quality="VHQ")
    for way, y in (("whole", resampled(x, rates)), ("streamed", resampled(x, rates, 1, 1000, 3, 2500))):
        error = level(y - expected, expected)
        assert error < -90, f"{rates} {way}: {error:.1f} dB from soxr"


@pytest.mark.parametrize("rates", [(s, t) for s, t in PAIRS if s > t])
def test_what_cannot_be_kept_is_gone(rates):
    source, target = rates
    t = np.arange(source // 2) / source
    tones = np.linspace(target / 2, source / 2, 40)[:, None]
    x = np.sin(2 * np.pi * tones * t + 1) * fade(t, 0.5)
    y = Resampler(*rates)(torch.from_numpy(x)).numpy()
    worst = max(level(row, signal) for row, signal in zip(y, x, strict=True))
    assert worst < -90, f"{rates}: {worst:.1f} dB"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*PAIRS, (44100, 48000), (192000, 11025)]), st.integers(1, 3000))
def test_lengths_are_those_of_soxr(rates, length):
    x = np.zeros(length, np.float32)
    assert Resampler(*rates)(torch.from_numpy(x)[None]).shape[1] == len(soxr.resample(x, *rates))


def test_equal_rates_change_nothing():
    x = noise(2, 1000, torch.float32)
    assert torch.equal(Resampler(16000, 16000)(x), x)
    assert torch.equal(torch.cat(stream(Resampler(16000, 16000), x, [1, 300]), 1), x)


def test_odd_rates_are_cheap_and_close():
    for source in (44101, 47952, 16003, 1001, 383999):
        box = polyphase(source, 16000)
        assert box.taps.numel() < 1e7, source
        assert abs(box.up / box.down * source / 16000 - 1) < 200e-6, source


def test_no_samples_resample_to_none():
    assert Resampler(48000, 16000)(torch.zeros(2, 0)).shape == (2, 0)


# ------------------------------------------------------------------------------------------------- log-mel


def sound(kind, samples):
    rng, t = np.random.default_rng(samples), np.arange(samples) / MEL.sample_rate
    hiss = rng.standard_normal(samples)
    return {
        "noise": 0.1 * hiss,
        "quiet": 1e-5 * hiss,
        "loud": np.clip(2 * hiss, -1, 1),
        "silence": np.zeros(samples),
        "chirp": 0.5 * np.sin(2 * np.pi * (100 * t + 3900 * t**2 / max(t[-1], 1e-9))) + 1e-4 * hiss,
        "late": 0.1 * hiss * (t > t[-1] / 2),
    }[kind].astype(np.float32)


@pytest.fixture(scope="module")
def released():
    extract = WhisperFeatureExtractor(feature_size=MEL.num_mel_bins)

    def features(x):
        found = extract(x, sampling_rate=MEL.sample_rate, padding="longest", truncation=False, return_tensors="pt")
        return found["input_features"].transpose(1, 2)

    return features


@pytest.mark.parametrize("kind", ["noise", "quiet", "loud", "silence", "chirp", "late"])
@pytest.mark.parametrize("samples", [201, 800, 15999, 16000, 16001, 31.7 * MEL.sample_rate])
def test_log_mel_is_the_released_one(kind, samples, released):
    x = sound(kind, int(samples))
    raw = LogMel(MEL)(torch.from_numpy(x)[None])
    expected = released(x)
    assert raw.shape == expected.shape
    assert (normalize(raw, raw.amax()) - expected).abs().max() < 1e-5


def test_peaks_are_per_row_and_later_quiet_changes_nothing():
    x = torch.stack([torch.from_numpy(sound(kind, 16000)) for kind in ("loud", "late")])
    raw = LogMel(MEL)(x.double())
    both = normalize(raw, raw.amax((1, 2), keepdim=True))
    assert_same(both[1], normalize(raw[1], raw[1].amax()))
    assert_same(normalize(raw[0], float(raw[0].max())), both[0])
    assert both[1].min().item() == pytest.approx((raw[1].max().item() - 8 + 4) / 4)  # 80 dB below the peak


@pytest.mark.parametrize("config", [MEL, MelConfig(80), MelConfig(64, sample_rate=24000, n_fft=1024, hop=240)])
def test_mel_filters_are_slaneys(config):
    expected = mel_filter_bank(
        num_frequency_bins=config.n_fft // 2 + 1,
        num_mel_filters=config.num_mel_bins,
        min_frequency=0,
        max_frequency=config.sample_rate / 2,
        sampling_rate=config.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    found = mel_filters(config)
    assert found.dtype == np.float64
    assert np.abs(found - expected.T).max() < 1e-15


@pytest.mark.parametrize("samples", [0, 1, 160, 200])
def test_too_short_to_reflect(samples):
    box = LogMel(MEL)
    with pytest.raises(AudioError, match=r"too short .* 12\.5 ms"):
        box(noise(1, samples))
    state = box.init_state(1, CPU, torch.float64)
    assert box(noise(1, samples), state).shape == (1, 0, MEL.num_mel_bins)  # more may follow
    with pytest.raises(AudioError, match=r"too short .* 12\.5 ms"):
        box(noise(1, 0), state, final=True)


# ------------------------------------------------------------------------------------------- files and samples


@pytest.fixture
def wav(tmp_path):
    def write(samples, rate=16000, name="a.wav", **options):
        soundfile.write(tmp_path / name, samples, rate, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize(("name", "tolerance"), [("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 0.1), ("a.mp3", 0.1)])
def test_read_formats(wav, name, tolerance):
    x = 0.5 * np.sin(2 * np.pi * 440 * np.arange(24000) / 24000)
    samples, rate = read_audio(wav(x, 24000, name))
    assert (samples.dtype, rate, len(samples)) == (np.float32, 24000, 24000)
    assert np.abs(samples - x)[1000:-1000].max() < tolerance


def test_sources_and_channels(wav, monkeypatch):
    x = noise(3, 5000).T.numpy()  # three channels
    path = wav(x, subtype="FLOAT")
    expected = x.astype(np.float32).mean(1)
    data = path.read_bytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    for source in (path, str(path), data, io.BytesIO(data), "-"):
        samples, rate = read_audio(source)
        assert rate == 16000
        np.testing.assert_allclose(samples, expected, atol=1e-7)


def test_streamed_files_have_no_length_in_their_header(wav):
    data = bytearray(wav(np.zeros(1000)).read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    assert len(read_audio(bytes(data))[0]) == 1000


def test_load_resamples(wav):
    path = wav(sines(np.arange(48000) / 48000, 7000), 48000, subtype="FLOAT")
    x = load_audio(path, 16000)
    assert x.dtype == torch.float32
    assert level(x.numpy() - sines(np.arange(16000) / 16000, 7000), x.numpy()) < -90
    assert torch.equal(load_audio(path, 48000), torch.from_numpy(read_audio(path)[0]))


@pytest.mark.parametrize("convert", [lambda x: x, torch.from_numpy, list, lambda x: x.astype(np.float64)])
def test_write_and_read_back(tmp_path, convert):
    x = np.array([0, 0.5, -0.25, 1, -1, 1.5, -3], np.float32)
    write_audio(tmp_path / "a.wav", convert(x), 24000)
    samples, rate = read_audio(tmp_path / "a.wav")
    assert rate == 24000
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    np.testing.assert_allclose(samples, x.clip(-1, 1 - 2**-15), atol=2**-16)
    stream = io.BytesIO()
    write_audio(stream, convert(x), 24000)
    assert stream.getvalue() == (tmp_path / "a.wav").read_bytes()
    assert os.listdir(tmp_path) == ["a.wav"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(AudioError, match=r"a\.wav cannot be written \(No space left on device\)"):
        write_audio(tmp_path / "a.wav", np.zeros(100, np.float32), 16000)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.wav", b"old")]


def test_a_write_goes_through_links_and_into_devices(tmp_path):
    (tmp_path / "link.wav").symlink_to(tmp_path / "real.wav")
    write_audio(tmp_path / "link.wav", np.zeros(10, np.float32), 16000)
    assert (tmp_path / "link.wav").is_symlink()
    assert len(read_audio(tmp_path / "real.wav")[0]) == 10
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_audio(tmp_path / "pipe", np.zeros(10, np.float32), 16000)
    assert len(read_audio(os.read(reader, 1000))[0]) == 10
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("target", ["no/folder/a.wav", "."])
def test_impossible_targets(tmp_path, target):
    with pytest.raises(AudioError, match=r"cannot be written .*; check the folder"):
        write_audio(tmp_path / target, np.zeros(10, np.float32), 16000)
    assert not list(tmp_path.iterdir())


@given(st.binary().map(lambda data: data[: len(data) // 2 * 2]))
def test_pcm16_round_trip(data):
    assert pcm16(from_pcm16(data)) == data


def test_pcm16():
    assert (
        pcm16(np.array([0, 1, -1, 2, -2, 0.5])) == np.array([0, 32767, -32768, 32767, -32768, 16384], "<i2").tobytes()
    )
    with pytest.raises(AudioError, match="3 bytes came"):
        from_pcm16(b"abc")
    with pytest.raises(AudioError, match="NaN"):
        pcm16(np.array([np.nan]))


def test_integers_are_scaled_and_overshoot_is_kept():
    np.testing.assert_array_equal(check_samples(np.array([-32768, 16384], np.int16), 8000), [-1, 0.5])
    np.testing.assert_array_equal(check_samples(torch.tensor([-(2**31), 2**30], dtype=torch.int32), 8000), [-1, 0.5])
    hot = np.array([1.5, -HOTTEST])
    found = check_samples(hot, 8000)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, hot)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([], "is empty"),
        (np.zeros(0, np.int16), "is empty"),
        ([0.0, np.nan], "NaN or infinite"),
        (torch.tensor([0.0, -torch.inf]), "NaN or infinite"),
        (np.array([0.0, 20000.0]), r"reaches 20000 where full scale is 1; divide integer samples .* \(32768"),
        (np.zeros((2, 100)), r"shape \[2, 100\]; average its channels"),
        (np.float32(0), r"shape \[\]"),
        (np.zeros(9, np.uint8), "uint8 samples; give float"),
        ([1, 2, 3], "int64 samples; give float"),
        (np.zeros(9, bool), "bool samples"),
        (np.zeros(9, np.complex64), "complex64 samples"),
        (["a", "b"], "samples; give float"),
        ([[0.0], [0.0, 1.0]], "not an array of numbers"),
        (torch.zeros(9, dtype=torch.bfloat16), "not an array of numbers; give .* float32"),
        (None, r"shape \[\]"),
    ],
)
def test_samples_that_are_no_sound(samples, sentence):
    with pytest.raises(AudioError, match=f"^the call .*{sentence}"):
        check_samples(samples, 16000, name="the call")


@pytest.mark.parametrize("rate", [0, -16000, 999, 384001, 16000.5, "16000", None, True])
def test_impossible_rates(rate):
    for use in (lambda: check_samples([0.0], rate), lambda: Resampler(rate, 16000), lambda: Resampler(16000, rate)):
        with pytest.raises(AudioError, match=r"sample rate of .* from 1000 to 384000"):
            use()


def test_too_long(wav):
    check_samples(np.zeros(1000, np.float32), 1000, max_seconds=1)
    with pytest.raises(AudioError, match="longer than the limit of 1 seconds; cut it"):
        check_samples(np.zeros(1001, np.float32), 1000, max_seconds=1)
    with pytest.raises(AudioError, match=f"longer than the limit of {MAX_SECONDS:g} seconds"):
        read_audio(wav(np.zeros(2401 * 1000, np.int16), 1000, "a.flac"))
    with pytest.raises(AudioError, match=r"a\.wav is longer than the limit of 0\.5 seconds"):
        load_audio(wav(np.zeros(16000)), 16000, max_seconds=0.5)


def test_files_that_are_no_sound(tmp_path, wav):
    def refused(source, sentence):
        with pytest.raises(AudioError, match=sentence):
            read_audio(source)

    refused(tmp_path / "none.wav", r"none\.wav cannot be read \(No such file or directory\); check the path")
    refused(tmp_path, r"cannot be read \(Is a directory\); check the path")
    (tmp_path / "text.wav").write_text("Dear Sir or Madam, " * 50)
    refused(tmp_path / "text.wav", r"text\.wav is not readable sound \(.*\); give a WAV, FLAC, OGG or MP3 file")
    refused(b"", "the audio is not readable sound .*; give a WAV")
    good = wav(noise(1, 16000)[0].numpy())
    refused(good.read_bytes()[:30], "the audio is not readable sound")
    refused(good.rename(tmp_path / "a.raw"), r"a\.raw is not readable sound")
    refused(wav(np.zeros(0)), r"a\.wav is empty")
    refused(wav(np.full(9, np.nan), subtype="FLOAT"), r"a\.wav has samples that are NaN")
    refused(wav(np.full(9, 3e4), subtype="FLOAT"), r"a\.wav reaches 30000")
    refused(wav(np.zeros(9), 500), r"a\.wav has a sample rate of 500")
    refused("nul\0.wav", "null byte")
    refused(io.StringIO("text"), "the audio is not readable sound .*; give a path, bytes or a binary file")
    refused(np.zeros(9), "the audio is not readable sound .*; give a path, bytes or a binary file")
