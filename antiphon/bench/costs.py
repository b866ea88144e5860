"""What the parts of an answer cost on this machine, by all that ran in a load: what `antiphon plan` reckons with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antiphon.bench.load import Answered
from antiphon.engine.call import Work
from antiphon.engine.lanes import POSITIONS
from antiphon.errors import InputError

Seen = tuple[float, int, int]  # seconds, calls, positions of a batch


@dataclass(frozen=True)
class Cost:
    """Seconds of one kind of batch: base + each·calls + long·positions, times what chance makes of it."""

    lane: str
    base: float
    each: float
    long: float
    spread: float  # of the logarithm

    def seconds(self, calls: int, positions: int, chance: np.random.Generator) -> float:
        """Of one batch."""
        usual = self.base + self.each * calls + self.long * positions
        return usual * math.exp(self.spread * chance.standard_normal() - self.spread**2 / 2)


def costs_of(work: Sequence[Work]) -> dict[str, Cost]:
    """What every kind of batch costs, by all that ran."""
    kinds: dict[tuple[str, str], list[Seen]] = {}
    for one in work:
        kinds.setdefault((one.lane, one.name), []).append((one.stop - one.start, len(one.calls), one.positions))
    return {name: fitted(lane, seen) for (lane, name), seen in kinds.items()}


def fitted(lane: str, seen: Sequence[Seen]) -> Cost:
    """The cost that lies nearest, by shares, to those seen; none of its parts is below zero."""
    seconds, *parts = np.array(seen, float).T
    seconds, parts = np.maximum(seconds, 1e-7), np.stack([np.ones_like(seconds), *parts])
    used = [i for i, part in enumerate(parts) if i == 0 or np.ptp(part)]  # what never varied is in the base
    while True:
        found = np.linalg.lstsq((parts[used] / seconds).T, np.ones_like(seconds), rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    whole = np.zeros(3)
    whole[used] = found
    ratio = seconds / np.maximum(whole @ parts, 1e-9)
    whole *= ratio.mean()  # so that the sum over all batches comes out, which the nearest by shares falls short of
    return Cost(lane, *whole.tolist(), spread=float(np.log(ratio).std()))


@dataclass(frozen=True)
class Turns:
    """How much is said in a turn."""

    voiced: float  # seconds of a question
    positions: float  # that the Thinker reads of it, all in all
    rate: float  # of them, in a second of sound
    tokens: tuple[int, ...]  # of answers' text, as they were
    frames: tuple[int, ...]  # and of their speech
    seconds: float  # of a frame
    window: float = 2.0  # seconds that AuT hears at once
    room: int = POSITIONS["cpu"]  # positions of prompts that the Thinker reads at once
    threads: int = 3  # that step the lanes


def turns_of(answers: Sequence[Answered], work: Sequence[Work], voiced: float, window: float, rate: float) -> Turns:
    """How much was said in the turns of a load.

    Raises:
        InputError: nothing was answered.
    """
    replies = [a.reply for a in answers if a.reply is not None and a.packets]
    if not replies:
        raise InputError("nothing was answered in this load; give one that is within the capacity")
    read = sum(one.positions for one in work if one.name == "thinker")
    frames = tuple(len(reply.codes) for reply in replies)
    seconds = sum(a.seconds for a in answers) / max(1, sum(len(a.packets) for a in answers))
    tokens = tuple(len(reply.text_ids) for reply in replies)
    return Turns(voiced, read / len(replies), rate, tokens, frames, seconds, window)
