"""Anyone's recordings as lhotse cuts: LibriSpeech, AISHELL, a Kaldi data directory, a folder of sound files.

    DIR ── its transcripts ──> rows ── lhotse ──> recording, supervision ──> cut ──> PART.jsonl.gz

There is one manifest per part of the corpus, and the audio stays where it is. Rows are read one by one, with the
functions of lhotse's recipes: a recipe as a whole stops at the first row that is not right. Here such rows are left
out and named.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile

from antiphon.errors import InputError
from antiphon.train.world import LANGUAGES

if TYPE_CHECKING:  # at run time lhotse is imported where it is needed: it takes seconds
    from lhotse import Recording, SupervisionSegment
    from lhotse.cut import Cut

    Pair = tuple[Recording, SupervisionSegment]

READERS = 8  # files opened at a time: they wait for disks
NAMED = 5  # rows that a sentence names
NO_LANGUAGE = "none"  # said of sound that is not speech
CODES = {name.lower(): code for code, language in LANGUAGES.items() for name in (code, language.name)} | {
    NO_LANGUAGE: None
}
SOUNDS = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3"})
TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
COLUMNS = "file and text, and language and speaker where they are known"
AISHELL_TEXT = "transcript/aishell_transcript_v0.8.txt"
AISHELL_ID = re.compile(r"BAC\d+(S\d+)W\d+")  # names the folder of the speaker


class BadRow(Exception):
    """A row that cannot be used; its text says why, in a few words."""


@dataclass(frozen=True)
class Row:
    """One utterance that a corpus lists, and how lhotse's manifests of it are made."""

    name: str
    read: Callable[[], Pair]  # raises BadRow


@dataclass(frozen=True)
class Kind:
    """One layout of a corpus on disk."""

    rows: Callable[[Path], dict[str, list[Row]]]  # by part
    expected: str


def prepare(
    kind: str,
    source: Path,
    out: Path,
    *,
    language: str | None = None,
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
    tell: Callable[[str], None] = warnings.warn,
) -> dict[str, Path]:
    """Write the cuts of a corpus to the folder `out`: PART.jsonl.gz per part, in the order of the corpus.

    Args:
        kind: librispeech (its text is put in lower case), aishell, kaldi or folder.
        source: folder of the corpus. Commands in a Kaldi wav.scp are run, as Kaldi does.
        out: made if need be; a manifest of the same name is replaced when the new one is whole.
        language: code or English name for rows that do not say their language; `none` for what is not speech.
        progress: called with a part, its rows done, and all of them.
        tell: called with one sentence per part of which rows are left out.

    Returns:
        Manifest by part.

    Raises:
        InputError: `source` is not laid out as `kind`, a part has no row that can be used, or no such language.
    """
    if kind not in KINDS:
        raise InputError(f"there is no kind of corpus {kind!r}; expected {', '.join(KINDS)}")
    if not source.is_dir():
        raise InputError(f"there is no folder {source}; expected {KINDS[kind].expected}")
    if language is not None and language.lower() not in CODES:
        raise InputError(f"there is no language {language!r}; expected {', '.join(LANGUAGES)} or {NO_LANGUAGE}")
    try:
        parts = {part: rows for part, rows in KINDS[kind].rows(Path(os.path.abspath(source))).items() if rows}
    except UnicodeError:
        raise InputError(f"the transcripts in {source} are not UTF-8; convert them") from None
    if not parts:
        raise InputError(f"there is nothing to prepare in {source}; expected {KINDS[kind].expected}")
    out.mkdir(parents=True, exist_ok=True)
    manifests = {part: out / f"{part}.jsonl.gz" for part in parts}
    for part, rows in parts.items():
        left_out: list[str] = []
        write_cuts(manifests[part], _cuts(rows, language, left_out, partial(progress, part)))
        if left_out:
            tell(f"{part}: {len(left_out)} of {len(rows)} rows are left out: {_first(left_out)}")
    return manifests


def write_cuts(path: Path, cuts: Iterable[Cut]) -> None:
    """Write a manifest, whole or not at all; the same cuts give the same bytes."""
    part = path.with_name(f"{path.name}.part")
    try:
        with (
            part.open("wb") as raw,
            gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
            io.TextIOWrapper(packed, "utf-8") as file,
        ):
            for cut in cuts:
                file.write(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _cuts(
    rows: list[Row], language: str | None, left_out: list[str], progress: Callable[[int, int], None]
) -> Iterator[Cut]:
    """The cuts of the rows that can be used; the others are added to `left_out`, each with its reason."""
    seen: set[str] = set()
    with ThreadPoolExecutor(READERS) as pool:
        for row, cut in zip(rows, pool.map(partial(_cut, language=language), rows), strict=True):
            if isinstance(cut, str) or cut.id in seen:
                left_out.append(f"{row.name} ({cut if isinstance(cut, str) else 'listed twice'})")
            else:
                seen.add(cut.id)
                yield cut
            progress(len(seen) + len(left_out), len(rows))
    if not seen:
        raise InputError(f"none of {len(rows)} rows can be used: {_first(left_out)}")


def _first(names: list[str]) -> str:
    """The first few names in a line."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _cut(row: Row, language: str | None) -> Cut | str:
    """The cut of a row, or why there is none."""
    from lhotse.audio import AudioLoadingError

    try:
        recording, said = row.read()
        _check_end(recording)
        spoken = _code(said.language or language)
    except BadRow as reason:
        return str(reason)
    except (AudioLoadingError, soundfile.SoundFileError, subprocess.CalledProcessError, OSError, UnicodeError):
        return "cannot be read"
    whole = recording.to_cut()  # of one channel, or of several: then they are averaged when they are read
    label = {"label_source": "human", "teacher": None, "score": None}
    text = replace(said, start=0.0, channel=whole.channel, language=spoken, custom=label)
    return replace(whole, id=said.id, start=said.start, duration=said.duration, supervisions=[text])


def _code(language: str | None) -> str | None:
    """Code of a language by code or English name; None for what is not speech."""
    if language is None:
        raise BadRow("no language; give --language")
    if language.lower() not in CODES:
        raise BadRow(f"unknown language {language!r}")
    return CODES[language.lower()]


def _check_end(recording: Recording) -> None:
    """Fail where a file is cut short: its header promises what is not there."""
    source = recording.sources[0]
    if source.type == "file":
        with soundfile.SoundFile(str(source.source)) as file:
            file.seek(recording.num_samples - 1)
            if not len(file.read(1)):
                raise BadRow("cut short")


def _record(place: str | Path, name: str) -> Recording:
    """lhotse's manifest of a sound file, or of what a command (ending in |) writes."""
    from lhotse import Recording

    command = str(place).strip()
    if command.endswith("|"):
        command = command[:-1]
        sound = subprocess.run(command, shell=True, check=True, capture_output=True).stdout
        recording = Recording.from_bytes(sound, name)
        return replace(recording, sources=[replace(recording.sources[0], type="command", source=command)])
    if not Path(place).is_file():
        raise BadRow("no audio")
    return Recording.from_file(place, recording_id=name)


def _utterance(
    name: str,
    record: Callable[[], Recording],
    text: str,
    language: str | None = None,
    speaker: str | None = None,
    start: float = 0.0,
    end: float = math.inf,
) -> Pair:
    """The manifests of an utterance that fills its recording from `start` to `end`, in seconds."""
    from lhotse import SupervisionSegment

    if not text.strip():
        raise BadRow("no text")
    recording = record()
    duration = round(min(end, recording.duration) - start, 8)
    if start < 0 or duration <= 0:
        raise BadRow("no sound at its times")
    said = " ".join(text.split())
    return recording, SupervisionSegment(
        name, recording.id, start, duration, text=said, language=language or None, speaker=speaker or None
    )


def _file(name: str, audio: Path, text: str, language: str | None = None, speaker: str | None = None) -> Pair:
    """The manifests of an utterance that is a whole file."""
    return _utterance(name, partial(_record, audio, name), text, language, speaker)


def _table(path: Path) -> dict[str, str]:
    """Lines of an id and a value, as Kaldi writes them; without the file, nothing."""
    from lhotse.kaldi import load_kaldi_text_file

    table = load_kaldi_text_file(path) if path.is_file() else {}
    return {name: value for name, value in table.items() if name}


# ----------------------------------------------------------------------------------------------- the kinds


def _librispeech(source: Path) -> dict[str, list[Row]]:
    """LibriSpeech or its mini form: PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside the sound."""
    from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH

    inner = source / "LibriSpeech"
    folders = [(inner if inner.is_dir() else source) / part for part in (*LIBRISPEECH, *MINI_LIBRISPEECH)]
    return {folder.name: list(_librispeech_rows(folder)) for folder in folders}


def _librispeech_rows(folder: Path) -> Iterator[Row]:
    from lhotse.recipes.librispeech import parse_utterance

    def read(chapter: Path, line: str) -> Pair:
        if len(line.split()) < 2:
            raise BadRow("no text")
        there = (chapter / f"{line.split()[0]}.flac").is_file()  # where it is not, lhotse logs a line of its own
        pair = parse_utterance(folder, line, {}) if there else None
        if pair is None:
            raise BadRow("no audio")
        return pair[0], pair[1].transform_text(str.lower)

    for transcript in sorted(folder.rglob("*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield Row(line.split()[0], partial(read, transcript.parent, line))


def _aishell(source: Path) -> dict[str, list[Row]]:
    """AISHELL-1: wav/PART/SPEAKER/*.wav and one transcript for all."""
    from lhotse.recipes.aishell import text_normalize

    inner = source / "data_aishell"
    root = inner if inner.is_dir() else source
    texts = {name: text_normalize(text).replace(" ", "") for name, text in _table(root / AISHELL_TEXT).items()}
    listed = defaultdict[str, set[str]](set)  # by speaker: the transcript does not say which part a row is in
    for name in texts:
        if known := AISHELL_ID.fullmatch(name):
            listed[known[1]].add(name)

    def rows(speaker: Path) -> Iterator[Row]:
        for name in sorted({p.stem for p in speaker.glob("*.wav")} | listed[speaker.name]):
            place = speaker / f"{name}.wav"
            yield Row(name, partial(_file, name, place, texts.get(name, ""), "zh", speaker.name))

    parts = ("train", "dev", "test") if texts else ()
    return {part: [r for speaker in _folders(root / "wav" / part) for r in rows(speaker)] for part in parts}


def _folders(place: Path) -> list[Path]:
    return sorted(p for p in place.glob("*") if p.is_dir())


def _kaldi(source: Path) -> dict[str, list[Row]]:
    """A Kaldi data directory, or a folder of them."""
    folders = [source] if (source / "wav.scp").is_file() else sorted(p.parent for p in source.glob("*/wav.scp"))
    return {folder.name: _kaldi_rows(folder) for folder in folders}


def _kaldi_rows(folder: Path) -> list[Row]:
    texts, sounds, segments, speakers, languages = (
        _table(folder / name) for name in ("text", "wav.scp", "segments", "utt2spk", "utt2lang")
    )
    record = cache(_record)  # many segments share a recording

    def read(name: str) -> Pair:
        sound, start, end = name, 0.0, math.inf
        if segments:
            sound, start, end = _segment(segments.get(name, ""))
        place = _near(folder, sounds.get(sound, ""))
        about = texts.get(name, ""), languages.get(name), speakers.get(name)
        return _utterance(name, partial(record, place, sound), *about, start, end)

    return [Row(name, partial(read, name)) for name in dict.fromkeys([*texts, *(segments or sounds)])]


def _segment(line: str) -> tuple[str, float, float]:
    """Recording, start and end in seconds of a line of Kaldi's segments; an end of -1 is that of the recording."""
    try:
        sound, start, end = line.split()
        return sound, float(start), math.inf if float(end) == -1 else float(end)
    except ValueError:
        raise BadRow("no segment" if not line else "unreadable segment") from None


def _near(folder: Path, place: str) -> str:
    """A place in wav.scp: relative ones are looked for in its folder, then where Kaldi does, in the working folder."""
    if place.endswith("|"):
        return place
    return str(folder / place) if (folder / place).is_file() else os.path.abspath(place)


def _folder(source: Path) -> dict[str, list[Row]]:
    """Sound files listed in a table, or each with a text beside it."""
    tables = [source / name for name in TABLES if (source / name).is_file()]
    if len(tables) > 1:
        raise InputError(f"{source} has {' and '.join(table.name for table in tables)}; keep one of them")
    return {source.name: _listed(tables[0]) if tables else _beside(source)}


def _listed(table: Path) -> list[Row]:
    """The rows of a table with columns file and text, and language and speaker where it has them."""
    rows = []
    for about in _read_table(table):
        if not {"file", "text"} <= about.keys():
            raise InputError(f"{table} has columns {', '.join(map(str, about))}; expected {COLUMNS}")
        file, *said = (str(about.get(name) or "").strip() for name in ("file", "text", "language", "speaker"))
        name = str(Path(file).with_suffix("")) if file else "a row without a file"
        rows.append(Row(name, partial(_file, name, table.parent / file, *said)))
    return rows


def _read_table(table: Path) -> list[dict[str, Any]]:
    text = table.read_text(encoding="utf-8-sig")
    if table.suffix != ".jsonl":
        return list(csv.DictReader(io.StringIO(text), delimiter="," if table.suffix == ".csv" else "\t"))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise InputError(f"line {number} of {table} is not an object of JSON; expected {COLUMNS}") from None
    return rows


def _beside(source: Path) -> list[Row]:
    """Sounds and texts anywhere below `source`, paired by their names."""
    files = {p.with_suffix(""): p for p in sorted(source.rglob("*")) if p.suffix.lower() in SOUNDS}
    texts = {p.with_suffix(""): p for p in source.rglob("*.txt")}

    def read(name: str, place: Path) -> Pair:
        text = texts[place].read_text(encoding="utf-8") if place in texts else ""
        return _file(name, files.get(place, place), text)

    places = sorted(files.keys() | texts.keys()) if files else []
    names = [str(place.relative_to(source)) for place in places]
    return [Row(name, partial(read, name, place)) for name, place in zip(names, places, strict=True)]


KINDS: dict[str, Kind] = {
    "librispeech": Kind(_librispeech, "LibriSpeech/dev-clean/84/121123/84-121123.trans.txt and the like"),
    "aishell": Kind(_aishell, f"data_aishell/{AISHELL_TEXT} and data_aishell/wav/train/S0002/*.wav (unpacked)"),
    "kaldi": Kind(_kaldi, "wav.scp, text and utt2spk in it or in the folders below"),
    "folder": Kind(_folder, "sound files, each with a .txt of the same name, or metadata.csv, .tsv or .jsonl"),
}
