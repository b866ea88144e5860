"""What a monitor reads at /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from antiphon.generate import AudioDelta, Done, Event, TextDelta

BUCKETS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 3.0, 5.0, 10.0, 30.0)
GRACE = 0.08  # seconds that a player holds back: a packet after that is late


class Meters:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        self.phases = Histogram(
            "antiphon_turn_seconds",
            "Seconds by phase of a turn: first_text, first_audio and total since it was asked for, aut in all",
            ["phase"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.conversations = Gauge("antiphon_conversations", "Conversations being held", registry=self.registry)
        self.sessions = Gauge("antiphon_realtime_sessions", "Realtime sessions", registry=self.registry)
        self.packets = Counter("antiphon_packets", "Packets of sound sent", registry=self.registry)
        self.late = Counter("antiphon_packets_late", "Of these, after a player needed them", registry=self.registry)
        self.refusals = Counter("antiphon_refusals", "Requests refused", ["reason"], registry=self.registry)
        self.requests = Counter("antiphon_requests", "Requests", ["path", "status"], registry=self.registry)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


def summed(texts: Sequence[bytes]) -> bytes:
    """What several processes have counted, as if one had; times of day are those of the youngest."""
    if len(texts) == 1:
        return texts[0]
    registry = CollectorRegistry()
    registry.register(_Sum(texts))  # pyright: ignore[reportArgumentType]
    return generate_latest(registry)


class _Sum:
    """A collector of what is written in `texts`."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.texts = texts

    def collect(self) -> Iterator[Metric]:
        """Every family once."""
        families: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for text in self.texts:
            for family in text_string_to_metric_families(text.decode()):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known = values.setdefault(family.name, {})
                for sample in family.samples:
                    key = sample.name, tuple(sample.labels.items())
                    is_time = sample.name.endswith(("_created", "_start_time_seconds"))
                    before = known.get(key, 0.0)
                    known[key] = max(before, sample.value) if is_time else before + sample.value
        for name, family in families.items():
            for (sample, labels), value in values[name].items():
                family.add_sample(sample, dict(labels), value)
            yield family


class Listening:
    """The clock of who listens to one answer."""

    def __init__(self, meters: Meters, frame_seconds: float) -> None:
        self.meters, self.frame_seconds = meters, frame_seconds
        self.asked = time.perf_counter()
        self.marks: dict[str, float] = {}  # seconds since it was asked for
        self.frames = 0

    @property
    def played(self) -> float:
        """Seconds of its sound that have been heard by now, if it is played as it comes."""
        if "first_audio" not in self.marks:
            return 0.0
        since = time.perf_counter() - self.asked - self.marks["first_audio"]
        return min(since, self.frames * self.frame_seconds)

    def note(self, event: Event) -> None:
        """One more event of the answer has come."""
        now = time.perf_counter() - self.asked
        if isinstance(event, TextDelta):
            self.marks.setdefault("first_text", now)
        elif isinstance(event, AudioDelta):
            begun = self.marks.setdefault("first_audio", now)
            self.meters.packets.inc()
            self.meters.late.inc(now > begun + self.frames * self.frame_seconds + GRACE)
            self.frames += 1
        elif isinstance(event, Done):
            self.marks["total"] = now
            if "aut" in event.reply.timings:
                self.marks["aut"] = event.reply.timings["aut"]
            for phase, seconds in self.marks.items():
                self.meters.phases.labels(phase).observe(seconds)
