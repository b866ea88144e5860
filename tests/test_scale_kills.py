"""A labelling job whose driver and workers are killed at random comes to the same result: make scale.

2,000 clips in files, a tar, Parquet and a lhotse manifest, 3 % of them broken, some there twice; the teacher is tiny.
`ANTIPHON_SCALE_CLIPS` takes fewer, `ANTIPHON_SCALE_SEED` other moments.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from antiphon.scale.gather import CUTS, QUARANTINE
from antiphon.scale.label import FOLDERS
from antiphon.scale.segments import BLOCK_ITEMS, read_segments, read_table
from antiphon.train.corpus import Set, make_corpus
from antiphon.train.data import read_cuts

pytestmark = pytest.mark.scale
CLIPS = int(os.environ.get("ANTIPHON_SCALE_CLIPS", 2000))
SEED = int(os.environ.get("ANTIPHON_SCALE_SEED", time.time_ns() % 1_000_000))
BROKEN, TWICE = 0.03, 0.01  # shares of the clips
KILLS = ("driver", "driver", "worker", "worker", "worker")
SPAN = max(1, CLIPS // BLOCK_ITEMS // (len(KILLS) + 4))  # blocks that are finished between two kills, at most
DEADLINE = 3600.0  # seconds without any progress
Clip = tuple[str, bytes]  # name, encoded


def broken(data: bytes, rng: np.random.Generator) -> bytes:
    """Something that is no sound any more."""
    nothing = io.BytesIO()
    soundfile.write(nothing, np.full(800, np.nan, np.float32), 16000, format="WAV", subtype="FLOAT")
    return (b"", b"not a sound", data[:30], bytes(rng.integers(0, 256, 4000, np.uint8)), nothing.getvalue())[
        int(rng.integers(5))
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[list[str], set[str]]:
    """The containers, and the names of what is broken in them."""
    folder = tmp_path_factory.mktemp("in")
    world = {"clips": Set("speech", CLIPS, languages=("en",), seed=11)}
    cuts = read_cuts(make_corpus(world, folder / "corpus", os.cpu_count() or 1, lambda done, of: None)["clips"])
    rng = np.random.default_rng(17)
    lost = set(rng.choice(CLIPS, round(CLIPS * BROKEN), replace=False).tolist())
    twice = rng.choice(CLIPS, round(CLIPS * TWICE), replace=False).tolist()
    files, tar, rows, last = (int(CLIPS * share) for share in (0.6, 0.75, 0.9, 1.0))
    (folder / "files").mkdir()
    for i in range(files):
        (folder / "files" / f"{i:05d}.wav").write_bytes(clip_of(cuts[i], i in lost, rng))
    for i in (i for i in twice if i not in lost):
        (folder / "files" / f"again-{i:05d}.flac").write_bytes(clip_of(cuts[i], False, rng, "FLAC"))
    write_tar(folder / "tar.tar", [(f"{i:05d}.wav", clip_of(cuts[i], i in lost, rng)) for i in range(files, tar)])
    write_rows(folder / "rows.parquet", [clip_of(cuts[i], i in lost, rng) for i in range(tar, rows)])
    for i in lost & set(range(rows, last)):
        cuts[i].recording.sources[0].source = str(folder / "gone.wav")
    CutSet.from_cuts(cuts[rows:]).to_jsonl(folder / "cuts.jsonl.gz")
    names = {i: f"files/{i:05d}.wav" for i in range(files)}
    names |= {i: f"tar.tar#{i:05d}.wav" for i in range(files, tar)}
    names |= {i: f"rows.parquet#{(i - tar) // 100}.{(i - tar) % 100}" for i in range(tar, rows)}
    names |= {i: f"cuts.jsonl.gz#{cuts[i].id}" for i in range(rows, last)}
    places = [str(folder / name) for name in ("files", "tar.tar", "rows.parquet", "cuts.jsonl.gz")]
    return places, {f"{folder}/{names[i]}" for i in lost}


def clip_of(cut, is_broken: bool, rng: np.random.Generator, form: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, cut.load_audio()[0], cut.sampling_rate, format=form)
    return broken(file.getvalue(), rng) if is_broken else file.getvalue()


def write_tar(path: Path, clips: Sequence[Clip]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in clips:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def write_rows(path: Path, sounds: Sequence[bytes]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"audio": {"bytes": data, "path": "x.wav"}} for data in sounds]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


# ---------------------------------------------------------------------------------------------------- processes


def begin(sources: Sequence[str], out: Path, workers: int) -> subprocess.Popen:
    """The command, in a process of its own."""
    code = "import sys; from antiphon.cli import main; main()"
    command = [sys.executable, "-c", code, "label", *sources, "--out", str(out), "--teacher", "tiny"]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen([*command, "--workers", str(workers)], stdout=log, stderr=log)


def logged(out: Path) -> str:
    """The end of what a job's commands said."""
    return (out.parent / f"{out.name}.log").read_text()[-2000:]


def below(pid: int) -> Iterator[tuple[int, str]]:
    """The processes that descend from one, and what they are called."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(stat.parent.name)
                yield child, (stat.parent / "cmdline").read_text(errors="replace")
                yield from below(child)


def is_there(pid: int) -> bool:
    """Whether a process still runs."""
    return Path(f"/proc/{pid}/cmdline").exists()


def finished(out: Path) -> int:
    """Blocks that are labelled."""
    return len(list((out / "labels").glob("*.parquet")))


def wait(until, what: str) -> None:
    """Wait for what is to happen."""
    end = time.monotonic() + DEADLINE
    while not until():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.05)


def kill_while_running(sources: Sequence[str], out: Path, rng: np.random.Generator) -> list[str]:
    """Run to the end, with `KILLS` in some order after some blocks each; what was killed, and when."""
    told, running = list[str](), begin(sources, out, 2)
    try:
        for victim in rng.permutation(KILLS):
            due = finished(out) + int(rng.integers(0, SPAN)) + 1
            wait(lambda due=due, running=running: finished(out) >= due or running.poll() is not None, "progress")
            time.sleep(float(rng.uniform(0, 2)))
            assert running.poll() is None, f"over before it was killed often enough: {logged(out)}"
            told.append(f"{victim} after {finished(out)} blocks")
            if victim == "worker":
                workers = list[int]()
                while not workers:
                    assert running.poll() is None, f"over before it was killed often enough: {logged(out)}"
                    workers = [pid for pid, name in below(running.pid) if "Labeller" in name]
                os.kill(int(rng.choice(workers)), signal.SIGKILL)
                continue
            family = [pid for pid, name in below(running.pid) if "Agent" not in name]  # Ray's linger, and write nothing
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            wait(lambda family=family: not any(map(is_there, family)), "the end of workers")
            running = begin(sources, out, 2)
        assert running.wait(DEADLINE) == 0, logged(out)
        return told
    finally:
        running.kill()  # its workers end with it


# ---------------------------------------------------------------------------------------------------- the proof


def result(out: Path) -> dict[str, tuple[str, str, str]]:
    """Text, language and source of every cut by its identity."""
    cuts = read_cuts(out / CUTS)
    assert len({cut.id for cut in cuts}) == len(cuts), "nothing twice"
    said = {cut.id: cut.supervisions[0] for cut in cuts}
    return {name: (s.text, s.language, s.custom["source"]) for name, s in said.items()}


def scores(out: Path) -> dict[str, float]:
    return {cut.id: cut.supervisions[0].custom["score"] for cut in read_cuts(out / CUTS)}


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory) -> Iterator[tuple[Path, subprocess.Popen]]:
    """A job that is left alone, begun."""
    out = tmp_path_factory.mktemp("job") / "undisturbed"
    running = begin(sources[0], out, 0)
    yield out, running
    running.kill()


def test_killed_five_times_and_nothing_is_lost_and_nothing_twice(sources, undisturbed, capsys):
    (places, lost), (undisturbed, alone) = sources, undisturbed
    out = undisturbed.with_name("killed")
    told = kill_while_running(places, out, np.random.default_rng(SEED))  # while the other goes on
    assert alone.wait(DEADLINE) == 0, logged(undisturbed)
    wanted, found = result(undisturbed), result(out)
    assert found == wanted
    assert len(wanted) > CLIPS / 4
    assert scores(out) == pytest.approx(scores(undisturbed), abs=2e-3)
    quarantine = [json.loads(line)["name"] for line in (out / QUARANTINE).read_text().splitlines()]
    assert sorted(quarantine) == sorted(lost)
    assert (out / QUARANTINE).read_bytes() == (undisturbed / QUARANTINE).read_bytes()
    assert sounds(out) == sounds(undisturbed)
    recordings = [r.name for p in (out / "segments").iterdir() for r in read_segments(out, p.stem)]
    assert len(recordings) == len(set(recordings)) == CLIPS + len([n for n in recordings if "again-" in n])
    assert not list(out.rglob("*.part"))
    labels = [row["id"] for p in (out / "labels").iterdir() for row in read_table(p)]
    with capsys.disabled():
        log = (out.parent / "killed.log").read_text().splitlines()
        print(
            f"\nseed {SEED}: killed {', '.join(told)}; {len(wanted):,} cuts, {len(labels):,} labels, {len(lost)} broken"
        )
        print(next(line for line in reversed(log) if "are kept" in line))


def sounds(out: Path) -> dict[str, bytes]:
    """Every shard, to the byte."""
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


def test_a_rerun_of_what_is_finished_opens_nothing(sources, undisturbed):
    undisturbed, alone = undisturbed
    assert alone.wait(DEADLINE) == 0, logged(undisturbed)
    files = [path for name in FOLDERS for path in (undisturbed / name).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    manifest = (undisturbed / CUTS).read_bytes()
    again = begin(sources[0], undisturbed, 2)
    seen = set[str]()
    while again.poll() is None:
        seen |= {name for _, name in below(again.pid) if "raylet" in name}
        time.sleep(0.2)
    assert not seen, "Ray is begun for nothing"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (undisturbed / CUTS).read_bytes() == manifest
