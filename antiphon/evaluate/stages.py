"""Every stage of one greedy answer as Antiphon computes it, freely or along a reference.

Stages of `trace` (all float32 or int64; T prompt positions, n text tokens, M frames, Q codebooks):

    mel             [F, frames]  normalised log-mel of the clip(s), side by side
    audio_features  [tokens, U]  AuT's output
    prompt_ids      [T]          the Thinker's prompt
    thinker_hidden  [T, U]       the accept layer's states over the prompt
    thinker_logits  [n, V]       raw scores of each generated token
    text_ids        [n]          generated tokens, the closing one included
    talker_inputs   [P, W]       the Talker's prefill
    talker_logits   [M, C]       raw scores of codebook 0, before suppression and penalty
    codes           [M, Q]
    waveform        [M * 1920]   the oracle is Code2Wav with its transposed convolutions cropped on the right only

and what a comparison needs besides (K routed layers, k experts per token):

    thinker_experts [K, T + n - 1, k]  chosen in each layer, one row per position
    talker_experts  [K, positions, k]
    mtp_logits      [M, Q - 1, C]      raw scores of the residual codebooks
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import antiphon.generate
from antiphon.audio import LogMel, Resampler, Samples, check_samples, normalize
from antiphon.chat import TurnWriter
from antiphon.config import MelConfig, OmniConfig
from antiphon.errors import InputError
from antiphon.generate import Omni, Options, Session, collect
from antiphon.layers import SparseMLP
from antiphon.sampling import GREEDY, THINKER_CODEBOOK, NoiseKey, Sampling, choose
from antiphon.tokenizer import Tokenizer, byte_tokenizer

STAGES = (
    "mel",
    "audio_features",
    "prompt_ids",
    "thinker_hidden",
    "thinker_logits",
    "text_ids",
    "talker_inputs",
    "talker_logits",
    "codes",
    "waveform",
)
COMPARED = (*STAGES[:5], "thinker_experts", *STAGES[5:8], "talker_experts", "mtp_logits", *STAGES[8:])


@dataclass(frozen=True)
class Case:
    """What is said to the model and how it answers, greedily.

    A turn is a list of parts, text or (samples, rate); user and assistant take turns, the user first and last, and
    assistant turns are one text.
    """

    turns: Sequence[Sequence[str | tuple[Samples, int]]]
    system: str | None = None
    voice: str | None = None
    max_text_tokens: int = 12
    max_frames: int = 12
    repetition_penalty: float = 1.05
    window: int | None = None

    @property
    def options(self) -> Options:
        """Greedy options; every token is spoken, as in the release."""
        speech = Sampling(0.0, repetition_penalty=self.repetition_penalty)
        return Options(
            voice=self.voice,
            max_text_tokens=self.max_text_tokens,
            max_frames=self.max_frames,
            text=GREEDY,
            speech=speech,
            residual=GREEDY,
            verbatim=True,
        )


def default_case() -> Case:
    """A clip of 3.3 s (rising tone over noise, a pause in it) and a question."""
    rate = MelConfig.sample_rate
    t = np.arange(int(3.3 * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    sound = 0.3 * np.sin(2 * np.pi * (200 + 400 * t) * t) + 0.02 * noise
    sound[int(1.5 * rate) : int(2.0 * rate)] *= 0.01
    return Case([[(sound.astype(np.float32), rate), "What did you hear?"]])


def spelled(case: Case, config: OmniConfig, tokenizer: Tokenizer) -> Tensor:
    """The prompt [T] of a case, without a model: what is wrong with the case shows before one is loaded.

    Raises:
        AudioError, InputError: a clip that is no sound, or text that is not Unicode.
    """
    writer, log_mel = TurnWriter(tokenizer), LogMel(config.audio.mel)
    ids = [] if case.system is None else writer.turn("system", case.system)
    for i, parts in enumerate(case.turns):
        ids += writer.open("assistant" if i % 2 else "user")
        for part in parts:
            if isinstance(part, str):
                writer.text(part)
            else:
                wave = Resampler(part[1], config.audio.mel.sample_rate)(torch.from_numpy(check_samples(*part))[None])
                ids += writer.audio(config.audio.tokens(log_mel(wave).shape[1]))
        ids += writer.close()
    return torch.tensor(ids + writer.open_reply())


def ensure_tokenizer(model: Omni) -> bool:
    """Let bytes stand in for tokens where a checkpoint has no tokenizer; whether they do."""
    try:
        model.tokenizer  # noqa: B018
    except InputError:
        model.tokenizer = byte_tokenizer(model.config)
        return True
    return False


def trace(model: Omni, case: Case, follower: Follower | None = None) -> dict[str, Tensor]:
    """All stages as Antiphon computes them; with a `follower` along its reference, and all that is compared."""
    record: dict[str, list[Tensor]] = {}
    with follower.leading(model) if follower is not None else nullcontext():
        session = Session(model, case.system, window=case.window, record=record)
        for i, parts in enumerate(case.turns):
            if i % 2:
                session.append_message({"role": "assistant", "content": parts[0]})
                continue
            for part in parts:
                session.append_text(part) if isinstance(part, str) else session.append_clip(*part)
            session.commit()
        collect(session.respond(case.options if model.speech is not None else replace(case.options, audio=False)))
    stages = {name: torch.cat(parts) for name, parts in record.items() if name != "mel"}
    if "mel" in record:
        stages["mel"] = torch.cat([normalize(mel, mel.amax()).T for mel in record["mel"]], 1)
    return finished(stages | (follower.stages() if follower is not None else {}))


def finished(stages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stages in order and in plain types; what went into the Talker is one of them only where it said something."""
    silent = () if "codes" in stages else ("talker_inputs", "talker_experts")
    return {name: _plain(stages[name]) for name in COMPARED if name in stages and name not in silent}


def _plain(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x.long()).contiguous()


# -------------------------------------------------------------------------------------- along a reference


@dataclass
class Choices:
    """How far the model's own choices in one stage were from the reference's, which it took instead."""

    made: int = 0
    parted: int = 0  # that were not the reference's
    gap: float = 0.0  # largest lead of the own choice over the reference's, over the largest score of its row

    def add(self, parted: Tensor, gap: Tensor) -> None:
        """Count choices [N]: whether each parted and by how much."""
        self.made += len(parted)
        self.parted += int(parted.sum())
        largest = float(torch.where(parted, gap, 0).max())
        self.gap = float(torch.tensor([self.gap, largest]).max())  # NaN stays, and lies within no tolerance


@dataclass
class Follower:
    """Has a model take a reference's choices (ids, codes, experts) in place of its own, judged by their scores.

    Where two candidates score alike within rounding, two right implementations choose differently, and from there on
    everything they compute differs. So all scores are compared along the same choices, and a choice by how much better
    it scored: if every one is the reference's, the model would have gone the same way by itself.
    """

    reference: dict[str, Tensor]
    speech_end: int | None  # codec_eos, where the model speaks
    choices: dict[str, Choices] = field(default_factory=lambda: defaultdict(Choices))
    routes: dict[tuple[str, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # per stage, layer
    residual: list[Tensor] = field(default_factory=list)  # scores [1, C], frame by frame and codebook by codebook

    @contextmanager
    def leading(self, model: Omni) -> Iterator[None]:
        """While this is open, `model` takes the reference's choices."""
        bodies: dict[str, nn.Module] = {"thinker_experts": model.thinker}
        if model.speech is not None:
            bodies["talker_experts"] = model.speech.talker
        with ExitStack() as stack:
            stack.enter_context(patch.object(antiphon.generate, "choose", self._choose))
            for stage, body in bodies.items():
                sparse = [module for module in body.modules() if isinstance(module, SparseMLP)]
                for layer, mlp in enumerate(sparse):
                    stack.callback(mlp.register_module, "gate", mlp.gate)
                    mlp.register_module("gate", _LedRouter(mlp.gate, partial(self._route, stage, layer)))
            yield

    def stages(self) -> dict[str, Tensor]:
        """What was recorded on the way."""
        layers: dict[str, list[Tensor]] = defaultdict(list)
        for (stage, _), chosen in self.routes.items():
            layers[stage].append(torch.cat(chosen))
        stages = {stage: torch.stack(chosen) for stage, chosen in layers.items()}
        if self.residual:
            stages["mtp_logits"] = torch.cat(self.residual).unflatten(0, (len(self.reference["codes"]), -1))
        return stages

    def _choose(
        self,
        logits: Tensor,
        sampling: Sampling,
        noise: NoiseKey | None = None,
        seen: Tensor | None = None,
        suppress: Tensor | None = None,
    ) -> Tensor:
        """In place of `sampling.choose`: the reference's id [1]."""
        assert noise is not None
        own, stage = choose(logits, sampling, noise, seen, suppress), _stage(noise)
        theirs = self._wanted(noise).to(own)
        scores = _adjusted(logits, sampling, seen, suppress)
        lead = scores.gather(1, own[:, None]) - scores.gather(1, theirs[:, None])
        self.choices[stage].add(own != theirs, lead[:, 0] / logits.abs().amax(1))
        if stage == "codes" and noise.codebook:
            self.residual.append(logits.detach())
        return theirs

    def _wanted(self, noise: NoiseKey) -> Tensor:
        frame = int(noise.frame)
        if _stage(noise) == "text_ids":
            return self.reference["text_ids"][frame, None]
        codes = self.reference.get("codes")
        if codes is None or frame == len(codes):
            return torch.tensor([self.speech_end])
        return codes[frame, noise.codebook, None]

    def _route(self, stage: str, layer: int, probability: Tensor) -> Tensor:
        """A router's probabilities [N, E], zero but at the reference's experts."""
        taken = self.routes[stage, layer]
        start = sum(map(len, taken))
        theirs = self.reference[stage][layer, start : start + len(probability)].to(probability.device)
        own = probability.topk(theirs.shape[1], -1)
        parted = (own.indices.sort(-1).values != theirs.sort(-1).values).any(-1)
        gap = own.values[:, -1] - probability.gather(1, theirs).amin(-1)
        self.choices[stage].add(parted, gap / own.values[:, 0])
        taken.append(theirs)
        return torch.zeros_like(probability).scatter(1, theirs, probability.gather(1, theirs))


class _LedRouter(nn.Module):
    """Stands in a router's place."""

    def __init__(self, router: nn.Module, route: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.route = router, route

    def forward(self, x: Tensor) -> Tensor:
        """[N, W] -> probabilities [N, E], of which those that `route` leaves are the largest."""
        return self.route(self.router(x))


def _stage(noise: NoiseKey) -> str:
    return "text_ids" if noise.codebook == THINKER_CODEBOOK else "codes"


def _adjusted(logits: Tensor, sampling: Sampling, seen: Tensor | None, suppress: Tensor | None) -> Tensor:
    """Scores [1, V] as a greedy choice compares them: after penalty and suppression."""
    scores, penalty = logits.to(torch.promote_types(logits.dtype, torch.float32)), sampling.repetition_penalty
    if seen is not None:
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    return scores if suppress is None else scores.masked_fill(suppress, -torch.inf)
