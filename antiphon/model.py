"""The boxes together, and what training and generation share of them.

    wav -> mel -> AuT -> Thinker -> text tokens ----------┐
                           └ accept layer's states -> Talker -> code 0 -> MTP -> codes 1 … 15 -> Code2Wav -> wav

A model without speech (the Thinking and Captioner releases) has no Talker, MTP and Code2Wav: `speech` is None.

Shapes: B batch, T positions, U the Thinker's width, W the Talker's, Q codebooks.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from antiphon.audio import LogMel
from antiphon.aut import AuT
from antiphon.code2wav import Code2Wav
from antiphon.config import Code2WavConfig, OmniConfig, TalkerConfig
from antiphon.errors import InputError
from antiphon.mtp import MTP
from antiphon.talker import CLONED, Rows, Talker
from antiphon.thinker import Thinker
from antiphon.tokenizer import Tokenizer


class Speech(nn.Module):
    """The speaking half: Talker, MTP and Code2Wav, there together or not at all."""

    def __init__(self, talker: TalkerConfig, code2wav: Code2WavConfig) -> None:
        super().__init__()
        self.talker = Talker(talker)
        self.mtp = MTP(talker.mtp, talker.num_code_groups)
        self.code2wav = Code2Wav(code2wav)

    def frame_embedding(self, codes: Tensor) -> Tensor:
        """Codec channel [.., W] of a frame: its codes [.., Q], embedded and summed over the codebooks."""
        first = self.talker.model.codec_embedding(codes[..., 0])
        return first + self.mtp.embed(codes[..., 1:]).sum(-2)


class Boxes(nn.Module):
    """All boxes of a checkpoint, its configuration and its tokenizer."""

    def __init__(self, config: OmniConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self._tokenizer = tokenizer
        self.aut = AuT(config.audio)
        self.thinker = Thinker(config.text, config.talker.accept_hidden_layer if config.talker else None)
        self.speech = Speech(config.talker, config.code2wav) if config.talker and config.code2wav else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.thinker.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.thinker.lm_head.weight.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            InputError: the checkpoint came without one.
        """
        if self._tokenizer is None:
            raise InputError(
                "this checkpoint has no tokenizer; put tokenizer.json (or vocab.json, merges.txt and "
                "tokenizer_config.json) beside its config.json"
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def log_mel(self) -> LogMel:
        """The front end; it has no weights."""
        return LogMel(self.config.audio.mel).to(self.device)

    @property
    def voices(self) -> list[str]:
        """Names of the voices this checkpoint speaks with."""
        return sorted(self.config.talker.speaker_id) if self.config.talker else []

    def speaker(self, voice: str) -> int:
        """Control id of a voice.

        Raises:
            InputError: no such voice; the sentence lists those there are.
        """
        speech = self.speaking()
        speakers = speech.talker.config.speaker_id
        if voice.lower() not in speakers:
            raise InputError(f"there is no voice {voice!r}; this checkpoint has {', '.join(self.voices) or 'none'}")
        return speakers[voice.lower()]

    def speaking(self) -> Speech:
        """The speaking half.

        Raises:
            InputError: this checkpoint has none.
        """
        if self.speech is None:
            raise InputError("this checkpoint has no Talker and cannot speak; ask for text only")
        return self.speech

    def embed_prompt(self, ids: Tensor, audio: Tensor | None = None, user: Tensor | None = None) -> Tensor:
        """Thinker's input [T, U] of ids [T]: audio ids are replaced, in order, by rows of `audio` [n, U].

        `user` [T] is False where an id was not the user's: an audio id that the model says is a token like any other.
        """
        x = self.thinker.embed(ids)
        if audio is None:
            return x
        heard = ids == self.config.audio_token_id
        heard = heard if user is None else heard & user
        return x.masked_scatter(heard[:, None], audio.to(x.dtype))

    def embed_rows(self, rows: Rows, accept: Tensor | None = None, voices: Tensor | None = None) -> Tensor:
        """Talker's input [1, T, W] of laid-out rows; `accept` [T, U] holds the accept layer's states for audio rows.

        `voices` [n, W] go, in order, where the codec channel says CLONED.

        Rows without a control id have nothing on the codec channel; the caller adds the frames' codes.
        """
        talker = self.speaking().talker
        text = torch.tensor(rows.text, device=self.device)
        codec = torch.tensor(rows.codec, device=self.device)
        x = talker.text_projection(self.thinker.embed(text))
        heard = text == self.config.audio_token_id
        if accept is not None and bool(heard.any()):
            x[heard] = talker.hidden_projection(accept[heard])
        x = x + talker.model.codec_embedding(codec.clamp(min=0)) * (codec >= 0)[:, None]
        if voices is not None:
            x = x.index_add(0, (codec == CLONED).nonzero()[:, 0], voices.to(x.dtype))
        return x[None]
