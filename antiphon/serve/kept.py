"""What is kept between requests, in memory and for the key that it belongs to: uploaded voices, text of spoken replies.

Nothing is written to a disk. A voice is a vector; the names that OpenAI's clients ask for are the checkpoint's own, in
turn. Where several processes serve, all of it lies on shelves that each of them reaches, and Realtime sessions are kept
there as well, as they are between turns, so that another process can take them up.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antiphon.generate import Omni
from antiphon.serve.happenings import Item
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
    vector: NDArray[np.float32]  # [W]
    id: str = field(default_factory=lambda: new_id("voice"))
    created: int = field(default_factory=lambda: int(time.time()))


class Voices:
    """The uploaded voices: at most `most`, on the shelf `by_id`."""

    def __init__(self, most: int, by_id: MutableMapping[str, Voice]) -> None:
        self.most, self._by_id = most, by_id

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
        voice = Voice(name, who, vector.float().numpy(force=True))
        self._by_id[voice.id] = voice
        return voice

    def remove(self, id: str, who: str) -> None:
        """Forget one.

        Raises:
            Refused: there is none of that id.
        """
        voice = self._by_id.get(id)
        if voice is None or voice.owner != who:
            told = f"there is no uploaded voice {id!r}; GET /v1/audio/voices lists those of this key"
            raise Refused(told, 404, "voice_not_found", "voice_id")
        self._by_id.pop(id, None)

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
                return torch.from_numpy(voice.vector)
        if name in OPENAI and model.voices:
            return model.voices[OPENAI.index(name) % len(model.voices)]
        known = ", ".join([*model.voices, *(voice.name for voice in self.of(who))])
        raise Refused(f"there is no voice {name!r}; there are {known}", param=param, code="invalid_value")


class Remembered:
    """Text of spoken replies, which later requests name by id: at most `most`, for `seconds`, on the shelf `kept`."""

    def __init__(self, most: int, seconds: float, kept: MutableMapping[str, tuple[float, str, str]]) -> None:
        self.most, self.seconds, self._kept = most, seconds, kept

    def add(self, id: str, who: str, text: str) -> int:
        """Keep one; the time until which it is kept."""
        now = time.time()
        self._kept[id] = (now + self.seconds, who, text)
        kept = sorted((until, id) for id, (until, _, _) in self._kept.items())
        for until, old in kept:
            if until >= now and len(kept) <= self.most:
                break
            self._kept.pop(old, None)
            kept = kept[1:]
        return int(now + self.seconds)

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


@dataclass(frozen=True)
class Saved:
    """A Realtime session between turns; what was said in it lies apart."""

    who: str
    token: str  # that its client has to show
    config: Mapping[str, Any]
    conversation: str  # its id
    worker: str  # who holds it
    items: tuple[str, ...] = ()
    at: float = field(default_factory=time.time)  # when it was kept


@dataclass(frozen=True)
class Shelves:
    """Where all that is kept lies: in this process, or where every worker of a server reaches it."""

    voices: MutableMapping[str, Voice] = field(default_factory=dict)
    replies: MutableMapping[str, tuple[float, str, str]] = field(default_factory=dict)
    sessions: MutableMapping[str, Saved] | None = None  # None: nobody else is there who could take one up
    said: MutableMapping[tuple[str, str], Item] = field(default_factory=dict)  # by session and item
    metrics: MutableMapping[str, bytes] = field(default_factory=dict)  # what each worker has counted, as text

    def keep(self, id: str, saved: Saved, *items: Item) -> None:
        """Keep a session as it is now; `items` are those that are new or have changed."""
        if self.sessions is None:
            return
        for item in items:
            self.said[id, item.id] = item
        before = self.sessions.get(id)
        self.sessions[id] = saved
        for gone in set(before.items if before else ()) - set(saved.items):
            self.said.pop((id, gone), None)

    def find(self, id: str, who: str, token: str) -> Saved | None:
        """A session that its own client asks for, if there is one."""
        saved = None if self.sessions is None else self.sessions.get(id)
        return saved if saved and saved.who == who and hmac.compare_digest(saved.token, token) else None

    def said_in(self, id: str, saved: Saved) -> list[Item]:
        """What was said in a session, in order."""
        return [item for name in saved.items if (item := self.said.get((id, name))) is not None]

    def forget(self, id: str, worker: str) -> None:
        """A session of this worker has ended."""
        saved = None if self.sessions is None else self.sessions.get(id)
        if self.sessions is not None and saved is not None and saved.worker == worker:
            self.sessions.pop(id, None)
            for name in saved.items:
                self.said.pop((id, name), None)

    def sweep(self, seconds: float) -> None:
        """Forget sessions that have been left for so long: whoever held them has not told how they ended."""
        for id, saved in [*(self.sessions or {}).items()]:
            if saved.at < time.time() - seconds:
                self.forget(id, saved.worker)

    def sessions_of(self, who: str) -> int:
        """How many sessions of one key there are."""
        return 0 if self.sessions is None else sum(saved.who == who for saved in self.sessions.values())
