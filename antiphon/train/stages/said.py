"""Code2Wav on codes as they are said: what Talker and MTP draw goes in, and the recorded sound should come out.

Codes of a recording hold every detail of it. Those that are drawn are right in what is likely and made up in the rest,
and a decoder that met recorded ones alone takes what was made up for what is meant. Every frame is drawn after the
recorded ones before it, so that it keeps its place beside the sound: alignment to the ground truth, as vocoders are
trained on the spectra of their acoustic models.

Shapes: R rows, N samples, T frames of codes, Q codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from antiphon.audio import Samples
from antiphon.errors import ConfigError
from antiphon.train.codes import sound_of
from antiphon.train.data import Example
from antiphon.train.stages.codec import Code2WavStage, Crops, SoundOptions
from antiphon.train.stages.common import Setting
from antiphon.train.stages.speech import SpeechStage, listens

DECODER = ("codec", "code2wav", "head")  # in `init`: what Code2Wav has to do with; all else speaks


@dataclass(frozen=True)
class SaidOptions(SoundOptions):
    """What only this stage knows."""

    share: float = 0.8  # of the crops have codes as they are said, the others those of the recording
    temperature: float = 1.0  # as the export's: what speaks is to draw at so much of the released temperatures
    speech: dict[str, Any] = field(default_factory=dict)  # options of the stage that trained it, `speech`


class SaidStage(Code2WavStage):
    """Code2Wav is trained; what speaks stands beside it."""

    kind = SaidOptions

    def __init__(self, setting: Setting) -> None:
        recipe = setting.recipe
        if listens(recipe.data):
            raise ConfigError(f"{recipe.name}: the stage said takes sentences alone; give its sources the task say")
        decoder = {name: run for name, run in recipe.init.items() if name.split(".")[0] in DECODER}
        super().__init__(replace(setting, recipe=replace(recipe, init=decoder)))
        assert isinstance(self.options, SaidOptions)
        self.share, self.temperature = self.options.share, self.options.temperature
        speaks = {name: run for name, run in recipe.init.items() if name == "codec" or name not in decoder}
        recipe = replace(recipe, init=speaks, options=self.options.speech, freeze=())
        self.speech = SpeechStage(replace(setting, recipe=recipe))
        self.speech.modules.eval().requires_grad_(False)

    def batch(self, number: int) -> Crops:
        """Crops whose codes begin with a frame of their clip; silence fills those of short ones."""
        examples, random = self.clips(number), self.places(number)
        batch = self.speech.collate(examples, number)
        recorded, said = batch.codes.split(batch.counts.tolist()), self.speech.said(batch, self.temperature)
        waves, codes = [], []
        for example, *both in zip(examples, recorded, said, strict=True):
            wave, row = self.whole(example, both[random.random() < self.share])
            start = int(random.random() * (len(row) - self.options.frames + 1))
            part = slice(start, start + self.options.frames)
            codes.append(row[part])
            waves.append(wave.unflatten(0, (len(row), -1))[part].flatten())
        return Crops(torch.stack(waves), torch.stack(codes))

    def read(self, example: Example) -> Samples:
        """Samples [N] of what is spoken in a clip."""
        return sound_of((example, 0), self.config.sampling_rate)

    def whole(self, example: Example, codes: Tensor) -> tuple[Tensor, Tensor]:
        """A clip [N] in whole frames, and in at least as many as a crop has, and its codes [T, Q] with those added."""
        size, frames = self.config.frame_samples, max(len(codes), self.options.frames)
        wave = torch.from_numpy(self.kept(example))
        wave = F.pad(wave, (0, frames * size - len(wave)))
        if frames == len(codes):
            return wave, codes
        with torch.no_grad():  # by the codec that is nobody's share: batches are made while others train
            silence = self.speech.codec.encode(wave[None].to(self.device))[0, len(codes) :].cpu()
        return wave, torch.cat([codes, silence])

    def codes_of(self, crops: Crops) -> Tensor:
        """Those that were said."""
        assert crops.codes is not None
        return crops.codes.to(self.device, non_blocking=True)

    def _again(self, example: Example) -> tuple[Tensor, Tensor, Tensor]:
        """A clip as it was [1, N], as it is said [1, N], and the codes of that [1, T, Q]."""
        wave = torch.from_numpy(self.read(example))[None].to(self.device)
        codes = self.speech.said(self.speech.collate([example], 0), self.temperature)[0][None].to(self.device)
        return wave, self.decode(codes)[:, : wave.shape[1]].float(), codes
