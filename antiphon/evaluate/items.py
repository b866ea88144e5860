"""What a set of the field consists of: items that are heard, said or answered, by part of the set.

    folder ── reader ──> {part: items} ── asking ──> what the model made of each ── scoring ──> counts

Readers open no sound: an item knows where it is, and is read when its turn comes. Shapes: N samples.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import soundfile

from antiphon.audio import Samples, check_samples, read_audio
from antiphon.errors import AudioError, InputError

EVERYTHING = 1 << 31  # characters of a field: rows of the field's tables may hold whole transcripts


@dataclass(frozen=True)
class Clip:
    """A sound: a file, a stretch of one in seconds, or what gives the bytes of one."""

    source: Path | Callable[[], bytes]
    start: float = 0.0
    stop: float = math.inf

    @property
    def is_there(self) -> bool:
        """Whether a file is where the set says."""
        return not isinstance(self.source, Path) or self.source.is_file()

    def read(self) -> tuple[Samples, int]:
        """Samples [N], channels averaged, and their rate in Hz.

        Raises:
            AudioError: no such file, not a sound, or no sound between start and stop.
        """
        if not isinstance(self.source, Path):
            return read_audio(self.source())
        if self.start == 0 and math.isinf(self.stop):
            return read_audio(self.source)
        try:
            with soundfile.SoundFile(self.source) as file:
                rate, first = file.samplerate, round(self.start * file.samplerate)
                last = file.frames if math.isinf(self.stop) else min(file.frames, round(self.stop * rate))
                file.seek(min(first, last))
                samples = file.read(max(0, last - first), "float32", always_2d=True).mean(axis=1)
        except (OSError, soundfile.SoundFileError) as error:
            raise AudioError(f"{self.source} is not readable sound ({error}); check the file") from None
        return check_samples(samples, rate, name=str(self.source)), rate

    def digest(self) -> str:
        """SHA-256 of the bytes it is read from, with its stretch."""
        source = self.source
        whole = file_digest(source) if isinstance(source, Path) else hashlib.sha256(source()).hexdigest()
        return f"{whole} {self.start} {self.stop}"


@lru_cache(maxsize=4096)
def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Item:
    """One thing that is asked of a model."""

    name: str  # unique in its part
    task: str  # how it is asked: a key of asking.TASKS
    scored: str  # how the answer counts: a key of scoring.SCORES
    clip: Clip | None  # what is heard, or the recording of a voice to speak in; None where the set lacks it
    text: str = ""  # what is said in it, is to be said, or is the right answer
    language: str | None = None
    group: str = ""  # speaker, artist or track, where the set says: those are what a bootstrap draws
    question: str = ""  # what is asked in writing after the clip
    choices: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    said: str = ""  # what a spoken request says, for those who judge the answer

    @property
    def is_there(self) -> bool:
        """Whether its sound is where the set says."""
        return self.clip is not None and self.clip.is_there


Parts = dict[str, Iterable[Item]]  # items of a set by its parts, in the set's order, read as they are gone through


# ------------------------------------------------------------------------------------- what readers share


def inside(root: Path, *names: str) -> Path:
    """The first of these folders in `root`, or `root` itself: sets are unpacked with and without their own folder."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def heard(name: str, clip: Clip, text: str, language: str | None, group: str = "", scored: str = "errors") -> Item:
    """An utterance to write down."""
    return Item(name, "recognise", scored, clip, text, language, group)


def keyed(path: Path) -> dict[str, str]:
    """Lines of a key, white space and a value, as Kaldi writes them."""
    pairs = (line.split(maxsplit=1) for line in read_lines(path))
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that have something in them.

    Raises:
        InputError: it is not there or is not UTF-8.
    """
    return [line for line in _text(path).split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it is not there or is not JSON.
    """
    try:
        return json.loads(_text(path))
    except ValueError:
        raise InputError(f"{path} is not JSON; download it again") from None


def read_table(
    path: Path, delimiter: str = "\t", columns: Sequence[str] | None = None, quoted: bool = False
) -> Iterator[dict[str, str]]:
    """Rows of a table whose first line names its columns, unless they are given.

    Raises:
        InputError: it is not there.
    """
    csv.field_size_limit(EVERYTHING)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    # not splitlines: sentences of the web have separators of Unicode in them, which end no row
    lines = io.StringIO(_text(path), newline="")
    yield from csv.DictReader(lines, columns, delimiter=delimiter, quoting=quoting, restval="")


def parquet_rows(path: Path) -> Iterator[tuple[dict[str, Any], Callable[[], bytes]]]:
    """Rows of a Parquet file of Hugging Face's form without their sound, and what gives its bytes."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name != "audio"]
    for number in range(file.num_row_groups):
        for place, row in enumerate(file.read_row_group(number, columns=names).to_pylist()):
            yield row, partial(_sound_in, path, number, place)


def _sound_in(path: Path, number: int, place: int) -> bytes:
    return _sounds_in(path, number)[place].as_py()["bytes"]


@lru_cache(maxsize=1)  # rows are gone through in order
def _sounds_in(path: Path, number: int) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path).read_row_group(number, columns=["audio"])["audio"]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError:
        raise InputError(f"there is no file {path}; is the set complete?") from None
    except UnicodeError:
        raise InputError(f"{path} is not UTF-8; download it again") from None
