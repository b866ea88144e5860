"""`antiphon label`: pseudo-labels for recordings of any number, block by block, on one machine or many.

    sources ──> blocks ──┬── label_block ──> shards/ segments/ labels/ ──┐
                         └── … in this process, or on Ray Data ──────────┴── gather ──> cuts, quarantine, report

`label_block` is a plain function, and Ray only spreads it. Every file of a block appears whole or not at all, and what
is in it depends on the block and the teachers alone. So killing any process loses the blocks in flight and nothing
else, and the same command goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from antiphon.errors import InputError
from antiphon.files import write_text
from antiphon.scale.filters import language_of
from antiphon.scale.segments import (
    Block,
    Recording,
    Segment,
    Timer,
    blocks_of,
    read_segments,
    read_shard,
    read_table,
    segments_of,
    write_segments,
    write_table,
)
from antiphon.scale.sources import Item, digest, find_items, first_line
from antiphon.scale.teachers import Heard, Teacher, TeacherAt, hear_each

VERSION = 1  # of how recordings are cut and labels are made: another one is another identity
FOLDERS = ("shards", "segments", "labels")
STORE = 512 << 20  # bytes of Ray's object store: what travels is names of blocks
STARTS = 3  # of Ray, before it is given up
SETTINGS = "settings.json"
Ids = NDArray[np.bytes_]  # sorted


@dataclass(frozen=True)
class Job:
    """What is to be done, as every process needs to know it."""

    out: Path
    teachers: tuple[TeacherAt, ...]
    longest: float = 30.0  # seconds of a segment
    retry: bool = False  # what is in quarantine
    threads: int = 1

    @property
    def settings(self) -> str:
        """What segments depend on."""
        return json.dumps({"longest": self.longest, "version": VERSION})


@dataclass(frozen=True)
class Spread:
    """Where the blocks are worked on."""

    workers: int = 0  # processes on Ray; 0 is none but this one
    address: str = ""  # of a Ray cluster; by default one is begun on this machine
    gpus: float = 0.0  # of each worker


def label(
    sources: Sequence[str], job: Job, spread: Spread, progress: Callable[[int, int], None] = lambda done, of: None
) -> set[str]:
    """Segment and label what is not on disk yet; `progress(done, all)` counts blocks. Returns the keys of all items.

    Raises:
        InputError: there is nothing to label, the folder holds another job's segments, or one is at work there.
    """
    for name in FOLDERS:
        (job.out / name).mkdir(parents=True, exist_ok=True)
    with alone(job.out):
        keep_settings(job)
        items = find_items(sources)
        left, done = plan(job, all_blocks(items, job))
        progress(done, done + len(left))
        work = spread_out if spread.workers else in_turn
        for count, _ in enumerate(work(left, job, known_ids(job), spread), 1):
            progress(done + count, done + len(left))
    return {item.key for item in items}


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder; a process that dies lets go of it.

    Raises:
        InputError: another process holds it.
    """
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another antiphon label is at work in {out}; wait for it, or give another --out"
            ) from None
        for part in (part for name in FOLDERS for part in (out / name).glob("*.part")):
            part.unlink(missing_ok=True)  # of a process that was killed
        yield


def keep_settings(job: Job) -> None:
    """Write what segments depend on.

    Raises:
        InputError: those in the folder were cut in another way.
    """
    path = job.out / SETTINGS
    if path.exists() and path.read_text(encoding="utf-8") != job.settings:
        before = json.loads(path.read_text(encoding="utf-8"))
        there, here = (
            f"of at most {s['longest']:g} s (version {s['version']})" for s in (before, json.loads(job.settings))
        )
        raise InputError(
            f"{job.out} holds segments {there}, and these would be {here}; give another --out or --longest"
        )
    write_text(path, job.settings)


# --------------------------------------------------------------------------------------------------- the plan


def all_blocks(items: Sequence[Item], job: Job) -> list[Block]:
    """The blocks on disk that have some of the items, and new ones of the items that are in none of them."""
    keys, seen, blocks = {item.key for item in items}, set[str](), list[Block]()
    for path in sorted((job.out / "segments").glob("*.parquet")):
        inside = {r.item for r in read_segments(job.out, path.stem) if not (job.retry and r.reason)}
        seen |= inside
        if inside & keys:
            blocks.append(Block(path.stem))
    return [*blocks, *blocks_of([item for item in items if item.key not in seen], job.settings)]


def plan(job: Job, blocks: Sequence[Block]) -> tuple[list[Block], int]:
    """The blocks of which something is missing, and the number of those of which nothing is."""
    if job.retry:
        for path in (job.out / "labels").glob("*.parquet"):
            if any(row["reason"] for row in read_table(path)):
                path.unlink()
    left = [b for b in blocks if b.items or not all(labels_of(job.out, b.name, t).exists() for t in job.teachers)]
    return left, len(blocks) - len(left)


def known_ids(job: Job) -> Ids:
    """Identities of all labels on disk, sorted."""
    import pyarrow.parquet

    ids = [""]
    for path in (job.out / "labels").glob("*.parquet"):
        table = pyarrow.parquet.ParquetFile(path)
        ids += table.read(columns=["id"])["id"].to_pylist() if table.metadata.num_rows else []
    return np.unique(np.array(ids, "S32"))


def is_known(known: Ids, name: str) -> bool:
    """Whether a label is on disk."""
    place = int(np.searchsorted(known, name.encode()))
    return place < len(known) and known[place] == name.encode()


def identity(audio: str, segment: Segment, teacher: TeacherAt) -> str:
    """Of a label: what was heard, from where to where, by whom, and how labels are made."""
    return digest(audio, segment.start, segment.stop, teacher.name, teacher.version, VERSION)


def labels_of(out: Path, block: str, teacher: TeacherAt) -> Path:
    """The table of what a teacher said of a block."""
    return out / "labels" / f"{block}.{teacher_key(teacher)}.parquet"


def teacher_key(teacher: TeacherAt) -> str:
    """Of a teacher, in names of files."""
    return digest(teacher.name, teacher.version, VERSION)[:8]


# --------------------------------------------------------------------------------------------------- one block


def label_block(block: Block, job: Job, teachers: Sequence[Teacher], known: Ids) -> None:
    """Have on disk all that belongs to a block; what is there is not made again."""
    if block.items and (job.retry or not segments_of(job.out, block.name).exists()):
        write_segments(block, job.out, job.longest)
    for at, teacher in zip(job.teachers, teachers, strict=True):
        if not labels_of(job.out, block.name, at).exists():
            timer = Timer(at.device)
            recordings = read_segments(job.out, block.name)
            rows = hear_block(block.name, recordings, job.out, at, teacher, known)
            heard = sum(r.seconds for r in recordings) if rows or not any(r.segments for r in recordings) else 0.0
            write_table(labels_of(job.out, block.name, at), rows, timer.usage(heard))


def hear_block(
    block: str, recordings: Sequence[Recording], out: Path, at: TeacherAt, teacher: Teacher, known: Ids
) -> list[dict[str, Any]]:
    """What a teacher says of the segments of a block that it has not heard before."""
    segments = {identity(r.audio, s, at): s for r in recordings for s in r.segments}
    new = [not is_known(known, name) for name in segments]
    if not any(new):
        return []
    sound = read_shard(out, block)
    clips = [sound[s.offset : s.offset + s.stop - s.start] for s in segments.values()]
    heard = hear_each(teacher, clips, new)
    return [row_of(name, one) for name, one, wanted in zip(segments, heard, new, strict=True) if wanted]


def row_of(name: str, heard: Heard) -> dict[str, Any]:
    """A label as it is kept."""
    language = heard.language or language_of(heard.text)
    return {"id": name, **asdict(heard), "language": language, "sure": heard.sure}


# --------------------------------------------------------------------------------------------------- many blocks


def in_turn(blocks: Sequence[Block], job: Job, known: Ids, spread: Spread) -> Iterator[str]:
    """Work on blocks in this process; gives their names as they are finished."""
    torch.set_num_threads(job.threads)
    teachers = [at.open() for at in job.teachers] if blocks else []
    for block in blocks:
        label_block(block, job, teachers, known)
        yield block.name


class Labeller:
    """A worker on Ray: opens the teachers once, then works on one block after another."""

    def __init__(self, job: Job, known: Any) -> None:
        import ray

        torch.set_num_threads(job.threads)
        self.job, self.known = job, np.asarray(ray.get(known))
        self.teachers = [at.open() for at in job.teachers]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Batches of one block, as Ray Data has them."""
        blocks: list[Block] = [pickle.loads(data) for data in batch["block"]]
        for block in blocks:
            label_block(block, self.job, self.teachers, self.known)
        return {"name": np.array([block.name for block in blocks])}


def spread_out(blocks: Sequence[Block], job: Job, known: Ids, spread: Spread) -> Iterator[str]:
    """Work on blocks in many processes; gives their names as they are finished."""
    if not blocks:
        return
    ray = begin_ray(spread, job.threads)
    try:
        rows = [{"block": pickle.dumps(block)} for block in blocks]
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        data = data.map_batches(
            Labeller,
            fn_constructor_args=(job, ray.put(known)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(spread.workers, len(blocks))),
            num_cpus=job.threads,
            num_gpus=spread.gpus or None,
        )
        for row in data.iter_rows():
            yield str(row["name"])
    except ray.exceptions.RayError as error:  # its last line is what a worker said; the lines before say where
        raise InputError(f"a worker could not go on: {str(error).strip().splitlines()[-1]}; run this again") from error
    finally:
        ray.shutdown()


def begin_ray(spread: Spread, threads: int) -> Any:
    """Ray, connected to a cluster, or begun here with as many processors as the workers have threads.

    Raises:
        InputError: the extra is missing, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(f"workers need pip install 'antiphon[scale]' ({error.name} is missing)") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    for attempt in range(STARTS):
        try:
            if spread.address:
                ray.init(spread.address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init("local", num_cpus=spread.workers * threads, object_store_memory=STORE, **quiet)
            break
        except ConnectionError as error:
            raise InputError(f"there is no Ray cluster at {spread.address}: {first_line(error)}") from None
        except Exception as error:  # Ray's own are bare: on a busy machine its node may not be up in time
            ray.shutdown()
            if attempt + 1 == STARTS:
                raise InputError(f"Ray does not start here: {first_line(error)}") from None
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
    return ray
