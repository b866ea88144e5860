"""The Talker by preference (DPO): of two renditions of a sentence the one that was judged better becomes likelier.

A pair is a cut (task "prefer") with three supervisions: the better rendition, the worse one of the same text, and a
recording of the voice that both are to have. `train.pairs` makes pairs of what the Talker itself says.

    gained = log-likelihood of codebook 0 and the end, now, less that before training
    loss   = -log sigmoid(beta * (gained by the better - gained by the worse))

and a share of the plain loss on the better ones, MTP's with it: a Talker that is only told which is better makes both
less likely. Before training is the `init` of the recipe, which stands beside what is trained.

Shapes: B answers, two to a pair; N frames, Q codebooks, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from antiphon.errors import ConfigError
from antiphon.train.data import Example
from antiphon.train.loop import Loss, sum_of
from antiphon.train.stages.common import Setting
from antiphon.train.stages.speech import PREFER, Answer, SpeechBatch, SpeechOptions, SpeechStage, spoken_in

BEGUN = ("mtp", "speaker", "talker")  # what must have been trained


@dataclass(frozen=True)
class PreferenceOptions(SpeechOptions):
    """What only this stage knows."""

    beta: float = 0.1  # how much a nat of difference counts
    likelihood: float = 0.1  # weight of the plain loss on the better ones


class PreferenceStage(SpeechStage):
    """Talker and MTP, and the same as they were beside them; the speaker encoder stands."""

    kind = PreferenceOptions
    options: PreferenceOptions

    def __init__(self, setting: Setting) -> None:
        recipe = setting.recipe
        if missing := [name for name in BEGUN if name not in recipe.init]:
            raise ConfigError(f"{recipe.name}: init names no {', '.join(missing)}; preferences are of what was trained")
        if others := {s.task for s in (*recipe.data.mix, *recipe.data.validation)} - {PREFER}:
            raise ConfigError(f"{recipe.name}: the task {sorted(others)[0]!r} has no pairs; expected {PREFER!r}")
        super().__init__(setting)
        if self.options.deaf or self.options.drawn or self.options.follow:
            raise ConfigError(f"{recipe.name}.options: deaf, drawn and follow are not for pairs; leave them out")
        self.speaker.requires_grad_(False)
        speech = self.boxes.speaking()
        self.before = [deepcopy(box).eval().requires_grad_(False) for box in (speech.talker, speech.mtp)]

    def players(self) -> dict[str, list[str]]:
        """One player."""
        return {"speech": ["talker", "mtp"]}

    def answers(self, examples: Sequence[Example], step: int) -> list[Answer]:
        """Both renditions of each example, in the voice of one reference."""
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.setting.recipe.seed, step, 1 << 21]))
        )
        references = [self.excerpt((e, 2), random) for e in examples]
        return [self.spoken_as(one, r) for e, r in zip(examples, references, strict=True) for one in spoken_in(e)]

    def counts(self, batch: SpeechBatch) -> dict[str, float]:
        """Pairs, and of the better renditions frames and ends, and frames that MTP learns from."""
        frames, pairs = int(batch.counts[::2].sum()), len(batch.counts) // 2
        return {"preference": float(pairs), "code0": float(frames + pairs), "residual": float(self.chosen(frames))}

    def loss(self, player: str, batch: SpeechBatch, step: int) -> Loss:
        """Of the pairs, and the plain one of the better renditions."""
        with torch.no_grad(), self.as_before():
            then, _ = self.likelihoods(batch, *self._said(batch))
        states, codes = self._said(batch)
        now, better = self.likelihoods(batch, states, codes)
        gained = (now - then).unflatten(0, (-1, 2))
        margin = gained[:, 0] - gained[:, 1]
        parts, figures = self.nats(batch, states[better], codes[better])
        parts = {name: self.options.likelihood * part for name, part in parts.items()}
        parts["preference"] = F.softplus(-self.options.beta * margin).mean()
        figures |= {"preference": parts["preference"], "margin": margin.mean(), "told": (margin > 0).float().mean()}
        return Loss.of(parts, {**figures, "loss": sum_of(parts)})

    def likelihoods(self, batch: SpeechBatch, states: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihood [B] of codebook 0 and the end of each rendition; which states [N + B] are of the better."""
        with self.plan.autocast(self.device):
            scores = self.boxes.speaking().talker.codec_head(states)
        nats = F.cross_entropy(scores.float(), self.following_code(codes), reduction="none")
        row = torch.arange(len(batch.counts)).repeat_interleave(batch.counts + 1).to(nats.device)
        return -nats.new_zeros(len(batch.counts)).index_add(0, row, nats), row % 2 == 0

    def _said(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """The Talker's states [N + B, W], and the codes [N + B, Q] that follow them."""
        with self.plan.autocast(self.device):
            states, codes, _ = self.scores(batch)
        return states, codes

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Talker and MTP as they were before training."""
        speech = self.boxes.speaking()
        now: Any = speech.talker, speech.mtp
        before: Any = self.before
        speech.talker, speech.mtp = before
        try:
            yield
        finally:
            speech.talker, speech.mtp = now
