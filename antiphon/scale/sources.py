"""Where recordings come from: folders, lhotse manifests, tar and Parquet shards, on a disk or any fsspec store.

    SOURCE ── find_items ──> items ── read_item ──> samples [N], rate

Finding lists names and sizes and reads no sound. An item that cannot be read is found all the same: whoever reads it
learns why.

Shapes: N samples.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from antiphon.audio import Samples, check_samples, read_audio
from antiphon.errors import InputError
from antiphon.train.data import read_manifest, read_sound, store_of

SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".rf64")
MANIFESTS = (".jsonl", ".jsonl.gz")
COLUMNS = ("audio", "bytes", "wav", "flac", "mp3", "ogg", "opus")  # of Parquet, that may hold encoded sound
LONGEST = 4 * 3600.0  # seconds of one recording: it is held in memory
REASON = 300  # characters of why something cannot be read: some libraries tell everything they know
EXPECTED = "a folder, a .jsonl or .jsonl.gz of lhotse cuts or recordings, a .tar, a .parquet or a sound file"


@dataclass(frozen=True)
class Item:
    """One recording, not read yet."""

    name: str  # what manifests and lists call it
    place: str  # URL of the file it is in
    kind: str  # file, tar, parquet, cut, or unreadable
    inside: str = ""  # offset:size in a tar, group:row:column in Parquet, a cut as JSON, why it is unreadable
    size: int = 0  # bytes, about
    stamp: str = ""  # changes with the file

    @property
    def key(self) -> str:
        """Tells it from every other item, and from what it was before its file changed."""
        return digest(self.name, self.place, self.inside, self.stamp)


def digest(*parts: str | bytes | int) -> str:
    """128 bits of SHA-256 over parts, as hexadecimal; where one part ends and the next begins counts."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:32]


def find_items(sources: Iterable[str]) -> list[Item]:
    """All recordings of the sources, in their order; of a folder, by name. What is named twice is found once.

    Raises:
        InputError: a source that is not there, is of no known form, or has no recording in it.
    """
    items: dict[str, Item] = {}
    for source in sources:
        found = list(_found(source))
        if not found:
            raise InputError(f"there is no recording in {source}; expected {EXPECTED}")
        items |= {item.name: item for item in found}
    return list(items.values())


def _found(source: str) -> Iterator[Item]:
    store, path = store_of(source)
    if not store.exists(path):
        raise InputError(f"there is no {source}; expected {EXPECTED}")
    if store.isdir(path):
        for name, about in sorted(store.find(path, detail=True).items()):
            if name.lower().endswith((*SOUNDS, ".tar", ".parquet")):
                yield from _inside(store, name, about)
    elif path.lower().endswith(MANIFESTS):
        yield from _cuts(store, path)
    elif path.lower().endswith((*SOUNDS, ".tar", ".parquet")):
        yield from _inside(store, path, store.info(path))
    else:
        raise InputError(f"{source} is of no known form; expected {EXPECTED}")


def _inside(store: Any, path: str, about: dict[str, Any]) -> Iterator[Item]:
    """The recordings in one file."""
    place, stamp, size = store.unstrip_protocol(path).removeprefix("file://"), _stamp(about), int(about["size"])
    try:
        if path.lower().endswith(".tar"):
            yield from _members(store, path, place, stamp)
        elif path.lower().endswith(".parquet"):
            yield from _rows(store, path, place, stamp)
        else:
            yield Item(place, place, "file", size=size, stamp=stamp)
    except (tarfile.TarError, OSError, ValueError) as error:  # pyarrow's errors are among these
        yield Item(place, place, "unreadable", first_line(error), size, stamp)


def _members(store: Any, path: str, place: str, stamp: str) -> Iterator[Item]:
    with store.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.isfile() and member.name.lower().endswith(SOUNDS):
                inside = f"{member.offset_data}:{member.size}"
                yield Item(f"{place}#{member.name}", place, "tar", inside, member.size, stamp)


def _rows(store: Any, path: str, place: str, stamp: str) -> Iterator[Item]:
    import pyarrow.parquet

    with store.open(path, "rb") as file:
        about = pyarrow.parquet.ParquetFile(file)
        column = next((name for name in COLUMNS if name in about.schema_arrow.names), None)
        if column is None:
            known = ", ".join(about.schema_arrow.names)
            raise ValueError(f"has columns {known}; expected encoded sound in one of {', '.join(COLUMNS)}")
        for group in range(about.metadata.num_row_groups):
            part = about.metadata.row_group(group)
            for row in range(part.num_rows):
                size = part.total_byte_size // part.num_rows
                yield Item(f"{place}#{group}.{row}", place, "parquet", f"{group}:{row}:{column}", size, stamp)


def _cuts(store: Any, path: str) -> Iterator[Item]:
    """The cuts of a manifest."""
    place, stamp = store.unstrip_protocol(path).removeprefix("file://"), _stamp(store.info(path))
    try:
        cuts = read_manifest(place)
    except InputError as error:
        yield Item(place, place, "unreadable", first_line(error), stamp=stamp)
        return
    for cut in cuts:
        name = f"{place}#{cut.id}"
        if not cut.has_recording:
            yield Item(name, place, "unreadable", "the cut has no recording", stamp=stamp)
            continue
        about = json.dumps(cut.to_dict(), ensure_ascii=False, sort_keys=True)
        yield Item(name, place, "cut", about, round(cut.duration * cut.sampling_rate * 2), stamp)


def read_item(item: Item) -> tuple[Samples, int]:
    """Mono samples [N] of a recording, and their rate.

    Raises:
        AudioError: it is no sound. Whatever else its store, its container or its decoder raises.
    """
    if item.kind == "unreadable":
        raise InputError(item.inside)
    if item.kind == "cut":
        from lhotse.cut.set import deserialize_cut

        cut: Any = deserialize_cut(json.loads(item.inside))
        return check_samples(read_sound(cut), cut.sampling_rate, max_seconds=LONGEST), cut.sampling_rate
    return read_audio(io.BytesIO(_bytes(item)), max_seconds=LONGEST)


def _bytes(item: Item) -> bytes:
    """The encoded sound."""
    store, path = store_of(item.place)
    if item.kind == "parquet":
        group, row, column = item.inside.split(":")
        value = _group(item.place, item.stamp, int(group), column)[int(row)].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise InputError(f"row {row} of group {group} holds no encoded sound")
        return data
    start, size = map(int, item.inside.split(":")) if item.kind == "tar" else (0, item.size)
    return store.cat_file(path, start, start + size)


@lru_cache(maxsize=1)
def _group(place: str, stamp: str, group: int, column: str) -> Any:
    """One column of one group of rows: items of a block are neighbours."""
    import pyarrow.parquet

    store, path = store_of(place)
    with store.open(path, "rb") as file:
        return pyarrow.parquet.ParquetFile(file).read_row_group(group, [column]).column(column)


def _stamp(about: dict[str, Any]) -> str:
    """What of a file's listing changes when it does."""
    when = about.get("mtime") or about.get("LastModified") or about.get("ETag") or about.get("etag") or ""
    return f"{about.get('size')} {when}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    return " ".join(str(error).split())[:REASON] or type(error).__name__
