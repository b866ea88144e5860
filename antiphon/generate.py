"""The readable loop: one conversation, eager, one path for whole files and for speech as it arrives.

A Session is a value: the states of all boxes, the ids so far, what is not yet fed. `Omni.generate` is `Omni.stream`
collected, and `stream` is a Session that is told the messages. The engine of many conversations is held to this.

Shapes: T positions, n audio tokens, U the Thinker's width, Q codebooks, N samples.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antiphon.audio import MAX_SECONDS, Resampler, Samples, check_samples, read_audio
from antiphon.errors import AudioError, InputError
from antiphon.metrics import Phases
from antiphon.model import Boxes
from antiphon.sampling import MTP, TALKER, THINKER, THINKER_CODEBOOK, NoiseKey, Sampling, choose
from antiphon.spoken import spoken
from antiphon.talker import opening_rows, trailing_text, user_rows
from antiphon.tokenizer import (
    StreamDecoder,
    ToolCall,
    TurnWriter,
    assistant_text,
    parse_tool_calls,
    system_text,
    tool_results_text,
)
from antiphon.weights import load_checkpoint, read_metadata, read_safetensors, write_safetensors

PREFILL = 512  # positions the Thinker reads at once: bounds the memory of a long prompt
WINDOWS = (1, 2, 4, 8)  # seconds AuT may attend over
TOKENS_PER_SECOND = 4.5  # of speech, where an answer was cut off before its own rate was known


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class AudioDelta:
    """One frame of the answer's sound: float32 [1920] at 24 kHz."""

    samples: Samples
    frame: int


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    text_ids: list[int]
    codes: Tensor  # [frames, Q]
    audio: Samples  # [frames * 1920]
    sample_rate: int
    finish: str  # stop, length (a limit was reached) or cancelled
    tool_calls: list[ToolCall]
    timings: dict[str, float]  # seconds by phase; first_text, first_audio and total since the call


@dataclass(frozen=True)
class Done:
    """The answer is over; `reply` holds all of it."""

    reply: Reply


Event = TextDelta | AudioDelta | Done


@dataclass(frozen=True)
class Options:
    """How to answer.

    `voice` None is the checkpoint's first voice; `audio` False is text only; `verbatim` speaks every token, tool calls
    and markdown included. A limit that is reached shows as finish = "length".
    """

    voice: str | None = None
    audio: bool = True
    seed: int = 0
    max_text_tokens: int = 1024
    max_frames: int = 4096
    text: Sampling = THINKER
    speech: Sampling = TALKER
    residual: Sampling = MTP
    verbatim: bool = False

    def __post_init__(self) -> None:
        if self.max_text_tokens < 1 or self.max_frames < 1:
            raise InputError("max_text_tokens and max_frames must be at least 1")


@dataclass
class Answer:
    """What the last answer was, for `truncate`: the cache position it began at and the text frames had taken in."""

    start: int  # positions in the Thinker's cache before its first token
    text_ids: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # per frame, text tokens handed to the Talker by then
    spoken_to_the_end: bool = False


class Ear:
    """A clip that is being heard: resampler, log-mel and AuT, each with its state."""

    def __init__(self, model: Boxes, rate: int, window: int) -> None:
        self.model, self.rate, self.samples = model, rate, 0
        self.resampler = Resampler(rate, model.config.audio.mel.sample_rate).to(model.device)
        signal = (model.device, torch.promote_types(model.dtype, torch.float32))
        self.wave = self.resampler.init_state(1, *signal)
        self.mel = model.log_mel.init_state(1, *signal)
        self.aut = model.aut.init_state(1, *signal, window=window)

    def hear(self, samples: Tensor, final: bool = False) -> Tensor:
        """Audio embeddings [n, U] of every window that `samples` [N] closes.

        Raises:
            AudioError: longer than the limit, or on `final` too short to be a sound; nothing is changed then.
        """
        heard = self.samples + samples.shape[0]
        if heard > MAX_SECONDS * self.rate:
            raise AudioError(f"the clip is longer than the limit of {MAX_SECONDS:g} seconds; commit it in parts")
        mel = self.model.config.audio.mel
        shortest = mel.n_fft // 2 / mel.sample_rate
        if final and round(heard * mel.sample_rate / self.rate) <= mel.n_fft // 2:
            raise AudioError(
                f"the clip is {1000 * heard / self.rate:.1f} ms long; it needs more than {1000 * shortest:g} ms"
            )
        self.samples = heard
        wave = self.resampler(samples[None].to(self.wave.tail), self.wave, final)
        return self.model.aut(self.model.log_mel(wave, self.mel, final), self.aut, final)[0]

    def copy(self) -> Ear:
        """An independent copy."""
        new = copy.copy(self)
        new.wave, new.mel, new.aut = self.wave.copy(), self.mel.copy(), self.aut.copy()
        return new

    def states(self) -> dict[str, Any]:
        """Its states by name."""
        return {"ear.wave": self.wave, "ear.mel": self.mel, "ear.aut": self.aut}


class Session:
    """One conversation.

    Args:
        model: the boxes.
        system: text of the system turn, if any.
        tools: functions the assistant may call, in OpenAI's form.
        window: seconds AuT attends over, as released (8) when None.
        record: collects every stage by name, for `trace` and `verify`.
    """

    def __init__(
        self,
        model: Boxes,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        window: int | None = None,
        record: dict[str, list[Tensor]] | None = None,
    ) -> None:
        if window is not None and window not in WINDOWS:
            raise InputError(f"window is {window}; expected one of {', '.join(map(str, WINDOWS))} seconds")
        self.model, self.record = model, record
        self.window = window or model.config.audio.window_chunks
        self.generation = 0  # bumped by every answer and by cancel: work of an older one is void
        self.turn = 0
        self.ids: list[int] = []  # everything the Thinker has read or said
        place = (model.device, model.dtype)
        self.thinker = model.thinker.init_state(1, model.config.text.max_position_embeddings, *place)
        self.hidden: Tensor | None = None  # the Thinker's state at the last position read
        if model.speech is not None:
            limit = model.speech.talker.config.text.max_position_embeddings
            self.talker = model.speech.talker.init_state(1, limit, *place)
            self.mtp = model.speech.mtp.init_state(1, *place)
            self.code2wav = model.speech.code2wav.init_state(1, *place)
        self.user_length = 0  # positions of user turns in the Talker's cache
        self.answer: Answer | None = None
        self.ear: Ear | None = None
        self.writer = TurnWriter(model.tokenizer)  # spells turns as ids
        self._open = False  # inside a user turn
        self._ids: list[int] = []  # not yet fed, with what belongs to them
        self._user: list[bool] = []
        self._audio: list[Tensor] = []
        text = system_text(system, tools)
        if text is not None:
            self._add(self.writer.turn("system", text))

    # ------------------------------------------------------------------------------------- listening

    def append_text(self, text: str) -> None:
        """Add text to the user's turn."""
        self._begin_turn()
        self._end_clip()
        self.writer.text(text)

    def append_audio(self, samples: Any, rate: int = 16000) -> None:
        """Add sound [N] as it arrives, in pieces of any length; windows that close are read by the Thinker at once.

        Raises:
            AudioError: samples that are no sound, or another rate than the clip began with; nothing is changed then.
        """
        x = torch.from_numpy(check_samples(samples, rate))
        if self.ear is not None and self.ear.rate != rate:
            raise AudioError(
                f"the clip began at {self.ear.rate} Hz and goes on at {rate} Hz; keep one rate or commit first"
            )
        self._begin_turn()
        if self.ear is None:
            self._add(self.writer.open_audio())
            self.ear = Ear(self.model, rate, self.window)
        self._add_audio(self._grad_free(self.ear.hear, x))
        self._prefill()

    def append_clip(self, samples: Any, rate: int) -> None:
        """Add a whole clip [N]: as `append_audio`, but the floor of its log-mel refers to the whole clip's peak.

        Raises:
            AudioError: samples that are no sound.
        """
        x = torch.from_numpy(check_samples(samples, rate))
        features = self._grad_free(self._encode, x, rate)
        self._begin_turn()
        self._end_clip()
        self._add(self.writer.open_audio())
        self._add_audio(features)
        self._add(self.writer.close_audio())

    def append_message(self, message: Mapping[str, Any]) -> None:
        """Add a message in OpenAI's form: system, user, assistant or tool; content is text or a list of parts.

        Parts are {"type": "text", "text": …}, {"type": "input_audio", "input_audio": {"data": base64, "format": …}} or,
        for Python, {"type": "audio", "audio": path, bytes or (samples, rate)}.

        Raises:
            InputError, AudioError: a message of another form, or sound that cannot be used.
        """
        role = message.get("role")
        if role == "user":
            parts = [_read_part(part) for part in _parts(message)]
            self._begin_turn()
            for part in parts:
                if isinstance(part, str):
                    self.append_text(part)
                else:
                    self.append_clip(*part)
            self.commit()
        elif role in ("system", "developer", "assistant", "tool"):
            self.commit()
            text = "".join(_text_of(part) for part in _parts(message, optional=role == "assistant"))
            if role == "assistant":
                text = assistant_text(text, [_tool_call(call) for call in message.get("tool_calls") or ()])
            if role == "tool":  # the Thinker reads results as the user's words
                self.append_text(tool_results_text([text]))
                self.commit()
            else:
                self._add(self.writer.turn("assistant" if role == "assistant" else "system", text))
        else:
            raise InputError(f"a message has role {role!r}; expected system, user, assistant or tool")

    def commit(self) -> None:
        """End the user's turn; what was heard of an open window is read now.

        Raises:
            AudioError: the clip is too short to be a sound; append more.
        """
        if self._open:
            self._end_clip()
            self._add(self.writer.close())
            self._open = False
        self._prefill()

    def _begin_turn(self) -> None:
        if not self._open:
            self._add(self.writer.open("user"), user=True)
            self._open = True

    def _end_clip(self) -> None:
        if self.ear is not None:
            self._add_audio(self._grad_free(self.ear.hear, torch.zeros(0), True))
            self.ear = None
            self._add(self.writer.close_audio())

    def _encode(self, samples: Tensor, rate: int) -> Tensor:
        """Audio embeddings [n, U] of a whole clip [N]."""
        model, front = self.model, self.model.config.audio.mel
        dtype = torch.promote_types(model.dtype, torch.float32)
        wave = Resampler(rate, front.sample_rate).to(model.device)(samples[None].to(model.device, dtype))
        mel = model.log_mel(wave)
        self._note("mel", mel[0])
        return model.aut(mel, window=self.window, peak=mel.amax((1, 2)))[0]

    # -------------------------------------------------------------------------------------- reading

    def _add(self, ids: list[int], user: bool | None = None) -> None:
        self._ids += ids
        self._user += [self._open if user is None else user] * len(ids)

    def _add_audio(self, features: Tensor) -> None:
        if len(features):
            self._note("audio_features", features)
            self._audio.append(features)
            self._add([self.model.config.audio_token_id] * len(features))

    def _prefill(self) -> None:
        self._grad_free(self._read)

    def _read(self) -> None:
        """The Thinker reads what is pending, and the Talker what of it is the user's."""
        if not self._ids:
            return
        ids, user, audio = self._ids, self._user, self._audio
        self.thinker.reserve(self.thinker.filled + len(ids))  # refuse before anything is changed
        self._ids, self._user, self._audio = [], [], []
        place = torch.tensor(ids, device=self.model.device)
        x = self.model.embed_prompt(place, torch.cat(audio) if audio else None)
        for start in range(0, len(ids), PREFILL):
            hidden, accept = self.model.thinker(x[None, start : start + PREFILL], self.thinker)
            self.hidden = hidden[:, -1]
            self._note("thinker_hidden", accept[0])
            mine = [i for i in range(start, min(start + PREFILL, len(ids))) if user[i]]
            if mine and self.model.speech is not None:
                y = self.model.embed_rows(user_rows([ids[i] for i in mine]), accept[0, [i - start for i in mine]])
                self._note("talker_inputs", y[0])
                self.model.speech.talker(y, self.talker)
                self.user_length += len(mine)
        self.ids += ids
        self._note("prompt_ids", place)

    # ------------------------------------------------------------------------------------- answering

    def respond(self, options: Options | None = None, **changes: Any) -> Iterator[Event]:
        """Answer what was said: TextDelta and AudioDelta as they come to be, then Done.

        Raises:
            InputError: unknown voice, no Talker, or nothing was said.
        """
        options = _options(options, changes)
        speaker = self._speaker(options)
        self.commit()
        if not self.ids:
            raise InputError("there is nothing to answer; append audio, text or a message first")
        return self._respond(options, speaker)

    def _speaker(self, options: Options) -> int | None:
        if not options.audio:
            return None
        self.model.speaking()
        voice = options.voice or next(iter(self.model.voices), None)
        return self.model.speaker(voice or "")

    @torch.inference_mode()
    def _respond(self, options: Options, speaker: int | None) -> Iterator[Event]:
        clock = Phases()
        self.generation += 1
        self.turn += 1
        with clock("prefill"):
            self._add(self.writer.open_reply(), user=False)
            self._read()
        self.answer = Answer(start=len(self.ids))
        thought = Thought(self, options, clock)
        speech = Utterance(self, options, clock, speaker)
        try:
            words = thought if options.verbatim else spoken(thought, self.model.tokenizer)
            frames = speech.frames(words) if speaker is not None else iter(())
            for samples in frames:
                yield from thought.deltas()
                clock.mark("first_audio")
                yield AudioDelta(samples, len(speech.codes) - 1)
                self.answer.frames.append(len(thought.ids))
            for _ in thought:  # the Talker may stop before the text does, or never start
                yield from thought.deltas()
            yield from thought.deltas()
        finally:
            self._close_answer(thought, speech)
        yield Done(_reply(self.model, thought, speech, clock))

    @property
    def newline(self) -> int:
        """Id of the line end after a role and after a turn."""
        return self.model.tokenizer.encode("\n")[0]

    def _close_answer(self, thought: Thought, speech: Utterance) -> None:
        """Write the end of the assistant's turn and cut the Talker back to the user's: answers are not in its prompt."""
        assert self.answer is not None
        self.answer.text_ids = thought.ids
        self.answer.spoken_to_the_end = speech.finish == "stop"
        self._add([*thought.unread(), self.model.config.im_end_token_id, self.newline], user=False)
        if self.model.speech is not None:
            self.talker.truncate(self.user_length)

    def cancel(self) -> None:
        """Stop the answer that is being given (barge-in): its iterator ends with finish = "cancelled"."""
        self.generation += 1

    def truncate(self, ms: float) -> str:
        """Cut the last answer to what was heard after `ms` of its sound, rounded down to a word; returns that text.

        Raises:
            InputError: there is no answer, or `ms` is negative or beyond its sound.
        """
        if self.answer is None or self.model.config.code2wav is None:
            raise InputError("there is no spoken answer to cut; truncate follows respond")
        frame_ms = self.model.config.code2wav.frame_ms
        if not 0 <= ms <= len(self.answer.frames) * frame_ms:
            raise InputError(
                f"{ms:g} ms lies outside the answer, which has {len(self.answer.frames) * frame_ms:g} ms of sound"
            )
        self.cancel()
        heard = self._heard(int(ms // frame_ms))
        self.thinker.truncate(self.answer.start + heard)
        self.ids = self.ids[: self.answer.start + heard]
        self._ids, self._user, self._audio = [], [], []
        self._add([self.model.config.im_end_token_id, self.newline], user=False)
        self.answer.text_ids = self.answer.text_ids[:heard]
        self.answer.frames = self.answer.frames[: int(ms // frame_ms)]
        return self.model.tokenizer.decode(self.answer.text_ids)

    def _heard(self, frames: int) -> int:
        """Text tokens spoken within `frames`: the Talker takes text faster than it speaks, so time is shared evenly."""
        assert self.answer is not None and self.model.config.code2wav is not None
        ids, total = self.answer.text_ids, len(self.answer.frames)
        if frames == total and self.answer.spoken_to_the_end:
            return len(ids)
        if self.answer.spoken_to_the_end:
            count = len(ids) * frames // total
        else:
            count = int(frames / self.model.config.code2wav.frame_rate * TOKENS_PER_SECOND)
            count = min(count, self.answer.frames[frames - 1] if frames else 0, len(ids))
        text = self.model.tokenizer.decode
        while count and not _word_ends(text(ids[:count]), text(ids[: count + 1])):
            count -= 1
        return count

    # -------------------------------------------------------------------------------- text to speech

    def speak(self, words: Iterable[str], options: Options | None = None, **changes: Any) -> Iterator[Event]:
        """Say text that comes from elsewhere (another language model, say), piece by piece as it arrives."""
        options = _options(options, changes)
        speaker = self._speaker(options)
        if speaker is None:
            raise InputError("speak needs audio; leave audio=True")
        return self._speak(_token_stream(words, self.model), options, speaker)

    @torch.inference_mode()
    def _speak(self, ids: Iterator[int], options: Options, speaker: int) -> Iterator[Event]:
        clock = Phases()
        self.turn += 1
        self._read()
        said: list[int] = []
        speech = Utterance(self, options, clock, speaker)
        words = _noting(ids, said)
        try:
            for samples in speech.frames(words if options.verbatim else spoken(words, self.model.tokenizer)):
                clock.mark("first_audio")
                yield AudioDelta(samples, len(speech.codes) - 1)
        finally:
            self.talker.truncate(self.user_length)
        thought = Thought(self, options, clock)
        thought.ids, thought.finish = said, "stop"
        yield Done(_reply(self.model, thought, speech, clock))

    # ------------------------------------------------------------------------------------- as a value

    def copy(self) -> Session:
        """A fork: both go on independently."""
        new = copy.copy(self)
        for name in ("thinker", "talker", "mtp", "code2wav"):
            if hasattr(self, name):
                setattr(new, name, getattr(self, name).copy())
        for name in ("ids", "_ids", "_user", "_audio"):
            setattr(new, name, list(getattr(self, name)))
        new.ear = self.ear and self.ear.copy()
        new.answer, new.writer = copy.deepcopy(self.answer), copy.copy(self.writer)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self._states().values())

    def _states(self) -> dict[str, Any]:
        states = {"thinker": self.thinker}
        if self.model.speech is not None:
            states["talker"] = self.talker
        return states | (self.ear.states() if self.ear else {})

    def save(self, path: str | Path) -> None:
        """Write the conversation to one file, from which `Omni.load_session` goes on, in another process too."""
        tensors = {f"{n}.{k}": t for n, state in self._states().items() for k, t in state.tensors().items()}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        if self._audio:
            tensors["pending_audio"] = torch.cat(self._audio)
        facts = {name: getattr(self, name) for name in _SAVED}
        facts["answer"] = self.answer and asdict(self.answer)
        facts["writer"] = self.writer.pending
        facts["ear"] = self.ear and {"rate": self.ear.rate, "samples": self.ear.samples}
        write_safetensors(Path(path), tensors, {"session": json.dumps(facts)})

    @classmethod
    def load(cls, model: Boxes, path: str | Path) -> Session:
        """The conversation saved in `path`, to go on with the same checkpoint.

        Raises:
            WeightsError: not a saved session, or one of another model.
        """
        facts = json.loads(read_metadata(Path(path), "session"))
        tensors = read_safetensors(Path(path))
        session = cls(model, window=facts["window"])
        for name in _SAVED:
            setattr(session, name, facts[name])
        session.answer = facts["answer"] and Answer(**facts["answer"])
        session.writer.pending = facts["writer"]
        if facts["ear"]:
            session.ear = Ear(model, facts["ear"]["rate"], session.window)
            session.ear.samples = facts["ear"]["samples"]
        for name, state in session._states().items():
            state.load({k.removeprefix(name + "."): t for k, t in tensors.items() if k.startswith(name + ".")})
        session.hidden = tensors["hidden"].to(model.device) if "hidden" in tensors else None
        session._audio = [tensors["pending_audio"].to(model.device)] if "pending_audio" in tensors else []
        return session

    # ---------------------------------------------------------------------------------------- helpers

    def _note(self, name: str, value: Tensor) -> None:
        if self.record is not None:
            self.record.setdefault(name, []).append(value.detach().cpu())

    @staticmethod
    @torch.inference_mode()
    def _grad_free(function: Any, *args: Any) -> Any:
        return function(*args)


_SAVED = ("window", "generation", "turn", "ids", "user_length", "_open", "_ids", "_user")


class Thought(Iterator[int]):
    """The Thinker's answer, one token when asked; what is iterated over is what the Talker may have.

    Of n tokens it gets the first n - 1, whatever the last is (facts 4.2): the one that ends the answer or reaches the
    limit is not spoken. Both are known when the token is made, so nothing is held back.
    """

    def __init__(self, session: Session, options: Options, clock: Phases) -> None:
        self.session, self.options, self.clock = session, options, clock
        self.ids: list[int] = []
        self.finish: str | None = None
        self.text = ""
        self._fed = 0
        self._new: list[str] = []
        self._decoder = StreamDecoder(session.model.tokenizer)
        self._generation = session.generation

    def __next__(self) -> int:
        if self.finish is None and self.session.generation != self._generation:
            self.finish = "cancelled"
        if self.finish is not None:
            raise StopIteration
        with self.clock("thinker"):
            token = self._draw()
        if token == self.session.model.config.im_end_token_id:
            return self._end("stop")
        self.ids.append(token)
        self._say(self._decoder.push(token))
        self.clock.mark("first_text")
        if len(self.ids) == self.options.max_text_tokens:
            return self._end("length")
        return token

    def _draw(self) -> int:
        session, model = self.session, self.session.model
        if self._fed < len(self.ids):
            x = model.thinker.embed(torch.tensor([self.ids[self._fed :]], device=model.device))
            session.hidden = model.thinker(x, session.thinker)[0][:, -1]
            session.ids += self.ids[self._fed :]
            self._fed = len(self.ids)
        assert session.hidden is not None
        logits = model.thinker.logits(session.hidden)
        session._note("thinker_logits", logits)
        key = NoiseKey(self.options.seed, session.turn, len(self.ids), THINKER_CODEBOOK)
        token = choose(logits, self.options.text, key)
        session._note("text_ids", token)
        return int(token)

    def _end(self, finish: str) -> int:
        self.finish = finish
        self._say(self._decoder.flush())
        raise StopIteration

    def _say(self, text: str) -> None:
        if text:
            self._new.append(text)
            self.text += text

    def unread(self) -> list[int]:
        """Tokens said that the Thinker's cache does not hold yet."""
        return self.ids[self._fed :]

    def deltas(self) -> Iterator[TextDelta]:
        """Text made since the last call."""
        while self._new:
            yield TextDelta(self._new.pop(0))


class Utterance:
    """Talker, MTP and Code2Wav speaking one answer, a frame at a time."""

    def __init__(self, session: Session, options: Options, clock: Phases, speaker: int | None) -> None:
        self.session, self.options, self.clock, self.speaker = session, options, clock, speaker
        self.codes: list[Tensor] = []  # [Q] per frame
        self.sound: list[Samples] = []
        self.finish: str | None = None

    def frames(self, words: Iterator[int]) -> Iterator[Samples]:
        """Samples [1920] of each frame; a text token of `words` is taken only when its frame is due."""
        session, config, speech = self.session, self.session.model.config, self.session.model.speaking()
        first = next(words, None)
        if first is None or self.speaker is None:
            self.finish = "stop"
            return
        device, generation = session.model.device, session.generation
        session.code2wav.reset()
        suppress = speech.talker.suppressed(device)
        seen = torch.zeros(1, speech.talker.config.text.vocab_size, dtype=torch.bool, device=device)
        rows = opening_rows(config, speech.talker.config, session.newline, self.speaker, first)
        x = session.model.embed_rows(rows)
        session._note("talker_inputs", x[0])
        trailing = trailing_text(config, words)
        for frame in range(self.options.max_frames):
            if session.generation != generation:
                self.finish = "cancelled"
                return
            with self.clock("talker"):
                hidden = speech.talker(x, session.talker)[:, -1]
                logits = speech.talker.codec_head(hidden)
                code = choose(logits, self.options.speech, self._key(frame, 0), seen, suppress)
            if int(code) == speech.talker.config.codec_eos_token_id:
                self.finish = "stop"
                return
            session._note("talker_logits", logits)
            seen[0, code] = True
            with self.clock("mtp"):
                first_part = speech.talker.model.codec_embedding(code)
                residual, rest = speech.mtp.predict(hidden, first_part, self._draw(frame), session.mtp)
                codes = torch.cat([code[:, None], residual], 1)
            with self.clock("code2wav"):
                wave = speech.code2wav(codes[:, None], session.code2wav)[0]
            session._note("codes", codes)
            session._note("waveform", wave)
            self.codes.append(codes[0].cpu())
            self.sound.append(wave.float().cpu().numpy())
            yield self.sound[-1]
            if frame + 1 < self.options.max_frames:
                text = session.model.thinker.embed(torch.tensor([next(trailing)], device=device))
                x = (first_part + rest + speech.talker.text_projection(text))[:, None]
        self.finish = "length"

    def _key(self, frame: int, codebook: int) -> NoiseKey:
        return NoiseKey(self.options.seed, self.session.turn, frame, codebook)

    def _draw(self, frame: int) -> Any:
        return lambda logits, codebook: choose(logits, self.options.residual, self._key(frame, codebook))


def _reply(model: Boxes, thought: Thought, speech: Utterance, clock: Phases) -> Reply:
    decoder = model.config.code2wav
    quantizers, rate = (decoder.num_quantizers, decoder.sample_rate) if decoder else (0, 0)
    codes = torch.stack(speech.codes) if speech.codes else torch.zeros(0, quantizers, dtype=torch.long)
    audio = np.concatenate(speech.sound) if speech.sound else np.zeros(0, np.float32)
    finishes = [thought.finish, speech.finish]
    finish = next((f for f in ("cancelled", "length") if f in finishes), "stop")
    return Reply(
        thought.text or model.tokenizer.decode(thought.ids),
        thought.ids,
        codes,
        audio,
        rate,
        finish,
        parse_tool_calls(thought.text),
        clock.summary(),
    )


# ----------------------------------------------------------------------------------------------- messages


def _options(options: Options | None, changes: dict[str, Any]) -> Options:
    unknown = [name for name in changes if name not in Options.__annotations__]
    if unknown:
        raise InputError(f"there is no option {unknown[0]!r}; there are {', '.join(Options.__annotations__)}")
    return Options(**{**(asdict_shallow(options) if options else {}), **changes})


def asdict_shallow(options: Options) -> dict[str, Any]:
    """Fields of `options` by name, values as they are."""
    return {name: getattr(options, name) for name in Options.__annotations__}


def _parts(message: Mapping[str, Any], optional: bool = False) -> list[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None and optional:
        return []
    if not isinstance(content, list) or (not content and not optional):
        raise InputError("a message's content must be text or a list of parts, and not empty")
    return content


def _text_of(part: Any) -> str:
    text = _read_part(part)
    if not isinstance(text, str):
        raise InputError("only user messages may hold audio")
    return text


def _read_part(part: Any) -> str | tuple[Samples, int]:
    """Text of a content part, or its samples and their rate."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "input_audio":
        try:
            return read_audio(base64.b64decode(part["input_audio"]["data"], validate=True))
        except (KeyError, TypeError, binascii.Error):
            raise AudioError('input_audio needs {"data": base64 of a sound file, "format": "wav"}') from None
    if kind == "audio":
        audio = part.get("audio")
        if isinstance(audio, tuple) and len(audio) == 2:
            return check_samples(*audio), audio[1]
        return read_audio(audio)
    raise InputError(f"a content part has type {kind!r}; expected text, input_audio or audio")


def _tool_call(call: Any) -> ToolCall:
    try:
        function = call["function"]
        arguments = function["arguments"]
        return ToolCall(function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments)
    except (KeyError, TypeError, ValueError):
        raise InputError('a tool call must have the form {"function": {"name": …, "arguments": JSON text}}') from None


def _word_ends(text: str, longer: str) -> bool:
    """Whether a word ends where `text` ends and `longer` goes on; characters of unspaced scripts stand alone."""
    if text == longer:
        return False  # inside a character
    after = longer[len(text) :][:1]
    return not (text[-1:].isalnum() and after.isalnum() and text[-1:].isascii() == after.isascii() and after.isascii())


def _token_stream(words: Iterable[str], model: Boxes) -> Iterator[int]:
    """Ids of text that arrives in pieces; the last word of a piece waits, since it may go on in the next."""
    held = ""
    for piece in [words] if isinstance(words, str) else words:
        held += piece
        cut = max(held.rfind(" "), held.rfind("\n"))
        if cut > 0:
            yield from model.tokenizer.encode(held[:cut])
            held = held[cut:]
    yield from model.tokenizer.encode(held)


def _noting(ids: Iterator[int], into: list[int]) -> Iterator[int]:
    for token in ids:
        into.append(token)
        yield token


# ------------------------------------------------------------------------------------------------- public


class Omni(Boxes):
    """A checkpoint to talk to. Made by `load`."""

    def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        window: int | None = None,
        record: dict[str, list[Tensor]] | None = None,
    ) -> Session:
        """A new conversation."""
        return Session(self, system, tools, window, record)

    def load_session(self, path: str | Path) -> Session:
        """A conversation that `Session.save` wrote."""
        return Session.load(self, path)

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        window: int | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """Answer `messages` (OpenAI's form): TextDelta and AudioDelta as they come to be, then Done.

        Options are those of `Options`: voice, audio, seed, max_text_tokens, max_frames, text, speech, residual.

        Raises:
            InputError, AudioError: unknown voice or option, or messages of another form.
        """
        messages = list(messages)
        system = None
        if messages and tools and messages[0].get("role") in ("system", "developer"):
            system = "".join(_text_of(part) for part in _parts(messages.pop(0)))
        session = self.session(system, tools, window)
        for message in messages:
            session.append_message(message)
        return session.respond(**options)

    def generate(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Reply:
        """The whole answer to `messages`; takes what `stream` takes."""
        return collect(self.stream(messages, **options))

    def speak(self, words: str | Iterable[str], **options: Any) -> Iterator[Event]:
        """Say `words`, one text or pieces of it as they arrive; no question, no Thinker."""
        return self.session().speak([words] if isinstance(words, str) else words, **options)


def collect(events: Iterable[Event]) -> Reply:
    """The reply that a stream of events ends with."""
    for event in events:
        if isinstance(event, Done):
            return event.reply
    raise InputError("the stream ended without Done; it was closed early")


def load(name_or_path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Omni:
    """A checkpoint in the released form, from a folder or a Hub id such as Qwen/Qwen3-Omni-30B-A3B-Instruct.

    `dtype` is that of the files when None (bfloat16 as released).

    Raises:
        ConfigError, WeightsError: the checkpoint is incomplete, damaged, or of another kind of model.
    """
    return load_checkpoint(Omni, name_or_path, device, dtype)
