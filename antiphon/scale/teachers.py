"""Who writes down what is said: an antiphon checkpoint or run, an OpenAI-compatible endpoint, a transformers pipeline.

    spec ── find_teacher ──> TeacherAt (a value that travels) ── open ──> Teacher.hear(clips) ──> [Heard]

A teacher hears many clips at once. `version` changes with whatever changes what it writes, as far as that can be known.

Shapes: B clips, N samples, T positions, U the Thinker's width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from antiphon.audio import Samples, write_audio
from antiphon.chat import TurnWriter
from antiphon.config_json import read_config
from antiphon.errors import ConfigError, InputError
from antiphon.generate import Omni, load
from antiphon.scale.sources import first_line
from antiphon.serve.vad import RATE
from antiphon.terminal import SMALL
from antiphon.train.data import listened, measured, pad, resample
from antiphon.train.label import LabelOptions
from antiphon.train.prepare import CODES
from antiphon.train.recipe import read_fields
from antiphon.train.run import read_course
from antiphon.train.stages.aut import AuTStage, write
from antiphon.train.stages.common import Setting
from antiphon.train.talks import WHICH_LANGUAGE
from antiphon.train.text import read_transcript
from antiphon.transcripts import LONGEST, PROMPTS, most_tokens, uncoiled
from antiphon.weights import find_checkpoint

BATCH_SECONDS = 60.0  # of clips, padded to the longest, that are heard at once
NAME_TOKENS = 12  # that the name of a language takes at most
CALLS = 8  # requests to an endpoint at a time
TRIES = 4  # of a request that fails
READ = 1 << 20  # bytes of a file at a time


@dataclass(frozen=True)
class Heard:
    """What a teacher says of a clip."""

    text: str = ""
    language: str = ""  # its code, where the teacher names one
    sure: float | None = None  # mean log-probability of the text's tokens, where it is told
    reason: str = ""  # why the teacher failed


class Teacher(Protocol):
    """Writes down clips."""

    def hear(self, clips: Sequence[Samples]) -> list[Heard]:
        """What is said in each of the clips [N] at `RATE`."""
        ...


@dataclass(frozen=True)
class TeacherAt:
    """A teacher that has not been opened."""

    name: str
    kind: str  # checkpoint, run, endpoint or pipeline
    version: str
    longest: float = LONGEST  # seconds that it hears at once
    device: str = "cpu"
    runs: str = "runs"  # folder of all runs

    def open(self) -> Teacher:
        """Load it, or get ready to call it.

        Raises:
            AntiphonError: it is not there, or cannot be loaded.
        """
        return {"checkpoint": Checkpoint, "run": Run, "endpoint": Endpoint, "pipeline": Pipeline}[self.kind](self)


def find_teacher(spec: str, device: str = "cpu", runs: str = "runs") -> TeacherAt:
    """The teacher of a spec: `tiny`, a checkpoint's folder or a Hub id; `label.yaml`, the recipe of a label stage;
    `http://host/v1#model`; `transformers:name`.

    Raises:
        AntiphonError: there is no such checkpoint or recipe, or an endpoint without a model.
    """
    if spec.startswith(("http://", "https://")):
        if not spec.partition("#")[2]:
            raise InputError(f"{spec} names no model; give http://host:port/v1#model")
        return TeacherAt(spec, "endpoint", "", device=device)
    if spec.startswith("transformers:"):
        folder = Path(spec.partition(":")[2])
        return TeacherAt(spec, "pipeline", weights_of(folder) if folder.is_dir() else "", device=device)
    at = TeacherAt(spec, "run" if spec.endswith((".yaml", ".yml")) else "checkpoint", "", device=device, runs=runs)
    if at.kind == "run":
        setting = _setting(at)
        longest = setting.config.raw.get("longest_clip", LONGEST)
        files = [setting.run_of(name) for name in dict.fromkeys("+".join(setting.recipe.init.values()).split("+"))]
        return replace(
            at, version=hashlib.sha256("".join(map(weights_of, files)).encode()).hexdigest()[:16], longest=longest
        )
    folder = find_checkpoint(spec)
    return replace(at, version=weights_of(folder), longest=read_config(folder).raw.get("longest_clip", LONGEST))


def weights_of(folder: Path) -> str:
    """Digest of the weights and settings in a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json")):
        total.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(READ):
                total.update(part)
    return total.hexdigest()[:16]


def hear_each(teacher: Teacher, clips: Sequence[Samples], wanted: Sequence[bool]) -> list[Heard]:
    """`teacher.hear` of the clips that are wanted; where it fails, the clip at which it does is found and told.

    Batches are by length and of all clips, wanted or not: what is written of a clip must not depend on what was
    written before, and may on its neighbours, in the last bits.
    """
    order, heard = sorted(range(len(clips)), key=lambda i: (len(clips[i]), i)), [Heard()] * len(clips)
    while order:
        count = 1
        while count < len(order) and len(clips[order[count]]) * (count + 1) <= BATCH_SECONDS * RATE:
            count += 1
        part, order = order[:count], order[count:]
        if any(wanted[i] for i in part):
            for i, one in zip(part, _heard(teacher, [clips[i] for i in part]), strict=True):
                heard[i] = one
    return heard


def _heard(teacher: Teacher, clips: Sequence[Samples]) -> list[Heard]:
    try:
        with torch.inference_mode():
            return teacher.hear(clips)
    except ImportError:  # not the clip's fault
        raise
    except Exception as error:  # whatever a model or a service may raise: the other clips are still to be heard
        if len(clips) == 1:
            return [Heard(reason=first_line(error))]
        half = len(clips) // 2
        return _heard(teacher, clips[:half]) + _heard(teacher, clips[half:])


# ------------------------------------------------------------------------------------------------- our own


class Checkpoint:
    """A whole model: AuT hears, the Thinker writes, both in batches."""

    def __init__(self, at: TeacherAt) -> None:
        folder = find_checkpoint(at.name)
        small = sum(path.stat().st_size for path in folder.glob("*.safetensors")) < SMALL
        self.model: Omni = load(folder, at.device, torch.float32 if small and at.device == "cpu" else None)

    def hear(self, clips: Sequence[Samples]) -> list[Heard]:
        """Greedy transcripts, and the language that is named when asked for."""
        rows = self._listen(clips)
        limits = torch.tensor([most_tokens(len(clip) / RATE) for clip in clips])
        ids, sure = self._write(*self._prompts(rows, PROMPTS[""]), limits)
        named, _ = self._write(*self._prompts(rows, WHICH_LANGUAGE), torch.full_like(limits, NAME_TOKENS))
        texts, names = ([self.model.tokenizer.decode(line) for line in lines] for lines in (ids, named))
        return [
            Heard((uncoiled(text) or text).strip(), language_named(name), score)
            for text, name, score in zip(texts, names, sure, strict=True)
        ]

    def _listen(self, clips: Sequence[Samples]) -> list[Tensor]:
        """AuT's rows [n, U] of each clip."""
        model, audio = self.model, self.model.config.audio
        mel, frames = listened([measured(resample(c, RATE, audio.mel.sample_rate), audio.mel) for c in clips])
        rows = model.aut(mel.to(model.device), frames=frames, peak=mel_peaks(mel, frames).to(model.device))
        return [row[: audio.tokens(count)] for row, count in zip(rows, frames.tolist(), strict=True)]

    def _prompts(self, heard: Sequence[Tensor], text: str) -> tuple[Tensor, Tensor]:
        """The Thinker's input [B, T, U] that asks `text` about each clip, laid out as in a session; positions [B]."""
        inputs = []
        for rows in heard:
            writer = TurnWriter(self.model.tokenizer)
            ids = writer.open("user") + writer.audio(len(rows))
            writer.text(text)
            ids += writer.close() + writer.open_reply()
            inputs.append(self.model.embed_prompt(torch.tensor(ids, device=self.model.device), rows))
        return pad(inputs)

    def _write(self, x: Tensor, lengths: Tensor, limits: Tensor) -> tuple[list[list[int]], list[float]]:
        """The likeliest tokens after x [B, T, U], and the mean of their log-probabilities."""
        thinker, end = self.model.thinker, self.model.config.im_end_token_id
        most = int(limits.max())
        state = thinker.init_state(len(x), x.shape[1] + most, x.device, x.dtype)
        hidden = thinker(x, state)[0][torch.arange(len(x)), lengths - 1]
        for row, length in enumerate(lengths.tolist()):
            state.truncate(length, row)
        lines, scores, done = [], torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool)
        count = torch.zeros(len(x), dtype=torch.long)
        while not bool(done.all()):
            best, token = thinker.logits(hidden).float().log_softmax(-1).max(-1)
            scores, count = scores + best.cpu() * ~done, count + ~done
            done = done | (token.cpu() == end) | (count >= limits)
            lines.append(token.cpu().masked_fill(count <= len(lines), end))
            hidden = thinker(thinker.embed(token[:, None]), state)[0][:, 0]
        table = torch.stack(lines, 1).tolist()
        return [line[: line.index(end)] if end in line else line for line in table], (scores / count).tolist()


def language_named(text: str) -> str:
    """Code of the language that an answer names; nothing where it names none that is known."""
    return next((code for word in re.findall(r"\w+", text.lower()) if (code := CODES.get(word))), "")


def mel_peaks(mel: Tensor, frames: Tensor) -> Tensor:
    """Loudest value [B] of each clip of padded raw log-mel [B, T, F]."""
    inside = torch.arange(mel.shape[1]) < frames[:, None]
    return mel.masked_fill(~inside[..., None], -torch.inf).amax((1, 2))


class Run:
    """An AuT in training, with the text decoder it is trained with: what a label recipe names."""

    def __init__(self, at: TeacherAt) -> None:
        setting = _setting(at)
        self.options = read_fields(LabelOptions, dict(setting.recipe.options), f"{setting.recipe.name}.options")
        self.stage = AuTStage(setting.teaching({"decoder": self.options.decoder}))
        self.stage.modules.eval()

    def hear(self, clips: Sequence[Samples]) -> list[Heard]:
        """Greedy transcripts, as the label stage writes them."""
        config = self.stage.config.mel
        mel, frames = listened([measured(resample(clip, RATE, config.sample_rate), config) for clip in clips])
        states, sound = self.stage.encode(mel, frames, self.options.window)
        ids, sure = write(self.stage.decoder, states, sound, self.stage.tokenizer)
        read = [read_transcript(self.stage.tokenizer.decode(line)) for line in ids]
        return [Heard(text, code or "", score) for (text, code), score in zip(read, sure.tolist(), strict=True)]


def _setting(at: TeacherAt) -> Setting:
    """Where the run of a label recipe is."""
    course = read_course(Path(at.name))
    recipe = next((r for r in course.recipes if r.stage == "label"), None)
    if recipe is None or not {"aut", "decoder"} <= recipe.init.keys():
        raise ConfigError(f"{at.name} is no recipe of a label stage whose init names an aut and its decoder")
    return Setting(recipe, Path("cuts") / course.name, Path(at.runs) / course.name, torch.device(at.device))


# ------------------------------------------------------------------------------------------------- others'


class Endpoint:
    """A service that speaks OpenAI's transcription protocol; its key is in OPENAI_API_KEY."""

    def __init__(self, at: TeacherAt) -> None:
        try:
            from openai import OpenAI
        except ModuleNotFoundError:
            raise InputError("an endpoint needs pip install 'antiphon[scale]' (openai is missing)") from None
        url, _, self.model = at.name.partition("#")
        self.client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=TRIES - 1)

    def hear(self, clips: Sequence[Samples]) -> list[Heard]:
        """What the service writes, several clips at a time; one that it refuses has the reason."""
        with ThreadPoolExecutor(CALLS) as pool:
            return list(pool.map(self._hear, clips))

    def _hear(self, clip: Samples) -> Heard:
        from openai import OpenAIError

        file = io.BytesIO()
        write_audio(file, clip, RATE)
        sound = ("clip.wav", file.getvalue(), "audio/wav")
        try:
            said = self.client.audio.transcriptions.create(file=sound, model=self.model, response_format="verbose_json")
        except OpenAIError as error:
            return Heard(reason=first_line(error))
        known = CODES.get((said.language or "").lower()) or (said.language or "").lower()
        return Heard(said.text.strip(), known, _sure(said.segments or []))


def _sure(segments: Sequence[Any]) -> float | None:
    """Mean log-probability over the segments of an answer that tells it, by their tokens."""
    told = [(s.avg_logprob, len(s.tokens)) for s in segments if s.avg_logprob is not None and s.tokens]
    count = sum(tokens for _, tokens in told)
    return sum(score * tokens for score, tokens in told) / count if count else None


class Pipeline:
    """A speech recognition pipeline of transformers."""

    def __init__(self, at: TeacherAt) -> None:
        try:
            from transformers import pipeline
        except ModuleNotFoundError:
            raise InputError("transformers: needs pip install 'antiphon[verify]'") from None
        self.pipe: Any = pipeline("automatic-speech-recognition", at.name.partition(":")[2], device=at.device)

    def hear(self, clips: Sequence[Samples]) -> list[Heard]:
        """Its transcripts; it says neither the language nor how sure it is."""
        sounds = [{"raw": clip, "sampling_rate": RATE} for clip in clips]
        return [Heard(said["text"].strip()) for said in self.pipe(sounds, batch_size=len(sounds))]
