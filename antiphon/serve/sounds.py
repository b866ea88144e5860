"""Sound on the wire: files that come in, files that go out while they are made, and telephones' bytes.

Shapes: N samples, float32, mono.
"""

from __future__ import annotations

import io
import struct
from typing import Literal

import numpy as np
import soundfile
import torch

from antiphon.audio import Resampler, Samples, from_pcm16, pcm16, read_audio
from antiphon.errors import AudioError, InputError

CHANNELS = 8  # of an upload: a header may claim a thousand, and every block would be as wide
HONEST_RATE = 48000  # Hz: sound of a higher rate may be shorter, so that it takes no more memory
MEDIA = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
ENCODED = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS")}  # libsndfile's names
Wire = Literal["audio/pcm", "audio/pcmu", "audio/pcma"]
TELEPHONE = {"audio/pcmu": "ULAW", "audio/pcma": "ALAW"}
TELEPHONE_RATE, WIRE_RATE = 8000, 24000  # Hz


def decode(data: bytes, seconds: float) -> tuple[Samples, int]:
    """Samples [N] of an uploaded sound file, and their rate.

    Raises:
        AudioError: no sound, longer than `seconds`, or a file that would grow beyond reason.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            channels, rate = sound.channels, sound.samplerate
    except (soundfile.LibsndfileError, TypeError, ValueError):
        return read_audio(data, max_seconds=seconds)  # which knows how to say it
    if channels > CHANNELS:
        raise AudioError(f"the audio has {channels} channels; mix it down to at most {CHANNELS}")
    return read_audio(data, max_seconds=seconds * min(1.0, HONEST_RATE / max(rate, 1)))


class Encoder:
    """A sound file that is made piece by piece; what is done of it can be sent at once.

    Raises:
        InputError: a format that there is not.
    """

    def __init__(self, form: str, rate: int) -> None:
        if form not in MEDIA:
            raise InputError(f"sound is not written as {form!r} here; there are {', '.join(MEDIA)}")
        self.form, self.rate = form, rate
        self._pipe = Pipe()
        self._begun = False
        self._file: soundfile.SoundFile | None = None
        if form in ENCODED:
            kind, subtype = ENCODED[form]
            # without a length, players reckon with the bit rate, so it is kept constant
            steady = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} if form == "mp3" else {}
            self._file = soundfile.SoundFile(self._pipe, "w", rate, 1, subtype, format=kind, **steady)

    def push(self, samples: Samples) -> bytes:
        """Bytes that are certain after these samples [N]."""
        if self._file is not None:
            self._file.write(samples.clip(-1, 1))
            data = self._pipe.taken()
            if self.form == "mp3" and data and not self._begun:
                data = data[mp3_frame_bytes(data, self.rate) :]  # it would state a length, and a wrong one
                self._begun = True
            return data
        head = b"" if self._begun or self.form == "pcm" else endless_wav(self.rate)
        self._begun = True
        return head + pcm16(samples)

    def end(self) -> bytes:
        """The rest."""
        if self._file is not None:
            self._file.close()
        return self._pipe.taken()

    @property
    def complete(self) -> bytes:
        """After the end: the whole file, with a header that knows its length."""
        return self._pipe.getvalue()


def whole_file(form: str, samples: Samples, rate: int) -> bytes:
    """A sound file of samples [N]; its header knows its length.

    Raises:
        InputError: a format that there is not.
    """
    encoder = Encoder(form, rate)
    data = encoder.push(samples) + encoder.end()
    if form in ENCODED:
        return encoder.complete
    return data if form == "pcm" else wav_header(rate, 2 * len(samples)) + data[len(endless_wav(rate)) :]


class Pipe(io.BytesIO):
    """A file for who writes from its beginning to its end; its header, once given away, stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self._taken = 0

    def taken(self) -> bytes:
        """What was written since the last time."""
        data = self.getvalue()[self._taken :]
        self._taken += len(data)
        return data


def mp3_frame_bytes(data: bytes, rate: int) -> int:
    """Bytes of the first frame of an MPEG-2 layer III stream (rates below 32 kHz)."""
    kilobits = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[data[2] >> 4]
    return 72000 * kilobits // rate + (data[2] >> 1 & 1)


def endless_wav(rate: int) -> bytes:
    """Header of a 16-bit mono WAV whose length is not known yet, as players of streams accept it."""
    return wav_header(rate, 0xFFFFFFFF)


def wav_header(rate: int, size: int) -> bytes:
    """Header of a 16-bit mono WAV with so many bytes of sound."""
    whole = min(size + 36, 0xFFFFFFFF)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", size
    )


# ------------------------------------------------------------------------------------------ Realtime's bytes


def wire_rate(form: Wire) -> int:
    """Samples a second of a Realtime format."""
    return TELEPHONE_RATE if form in TELEPHONE else WIRE_RATE


def from_wire(form: Wire, data: bytes) -> Samples:
    """Samples [N] of bytes that a client sent.

    Raises:
        AudioError: half a sample.
    """
    if form == "audio/pcm":
        return from_pcm16(data)
    if not data:
        return np.zeros(0, np.float32)
    with soundfile.SoundFile(io.BytesIO(data), "r", TELEPHONE_RATE, 1, TELEPHONE[form], format="RAW") as sound:
        return np.asarray(sound.read(dtype="float32"), np.float32)


class WireOut:
    """An answer's sound as bytes of a Realtime format, in pieces."""

    def __init__(self, form: Wire, rate: int) -> None:
        self.form: Wire = form
        self._same = rate == wire_rate(form)
        self._resample = Resampler(rate, wire_rate(form))
        self._state = self._resample.init_state(1, torch.device("cpu"), torch.float32)

    def push(self, samples: Samples, final: bool = False) -> bytes:
        """Bytes that are certain after these samples [N]."""
        if self.form == "audio/pcm" and self._same:
            return pcm16(samples)
        x = self._resample(torch.from_numpy(samples)[None], self._state, final)[0].numpy()
        if self.form == "audio/pcm":
            return pcm16(x)
        file = io.BytesIO()
        if len(x):
            soundfile.write(file, x.clip(-1, 1), TELEPHONE_RATE, TELEPHONE[self.form], format="RAW")
        return file.getvalue()
