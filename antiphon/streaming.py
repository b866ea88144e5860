"""The state contract: one code path for a whole sequence and for its pieces.

Every box is a function `box(x, state=None, final=False)`. `None` is the whole sequence at once; with a state the
same statements run on a piece and the state moves on. This file holds what the boxes share for that: the State
base class, the two attention caches, causal convolutions, and the buffer of samples that wait for more.

The law, tested for every box over random cuts: `box(x) == cat(box(piece, state) …, last piece final)`.

Shapes: R rows (one conversation each), L layers, H heads, S slots, D head size, B batch, C channels, T time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, repeat
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.binding import Bound, Part, bound
from antiphon.errors import CapacityError, WeightsError

WINDOWED_AT_MOST = 1 << 22  # numbers in the windows of a convolution computed as a matrix product
CACHE_BLOCK = 256  # slots an attention cache grows by; attention always runs over whole blocks


def by_row(dim: int) -> Any:
    """Declare a State field of tensors whose dimension `dim` is the row."""
    return field(metadata={"row": dim})


@dataclass
class State:
    """What a box remembers between pieces: tensors with one row per conversation, changed in place.

    Fields declared with `by_row` hold a tensor or a list of tensors; other fields are sizes shared by all rows.
    All zeros is the fresh state of every box, so `reset` only has to clear.
    """

    def _tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        for f in fields(self):
            if "row" not in f.metadata:
                continue
            value = getattr(self, f.name)
            items = (
                [(f.name, value)] if isinstance(value, Tensor) else [(f"{f.name}.{i}", t) for i, t in enumerate(value)]
            )
            for name, tensor in items:
                yield name, f.metadata["row"], tensor

    @property
    def rows(self) -> int:
        """Conversations this state holds."""
        _, dim, tensor = next(self._tensors())
        return tensor.shape[dim]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for _, _, t in self._tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as `save_file` wants it."""
        return {name: tensor for name, _, tensor in self._tensors()}

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget `rows` (all by default). Zeros, not only lengths: a stale NaN would outlive a mask."""
        for _, dim, tensor in self._tensors():
            if rows is None:
                tensor.zero_()
            else:
                tensor.index_fill_(dim, torch.tensor(list(rows), device=tensor.device), 0)

    def copy(self) -> Self:
        """An independent copy (a fork of the conversation)."""
        return self._map(lambda tensor, dim: tensor.clone())

    def view(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop`, sharing memory: stepping the view steps those rows of this state."""
        return self._map(lambda tensor, dim: tensor.narrow(dim, start, stop - start))

    def over(self, tensors: Iterable[Tensor]) -> Self:
        """This state with other tensors in the place of its own, in the order of `tensors()`."""
        given = iter(tensors)
        return self._map(lambda tensor, dim: next(given))

    def pick(self, rows: Tensor) -> Self:
        """A copy of some rows, by number."""
        return self._map(lambda tensor, dim: tensor.index_select(dim, rows))

    def put(self, rows: Tensor, state: Self) -> None:
        """Take over what became of rows that were picked."""
        for (_, dim, mine), (_, _, theirs) in zip(self._tensors(), state._tensors(), strict=True):
            mine.index_copy_(dim, rows, theirs)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved tensors, in place.

        Raises:
            WeightsError: a tensor is missing or has another shape.
        """
        for name, _, tensor in self._tensors():
            if name not in tensors or tensors[name].shape != tensor.shape:
                found = "nothing" if name not in tensors else list(tensors[name].shape)
                raise WeightsError(f"saved state: {name} should have shape {list(tensor.shape)}, found {found}")
            tensor.copy_(tensors[name])

    def _map(self, change: Any) -> Self:
        new = copy.copy(self)
        for f in fields(self):
            if "row" in f.metadata:
                value, dim = getattr(self, f.name), f.metadata["row"]
                done = change(value, dim) if isinstance(value, Tensor) else [change(t, dim) for t in value]
                setattr(new, f.name, done)
        return new


# ------------------------------------------------------------------------------------------- attention


class Span(Protocol):
    """The T new steps of one call: where they stand, what they may see, and where their keys go."""

    steps: int  # T
    mask: Tensor | None  # bool [R or 1, 1, T, S], True where a step may look; None where it may look anywhere

    @property
    def positions(self) -> Tensor:
        """Place of each step in its sequence [R or 1, T]."""
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


# ----------------------------------------------------------------------------------------- convolutions


def roll(tail: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """`tail` then `x` along `dim`; `tail` becomes the end of the two, in place."""
    both = torch.cat([tail, x], dim)
    kept = tail.shape[dim]
    tail.copy_(both.narrow(dim, both.shape[dim] - kept, kept))
    return both


Tails = Iterator[Tensor | None]  # one per convolution, in the order in which they run


class CausalConv1d(Part):
    """Convolution over x [B, C, T] that sees the present and the past only.

    A strided one takes whole strides; what is missing at the end of a whole sequence is filled with zeros.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride=stride, dilation=dilation, groups=groups, bias=bias)
        self.context = (kernel - 1) * dilation + 1 - stride  # steps of the past in each output
        self.stride = stride

    def init_tail(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Silence before the first piece [R, C, context]."""
        return torch.zeros(rows, self.conv.in_channels, self.context, device=device, dtype=dtype)

    def bind(self) -> Bound:
        """As `forward`."""
        convolve, context, stride = bind_convolution(self.conv), self.context, self.stride

        def run(x: Tensor, tails: Tails) -> Tensor:
            tail = next(tails)
            x = F.pad(x, (0, -x.shape[-1] % stride)) if stride > 1 else x
            if context:
                x = F.pad(x, (context, 0)) if tail is None else roll(tail, x)
            return convolve(x)

        return run

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, C, T] -> [B, C', ceil(T / stride)]."""
        return self.bind()(x, tails)


def bind_convolution(conv: nn.Conv1d) -> Bound:
    """`conv` of x [B, C, T]; on a CPU as one matrix product over windows, faster than conv1d for a stream's pieces.

    Training and long pieces keep conv1d: the windows take its kernel times x's memory.
    """
    if torch.is_grad_enabled() or conv.weight.device.type != "cpu":
        return conv
    kernel, stride, dilation, groups = conv.kernel_size[0], conv.stride[0], conv.dilation[0], conv.groups
    weight = conv.weight.view(groups, conv.out_channels // groups, -1)
    bias = None if conv.bias is None else conv.bias.view(groups, -1, 1)

    def run(x: Tensor) -> Tensor:
        if x.numel() * kernel > WINDOWED_AT_MOST:
            return conv(x)
        count = (x.shape[2] - (kernel - 1) * dilation - 1) // stride + 1
        return multiply(weight, bias, windows(x, kernel, dilation, stride, count))

    return run


def windows(x: Tensor, kernel: int, dilation: int, stride: int, count: int) -> Tensor:
    """The steps of x [B, C, T] that each of `count` windows sees [B, C, kernel, count], sharing memory."""
    rows, columns, step = x.stride()
    shape, strides = (*x.shape[:2], kernel, count), (rows, columns, dilation * step, stride * step)
    return x.as_strided(shape, strides) if kernel > 1 or stride > 1 else x[:, :, None]


def multiply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """weight [G, O, I] times the windows x [B, C, kernel, T], plus bias [G, O, 1]: [B, G * O, T].

    The steps of all rows are columns of one product, so the weight is read once.
    """
    batch, count = len(x), x.shape[3]
    columns = x.permute(1, 2, 0, 3).reshape(len(weight), -1, batch * count)
    y = torch.bmm(weight, columns) if bias is None else torch.baddbmm(bias, weight, columns)
    return y.view(-1, batch, count).transpose(0, 1)


class CausalTransposedConv1d(Part):
    """Upsampling by `stride`, cropped on the right only: T steps give exactly T * stride, none of them waits.

    The published Code2Wav crops both sides and so looks one frame ahead; this is the strictly causal
    decoder it approximates.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride=stride)
        self.context = -(-kernel // stride) - 1  # earlier steps whose kernels still ring
        self.stride = stride

    def init_tail(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Silence before the first piece [R, C, context]."""
        return torch.zeros(rows, self.conv.in_channels, self.context, device=device, dtype=dtype)

    def bind(self) -> Bound:
        """As `forward`."""
        convolve, context = bind_transposed(self.conv, self.context), self.context

        def run(x: Tensor, tails: Tails) -> Tensor:
            tail = next(tails)
            if context:
                x = F.pad(x, (context, 0)) if tail is None else roll(tail, x)
            return convolve(x)

        return run

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, C, T] -> [B, C', T * stride]."""
        return self.bind()(x, tails)


def bind_transposed(conv: nn.ConvTranspose1d, context: int) -> Bound:
    """`conv` of x [B, C, context + T] without what rings before and after the last T steps [B, C', T * stride].

    On a CPU, as in `bind_convolution`, one matrix product: each step of x gives `stride` steps, of which each hears
    the last `context` + 1 steps of x through a part of the kernel of its own.
    """
    stride, outputs, taps = conv.stride[0], conv.out_channels, context + 1

    def whole(x: Tensor) -> Tensor:
        return conv(x)[..., context * stride :][..., : (x.shape[-1] - context) * stride]

    if torch.is_grad_enabled() or conv.weight.device.type != "cpu":
        return whole
    kernel = F.pad(conv.weight, (0, taps * stride - conv.kernel_size[0])).view(-1, outputs, taps, stride)
    weight = kernel.flip(2).permute(1, 3, 0, 2).reshape(1, outputs * stride, -1)
    bias = None if conv.bias is None else conv.bias.repeat_interleave(stride).view(1, -1, 1)

    def run(x: Tensor) -> Tensor:
        batch, count = len(x), x.shape[-1] - context
        if x.numel() * taps > WINDOWED_AT_MOST:
            return whole(x)
        y = multiply(weight, bias, windows(x, taps, 1, 1, count))
        return y.reshape(batch, outputs, stride, count).transpose(2, 3).reshape(batch, outputs, -1)

    return run


def conv_tails(module: nn.Module, rows: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """A fresh tail for every causal convolution in `module`, in the order in which they are registered and run."""
    convolutions = (m for m in module.modules() if isinstance(m, CausalConv1d | CausalTransposedConv1d))
    return [m.init_tail(rows, device, dtype) for m in convolutions]


def tails_of(tails: Sequence[Tensor] | None) -> Tails:
    """The tails in running order, or None for each convolution of a whole sequence."""
    return repeat(None) if tails is None else iter(tails)


def run_convolutions(modules: nn.ModuleList, x: Tensor, tails: Tails, activation: type[nn.Module]) -> Tensor:
    """x through `modules` in order; all but those of class `activation` look back, and take their tail."""
    return bind_convolutions(modules, activation)(x, tails)


def bind_convolutions(modules: nn.ModuleList, activation: type[nn.Module]) -> Bound:
    """`run_convolutions` with the weights of now, given x and tails."""
    steps = [(bound(module), isinstance(module, activation)) for module in modules]

    def run(x: Tensor, tails: Tails) -> Tensor:
        for step, pointwise in steps:
            x = step(x) if pointwise else step(x, tails)
        return x

    return run


# ---------------------------------------------------------------------------------------------- waiting


def in_step(count: Tensor) -> int:
    """The count that all rows share.

    Raises:
        CapacityError: rows of one call are at different places; step them one `view` at a time.
    """
    first = int(count[0])
    if count.numel() > 1 and not bool((count == first).all()):
        raise CapacityError("these rows are at different places in their streams; step them one state.view at a time")
    return first


def take(held: Tensor, count: Tensor, x: Tensor) -> Tensor:
    """What waited (the first `count` of held [R, N, …]) followed by x [R, T, …]."""
    waiting = in_step(count)
    return torch.cat([held[:, :waiting], x], 1) if waiting else x


def keep(held: Tensor, count: Tensor, rest: Tensor) -> None:
    """Let rest [R, n, …] wait for the next piece."""
    held[:, : rest.shape[1]] = rest
    count.fill_(rest.shape[1])
