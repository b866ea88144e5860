"""One JSON object a line on standard error; never a word of what is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

log = logging.getLogger("antiphon.serve")


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
    """Send the lines of this package, and uvicorn's, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("antiphon.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(level)
