"""The nouns of a spoken conversation, and what happens in one; no wire protocol knows more, and this knows none.

Talk ──Happening──> a codec (realtime.py) ──> the client
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from antiphon.audio import Samples
from antiphon.generate import Options
from antiphon.serve.sounds import Wire
from antiphon.serve.vad import TurnTaking

Role = Literal["user", "assistant", "system", "call", "result"]
Status = Literal["in_progress", "completed", "incomplete"]


@dataclass(frozen=True)
class Manner:
    """How a conversation is held."""

    instructions: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    choice: str = "auto"  # auto, none, required, or a function's name
    options: Options = field(default_factory=Options)
    heard_as: Wire = "audio/pcm"
    said_as: Wire = "audio/pcm"
    taking: TurnTaking | None = field(default_factory=TurnTaking)  # None: the client says when a turn is over
    language: str | None = None  # of what the user says is written down for the client; None: it is not, "" any
    answers: bool = True  # False: it only writes down
    retention: float | None = 0.8


@dataclass
class Part:
    """Text; or sound with its text."""

    text: str = ""
    sound: bytearray | None = None  # 16-bit PCM
    rate: int = 0

    @property
    def seconds(self) -> float:
        """Of sound."""
        return len(self.sound or b"") / 2 / self.rate if self.rate else 0.0

    @property
    def ms(self) -> int:
        """Of sound."""
        return round(1000 * self.seconds)

    @property
    def samples(self) -> Samples:
        """Of the sound [N]."""
        return np.frombuffer(bytes(self.sound or b""), "<i2").astype(np.float32) / np.float32(1 << 15)


@dataclass
class Item:
    """Something that was said: a turn of somebody, or a step to a tool and back."""

    id: str
    role: Role
    parts: list[Part] = field(default_factory=list)
    status: Status = "completed"
    name: str = ""  # of the function that is called
    call_id: str = ""
    text: str = ""  # the arguments of a call, or its result

    @property
    def sound_bytes(self) -> int:
        """Of what is kept of it."""
        return sum(len(part.sound or b"") for part in self.parts)


@dataclass
class Answer:
    """An answer that is being given, or was."""

    id: str
    options: Options
    in_conversation: bool = True
    metadata: dict[str, str] | None = None
    items: list[Item] = field(default_factory=list)
    status: Literal["in_progress", "completed", "cancelled", "incomplete", "failed"] = "in_progress"
    reason: Literal["turn_detected", "client_cancelled", "max_output_tokens"] | None = None
    error: Exception | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens."""

    text_in: int
    audio_in: int
    cached: int  # of these, read for an earlier answer
    text_out: int
    audio_out: int
    left: int = 0  # positions of the conversation that are free


@dataclass(frozen=True)
class SpeechStarted:
    """The user speaks, since `ms` of what was sent."""

    item: str
    ms: int


@dataclass(frozen=True)
class SpeechStopped:
    """The user has stopped."""

    item: str
    ms: int


@dataclass(frozen=True)
class TimedOut:
    """Nobody has said anything for a while."""

    item: str
    start_ms: int
    stop_ms: int


@dataclass(frozen=True)
class Committed:
    """The user's turn is over."""

    item: str
    after: str | None


@dataclass(frozen=True)
class Cleared:
    """What was sent of a turn is void."""


@dataclass(frozen=True)
class Added:
    """An item has its place in the conversation."""

    item: Item
    after: str | None
    done: bool = True  # False: it is being made


@dataclass(frozen=True)
class Finished:
    """An item that was being made is whole."""

    item: Item
    after: str | None


@dataclass(frozen=True)
class Truncated:
    """An item was cut to what was heard."""

    item: str
    ms: int


@dataclass(frozen=True)
class Deleted:
    """An item is gone."""

    item: str


@dataclass(frozen=True)
class Faded:
    """The sound of an item is kept no more; its text is."""

    item: str


@dataclass(frozen=True)
class Retrieved:
    """An item that was asked for."""

    item: Item


@dataclass(frozen=True)
class HeardMore:
    """More of what the user said, written down."""

    item: str
    text: str


@dataclass(frozen=True)
class Heard:
    """All of what the user said."""

    item: str
    text: str
    heard: int  # tokens of sound, of the question, and of the text
    asked: int
    said: int


@dataclass(frozen=True)
class NotHeard:
    """It could not be written down."""

    item: str
    error: Exception


@dataclass(frozen=True)
class AnswerBegun:
    """An answer is being given."""

    answer: Answer


@dataclass(frozen=True)
class OutputBegun:
    """An item of an answer, at `place`."""

    answer: Answer
    item: Item
    place: int


@dataclass(frozen=True)
class Said:
    """More text of an item: for people, or a call's arguments."""

    answer: Answer
    item: Item
    place: int
    text: str


@dataclass(frozen=True)
class Sounded:
    """More of an item's sound, as bytes of the wire's format."""

    answer: Answer
    item: Item
    place: int
    data: bytes


@dataclass(frozen=True)
class OutputEnded:
    """An item of an answer is whole."""

    answer: Answer
    item: Item
    place: int


@dataclass(frozen=True)
class AnswerEnded:
    """An answer is over; its status says how."""

    answer: Answer


@dataclass(frozen=True)
class Problem:
    """Something that the client asked for was not done."""

    error: Exception


Happening = (
    SpeechStarted
    | SpeechStopped
    | TimedOut
    | Committed
    | Cleared
    | Added
    | Finished
    | Truncated
    | Deleted
    | Faded
    | Retrieved
    | HeardMore
    | Heard
    | NotHeard
    | AnswerBegun
    | OutputBegun
    | Said
    | Sounded
    | OutputEnded
    | AnswerEnded
    | Problem
)
