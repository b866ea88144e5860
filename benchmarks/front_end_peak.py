"""What "the peak so far" costs against the whole file's peak, in the front end's normalised units.

A stream closes a window of 1, 2, 4 or 8 s before it has heard the rest, so its floor lies 80 dB below the loudest
frame heard up to the window's end. Until the loudest frame of the file has come, that floor is lower than the
released one and faint bins keep values that it would have cut off. Run: `python benchmarks/front_end_peak.py`.
"""

import numpy as np
import torch
from torch import Tensor

from antiphon.audio import LogMel, normalize
from antiphon.config import MelConfig

MEL = MelConfig(num_mel_bins=128)
SECONDS = 24
WINDOWS = (1, 2, 4, 8)  # seconds


def speech_like(rng: np.random.Generator) -> np.ndarray:
    """Syllables at 4 Hz: a gliding voice with harmonics that fall off, a hiss between, and a room 60 dB down."""
    t = np.arange(SECONDS * MEL.sample_rate) / MEL.sample_rate
    phase = 2 * np.pi * np.cumsum(140 + 30 * np.sin(2 * np.pi * 0.4 * t)) / MEL.sample_rate
    voice = sum((np.sin(k * phase) / k**1.2 for k in range(1, 25)), np.zeros_like(t))
    syllables = np.clip(np.sin(2 * np.pi * 4 * t), 0, None) * (0.6 + 0.4 * np.sin(2 * np.pi * 0.3 * t + 1))
    hiss = 0.05 * np.clip(-np.sin(2 * np.pi * 4 * t), 0, None) ** 4 * rng.standard_normal(t.size)
    speech = 0.3 * (syllables * voice + hiss)
    return speech + 1e-3 * np.abs(speech).max() * rng.standard_normal(t.size)


def signals() -> dict[str, np.ndarray]:
    speech = speech_like(np.random.default_rng(0))
    t = np.arange(speech.size) / MEL.sample_rate
    return {
        "quiet start (8 s at -40 dB)": speech * np.where(t < 8, 0.01, 1.0),
        "quiet start (8 s at -60 dB)": speech * np.where(t < 8, 0.001, 1.0),
        "loud start (first 8 s, then -20 dB)": speech * np.where(t < 8, 1.0, 0.1),
        "even": speech,
    }


def peak_so_far(log_mel: Tensor, seconds: int) -> Tensor:
    """Loudest value [T, 1] up to the end of each frame's window, for log_mel [T, F]."""
    window = seconds * MEL.frame_rate
    loudest = log_mel.amax(1).split(window)
    peaks = torch.stack([piece.max() for piece in loudest]).cummax(0).values
    return peaks.repeat_interleave(torch.tensor([len(piece) for piece in loudest]))[:, None]


def main() -> None:
    print(f"{'signal':38}{'window':>8}{'max':>9}{'mean':>9}{'frames that differ':>20}")
    for name, samples in signals().items():
        log_mel = LogMel(MEL)(torch.from_numpy(samples)[None])[0]
        released = normalize(log_mel, log_mel.max())
        for seconds in WINDOWS:
            off = (normalize(log_mel, peak_so_far(log_mel, seconds)) - released).abs()
            changed = (off.amax(1) > 0).double().mean().item()
            print(f"{name:38}{seconds:>6} s{off.max().item():>9.2g}{off.mean().item():>9.2g}{changed:>19.1%}")


if __name__ == "__main__":
    main()
