"""What the engine does under load, with the clocks of who listens: questions spoken in real time, answers played.

    question ──80 ms pieces, in real time──> call ──> first text, first code, first sample, every packet's time

Two clocks: from the last voiced sample of a question until the first sample that can be heard of its answer, and from
the request of somebody who has uploaded the whole question, as others measure.

Shapes: N samples.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from antiphon.audio import Samples
from antiphon.engine.call import Work
from antiphon.engine.engine import Engine
from antiphon.errors import AntiphonError
from antiphon.generate import AudioDelta, Done, Omni, TextDelta
from antiphon.metrics import Histogram

PIECE = 0.08  # seconds of a question that arrive at once
AUDIBLE = 0.01  # of full scale: what is softer is silence, in questions and in answers
BUFFERS = (0.0, 0.08, 0.16)  # seconds that a player holds back before it begins
AHEAD = 2.0  # seconds that answers may be ahead of their listeners
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """How the engine is driven."""

    conversations: int  # at once, each asking again when its answer has been played (closed loop)
    turns: int = 2  # of each
    uploaded: bool = False  # whole questions at once, instead of in real time
    max_frames: int = 50
    window: int | None = None  # seconds AuT attends over


@dataclass
class Answered:
    """One answer, in seconds on one clock."""

    asked: float  # the last voiced sample had been given, or the whole question
    text: float = np.nan  # first text
    code: float = np.nan  # first packet of sound
    sound: float = np.nan  # first packet with something to be heard in it
    packets: list[float] = field(default_factory=list)  # when each came
    end: float = 0.0
    error: str = ""

    def late(self, frame: float, buffer: float) -> int:
        """Packets that come after they are due, for a player that begins `buffer` seconds after the first."""
        if not self.packets:
            return 0
        begin = self.packets[0] + buffer
        return sum(at > begin + i * frame + 1e-9 for i, at in enumerate(self.packets))


def measure(engine: Engine, questions: Sequence[tuple[Samples, int]], load: Load) -> list[Answered]:
    """Hold conversations with a running engine; every answer of all of them."""
    answers: list[Answered] = []
    begun = time.perf_counter()
    threads = [
        threading.Thread(target=_converse, args=(engine, questions, load, i, begun, answers), daemon=True)
        for i in range(load.conversations)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _converse(
    engine: Engine,
    questions: Sequence[tuple[Samples, int]],
    load: Load,
    number: int,
    begun: float,
    answers: list[Answered],
) -> None:
    """One who asks, listens to the end, and asks again."""
    call = engine.open(window=load.window)
    frame = engine.seconds
    _sleep_until(begun + 0.37 * number)  # nobody begins together
    for turn in range(load.turns):
        samples, rate = questions[(number + turn) % len(questions)]
        answer = Answered(_ask(call, samples, rate, load.uploaded))
        answers.append(answer)
        try:
            for event in call.respond(seed=number * 100 + turn, max_frames=load.max_frames, ahead=AHEAD):
                now = time.perf_counter()
                if isinstance(event, TextDelta) and np.isnan(answer.text):
                    answer.text = now
                if isinstance(event, AudioDelta):
                    answer.packets.append(now)
                    loud = np.abs(event.samples) > AUDIBLE
                    if np.isnan(answer.sound) and loud.any():
                        answer.sound = now + int(loud.argmax()) / event.sample_rate
                if isinstance(event, Done):
                    answer.end = now
        except AntiphonError as error:
            answer.error = str(error)
            break
        answer.code = answer.packets[0] if answer.packets else np.nan
        if answer.packets:
            _sleep_until(answer.packets[0] + len(answer.packets) * frame)
    call.close()


def _ask(call: Any, samples: Samples, rate: int, uploaded: bool) -> float:
    """Give a question; when its last voiced sample was given."""
    if uploaded:
        call.append_audio(samples, rate)
        return time.perf_counter()
    voiced = len(samples) - int((np.abs(samples[::-1]) > AUDIBLE).argmax())
    begun, piece = time.perf_counter(), round(PIECE * rate)
    for start in range(0, voiced, piece):  # what is silent after the last word is not waited for
        part = samples[start : min(start + piece, voiced)]
        _sleep_until(begun + (start + len(part)) / rate)
        call.append_audio(part, rate)
    return time.perf_counter()


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))


# ------------------------------------------------------------------------------------------------ tables


def summary(engine: Engine, load: Load, answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """The figures of one load: latencies in ms, late packets by play-out buffer, and what was done a second."""
    good, frame = [a for a in answers if a.packets and not a.error], engine.seconds
    frames = sum(len(a.packets) for a in good)
    computing = sum(work.stop - work.start for work in engine.work)
    gaps = [b - a for answer in good for a, b in zip(answer.packets, answer.packets[1:], strict=False)]
    return {
        **asdict(load),
        "answers": len(answers),
        "errors": sum(bool(a.error) for a in answers),
        **{
            f"{name}_ms": _percentiles([getattr(a, name) - a.asked for a in good]) for name in ("text", "code", "sound")
        },
        "rtf": (sum(a.end - a.asked for a in good) / (frames * frame)) if frames else None,
        "late": {f"{1000 * b:.0f} ms": sum(a.late(frame, b) for a in good) for b in BUFFERS},
        "packets": frames,
        "longest_gap_ms": round(1000 * max(gaps, default=0.0), 1),
        "replies_per_second": len(good) / seconds,
        "busy": computing / seconds,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    seen = Histogram([s for s in seconds if not np.isnan(s)])
    return {f"p{p}": round(1000 * seen.percentile(p), 1) for p in PERCENTILES}


@dataclass(frozen=True)
class Run:
    """One load: its figures, its answers and what ran when."""

    figures: dict[str, Any]
    answers: list[Answered]
    work: list[Work]


def run(model: Omni, questions: Sequence[tuple[Samples, int]], loads: Sequence[Load]) -> Iterator[Run]:
    """Every load in turn, on one engine that is warm."""
    with Engine(model) as engine:
        engine.warm(max(load.conversations for load in loads))
        for load in loads:
            engine.work.clear()
            begun = time.perf_counter()
            answers = measure(engine, questions, load)
            yield Run(summary(engine, load, answers, time.perf_counter() - begun), answers, list(engine.work))


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
