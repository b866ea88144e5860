"""AuT from scratch: log-mel in, text out, attention windows of several sizes; the decoder is dropped afterwards.

Each batch has one window size, drawn from the recipe's, so that one encoder serves all of them. A CTC head over the
same tokens leads the way while cross-attention has not found its alignment yet.

Shapes: B clips, T mel frames, F mel bins, S audio tokens, W width, Q text tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.aut import AuT, TextDecoder, TextDecoderConfig
from antiphon.error_rates import error_rates
from antiphon.tokenizer import Tokenizer
from antiphon.train.augment import augment
from antiphon.train.data import (
    Example,
    Kept,
    Mel,
    batches,
    listened,
    load_samples,
    measured,
    numbers,
    pad,
    read_examples,
)
from antiphon.train.loop import Figures, Loss, Size, sum_of
from antiphon.train.losses import ctc_per_token
from antiphon.train.recipe import read_fields
from antiphon.train.stages.common import Setting, manifests
from antiphon.train.text import read_transcript, transcript

IGNORED = -100  # label of padding
Clip = tuple[Mel, list[int]]  # and the ids of its transcript
SPARE = 8  # text tokens that are written for a clip at most beyond one for each token of sound, which CTC asks for too


@dataclass(frozen=True)
class AuTOptions:
    """What only this stage knows."""

    decoder: TextDecoderConfig
    windows: tuple[int, ...] = (1, 2, 4, 8)  # seconds
    ctc: float = 0.3  # share of the CTC loss
    smoothing: float = 0.05  # of the labels
    augment: float = 0.0  # share of the clips that are heard as through a room, noise or a telephone
    conv_gain: float = 3.0  # of conv_out: sound must not drown in the positions that are added to it
    validated: int = 400  # clips per manifest


@dataclass(frozen=True)
class AuTBatch:
    """Clips and what is to be written for them."""

    mel: Tensor  # [B, T, F] raw log-mel
    frames: Tensor  # [B]
    fed: Tensor  # [B, Q] ids that the decoder reads
    wanted: Tensor  # [B, Q] ids that it should write after each
    text: Tensor  # [B, Q] ids of the transcript alone, for CTC
    lengths: Tensor  # [B] of them
    window: int


class AuTStage:
    """The encoder, the decoder it is trained with, and the CTC head."""

    def __init__(self, setting: Setting) -> None:
        recipe = setting.recipe
        vocabulary = {"vocab_size": setting.config.text.vocab_size}
        options = dict(recipe.options)
        options["decoder"] = vocabulary | dict(options.get("decoder") or {})
        self.options = read_fields(AuTOptions, options, f"{recipe.name}.options")
        self.setting, self.plan, self.tokenizer = setting, recipe.optimization, setting.tokenizer
        self.config, self.device = setting.config.audio, setting.device
        torch.manual_seed(recipe.seed)
        self.aut = AuT(self.config)
        self.decoder = TextDecoder(self.options.decoder, self.config.d_model)
        self.ctc = nn.Linear(self.config.d_model, setting.config.text.vocab_size + 1)  # and a blank
        begin(self.aut, self.options.conv_gain)
        begin_decoder(self.decoder)
        modules = nn.ModuleDict({"aut": self.aut, "decoder": self.decoder, "ctc": self.ctc})
        self.modules = setting.prepare(modules)
        self.mix = setting.mix() if recipe.data.mix else None
        self.kept = Kept(self.read, self.mix.examples if self.mix else [], recipe.data.readers)

    def players(self) -> dict[str, list[str]]:
        """One player; the projection to the Thinker is trained with the Thinker."""
        parts = [f"aut.{name}" for name, _ in self.aut.named_children() if not name.startswith("proj")]
        return {"aut": [*parts, "decoder", "ctc"]}

    def batch(self, number: int) -> AuTBatch:
        """Clips, transcripts and the window of one batch."""
        assert self.mix is not None
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.setting.recipe.seed, number, 1 << 20]))
        )
        window = self.options.windows[int(random.random() * len(self.options.windows))]
        share = self.options.augment
        clips = [
            self.read(e, random) if share and random.random() < share else self.kept(e) for e in self.mix.draw(number)
        ]
        return self.collate(clips, window)

    def read(self, example: Example, random: np.random.Generator | None = None) -> Clip:
        """A clip, and the ids of its transcript; with a generator, what `augment` makes of the sound."""
        rate = self.config.mel.sample_rate
        samples = load_samples(example.cut, rate)
        mel = measured(samples if random is None else augment(samples, rate, random), self.config.mel)
        ids = self.tokenizer.encode(transcript(example.text, example.language))
        return mel.astype(numbers(self.setting.recipe.data), copy=False), ids

    def collate(self, clips: Sequence[Clip], window: int) -> AuTBatch:
        """Clips as tensors."""
        mel, frames = listened([mel for mel, _ in clips])
        config, ids = self.tokenizer.config, [line for _, line in clips]
        fed, _ = pad([torch.tensor([config.im_start_token_id, *line]) for line in ids])
        wanted, _ = pad([torch.tensor([*line, config.im_end_token_id]) for line in ids], IGNORED)
        text, lengths = pad([torch.tensor(line) for line in ids])
        return AuTBatch(mel, frames, fed, wanted, text, lengths, window)

    def counts(self, batch: AuTBatch) -> dict[str, float]:
        """Tokens to be written, and clips."""
        return {"attention": float((batch.wanted != IGNORED).sum()), "ctc": float(len(batch.lengths))}

    def size(self, batch: AuTBatch) -> Size:
        """Positions of the encoder and of the decoder."""
        heard = [self.config.tokens(count) for count in batch.frames.tolist()]
        written = int((batch.wanted != IGNORED).sum())
        seconds = float(batch.frames.sum()) / self.config.mel.frame_rate
        return Size(seconds, sum(heard) + written, len(heard) * max(heard) + batch.wanted.numel())

    def loss(self, player: str, batch: AuTBatch, step: int) -> Loss:
        """Cross-entropy of the decoder and CTC of the encoder, over the same tokens."""
        with self.plan.autocast(self.device):
            states, heard = self.encode(batch.mel, batch.frames, batch.window)
            logits = self.decoder(
                batch.fed.to(self.device, non_blocking=True), self.decoder.memory(states), heard=heard
            )
            scores = self.ctc(states)
        wanted = batch.wanted.to(self.device, non_blocking=True)
        attention = F.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, label_smoothing=self.options.smoothing
        )
        ctc, lost = self._ctc(scores, heard, batch)
        kept = wanted != IGNORED
        right = (logits.argmax(-1) == wanted)[kept].float().mean()
        parts = {"attention": (1 - self.options.ctc) * attention, "ctc": self.options.ctc * ctc}
        figures = {"loss": sum_of(parts), "accuracy": right, "ctc": ctc, "ctc_lost": lost}
        return Loss.of(parts, figures)

    def encode(self, mel: Tensor, frames: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, W] of padded clips, and which of them are sound [B, S]."""
        states = self.aut.encode(mel.to(self.device, non_blocking=True).float(), window=window, frames=frames)
        tokens = torch.tensor([self.config.tokens(int(n)) for n in frames])
        return states, (torch.arange(states.shape[1]) < tokens[:, None]).to(self.device, non_blocking=True)

    def _ctc(self, scores: Tensor, heard: Tensor, batch: AuTBatch) -> tuple[Tensor, Tensor]:
        """CTC loss per text token, and the share of clips too short for their text."""
        each = ctc_per_token(scores, batch.text, heard.sum(1), batch.lengths, scores.shape[-1] - 1)
        return each.mean(), (each == 0).float().mean()

    def validate(self) -> Figures:
        """Error rate over all languages and the share of languages named, then the rate of each manifest."""
        pairs, named, figures = [], [], {}
        for name, source in zip(
            manifests(self.setting.recipe.data.validation), self.setting.recipe.data.validation, strict=True
        ):
            examples = read_examples(source, self.setting.cuts)[: self.options.validated]
            heard = self.hear(examples, max(self.options.windows))
            rates = error_rates((e.text, text, e.language) for e, text, _ in heard)
            figures[name] = sum(rates.values()) / len(rates)
            figures |= {f"{name}.{language}": rate for language, rate in rates.items()}
            pairs += [(e.text, text, e.language) for e, text, _ in heard]
            named += [language == e.language for e, _, language in heard]
        rates = error_rates(pairs)
        return {"error": sum(rates.values()) / max(1, len(rates)), "language": float(np.mean(named))} | figures

    def hear(self, examples: Sequence[Example], window: int) -> list[tuple[Example, str, str | None]]:
        """What the model writes for each example, and the language it names."""
        heard = []
        for part in batches(examples, self.setting.recipe.data.batch_seconds * 2):
            mel, frames = listened([self.read(e)[0] for e in part])
            states, sound = self.encode(mel, frames, window)
            ids, _ = write(self.decoder, states, sound, self.tokenizer)
            heard += [(e, *read_transcript(self.tokenizer.decode(line))) for e, line in zip(part, ids, strict=True)]
        return heard

    def sample(self, folder: Path, board: Any) -> None:
        """What is heard in a few clips of each manifest, as text."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for source in self.setting.recipe.data.validation:
            examples = read_examples(source, self.setting.cuts)[:: max(1, self.options.validated // 8)][:8]
            heard = self.hear(examples, max(self.options.windows))
            lines += [{"said": e.text, "heard": text, "language": language} for e, text, language in heard]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (folder / "heard.jsonl").write_text(text + "\n", encoding="utf-8")
        board.add_text("heard", text.replace("\n", "\n\n"))


def write(
    decoder: TextDecoder, states: Tensor, heard: Tensor, tokenizer: Tokenizer, longest: int | None = None
) -> tuple[list[list[int]], Tensor]:
    """Greedy transcripts of encoder states [B, S, W], and the mean log-probability [B] of their tokens.

    They end at `longest` tokens; by default where there would be more of them than of sound, so that none is cut short.
    """
    config, longest = tokenizer.config, states.shape[1] + SPARE if longest is None else longest
    memory = decoder.memory(states)
    state = decoder.init_state(states.shape[0], longest + 1, states.device, states.dtype)
    ids = torch.full((states.shape[0], 1), config.im_start_token_id, device=states.device)
    done = torch.zeros(states.shape[0], dtype=torch.bool, device=states.device)
    score, count, lines = torch.zeros(states.shape[0], device=states.device), torch.zeros_like(done).long(), []
    while not bool(done.all()) and len(lines) < longest:
        best, ids = decoder(ids, memory, state, heard=heard)[:, -1].float().log_softmax(-1).max(-1, keepdim=True)
        score, count = score + best[:, 0] * ~done, count + ~done
        done = done | (ids[:, 0] == config.im_end_token_id)
        lines.append(ids[:, 0].masked_fill(done, config.im_end_token_id))
    table = torch.stack(lines, 1).tolist() if lines else [[] for _ in done]
    kept = [[i for i in line if i != config.im_end_token_id] for line in table]
    return kept, score / count.clamp(min=1)


def begin(aut: AuT, conv_gain: float) -> None:
    """Fresh weights: matrices of standard deviation 1/sqrt(fan-in), branches that start small, no biases."""
    depth = len(aut.layers)
    for name, module in aut.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan = module.weight[0].numel()
            gain = conv_gain if name == "conv_out" else 1.0
            if name.endswith(("out_proj", "fc2")):
                gain = (2 * depth) ** -0.5
            nn.init.normal_(module.weight, std=gain * fan**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def begin_decoder(decoder: TextDecoder) -> None:
    """Fresh weights of the text decoder, as `begin`; embeddings small enough that sound is heard beside them."""
    depth = len(decoder.layers)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            gain = (3 * depth) ** -0.5 if name.endswith(("o_proj", "out_proj", "fc2")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
