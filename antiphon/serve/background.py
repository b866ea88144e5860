"""Work beside what is done in order: it is kept until it ends, and what it fails by is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any


class Background:
    """Tasks that nobody waits for; `failed` is told of errors."""

    def __init__(self, failed: Callable[[Exception], Awaitable[None]]) -> None:
        self.failed = failed
        self._tasks = set[asyncio.Task[None]]()

    def do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin it."""
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel(self) -> None:
        """End all of it."""
        for task in self._tasks:
            task.cancel()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            await self.failed(error)
