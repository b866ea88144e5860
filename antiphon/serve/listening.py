"""What the microphone hears, as turns: the detector tells where one begins and ends, or the client does.

    sound ──> steps of the detector ──> Sign
                       └─ of a turn ──> Inbox ──> unheard: to the conversation, which reads along

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from antiphon.audio import Samples
from antiphon.serve.sounds import Wire, wire_rate
from antiphon.serve.vad import Detector, Sign, TurnTaking
from antiphon.serve.wire import new_id

LEAST_MS = 100  # of sound, that a turn needs


@dataclass
class Inbox:
    """The user's turn as it comes in."""

    rate: int
    item: str = field(default_factory=lambda: new_id("item"))
    pieces: list[Samples] = field(default_factory=list)
    count: int = 0  # samples
    heard: int = 0  # pieces that the conversation has

    def add(self, samples: Samples) -> None:
        """More of it."""
        self.pieces.append(samples)
        self.count += len(samples)

    @property
    def ms(self) -> int:
        """How long it is."""
        return round(1000 * self.count / self.rate)

    @property
    def samples(self) -> Samples:
        """All of it [N]."""
        return np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.float32)

    def unheard(self) -> Samples | None:
        """What has come since the last time [N], which counts as heard from now on."""
        new, self.heard = self.pieces[self.heard :], len(self.pieces)
        return np.concatenate(new) if new else None


class Listener:
    """One microphone.

    Args:
        form: of its sound on the wire.
        taking: how its turns are told; None leaves them to the client.
    """

    def __init__(self, form: Wire, taking: TurnTaking | None) -> None:
        self.rate = wire_rate(form)
        self.inbox = Inbox(self.rate)
        self.detector = Detector(taking, self.rate) if taking else None
        self._rest = np.zeros(0, np.float32)  # of a step of the detector
        self._before: list[Samples] = []  # a turn that begins now
        self._position = 0  # samples judged so far

    @property
    def taking(self) -> TurnTaking | None:
        """How turns are told."""
        return self.detector and self.detector.taking

    @property
    def is_speaking(self) -> bool:
        """Whether the user is, as far as it can tell."""
        return self.detector is not None and self.detector.speaking

    @property
    def ms(self) -> int:
        """Of sound that was judged."""
        return round(1000 * self._position / self.rate)

    @property
    def began_ms(self) -> int:
        """Where in it the turn began that is coming in."""
        return max(0, self.ms - self.inbox.ms)

    def push(self, samples: Samples) -> Iterator[Sign]:
        """More sound [N], in pieces of any length; when a sign comes, the inbox is as far as the sign."""
        if self.detector is None:
            self.inbox.add(samples)
            return
        self._rest = np.concatenate([self._rest, samples])
        while len(self._rest) >= self.detector.step:
            step, self._rest = self._rest[: self.detector.step], self._rest[self.detector.step :]
            sign = self.detector.push(step)
            self._position += len(step)
            self._keep(self.detector, step, sign)
            if sign is not None:
                yield sign

    def _keep(self, detector: Detector, step: Samples, sign: Sign | None) -> None:
        if sign is Sign.STARTED:
            self._begin_with(step)
        elif detector.speaking or sign is Sign.STOPPED:
            self.inbox.add(step)
        else:
            self._before.append(step)
            del self._before[: len(self._before) - round(detector.before_ms * self.rate / 1000) // len(step) - 1]

    def _begin_with(self, *last: Samples) -> None:
        for piece in [*self._before, *last]:
            self.inbox.add(piece)
        self._before = []

    def begin_silent(self) -> None:
        """A turn in which nothing is said, of the silence that was heard last."""
        self._before = self._before or [np.zeros(round(2 * LEAST_MS * self.rate / 1000), np.float32)]
        self._begin_with()

    def end_turn(self) -> Inbox:
        """The turn that has come in, which is over; another may begin."""
        inbox, self.inbox = self.inbox, Inbox(self.rate)
        return inbox

    def stop(self) -> None:
        """Whoever is speaking has stopped, says the client."""
        if self.is_speaking and self.detector is not None:
            self.detector.reset()

    def clear(self) -> None:
        """What came of the turn is void."""
        self.inbox, self._before, self._rest = Inbox(self.rate), [], np.zeros(0, np.float32)
        if self.detector is not None:
            self.detector.reset()
