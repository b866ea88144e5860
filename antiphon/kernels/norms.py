"""Root-mean-square norm and gate, a kernel each.

Shapes: N rows, W width, I inner width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a row of gates that a program takes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., W] over its root mean square, times weight [W]."""
    width = x.shape[-1]
    rows = x.reshape(-1, width).contiguous()
    y = torch.empty_like(rows)
    block = triton.next_power_of_2(width)
    _rms_norm[(len(rows),)](rows, weight, y, width, eps, block, num_warps=min(8, max(1, block // 256)))
    return y.view(x.shape)


def gated(x: Tensor) -> Tensor:
    """SiLU of the first half of x [N, 2 I], times the second half -> [N, I]."""
    rows, inner = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, inner)
    _gated[rows, triton.cdiv(inner, COLUMNS)](x.contiguous(), y, inner, COLUMNS)
    return y


@triton.jit
def _rms_norm(x, weight, y, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    there = at < width
    wide = tl.load(x + row + at, there, 0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    out = wide * scale * tl.load(weight + at, there, 0.0).to(tl.float32)
    tl.store(y + row + at, out.to(y.dtype.element_ty), there)


@triton.jit
def _gated(x, y, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < inner
    gate = tl.load(x + row * 2 * inner + at, there, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * inner + inner + at, there, 0.0).to(tl.float32)
    tl.store(y + row * inner + at, (gate / (1 + tl.exp(-gate)) * up).to(y.dtype.element_ty), there)
