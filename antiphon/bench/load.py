"""A load on the engine, or on a server: questions spoken in real time, answers played, and when everything came.

    question ──80 ms pieces, in real time──> call ──> first text, first code, first sample, every packet's time

Two clocks: from the last voiced sample of a question until the first sample that can be heard of its answer, and from
the request of somebody who has uploaded the whole question and takes its answer as fast as it comes, as others measure.
Two loops: so many at once, each asking again when it has been answered (closed), and those who come when they come
and find the engine as it is (open).

Shapes: N samples.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from antiphon.audio import Samples
from antiphon.errors import AntiphonError, BusyError
from antiphon.generate import AudioDelta, Done, Event, Reply, TextDelta

PIECE = 0.08  # seconds of a question that arrive at once
AUDIBLE = 0.01  # of full scale: what is softer is silence, in questions and in answers
AHEAD = 2.0  # seconds that answers may be ahead of their listeners
APART, SPREAD = 0.37, 3.0  # seconds between conversations of a closed loop, all of which begin within the second
SEED = 1  # of who comes when

Question = tuple[Samples, int]  # samples [N] and their rate


class Conversation(Protocol):
    """What is asked and answers: a call of the engine, or one that is held over the wire."""

    def append_audio(self, samples: Any, rate: int) -> Any:
        """More of a question [N]."""
        ...

    def respond(self, *, ahead: float | None, **limits: Any) -> Iterable[Event]:
        """The answer as it comes."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class Host(Protocol):
    """Who holds conversations: the engine, or a server."""

    def open(self, *, window: int | None) -> Conversation:
        """A new one.

        Raises:
            BusyError: there are as many as it takes.
        """
        ...


class Packet(NamedTuple):
    """Sound that came at once."""

    at: float  # when
    seconds: float  # how much of it


@dataclass(frozen=True)
class Load:
    """How a host is driven: by `conversations` at once, or, where that is None, by `rate` a second that come."""

    conversations: int | None = 1  # at once, each asking again when it has been answered (closed loop)
    rate: float = 0.0  # conversations that begin a second, on average, and independently (open loop)
    seconds: float = 30.0  # for which they come
    turns: int = 2  # of each
    uploaded: bool = False  # whole questions at once and answers as fast as they come, instead of in real time
    max_frames: int = 50
    max_text_tokens: int = 1024
    verbatim: bool = False
    window: int | None = None  # seconds AuT attends over

    def arrivals(self) -> list[float]:
        """Seconds from the start at which conversations begin."""
        if self.conversations is not None:
            return [(APART * i) % SPREAD for i in range(self.conversations)]
        draws, at = np.random.default_rng(SEED), list[float]()
        while (following := (at[-1] if at else 0.0) + draws.exponential(1 / self.rate)) < self.seconds:
            at.append(following)
        return at


@dataclass
class Answered:
    """One answer, in seconds on one clock."""

    asked: float  # the last voiced sample had been given, or the whole question
    conversation: int = 0
    text: float = np.nan  # first text
    code: float = np.nan  # first packet of sound
    sound: float = np.nan  # first packet with something to be heard in it
    packets: list[Packet] = field(default_factory=list)
    end: float = 0.0
    error: str = ""
    refused: bool = False  # the engine was full
    reply: Reply | None = None

    @property
    def seconds(self) -> float:
        """Of sound, so far."""
        return sum(packet.seconds for packet in self.packets)

    def late(self, buffer: float) -> int:
        """Packets that come after they are due, for a player that begins `buffer` seconds after the first."""
        late, due = 0, self.code + buffer
        for packet in self.packets:
            late += packet.at > due + 1e-9
            due += packet.seconds
        return late

    def fail(self, error: AntiphonError) -> None:
        """It came to nothing."""
        self.error, self.refused = str(error), isinstance(error, BusyError)


def measure(host: Host, questions: Sequence[Question], load: Load) -> list[Answered]:
    """Hold conversations; every answer of all of them."""
    answers: list[Answered] = []
    begun = time.perf_counter()
    threads = [
        threading.Thread(target=_converse, args=(host, questions, load, i, begun + at, answers), daemon=True)
        for i, at in enumerate(load.arrivals())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _converse(
    host: Host, questions: Sequence[Question], load: Load, number: int, when: float, answers: list[Answered]
) -> None:
    """One who comes, asks, listens to the end, and asks again."""
    sleep_until(when)
    try:
        call = host.open(window=load.window)
    except AntiphonError as error:
        answers.append(Answered(time.perf_counter(), number))
        answers[-1].fail(error)
        return
    for turn in range(load.turns):
        answer = Answered(np.nan, number)
        answers.append(answer)
        try:
            answer.asked = ask(call, questions[(number + turn) % len(questions)], load.uploaded)
            listen(call, answer, load, seed=number * 100 + turn)
        except AntiphonError as error:
            answer.fail(error)
            break
        if answer.packets and not load.uploaded:
            sleep_until(answer.code + answer.seconds)
    call.close()


def ask(call: Conversation, question: Question, uploaded: bool) -> float:
    """Give a question; when its last voiced sample was given."""
    samples, rate = question
    if uploaded:
        call.append_audio(samples, rate)
        return time.perf_counter()
    voiced = voiced_samples(samples)
    begun, piece = time.perf_counter(), round(PIECE * rate)
    for start in range(0, voiced, piece):  # what is silent after the last word is not waited for
        part = samples[start : min(start + piece, voiced)]
        sleep_until(begun + (start + len(part)) / rate)
        call.append_audio(part, rate)
    return time.perf_counter()


def voiced_samples(samples: Samples) -> int:
    """How many there are up to the last that can be heard."""
    return len(samples) - int((np.abs(samples[::-1]) > AUDIBLE).argmax())


def listen(call: Conversation, answer: Answered, load: Load, seed: int) -> None:
    """Have a question answered, and note when everything came.

    Raises:
        AntiphonError: what the conversation failed by.
    """
    limits = {"max_frames": load.max_frames, "max_text_tokens": load.max_text_tokens, "verbatim": load.verbatim}
    for event in call.respond(seed=seed, ahead=None if load.uploaded else AHEAD, **limits):
        answer.end = now = time.perf_counter()
        if isinstance(event, TextDelta) and np.isnan(answer.text):
            answer.text = now
        if isinstance(event, AudioDelta):
            if not answer.packets:
                answer.code = now
            answer.packets.append(Packet(now, len(event.samples) / event.sample_rate))
            loud = np.abs(event.samples) > AUDIBLE
            if np.isnan(answer.sound) and loud.any():
                answer.sound = now + int(loud.argmax()) / event.sample_rate
        if isinstance(event, Done):
            answer.reply = event.reply


def sleep_until(when: float) -> None:
    """Wait for a time of `time.perf_counter`."""
    time.sleep(max(0.0, when - time.perf_counter()))
