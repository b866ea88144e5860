"""From what blocks left on disk to what recipes read: labels judged, duplicates dropped, one manifest.

    segments/ labels/ ── judge ──> cuts.jsonl.gz, quarantine.jsonl, figures

Nothing is heard here, so other rules cost seconds. The result depends on what is on disk, and not on the order in which
it came there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from antiphon.files import write_text
from antiphon.scale.filters import Rules, agreement, verdict
from antiphon.scale.label import Job, identity, teacher_key
from antiphon.scale.segments import Recording, Segment, Usage, read_about, read_segments, read_table, shard_of
from antiphon.serve.vad import RATE
from antiphon.train.data import write_manifest

CUTS, QUARANTINE = "cuts.jsonl.gz", "quarantine.jsonl"
DUPLICATE, UNSURE = "duplicate", "unsure"
REJECTED = ("empty", "repetition", "language", "script", "rate", UNSURE, DUPLICATE)  # in the order they are tried
Labels = dict[str, dict[str, Any]]  # rows by identity


@dataclass(frozen=True)
class Judged:
    """A segment, what was said of it, and what is wrong with that."""

    name: str  # its identity
    source: str  # recording
    block: str
    segment: Segment
    text: str
    language: str
    score: float | None
    fault: str = ""  # nothing for what is kept

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.segment.stop - self.segment.start) / RATE


@dataclass
class Figures:
    """What a job came to."""

    recordings: int = 0
    read: float = 0.0  # hours of recordings
    speech: float = 0.0  # hours of segments
    judged: list[Judged] = field(default_factory=list)
    quarantine: list[dict[str, str]] = field(default_factory=list)
    usage: dict[str, list[Usage]] = field(default_factory=dict)  # by step: cutting, and each teacher

    @property
    def kept(self) -> list[Judged]:
        """What recipes read."""
        return [one for one in self.judged if not one.fault]

    def hours(self, fault: str | None = None) -> float:
        """Of all segments that were labelled, or of those with a fault ("" is none)."""
        return sum(one.seconds for one in self.judged if fault is None or one.fault == fault) / 3600


def gather(job: Job, rules: Rules, keys: Set[str]) -> Figures:
    """Judge what is on disk of the items `keys`; write the manifest and the quarantine list, each whole."""
    figures, labels, heard = Figures(), labels_on_disk(job), set[str]()
    for block, recording in recordings_of(job.out, keys):
        figures.recordings += 1
        figures.read += recording.seconds / 3600
        figures.speech += sum(s.stop - s.start for s in recording.segments) / RATE / 3600
        if recording.reason:
            figures.quarantine.append({"name": recording.name, "reason": recording.reason})
        for segment in recording.segments:
            said = [labels[identity(recording.audio, segment, at)] for at in job.teachers]
            failed = [(at, one) for at, one in zip(job.teachers, said, strict=True) if one["reason"]]
            for at, one in failed:
                name = f"{recording.name}@{segment.start / RATE:.2f}"
                figures.quarantine.append({"name": name, "teacher": at.name, "reason": one["reason"]})
            if not failed:
                figures.judged.append(judge(Said(block, recording, segment, said), rules, heard))
    figures.usage = usage_of(job)
    write_manifest(job.out / CUTS, [json.dumps(cut, ensure_ascii=False) for cut in cuts_of(figures, job)])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in figures.quarantine)
    write_text(job.out / QUARANTINE, lines)
    return figures


def recordings_of(out: Path, keys: Set[str]) -> list[tuple[str, Recording]]:
    """The recordings of items `keys` with their blocks, by name; of one that was tried again, what became of it."""
    found: dict[str, tuple[str, Recording]] = {}
    for path in sorted((out / "segments").glob("*.parquet")):
        for recording in read_segments(out, path.stem):
            if recording.item in keys and (recording.item not in found or found[recording.item][1].reason):
                found[recording.item] = path.stem, recording
    return sorted(found.values(), key=lambda one: one[1].name)


def labels_on_disk(job: Job) -> dict[str, dict[str, Any]]:
    """Labels by identity; of one that was tried again, what came of it."""
    labels: dict[str, dict[str, Any]] = {}
    for path in sorted((job.out / "labels").glob("*.parquet")):
        for row in read_table(path):
            if row["id"] not in labels or labels[row["id"]]["reason"]:
                labels[row["id"]] = row
    return labels


@dataclass(frozen=True)
class Said:
    """A segment and what each of the teachers said of it."""

    block: str
    recording: Recording
    segment: Segment
    labels: Sequence[dict[str, Any]]


def judge(said: Said, rules: Rules, heard: set[str]) -> Judged:
    """What is wrong with a label, if anything; what is kept is added to `heard`, the contents that came before."""
    first, segment = said.labels[0], said.segment
    text, language = " ".join(first["text"].split()), first["language"]
    seconds = (segment.stop - segment.start) / RATE
    score, least = first["sure"], rules.sure
    if len(said.labels) > 1:
        score, least = agreement(text, said.labels[1]["text"], language), rules.agree
    fault = verdict(text, language, seconds, rules)
    if not fault and score is not None and score < least:
        fault = UNSURE
    if not fault and segment.content in heard:
        fault = DUPLICATE
    if not fault:
        heard.add(segment.content)
    return Judged(first["id"], said.recording.name, said.block, segment, text, language, score, fault)


def cuts_of(figures: Figures, job: Job) -> Iterator[dict[str, Any]]:
    """What is kept as lhotse cuts of the shards, in the order of the recordings."""
    samples = {block: soundfile.info(str(shard_of(job.out, block))).frames for block in {k.block for k in figures.kept}}
    teachers = [at.name for at in job.teachers]
    for one in figures.kept:
        segment, duration = one.segment, one.seconds
        shard = {
            "id": one.block,
            "sources": [{"type": "file", "channels": [0], "source": f"shards/{one.block}.flac"}],
            "sampling_rate": RATE,
            "num_samples": samples[one.block],
            "duration": samples[one.block] / RATE,
            "channel_ids": [0],
        }
        score = None if one.score is None else round(one.score, 4)
        about = {"label_source": "pseudo", "teacher": teachers[0], "score": score, "source": one.source}
        about |= {"agrees_with": teachers[1]} if len(teachers) > 1 else {}
        said = {"id": one.name, "recording_id": one.block, "start": 0.0, "duration": duration, "channel": 0}
        said |= {"text": one.text, "language": one.language, "speaker": None, "custom": about}
        place = {"id": one.name, "start": segment.offset / RATE, "duration": duration, "channel": 0}
        yield {**place, "type": "MonoCut", "supervisions": [said], "recording": shard}


def usage_of(job: Job) -> dict[str, list[Usage]]:
    """What each step took, block by block."""
    usage: dict[str, list[Usage]] = {"cutting": [_usage(path) for path in (job.out / "segments").glob("*.parquet")]}
    for at in job.teachers:
        usage[at.name] = [_usage(path) for path in (job.out / "labels").glob(f"*.{teacher_key(at)}.parquet")]
    return usage


def _usage(path: Path) -> Usage:
    return Usage(**json.loads(read_about(path)["usage"]))
