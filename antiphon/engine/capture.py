"""A step of fixed shapes, recorded once and replayed: no Python between its kernels.

On CUDA it is a graph, on a CPU a traced function; both record the very statements of the boxes. What the step keeps
(a cache of a fixed size) is changed in place, so the recording finds it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]


def capture(step: Step, examples: Sequence[Tensor]) -> Step:
    """`step` for inputs of the shapes of `examples`, on whose device it runs; what it gives is valid until the next.

    The step is run on the examples, so what it keeps is changed.
    """
    step(*examples)  # what is made on first use (tables, constants) is no part of the recording
    return _graph(step, examples) if examples[0].is_cuda else _trace(step, examples)


def _trace(step: Step, examples: Sequence[Tensor]) -> Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are fixed, as they are meant to be
        traced: Any = torch.jit.trace(step, tuple(examples), check_trace=False)
    return traced


def _graph(step: Step, examples: Sequence[Tensor]) -> Step:
    inputs = [example.clone() for example in examples]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        for own, value in zip(inputs, given, strict=True):
            own.copy_(value)
        graph.replay()
        return outputs

    return replay
