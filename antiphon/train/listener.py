"""A trained AuT beside a stage: what it makes of each moment of a sound, and the text that it hears.

Shapes: R rows, N samples, S audio tokens, T frames of codes, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antiphon.audio import LogMel, Resampler
from antiphon.aut import AuT, TextDecoder
from antiphon.config import AudioConfig
from antiphon.thinker import Thinker
from antiphon.tokenizer import Tokenizer
from antiphon.train.losses import likeness
from antiphon.train.stages.aut import write
from antiphon.train.stages.thinker import SHARP
from antiphon.train.text import read_transcript


class Listener:
    """AuT behind a resampler, never trained here; with its text decoder it also writes what it hears.

    With a `thinker` it spells: its rows read like the Thinker's embeddings, as taught by `spelling_losses`.
    """

    def __init__(
        self, aut: AuT, sample_rate: int, decoder: TextDecoder | None = None, thinker: Thinker | None = None
    ) -> None:
        self.aut, self.decoder, self.config = aut.eval().requires_grad_(False), decoder, aut.config
        self.table = None if thinker is None else thinker.model.embed_tokens.weight.detach()
        device = aut.conv_out.weight.device
        self.resample = Resampler(sample_rate, self.config.mel.sample_rate).to(device)
        self.log_mel = LogMel(self.config.mel).to(device)
        if decoder is not None:
            decoder.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, wave: Tensor) -> Tensor:
        """Encoder states [R, S, W] of waves [R, N]."""
        return self.aut.encode(self.log_mel(self.resample(wave, final=True), final=True))

    def states_at(self, wave: Tensor, frame_rate: float, frames: int) -> Tensor:
        """Encoder states [R, T, W] of waves [R, N] at the middle of each of `frames` frames of codes."""
        states = self.states(wave)
        return at_frames(states, token_times(states.shape[1], self.config), frame_rate, frames)

    def spell(self, states: Tensor) -> Tensor:
        """Log-probabilities [R, S, V] of the tokens that encoder states [R, S, W] read like."""
        assert self.table is not None, "a listener without a Thinker cannot spell"
        return (SHARP * likeness(self.aut.project(states), self.table)).log_softmax(-1)

    @torch.no_grad()
    def read(self, wave: Tensor, tokenizer: Tokenizer) -> str:
        """The text heard in wave [N]."""
        assert self.decoder is not None, "a listener without a text decoder cannot write"
        states = self.states(wave[None])
        heard = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        ids, _ = write(self.decoder, states, heard, tokenizer)
        return read_transcript(tokenizer.decode(ids[0]))[0]


def token_times(count: int, config: AudioConfig) -> Tensor:
    """Seconds [S] at which audio tokens are centred: one per stride inside a second, which begins anew every second."""
    second, place = torch.arange(count) // config.chunk_tokens, torch.arange(count) % config.chunk_tokens
    chunk, stride = config.chunk_frames / config.mel.frame_rate, 2**config.conv_layers / config.mel.frame_rate
    return second * chunk + place * stride


def at_frames(states: Tensor, times: Tensor, frame_rate: float, frames: int) -> Tensor:
    """States [R, S, W] at `times` [S], interpolated to the middle of each frame of codes: [R, T, W]."""
    wanted = (torch.arange(frames) + 0.5) / frame_rate
    after = torch.searchsorted(times, wanted).clamp(max=len(times) - 1)
    before = (after - 1).clamp(min=0)
    share = ((wanted - times[before]) / (times[after] - times[before]).clamp(min=1e-9)).clamp(0, 1)
    return torch.lerp(states[:, before], states[:, after], share[:, None].to(states))
