"""From recordings to segments of speech: decoded, cut at silence, written as one shard of sound per block.

    block of items ── read_item ──> samples ── silero ──> spans ──> shards/BLOCK.flac, segments/BLOCK.parquet

The table has a row for every recording, so nothing is lost: with its spans, or with the reason why it has none. It is
written last and whole, so a block whose table is there is finished, and who labels it reads the shard alone.

Shapes: R recordings, N samples, T steps of 32 ms.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from antiphon.audio import Samples, from_pcm16, pcm16
from antiphon.files import write_text
from antiphon.scale.sources import Item, digest, first_line, read_item
from antiphon.serve.vad import CONTEXT, RATE, WINDOW, silero_model
from antiphon.train.data import resample
from antiphon.transcripts import cut_at_pauses

BLOCK_ITEMS, BLOCK_BYTES = 64, 64 << 20  # a block is closed by either
SPEECH, SILENCE = 0.5, 0.35  # probabilities from which on it begins, and below which it may end
PAUSE = 0.5  # seconds of silence that end a segment
SHORTEST = 0.2  # seconds of speech that make one
AROUND = 0.15  # seconds that are kept before and after
STEP = WINDOW / RATE  # seconds
CRASHES = 3  # of the process, while it reads a recording, after which that one is left out
TOGETHER, TOGETHER_SECONDS = 16, 3600  # recordings that silero hears at once, at most, and what they may add up to


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, in samples at `RATE`."""

    start: int  # in its recording
    stop: int
    offset: int  # in the shard
    content: str  # digest of its samples


@dataclass(frozen=True)
class Recording:
    """What became of one item."""

    item: str  # its key
    name: str
    audio: str = ""  # digest of its samples
    seconds: float = 0.0
    reason: str = ""  # why it could not be read
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Block:
    """Neighbouring items that are finished together or not at all."""

    name: str
    items: tuple[Item, ...] = ()  # none where the segments are on disk


def blocks_of(items: Sequence[Item], settings: str) -> list[Block]:
    """Items in blocks of up to `BLOCK_ITEMS` or about `BLOCK_BYTES`.

    Where a block ends depends on nothing after it: without those that are finished, the others stay as they are.
    """
    blocks, part = list[Block](), list[Item]()
    for i, item in enumerate(items):
        part.append(item)
        last = i == len(items) - 1
        if last or len(part) == BLOCK_ITEMS or sum(one.size for one in part) >= BLOCK_BYTES:
            blocks.append(Block(digest(settings, *(one.key for one in part))[:16], tuple(part)))
            part = []
    return blocks


def shard_of(out: Path, block: str) -> Path:
    """The sound of a block."""
    return out / "shards" / f"{block}.flac"


def segments_of(out: Path, block: str) -> Path:
    """The table of a block's recordings."""
    return out / "segments" / f"{block}.parquet"


def write_segments(block: Block, out: Path, longest: float) -> list[Recording]:
    """Read and cut the recordings of a block; its shard and its table are on disk afterwards."""
    timer, reading = Timer(), Reading(segments_of(out, block.name).with_suffix(".reading"))
    sounds = [reading.read(item) for item in block.items]
    waves = [sound for sound in sounds if not isinstance(sound, str)]
    spans = iter(speech_spans(waves, longest))
    recordings, pieces, offset = [], list[bytes](), 0
    for item, sound in zip(block.items, sounds, strict=True):
        if isinstance(sound, str):
            recordings.append(Recording(item.key, item.name, reason=sound))
            continue
        segments = []
        for start, stop in next(spans):
            data = pcm16(sound[start:stop])
            segments.append(Segment(start, stop, offset, digest(data)))
            pieces.append(data)
            offset += stop - start
        seconds = len(sound) / RATE
        recordings.append(Recording(item.key, item.name, digest(pcm16(sound)), seconds, "", tuple(segments)))
    if pieces:
        pcm = np.frombuffer(b"".join(pieces), "<i2")
        write_whole(shard_of(out, block.name), lambda part: soundfile.write(part, pcm, RATE, format="FLAC"))
    reading.path.unlink(missing_ok=True)
    usage = timer.usage(sum(r.seconds for r in recordings))
    write_table(segments_of(out, block.name), [asdict(r) for r in recordings], usage)
    return recordings


def read_segments(out: Path, block: str) -> list[Recording]:
    """The recordings of a block that is on disk."""
    rows = read_table(segments_of(out, block))
    return [Recording(**{**row, "segments": tuple(Segment(**s) for s in row["segments"])}) for row in rows]


def read_shard(out: Path, block: str) -> Samples:
    """All sound [N] of a block."""
    return from_pcm16(soundfile.read(str(shard_of(out, block)), dtype="int16")[0].astype("<i2").tobytes())


class Reading:
    """Reads items and keeps on disk which one is being read: what a decoder crashes at is not tried without end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.died: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def read(self, item: Item) -> Samples | str:
        """Samples [N] of an item at `RATE`, or why there are none."""
        times = self.died.get(item.key, 0)
        if times >= CRASHES:
            return f"the process died {times} times while it was read"
        self.died[item.key] = times + 1
        write_text(self.path, json.dumps(self.died))
        sound = _decoded(item)
        self.died[item.key] = times
        return sound


def _decoded(item: Item) -> Samples | str:
    """Samples [N] of an item at `RATE`, or why there are none."""
    try:
        samples, rate = read_item(item)
        return resample(samples, rate, RATE)
    except ImportError:  # not the recording's fault
        raise
    except Exception as error:  # whatever a decoder or a store may raise: the other recordings are still to be heard
        return first_line(error).replace(item.place, "it")


# ------------------------------------------------------------------------------------------------- speech


def speech_spans(waves: Sequence[Samples], longest: float) -> list[list[tuple[int, int]]]:
    """Where somebody speaks in each of the waves [N] at `RATE`: spans of samples, none longer than `longest` s."""
    order = sorted(range(len(waves)), key=lambda i: -len(waves[i]))
    spans: list[list[tuple[int, int]]] = [[] for _ in waves]
    while order:
        count = max(1, min(TOGETHER, TOGETHER_SECONDS * RATE // len(waves[order[0]])))
        part, order = order[:count], order[count:]
        for i, speech in zip(part, speech_probabilities([waves[i] for i in part]), strict=True):
            spans[i] = _cut(waves[i], stretches(speech), longest)
    return spans


def speech_probabilities(waves: Sequence[Samples]) -> list[NDArray[np.float32]]:
    """silero's probability of speech [T] for every `STEP` of waves [N] at `RATE`, which are heard side by side."""
    model = silero_model()
    steps = [-(-len(wave) // WINDOW) for wave in waves]
    sound = np.zeros((len(waves), CONTEXT + max(steps) * WINDOW), np.float32)
    for row, wave in zip(sound, waves, strict=True):
        row[CONTEXT : CONTEXT + len(wave)] = wave
    state, speech = np.zeros((2, len(waves), 128), np.float32), np.zeros((len(waves), max(steps)), np.float32)
    for step in range(max(steps)):
        heard = sound[:, step * WINDOW : step * WINDOW + CONTEXT + WINDOW]
        said, state = model({"input": heard, "state": state, "sr": np.array(RATE)})
        speech[:, step] = np.asarray(said)[:, 0]
    return [row[:count] for row, count in zip(speech, steps, strict=True)]


def stretches(speech: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Steps from which up to which somebody speaks, by the probability [T] of each."""
    found, begun, quiet, pause = list[tuple[int, int]](), -1, 0, round(PAUSE / STEP)
    for step, likely in enumerate([*speech.tolist(), *[0.0] * pause]):
        if begun < 0:
            begun, quiet = (step if likely >= SPEECH else -1), 0
            continue
        quiet = quiet + 1 if likely < SILENCE else 0
        if quiet == pause:
            found.append((begun, step + 1 - pause))
            begun = -1
    return [(start, stop) for start, stop in found if (stop - start) * STEP >= SHORTEST]


def _cut(wave: Samples, found: list[tuple[int, int]], longest: float) -> list[tuple[int, int]]:
    """Stretches as spans of samples with a little around them; long ones are cut where they are quietest."""
    around, spans = round(AROUND * RATE), list[tuple[int, int]]()
    for start, stop in found:
        first, last = max(0, start * WINDOW - around), min(len(wave), stop * WINDOW + around)
        spans += [(first + a, first + b) for a, b in cut_at_pauses(wave[first:last], RATE, longest)]
    return spans


# ------------------------------------------------------------------------------------------------- tables


def write_table(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, str] | None = None) -> None:
    """Write rows as Parquet, whole or not at all; `about` goes beside them."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows)).replace_schema_metadata(about or {})
    write_whole(path, lambda part: pyarrow.parquet.write_table(table, part))


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read().to_pylist()


def read_about(path: Path) -> dict[str, str]:
    """What was written beside the rows of a Parquet file."""
    import pyarrow.parquet

    about = pyarrow.parquet.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in about.items()}


def write_whole(path: Path, write: Callable[[str], None]) -> None:
    """Have `write` make a file, which appears under its name when it is on disk and whole."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        write(str(part))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Usage:
    """What a step of a block took."""

    wall: float = 0.0  # seconds
    core: float = 0.0  # seconds of all threads
    heard: float = 0.0  # seconds of recordings that were worked on
    where: str = ""  # the processor or the GPU
    gpu: bool = False


@dataclass
class Timer:
    """What passes from its making on."""

    device: str = "cpu"
    wall: float = field(default_factory=time.perf_counter)
    core: float = field(default_factory=time.process_time)

    def usage(self, heard: float) -> dict[str, str]:
        """As it is written beside a table."""
        wall, core = time.perf_counter() - self.wall, time.process_time() - self.core
        used = Usage(wall, core, heard, machine(self.device), self.device.startswith("cuda"))
        return {"usage": json.dumps(asdict(used))}


def machine(device: str) -> str:
    """What hours are of: the name of the GPU, or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)
