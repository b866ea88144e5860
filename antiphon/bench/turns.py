"""Does a long conversation answer as soon as a fresh one? Its n-th turn beside the second of another, in turn.

Each conversation is had once and then forked: every round goes on from the same place, once in the long one and once in
the fresh one, so that the machine's noise hits both.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import numpy as np

from antiphon.bench.load import Answered, Load, Question, ask, listen
from antiphon.engine import Engine
from antiphon.engine.call import EngineSession
from antiphon.errors import AntiphonError, InputError


def nth_over_second(engine: Engine, question: Question, turn: int, load: Load, rounds: int) -> dict[str, Any]:
    """How soon turn `turn` has its first packet, over turn 2 of another conversation; both on a running engine.

    Raises:
        InputError: there is no room for so many turns, or an answer is silent.
    """
    sessions = {"second": _after(engine, question, 1, load), "nth": _after(engine, question, turn - 1, load)}
    seen: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(rounds):
        for name in list(sessions)[:: 1 if i % 2 else -1]:  # who is first takes turns too
            seen[name].append(_first_packet(engine, sessions[name], question, load, seed=i))
    return {
        "turn": turn,
        "positions": len(sessions["nth"].ids),
        "positions_second": len(sessions["second"].ids),
        **{f"{name}_ms": round(1000 * statistics.median(seconds), 1) for name, seconds in seen.items()},
        "ratio": statistics.median(n / s for n, s in zip(seen["nth"], seen["second"], strict=True)),
    }


def _after(engine: Engine, question: Question, turns: int, load: Load) -> EngineSession:
    """A conversation of so many turns, none of which is forgotten."""
    call = engine.open(window=load.window, retention=None)
    for turn in range(turns):
        _answer(engine, call, question, replace(load, uploaded=True), turn)
    session = call.copy().result()
    call.close()
    return session


def _first_packet(engine: Engine, session: EngineSession, question: Question, load: Load, seed: int) -> float:
    """Seconds from the last voiced sample of a question to the first packet of its answer, on a fork of a session."""
    call = engine.adopt(session.copy())
    answer = _answer(engine, call, question, load, seed)
    call.close()
    if np.isnan(answer.code):
        raise InputError("an answer has no sound, so there is nothing to time; ask another --question")
    return answer.code - answer.asked


def _answer(engine: Engine, call: Any, question: Question, load: Load, seed: int) -> Answered:
    answer = Answered(ask(call, question, load.uploaded))
    try:
        listen(call, answer, load, seed)
    except AntiphonError as error:
        raise InputError(f"the conversation came to an end before its last turn: {error}") from None
    return answer
