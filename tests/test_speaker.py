"""The speaker encoder: a voice depends neither on padding, nor on loudness, nor on who else is in the batch."""

import pytest
import torch

from antiphon.speaker import SpeakerConfig, SpeakerEncoder

CONFIG = SpeakerConfig(width=24, channels=32, scale=4, attention=16, num_mel_bins=20)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return SpeakerEncoder(CONFIG).double().eval()


def mel(frames, seed):
    return torch.randn(frames, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_voice_is_the_same_alone_and_in_a_padded_batch(encoder):
    one, other = mel(50, 0), mel(81, 1)
    padded = torch.zeros(2, 81, 20, dtype=torch.float64)
    padded[0, :50], padded[0, 50:], padded[1] = one, 7.0, other
    both = encoder(padded, torch.tensor([50, 81]))
    assert torch.allclose(both[0], encoder(one[None])[0], atol=1e-12)
    assert torch.allclose(both[1], encoder(other[None])[0], atol=1e-12)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_loudness_is_not_the_voice(encoder):
    quiet = mel(50, 2)
    assert torch.allclose(encoder(quiet[None]), encoder(quiet[None] + 1.5), atol=1e-9)


def test_every_weight_learns(encoder):
    encoder(torch.stack([mel(40, 3), mel(40, 4)])).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in encoder.parameters())


def test_the_front_end_is_its_own():
    front = CONFIG.mel
    assert (front.sample_rate, front.n_fft, front.hop, front.num_mel_bins) == (24000, 1024, 256, 20)
