"""How many machines a number of conversations needs, from what the parts of an answer cost on one.

    bench --out ──> costs: seconds of each kind of batch, by its calls and positions; turns: how much is said in one
    Device: the lanes of an engine on these costs, event by event ──> latency, late packets, how busy each lane is
    devices: who comes when others are there already ──> machines, and what a minute costs

Nothing here is computed by a model: a batch takes the seconds that its like took when they were measured, and the rules
by which the lanes choose their work are those of `engine.thinking`, `engine.speaking` and `engine.sounding`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from antiphon.bench.costs import Cost, Turns
from antiphon.bench.figures import summary
from antiphon.bench.load import AHEAD, PIECE, Answered, Load, Packet
from antiphon.engine.call import CHUNK
from antiphon.engine.capture import BUCKETS
from antiphon.engine.speaking import PATIENCE, SILENT
from antiphon.engine.thinking import FIRST_WORDS, WORDS_AHEAD
from antiphon.errors import InputError

# ------------------------------------------------------------------------------------------------ one machine


@dataclass(eq=False)
class Party:
    """One conversation of the simulation."""

    number: int
    turns: int  # that are left
    wishes: deque[bool] = field(default_factory=deque)  # pieces of a question; True is its end
    windows: int = 0  # that AuT has not heard yet
    heard: float = 0.0  # seconds of the question
    read: float = 0.0  # positions of it
    reading: deque[int] = field(default_factory=deque)
    following: deque[int] = field(default_factory=deque)
    answer: Answered | None = None
    is_asked: bool = False
    tokens: int = 0  # of its answer that will be
    frames: int = 0
    drawn: int = 0  # that there are
    is_read: bool = True  # the last of them has been read
    made: int = 0  # frames that have codes
    sounded: int = 0  # and sound
    awaited: int = -1  # the frame that its listener will want later, which the lane is woken for

    @property
    def is_over(self) -> bool:
        """Whether the text of its answer is."""
        return self.drawn >= self.tokens


class Device:
    """An engine's lanes under a load; nobody is refused.

    Args:
        costs: of every kind of batch.
        turns: what is said in one.
        load: who comes when.
        pause: seconds of silence after an answer, on average, until the next question.
        seed: of everything that chance decides.
    """

    def __init__(self, costs: dict[str, Cost], turns: Turns, load: Load, pause: float = 0.0, seed: int = 0) -> None:
        self.costs, self.turns, self.load, self.pause = costs, turns, load, pause
        self.chance = np.random.default_rng(seed)
        self.now = 0.0
        self.answers: list[Answered] = []
        self.parties: list[Party] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._lanes: dict[str, Callable[[], Iterator[float]]] = {
            "thinking": self._thinking,
            "speaking": self._speaking,
            "sounding": self._sounding,
        }
        self.busy = dict.fromkeys(self._lanes, 0.0)
        self._waiting = [*self._lanes]  # for a thread, longest first
        self._idle, self._free, self._waited = set[str](), turns.threads, 0

    def run(self) -> dict[str, Any]:
        """The figures of the load, as `antiphon bench` has them, with how busy each lane was."""
        for number, at in enumerate(self.load.arrivals()):
            self._at(at, partial(self._come, number))
        while self._queue:
            self.now, _, happen = heapq.heappop(self._queue)
            happen()
        figures = summary(self.load, self.answers, max(self.now, 1e-9))
        lanes = {name: busy / self.now for name, busy in self.busy.items()}
        return {**figures, "lanes": lanes, "threads": sum(lanes.values()) / self.turns.threads}

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), happen))

    def _wake(self) -> None:
        self._idle.clear()
        self._at(self.now, self._begin)

    def _begin(self) -> None:
        """Threads that are free step the lanes that have waited longest."""
        for name in [*self._waiting]:
            if self._free and name in self._waiting and name not in self._idle:
                self._waiting.remove(name)
                self._free -= 1
                self._go_on(name, self._lanes[name](), False)

    def _go_on(self, name: str, step: Iterator[float], begun: bool) -> None:
        """The next batch of a lane's step."""
        took = next(step, None)
        if took is not None:
            self.busy[name] += took
            self._at(self.now + took, partial(self._go_on, name, step, True))
            return
        self._free += 1
        self._waiting.append(name)
        if begun:
            self._at(self.now, self._begin)
        else:
            self._idle.add(name)

    def _cost(self, name: str, calls: int, positions: int = 0) -> float:
        return self.costs[name].seconds(calls, positions, self.chance) if name in self.costs else 0.0

    # ----------------------------------------------------------------------------------------- who speaks

    def _come(self, number: int) -> None:
        party = Party(number, self.load.turns)
        self.parties.append(party)
        self._ask(party)

    def _ask(self, party: Party) -> None:
        """A question, piece by piece, or whole."""
        party.turns -= 1
        pieces = [] if self.load.uploaded else np.arange(PIECE, self.turns.voiced, PIECE).tolist()
        for at in pieces:
            self._at(self.now + at, partial(self._hear, party, False))
        self._at(self.now + (0.0 if self.load.uploaded else self.turns.voiced), partial(self._hear, party, True))

    def _hear(self, party: Party, is_end: bool) -> None:
        party.wishes.append(is_end)
        if is_end:
            party.answer = Answered(self.now, party.number)
            self.answers.append(party.answer)
        self._wake()

    def _done(self, party: Party, answer: Answered) -> None:
        """An answer is whole: its listener hears it to the end, and asks again."""
        answer.end = self.now
        party.answer, party.is_asked = None, False
        party.heard = party.read = 0.0
        if party.turns:
            heard = self.now if self.load.uploaded else max(self.now, answer.code + answer.seconds)
            pause = self.chance.exponential(self.pause) if self.pause else 0.0
            self._at(heard + pause, partial(self._ask, party))
        else:
            self.parties.remove(party)

    # ------------------------------------------------------------------------------------------ the lanes

    def _thinking(self) -> Iterator[float]:
        """Seconds of each batch of a step of the lane that thinks; what a batch does is done after them."""
        for party in [*self.parties]:
            if party.wishes:
                yield self._cost("wish", 1)
                self._take(party, party.wishes.popleft())
        listening = [p for p in self.parties if p.windows]
        if listening:
            yield self._cost("aut", sum(p.windows for p in listening))
            for party in listening:
                self._lay_out(party)
        reads, positions = self._reads()
        if reads:
            yield self._cost("thinker", len(reads), positions)
            self._read(reads)
        drawing = [p for p in self.parties if p.is_asked and not p.reading and not p.is_over and p.is_read]
        if drawing:
            yield self._cost("draw", len(drawing))
            for party in drawing:
                self._draw(party)

    def _take(self, party: Party, is_end: bool) -> None:
        before = int(party.heard / self.turns.window)
        party.heard = self.turns.voiced if is_end else party.heard + PIECE
        closed = int(party.heard / self.turns.window) - before
        party.windows += closed + int(is_end)
        if is_end:
            party.is_asked, party.drawn, party.made, party.sounded, party.is_read = True, 0, 0, 0, True
            party.awaited = -1
            which = int(self.chance.integers(len(self.turns.tokens)))
            party.tokens, party.frames = max(1, self.turns.tokens[which]), max(1, self.turns.frames[which])

    def _lay_out(self, party: Party) -> None:
        """What AuT has heard is to be read; with the end of a question, what is written around it too."""
        heard = int(party.heard / self.turns.window) * self.turns.window * self.turns.rate
        new = round((self.turns.positions if party.is_asked else min(heard, self.turns.positions)) - party.read)
        party.windows, party.read = 0, party.read + new
        while new > 0:
            party.reading.append(min(CHUNK, new))
            new -= CHUNK

    def _reads(self) -> tuple[list[Party], int]:
        """Who reads next, and how many positions of prompts that are."""
        reads, positions = list[Party](), 0
        for party in sorted(self.parties, key=self._urgency):
            if party.reading:
                if not reads or positions + party.reading[0] <= self.turns.room:
                    reads.append(party)
                    positions += party.reading[0]
            elif party.is_asked and not party.is_over and not party.is_read and self._wants_words(party):
                reads.append(party)
        return reads, positions

    def _wants_words(self, party: Party) -> bool:
        return party.drawn < (party.made + WORDS_AHEAD if party.sounded else FIRST_WORDS)

    def _read(self, reads: Sequence[Party]) -> None:
        for party in reads:
            if party.reading:
                party.following.append(party.reading.popleft())
            else:
                party.is_read = True
        self._wake()

    def _draw(self, party: Party) -> None:
        party.drawn, party.is_read = party.drawn + 1, False
        if party.answer is not None and math.isnan(party.answer.text):
            party.answer.text = self.now
        self._wake()

    def _speaking(self) -> Iterator[float]:
        """The same of the lane that speaks."""
        following = [p for p in self.parties if p.following]
        is_late = following and self._waited < PATIENCE and any(map(self._is_late, self.parties))
        self._waited = self._waited + 1 if is_late else 0
        if following and not is_late:
            yield self._cost("talker", len(following), sum(p.following[0] for p in following))
            for party in following:
                party.following.popleft()
        due = sorted((p for p in self.parties if self._wants_frame(p)), key=self._urgency)[: BUCKETS[-1]]
        if due:
            yield self._cost("frame", len(due))
            for party in due:
                party.made += 1
            self._wake()

    def _is_late(self, party: Party) -> bool:
        answer = party.answer
        if answer is None or not party.sounded or not self._wants_frame(party):
            return False
        return answer.code + party.made * self.turns.seconds <= self.now

    def _wants_frame(self, party: Party) -> bool:
        answer = party.answer
        if answer is None or not party.is_asked or party.reading or party.following:
            return False
        if party.made >= party.frames or party.made - party.sounded >= (SILENT if party.sounded else 1):
            return False
        if not party.is_over and party.drawn <= party.made:
            return False
        if self.load.uploaded or not party.sounded:
            return True
        early = answer.code + party.made * self.turns.seconds - AHEAD - self.now
        if early > 0 and party.awaited != party.made:  # its listener has enough to hear
            party.awaited = party.made
            self._at(self.now + early, self._wake)
        return early <= 0

    def _sounding(self) -> Iterator[float]:
        """The same of the lane that makes the sound."""
        silent = sorted((p for p in self.parties if p.made > p.sounded), key=self._urgency)[: BUCKETS[-1]]
        if silent:
            yield self._cost("sound", len(silent))
            for party in silent:
                self._sound(party)

    def _sound(self, party: Party) -> None:
        answer = party.answer
        assert answer is not None
        answer.packets.append(Packet(self.now, self.turns.seconds))
        party.sounded += 1
        if party.sounded == 1:
            answer.code = self.now
        if party.sounded >= party.frames:
            self._done(party, answer)
        self._wake()

    def _urgency(self, party: Party) -> tuple[int, float]:
        answer = party.answer
        if answer is None or not party.is_asked:
            return 2, 0.0
        return 0, answer.code + party.made * self.turns.seconds if party.sounded else answer.asked


# ----------------------------------------------------------------------------------------------- many machines


@dataclass(frozen=True)
class Target:
    """What a conversation is promised."""

    first_ms: float = 500.0  # until the first packet, for 95 of 100 answers
    late: float = 0.001  # of packets, for a player that holds back 80 ms
    refused: float = 0.001  # of those who come


@dataclass(frozen=True)
class Capacity:
    """What one machine holds."""

    conversations: int
    figures: dict[str, Any]
    saturates: str  # what is busiest with one more


def capacity(
    costs: dict[str, Cost], turns: Turns, target: Target, pause: float, progress: Callable[[int], None]
) -> Capacity:
    """The most conversations that one machine holds as promised: doubled until it does not, then halved in between.

    Raises:
        InputError: it does not hold one.
    """

    def tried(count: int) -> dict[str, Any]:
        progress(count)
        return Device(costs, turns, Load(count, turns=10), pause).run()

    def is_kept(figures: dict[str, Any]) -> bool:
        late = figures["late"]["80 ms"] / max(1, figures["packets"])
        return figures["code_ms"]["p95"] <= target.first_ms and late <= target.late

    good, bad, best = 0, 1, {}
    while is_kept(figures := tried(bad)):
        good, bad, best = bad, 2 * bad, figures
        if good >= BUCKETS[-1]:
            return Capacity(good, best, f"rows of a batch ({good})")
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_kept(found := tried(middle)):
            good, best = middle, found
        else:
            bad, figures = middle, found
    if not good:
        raise InputError(
            f"one conversation alone has its first packet after {figures['code_ms']['p95']:.0f} ms; "
            "give a higher --first-ms"
        )
    shares = {f"the lane {name}": share for name, share in figures["lanes"].items()}
    shares["the threads that step the lanes"] = figures["threads"]
    busiest = max(shares, key=shares.__getitem__)
    return Capacity(good, best, f"{busiest} ({shares[busiest]:.0%} busy with {bad})")


def devices(conversations: float, each: int, refused: float) -> int:
    """The least machines, each holding so many, that refuse no larger share of those who come at any time.

    On average so many `conversations` are there; they come independently and find any place that is free (Erlang's
    loss formula, which is exact for that whatever their length).
    """
    blocked, places, count = 1.0, 0, 0
    while blocked > refused:
        count += 1
        for _ in range(each):
            places += 1
            blocked = conversations * blocked / (places + conversations * blocked)
    return count


def predicted(costs: dict[str, Cost], turns: Turns, load: dict[str, Any]) -> dict[str, Any]:
    """What a closed loop that was measured should have come to."""
    names = ("conversations", "turns", "uploaded", "max_frames", "max_text_tokens", "verbatim", "window")
    kept = replace(turns, frames=tuple(min(load["max_frames"], frames) for frames in turns.frames))
    return Device(costs, kept, Load(**{name: load[name] for name in names})).run()
