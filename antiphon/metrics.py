"""Time spent in the named phases of a turn, and histograms of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Histogram:
    """Every value seen, for exact percentiles of runs of ordinary length."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Note one value."""
        self.values.append(value)

    @property
    def total(self) -> float:
        """Sum of all values."""
        return math.fsum(self.values)

    def percentile(self, q: float) -> float:
        """The value that q percent of the others do not exceed; nan when there is none."""
        if not self.values:
            return math.nan
        ordered = sorted(self.values)
        return ordered[min(math.ceil(q / 100 * len(ordered)), len(ordered)) - 1 if q > 0 else 0]


class Span(NamedTuple):
    """One run of a phase, in seconds since the turn began."""

    name: str
    start: float
    stop: float


class Phases:
    """Stopwatch of one turn: seconds by phase, every single run, and marks on the turn's clock."""

    def __init__(self) -> None:
        self.phases: dict[str, Histogram] = {}
        self.runs: list[Span] = []  # on the process's clock
        self.marks: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """Start the turn's clock; what has run already stands at times below 0."""
        self.start = time.perf_counter()

    @property
    def spans(self) -> list[Span]:
        """Every single run on the turn's clock."""
        return [Span(name, start - self.start, stop - self.start) for name, start, stop in self.runs]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block as one run of phase `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.phases.setdefault(name, Histogram()).add(end - begin)
            self.runs.append(Span(name, begin, end))

    def mark(self, name: str) -> None:
        """Note when `name` first happened, in seconds since the turn began."""
        self.marks.setdefault(name, time.perf_counter() - self.start)

    def summary(self) -> dict[str, float]:
        """Seconds: total of every phase, every mark, and the whole turn."""
        self.mark("total")
        return {name: h.total for name, h in self.phases.items()} | self.marks
