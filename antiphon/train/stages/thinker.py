"""The Thinker: text, then what it hears, then all together; the recipe's `init`, `freeze` and mix say which.

Whatever the task, an example is a conversation as inference lays it out, and the loss is over what the assistant says.

Shapes: B conversations, T positions, n clips, S rows of a clip, F mel bins, U width, L text tokens.
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

from antiphon.audio import Samples
from antiphon.aut import LOG_FLOOR, AuT
from antiphon.config import OmniConfig
from antiphon.error_rates import normalize_text
from antiphon.errors import ConfigError
from antiphon.thinker import Thinker
from antiphon.tokenizer import Tokenizer
from antiphon.train import ranks
from antiphon.train.copying import begin_copying
from antiphon.train.data import Example, Kept, Mel, batches, listened, measured, numbers, pad, read_examples
from antiphon.train.loop import Figures, Loss, Size, sum_of
from antiphon.train.losses import ctc_and_ways, likeness
from antiphon.train.recipe import Source, read_fields
from antiphon.train.stages.aut import IGNORED, begin
from antiphon.train.stages.common import Setting
from antiphon.train.talks import Talk, lay_out

ANSWER = 64  # tokens of an answer in validation
MISHEARD, SHORT = 0.15, 0.4  # of what is "heard" poorly: tokens that are others, and how far rows stay with the blank
SHARP = 4.0  # of the scores that spell: where a row is sure, it need not be longer than an embedding to say so


@dataclass(frozen=True)
class ThinkerOptions:
    """What only this stage knows."""

    windows: tuple[int, ...] = (1, 2, 4, 8)
    validated: int = 200  # conversations per manifest
    answer: float = 1.0  # weight of what the assistant says; with 0 the Thinker lends its embeddings only
    spell: float = 0.0  # weight of reading the transcript off the encoder's rows, see `spelling_losses`
    blur: float = 0.0  # how poorly is "heard" in training what is, at most; 1 is about as an encoder does
    match: float = 0.0  # weight of these rows being the embeddings that they read like


@dataclass(frozen=True)
class TalkBatch:
    """Conversations as the Thinker reads them."""

    ids: Tensor  # [B, T]
    rows: Tensor  # [B] how many of them there are
    wanted: Tensor  # [B, T] the id that follows, IGNORED where it is not learnt
    audio: Tensor  # [B, T] True where a row of AuT's goes
    mel: Tensor | None  # [n, frames, F] of all clips, in order
    frames: Tensor  # [n]
    text: Tensor  # [n, L] ids of what is said in the clips, or of what describes them
    lengths: Tensor  # [n] of these, 0 where there is none
    window: int


class ThinkerStage:
    """The language model and, where there is sound, the encoder it listens through."""

    def __init__(self, setting: Setting) -> None:
        recipe, config = setting.recipe, setting.config
        self.options = read_fields(ThinkerOptions, dict(recipe.options), f"{recipe.name}.options")
        if not self.options.answer and not self.options.spell:
            raise ConfigError(f"{recipe.name}.options: answer and spell are both 0; there is nothing to learn")
        self.setting, self.plan, self.device = setting, recipe.optimization, setting.device
        self.config, self.tokenizer = config, setting.tokenizer
        torch.manual_seed(recipe.seed)
        self.thinker = Thinker(config.text, config.talker.accept_hidden_layer if config.talker else None)
        self.aut = AuT(config.audio)
        begin(self.aut, 3.0)
        begin_thinker(self.thinker, config.audio_token_id)
        self.modules = setting.prepare(nn.ModuleDict({"thinker": self.thinker, "aut": self.aut}))
        if not self.aut.proj2.bias.any():  # never attached: its rows begin with what all embeddings have in common
            self.aut.proj2.bias.data.copy_(self.thinker.model.embed_tokens.weight.mean(0))
        self.mix = setting.mix()
        self.kept = Kept(self.read, self.mix.examples, recipe.data.readers)

    def players(self) -> dict[str, list[str]]:
        """One player."""
        return {"thinker": ["thinker", "aut"]}

    def batch(self, number: int) -> TalkBatch:
        """Conversations of one batch."""
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.setting.recipe.seed, number, 1 << 20]))
        )
        window = self.options.windows[int(random.random() * len(self.options.windows))]
        return self.collate([self.kept(e) for e in self.mix.draw(number)], window)

    def read(self, example: Example) -> Talk:
        """A conversation as ids and clips."""
        return read_talk(example, self.tokenizer, self.config, numbers(self.setting.recipe.data))

    def collate(self, talks: Sequence[Talk], window: int) -> TalkBatch:
        """Conversations as tensors."""
        return collate_talks(talks, window)

    def embed(self, batch: TalkBatch) -> Tensor:
        """The Thinker's input [B, T, U]."""
        return embed_talks(self.thinker, self.aut, batch, hear_talks(self.aut, batch, self.device), self.device)

    def counts(self, batch: TalkBatch) -> dict[str, float]:
        """Tokens of answers, clips whose text is known, and the encoder's rows of these."""
        spoken = batch.lengths > 0
        rows = rows_of(self.aut, batch)[spoken].sum() if spoken.any() else 0
        return {
            "answering": float((batch.wanted != IGNORED).sum()),
            "spelling": float(spoken.sum()),
            "apart": float(rows),
        }

    def size(self, batch: TalkBatch) -> Size:
        """Positions of the Thinker."""
        return Size(
            float(batch.frames.sum()) / self.config.audio.mel.frame_rate, int(batch.rows.sum()), batch.ids.numel()
        )

    def loss(self, player: str, batch: TalkBatch, step: int) -> Loss:
        """Cross-entropy over what the assistant says, and what `spelling_losses` add to it."""
        figures: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        with self.plan.autocast(self.device):
            heard = hear_talks(self.aut, batch, self.device)
        if self.options.answer:
            answering, figures["accuracy"] = self.answering(batch, heard, step)
            parts["answering"], figures["answering"] = self.options.answer * answering, answering
        if self.options.spell and heard is not None:
            spelling, apart = spelling_losses(self.thinker, self.aut, heard, batch, self.config.audio_token_id)
            parts |= {"spelling": self.options.spell * spelling, "apart": self.options.match * apart}
            figures |= {"spelling": spelling, "apart": apart}
        return Loss.of(parts, {"loss": sum_of(parts), **figures})

    def answering(self, batch: TalkBatch, heard: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy over what the assistant says, and the share of its tokens that are the likeliest."""
        learnt = (batch.wanted != IGNORED).to(self.device, non_blocking=True)
        wanted = batch.wanted.to(self.device, non_blocking=True)[learnt]
        with self.plan.autocast(self.device):
            x = embed_talks(self.thinker, self.aut, batch, heard, self.device)
            if self.options.blur and self.thinker.training:
                x = self.blurred(x, batch, step)
            hidden, _ = self.thinker(x)
            logits = self.thinker.logits(hidden[learnt])
        return F.cross_entropy(logits.float(), wanted), (logits.argmax(-1) == wanted).float().mean()

    def blurred(self, x: Tensor, batch: TalkBatch, step: int) -> Tensor:
        """The input [B, T, U] with what is "heard" as an encoder gives it, in each conversation as well as a draw says.

        A Thinker that only knows embeddings to the last digit reads no others, and one that has never been told wrong
        believes every token. The rows of tokens of an encoder that was trained to match lay 0.65 of the way from the
        blank to the token, with noise of 0.74 of the embeddings' spread; blanks were exact; one token in ten was wrong.
        """
        blank, start = self.config.audio_token_id, self.config.audio_start_token_id
        opened, closed = (batch.ids == start).cumsum(1), (batch.ids == self.tokenizer.audio_end_token_id).cumsum(1)
        tokens = (opened > closed) & (batch.ids != start) & (batch.ids != blank) & ~batch.audio
        table, generator = self.thinker.model.embed_tokens.weight.detach(), torch.Generator().manual_seed(step)
        poor = self.options.blur * torch.rand(len(batch.ids), 1, generator=generator).expand_as(batch.ids)[tokens]
        ids = batch.ids[tokens]
        wrong = torch.rand(len(ids), generator=generator) < MISHEARD * poor
        ids = torch.where(wrong, ids[torch.randperm(len(ids), generator=generator)], ids)
        noise = torch.randn(len(ids), table.shape[1], generator=generator).to(table)
        deviation, poor = (table - table.mean(0)).square().mean().sqrt(), poor[:, None].to(table)
        heard = table[ids.to(table.device)].lerp(table[blank], SHORT * poor) + poor.sqrt() * deviation * noise
        return x.masked_scatter(tokens[..., None].to(x.device, non_blocking=True), heard.to(x.dtype))

    def validate(self) -> Figures:
        """Share of wrong answers over all manifests, then by manifest; answers are compared as normalized text."""
        figures = {}
        for source in self.setting.recipe.data.validation:
            asked = self.answered(source)
            wrong = [normalize_text(wanted) != normalize_text(said) for wanted, said in asked]
            figures[f"{Path(source.cuts).name.split('.')[0]}.{source.task}"] = float(np.mean(wrong))
        return {"wrong": float(np.mean(list(figures.values()))) if figures else 0.0, **figures}

    def answered(self, source: Source) -> list[tuple[str, str]]:
        """The last answer of each conversation of a manifest, as it should be and as it is."""
        examples = read_examples(source, self.setting.cuts)
        some = examples[:: max(1, len(examples) // self.options.validated)]
        pairs = []
        for part in batches(some, self.setting.recipe.data.batch_seconds):
            pairs += [(answer_of(self, talk), self.answer(talk)) for talk in map(self.read, part)]
        return pairs

    def answer(self, talk: Talk) -> str:
        """What the model says last in a conversation, greedily."""
        start = last_answer(talk)
        x = self.embed(self.collate([talk.before(start)], max(self.options.windows)))
        state = self.thinker.init_state(1, start + ANSWER, self.device, x.dtype)
        said: list[int] = []
        while len(said) < ANSWER:
            hidden, _ = self.thinker(x, state)
            token = int(self.thinker.logits(hidden[:, -1]).argmax())
            if token == self.config.im_end_token_id:
                break
            said.append(token)
            x = self.thinker.embed(torch.tensor([[token]], device=self.device))
        return self.tokenizer.decode(said)

    def sample(self, folder: Path, board: Any) -> None:
        """A few answers, beside those that were wanted."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for source in self.setting.recipe.data.validation:
            examples = read_examples(source, self.setting.cuts)
            for talk in map(self.read, examples[:: max(1, len(examples) // 8)][:8]):
                lines.append({"task": source.task, "wanted": answer_of(self, talk), "said": self.answer(talk)})
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (folder / "said.jsonl").write_text(text + "\n", encoding="utf-8")
        board.add_text("said", text.replace("\n", "\n\n"))


def read_talk(example: Example, tokenizer: Tokenizer, config: OmniConfig, dtype: type = np.float32) -> Talk:
    """A conversation as ids and clips."""
    mel = config.audio.mel

    def hear(clip: Samples) -> Mel:
        return measured(clip, mel).astype(dtype, copy=False)

    return lay_out(example, tokenizer, hear, config.audio.tokens, mel.sample_rate)


def collate_talks(talks: Sequence[Talk], window: int) -> TalkBatch:
    """Conversations as tensors."""
    ids, rows = pad([torch.tensor(t.ids) for t in talks])
    said, _ = pad([torch.tensor(t.said) for t in talks])
    wanted = torch.where(said, ids, IGNORED).roll(-1, 1)
    wanted[:, -1] = IGNORED
    audio, _ = pad([torch.tensor(t.sound) for t in talks])
    clips = [clip for t in talks for clip in t.clips]
    if not clips:
        nothing = torch.zeros(0)
        return TalkBatch(ids, rows, wanted, audio, None, nothing, nothing, nothing, window)
    mel, frames = listened(clips)
    text, lengths = pad([torch.tensor(line, dtype=torch.long) for t in talks for line in t.texts])
    return TalkBatch(ids, rows, wanted, audio, mel, frames, text, lengths, window)


def hear_talks(aut: AuT, batch: TalkBatch, device: torch.device) -> Tensor | None:
    """AuT's rows [n, S, U] of all clips, padded; None where there are none.

    Of several processes, one without clips hears silence and keeps none of its rows: where the others gather AuT's
    weights and add up their gradients, it does too.
    """
    if batch.mel is not None:
        mel = batch.mel.to(device, non_blocking=True).float()
        return aut(mel, window=batch.window, frames=batch.frames)
    if not ranks.many():
        return None
    silence = torch.full((1, aut.config.chunk_frames, aut.config.num_mel_bins), LOG_FLOOR, device=device)
    return aut(silence, window=batch.window)[:0]


def rows_of(aut: AuT, batch: TalkBatch) -> Tensor:
    """How many rows [n] each clip gives."""
    return torch.tensor([aut.config.tokens(int(n)) for n in batch.frames])


def embed_talks(thinker: Thinker, aut: AuT, batch: TalkBatch, heard: Tensor | None, device: torch.device) -> Tensor:
    """The Thinker's input [B, T, U]: token embeddings, and what was `heard` where there is sound."""
    x = thinker.embed(batch.ids.to(device, non_blocking=True))
    if heard is None:
        return x
    rows = heard[(torch.arange(heard.shape[1]) < rows_of(aut, batch)[:, None]).to(device, non_blocking=True)]
    return x.masked_scatter(batch.audio.to(device, non_blocking=True)[..., None], rows.to(x.dtype))


def spelling_losses(thinker: Thinker, aut: AuT, heard: Tensor, batch: TalkBatch, blank: int) -> tuple[Tensor, Tensor]:
    """Two ways of asking that the encoder's rows read like the text of the clips, or like what describes them.

    CTC per text token, a row's scores being its likeness to the Thinker's embeddings, with the audio token's own
    embedding as the blank. It does not say how long a row is nor what it has beside: rows that spell well were five
    times as long as embeddings and mostly something else, so the Thinker made nothing of them. Hence also how far rows
    are from the embeddings they stand for on the ways that spell the text, over how far embeddings are from their mean.
    With both, what the Thinker learnt to copy and to answer from text (the task "heard") is used on sound.
    """
    spoken = batch.lengths > 0
    if not spoken.any():
        return heard.sum() * 0, heard.sum() * 0
    table, rows = thinker.model.embed_tokens.weight, rows_of(aut, batch)[spoken]
    own = heard[spoken.to(heard.device)].float()
    text, lengths = batch.text[spoken], batch.lengths[spoken]
    spelling, ways = ctc_and_ways(SHARP * likeness(own, table), text, rows, lengths, blank)
    with torch.no_grad():
        wanted, spread = ways @ table, (table - table.mean(0)).square().sum(1).mean()
    real = torch.arange(own.shape[1], device=own.device) < rows.to(own.device)[:, None]
    apart = (own - wanted).square().sum(-1)[real].mean() / spread
    return spelling.mean(), apart


def last_answer(talk: Talk) -> int:
    """Where the last answer begins."""
    stop = len(talk.said) - 1 - talk.said[::-1].index(True)
    return stop + 1 - next((i for i, said in enumerate(talk.said[stop::-1]) if not said), stop + 1)


def answer_of(stage: ThinkerStage, talk: Talk) -> str:
    """The last answer as it should be."""
    start = last_answer(talk)
    return stage.tokenizer.decode(i for i, said in zip(talk.ids[start:], talk.said[start:], strict=True) if said)


def begin_thinker(thinker: Thinker, blank: int) -> None:
    """Fresh weights: standard deviation 1/sqrt(fan-in), branches that start small, and heads that can copy."""
    depth = len(thinker.model.layers)
    for name, module in thinker.named_modules():
        if isinstance(module, nn.Linear):
            gain = (2 * depth) ** -0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if not thinker.config.tie_word_embeddings else 0.06)
    begin_copying(thinker, blank)
