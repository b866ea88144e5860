"""The adversary of a decoder: small networks that learn to tell made sound from recorded sound.

Some look at the wave folded by a period (neighbours in a column are a period apart), some at complex spectra. Their
verdict says what is wrong with what no spectral distance hears: phase, and structure between bins.

Shapes: R rows, N samples, P period, B bins, T frames of a window, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1  # of the leaky rectifiers
Verdict = list[Tensor]  # what each layer of one network gave; the last is its score, above zero for recorded sound


class PeriodJudge(nn.Module):
    """Looks at every `period`-th sample, from each of the first `period` samples on."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        sizes = [1, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.ModuleList(nn.Conv1d(a, b, 5, 3, padding=2) for a, b in pairwise(sizes))
        self.last = nn.Conv1d(sizes[-1], 1, 3, padding=1)

    def forward(self, wave: Tensor) -> Verdict:
        """Wave [R, N] -> features [R * P, C, time]."""
        x = F.pad(wave, (0, -wave.shape[1] % self.period))
        x = x.unflatten(1, (-1, self.period)).transpose(1, 2).flatten(0, 1)[:, None]
        return _features(self.layers, self.last, x)


class SpectrumJudge(nn.Module):
    """Looks at the real and imaginary parts of a spectrum."""

    window: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size) / size**0.5, persistent=False)
        sizes = [2, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, (8, 3), (4, 1), padding=(2, 1)) for a, b in pairwise(sizes))
        self.layers.append(nn.Conv2d(sizes[-1], sizes[-1], 3, padding=1))
        self.last = nn.Conv2d(sizes[-1], 1, 3, padding=1)

    def forward(self, wave: Tensor) -> Verdict:
        """Wave [R, N] -> features [R, C, bins, T]."""
        x = torch.stft(wave, self.size, self.size // 4, window=self.window, return_complex=True, pad_mode="constant")
        x = torch.view_as_real(x[:, :-1]).permute(0, 3, 1, 2)
        return _features(self.layers, self.last, x)


def _features(layers: nn.ModuleList, last: nn.Module, x: Tensor) -> Verdict:
    found = []
    for layer in layers:
        x = F.leaky_relu(layer(x), SLOPE)
        found.append(x)
    return [*found, last(x)]


class Adversary(nn.Module):
    """All judges together."""

    def __init__(self, periods: Sequence[int], sizes: Sequence[int], width: int) -> None:
        super().__init__()
        judges = [PeriodJudge(p, width) for p in periods] + [SpectrumJudge(s, width) for s in sizes]
        self.judges = nn.ModuleList(judges)

    def forward(self, wave: Tensor) -> list[Verdict]:
        """The verdict of each judge on wave [R, N]."""
        return [judge(wave) for judge in self.judges]


def judging_loss(real: Sequence[Verdict], made: Sequence[Verdict]) -> Tensor:
    """What the adversary minimizes (hinge): scores of recorded sound above 1, of made sound below -1."""
    each = [F.relu(1 - r[-1]).mean() + F.relu(1 + m[-1]).mean() for r, m in zip(real, made, strict=True)]
    return torch.stack(each).mean()


def fooling_loss(made: Sequence[Verdict]) -> Tensor:
    """What a decoder minimizes: it wants high scores."""
    return torch.stack([-m[-1].mean() for m in made]).mean()


def feature_loss(real: Sequence[Verdict], made: Sequence[Verdict]) -> Tensor:
    """How far the judges' features of made sound are from those of recorded sound, in units of the latter."""
    each = [
        (a - b).abs().mean() / (a.abs().mean() + 1e-6)
        for r, m in zip(real, made, strict=True)
        for a, b in zip(r[:-1], m[:-1], strict=True)
    ]
    return torch.stack(each).mean()
