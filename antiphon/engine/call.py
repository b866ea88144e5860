"""One conversation of the engine: what its owner asks for, in order, and what comes back.

A call is the session of the readable loop whose reading is left to the engine: the same turns, caches and cuts, in
the same words. Its owner may be any thread; what it asks for waits in `wishes` until the call is not answering, and is
then done by the Thinker's lane. Only `cancel` and `close` do not wait.

Shapes: T positions, U the Thinker's width, W the Talker's.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from antiphon.aut import Windows
from antiphon.config import OmniConfig
from antiphon.conversation import Chunk, Steps
from antiphon.errors import InputError
from antiphon.generate import (
    AudioDelta,
    Done,
    Event,
    Options,
    Reply,
    Session,
    Thought,
    Utterance,
    collect,
    token_stream,
)
from antiphon.messages import most_positions
from antiphon.model import Boxes
from antiphon.spoken import Spoken

CHUNK = 128  # positions of a prompt that are read at once: the Talker follows the Thinker one chunk behind
SLICE = 4.0  # seconds of sound that are heard at once: an upload of minutes lets others come between
GUESSED_FRAMES = 4  # that an answer may have which nobody has asked for yet
KEPT_FRAMES = 64  # of sound that nobody has taken yet; then the answer waits for its listener


class EngineSession(Session):
    """A session that leaves what is pending to the engine."""

    slice = SLICE

    def _read(self) -> None:
        """Nothing: the lanes read it, together with what is pending elsewhere."""

    def read_now(self) -> None:
        """What is pending, in this thread: for a session that no lane knows yet."""
        self._grad_free(super()._read)


@dataclass(frozen=True)
class Failed:
    """The conversation has come to its end by an error; the others go on."""

    error: Exception


@dataclass
class Wish:
    """Something that an owner asked for."""

    what: Callable[[], Any]
    settled: bool  # only when nothing of the call is with the lanes
    needed: int = 0  # positions that it takes, at most: nothing is with the lanes either when older turns make room
    done: Future[Any] = field(default_factory=Future)
    steps: Steps[Any] | None = None  # of what takes long: one at a time
    asked: Windows | None = None  # that AuT has to hear before the next step
    heard: Tensor | None = None  # [n, U] what it gave

    def __post_init__(self) -> None:
        self.done.set_running_or_notify_cancel()  # it is done also if nobody waits any more: `cancel` changes nothing

    @property
    def waits(self) -> bool:
        """Whether AuT has to hear something first."""
        return self.asked is not None and self.heard is None

    def go_on(self) -> bool:
        """Do it, or the next step of it; whether it is done. Its owner is told what came of it."""
        try:
            if self.steps is None:
                made = self.what()
                if not isinstance(made, Generator):
                    self.done.set_result(made)
                    return True
                self.steps = made
            self.asked, heard, self.heard = None, self.heard, None
            self.asked = next(self.steps) if heard is None else self.steps.send(heard)
        except StopIteration as end:
            self.done.set_result(end.value)
        except Exception as error:
            self.done.set_exception(error)
        else:
            return False
        return True


class Answering:
    """The events of one answer, for one reader; iterate over it, or `collect` it."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._events = queue.SimpleQueue[Event | Failed]()
        self._wake = wake
        self.notify: Callable[[], None] = lambda: None  # called, in a thread of the engine, when there is an event
        self.asked_at = 0.0  # on the engine's clock
        self.cancelled = False  # before it began
        self.limit = KEPT_FRAMES  # of frames that wait to be taken; then the answer waits too
        self._given = self._taken = 0  # frames of sound; each is counted by one thread alone

    @property
    def kept(self) -> int:
        """Frames of sound that have not been taken."""
        return self._given - self._taken

    def put(self, event: Event | Failed) -> None:
        """One more event."""
        self._given += isinstance(event, AudioDelta)
        self._events.put(event)
        self.notify()

    def take(self, timeout: float | None = None) -> Event | Failed:
        """The next event.

        Raises:
            queue.Empty: none came in `timeout` seconds.
        """
        event = self._events.get(timeout=timeout)
        if isinstance(event, AudioDelta):
            self._taken += 1
            if self.kept < self.limit:
                self._wake()
        return event

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.take()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Done):
                return

    def reply(self) -> Reply:
        """The whole answer."""
        return collect(self)


@dataclass
class Guess:
    """An answer that is begun on a fork before anybody asks for it."""

    how: dict[str, Any]
    events: Answering
    call: Call | None = None  # the fork, once there is one
    void: bool = False


class Work(NamedTuple):
    """One batch, for the timeline: seconds on the engine's clock."""

    lane: str
    name: str
    start: float
    stop: float
    calls: tuple[str, ...]
    positions: int = 0  # of prompts that were read in it


class House(Protocol):
    """Where calls live: what they and the lanes share."""

    @property
    def model(self) -> Boxes:
        """The boxes."""
        ...

    @property
    def calls(self) -> list[Call]:
        """All conversations, in a list that is never changed."""
        ...

    def between_steps(self) -> AbstractContextManager[Any]:
        """Where no lane but the Thinker's is in a step."""
        ...

    def now(self) -> float:
        """Seconds on its clock."""
        ...

    def wake(self) -> None:
        """There may be work."""
        ...

    def noted(self, work: Work) -> None:
        """A batch was run."""
        ...

    def fork(self, call: Call) -> Call:
        """A call of its own that goes on from where this one is, and that nobody has asked for."""
        ...

    def leave(self, *calls: Call) -> None:
        """These are stepped no more."""
        ...


@dataclass(eq=False)
class Turn:
    """An answer that is being given."""

    events: Answering
    speech: Utterance
    thought: Thought
    words: list[int] = field(default_factory=list)  # that the Talker may have
    made: list[int] = field(default_factory=list)  # for each, the answer's tokens by then
    complete: bool = False  # no more words come
    told: bool = False  # its text comes from elsewhere and is no part of the conversation
    spoken: bool = False  # no more frames come
    ahead: float | None = None  # seconds that sound may be ahead of who listens to it; None is any
    generation: int = 0  # of the session: with another, the answer is cancelled
    first_at: float | None = None  # on the engine's clock, of the first sound
    residue: Tensor | None = None  # [W] codec channel of the next frame: the codes of the last one
    filter: Spoken | None = None

    @property
    def frames(self) -> int:
        """Made so far."""
        return len(self.speech.codes)

    @property
    def has_sound(self) -> bool:
        """Whether the sound of its first frame has been made."""
        return bool(self.speech.sound)

    @property
    def silent(self) -> int:
        """Frames whose sound has not been made."""
        return self.frames - len(self.speech.sound)

    @property
    def is_over(self) -> bool:
        """Whether both its text and its sound have come to an end."""
        return self.spoken and not self.silent and self.thought.finish is not None

    def due(self, seconds: float) -> float:
        """When the next frame, each of `seconds`, has to be there, for a listener who began with the first."""
        return self.events.asked_at if self.first_at is None else self.first_at + self.frames * seconds

    def has_word(self) -> bool:
        """Whether the next frame's word is known."""
        return self.complete or len(self.words) > self.frames

    def take(self, token: int) -> None:
        """The next token of the answer's text: events, and the words that are certain now."""
        if self.thought.take(token):
            self.say([token] if self.filter is None else self.filter.push(token))
        if self.thought.finish is not None:
            self.end_text()
        for delta in self.thought.deltas():
            self.events.put(delta)

    def say(self, words: list[int]) -> None:
        """More words for the Talker."""
        self.made += [len(self.thought.ids)] * len(words)
        self.words += words

    def end_text(self) -> None:
        """No more words come."""
        if not self.complete:
            self.say([] if self.filter is None else self.filter.flush())
            self.complete = True

    def next_input(self, config: OmniConfig) -> int:
        """The token on the text channel of the next frame, after the first."""
        place = self.frames - len(self.words)
        return self.words[place] if place < 0 else config.tts_pad_token_id if place else config.tts_eos_token_id

    def tokens_by(self, frame: int) -> int:
        """Tokens of the answer that the readable loop would have made when `frame` comes."""
        return self.made[frame] if frame < len(self.made) else len(self.thought.ids)


class Call:
    """A conversation of an engine; made by `Engine.open`.

    What is asked for is done in order and gives a Future: its `result` raises what the same method of `Session` does.
    """

    def __init__(self, session: EngineSession, name: str, house: House) -> None:
        self.session, self.name, self._house = session, name, house
        self.wishes = deque[Wish]()
        self.is_aside = False  # stepped after all others, in nobody's place: what nobody has asked for, or not in time
        self._guess: Guess | None = None  # an answer that was begun in case it is asked for
        self._asked: list[Answering] = []  # answers that were asked for and have not begun
        self.reading: deque[Chunk] = deque()  # for the Thinker, which has not come to it
        self.following: deque[tuple[Chunk, Tensor]] = deque()  # for the Talker, with the accept layer's states [n, U]
        self.turn: Turn | None = None
        self.error: Exception | None = None
        self.closed = False

    # ------------------------------------------------------------------------------------- its owner's

    def append_text(self, text: str) -> Future[None]:
        """As `Session.append_text`."""
        self._forget()
        return self._wish(lambda: self.session.text_steps(text), needed=most_positions(text))

    def append_audio(self, samples: Any, rate: int = 16000) -> Future[None]:
        """As `Session.append_audio`: windows that close are read while the user goes on speaking."""
        self._forget()
        return self._wish(lambda: self.session.audio_steps(samples, rate))

    def append_clip(self, samples: Any, rate: int) -> Future[None]:
        """As `Session.append_clip`."""
        self._forget()
        return self._wish(lambda: self.session.clip_steps(samples, rate))

    def append_message(self, message: Mapping[str, Any]) -> Future[None]:
        """As `Session.append_message`."""
        self._forget()
        return self._wish(lambda: self.session.message_steps(message), needed=most_positions(message))

    def commit(self) -> Future[None]:
        """As `Session.commit`."""
        return self._wish(lambda: self.session.commit_steps())

    def recent(self) -> Future[Tensor]:
        """As `Session.recent`, for `Omni.turn_end`."""
        return self._wish(lambda: self.session.recent_steps())

    def respond(self, options: Options | None = None, *, ahead: float | None = None, **changes: Any) -> Answering:
        """Answer what was said: the events of `Session.respond`; errors come with them.

        `ahead`: seconds that sound may be ahead of a listener who takes it in real time; an answer that has reached
        them yields to those that have not. None is as fast as it goes, after all others.
        """
        guess = self._guess
        if guess is not None and guess.how == _how(options, changes) and not (guess.call and guess.call.error):
            self._guess, guess.events.asked_at = None, self._house.now()
            self._ask(guess.events, lambda: self._take_over(guess, options, ahead, changes))
            return guess.events
        self._forget()
        events = Answering(self._house.wake)
        events.asked_at = self._house.now()
        self._ask(events, lambda: self._begin(events, options, ahead, changes))
        return events

    def speak(
        self, text: str, options: Options | None = None, *, ahead: float | None = None, **changes: Any
    ) -> Answering:
        """Say text that comes from elsewhere, as `Session.speak`; it is no part of the conversation."""
        self._forget()
        events = Answering(self._house.wake)
        events.asked_at = self._house.now()
        self._ask(events, lambda: self._begin_speech(events, text, options, ahead, changes))
        return events

    def guess(self, options: Options | None = None, **changes: Any) -> None:
        """Begin the answer on a fork, in case nothing more is said: after a short silence, say.

        It comes after all that somebody waits for. `respond` in the same way takes it over, with the frames that are
        there; anything else that is asked for, or said, throws it away.
        """
        self._forget()
        self._guess = guess = Guess(_how(options, changes), Answering(self._house.wake))
        guess.events.limit = GUESSED_FRAMES
        self._wish(lambda: self._begin_guess(guess, options, changes), settled=True)

    def truncate(self, ms: float) -> Future[str]:
        """As `Session.truncate`."""
        self._forget()
        return self._wish(lambda: self.session.truncate(ms), settled=True)

    def save(self, path: str | Path) -> Future[None]:
        """As `Session.save`; once all that was said has been read."""
        return self._wish(lambda: self.session.save(path), settled=True)

    def copy(self) -> Future[EngineSession]:
        """A fork of the session, for `Engine.adopt`."""
        return self._wish(self.session.copy, settled=True)

    def become(self, session: EngineSession) -> Future[None]:
        """Go on as another session (of `Engine.begun`), in the same place: for who has to tell a conversation anew."""
        self._forget()
        return self._wish(lambda: self._become(session), settled=True)

    def cancel(self) -> None:
        """Stop the answer that is being given or was asked for; it ends with finish = "cancelled".

        No frame is begun after this; two that were may still come.
        """
        self._forget()
        for events in [*self._asked]:
            events.cancelled = True
        self.session.cancel()
        self._house.wake()

    def close(self) -> None:
        """Leave the engine: an answer that is being given is cancelled."""
        self.closed = True
        self.cancel()

    # ------------------------------------------------------------------------------------- the lanes'

    @property
    def asked(self) -> Windows | None:
        """Windows that AuT has to hear before what its owner asked for can go on."""
        return self.wishes[0].asked if self.wishes and self.wishes[0].waits else None

    @property
    def settled(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.turn is None and not (self.wishes or self.reading or self.following)

    def next_wish(self) -> Wish | None:
        """What is to be done now: one after another, none while an answer is given, some only when all is read."""
        if not self.wishes or self.turn is not None:
            return None
        if self.wishes[0].steps is not None:
            return self.wishes[0]
        wish = self.wishes[0]
        if (wish.settled or self.session.lacks_room(wish.needed)) and (self.reading or self.following):
            return None
        return wish

    def fail(self, error: Exception) -> None:
        """End by an error: whoever waits for something is told."""
        self.error = error
        if self.turn is not None:
            self.turn.events.put(Failed(error))
            self.turn = None
        while self.wishes:
            self.wishes.popleft().done.set_exception(error)
        self.reading.clear()
        self.following.clear()

    def _wish(self, what: Callable[[], Any], settled: bool = False, needed: int = 0) -> Future[Any]:
        wish = Wish(what, settled, needed)
        if self.closed or self.error is not None:
            wish.done.set_exception(self.error or InputError("this conversation has left the engine; open another"))
        else:
            self.wishes.append(wish)
            self._house.wake()
        return wish.done

    def _ask(self, events: Answering, begin: Callable[[], Any]) -> None:
        """Wish for an answer; `cancel` finds it from now on, here until it has begun and then in its turn."""

        def begun(done: Future[Any]) -> None:
            self._asked.remove(events)
            _tell(events, done)

        self._asked.append(events)
        self._wish(begin).add_done_callback(begun)

    def _become(self, session: EngineSession) -> None:
        self.session = session

    def _begin(
        self, events: Answering, options: Options | None, ahead: float | None, changes: Mapping[str, Any]
    ) -> Steps[None]:
        session = self.session
        options, speaker = session.how_to_answer(options, changes)
        yield from session.commit_steps()
        session.open_reply()
        self.reading += session.lay_out(CHUNK)
        session.generation += 1
        thought, speech = session.begin_answer(options, speaker, session.generation, session.clock)
        words = None if options.verbatim else Spoken(session.model.tokenizer)
        self.turn = Turn(events, speech, thought, ahead=ahead, spoken=speaker is None, filter=words)
        self.turn.generation = session.generation
        if events.cancelled:
            session.cancel()

    def _begin_speech(
        self, events: Answering, text: str, options: Options | None, ahead: float | None, changes: Mapping[str, Any]
    ) -> None:
        session, model = self.session, self.session.model
        chosen, speaker = session.how_to_speak(options, changes)
        ids = list(token_stream([text], model))
        session.clock.begin()
        thought, speech = session.begin_speech(chosen, speaker, [], session.clock)
        words = None if chosen.verbatim else Spoken(model.tokenizer)
        self.turn = turn = Turn(events, speech, thought, told=True, ahead=ahead, filter=words)
        turn.generation = session.generation
        for token in ids:
            thought.ids.append(token)
            turn.say([token] if words is None else words.push(token))
        turn.end_text()
        if events.cancelled:
            session.cancel()

    def _begin_guess(self, guess: Guess, options: Options | None, changes: Mapping[str, Any]) -> None:
        if not guess.void:
            guess.call = fork = self._house.fork(self)
            fork._ask(guess.events, lambda: fork._begin(guess.events, options, None, changes))
            if guess.void:  # thrown away while it was made
                fork.close()

    def _take_over(
        self, guess: Guess, options: Options | None, ahead: float | None, changes: Mapping[str, Any]
    ) -> Steps[None] | None:
        """Become the fork that has begun to answer; where it has not, or has failed, begin anew."""
        fork = guess.call
        if fork is None or fork.error is not None or fork.wishes:
            if fork is not None:
                self._house.leave(fork)
            return self._begin(guess.events, options, ahead, changes)
        with self._house.between_steps():  # the other lanes may be at the fork
            self._house.leave(fork)
            self.session, self.reading, self.following = fork.session, fork.reading, fork.following
            self.turn = fork.turn
        guess.events.limit = KEPT_FRAMES
        if self.turn is not None:
            self.turn.ahead, self.turn.first_at = ahead, self._house.now() if self.turn.has_sound else None
        if guess.events.cancelled:
            self.session.cancel()
        return None

    def _forget(self) -> None:
        """Throw away an answer that was begun too early."""
        if self._guess is not None:
            self._guess.void = True
            if self._guess.call is not None:
                self._guess.call.close()
            self._guess = None


def _how(options: Options | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """How to answer, to be compared; a voice is the same if it is the same object."""
    every = vars(options or Options()) | dict(changes)
    return {name: id(value) if isinstance(value, Tensor) else value for name, value in every.items()}


def _tell(events: Answering, done: Future[Any]) -> None:
    error = done.exception()
    if isinstance(error, Exception):
        events.put(Failed(error))
