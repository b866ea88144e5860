"""Keys and values of many conversations in blocks of one pool: what CUDA graphs need, since the pool never moves.

A conversation's cache is a list of blocks. A step of many reads and writes through a table of them, so one recording
serves whoever is in it; memory is one pool whose size is known before the first conversation comes.

Shapes: L layers, N blocks, H heads, S slots of a block, D head size, R rows, n blocks of the longest row, T steps.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from antiphon.errors import CapacityError
from antiphon.streaming import CACHE_BLOCK, KVCache, Span, State, by_row, visible

SHARE = 0.5  # of the memory that is free, for one pool: the Talker's comes after the Thinker's, a quarter is for work
MOST = 512  # conversations that a pool is made for at most


@dataclass
class BlockPool(State):
    """All blocks; the first is nobody's, for rows that are there to fill a bucket."""

    k: Tensor = by_row(1)  # [L, N, H, S, D]
    v: Tensor = by_row(1)
    free: deque[int] = field(default_factory=deque)

    @classmethod
    def like(cls, cache: KVCache, blocks: int) -> BlockPool:
        """A pool of `blocks` for what such caches hold."""
        layers, _, heads, _, dim = cache.k.shape
        k = cache.k.new_zeros(layers, blocks + 1, heads, CACHE_BLOCK, dim)
        return cls(k, k.clone(), deque(range(1, blocks + 1)))

    def take(self) -> int:
        """A block of zeros.

        Raises:
            CapacityError: there is none left.
        """
        if not self.free:
            raise CapacityError("the memory for conversations is used up; end one of them, or serve fewer at once")
        block = self.free.popleft()
        self.k[:, block], self.v[:, block] = 0, 0  # a stale NaN would outlive a mask
        return block

    def hold(self, cache: KVCache) -> BlockCache:
        """What `cache` of one row holds, in blocks of this pool."""
        if isinstance(cache, BlockCache):
            return cache
        new = BlockCache(cache.k[:, :, :, :0], cache.v[:, :, :, :0], cache.length.clone(), cache.capacity, pool=self)
        new.load(cache.tensors())
        return new

    def table(self, caches: Sequence[BlockCache], rows: int) -> tuple[Tensor, Tensor]:
        """The blocks [R, n] of each with room for one more step, and its length [R]; n is a power of two."""
        for cache in caches:
            cache.reserve(cache.filled + 1)
        most = max(len(cache.blocks) for cache in caches)
        width = 1 << (most - 1).bit_length()
        blocks = [cache.blocks + [0] * (width - len(cache.blocks)) for cache in caches]
        places = [cache.filled for cache in caches]
        idle = rows - len(caches)
        table = torch.tensor(blocks + [[0] * width] * idle, device=self.k.device)
        return table, torch.tensor(places + [0] * idle, device=self.k.device)


def pool_for(cache: KVCache) -> BlockPool | None:
    """A pool for conversations whose caches are like this one; None on a CPU, where each has its own memory."""
    if not cache.k.is_cuda:
        return None
    layers, _, heads, _, dim = cache.k.shape
    size = 2 * layers * heads * CACHE_BLOCK * dim * cache.k.element_size()
    room = int(SHARE * torch.cuda.mem_get_info(cache.k.device)[0]) // size
    return BlockPool.like(cache, max(1, min(room, MOST * -(-cache.capacity // CACHE_BLOCK))))


@dataclass
class BlockCache(KVCache):
    """A cache of one row whose slots are in blocks of a pool; the same cache to whoever holds a conversation."""

    pool: BlockPool | None = None
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        weakref.finalize(self, self.store.free.extend, self.blocks)  # they go back with the conversation

    @property
    def store(self) -> BlockPool:
        """Its pool."""
        assert self.pool is not None
        return self.pool

    def reserve(self, slots: int) -> None:
        """Make room for `slots`.

        Raises:
            CapacityError: more than `capacity`, or than there is memory for.
        """
        self.check(slots)
        while len(self.blocks) * CACHE_BLOCK < slots:
            self.blocks.append(self.store.take())

    def span(self, steps: int) -> Span:
        """Room for `steps` more."""
        self.reserve(self.filled + steps)
        table = torch.tensor([self.blocks], device=self.k.device)
        return BlockSpan(self.store, table, torch.tensor([self.filled], device=self.k.device), steps, self)

    def truncate(self, length: int, row: int = 0) -> None:
        """Cut back to the first `length` slots; blocks that are no longer needed are given back."""
        super().truncate(length, row)
        needed = -(-self.filled // CACHE_BLOCK)
        self.store.free.extend(self.blocks[needed:])
        del self.blocks[needed:]

    def copy(self) -> BlockCache:
        """An independent copy, in blocks of its own."""
        new = BlockCache(self.k, self.v, self.length.clone(), self.capacity, pool=self.pool)
        new.load(self.tensors())
        return new

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved tensors, as far as they are filled."""
        length = int(tensors["length"][0])
        self.reserve(length)
        for pool, saved in ((self.store.k, tensors["k"]), (self.store.v, tensors["v"])):
            for place, block in enumerate(self.blocks):
                part = saved[:, 0, :, place * CACHE_BLOCK : (place + 1) * CACHE_BLOCK]
                pool[:, block, :, : part.shape[2]] = part.to(pool)
        self.length.fill_(length)
        self.filled = length

    def _tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        slots = min(len(self.blocks) * CACHE_BLOCK, self.capacity)
        for name, pool in (("k", self.store.k), ("v", self.store.v)):
            yield name, 1, pool[:, self.blocks].transpose(1, 2).flatten(2, 3)[:, None, :, :slots]
        yield "length", 0, self.length


class BlockSpan:
    """`steps` more of several rows, whose blocks are in a table [R, n] and whose lengths [R] only the device knows."""

    def __init__(
        self, pool: BlockPool, table: Tensor, length: Tensor, steps: int, cache: BlockCache | None = None
    ) -> None:
        self.pool, self.table, self.steps, self.cache = pool, table, steps, cache
        self.positions = length[:, None] + torch.arange(steps, device=table.device)
        slots = torch.arange(table.shape[1] * CACHE_BLOCK, device=table.device)
        self.mask: Tensor | None = visible(self.positions, slots[None], None)
        self.block, self.slot = table.gather(1, self.positions // CACHE_BLOCK), self.positions % CACHE_BLOCK

    def span(self, steps: int) -> BlockSpan:
        """Itself: the rows lie end to end in the input, each with its steps."""
        return self

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [R, T, H, D] in their blocks; returns those of all blocks [R, H, n * S, D]."""
        return self._through(self.pool.k[layer], k), self._through(self.pool.v[layer], v)

    def _through(self, pool: Tensor, x: Tensor) -> Tensor:
        pool[self.block, :, self.slot] = x
        return pool[self.table].transpose(1, 2).flatten(2, 3)

    def close(self) -> None:
        """The steps are past, where there is one cache to count them."""
        if self.cache is not None:
            self.cache.advance(self.steps)
