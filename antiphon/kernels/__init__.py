"""What the boxes compute on a CUDA device, in few kernels: a step of one conversation is all launches otherwise.

Each function is a stretch of plain statements elsewhere in one kernel, written in Triton, and gives what they give but
for rounding: inside, everything is float32 and is rounded once. The plain statements remain what trains, what runs on
a CPU and what these are tested against (`tests/test_kernels*.py`, in Triton's interpreter).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor


def usable(like: Tensor) -> bool:
    """Whether tensors of the type and on the device of `like` go through these kernels: none has a way back."""
    return like.is_cuda and like.element_size() <= 4 and not torch.is_grad_enabled() and _has_triton()


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
