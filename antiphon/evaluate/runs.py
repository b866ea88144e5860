"""One set of the field, measured: what it gives is one line of results.jsonl, and the answers in a file of their own.

OUT/results.jsonl          a line per run: command, versions, hashes of model and data, metrics with intervals
OUT/answers/RUN.jsonl      what the model made of each item, and how it counted
OUT/report.html            the latest run of each model on each set, beside published figures (`page.py`)
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from antiphon.errors import AudioError, InputError
from antiphon.evaluate.asking import TASKS, Asked
from antiphon.evaluate.items import Item, file_digest
from antiphon.evaluate.scoring import METRICS, Estimate, Judges, Tally, mean_of, pooled, score, unit
from antiphon.evaluate.sets import FieldSet, find_set
from antiphon.evaluate.trial import Track

RESULTS, ANSWERS, REPORT = "results.jsonl", "answers", "report.html"
NAMED = 3  # items left out that a line names
HASHED = (".json", ".safetensors", ".txt", ".model")  # files of a checkpoint that decide what it says


@dataclass(frozen=True)
class Row:
    """One metric of one part of a set."""

    part: str
    metric: str
    estimate: Estimate
    unit: str = ""

    def flat(self) -> dict[str, Any]:
        """As it is written down."""
        return {"part": self.part, "metric": self.metric, "unit": self.unit, **asdict(self.estimate)}


@dataclass
class Measured:
    """What came of going through a set."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)  # by part and metric
    units: dict[tuple[str, str], str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, part: str, item: Item, counts: dict[str, tuple[float, float]]) -> None:
        """Count one item."""
        for metric, pair in counts.items():
            tally = self.tallies.setdefault((part, metric), Tally(f"{part} {metric}"))
            tally.add(item.group or item.name, pair)
            self.units.setdefault((part, metric), unit(metric, item.language))

    def rows(self, chosen: FieldSet) -> Iterator[Row]:
        """Every metric of every part, and what the set is summed up by."""
        for (part, metric), tally in self.tallies.items():
            yield Row(part, metric, tally.estimate(), self.units[part, metric])
        first = {part: tally for (part, _), tally in reversed(self.tallies.items())}  # each part's own metric
        if chosen.whole and len(first) > 1:
            tallies, names = list(first.values()), {metric for _, metric in self.tallies}
            short = "" if len(first) == chosen.complete else f", {len(first)} of {chosen.complete} parts"
            estimate = pooled(tallies) if chosen.of_items else mean_of(tallies)
            yield Row(chosen.whole + short, names.pop() if len(names) == 1 else "score", estimate)


def measure(asked: Asked, judges: Judges, items: dict[str, list[Item]], track: Track, answers: TextIO) -> Measured:
    """Ask and score all items; each answer is written as it comes. Items without readable sound are left out.

    Raises:
        InputError: none of them has readable sound, or the model cannot do what the set asks.
    """
    found = Measured()
    asked.check([item for some in items.values() for item in some])
    for part, some in items.items():
        for item in track(some, part):
            reason = "" if item.is_there else "no sound"
            try:
                response = None if reason else TASKS[item.task](asked, item)
            except AudioError as error:
                response, reason = None, str(error)
            if response is None:
                found.left_out.append(f"{part}: {item.name} ({reason})")
                continue
            text, counts = score(item, response, judges)
            found.add(part, item, counts)
            found.digest.update(identity(part, item))
            answers.write(json.dumps(record(part, item, text, counts), ensure_ascii=False) + "\n")
    if len(found.left_out) == sum(map(len, items.values())):
        raise InputError(f"no item has readable sound: {', '.join(found.left_out[:NAMED])}; is the set unpacked?")
    return found


def identity(part: str, item: Item) -> bytes:
    """What an item is: its names, texts and the bytes of its sound, but not where it is."""
    said = [part, item.name, item.task, item.text, item.question, sorted(item.tags), item.clip and item.clip.digest()]
    return json.dumps(said, ensure_ascii=False).encode()


def record(part: str, item: Item, text: str, counts: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """A line about one item; `prompt`, `reference` and `response` are the names that VoiceBench's scripts read."""
    about = {"part": part, "id": item.name, "group": item.group, "prompt": item.said or item.question}
    reference = ", ".join(sorted(item.tags)) if item.task == "tag" else item.text
    counted = {metric: [float(over), float(under)] for metric, (over, under) in counts.items()}
    return {**about, "reference": reference, "response": text, "counts": counted}


def run_set(
    asked: Asked,
    judges: Judges,
    model: str,
    name: str,
    items: dict[str, list[Item]],
    out: Path,
    track: Track,
    note: str = "",
) -> dict[str, Any]:
    """Measure a set and add its line to OUT/results.jsonl, with a note for whoever reads it; the line.

    Raises:
        InputError: what `measure` raises, or a folder that cannot be written to.
    """
    began, clock = datetime.now(UTC), time.monotonic()
    run = f"{began:%Y%m%dT%H%M%S}{began.microsecond // 1000:03}-{name}"
    chosen, place = find_set(name), out / ANSWERS / f"{run}.jsonl"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("w", encoding="utf-8") as answers:
            found = measure(asked, judges, items, track, answers)
    except OSError as error:
        raise InputError(f"{place} cannot be written ({error.strerror}); give another --out") from None
    speaks = any(item.task == "clone" for some in items.values() for item in some)
    notes = list(judges.notes) if speaks or judges.answers else []
    line = {
        "run": run,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "note": note,
        "command": shlex.join(["antiphon", *sys.argv[1:]]),
        "versions": {package: installed(package) for package in ("antiphon", "torch", "transformers")},
        "model": {"name": model, "sha256": model_digest(asked.model.beside), "dtype": str(asked.model.dtype)},
        "data": {
            "set": name,
            "sha256": found.digest.hexdigest(),
            "items": {part: len(some) for part, some in items.items()},
            "left_out": len(found.left_out),
            "left_out_first": found.left_out[:NAMED],
        },
        "judges": {"ear": judges.ear_name if speaks else None, "voice": asked.voice, "notes": notes},
        "device": asked.model.device.type,
        "threads": torch.get_num_threads(),
        "rows": [row.flat() for row in found.rows(chosen)],
    }
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    return line


def installed(package: str) -> str | None:
    """Version of a package, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_digest(folder: Path | None) -> str | None:
    """SHA-256 over the names and contents of a checkpoint's files; None of a model that is in no folder."""
    if folder is None:
        return None
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in HASHED):
        whole.update(f"{path.name} {file_digest(path.resolve())}\n".encode())
    return whole.hexdigest()


def read_results(path: Path) -> list[dict[str, Any]]:
    """All lines of a results.jsonl.

    Raises:
        InputError: it is not there, or a line is not JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); it should have one JSON object a line") from None


# ----------------------------------------------------------------------------------------- published figures


@dataclass(frozen=True)
class Published:
    """What somebody reports for a model."""

    model: str
    value: float  # rates and shares as fractions of one
    source: str


@cache
def published() -> dict[tuple[str, str, str], list[Published]]:
    """Reported figures by set, part and metric."""
    found: dict[tuple[str, str, str], list[Published]] = {}
    for block in yaml.safe_load(files("antiphon.evaluate").joinpath("published.yaml").read_text("utf-8")):
        for part, figures in block["parts"].items():
            for model, value in figures.items():
                key = (block["set"], str(part), block["metric"])
                share = value / 100 if METRICS[block["metric"]].percent else value
                found.setdefault(key, []).append(Published(model, float(share), block["source"]))
    return found


def shown(metric: str, value: float) -> str:
    """A metric as reports give it: in percent, or with three digits after the point."""
    return f"{100 * value:.2f} %" if METRICS[metric].percent else f"{value:.3f}"


def interval(metric: str, low: float | None, high: float | None) -> str:
    """An interval as reports give it."""
    return "" if low is None or high is None else f"{shown(metric, low)} to {shown(metric, high)}"


def latest(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The last run of each model on each set: by set, in the order of `SETS`, then by model."""
    by_set: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_set.setdefault(line["data"]["set"], {})[line["model"]["name"]] = line
    return by_set
