"""What is kept between requests, in memory and for the key that it belongs to: uploaded voices, text of spoken replies.

Nothing is written. A voice is a vector; the names that OpenAI's clients ask for are the checkpoint's own, in turn.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from antiphon.generate import Omni
from antiphon.serve.refusals import Refused
from antiphon.serve.wire import new_id

# what stock clients ask for unless told otherwise
OPENAI = (
    *("alloy", "ash", "ballad", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse", "cedar"),
)
REFERENCE = (3.0, 30.0)  # seconds of a recording


@dataclass(frozen=True)
class Voice:
    """An uploaded voice."""

    name: str
    owner: str
    vector: Tensor  # [W]
    id: str = field(default_factory=lambda: new_id("voice"))
    created: int = field(default_factory=lambda: int(time.time()))


class Voices:
    """The uploaded voices."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._by_id: dict[str, Voice] = {}

    def of(self, who: str) -> Sequence[Voice]:
        """Those of one key."""
        return [voice for voice in self._by_id.values() if voice.owner == who]

    def check_room(self) -> None:
        """Raise Refused if there is no room for another."""
        if len(self._by_id) >= self.most:
            raise Refused(
                f"there are {self.most} voices, as many as are kept; delete one first", 429, "too_many_voices"
            )

    def add(self, name: str, who: str, vector: Tensor) -> Voice:
        """Keep one more.

        Raises:
            Refused: there is no room.
        """
        self.check_room()
        voice = Voice(name, who, vector)
        self._by_id[voice.id] = voice
        return voice

    def remove(self, id: str, who: str) -> None:
        """Forget one.

        Raises:
            Refused: there is none of that id.
        """
        if id not in self._by_id or self._by_id[id].owner != who:
            raise Refused(f"there is no uploaded voice {id!r}", 404, "voice_not_found", "voice_id")
        del self._by_id[id]

    def find(self, name: str | None, who: str, model: Omni, param: str) -> str | Tensor | None:
        """What to answer with: a name of the checkpoint's, an uploaded vector, or None for the first voice.

        Raises:
            Refused: no such voice.
        """
        if name is None or model.speech is None:
            return None
        if name in model.voices:
            return name
        for voice in self.of(who):
            if name in (voice.id, voice.name):
                return voice.vector
        if name in OPENAI and model.voices:
            return model.voices[OPENAI.index(name) % len(model.voices)]
        known = ", ".join([*model.voices, *(voice.name for voice in self.of(who))])
        raise Refused(f"there is no voice {name!r}; there are {known}", param=param, code="invalid_value")


@dataclass
class Remembered:
    """Text of spoken replies, which later requests name by id."""

    most: int
    seconds: float
    _kept: OrderedDict[str, tuple[float, str, str]] = field(default_factory=OrderedDict)

    def add(self, id: str, who: str, text: str) -> int:
        """Keep one; the time until which it is kept."""
        until = time.time() + self.seconds
        self._kept[id] = (until, who, text)
        while len(self._kept) > self.most or next(iter(self._kept.values()))[0] < time.time():
            self._kept.popitem(last=False)
        return int(until)

    def find(self, id: str, who: str) -> str:
        """Its text.

        Raises:
            Refused: it is not there, or not any more.
        """
        until, owner, text = self._kept.get(id, (0.0, "", ""))
        if until < time.time() or owner != who:
            raise Refused(
                f"there is no reply {id!r}, or not any more; send its text", code="invalid_value", param="messages"
            )
        return text
