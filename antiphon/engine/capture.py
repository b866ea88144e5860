"""A step of fixed shapes, recorded once and replayed: no Python between its kernels.

On CUDA it is a graph, on a CPU a traced function; both record the very statements of the boxes. A step keeps a state of
a fixed size, which is changed in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from antiphon.streaming import State

Step = Callable[..., tuple[Tensor, ...]]


def capture(step: Step, state: State, examples: Sequence[Tensor]) -> Step:
    """`step(state, *inputs)` as a function of inputs of the shapes of `examples`, on whose device it runs.

    The state is changed in place, by the recording too; what a call gives is valid until the next.
    """
    step(state, *examples)  # what is made on first use (tables, constants) is no part of the recording
    return _graph(step, state, examples) if examples[0].is_cuda else _trace(step, state, examples)


def _trace(step: Step, state: State, examples: Sequence[Tensor]) -> Step:
    kept, count = list(state.tensors().values()), len(examples)

    def whole(*given: Tensor) -> tuple[Tensor, ...]:
        return step(state.over(given[count:]), *given[:count])  # what is no input counts as constant, and is folded

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are fixed, as they are meant to be
        traced: Any = torch.jit.trace(whole, (*examples, *kept), check_trace=False)
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
