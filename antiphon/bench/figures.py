"""What a load comes to: latencies, late packets, conversations kept in time, and lines of a table."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from antiphon.bench.load import Answered, Load, Question, measure
from antiphon.engine import Engine
from antiphon.engine.call import Work
from antiphon.metrics import Histogram

BUFFERS = (0.0, 0.08, 0.16)  # seconds that a player holds back before it begins
IN_TIME = 0.08  # seconds of such a buffer with which a conversation that is kept in time has no late packet
PERCENTILES = (50, 95, 99)
TITLES = ("", "first text", "first packet", "first sound", "RTF", "late packets, buffer 0/80/160 ms", "longest gap")
TITLES += ("in time", "refused", "replies/s", "busy", "memory")


@dataclass(frozen=True)
class Run:
    """One load: its figures, its answers and what ran when."""

    figures: dict[str, Any]
    answers: list[Answered]
    work: list[Work]


def run(engine: Engine, questions: Sequence[Question], loads: Sequence[Load]) -> Iterator[Run]:
    """Every load in turn, on one running engine that is warm.

    The engine's capacity counts in the open loop only: in the closed one it is the load that says how many there are.
    """
    capacity = engine.capacity
    for load in loads:
        engine.capacity = capacity if load.conversations is None else None
        engine.work.clear()
        begun = engine.now()
        answers = measure(engine, questions, load)
        seconds, work = engine.now() - begun, list(engine.work)
        busy = sum(one.stop - one.start for one in work) / seconds
        figures = summary(load, answers, seconds) | {"busy": busy, **memory(engine.model.device)}
        yield Run(figures, answers, work)
    engine.capacity = capacity


def summary(load: Load, answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """The figures of one load: latencies in ms, late packets by play-out buffer, and answers a second.

    What only the host knows of itself (`busy`, memory) is None.
    """
    good = [a for a in answers if a.packets and not a.error]
    gaps = [b.at - a.at for answer in good for a, b in zip(answer.packets, answer.packets[1:], strict=False)]
    return {
        **asdict(load),
        "answers": len(answers),
        "errors": sum(bool(a.error) and not a.refused for a in answers),
        "refused": sum(a.refused for a in answers),
        "held": len({a.conversation for a in answers if not a.refused}),
        "in_time": in_time(answers),
        **{
            f"{n}_ms": _percentiles([1000 * (getattr(a, n) - a.asked) for a in good]) for n in ("text", "code", "sound")
        },
        "rtf": _percentiles([(a.end - a.asked) / a.seconds for a in good], digits=3),
        "late": {f"{1000 * b:.0f} ms": sum(a.late(b) for a in good) for b in BUFFERS},
        "packets": sum(len(a.packets) for a in good),
        "longest_gap_ms": round(1000 * max(gaps, default=0.0), 1),
        "replies_per_second": len(good) / seconds,
        **dict.fromkeys(("busy", "memory_mb", "device_memory_mb")),
    }


def memory(device: torch.device) -> dict[str, float | None]:
    """The most that the process, and on a GPU its tensors there, have held so far, in MB (2^20 bytes)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
    tensors = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"memory_mb": most, "device_memory_mb": tensors}


def in_time(answers: Sequence[Answered]) -> int:
    """Conversations that were held without an error and without a packet that is late for a small buffer."""
    everyone = {a.conversation for a in answers}
    return len(everyone - {a.conversation for a in answers if a.error or a.late(IN_TIME)})


def kept(figures: Sequence[dict[str, Any]]) -> int:
    """The most conversations at once of which every one was kept in time; 0 if there is no such load."""
    closed = [one["conversations"] for one in figures if one["conversations"] == one["in_time"]]
    return max(closed, default=0)


def _percentiles(values: Sequence[float], digits: int = 1) -> dict[str, float | None]:
    seen = Histogram([value for value in values if not np.isnan(value)])
    return {f"p{p}": round(seen.percentile(p), digits) if seen.values else None for p in PERCENTILES}


def trace_of(work: Sequence[Work]) -> dict[str, Any]:
    """What ran when, for chrome://tracing or Perfetto: a lane a row."""
    lanes = {name: i for i, name in enumerate(dict.fromkeys(one.lane for one in work))}
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": i, "args": {"name": name}} for name, i in lanes.items()
    ]
    for one in work:
        place = {"ph": "X", "pid": 1, "tid": lanes[one.lane], "ts": one.start * 1e6}
        events.append({"name": one.name, "dur": (one.stop - one.start) * 1e6, "args": {"calls": one.calls}, **place})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


# ------------------------------------------------------------------------------------------------ tables


def heading(titles: Sequence[str]) -> str:
    """The first two lines of a table in Markdown."""
    return line(titles) + "\n" + "|" + "---|" * len(titles)


def line(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def cells(one: dict[str, Any]) -> list[str]:
    """A load's line under TITLES; latencies are p50 / p95 / p99 in ms."""
    closed = one["conversations"] is not None
    memory = one["device_memory_mb"] or one["memory_mb"]
    return [
        f"{one['conversations']} at once" if closed else f"{one['rate']:g} a second",
        *(_spread(one[f"{name}_ms"], ".0f") for name in ("text", "code", "sound")),
        _spread(one["rtf"], ".2f"),
        " / ".join(map(str, one["late"].values())) + f" of {one['packets']}",
        f"{one['longest_gap_ms']:.0f} ms",
        f"{one['in_time']} of {one['held']}",
        str(one["refused"]),
        f"{one['replies_per_second']:.2f}",
        "-" if one["busy"] is None else f"{100 * one['busy']:.0f} %",
        "-" if memory is None else f"{memory / 1024:.1f} GB",
    ]


def _spread(percentiles: dict[str, float | None], form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in percentiles.values())
