"""How far two sounds are apart: log-mel, log-magnitude and spectral convergence, over windows of several lengths.

Magnitudes are those of sinusoids (a window sums to one), so `FLOOR` lies 100 dB below full scale, under the rounding of
16-bit sound. It is added and never clamped at: below a clamp there is no gradient, and a decoder that begins in silence
stays there.

And how far steps are from spelling a text: CTC.

Shapes: R rows, N samples, T frames of a window, B its bins, F mel bins; for CTC B clips, S steps, V classes, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.audio import exact, mel_filters
from antiphon.config import MelConfig

FLOOR = 1e-5  # added to magnitudes before the logarithm
ROUND = 1e-24  # added to power before the root, whose slope at zero is infinite
BINS_PER_MEL = 12.8  # samples of a window for each of its mel bins: every mel bin holds a frequency


@dataclass(frozen=True)
class Distance:
    """Scalars, each the mean over all windows; zero for equal sounds."""

    mel: Tensor  # mean absolute difference of ln mel
    stft: Tensor  # mean absolute difference of ln magnitude
    convergence: Tensor  # norm of the difference of magnitudes over the norm of the wanted ones


class Spectrum(nn.Module):
    """Magnitudes of one window length, a quarter of it from frame to frame."""

    window: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, size: int) -> None:
        super().__init__()
        self.size, self.hop = size, size // 4
        window = torch.hann_window(size)
        filters = torch.from_numpy(mel_filters(MelConfig(int(size / BINS_PER_MEL), sample_rate, size, self.hop)))
        self.register_buffer("window", window / window.sum(), persistent=False)
        self.register_buffer("filters", (filters / filters.sum(1, keepdim=True)).float(), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Magnitudes [R, B, T] of wave [R, N]."""
        x = torch.stft(wave, self.size, self.hop, window=self.window, return_complex=True, pad_mode="constant")
        return (torch.view_as_real(x).square().sum(-1) + ROUND).sqrt()

    @exact
    def log_mel(self, magnitude: Tensor) -> Tensor:
        """Natural logarithm [R, F, T] of the mean magnitude in each mel bin."""
        return (self.filters @ magnitude + FLOOR).log()


class SpectralDistance(nn.Module):
    """The distance between what was made and what was wanted, over all window lengths."""

    def __init__(self, sample_rate: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(Spectrum(sample_rate, size) for size in sizes)

    def forward(self, made: Tensor, wanted: Tensor) -> Distance:
        """Of waves [R, N]."""
        parts = [self._of(spectrum, made, wanted) for spectrum in self.spectra if isinstance(spectrum, Spectrum)]
        return Distance(*(torch.stack(values).mean() for values in zip(*parts, strict=True)))

    def _of(self, spectrum: Spectrum, made: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            y = spectrum(wanted)
        x = spectrum(made)
        mel = (spectrum.log_mel(x) - spectrum.log_mel(y)).abs().mean()
        stft = ((x + FLOOR).log() - (y + FLOOR).log()).abs().mean()
        silence = FLOOR * math.sqrt(y.numel())  # wanted silence has no norm to divide by
        return mel, stft, _norm(x - y) / (y.norm() + silence)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm with a gradient at zero."""
    return (x.square().sum() + ROUND).sqrt() - math.sqrt(ROUND)


def likeness(states: Tensor, table: Tensor) -> Tensor:
    """How much states [.., W] read like each of some embeddings [V, W]: scores [.., V]."""
    return F.linear(states, table) * table.shape[-1] ** -0.5


def ctc_per_token(scores: Tensor, text: Tensor, heard: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """CTC [B] per text token: scores [B, S, V] of which `heard` [B] steps count, ids [B, L] of which `lengths` [B] do.

    Zero where the steps are too few for the text.
    """
    log = scores.float().log_softmax(-1).transpose(0, 1)
    return _ctc(log, text, heard, lengths, blank) / lengths.to(scores.device)


def ctc_and_ways(scores: Tensor, text: Tensor, heard: Tensor, lengths: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """As `ctc_per_token`, and what each step says on the ways that spell the text: probabilities [B, S, V].

    CTC's gradient is how far the scores' own probabilities are from these, which have none themselves.
    """
    log = scores.float().log_softmax(-1).transpose(0, 1)
    with torch.enable_grad():
        given = log.detach().requires_grad_()
        (apart,) = torch.autograd.grad(_ctc(given, text, heard, lengths, blank).sum(), given)
    each = _ctc(log, text, heard, lengths, blank) / lengths.to(scores.device)
    return each, (given.detach().exp() - apart).transpose(0, 1)


def _ctc(log: Tensor, text: Tensor, heard: Tensor, lengths: Tensor, blank: int) -> Tensor:
    return F.ctc_loss(
        log, text.to(log.device, non_blocking=True), heard.cpu(), lengths, blank, "none", zero_infinity=True
    )
