"""One JSON object a line on standard error; never a word of what is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

log = logging.getLogger("antiphon.serve")
# what uvicorn says of every WebSocket that was refused, though it was answered in order
REFUSED = "ASGI callable returned without completing handshake."


class JsonLines(logging.Formatter):
    """A record as a line of JSON; its fields are those of `note`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return json.dumps(dict(self.fields(record)), ensure_ascii=False, default=str)

    def fields(self, record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
        """Name and value, in order."""
        yield "time", datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        yield "level", record.levelname.lower()
        yield "event", record.getMessage()
        yield from record.__dict__.get("facts", {}).items()
        if record.exc_info:
            yield "traceback", self.formatException(record.exc_info)


def note(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    """Write a line; `error` adds where it came from."""
    log.log(level, event, extra={"facts": facts}, exc_info=error)


def to_standard_error(level: int = logging.INFO) -> None:
    """Send the lines of this package, and uvicorn's warnings, to standard error.

    Not what uvicorn tells of connections: it names their whole address, with the token that a session is resumed by.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, least in (("antiphon.serve", level), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(least)
    handler.addFilter(lambda record: record.msg != REFUSED)
