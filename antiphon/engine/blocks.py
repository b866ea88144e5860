"""Keys and values of many conversations in blocks of one pool: what CUDA graphs need, since the pool never moves.

A conversation's cache is a list of blocks. A step of many reads and writes through a table of them, so one recording
serves whoever is in it; memory is one pool whose size is known before the first conversation comes.

Shapes: L layers, B blocks, H heads, S slots of a block, D head size, N steps, n blocks of the longest sequence.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from antiphon.caches import CACHE_BLOCK, KVCache, Pages, Span, visible
from antiphon.errors import CapacityError
from antiphon.streaming import State, by_row

SHARE = 0.5  # of the memory that is free, for one pool: the Talker's comes after the Thinker's, a quarter is for work
MOST = 512  # conversations that a pool is made for at most


@dataclass
class BlockPool(State):
    """All blocks; the first is nobody's, for rows that are there to fill a bucket."""

    k: Tensor = by_row(1)  # [L, B, H, S, D]
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
        empty = (cache.k[:, :, :, :0], cache.v[:, :, :, :0], cache.length.cpu().clone())  # counted where it is free
        new = BlockCache(*empty, cache.capacity, pool=self)
        new.load(cache.tensors())
        return new

    def places(self, caches: Sequence[BlockCache], steps: Sequence[int], padded: int) -> tuple[Tensor, Tensor]:
        """Of the next `steps` of each cache, `padded` in all: blocks [N, n], n a power of two, and places [N]."""
        for cache, own in zip(caches, steps, strict=True):
            cache.reserve(cache.filled + own)
        width = 1 << (max(len(cache.blocks) for cache in caches) - 1).bit_length()
        table, place = list[list[int]](), list[int]()
        for cache, own in zip(caches, steps, strict=True):
            table += [cache.blocks + [0] * (width - len(cache.blocks))] * own
            place += range(cache.filled, cache.filled + own)
        idle = padded - len(place)
        laid = (table + [[0] * width] * idle, place + [0] * idle)
        return torch.tensor(laid[0], device=self.k.device), torch.tensor(laid[1], device=self.k.device)


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
        return BlockSpan(self.store, *self.store.places([self], [steps], steps), self)

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
    """Steps of any sequences, end to end, each with the blocks of its own in a table [N, n] and its place [N] there.

    To the boxes each is a row of one step, so that a recording serves whoever they are, and however many of each.
    """

    def __init__(self, pool: BlockPool, table: Tensor, place: Tensor, cache: BlockCache | None = None) -> None:
        self.pool, self.table, self.positions, self.cache = pool, table, place[:, None], cache
        self.steps = 1
        self._mask: Tensor | None = None
        block, slot = table.gather(1, self.positions // CACHE_BLOCK)[:, 0], place % CACHE_BLOCK
        self.pages = Pages(pool.k, pool.v, block, slot, table, place)

    @property
    def mask(self) -> Tensor:
        """[N, 1, 1, n * S], made once, for whoever has no kernel that needs none."""
        if self._mask is None:
            slots = torch.arange(self.table.shape[1] * CACHE_BLOCK, device=self.table.device)
            self._mask = visible(self.positions, slots[None], None)
        return self._mask

    def span(self, steps: int) -> BlockSpan:
        """Itself."""
        return self

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [N, 1, H, D] in their blocks; returns those of all blocks [N, H, n * S, D]."""
        return self._through(self.pool.k[layer], k), self._through(self.pool.v[layer], v)

    def _through(self, pool: Tensor, x: Tensor) -> Tensor:
        pool[self.pages.block, :, self.pages.slot] = x[:, 0]
        return pool[self.table].transpose(1, 2).flatten(2, 3)

    def close(self) -> None:
        """The steps are past, where there is one cache to count them."""
        if self.cache is not None:
            self.cache.advance(len(self.positions))
