"""Work beside what is done in order: it is kept until it ends, and what it fails by is logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from antiphon.serve.logs import note


class Background:
    """Tasks that nobody waits for."""

    def __init__(self) -> None:
        self._tasks = set[asyncio.Task[None]]()

    def do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def cancel(self) -> None:
        """End all of it."""
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            note("failed", level=logging.ERROR, error=error)
