"""The engine's lanes: one listens, reads and thinks, one speaks, one sounds; each steps all conversations at once.

    Thinking   wishes -> AuT ; chunks and tokens of all calls -> Thinker -> next tokens -> words
                                   | accept layer's states
    Speaking   chunks of all calls -> Talker ; one frame of every call that is due -> Talker, MTP -> codes
                                                                                                 |
    Sounding                                       one frame of every call that has codes -> Code2Wav -> sound

A lane is a function of the calls: `step` picks what is most urgent, runs it as one batch, and says whether there was
anything. Threads step them without end: the Talker reads a chunk while the Thinker is at the next, and is at the next
frame while Code2Wav has this one; a test steps them in turn. What a batch cannot do, because one call in it raises, is
undone and done call by call: the one fails, the others do not notice.

Shapes: B calls of a batch, T positions of all of them, U the Thinker's width, W the Talker's, V ids, Q codebooks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from antiphon.caches import CACHE_BLOCK, KVCache
from antiphon.engine.blocks import BlockPool
from antiphon.engine.call import Call, EngineSession, House, Work
from antiphon.engine.capture import BUCKETS, bucket, graph_memory
from antiphon.errors import BusyError

POSITIONS = {"cpu": 256, "cuda": 1024}  # of prompts that are read in one step, beside the tokens of answers
TURN_BLOCKS = 4  # of a pool, that a conversation which comes in should find free
RETRY = 5.0  # seconds after which one who was refused may ask again: about an answer's length


class Lane:
    """What all lanes are."""

    name = ""

    def __init__(self, house: House) -> None:
        self.house, self.model = house, house.model
        self.stepping = threading.Lock()  # held by the thread that is in a step of it
        self.stepped = 0.0  # when, on the engine's clock
        device = self.model.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool: BlockPool | None = None
        self.memory = graph_memory(self.model.device)

    @contextmanager
    def noting(self, name: str, calls: Iterable[Call], positions: int = 0) -> Iterator[None]:
        """Note a batch in the timeline."""
        start, names = self.house.now(), tuple(call.name for call in calls)
        yield
        self.house.noted(Work(self.name, name, start, self.house.now(), names, positions))

    def together(
        self, name: str, calls: Sequence[Call], run: Callable[[Sequence[Call]], None], positions: int = 0
    ) -> bool:
        """Run a batch; call by call if it raises, so that only whose fault it is fails. True if there was one."""
        if not calls:
            return False
        with self.noting(name, calls, positions):
            caches = [cache for call in calls for cache in self.caches(call)]
            lengths = [cache.filled for cache in caches]
            try:
                run(calls)
            except Exception as error:
                for cache, length in zip(caches, lengths, strict=True):
                    cache.truncate(length)
                if len(calls) == 1:
                    calls[0].fail(error)
                for call in calls if len(calls) > 1 else ():
                    self.together(name, [call], run)
        self.house.wake()
        return True

    def alone(self, call: Call, run: Callable[[Call], bool]) -> bool:
        """What concerns one call only; if it raises, that call ends by it. Whether something was done."""
        try:
            return run(call)
        except Exception as error:
            call.fail(error)
            return True

    def stream(self) -> AbstractContextManager[Any]:
        """On CUDA, where its kernels run, whichever thread begins them: they need not wait for other lanes'."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def step(self) -> bool:
        """Run the most urgent work there is; whether there was any."""
        raise NotImplementedError

    def warm(self, conversations: int) -> None:
        """Make ready for batches of up to so many."""

    def sizes(self, conversations: int) -> Sequence[int]:
        """Of batches that are recorded: a step of each of so many, and where there is a pool also prompts."""
        most = self.room if self.pool else conversations
        return [size for size in (*BUCKETS, *range(BUCKETS[-1], most + 1, BUCKETS[-1])[1:]) if bucket(most) >= size]

    @property
    def room(self) -> int:
        """Positions of prompts that are read in one step, beside the tokens of answers."""
        return POSITIONS[self.model.device.type]

    def caches(self, call: Call) -> list[KVCache]:
        """Of a call, those that this lane writes."""
        raise NotImplementedError

    def take_in(self, session: EngineSession) -> None:
        """Have a session's caches where this lane's steps want them.

        Raises:
            BusyError: the memory for conversations is used up.
        """

    def held(self, cache: KVCache) -> KVCache:
        """A cache in this lane's pool, if it has one."""
        if self.pool is None:
            return cache
        if len(self.pool.free) < TURN_BLOCKS + cache.filled // CACHE_BLOCK:
            raise BusyError.of(len(self.house.calls), RETRY)
        cache = self.pool.hold(cache)
        self.hand_over()
        return cache

    def hand_over(self) -> None:
        """Wait until what this lane computed is there: the other has a stream of its own."""
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    @property
    def seconds(self) -> float:
        """Of a frame."""
        code2wav = self.model.config.code2wav
        return code2wav.frame_ms / 1000 if code2wav else 0.0

    def urgency(self, call: Call) -> tuple[int, float]:
        """What comes first: answers that are listened to, by when their next frame is due, others, prompts, guesses."""
        due = call.turn.due(self.seconds) if call.turn else 0.0
        if call.is_aside:
            return 3, due
        return (2, due) if call.turn is None else (int(call.turn.ahead is None), due)
