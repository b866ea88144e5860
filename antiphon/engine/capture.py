"""Steps of fixed shapes, recorded once and replayed: no Python between their kernels.

On CUDA a step is a graph, on a CPU a traced function; both record the very statements of the boxes. Rows are padded to
a few sizes (`BUCKETS`), for each of which there is one recording.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from antiphon.streaming import JoinedCaches, KVCache, Past, State

Step = Callable[..., tuple[Tensor, ...]]

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows of a matrix product


def bucket(rows: int) -> int:
    """Rows that a batch of `rows` is padded to: a row gives the same bits in any company of one bucket."""
    place = bisect.bisect_left(BUCKETS, rows)
    return BUCKETS[place] if place < len(BUCKETS) else -(-rows // BUCKETS[-1]) * BUCKETS[-1]


def padded_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [n, …] with zeros to the bucket of its rows, and their number."""
    rows = bucket(len(x))
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))), rows


def capture(step: Step, state: State, examples: Sequence[Tensor]) -> Step:
    """`step(state, *inputs)` as a function of inputs of the shapes of `examples`, on whose device it runs.

    The state is changed in place, by the recording too; what a call gives is valid until the next.
    """
    step(state, *examples)  # what is made on first use (tables, constants) is no part of the recording
    return _graph(step, state, examples) if examples[0].is_cuda else _trace(step, state, examples)


def _trace(step: Step, state: State, examples: Sequence[Tensor]) -> Step:
    kept, count = list(state.tensors().values()), len(examples)

    def whole(*given: Tensor) -> tuple[Tensor, ...]:
        return step(state.over(given[count:]), *given[:count])  # what is no input counts as constant

    kernels = make_fx(whole)(*examples, *kept)  # sizes are numbers in it, so that nothing works them out again
    traced: Any = torch.jit.trace(kernels, (*examples, *kept), check_trace=False)
    return lambda *inputs: traced(*inputs, *kept)


def _graph(step: Step, state: State, examples: Sequence[Tensor]) -> Step:
    inputs = [example.clone() for example in examples]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(state, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(state, *inputs)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        for own, value in zip(inputs, given, strict=True):
            own.copy_(value)
        graph.replay()
        return outputs

    return replay


class OneStep:
    """One position of each of several conversations, after caches of any length.

    `run(caches, positions [1, B], *inputs)` is what is recorded, inputs and outputs with a row for each; `nobody` is an
    empty cache for rows that are there to fill a bucket.
    """

    def __init__(self, run: Step, nobody: KVCache) -> None:
        self.run, self.nobody = run, nobody
        self.records = dict[int, Step]()

    def __call__(self, caches: Sequence[KVCache], *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs for inputs [B, …] of as many caches, each of which is a step longer afterwards."""
        rows = bucket(len(caches))
        given = self._given([*caches, *[self.nobody] * (rows - len(caches))], [padded_rows(x)[0] for x in inputs])
        if rows not in self.records:
            self.records[rows] = self._record(given, len(inputs))
        outputs = self.records[rows](*given)
        for cache in caches:
            cache.advance(1)
        return tuple(output[: len(caches)] for output in outputs)

    @staticmethod
    def _given(caches: Sequence[KVCache], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What a recording takes: positions, inputs, and the past of each row."""
        places = torch.tensor([[cache.filled for cache in caches]])
        return [places, *inputs, *[part for cache in caches for part in cache.past()]]

    def _record(self, given: Sequence[Tensor], inputs: int) -> Step:
        """A traced function: the past is an input that may have any length."""

        def whole(places: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            pasts = [Past(k, v) for k, v in zip(rest[inputs::2], rest[inputs + 1 :: 2], strict=True)]
            return self.run(JoinedCaches(pasts, [1] * len(pasts), len(pasts)), places, *rest[:inputs])

        whole(*given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all sizes but those of the past are fixed, as they are meant to be
            traced: Any = torch.jit.trace(whole, tuple(given), check_trace=False)
        return traced
