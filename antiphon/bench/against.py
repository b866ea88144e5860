"""One checkpoint, one question, in one run: transformers, the readable loop, and the engine alone and full.

They take turns in every round, greedily, so that all say the same and a noisy machine is unfair to all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from antiphon.engine import Engine
from antiphon.evaluate.reference import reference_answer
from antiphon.evaluate.stages import Case, spelled
from antiphon.generate import AudioDelta, Event, Omni, Reply, Session, collect

EXPERTS = ("grouped_mm", "batched_mm", "eager")  # transformers' ways to run experts; the first by default


@dataclass(frozen=True)
class Timed:
    """One or more answers at once: seconds for all of them and to the first sound, frames in all, the first's text."""

    seconds: float
    first: float
    frames: int
    ids: list[int]


def theirs(other: Any, case: Case, prompt_ids: Tensor) -> Timed:
    """The answer of transformers, whose first sound comes with its last."""
    start = time.perf_counter()
    ids = reference_answer(other, case, prompt_ids)
    took = time.perf_counter() - start
    return Timed(took, took, case.max_frames, ids)


def readable(model: Omni, case: Case) -> Timed:
    """The answer of the readable loop."""
    start = time.perf_counter()
    session = Session(model, window=case.window)
    _say(session, case)
    first, reply = _taken(session.respond(case.options), start)
    return Timed(time.perf_counter() - start, first, len(reply.codes), reply.text_ids)


def together(engine: Engine, case: Case, count: int) -> Timed:
    """The answers of the engine to `count` who ask at once."""
    calls = [engine.open(window=case.window) for _ in range(count)]
    start = time.perf_counter()
    for call in calls:
        _say(call, case)
    answers = [call.respond(case.options) for call in calls]
    for events in answers:  # none waits until it is taken: they are, one after another
        events.limit = case.max_frames + 1
    first, reply = _taken(answers[0], start)
    replies = [reply, *map(collect, answers[1:])]
    took = time.perf_counter() - start
    for call in calls:
        call.close()
    return Timed(took, first, sum(len(reply.codes) for reply in replies), reply.text_ids)


def compare(
    engine: Engine, other: Any, case: Case, rounds: int, counts: Sequence[int], threads: int
) -> list[dict[str, Any]]:
    """A row for each system: frames a second, that over transformers' round by round, and ms to the first sound.

    transformers and the readable loop have `threads` for their products, each lane of the engine is one.
    """
    model = engine.model
    ids = spelled(case, model.config, model.tokenizer)
    torch.set_num_threads(threads)
    experts = fastest_experts(other, case, ids)
    names = [f"transformers ({experts})", "readable loop", *(f"engine, {count} at once" for count in counts)]
    seen = list[list[Timed]]()
    for _ in range(rounds + 1):  # in the first, all are made warm
        torch.set_num_threads(threads)
        line = [theirs(other, case, ids), readable(model, case)]
        torch.set_num_threads(1)
        seen.append(line + [together(engine, case, count) for count in counts])
    frames = seen[0][1].frames  # transformers made as many, to throw some away where its limit is another
    rows = [[replace(row[0], frames=frames), *row[1:]] for row in seen[1:]]
    return [
        {
            "name": name,
            "frames_per_second": statistics.median(row[i].frames / row[i].seconds for row in rows),
            "over_transformers": statistics.median(
                (row[i].frames / row[i].seconds) / (row[0].frames / row[0].seconds) for row in rows
            ),
            "first_sound_ms": 1000 * statistics.median(row[i].first for row in rows),
            "sooner": statistics.median(row[0].first / row[i].first for row in rows),
            "says_the_same": all(row[i].ids == row[0].ids[: len(row[i].ids)] for row in rows),
        }
        for i, name in enumerate(names)
    ]


def fastest_experts(other: Any, case: Case, prompt_ids: Tensor) -> str:
    """Let transformers use the fastest of its ways to run experts, by the second of two short answers of each."""
    seconds, short = {}, replace(case, max_text_tokens=5, max_frames=10)
    for name in EXPERTS:
        other.set_experts_implementation(name)
        theirs(other, short, prompt_ids)
        seconds[name] = theirs(other, short, prompt_ids).seconds
    best = min(seconds, key=seconds.__getitem__)
    other.set_experts_implementation(best)
    return best


def _say(conversation: Any, case: Case) -> None:
    """The user's turn of a case, to a session or to a call."""
    for part in case.turns[0]:
        if isinstance(part, str):
            conversation.append_text(part)
        else:
            conversation.append_clip(*part)
    conversation.commit()


def _taken(events: Any, start: float) -> tuple[float, Reply]:
    """Seconds from `start` to the first sound of an answer, and the whole answer."""
    first = float("nan")

    def noted() -> Any:
        nonlocal first
        event: Event
        for event in events:
            if isinstance(event, AudioDelta) and event.frame == 0:
                first = time.perf_counter() - start
            yield event

    reply = collect(noted())
    return first, reply
