"""Causal convolutions: what each has still to see of the past is its tail, moved on in place.

Shapes: R rows (one conversation each), B batch, C channels, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.binding import Bound, Part, bound

WINDOWED_AT_MOST = 1 << 22  # numbers in the windows of a convolution computed as a matrix product


def roll(tail: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """`tail` then `x` along `dim`; `tail` becomes the end of the two, in place."""
    both = torch.cat([tail, x], dim)
    kept = tail.shape[dim]
    tail.copy_(both.narrow(dim, both.shape[dim] - kept, kept))
    return both


Tails = Iterator[Tensor | None]  # one per convolution, in the order in which they run


class Causal(Part):
    """A convolution over x [B, C, T] that sees the present and the past only: `context` steps of it, its tail."""

    conv: Any  # nn.Conv1d or nn.ConvTranspose1d
    context: int
    takes = 1  # steps at a time: what is missing at the end of a whole sequence is filled with zeros

    def init_tail(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Silence before the first piece [R, C, context]."""
        return torch.zeros(rows, self.conv.in_channels, self.context, device=device, dtype=dtype)

    def convolution(self) -> Bound:
        """From [B, C, context + T] to what the T steps give, with the weights of now."""
        raise NotImplementedError

    def bind(self) -> Bound:
        """As `forward`."""
        convolve, context, takes = self.convolution(), self.context, self.takes

        def run(x: Tensor, tails: Tails) -> Tensor:
            tail = next(tails)
            x = F.pad(x, (0, -x.shape[-1] % takes)) if takes > 1 else x
            if context:
                x = F.pad(x, (context, 0)) if tail is None else roll(tail, x)
            return convolve(x)

        return run

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, C, T] -> [B, C', …]."""
        return self.bind()(x, tails)


class CausalConv1d(Causal):
    """Convolution: T steps give ceil(T / stride)."""

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
        self.takes = stride

    def convolution(self) -> Bound:
        """Of x [B, C, context + T]."""
        return bind_convolution(self.conv)


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


class CausalTransposedConv1d(Causal):
    """Upsampling by `stride`, cropped on the right only: T steps give exactly T * stride, none of them waits.

    The published Code2Wav crops both sides and so looks one frame ahead; this is the strictly causal
    decoder it approximates.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride=stride)
        self.context = -(-kernel // stride) - 1  # earlier steps whose kernels still ring

    def convolution(self) -> Bound:
        """Of x [B, C, context + T]."""
        return bind_transposed(self.conv, self.context)


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
    convolutions = (m for m in module.modules() if isinstance(m, Causal))
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
