"""What whoever runs the server decides: the model's name, who may come in, and how much of everything."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from antiphon.engine.thinking import LIVE_WINDOW
from antiphon.errors import InputError

KEYS = "ANTIPHON_API_KEYS"  # in the environment, separated by commas or spaces
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Settings:
    """The defaults suit one machine and a handful of people."""

    name: str = "tiny"  # of the model, on the wire
    aliases: tuple[str, ...] = ()  # other names that clients may call it by
    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()  # who may come in; nobody is asked for one if there is none
    origins: tuple[str, ...] = ()  # of web pages elsewhere that may speak to this server
    window: int | None = None  # seconds that AuT attends over; None: see `live_window`
    ahead: float = 2.0  # seconds that sound may be ahead of a listener in real time
    body_bytes: int = 100 << 20
    message_bytes: int = 16 << 20  # of a WebSocket; OpenAI allows 15 MiB of sound in one
    head_seconds: int = 10  # until a connection has sent the head of its next request
    chunk_seconds: float = 30.0  # between two pieces of a body
    audio_seconds: float = 600.0  # of the sound in a chat request, and in one turn of a Realtime session
    file_seconds: float = 2400.0  # of a file to be transcribed
    text_bytes: int = 1 << 20  # of the text of a request
    spoken_chars: int = 4096  # of a text to be said
    sessions: int = 8  # Realtime sessions of one key at once
    history_bytes: int = 256 << 20  # of the sound that one Realtime session keeps of what was said
    idle_seconds: float = 900.0  # until a Realtime session that says nothing is closed
    resume_seconds: float = 60.0  # that a Realtime session waits for its client to come back
    stop_seconds: float = 10.0  # that answers may go on when the server is told to stop
    voices: int = 100  # uploaded ones
    replies: int = 1000  # spoken replies whose text is kept for who refers to them by id
    replies_seconds: float = 3600.0
    worker: str = ""  # its name, where several processes serve
    renew_seconds: float = 600.0  # that conversations of a worker which is being replaced may go on

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.keys:
            raise InputError(
                f"{self.host} can be reached from elsewhere, so callers need a key: "
                f"give --keys FILE, or set {KEYS}, or bind to 127.0.0.1"
            )

    @property
    def live_window(self) -> int:
        """Seconds that AuT attends over where somebody waits; what comes whole is heard as the checkpoint has it."""
        return self.window or LIVE_WINDOW

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model."""
        return (self.name, *self.aliases)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """API keys, one a line of a file and those of the environment; # begins a remark.

    Raises:
        InputError: the file cannot be read, or has no key.
    """
    found = list(_keys(os.environ.get(KEYS, "").replace(",", "\n").split()))
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as a list of keys ({error}); give a text file") from None
        there = list(_keys(lines))
        if not there:
            raise InputError(f"{path} has no key; write one a line")
        found += there
    return tuple(dict.fromkeys(found))


def _keys(lines: Iterable[str]) -> Iterable[str]:
    return (key for line in lines if (key := line.partition("#")[0].strip()))
