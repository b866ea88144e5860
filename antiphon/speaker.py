"""The speaker encoder: a few seconds of a voice -> one vector for the speaker slot of the Talker's prompt.

ECAPA-TDNN: dilated convolutions with squeeze-and-excitation over log-mel, then a mean and a deviation over time that
attention weighs. The release has preset voices only (rows of the Talker's `codec_embedding`); this is how a
voice that is not among them gets a vector of its own, and it lives in a file beside the checkpoint.

Shapes: B clips, T mel frames, F mel bins, C channels, W the Talker's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.config import MelConfig
from antiphon.files import load_described, save_described

DILATIONS = (2, 3, 4)
SPEAKER_FILE = "speaker.safetensors"  # beside a checkpoint
SIZES = "speaker_config"  # in the file's metadata


@dataclass(frozen=True)
class SpeakerConfig:
    """Sizes of the encoder; the front end is Qwen3-TTS's."""

    width: int  # of the vector: the Talker's
    channels: int = 512
    scale: int = 8  # groups of a Res2 convolution, each of which sees one step further than the one before
    attention: int = 128
    num_mel_bins: int = 128
    sample_rate: int = 24000
    n_fft: int = 1024
    hop: int = 256

    @property
    def mel(self) -> MelConfig:
        """The front end."""
        return MelConfig(self.num_mel_bins, self.sample_rate, self.n_fft, self.hop)


class Convolved(nn.Module):
    """Convolution over as many steps as come in, ReLU, norm over the channels of each step; silence outside."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding="same")
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        """x [B, C, T], 0 where heard [B, 1, T] is, -> [B, C', T], likewise."""
        return self.norm(F.relu(self.conv(x)).transpose(1, 2)).transpose(1, 2) * heard


class SqueezeRes2Block(nn.Module):
    """Res2 convolutions between two pointwise ones, then a gate per channel from the mean over time."""

    def __init__(self, channels: int, scale: int, squeezed: int, dilation: int) -> None:
        super().__init__()
        self.scale, part = scale, channels // scale
        self.tdnn1 = Convolved(channels, channels, 1)
        self.res2net = nn.ModuleList(Convolved(part, part, 3, dilation) for _ in range(scale - 1))
        self.tdnn2 = Convolved(channels, channels, 1)
        self.squeeze, self.excite = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        parts = list(self.tdnn1(x, heard).chunk(self.scale, 1))
        for i, convolve in enumerate(self.res2net, 1):
            parts[i] = convolve(parts[i] + parts[i - 1] if i > 1 else parts[i], heard)
        y = self.tdnn2(torch.cat(parts, 1), heard)
        mean = y.sum(-1) / heard.sum(-1)
        return x + y * self.excite(F.relu(self.squeeze(mean))).sigmoid()[..., None]


class SpeakerEncoder(nn.Module):
    """Log-mel of a reference -> the voice."""

    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.config, c = config, config.channels
        self.first = Convolved(config.num_mel_bins, c, 5)
        self.blocks = nn.ModuleList(SqueezeRes2Block(c, config.scale, config.attention, d) for d in DILATIONS)
        wide = c * len(DILATIONS)
        self.mix = Convolved(wide, wide, 1)
        self.attend1, self.attend2 = nn.Conv1d(3 * wide, config.attention, 1), nn.Conv1d(config.attention, wide, 1)
        self.fc = nn.Linear(2 * wide, config.width)

    def forward(self, mel: Tensor, frames: Tensor | None = None) -> Tensor:
        """Voices [B, W] of raw log-mel [B, T, F], of which `frames` [B] are sound in a padded batch."""
        length = torch.full((len(mel),), mel.shape[1]) if frames is None else frames
        heard = (torch.arange(mel.shape[1]) < length[:, None])[:, None].to(mel)
        x = mel.transpose(1, 2) * heard
        loudness = x.sum((1, 2), keepdim=True) / (heard.sum(-1, keepdim=True) * x.shape[1])
        x, outputs = self.first((x - loudness) * heard, heard), []  # how loud the recording is, is not the voice's
        for block in self.blocks:
            x = block(x, heard)
            outputs.append(x)
        x = self.mix(torch.cat(outputs, 1), heard)
        mean, deviation = weighed(x, heard / heard.sum(-1, keepdim=True))
        about = torch.cat([x, mean[..., None].expand_as(x), deviation[..., None].expand_as(x)], 1)
        scores = self.attend2(torch.tanh(self.attend1(about))).masked_fill(heard == 0, -torch.inf)
        return self.fc(torch.cat(weighed(x, scores.softmax(-1)), 1))


def weighed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C] over time of x [B, C, T] by weight [B, 1 or C, T]."""
    mean = (x * weight).sum(-1)
    variance = ((x - mean[..., None]).square() * weight).sum(-1)
    return mean, (variance + 1e-6).sqrt()


def save_speaker(encoder: SpeakerEncoder, path: Path) -> None:
    """Write an encoder as one safetensors file that describes itself."""
    save_described(encoder, encoder.config, path, SIZES)


def load_speaker(path: Path) -> SpeakerEncoder:
    """The encoder in a file of `save_speaker`, ready to listen.

    Raises:
        WeightsError: not such a file, or a tensor that does not fit its sizes.
    """
    return load_described(path, SIZES, lambda sizes: SpeakerEncoder(SpeakerConfig(**sizes)))
