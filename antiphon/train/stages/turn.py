"""The end of a turn: the head that tells a pause from an end, on AuT's embeddings; AuT stands.

A clip as it is, and such a clip broken off between two words, with as much silence after the one as after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.audio import Samples
from antiphon.aut import AuT
from antiphon.train.data import Example, Mel, listened, load_samples, measured, read_examples
from antiphon.train.loop import Figures, Loss, Size
from antiphon.train.recipe import read_fields
from antiphon.train.stages.common import Setting
from antiphon.train.talks import cut_out
from antiphon.turn import TurnConfig, TurnEnd

BROKEN = (0.2, 0.9)  # of a clip's length: where it may be broken off
SEARCHED = 0.12  # seconds on either side, for the quietest place
STEP = 0.01  # seconds, that loudness is taken over
SILENCE = 0.003  # of full scale: what is softer at the end of a clip is no speech
HISS = 0.0003  # of full scale, in what follows it


@dataclass(frozen=True)
class TurnOptions:
    """What only this stage knows."""

    head: dict[str, Any] = field(default_factory=dict)  # sizes of the head
    windows: tuple[int, ...] = (1, 2, 4, 8)
    silence: tuple[float, float] = (0.15, 0.7)  # seconds of it after what was said
    broken: float = 0.5  # share of the clips that are broken off
    validated: int = 300


@dataclass(frozen=True)
class TurnBatch:
    """Clips, and which of them have come to their end."""

    mel: Tensor  # [B, T, F] raw log-mel
    frames: Tensor  # [B]
    ended: Tensor  # [B]
    window: int


class TurnStage:
    """The head; AuT is read only."""

    def __init__(self, setting: Setting) -> None:
        recipe = setting.recipe
        self.options = read_fields(TurnOptions, dict(recipe.options), f"{recipe.name}.options")
        self.setting, self.config, self.device = setting, setting.config.audio, setting.device
        torch.manual_seed(recipe.seed)
        self.aut = AuT(self.config)
        sizes = {"width": self.config.output_dim, **self.options.head}
        self.turn = TurnEnd(read_fields(TurnConfig, sizes, f"{recipe.name}.options.head"))
        self.modules = setting.prepare(nn.ModuleDict({"turn": self.turn, "aut": self.aut.requires_grad_(False)}))
        self.mix = setting.mix()

    def players(self) -> dict[str, list[str]]:
        """One player."""
        return {"turn": ["turn"]}

    def batch(self, number: int) -> TurnBatch:
        """Clips of one batch."""
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.setting.recipe.seed, number, 1 << 20]))
        )
        window = self.options.windows[int(random.random() * len(self.options.windows))]
        return self.collate(self.mix.draw(number), window, random)

    def collate(self, examples: Sequence[Example], window: int, random: np.random.Generator) -> TurnBatch:
        """Clips as tensors, some of them broken off."""
        made = [self.ending(example, random) for example in examples]
        mel, frames = listened([one for one, _ in made])
        return TurnBatch(mel, frames, torch.tensor([ended for _, ended in made]), window)

    def ending(self, example: Example, random: np.random.Generator) -> tuple[Mel, bool]:
        """The log-mel of a clip with silence after it, and whether the clip is whole."""
        rate = self.config.mel.sample_rate
        sound = said_in(example, rate)
        ended = random.random() >= self.options.broken
        sound = sound if ended else sound[: breaking_point(sound, rate, random)]
        silence = round(random.uniform(*self.options.silence) * rate)
        after = HISS * random.random() * random.standard_normal(silence)
        return measured(np.concatenate([sound, after.astype(np.float32)]), self.config.mel), ended

    def judge(self, batch: TurnBatch) -> Tensor:
        """Logits [B]."""
        with torch.no_grad():
            mel = batch.mel.to(self.device, non_blocking=True).float()
            heard = self.aut(mel, window=batch.window, frames=batch.frames)
        rows = torch.tensor([self.config.tokens(int(n)) for n in batch.frames])
        return self.turn(heard, rows)

    def counts(self, batch: TurnBatch) -> dict[str, float]:
        """Clips."""
        return {"ended": float(len(batch.ended))}

    def size(self, batch: TurnBatch) -> Size:
        """Mel frames."""
        return Size.of_clips(batch.mel, batch.frames, self.config.mel.frame_rate)

    def loss(self, player: str, batch: TurnBatch, step: int) -> Loss:
        """Cross-entropy, and the share that is judged rightly."""
        logits, ended = self.judge(batch), batch.ended.to(self.device, non_blocking=True)
        total = F.binary_cross_entropy_with_logits(logits, ended.float())
        figures = {"loss": total, "right": ((logits > 0) == ended).float().mean()}
        return Loss.of({"ended": total}, figures)

    def validate(self) -> Figures:
        """Share of clips judged wrongly; of those broken off, taken for ended, and the other way round."""
        wrong: dict[bool, list[bool]] = {True: [], False: []}
        for ended, likely in self.judged():
            wrong[ended].append((likely > 0.5) != ended)
        cut, waited = (float(np.mean(wrong[ended])) if wrong[ended] else 0.0 for ended in (False, True))
        return {"wrong": (cut + waited) / 2, "cut_off": cut, "kept_waiting": waited}

    def judged(self) -> list[tuple[bool, float]]:
        """Of validation clips, whether each has ended and how likely that is judged."""
        pairs = []
        for source in self.setting.recipe.data.validation:
            examples = read_examples(source, self.setting.cuts)
            some = examples[:: max(1, len(examples) // self.options.validated)]
            random = np.random.Generator(np.random.Philox(0))
            for start in range(0, len(some), 16):
                batch = self.collate(some[start : start + 16], self.options.windows[0], random)
                likely = self.judge(batch).sigmoid().tolist()
                pairs += zip(batch.ended.tolist(), likely, strict=True)
        return pairs

    def sample(self, folder: Path, board: Any) -> None:
        """How likely an end is, after what has ended and after what has not, as a picture."""
        from matplotlib.figure import Figure

        folder.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes, judged = figure.add_subplot(), self.judged()
        for ended, label in ((True, "ended"), (False, "broken off")):
            axes.hist([p for e, p in judged if e == ended], bins=20, range=(0, 1), alpha=0.6, label=label)
        axes.set_xlabel("probability of an end")
        axes.legend()
        figure.savefig(folder / "judged.png")
        board.add_figure("judged", figure)


def said_in(example: Example, rate: int) -> Samples:
    """What is said in a clip, or by the user first in a conversation, without the silence after it."""
    own = example.cut.sampling_rate
    sound = cut_out(example, load_samples(example.cut, own), 0, rate)
    loud = (np.abs(sound) > SILENCE).nonzero()[0]
    return sound[: loud[-1] + 1] if len(loud) else sound


def breaking_point(sound: Samples, rate: int, random: np.random.Generator) -> int:
    """Where to break off: the quietest place near a drawn one, which mostly lies between two words."""
    step = round(STEP * rate)
    energy = np.square(sound[: len(sound) // step * step]).reshape(-1, step).mean(1)
    place, reach = round(random.uniform(*BROKEN) * len(energy)), round(SEARCHED / STEP)
    first = max(1, place - reach)
    return step * (first + int(energy[first : place + reach + 1].argmin())) if first < len(energy) else len(sound) // 2
