"""Code2Wav's activation as one pass over memory; torch's own operations make three, and round to x's type in each.

Shapes: R rows, C channels, T steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program


def snake(x: Tensor, alpha: Tensor, scale: Tensor) -> Tensor:
    """x + sin²(alpha x) scale, [R, C, T] -> [R, C, T]: `antiphon.code2wav.SnakeBeta` of what its `bind` computes.

    Computed in float32 and rounded once, to x's type.

    Args:
        x: [R, C, T], float32 or below.
        alpha: [C, 1], contiguous.
        scale: [C, 1], contiguous.
    """
    x = x.contiguous()
    rows, channels, steps = x.shape
    y, piece = torch.empty_like(x), min(BLOCK, triton.next_power_of_2(steps))
    lines = BLOCK // piece  # a program has pieces of so many channels, so that none is small where there are few steps
    grid = (triton.cdiv(rows * channels, lines), triton.cdiv(steps, piece))
    snake_kernel[grid](y, x, alpha, scale, rows * channels, channels, steps, LINES=lines, PIECE=piece, num_warps=4)
    return y


@triton.jit
def snake_kernel(
    y: tl.tensor,
    x: tl.tensor,
    alpha: tl.tensor,
    scale: tl.tensor,
    lines: tl.tensor,
    channels: tl.tensor,
    steps: tl.tensor,
    LINES: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Of `lines` = R C lines of `steps` = T elements, `LINES` with `PIECE` of each."""
    line, step = tl.program_id(0) * LINES + tl.arange(0, LINES), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    rate = tl.load(alpha + line % channels).to(tl.float32)[:, None]
    weight = tl.load(scale + line % channels).to(tl.float32)[:, None]
    place = line.to(tl.int64)[:, None] * steps + step[None]
    inside = (line < lines)[:, None] & (step < steps)[None]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    wave = tl.sin(value * rate)
    tl.store(y + place, (value + wave * wave * weight).to(y.dtype.element_ty), mask=inside)
