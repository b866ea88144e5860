"""Sound in and out: files and raw samples, the resampler, and the log-mel that the audio encoder hears.

    file ── read_audio ──┐
    array ─ check_samples┴─> samples ── Resampler ──> 16 kHz ── LogMel ──> raw log-mel ── normalize ──> mel for AuT

`Resampler` and `LogMel` keep the contract of streaming.py. Both are sliding windows with a stride: the state is the
last samples heard and how many there were, and an output is given as soon as its window is full.

Shapes: R rows (one stream each), N and M samples, G groups, T mel frames, F mel bins. Samples are mono, full scale ±1.
"""

import io
import math
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, wraps
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar, cast

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from antiphon.config import MelConfig
from antiphon.convolutions import roll
from antiphon.errors import AudioError
from antiphon.streaming import State, by_row, in_step

Samples = NDArray[np.float32]  # [N]
Method = TypeVar("Method", bound=Callable[..., Tensor])
Source = str | os.PathLike[str] | bytes | BinaryIO  # of a sound file; `-` is standard input

MAX_SECONDS = 2400.0  # 40 minutes, what the paper gives a request
LOWEST_RATE, HIGHEST_RATE = 1000, 384000  # Hz; outside it is a slip of units or a broken header
HOTTEST = 32.0  # floats may overshoot ±1 a little; far beyond it they are integers that nobody scaled
PCM_SCALE = 1 << 15
READ_BLOCK = 1 << 16  # samples per channel decoded at a time


# ------------------------------------------------------------------------------------------- raw samples


def check_samples(samples: Any, rate: int, *, max_seconds: float = MAX_SECONDS, name: str = "the audio") -> Samples:
    """Mono samples from outside (array, tensor or list [N]) as float32 [N], safe to use.

    int16 and int32 are divided by their full scale. Floats are taken as they are, a little beyond ±1 included.

    Raises:
        AudioError: nothing there, not mono, of another dtype, NaN or infinite, floats beyond `HOTTEST`, longer than
            `max_seconds`, or an impossible rate. The sentence calls the audio `name`.
    """
    check_rate(rate, name)
    x = _as_float(samples, name)
    if not x.size:
        raise AudioError(f"{name} is empty; give at least one sample")
    if x.size > max_seconds * rate:
        raise AudioError(f"{name} is longer than the limit of {max_seconds:g} seconds; cut it into shorter parts")
    return x


def check_rate(rate: int, name: str = "the audio") -> None:
    """Raise AudioError unless `rate` is a whole number of Hz that sound is stored at."""
    if not (isinstance(rate, Integral) and LOWEST_RATE <= rate <= HIGHEST_RATE):
        raise AudioError(
            f"{name} has a sample rate of {rate!r}; expected a whole number of Hz from {LOWEST_RATE} to {HIGHEST_RATE}"
        )


def pcm16(samples: Any) -> bytes:
    """16-bit little-endian PCM of samples [N], clipped to full scale; AudioError for samples that are no sound."""
    scaled = np.rint(_as_float(samples, "the audio") * PCM_SCALE)
    return scaled.clip(-PCM_SCALE, PCM_SCALE - 1).astype("<i2").tobytes()


def from_pcm16(data: bytes) -> Samples:
    """Samples float32 [N] of 16-bit little-endian mono PCM; `pcm16` gives the same bytes back.

    Raises:
        AudioError: half a sample at the end.
    """
    if len(data) % 2:
        raise AudioError(f"16-bit PCM takes two bytes a sample and {len(data)} bytes came; send whole samples")
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(PCM_SCALE)


def _as_float(samples: Any, name: str) -> Samples:
    try:
        x = np.asarray(samples.detach().cpu() if isinstance(samples, Tensor) else samples)
    except (TypeError, ValueError):  # a ragged list, or a tensor type that numpy lacks
        raise AudioError(f"{name} is not an array of numbers; give a one-dimensional float32 or int16 array") from None
    if x.ndim != 1:
        raise AudioError(f"{name} has shape {list(x.shape)}; average its channels and give one dimension, [samples]")
    if x.dtype in (np.int16, np.int32):
        return (x / -float(np.iinfo(x.dtype).min)).astype(np.float32)
    if x.size and not np.issubdtype(x.dtype, np.floating):
        raise AudioError(f"{name} holds {x.dtype} samples; give float (full scale 1), int16 or int32 ones")
    if not np.isfinite(x).all():
        raise AudioError(f"{name} has samples that are NaN or infinite; repair or cut them before use")
    if (loudest := np.abs(x).max(initial=0)) > HOTTEST:
        raise AudioError(
            f"{name} reaches {loudest:.6g} where full scale is 1; divide integer samples by their full scale "
            f"({PCM_SCALE} for 16 bits)"
        )
    return x.astype(np.float32, copy=False)


# ------------------------------------------------------------------------------------------------- files


def read_audio(source: Source, *, max_seconds: float = MAX_SECONDS) -> tuple[Samples, int]:
    """Decode a sound file: WAV, FLAC, OGG, MP3 and what else libsndfile knows. Channels are averaged.

    Args:
        source: path, `-` for standard input, the file's bytes, or a binary file object.
        max_seconds: the longest that is accepted; decoding stops there.

    Returns:
        float32 samples [N] and their rate in Hz.

    Raises:
        AudioError: no such file, not a sound file, or sound that `check_samples` refuses.
    """
    name = str(source) if isinstance(source, str | os.PathLike) and source != "-" else "the audio"
    try:
        with _open(source) as file, soundfile.SoundFile(file) as sound:
            rate, length, blocks = sound.samplerate, 0, [np.zeros(0, np.float32)]
            # block by block, as the header's length is not to be trusted: streamed files have none or a wrong one
            while length <= max_seconds * rate and len(block := sound.read(READ_BLOCK, "float32", always_2d=True)):
                length += len(block)
                blocks.append(block.mean(axis=1))
    except OSError as error:
        raise AudioError(f"{name} cannot be read ({error.strerror or error}); check the path") from None
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise AudioError(f"{name} is not readable sound ({reason}); give a WAV, FLAC, OGG or MP3 file") from None
    except (AttributeError, TypeError, ValueError) as error:  # no file at all, a text or closed one, a .raw name
        raise AudioError(f"{name} is not readable sound ({error}); give a path, bytes or a binary file") from None
    return check_samples(np.concatenate(blocks), rate, max_seconds=max_seconds, name=name), rate


def load_audio(source: Source, rate: int, *, max_seconds: float = MAX_SECONDS) -> Tensor:
    """Samples float32 [N] of a sound file at `rate` Hz; the arguments and errors are those of `read_audio`."""
    samples, source_rate = read_audio(source, max_seconds=max_seconds)
    return Resampler(source_rate, rate)(torch.from_numpy(samples)[None])[0]


def write_audio(target: str | os.PathLike[str] | BinaryIO, samples: Any, rate: int) -> None:
    """Write samples [N] as a 16-bit mono WAV file, clipped to full scale.

    A file appears, or takes the place of an old one, only when it is complete.

    Raises:
        AudioError: samples of any length that `check_samples` refuses, or a target that cannot be written.
    """
    pcm = np.frombuffer(pcm16(check_samples(samples, rate, max_seconds=math.inf)), "<i2")
    wav = io.BytesIO()  # so that the target need not seek
    soundfile.write(wav, pcm, rate, format="WAV")
    if not isinstance(target, str | os.PathLike):
        target.write(wav.getvalue())
        return
    path = Path(os.path.realpath(target))  # a link stays and what it points to is replaced
    special = path.exists() and not path.is_file()  # a device or a pipe is written into
    part = path if special else path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(wav.getvalue())
        os.replace(part, path)
    except OSError as error:
        if not special:
            part.unlink(missing_ok=True)
        raise AudioError(f"{target} cannot be written ({error.strerror}); check the folder") from None


def _open(source: Source) -> BinaryIO:
    if isinstance(source, str | os.PathLike) and source != "-":
        return open(source, "rb")
    if isinstance(source, bytes):
        return io.BytesIO(source)
    stream = sys.stdin.buffer if isinstance(source, str | os.PathLike) else source
    return io.BytesIO(stream.read())  # decoders seek, which pipes and uploads cannot


# -------------------------------------------------------------------------------- windows over a stream


@dataclass
class TailState(State):
    """What a window that slides over a stream remembers of it; zeros are the silence before the first sample."""

    tail: Tensor = by_row(0)  # [R, K] the last samples
    heard: Tensor = by_row(0)  # [R] samples in all

    @classmethod
    def empty(cls, rows: int, size: int, device: torch.device, dtype: torch.dtype) -> Self:
        """Before the first sample of `rows` streams, keeping `size` samples of each."""
        tail = torch.zeros(rows, size, device=device, dtype=dtype)
        return cls(tail, torch.zeros(rows, dtype=torch.long, device=device))


class ResamplerState(TailState):
    """The end of what a Resampler has heard."""


class LogMelState(TailState):
    """The end of what a LogMel has heard."""


def exact(compute: Method) -> Method:
    """A method on a tensor that keeps its type also where training computes products in bfloat16."""

    @wraps(compute)
    def run(self: nn.Module, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return compute(self, x, *arguments, **named)

    return cast(Method, run)


def _after_tail(x: Tensor, state: TailState | None, size: int) -> tuple[Tensor, int, int]:
    """The last `size` samples heard and then x, and the number heard before x and after it; moves the state on."""
    if state is None:
        return F.pad(x, (size, 0)), 0, x.shape[1]
    before = in_step(state.heard)
    state.heard += x.shape[1]
    return roll(state.tail, x), before, before + x.shape[1]


# --------------------------------------------------------------------------------------------- resampling

PASS_EDGE = 0.91  # of the lower Nyquist frequency: kept up to here, gone at 1
REJECTION_DB = 110.0
LARGEST_TERM = 2560  # of a ratio: every pair of usual rates is exact (11.025 to 192 kHz is 147 : 2560)


@dataclass(frozen=True)
class Polyphase:
    """A resampling filter laid out so that a window of inputs times `taps` is a group of outputs."""

    taps: Tensor  # float64 [width of the window, up]
    up: int  # outputs in a group
    down: int  # inputs from one window to the next
    left: int  # inputs of a window before the instant of its first output


@lru_cache(maxsize=16)
def polyphase(source_rate: int, target_rate: int) -> Polyphase:
    """Kaiser-windowed sinc between two rates in Hz: linear phase, no delay.

    A ratio with a term above `LARGEST_TERM` gives way to the nearest without, so that no matrix is large. Pairs of
    usual rates are exact; odd ones drift by a few parts per million and, beside a simple ratio (16003 to 16000 Hz),
    by up to 200, like a poor clock.
    """
    if source_rate == target_rate:
        return Polyphase(torch.ones(1, 1, dtype=torch.float64), 1, 1, 0)
    slower, faster = min(source_rate, target_rate), max(source_rate, target_rate)
    small, large = Fraction(slower, faster).limit_denominator(LARGEST_TERM).as_integer_ratio()
    up, down = (small, large) if target_rate < source_rate else (large, small)

    # Kaiser's rules: the length follows from the width of the transition, the shape from the rejection
    nyquist = min(1.0, up / down) / 2  # the lower one, in cycles per input
    transition = (1 - PASS_EDGE) * nyquist
    cutoff = nyquist - transition / 2
    wing = math.ceil((REJECTION_DB - 8) / (2.285 * 2 * math.pi * transition) / 2)  # inputs on either side
    beta = 0.1102 * (REJECTION_DB - 8.7)

    # windows overlap and are copied, so each moves on by about a wing at least
    several = math.ceil(wing / down)
    up, down = up * several, down * several
    width = wing + (up - 1) * down // up + 1 + wing
    away = np.arange(up) * down / up - (np.arange(width)[:, None] - wing)  # from each input to each output
    kaiser = np.i0(beta * np.sqrt(np.clip(1 - (away / wing) ** 2, 0, None))) / np.i0(beta)
    taps = np.where(np.abs(away) <= wing, 2 * cutoff * np.sinc(2 * cutoff * away) * kaiser, 0)
    return Polyphase(torch.from_numpy(taps), up, down, wing)


class Resampler(nn.Module):
    """From `source_rate` to `target_rate` in Hz, aligned in time: N samples become N * target / source, half up.

    An output waits for the 5 ms after it (at 16 kHz: the filter's wing) and for its group, 5 to 10 ms at usual
    rates. This is a matrix product because convolutions on a GPU run in TF32 unless told not to: 60 dB, not 110.

    Raises:
        AudioError: an impossible rate.
    """

    taps: Tensor

    def __init__(self, source_rate: int, target_rate: int) -> None:
        super().__init__()
        check_rate(source_rate, "the resampler's input")
        check_rate(target_rate, "the resampler's output")
        self.filter = polyphase(int(source_rate), int(target_rate))
        self.register_buffer("taps", self.filter.taps, persistent=False)

    def init_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> ResamplerState:
        """Before the first sample of `rows` streams."""
        return ResamplerState.empty(rows, len(self.taps) - 1, device, dtype)

    @exact
    def forward(self, x: Tensor, state: ResamplerState | None = None, final: bool = False) -> Tensor:
        """x [R, N] -> [R, M]; M may be 0 while samples are awaited, and `final` gives the rest."""
        up, down, width = self.filter.up, self.filter.down, len(self.taps)
        x, before, after = _after_tail(x, state, width - 1)
        done, groups = self._full_groups(before), self._full_groups(after)
        total = groups * up
        if final or state is None:
            total = (2 * after * up + down) // (2 * down)
            groups = -(-total // up)
        if groups == done:
            return x.new_zeros(len(x), 0)
        start = width - 1 - before + done * down - self.filter.left  # of the next window, in x
        stop = start + (groups - done - 1) * down + width  # of the last one: silence follows the end of the sound
        x = F.pad(x, (-start, stop - x.shape[1]))
        y = x.unfold(1, width, down) @ self.taps.to(x.dtype)  # [R, G, width] -> [R, G, up]
        return y.flatten(1)[:, : total - done * up]

    def _full_groups(self, heard: int) -> int:
        return max(0, (self.filter.left + heard - len(self.taps)) // self.filter.down + 1)


# ------------------------------------------------------------------------------------------------- log-mel

QUIETEST = 1e-10  # of mel power: log10 goes down to -10
DYNAMIC_RANGE = 8.0  # in log10 of power, 80 dB


def mel_filters(config: MelConfig) -> NDArray[np.float64]:
    """Triangles [F, n_fft // 2 + 1] that sum power into mel bins, each of area 1 over Hz (Slaney's Auditory Toolbox).

    The scale is linear to 1 kHz, 3 mels in 200 Hz, and logarithmic above, 27 mels in a factor of 6.4.
    """
    knee, per_hz, per_log = 1000.0, 3 / 200, 27 / math.log(6.4)
    knee_mel, nyquist = knee * per_hz, config.sample_rate / 2
    mels = np.linspace(0, knee_mel + per_log * math.log(nyquist / knee), config.num_mel_bins + 2)
    corners = np.where(mels < knee_mel, mels / per_hz, knee * np.exp((mels - knee_mel) / per_log))  # Hz
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.linspace(0, nyquist, config.n_fft // 2 + 1)
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return np.maximum(0, triangles) * 2 / (high - low)


def normalize(log_mel: Tensor, peak: Tensor | float) -> Tensor:
    """What AuT hears: raw log-mel of any shape with a floor 80 dB below `peak`, scaled to about ±1.

    `peak`, broadcastable and in the same log10 units, is the loudest value of the whole file, as in the release, or
    in a stream the loudest so far.
    """
    return (log_mel.clamp(min=peak - DYNAMIC_RANGE) + 4) / 4


class LogMel(nn.Module):
    """Samples to raw log10 mel power, one frame per hop: the released front end but for its floor (`normalize`).

    Frame t is centred on sample t * hop, and N samples give N // hop frames. A frame is given half a window after
    its centre; the first and last ones reach past the ends of the sound, where it is reflected.
    """

    filters: Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("filters", torch.from_numpy(mel_filters(config)), persistent=False)

    def init_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LogMelState:
        """Before the first sample of `rows` streams."""
        return LogMelState.empty(rows, self.config.n_fft, device, dtype)

    @exact
    def forward(self, x: Tensor, state: LogMelState | None = None, final: bool = False) -> Tensor:
        """Samples x [R, N] at the config's rate -> raw log-mel [R, T, F]; T may be 0 while samples are awaited.

        Raises:
            AudioError: the sound is not longer than half a window (12.5 ms) and cannot be reflected.
        """
        n_fft, hop, half = self.config.n_fft, self.config.hop, self.config.n_fft // 2
        x, before, after = _after_tail(x, state, n_fft)
        done, frames = self._full_frames(before), self._full_frames(after)
        if final or state is None:
            if after <= half:
                shortest = 1000 * half / self.config.sample_rate
                raise AudioError(f"the clip is too short ({after} samples); it must be longer than {shortest:g} ms")
            frames = after // hop
        if frames == done:
            return x.new_zeros(len(x), 0, self.config.num_mel_bins)
        x = x[:, n_fft - before + done * hop - half :]  # from where the next frame begins
        if (lead := half - done * hop) > 0:  # before the first sample
            x = torch.cat([x[:, lead + 1 : 2 * lead + 1].flip(1), x[:, lead:]], 1)
        span = n_fft + (frames - done - 1) * hop
        x = F.pad(x[:, :span], (0, max(0, span - x.shape[1])), mode="reflect")
        # made at use: in x's own precision it has the release's bits, rounded from float64 it has not
        window = torch.hann_window(n_fft, dtype=x.dtype, device=x.device)
        spectrum = torch.stft(x, n_fft, hop, window=window, center=False, return_complex=True)
        mel = self.filters.to(x.dtype) @ spectrum.abs() ** 2
        return mel.clamp(min=QUIETEST).log10().transpose(1, 2)

    def _full_frames(self, heard: int) -> int:
        # the reflection before the first sample leaves that sample out, so frame 0 needs one more than half a window
        half = self.config.n_fft // 2
        return (heard - half) // self.config.hop + 1 if heard > half else 0
