"""Many conversations at once over one set of boxes.

    engine = Engine(load("antiphon/tiny", dtype=torch.float32)).start()
    call = engine.open("You are brief.")
    call.append_audio(samples, 24000)            # as it arrives; windows that close are read at once
    for event in call.respond(ahead=2.0):        # the events of the readable loop, from the first frame on
        ...

A conversation gives what `generate.py` gives, whoever its neighbours are: the same turns and caches, stepped together.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import statistics
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from antiphon.engine.call import Call, EngineSession, Work
from antiphon.engine.capture import BUCKETS
from antiphon.engine.lanes import RETRY, Lane
from antiphon.engine.sounding import Sounding
from antiphon.engine.speaking import Speaking
from antiphon.engine.thinking import Thinking
from antiphon.errors import BusyError
from antiphon.generate import Omni

KEPT_WORK = 100_000  # batches in the timeline
PREFIXES = 16  # system turns whose caches are kept
RETENTION = 0.8  # of the model's positions, that a long conversation keeps
IN_TIME = 2 / 3  # of a frame, that one of a full house may take: questions, the wire and others need some too
TRIED = 10  # frames
IDLE = 0.5  # seconds until a lane looks again if nobody wakes it
LEAVING = 1.0  # seconds that a newcomer waits at most for the place of a call that was closed


def threads(lanes: int = 3) -> int:
    """How many step the lanes: one for each, or as there are cores; two at least, so that one may wait for a device."""
    return min(lanes, max(2, os.cpu_count() or 1))


class Engine:
    """The lanes, the calls and who may come in.

    Args:
        model: the boxes.
        capacity: conversations at most; None is without limit (`measure` finds what the machine keeps in time).
        clock: seconds, for tests with another time.
    """

    def __init__(
        self, model: Omni, capacity: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.model, self.capacity, self._clock = model, capacity, clock
        self.calls: list[Call] = []
        self.work = deque[Work](maxlen=KEPT_WORK)
        with torch.no_grad():  # parts are bound for inference
            speaking = [Speaking(self), Sounding(self)] if model.speech is not None else []
            self.lanes: Sequence[Lane] = [Thinking(self), *speaking]
        self._prefixes = OrderedDict[Any, EngineSession]()
        self._opened = 0
        self._changed = threading.Condition()
        self._ticket = 0  # changes with every reason to look for work
        self._threads: list[threading.Thread] = []
        self._running = False

    # ------------------------------------------------------------------------------------- conversations

    def open(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        window: int | None = None,
        retention: float | None = RETENTION,
        aside: bool = False,
    ) -> Call:
        """A new conversation; it forgets its oldest turns rather than come to an end, unless `retention` is None.

        One that is `aside` is stepped after all others and takes nobody's place.

        Raises:
            BusyError: there are as many as the machine keeps in time.
            InputError: a window, tools or a retention of another form.
        """
        return self.adopt(self.begun(system, tools, window, retention), aside)

    def adopt(self, session: EngineSession, aside: bool = False) -> Call:
        """A conversation that goes on: a fork of another (`Call.copy`), or one that `load` read.

        Raises:
            BusyError: there are as many as the machine keeps in time.
        """
        with self._changed:
            try:
                return self._take_in(session, aside)
            except BusyError:
                if not (self._running and any(call.closed for call in self.calls)):
                    raise
                self._changed.wait_for(lambda: not any(call.closed for call in self.calls), LEAVING)
                return self._take_in(session, aside)

    def _take_in(self, session: EngineSession, aside: bool) -> Call:
        taken = sum(not call.is_aside for call in self.calls)
        if self.capacity is not None and taken >= self.capacity and not aside:
            raise BusyError.of(self.capacity, RETRY)
        for lane in self.lanes:
            lane.take_in(session)
        self._opened += 1
        call = Call(session, f"call {self._opened}", self)
        call.is_aside = aside
        self.calls = [*self.calls, call]
        return call

    def fork(self, call: Call) -> Call:
        """A fork of a settled call, stepped after all others; it takes nobody's place."""
        fork = Call(call.session.copy(), f"{call.name}?", self)
        fork.is_aside = True
        with self._changed:
            self.calls = [*self.calls, fork]
        return fork

    def leave(self, *calls: Call) -> None:
        """Step these no more."""
        with self._changed:
            self.calls = [call for call in self.calls if call not in calls]
            self._changed.notify_all()  # there may be somebody who waits for a place

    def load(self, path: str | Path) -> Call:
        """A conversation that `Call.save` or `Session.save` wrote.

        Raises:
            BusyError, WeightsError: no room, or no saved session of this model.
        """
        return self.adopt(EngineSession.load(self.model, path))

    def begun(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        window: int | None = None,
        retention: float | None = RETENTION,
    ) -> EngineSession:
        """A session whose system turn has been read, for `adopt` or `Call.become`.

        Raises:
            InputError: a window, tools or a retention of another form.
        """
        fresh = EngineSession(self.model, window=window, retention=retention)  # checks what it is given
        if system is None and not tools:
            return fresh
        begun = self._first_that_began(system, tools, window).copy()
        begun.retention = retention
        return begun

    def _first_that_began(
        self, system: str | None, tools: Sequence[Mapping[str, Any]], window: int | None
    ) -> EngineSession:
        key = (system, json.dumps(list(tools), sort_keys=True, default=repr), window)
        with self._changed:
            known = self._prefixes.get(key)
        if known is None:
            known = EngineSession(self.model, system, tools, window)
            known.read_now()
        with self._changed:
            self._prefixes[key] = known
            self._prefixes.move_to_end(key)
            while len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        return known

    # ------------------------------------------------------------------------------------- its life

    def start(self) -> Engine:
        """Step the lanes, in as many threads as there are cores for them."""
        self._running = True
        for number in range(threads(len(self.lanes))):
            thread = threading.Thread(target=self._serve, name=f"antiphon-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    @torch.inference_mode()
    def warm(self, conversations: int) -> None:
        """Record every step for up to so many conversations, so that no answer has to wait for it."""
        for lane in self.lanes:
            lane.warm(conversations)

    def measure(self, most: int = BUCKETS[-1]) -> int:
        """How many conversations this machine keeps in time: from now on the capacity. Before `start`.

        Where all ask at once, the frames of the middle one have to leave a third of their time.
        """
        self.capacity, best = None, 1
        for rows in BUCKETS[: bisect.bisect_right(BUCKETS, most)]:
            if self._pace_of(rows) > IN_TIME * self.seconds:
                break
            best = rows
        self.capacity = best
        return best

    def _pace_of(self, rows: int) -> float:
        """Seconds from frame to frame of the middle one of so many conversations that ask at once."""
        self.warm(rows)
        calls, done = [self.open() for _ in range(rows)], len(self.work)
        for call in calls:
            call.append_text("?")
        limits = {"max_frames": TRIED, "max_text_tokens": TRIED, "verbatim": True, "ahead": TRIED * self.seconds}
        answers = [call.respond(seed=seed, **limits) for seed, call in enumerate(calls)]
        with self:
            for answer in answers:
                answer.reply()
        made = defaultdict[str, list[float]](list)
        for work in itertools.islice(self.work, done, None):
            for name in work.calls if work.name == "sound" else ():
                made[name].append(work.stop)
        paces = [(stops[-1] - stops[0]) / (len(stops) - 1) for stops in made.values() if len(stops) > 1]
        return statistics.median(paces) if paces else 0.0

    def stop(self) -> None:
        """Cancel every answer and end: who waits for one is told."""
        for call in self.calls:
            call.close()
        self._running = False
        self.wake()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.run()  # what the threads left undone: every answer has its end

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    @torch.inference_mode()
    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Step the lanes in turn, in this thread, until there is nothing to do or `until` is true."""
        while not (until and until()) and any([lane.step() for lane in self.lanes]):
            self._sweep()
        self._sweep()

    @torch.inference_mode()
    def _serve(self) -> None:
        while self._running:
            ticket = self._ticket
            if any(self._step(lane) for lane in sorted(self.lanes, key=lambda lane: lane.stepped)):
                continue  # from the lane that has waited longest
            with self._changed:
                if self._ticket == ticket and self._running:
                    self._changed.wait(IDLE)

    def _step(self, lane: Lane) -> bool:
        """A step of a lane that no other thread is at; whether there was anything."""
        if not lane.stepping.acquire(blocking=False):
            return False
        try:
            with lane.stream():
                worked = lane.step()
        except Exception as error:  # of the engine's own: whose it is nobody knows, and nobody is left waiting
            for call in self.calls:
                call.fail(error)
            worked = True
        finally:
            lane.stepped = self.now()
            lane.stepping.release()
        self._sweep()
        if worked:
            self.wake()  # who looked while it was at it passed it over
        return worked

    @property
    def seconds(self) -> float:
        """Of a packet of sound."""
        return self.lanes[0].seconds

    def now(self) -> float:
        """Seconds on the engine's clock."""
        return self._clock()

    def wake(self) -> None:
        """There may be work."""
        with self._changed:
            self._ticket += 1
            self._changed.notify_all()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Where no lane but the Thinker's is in a step."""
        with ExitStack() as stack:
            for lane in self.lanes[1:]:
                stack.enter_context(lane.stepping)
            yield

    def noted(self, work: Work) -> None:
        """A batch was run."""
        self.work.append(work)

    def _sweep(self) -> None:
        """Let go of calls that have ended."""
        gone = [call for call in self.calls if call.error is not None or (call.closed and call.settled)]
        if gone:
            self.leave(*gone)
