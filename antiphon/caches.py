"""What attention remembers: caches of keys and values, and the spans of positions that are written to them.

A `Span` is the part of a sequence that one call runs over: its positions, what each of them sees, and where its keys
and values go. `WholeSpan` is a sequence at once, without a cache; every cache opens one of its own.

Shapes: R rows (one conversation each), L layers, H heads, S slots, D head size, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from antiphon.errors import CapacityError
from antiphon.streaming import State, by_row

CACHE_BLOCK = 256  # slots an attention cache grows by; attention always runs over whole blocks


class Pages(NamedTuple):
    """N steps over keys and values in blocks: where each puts its own, and what it sees (`kernels.attention`)."""

    k: Tensor  # [L, B, H, S, D]
    v: Tensor
    block: Tensor  # [N] its own place: this block
    slot: Tensor  # [N] and this slot of it
    table: Tensor  # [N, n] the blocks of its sequence, in order
    place: Tensor  # [N] in its sequence: it sees all up to there


class Span(Protocol):
    """The T new steps of one call: where they stand, what they may see, and where their keys go."""

    steps: int  # T

    @property
    def mask(self) -> Tensor | None:
        """Bool [R or 1, 1, T, S], True where a step may look; None where it may look anywhere."""
        ...

    @property
    def positions(self) -> Tensor:
        """Place of each step in its sequence [R or 1, T]."""
        ...

    @property
    def pages(self) -> Pages | None:
        """The steps of all rows, end to end, if their past is in blocks."""
        ...

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [R, T, H, D] of `layer`; returns all that the steps attend over [R, H, S, D]."""
        ...

    def close(self) -> None:
        """Every layer has stored: the steps are now part of the past."""
        ...


@dataclass
class WholeSpan:
    """A whole sequence at once: nothing is kept."""

    steps: int
    positions: Tensor
    mask: Tensor | None
    pages: Pages | None = None

    @classmethod
    def of(cls, steps: int, window: int | None, device: torch.device) -> WholeSpan:
        """Causal span of `steps`, each seeing at most the last `window` steps, itself included."""
        positions = torch.arange(steps, device=device)[None]
        return cls(steps, positions, visible(positions, positions, window))

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to keep."""
        return k.transpose(1, 2), v.transpose(1, 2)

    def close(self) -> None:
        """Nothing to move on."""


class Slots:
    """Places `start` to `stop` of buffers of keys and values [L, R, H, S, D], cut out once for all layers."""

    pages: Pages | None = None

    def __init__(self, k: Tensor, v: Tensor, start: int, stop: int) -> None:
        self._places = [t[:, :, :, start:stop].transpose(2, 3).unbind() for t in (k, v)]
        self._past = [t[:, :, :, :stop].unbind() for t in (k, v)]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [R, T, H, D] of `layer` there; returns all up to `stop` [R, H, stop, D]."""
        self._places[0][layer].copy_(k)
        self._places[1][layer].copy_(v)
        return self._past[0][layer], self._past[1][layer]


class PlacedSpan(Slots):
    """Steps whose place the host knows, the same in all rows, so that a single one needs neither mask nor index."""

    def __init__(self, cache: KVCache | FrameCache, start: int, steps: int) -> None:
        super().__init__(cache.k, cache.v, start, start + steps)
        self.cache, self.start, self.steps, self.device = cache, start, steps, cache.k.device
        self.mask: Tensor | None = None
        if steps > 1:
            self.mask = visible(self.positions, torch.arange(start + steps, device=self.device)[None], None)
        self.pages = rows_as_pages(cache, self.positions.expand(cache.rows, -1))

    @property
    def positions(self) -> Tensor:
        """[1, T]."""
        return torch.arange(self.start, self.start + self.steps, device=self.device)[None]

    def close(self) -> None:
        """The steps are past."""
        self.cache.advance(self.steps)


class Past(Slots):
    """One step after a past that is given: keys and values [L, 1, H, n, D] whose last slot is the step's own.

    A recorded step takes them as inputs, of any length; whose they are counts the step.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__(k, v, k.shape[3] - 1, k.shape[3])
        self.steps, self.device = 1, k.device
        self.mask: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """[1, 1]."""
        return torch.full((1, 1), self._past[0][0].shape[2] - 1, device=self.device)

    def span(self, steps: int) -> Past:
        """The one step."""
        return self

    def close(self) -> None:
        """Nothing to move on."""


class Cache(Protocol):
    """Where the past of one or several sequences is kept."""

    def span(self, steps: int) -> Span | JoinedSpan:
        """The next `steps` steps."""
        ...


def open_span(cache: Cache | None, x: Tensor, window: int | None = None) -> Span | JoinedSpan:
    """The span of x [B, T, …] after what `cache` holds."""
    return WholeSpan.of(x.shape[1], window, x.device) if cache is None else cache.span(x.shape[1])


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Causal mask [R, 1, T, S] of query positions [R, T] over key positions [R, S]."""
    q, k = query[:, None, :, None], key[:, None, None, :]
    mask = k <= q
    return mask if window is None else mask & (k > q - window) & (k >= 0)


@dataclass
class KVCache(State):
    """Keys and values of everything a row has seen; grows by whole blocks up to `capacity` slots."""

    k: Tensor = by_row(1)  # [L, R, H, S, D]
    v: Tensor = by_row(1)  # [L, R, H, S, D]
    length: Tensor = by_row(0)  # [R] slots in use
    capacity: int = 0
    filled: int = 0  # longest row, known without asking the device
    whole: KVCache | None = None  # what this is a view of, so that it learns how long its rows become

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, head_dim: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """A cache that holds nothing yet."""
        k = torch.zeros(layers, rows, heads, 0, head_dim, device=device, dtype=dtype)
        return cls(k, k.clone(), torch.zeros(rows, dtype=torch.long, device=device), capacity)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` per row.

        Raises:
            CapacityError: more than `capacity`.
        """
        self.check(slots)
        if slots > self.k.shape[3]:
            block = -(-slots // CACHE_BLOCK) * CACHE_BLOCK
            more = min(block, max(self.capacity, slots)) - self.k.shape[3]
            self.k = F.pad(self.k, (0, 0, 0, more))
            self.v = F.pad(self.v, (0, 0, 0, more))

    def check(self, slots: int) -> None:
        """Raise CapacityError if a row is not to have `slots`."""
        if slots > self.capacity:
            raise CapacityError(
                f"the conversation needs {slots} positions and its cache holds {self.capacity}; shorten it"
            )

    def span(self, steps: int) -> Span:
        """Room for `steps` more per row."""
        self.reserve(self.filled + steps)
        if self.rows == 1 and self.k.device.type == "cpu":  # elsewhere the place stays a tensor, for graphs to read
            return PlacedSpan(self, self.filled, steps)
        return _CacheSpan(self, steps)

    def past(self) -> tuple[Tensor, Tensor]:
        """Keys and values of a single row with room for one more step, as `Past` takes them; `advance` counts it."""
        self.reserve(self.filled + 1)
        return self.k[:, :, :, : self.filled + 1], self.v[:, :, :, : self.filled + 1]

    def advance(self, steps: int) -> None:
        """Count `steps` more in every row."""
        self.length += steps
        self.filled += steps
        if self.whole is not None:
            self.whole.learn(self.filled)

    def learn(self, filled: int) -> None:
        """A row of this has grown to `filled` in a view."""
        self.filled = max(self.filled, filled)
        if self.whole is not None:
            self.whole.learn(filled)

    def truncate(self, length: int, row: int = 0) -> None:
        """Cut `row` back to its first `length` slots."""
        self.length[row].clamp_(max=length)
        self.filled = int(self.length.max())

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget `rows`."""
        super().reset(rows)
        self.filled = 0 if rows is None else int(self.length.max())

    def view(self, start: int, stop: int) -> KVCache:
        """Rows sharing memory; a view cannot grow, so reserve on the whole cache first."""
        new = super().view(start, stop)
        new.capacity, new.filled, new.whole = self.k.shape[3], int(new.length.max()), self
        return new

    def copy(self) -> KVCache:
        """An independent copy, of a view too."""
        new = super().copy()
        new.whole = None
        return new

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved tensors, grown as far as they were."""
        if "k" in tensors:
            self.reserve(tensors["k"].shape[3])
        super().load(tensors)
        self.filled = int(self.length.max())


def in_blocks(like: Tensor) -> bool:
    """Whether what is on the device of `like` may attend over blocks."""
    return like.is_cuda


def rows_as_pages(cache: KVCache | FrameCache, positions: Tensor) -> Pages | None:
    """Steps at positions [R, T] of a cache, each of whose rows is a block; None where nothing would use them."""
    if not in_blocks(positions):
        return None
    row = torch.arange(len(positions), device=positions.device).repeat_interleave(positions.shape[1])
    place = positions.flatten().contiguous()  # where rows share their positions, they share memory too
    return Pages(cache.k, cache.v, row, place, row[:, None], place)


class _CacheSpan:
    """Steps of rows that may be at different places, which only the device knows."""

    def __init__(self, cache: KVCache, steps: int) -> None:
        self.cache, self.steps = cache, steps
        device = cache.k.device
        self.positions = cache.length[:, None] + torch.arange(steps, device=device)
        # whole blocks, so that a row's attention runs over the same number of slots in any batch
        self.used = min(-(-(cache.filled + steps) // CACHE_BLOCK) * CACHE_BLOCK, cache.k.shape[3])
        self.mask: Tensor | None = visible(self.positions, torch.arange(self.used, device=device)[None], None)
        self.index = self.positions[:, None, :, None]
        self.pages = rows_as_pages(cache, self.positions)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        index = self.index.expand(-1, k.shape[2], -1, k.shape[3])
        keys.scatter_(2, index, k.transpose(1, 2))
        values.scatter_(2, index, v.transpose(1, 2))
        return keys[:, :, : self.used], values[:, :, : self.used]

    def close(self) -> None:
        self.cache.advance(self.steps)


class JoinedCaches:
    """Caches of one row each whose sequences run together, laid end to end: `steps` of each, in order.

    Matrix products are over the steps of all, `padded` in number, of which the last belong to nobody; each sequence
    attends over its own cache, so it does not matter who its neighbours are nor how long they have been there.
    """

    def __init__(self, caches: Sequence[KVCache | Past], steps: Sequence[int], padded: int) -> None:
        self.caches, self.steps, self.padded = caches, steps, padded

    def span(self, steps: int) -> JoinedSpan:
        """The next `steps` steps: those of all caches, and what pads them."""
        spans: list[Span] = [cache.span(own) for cache, own in zip(self.caches, self.steps, strict=True)]
        return JoinedSpan(spans, steps)


class JoinedSpan:
    """Spans of several sequences, laid end to end and padded."""

    pages: Pages | None = None

    def __init__(self, spans: Sequence[Span], steps: int) -> None:
        self.spans, self.steps = spans, steps
        ends = list(accumulate(span.steps for span in spans))
        self.places = [(end - span.steps, end) for span, end in zip(spans, ends, strict=True)]
        self.padding = steps - (ends[-1] if ends else 0)

    @property
    def positions(self) -> Tensor:
        """[1, T]; 0 where nobody is."""
        return F.pad(torch.cat([span.positions for span in self.spans], 1), (0, self.padding))

    def close(self) -> None:
        """The steps of all are past."""
        for span in self.spans:
            span.close()


@dataclass
class WindowCache(State):
    """The last window - 1 keys and values of each layer: all that a sliding window can still see."""

    k: Tensor = by_row(1)  # [L, R, H, window - 1, D]
    v: Tensor = by_row(1)
    length: Tensor = by_row(0)  # [R] steps seen

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, head_dim: int, window: int, device: torch.device, dtype: torch.dtype
    ) -> WindowCache:
        """A cache that has seen nothing yet."""
        k = torch.zeros(layers, rows, heads, window - 1, head_dim, device=device, dtype=dtype)
        return cls(k, k.clone(), torch.zeros(rows, dtype=torch.long, device=device))

    def span(self, steps: int) -> _WindowSpan:
        """The next `steps` steps of every row."""
        return _WindowSpan(self, steps)


class _WindowSpan(Slots):
    def __init__(self, cache: WindowCache, steps: int) -> None:
        kept = cache.k.shape[3]
        self.cache, self.steps = cache, steps
        self.k, self.v = (F.pad(t, (0, 0, 0, steps)) for t in (cache.k, cache.v))
        super().__init__(self.k, self.v, kept, kept + steps)
        places = cache.length[:, None] + torch.arange(-kept, steps, device=cache.k.device)
        self.positions = places[:, kept:]
        self.mask: Tensor | None = visible(self.positions, places, kept + 1)

    def close(self) -> None:
        self.cache.k.copy_(self.k[:, :, :, self.steps :])
        self.cache.v.copy_(self.v[:, :, :, self.steps :])
        self.cache.length += self.steps


@dataclass
class FrameCache(State):
    """Keys and values within one frame: a few steps, all rows at the same one, started over for every frame."""

    k: Tensor = by_row(1)  # [L, R, H, steps at most, D]
    v: Tensor = by_row(1)
    step: int = 0
    _spans: dict[tuple[int, int], PlacedSpan] = field(default_factory=dict, repr=False, compare=False)  # every frame's

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, head_dim: int, steps: int, device: torch.device, dtype: torch.dtype
    ) -> FrameCache:
        """A cache before its first frame."""
        k = torch.zeros(layers, rows, heads, steps, head_dim, device=device, dtype=dtype)
        return cls(k, k.clone())

    def restart(self) -> None:
        """Begin a frame; what the last one left is overwritten before it is seen."""
        self.step = 0

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget `rows` and begin a frame, for all rows: they are at the same step."""
        super().reset(rows)
        self.restart()

    def span(self, steps: int) -> PlacedSpan:
        """The next `steps` steps of the frame.

        Raises:
            CapacityError: more than a frame has.
        """
        if self.step + steps > self.k.shape[3]:
            raise CapacityError(f"a frame has {self.k.shape[3]} steps; begin the next one with restart")
        place = (self.step, steps)
        if place not in self._spans:
            self._spans[place] = PlacedSpan(self, *place)
        return self._spans[place]

    def advance(self, steps: int) -> None:
        """Count `steps` more."""
        self.step += steps

    def _map(self, change: Any) -> Self:
        new = super()._map(change)
        new._spans = {}  # those of this one are cut out of its own tensors
        return new
