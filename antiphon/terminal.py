"""What the commands share: options, the two streams of a terminal, loading with a bar, and an answer as it comes.

Results go to standard output, everything else to standard error. `-` is standard input or output.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, BinaryIO

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from antiphon.audio import pcm16, write_audio
from antiphon.errors import InputError
from antiphon.generate import AudioDelta, Done, Event, Omni, Reply, TextDelta, load
from antiphon.weights import find_checkpoint

say = Console(stderr=True, highlight=False)
SMALL = 1 << 30  # bytes of a checkpoint that is small enough to be held twice as large


class Dtype(StrEnum):
    """Types the weights can be held in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"

    @property
    def torch(self) -> torch.dtype | None:
        """The torch type, None for the one on disk."""
        return None if self is Dtype.auto else getattr(torch, self.value)


Model = Annotated[str, typer.Argument(help="tiny, a checkpoint's folder or a Hub id.", metavar="MODEL")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="tiny, a checkpoint's folder or a Hub id.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights; auto: as on disk, float32 if small on a CPU.")]
VoiceOption = Annotated[str | None, typer.Option(help="Voice; the checkpoint's first by default.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampled speech.")]
WindowOption = Annotated[int | None, typer.Option(help="Seconds the encoder attends over: 1, 2, 4 or 8 (as released).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TextLimit = Annotated[int, typer.Option("--max-text-tokens", min=1, help="Longest answer in text tokens.")]
FrameLimit = Annotated[int, typer.Option("--max-frames", min=1, help="Longest speech in frames of 80 ms.")]


def load_model(model: str, device: str, dtype: Dtype) -> Omni:
    """A checkpoint, with a bar while its weights are read.

    Where no type is asked for, a small one is held in float32 on a CPU, which is faster there than bfloat16.
    """
    wanted, folder = dtype.torch, find_checkpoint(model)
    if wanted is None and device == "cpu" and sum(path.stat().st_size for path in folder.glob("*.safetensors")) < SMALL:
        wanted = torch.float32
    columns = (TextColumn("reading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=say, transient=True) as progress:
        task = progress.add_task("weights", total=None)

        def step(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return load(folder, device, wanted, progress=step)


def play(events: Iterator[Event], output: str | None, shown: bool = True) -> Reply:
    """Print text, if it is to be shown, and write sound as they come; the reply they end with."""
    for event in _written(events, output):
        if isinstance(event, TextDelta) and shown:
            say.print(event.text, end="", markup=False, soft_wrap=True)
        elif isinstance(event, Done):
            if shown:
                say.print()
            return event.reply
    raise InputError("the answer ended early")


def _written(events: Iterator[Event], output: str | None) -> Iterator[Event]:
    """`events`, their sound written on the way: streamed to standard output, or to a file at the end."""
    with _standard_output(output == "-") as stream:
        for event in events:
            if stream is not None and isinstance(event, AudioDelta):
                if event.frame == 0:
                    stream.write(_endless_wav_header(event.sample_rate))
                stream.write(pcm16(event.samples))
                stream.flush()
            if output not in (None, "-") and isinstance(event, Done) and len(event.reply.audio):
                write_audio(output, event.reply.audio, event.reply.sample_rate)
            yield event


@contextmanager
def _standard_output(wanted: bool) -> Iterator[BinaryIO | None]:
    yield sys.stdout.buffer if wanted else None


def _endless_wav_header(rate: int) -> bytes:
    """Header of a 16-bit mono WAV whose length is not known yet, as players of streams accept it."""
    forever = 0xFFFFFFFF
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", forever, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", forever
    )


def check_sound(reply: Reply, output: str | None) -> None:
    """See that there was sound to write to `output`.

    Raises:
        InputError: there was none, so nothing was written; the sentence says why.
    """
    if output is None or len(reply.audio):
        return
    why = "the Talker ended at once" if reply.spoken_ids else "nothing in the answer is said aloud"
    if not reply.sample_rate:
        why = "this checkpoint answers in text"
    place = "standard output" if output == "-" else output
    raise InputError(f"there is no sound, and nothing was written to {place}: {why}")


def report_line(reply: Reply, voice: str) -> None:
    """What an answer cost: tokens, seconds of speech, the voice, the first sound, and milliseconds by phase."""
    t, seconds = reply.timings, len(reply.audio) / reply.sample_rate if reply.sample_rate else 0.0
    parts = [f"{len(reply.text_ids)} text tokens"]
    if seconds:
        parts += [f"{seconds:.2f} s of speech", f"voice {escaped(voice)}"]
        parts += [f"first sound after {1000 * t['first_audio']:.0f} ms", f"RTF {t['total'] / seconds:.2f}"]
    phases = ("aut", "prefill", "thinker", "talker", "mtp", "code2wav")
    parts += [f"{name} {1000 * t[name]:.0f} ms" for name in phases if name in t]
    if reply.finish != "stop":
        parts.append("cut off at the limit" if reply.finish == "length" else reply.finish)
    say.print(" · ".join(parts), soft_wrap=True)


def escaped(text: str) -> str:
    """`text` as the terminal shows it, whatever brackets are in it."""
    return text.replace("[", "\\[")
