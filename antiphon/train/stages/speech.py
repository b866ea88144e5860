"""Talker, MTP and the speaker encoder, together: one loss over codebook 0 and the residual codebooks.

Two kinds of examples: a sentence that is spoken on its own (task "say"), and the answers of a conversation (task
"talk"), with the user's turns before them as in inference. The voice is a vector that the speaker encoder makes of
another recording of the same speaker; at export the preset voices' vectors become rows of the embedding.

With `follow` a head that is not kept reads off the states halfway up the Talker which token of the text has been said
last, see `train.following`.

Alignment: position 9 + t - 1 of the answer predicts code 0 of frame t and is what MTP starts from; frame t's codes are
fed at position 9 + t. Nothing is shifted anywhere else.

Shapes: B answers, P positions, T frames, Q codebooks, U the Thinker's width, W the Talker's, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.audio import LogMel, Samples, write_audio
from antiphon.codec import Codec
from antiphon.errors import ConfigError, InputError
from antiphon.generate import Omni, collect
from antiphon.model import Speech
from antiphon.speaker import SpeakerConfig, SpeakerEncoder
from antiphon.talker import CLONED, Rows, talker_prompt
from antiphon.train.codes import Spoken, encode, key_of, sound_of
from antiphon.train.copying import begin_following
from antiphon.train.data import Example, Kept, numbers, pad, read_examples, read_together
from antiphon.train.following import places
from antiphon.train.loop import Figures, Loss, Size, sum_of
from antiphon.train.losses import likeness
from antiphon.train.recipe import Data, read_fields
from antiphon.train.stages.aut import IGNORED
from antiphon.train.stages.codec import picture, read_codec_config
from antiphon.train.stages.common import Setting
from antiphon.train.stages.thinker import TalkBatch, collate_talks, embed_talks, hear_talks, read_talk
from antiphon.train.talks import Talk
from antiphon.weights import allocate, outline

PREFER = "prefer"  # task of a pair, see `train.stages.preference`
ALONE = ("say", PREFER)  # tasks without a conversation: they take nothing of the Thinker but its embeddings
SAMPLES = 4  # of each validation manifest are said as training goes on


@dataclass(frozen=True)
class SpeechOptions:
    """What only this stage knows."""

    speaker: dict[str, Any]  # sizes of the speaker encoder
    mtp_share: float = 0.25  # of the frames that MTP is trained on in a step
    mtp_weight: float = 1.0  # of the mean over the residual codebooks
    follow: float = 0.0  # weight of reading off the Talker's states which token was said last
    followed: int = 20000  # answers at most for which that is looked up
    deaf: float = 0.0  # share of the frames that are not fed back in training: the text has to tell what comes next
    drawn: float = 0.0  # share of the frames fed back as the Talker and MTP draw them themselves, see `drawn`
    reference: float = 3.0  # seconds of another recording that the voice is taken from
    validated: int = 64  # answers per manifest


@dataclass(frozen=True)
class Answer:
    """One answer to be spoken: its text, its codes, its voice and what came before it."""

    text: list[int]  # ids
    codes: Tensor  # [T, Q]
    reference: Tensor  # [N] samples of the voice
    talk: Talk | None  # the conversation up to it
    places: Tensor | None  # [T] how many tokens have been said, where that is to be followed


@dataclass(frozen=True)
class SpeechBatch:
    """Answers as tensors, the positions of all of them one after another: P in all, N of them frames."""

    rows: Rows  # [P] but for the codes
    lengths: Tensor  # [B] positions
    counts: Tensor  # [B] frames, each answer's last positions
    codes: Tensor  # [N, Q]
    references: Tensor  # [B, samples]
    talks: TalkBatch | None  # of the answers that have a conversation, in order
    user: Tensor | None  # [n, T] which of its positions are a user's,
    heard: Tensor  # and which of P those are
    words: Tensor  # [n] ids of what can have been said, sorted
    said: Tensor  # [N] which of them has been said last at a frame, IGNORED where it is not to be followed
    seed: int


class SpeechStage:
    """What speaks, with what it listens through frozen beside it."""

    kind: type[SpeechOptions] = SpeechOptions

    def __init__(self, setting: Setting) -> None:
        recipe, config = setting.recipe, setting.config
        if config.talker is None or config.code2wav is None:
            raise ConfigError(f"{recipe.name}: the configuration has no Talker; give talker_config and code2wav_config")
        self.options = read_fields(self.kind, dict(recipe.options), f"{recipe.name}.options")
        self.setting, self.plan, self.device = setting, recipe.optimization, setting.device
        self.config, self.talker_config, self.tokenizer = config, config.talker, setting.tokenizer
        torch.manual_seed(recipe.seed)
        boxes = outline(Omni, config, self.tokenizer)
        if not listens(recipe.data):  # 30 B weights need not be read to say sentences
            boxes.thinker.model.layers = nn.ModuleList()
            setting = setting.beginning({"thinker": "thinker.model.embed_tokens"})
        self.boxes = allocate(boxes, self.device, recipe.optimization.still_dtype)
        self.boxes.speech = speech = Speech(config.talker, config.code2wav)
        speaker = read_fields(
            SpeakerConfig, {"width": config.talker.text.hidden_size, **self.options.speaker}, "speaker"
        )
        self.speaker = SpeakerEncoder(speaker)
        begin_speech(speech)
        self.codec = Codec(read_codec_config(setting)).eval()
        begun = {"thinker": self.boxes.thinker, "aut": self.boxes.aut, "codec": self.codec}
        self.sounds = "code2wav" in recipe.init  # without it there are codes to judge by, and nothing to hear
        if self.sounds:
            begun["code2wav"] = speech.code2wav
        trained = {"talker": speech.talker, "mtp": speech.mtp, "speaker": self.speaker}
        if self.options.follow:
            width = config.talker.text.hidden_size
            self.reads = nn.Linear(width, width, bias=False)
            trained["following"] = self.reads
        if missing := sorted(set(begun) - set(recipe.init)):
            raise ConfigError(
                f"{recipe.name}: init names no {', '.join(missing)}; speech needs the runs they come from"
            )
        self.modules = setting.prepare(nn.ModuleDict(begun | trained))
        for name, box in begun.items():  # not trained here: their own runs keep them
            self.modules.pop(name)
            box.eval().requires_grad_(False)
        if self.options.follow and not {name.split(".")[0] for name in recipe.init} & {"talker", "mtp"}:
            table = self.boxes.thinker.model.embed_tokens.weight.float()
            if found := begin_following(speech.talker, speech.mtp, table):
                seen, said = found
                self.reads.weight.data.copy_(seen.T @ said)
        self.voice_mel = LogMel(speaker.mel).to(self.device)
        self.newline = self.tokenizer.encode("\n")[0]
        self.mix = setting.mix()
        self.talks = Kept(self.talk, self.mix.examples, recipe.data.readers)
        self._gather()

    def _gather(self) -> None:
        """Codes of everything that is spoken, and who speaks what."""
        examples = [e for row in self.mix.cells for cell in row for e in cell]
        for source in self.setting.recipe.data.validation:
            examples += read_examples(source, self.setting.cuts)[: self.options.validated]
        spoken = [one for e in examples for one in spoken_in(e)]
        runs, aut, thinker, readers = (
            self.setting.runs,
            self.boxes.aut,
            self.boxes.thinker,
            self.setting.recipe.data.readers,
        )
        rate, kept = self.codec.config.sampling_rate, spoken if readers else []
        sounds = read_together(lambda one: sound_of(one, rate), kept, readers)
        self.recorded = {key_of(one): sound for one, sound in zip(kept, sounds, strict=True)}
        self.codes = encode(self.codec, spoken, runs, sound=self.sound)
        some = spoken[:: -(-len(spoken) // self.options.followed)] if self.options.follow else []
        self.places = places(aut, thinker, self.tokenizer, self.codes, self.codec.config, some, runs, sound=self.sound)
        self.by_voice: dict[str, list[Spoken]] = {}
        for one in spoken:
            self.by_voice.setdefault(voice_of(one), []).append(one)
        self.place = {key_of(one): i for voice in self.by_voice.values() for i, one in enumerate(voice)}

    def sound(self, spoken: Spoken, rate: int) -> Samples:
        """As `sound_of`, remembered where the recipe has readers."""
        sound = self.recorded.get(key_of(spoken)) if rate == self.codec.config.sampling_rate else None
        return sound_of(spoken, rate) if sound is None else sound

    def talk(self, example: Example) -> Talk | None:
        """The conversation of an example, none for a sentence alone."""
        if example.task in ALONE:
            return None
        return read_talk(example, self.tokenizer, self.config, numbers(self.setting.recipe.data))

    def players(self) -> dict[str, list[str]]:
        """One player."""
        return {"speech": list(self.modules)}

    def batch(self, number: int) -> SpeechBatch:
        """Answers of one batch."""
        return self.collate(self.mix.draw(number), number)

    def collate(self, examples: Sequence[Example], step: int) -> SpeechBatch:
        """Examples as tensors; which answer of a conversation and which reference is a function of `step`."""
        return self.lay_out(self.answers(examples, step), step)

    def answers(self, examples: Sequence[Example], step: int) -> list[Answer]:
        """One answer of each example."""
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.setting.recipe.seed, step, 1 << 21]))
        )
        return [self.answer(e, random) for e in examples]

    def answer(self, example: Example, random: np.random.Generator) -> Answer:
        """One answer of an example and a reference of its voice."""
        spoken = spoken_in(example)
        chosen = spoken[int(random.random() * len(spoken))]
        return self.spoken_as(chosen, self.reference(chosen, random))

    def reference(self, chosen: Spoken, random: np.random.Generator) -> Tensor:
        """Samples [N] of another recording of the one who speaks."""
        voice, own = self.by_voice[voice_of(chosen)], self.place[key_of(chosen)]
        other = voice[(own + 1 + int(random.random() * max(1, len(voice) - 1))) % len(voice)]
        return self.excerpt(other, random)

    def excerpt(self, spoken: Spoken, random: np.random.Generator) -> Tensor:
        """As many samples [N] as a reference has, of one recording."""
        sound = self.sound(spoken, self.speaker.config.sample_rate)
        length = round(self.options.reference * self.speaker.config.sample_rate)
        start = int(random.random() * max(1, len(sound) - length))
        return torch.from_numpy(np.resize(sound[start : start + length], length))  # a short one says it again

    def spoken_as(self, chosen: Spoken, reference: Tensor) -> Answer:
        """What is spoken, in the voice of a reference."""
        example = chosen[0]
        codes, said = self.codes[key_of(chosen)], self.places.get(key_of(chosen))
        talk = self.talks(example)
        if talk is None:
            text = example.cut.supervisions[chosen[1]].text
            return Answer(self.tokenizer.encode(text), codes, reference, None, said)
        reply = next(r for r in talk.replies if r.supervision == chosen[1])
        return Answer(talk.ids[reply.start : reply.stop], codes, reference, talk.before(reply.start), said)

    def lay_out(self, answers: Sequence[Answer], seed: int) -> SpeechBatch:
        """Answers as tensors."""
        rows, lengths, heard = Rows([], []), [], []
        for a in answers:
            user = [i for i, mine in zip(a.talk.ids, a.talk.user, strict=True) if mine] if a.talk else []
            heard.append(torch.arange(len(user)) + len(rows.text))
            prompt = talker_prompt(self.config, user, self.newline, CLONED, a.text, len(a.codes))
            lengths.append(len(prompt.text))
            rows.text.extend(prompt.text)
            rows.codec.extend(prompt.codec)
        talks = [a.talk for a in answers if a.talk is not None]
        begun = self.config.tts_bos_token_id  # before the first has been said
        words = torch.tensor(sorted({begun, *chain.from_iterable(a.text for a in answers if a.places is not None)}))
        said = [
            torch.full((len(a.codes),), IGNORED)
            if a.places is None
            else torch.searchsorted(words, torch.tensor([begun, *a.text])[a.places])
            for a in answers
        ]
        return SpeechBatch(
            rows,
            torch.tensor(lengths),
            torch.tensor([len(a.codes) for a in answers]),
            torch.cat([a.codes for a in answers]),
            torch.stack([a.reference for a in answers]),
            collate_talks(talks, self.config.audio.window_chunks) if talks else None,
            pad([torch.tensor(t.user) for t in talks])[0] if talks else None,
            torch.cat(heard),
            words,
            torch.cat(said),
            seed,
        )

    def voices(self, batch: SpeechBatch) -> Tensor:
        """What the speaker encoder makes of the references [B, W]."""
        return self.speaker(self.voice_mel(batch.references.to(self.device, non_blocking=True), final=True))

    def prompts(self, batch: SpeechBatch) -> Tensor:
        """The Talker's input [P, W] but for the codes: the prompts, and a position per frame."""
        voices, accept = self.voices(batch), None
        if batch.talks is not None and batch.user is not None:
            with torch.no_grad():
                rows = hear_talks(self.boxes.aut, batch.talks, self.device)
                x = embed_talks(self.boxes.thinker, self.boxes.aut, batch.talks, rows, self.device)
                states = self.boxes.thinker(x)[1][batch.user.to(self.device, non_blocking=True)]
                accept = states.new_zeros(len(batch.rows.text), states.shape[1])
                accept = accept.index_copy(0, batch.heard.to(self.device, non_blocking=True), states)
        return self.boxes.embed_rows(batch.rows, accept, voices)[0]

    def hidden(self, batch: SpeechBatch, prompts: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The Talker's states when embedded frames [N, W] are fed back.

        At the top those [N + B, W] before every frame and every end, halfway up those [N, W] at the frames.
        """
        rows, longest = len(batch.lengths), int(batch.lengths.max())
        row, column = (torch.arange(longest) < batch.lengths[:, None]).nonzero().unbind(1)
        fed = column >= (batch.lengths - batch.counts)[row]  # frames are fed here,
        scored = column >= (batch.lengths - batch.counts)[row] - 1  # and these say what comes next
        place = (row * longest + column).to(self.device, non_blocking=True)
        x = prompts.index_add(0, fed.nonzero()[:, 0].to(self.device, non_blocking=True), frames.to(prompts.dtype))
        padded = x.new_zeros(rows * longest, x.shape[1]).index_copy(0, place, x).unflatten(0, (rows, longest))
        talker = self.boxes.speaking().talker.model
        top, halfway = talker(padded, tap=len(talker.layers) // 2)
        return top.flatten(0, 1)[place[scored.to(self.device, non_blocking=True)]], halfway.flatten(0, 1)[
            place[fed.to(self.device, non_blocking=True)]
        ]

    def scores(self, batch: SpeechBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Talker's states [N + B, W] before every frame and every end, and halfway up those [N, W] at the frames.

        Between them the codes [N + B, Q] that follow, -1 for ends.
        """
        prompts, codes = self.prompts(batch), batch.codes.to(self.device, non_blocking=True)
        embed, generator = self.boxes.speaking().frame_embedding, self._generator(batch)
        ends = (batch.counts + 1).cumsum(0) - 1
        real = (
            torch.ones(int(ends[-1]) + 1, dtype=torch.bool)
            .index_fill(0, ends, False)
            .to(self.device, non_blocking=True)
        )
        frames = embed(codes)
        if self.speaker.training:
            if self.options.drawn:
                with torch.no_grad():
                    before = self.hidden(batch, prompts, frames)[0][real]
                frames = embed(self.drawn(codes, before, batch.counts, generator))
            if self.options.deaf:
                deaf = torch.rand(len(frames), 1, generator=generator, device=self.device) < self.options.deaf
                frames = frames.masked_fill(deaf, 0)
        states, halfway = self.hidden(batch, prompts, frames)
        wanted = codes.new_full((len(real), codes.shape[1]), -1)
        return states, wanted.index_copy(0, real.nonzero()[:, 0], codes), halfway

    def _generator(self, batch: SpeechBatch) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(batch.seed)

    @torch.no_grad()
    def drawn(self, codes: Tensor, before: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
        """Codes [N, Q] of which a share is what is drawn from states [N, W] before them, after recorded frames.

        What is drawn is often not what was recorded, residual codes nearly always. A Talker that is fed recorded ones
        only learns to hear in them where it is, and loses its text on its own. The share is between none and twice
        `options.drawn`, another for each answer; `counts` [B] are their frames.
        """
        speech = self.boxes.speaking()
        share = 2 * self.options.drawn * torch.rand(len(counts), generator=generator, device=codes.device)
        share = share.repeat_interleave(counts.to(codes.device))
        chosen = (torch.rand(len(codes), generator=generator, device=codes.device) < share).nonzero()[:, 0]
        if not len(chosen):
            return codes
        states, kinds = before[chosen], speech.mtp.config.vocab_size
        first = draw(speech.talker.codec_head(states)[:, :kinds], generator)
        rest = speech.mtp.logits(states, speech.talker.model.codec_embedding(first), codes[chosen, 1:])
        return codes.index_copy(0, chosen, torch.cat([first[:, None], draw(rest, generator)], 1))

    def counts(self, batch: SpeechBatch) -> dict[str, float]:
        """Frames and ends, frames that MTP learns from, and those whose token is to be followed."""
        frames = int(batch.counts.sum())
        return {
            "code0": float(frames + len(batch.counts)),
            "residual": float(self.chosen(frames)),
            "following": float((batch.said != IGNORED).sum()),
        }

    def size(self, batch: SpeechBatch) -> Size:
        """Positions of the Talker; seconds are what it says."""
        places = len(batch.lengths) * int(batch.lengths.max())
        return Size(float(batch.counts.sum()) / self.codec.config.frame_rate, int(batch.lengths.sum()), places)

    def chosen(self, frames: int) -> int:
        """How many of so many frames MTP learns from."""
        return max(1, round(frames * (self.options.mtp_share if self.boxes.speaking().mtp.training else 1.0)))

    def loss(self, player: str, batch: SpeechBatch, step: int) -> Loss:
        """Cross-entropy of codebook 0 and the end over all frames, and of the other codebooks over a share of them."""
        with self.plan.autocast(self.device):
            states, codes, heard = self.scores(batch)
        parts, figures = self.nats(batch, states, codes)
        if self.options.follow:
            figures["following"], figures["followed"] = self.following(batch, heard)
            parts["following"] = self.options.follow * figures["following"]
        return Loss.of(parts, figures)

    def nats(self, batch: SpeechBatch, states: Tensor, codes: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parts of the loss, and figures, of states [N + B, W] and the codes [N + B, Q] that follow them."""
        speech, wanted = self.boxes.speaking(), self.following_code(codes)
        with self.plan.autocast(self.device):
            first = speech.talker.codec_head(states)
        main = F.cross_entropy(first.float(), wanted)
        real = (codes[:, 0] >= 0).nonzero()[:, 0]
        order = torch.randperm(len(real), generator=self._generator(batch), device=self.device)
        chosen = real[order[: self.chosen(len(real))].sort().values]
        with self.plan.autocast(self.device):
            fed = speech.talker.model.codec_embedding(codes[chosen, 0])
            rest = speech.mtp.logits(states[chosen], fed, codes[chosen, 1:])
        residual = F.cross_entropy(rest.float().flatten(0, 1), codes[chosen, 1:].flatten(), ignore_index=IGNORED)
        parts = {"code0": main, "residual": self.options.mtp_weight * residual}
        right = (first.argmax(-1) == wanted).float().mean()
        return parts, {"loss": sum_of(parts), "code0": main, "residual": residual, "accuracy": right}

    def following_code(self, codes: Tensor) -> Tensor:
        """What the Talker should say [N + B] where codes [N + B, Q] follow: that of codebook 0, or the end."""
        return torch.where(codes[:, 0] < 0, self.talker_config.codec_eos_token_id, codes[:, 0])

    def following(self, batch: SpeechBatch, halfway: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the token said last, of all tokens of the batch, over states [N, W]; and the share found."""
        told = (batch.said != IGNORED).to(self.device, non_blocking=True)
        if not told.any():
            return halfway.sum() * 0, halfway.new_zeros(())
        words, wanted = (
            self.boxes.thinker.embed(batch.words.to(self.device, non_blocking=True)),
            batch.said.to(self.device, non_blocking=True)[told],
        )
        with self.plan.autocast(self.device):
            table = self.boxes.speaking().talker.text_projection(words)
            scores = likeness(self.reads(halfway[told]), table - table.mean(0)).float()
        found = (scores.argmax(-1) == wanted).float().mean()
        return F.cross_entropy(scores, wanted), found

    def validate(self) -> Figures:
        """Mean losses over the validation manifests."""
        figures: dict[str, list[float]] = {}
        for source in self.setting.recipe.data.validation:
            examples = read_examples(source, self.setting.cuts)[: self.options.validated]
            for i in range(0, len(examples), 8):
                loss = self.loss("speech", self.collate(examples[i : i + 8], i), 0)
                for name, value in loss.figures.items():
                    figures.setdefault(name, []).append(float(value))
        return {name: float(np.mean(values)) for name, values in figures.items()}

    def sample(self, folder: Path, board: Any) -> None:
        """A few sentences in the voices of their recordings, said here and by the codec alone: sound and pictures."""
        if not self.sounds:
            return
        folder.mkdir(parents=True, exist_ok=True)
        rate, decode = self.codec.config.sampling_rate, self.boxes.speaking().code2wav
        for number, (example, place) in enumerate(self._heard(SAMPLES)):
            recorded = torch.from_numpy(sound_of((example, place), self.speaker.config.sample_rate).copy())[None]
            voice = self.speaker(self.voice_mel(recorded.to(self.device), final=True))[0]
            codes = self.codes[key_of((example, place))]
            text = example.cut.supervisions[place].text
            with self.plan.autocast(self.device):
                reply = collect(self.boxes.speak(text, voice=voice, seed=number, max_frames=2 * len(codes)))
                wanted = decode(codes[None].to(self.device))[0].float().cpu()
            longest = max(len(wanted), len(reply.audio))
            wanted, made = (F.pad(w, (0, longest - len(w))) for w in (wanted, torch.from_numpy(reply.audio)))
            for kind, wave in (("codec", wanted), ("said", made)):
                write_audio(folder / f"{number}-{kind}.wav", wave.numpy(), rate)
            board.add_audio(f"{number}", made[None], sample_rate=rate)
            board.add_image(f"{number}, the codec's above", picture(folder / f"{number}.png", wanted, made, rate))
            board.add_text(f"{number}", text)

    def _heard(self, count: int) -> list[Spoken]:
        """What is spoken in the first examples of each validation manifest."""
        sources = self.setting.recipe.data.validation
        return [spoken_in(e)[0] for s in sources for e in read_examples(s, self.setting.cuts)[:count]]


def listens(data: Data) -> bool:
    """Whether any of it is an answer in a conversation, which the Talker hears with the Thinker's states."""
    return any(source.task not in ALONE for source in (*data.mix, *data.validation))


def spoken_in(example: Example) -> list[Spoken]:
    """What is spoken by the assistant in an example; of a pair the better one first."""
    if example.task == "say":
        return [(example, 0)]
    if example.task == PREFER:
        said = [s.text for s in example.cut.supervisions]
        if len(said) != 3 or said[0] != said[1]:
            raise InputError(
                f"cut {example.cut.id} is no pair; expected three supervisions: the better and the worse rendition of "
                "one text, and a recording of the voice"
            )
        return [(example, 0), (example, 1)]
    messages = (example.cut.custom or {}).get("messages", [])
    return [(example, m["supervision"]) for m in messages if m["role"] == "assistant" and "supervision" in m]


def voice_of(spoken: Spoken) -> str:
    """The speaker of one supervision."""
    return spoken[0].cut.supervisions[spoken[1]].speaker


def draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Codes [..] drawn from scores [.., V]."""
    chances = scores.float().softmax(-1)
    return torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(scores.shape[:-1])


def begin_speech(speech: nn.Module) -> None:
    """Fresh weights: standard deviation 1/sqrt(fan-in), branches that start small, embeddings of about 1."""
    for name, module in speech.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.3 if name.endswith(("o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
