"""The readable loop: one conversation is answered, eagerly, one token and one frame at a time.

`Omni.generate` is `Omni.stream` collected, and `stream` is a Session that is told the messages: one path for whole
files and for speech as it arrives. The engine of many conversations is held to this loop.

Shapes: V vocabulary, W the Talker's width, Q codebooks, N samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from antiphon.audio import LogMel, Resampler, Samples, check_samples
from antiphon.binding import bound
from antiphon.chat import ToolCall, parse_tool_calls
from antiphon.conversation import Answer, Conversation
from antiphon.errors import AudioError, InputError
from antiphon.guide import Guide
from antiphon.messages import parts_of, text_of
from antiphon.metrics import Phases, Span
from antiphon.model import Boxes
from antiphon.sampling import MTP, TALKER, THINKER, THINKER_CODEBOOK, NoiseKey, Sampling, choose
from antiphon.speaker import SPEAKER_FILE, SpeakerEncoder, load_speaker
from antiphon.spoken import spoken
from antiphon.talker import CLONED, opening_rows, trailing_text
from antiphon.tokenizer import StreamDecoder
from antiphon.turn import TURN_FILE, TurnEnd, load_turn
from antiphon.weights import find_checkpoint, load_checkpoint

REFERENCE = (1, 30)  # seconds of a recording that a voice is cloned from
# before these a token ends, whatever comes: the first space after a word, and a mark of unspaced scripts after a letter
TOKEN_ENDS = re.compile(r"(?<=\S) |(?<=[^\W_])[，。！？、；：]")


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class AudioDelta:
    """One frame of the answer's sound: float32 [1920] at 24 kHz as released."""

    samples: Samples
    frame: int
    sample_rate: int


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
    spans: list[Span]  # every single run of a phase
    spoken_ids: list[int]  # what the Talker took of the text, one a frame


@dataclass(frozen=True)
class Done:
    """The answer is over; `reply` holds all of it."""

    reply: Reply


Event = TextDelta | AudioDelta | Done


@dataclass(frozen=True)
class Options:
    """How to answer.

    `voice` is a name, or a vector [W] of `Omni.clone`; None is the checkpoint's first voice. `audio` False is text
    only; `verbatim` speaks every token, tool calls and markdown included; `guide` holds tool calls to what was
    declared. A limit that is reached shows as finish = "length".
    """

    voice: str | Tensor | None = None
    audio: bool = True
    seed: int = 0
    max_text_tokens: int = 1024
    max_frames: int = 4096
    text: Sampling = THINKER
    speech: Sampling = TALKER
    residual: Sampling = MTP
    verbatim: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Options).items():
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected {getattr(kind, '__name__', kind)}")
        if self.max_text_tokens < 1 or self.max_frames < 1:
            raise InputError("max_text_tokens and max_frames must be at least 1")


class Session(Conversation):
    """A conversation that answers."""

    def respond(self, options: Options | None = None, **changes: Any) -> Iterator[Event]:
        """Answer what was said: TextDelta and AudioDelta as they come to be, then Done.

        Raises:
            InputError: unknown voice, no Talker, or nothing was said.
        """
        self._settled()
        self.clock.begin()
        options, speaker = self.how_to_answer(options, changes)
        self._at_once(
            self._end_clip()
        )  # AuT has a lane of its own, so what is left of a clip is heard before the prompt is read
        with self.clock("prefill"):
            self.commit()
        self.generation += 1
        return self._respond(options, speaker, self.generation, self.clock)

    def how_to_answer(self, options: Options | None, changes: Mapping[str, Any]) -> tuple[Options, int | Tensor | None]:
        """How to answer, and what goes into the speaker slot.

        Raises:
            InputError: unknown option or voice, no Talker, or nothing was said.
        """
        chosen = _options(options, dict(changes))
        speaker = self._speaker(chosen)
        if not self.ids and not self._ids:
            raise InputError("there is nothing to answer; append audio, text or a message first")
        return chosen, speaker

    def _speaker(self, options: Options) -> int | Tensor | None:
        """What goes into the speaker slot: a control id or a vector; None for no speech."""
        if not options.audio:
            return None
        width, voice = self.model.speaking().talker.config.text.hidden_size, options.voice
        if isinstance(voice, Tensor):
            if voice.shape != (width,):
                raise InputError(f"a cloned voice has shape [{width}] here, not {list(voice.shape)}; clone it anew")
            return voice
        return self.model.speaker(voice or next(iter(self.model.voices), ""))

    @torch.inference_mode()
    def _respond(
        self, options: Options, speaker: int | Tensor | None, generation: int, clock: Phases
    ) -> Iterator[Event]:
        self._settled()
        self._at_once(self._end_clip())
        with clock("prefill"):
            self.open_reply()  # what was said since `respond` was called belongs to the question
            self._read()
        thought, speech = self.begin_answer(options, speaker, generation, clock)
        assert self.answer is not None
        try:
            words = thought if options.verbatim else spoken(thought, self.model.tokenizer)
            frames = speech.frames(words) if speaker is not None else iter(())
            for samples in frames:
                yield from thought.deltas()
                clock.mark("first_audio")
                self.answer.frames.append(len(thought.ids))  # before it is given: the caller may leave right after
                yield AudioDelta(samples, len(speech.codes) - 1, speech.sample_rate)
            for _ in thought:  # the Talker may stop before the text does, or never start
                yield from thought.deltas()
            yield from thought.deltas()
        finally:
            self.close_answer(thought, speech)
        yield Done(reply_of(self.model, thought, speech, clock))

    def open_reply(self) -> None:
        """End the user's turn and open the assistant's; what is to be read for it is pending."""
        self.commit()
        self._add(self.writer.open_reply(), user=False)

    def begin_answer(
        self, options: Options, speaker: int | Tensor | None, generation: int, clock: Phases
    ) -> tuple[Thought, Utterance]:
        """The answer to what was read, before its first token and its first frame."""
        self.turn += 1
        self._answering = True
        thought = Thought(self, options, clock, generation)
        self.answer = Answer(len(self.ids), thought.ids)
        return thought, Utterance(self, options, clock, speaker)

    def close_answer(self, thought: Thought, speech: Utterance) -> None:
        """Close the assistant's turn and cut the Talker back to the user's: answers are not in its prompt."""
        assert self.answer is not None
        self._answering = False
        self.clock = Phases()
        self.answer.spoken_to_the_end = speech.finish == "stop"
        self._add([*thought.unread(), self.model.config.im_end_token_id, self.newline], user=False)
        if self.model.speech is not None:
            self.talker.truncate(self.user_length)

    # -------------------------------------------------------------------------------- text to speech

    def speak(self, words: Iterable[str], options: Options | None = None, **changes: Any) -> Iterator[Event]:
        """Say text that comes from elsewhere (another language model, say), piece by piece as it arrives."""
        self._settled()
        chosen, speaker = self.how_to_speak(options, changes)
        return self._speak(token_stream(words, self.model), chosen, speaker)

    def how_to_speak(self, options: Options | None, changes: Mapping[str, Any]) -> tuple[Options, int | Tensor]:
        """As `how_to_answer`, for text that comes from elsewhere."""
        chosen = _options(options, dict(changes))
        speaker = self._speaker(chosen)
        if speaker is None:
            raise InputError("speak needs audio; leave audio=True")
        return chosen, speaker

    @torch.inference_mode()
    def _speak(self, ids: Iterator[int], options: Options, speaker: int | Tensor) -> Iterator[Event]:
        self._settled()
        said: list[int] = []
        self._read()
        thought, speech = self.begin_speech(options, speaker, said, Phases())
        words = _noting(ids, said)
        try:
            for samples in speech.frames(words if options.verbatim else spoken(words, self.model.tokenizer)):
                thought.clock.mark("first_audio")
                yield AudioDelta(samples, len(speech.codes) - 1, speech.sample_rate)
        finally:
            self.close_speech()
        yield Done(reply_of(self.model, thought, speech, thought.clock))

    def begin_speech(
        self, options: Options, speaker: int | Tensor, said: list[int], clock: Phases
    ) -> tuple[Thought, Utterance]:
        """What says the tokens `said`, as they come to be; they are no part of the conversation."""
        self.turn += 1
        self._answering = True
        thought = Thought(self, options, clock, self.generation)
        thought.ids, thought.finish = said, "stop"
        return thought, Utterance(self, options, clock, speaker)

    def close_speech(self) -> None:
        """Cut the Talker back to the user's turns."""
        self._answering = False
        self.talker.truncate(self.user_length)


class Thought(Iterator[int]):
    """The Thinker's answer, one token when asked; what is iterated over is what the Talker may have.

    Of n tokens it gets the first n - 1, whatever the last is: the one that ends the answer or reaches the
    limit is not spoken. Both are known when the token is made, so nothing is held back.
    """

    def __init__(self, session: Conversation, options: Options, clock: Phases, generation: int) -> None:
        self.session, self.options, self.clock = session, options, clock
        self.ids: list[int] = []
        self.finish: str | None = None
        self.text = ""
        self._fed = 0
        self._new: list[str] = []
        self._decoder = StreamDecoder(session.model.tokenizer)
        self._generation = generation
        self._think = bound(session.model.thinker)

    def __next__(self) -> int:
        if self.is_over():
            raise StopIteration
        with self.clock("thinker"):
            token = self._draw()
        if not self.take(token):
            raise StopIteration
        return token

    def is_over(self) -> bool:
        """Whether no more tokens are to be made."""
        if self.finish is None and self.session.generation != self._generation:
            self.finish = "cancelled"
        return self.finish is not None

    def take(self, token: int) -> bool:
        """The next token; whether the Talker may have it."""
        if token == self.session.model.config.im_end_token_id:
            return self._end("stop")
        self.ids.append(token)
        self._say(self._decoder.push(token))
        self.clock.mark("first_text")
        if len(self.ids) == self.options.max_text_tokens:
            return self._end("length")
        return True

    def _draw(self) -> int:
        session, model = self.session, self.session.model
        if unread := self.read():
            x = model.thinker.embed(torch.tensor([unread], device=model.device))
            session.hidden = self._think(x, session.thinker)[0][:, -1]
        assert session.hidden is not None
        logits = model.thinker.logits(session.hidden)
        session.note("thinker_logits", logits)
        token = choose(self.guided(logits), self.options.text, self.key)
        session.note("text_ids", token)
        return int(token)

    def guided(self, logits: Tensor) -> Tensor:
        """Scores [1, V] of the next token; what must not come has none."""
        guide = self.options.guide
        return logits if guide is None else guide.masked(self.ids, logits)

    @property
    def key(self) -> NoiseKey:
        """Of the next draw."""
        return NoiseKey(self.options.seed, self.session.turn, len(self.ids), THINKER_CODEBOOK)

    def _end(self, finish: str) -> bool:
        self.finish = finish
        self._say(self._decoder.flush())
        return False

    def _say(self, text: str) -> None:
        if text:
            self._new.append(text)
            self.text += text

    def unread(self) -> list[int]:
        """Tokens said that the Thinker's cache does not hold yet."""
        return self.ids[self._fed :]

    def read(self) -> list[int]:
        """As `unread`, and they count as read from now on."""
        unread = self.unread()
        self.session.ids += unread
        self._fed = len(self.ids)
        return unread

    def cut(self, count: int) -> None:
        """Take back what was made after `count` tokens, out of the Thinker's cache too."""
        if count >= len(self.ids):  # and its text is whole, to the last of its bytes
            return
        session, start = self.session, len(self.session.ids) - self._fed
        del self.ids[count:], session.ids[start + count :]
        session.thinker.truncate(start + count)
        self._fed, self._decoder = min(self._fed, count), StreamDecoder(session.model.tokenizer)
        self.text = "".join(map(self._decoder.push, self.ids))

    def deltas(self) -> Iterator[TextDelta]:
        """Text made since the last call."""
        while self._new:
            yield TextDelta(self._new.pop(0))


class Utterance:
    """Talker, MTP and Code2Wav speaking one answer, a frame at a time."""

    def __init__(self, session: Conversation, options: Options, clock: Phases, speaker: int | Tensor | None) -> None:
        self.session, self.options, self.clock = session, options, clock
        self.cloned = speaker[None] if isinstance(speaker, Tensor) else None  # [1, W]
        self.speaker = CLONED if isinstance(speaker, Tensor) else speaker
        self.sample_rate = session.model.config.code2wav.sample_rate if session.model.config.code2wav else 0
        self.seen = torch.zeros(1, 0, dtype=torch.bool)  # [1, V] codes of codebook 0 that were drawn
        self.words: list[int] = []  # the Talker was given
        self.codes: list[Tensor] = []  # [Q] per frame
        self.sound: list[Samples] = []
        self.finish: str | None = None

    def frames(self, words: Iterator[int]) -> Iterator[Samples]:
        """Samples [1920] of each frame; a text token of `words` is taken only when its frame is due."""
        session, config, speech = self.session, self.session.model.config, self.session.model.speaking()
        words = _noting(words, self.words)
        first = next(words, None)
        if first is None or self.speaker is None:
            self.finish = "stop"
            return
        device, generation = session.model.device, session.generation
        suppress = speech.talker.suppressed(device)
        x = self.open(first)
        seen = self.seen
        session.note("talker_inputs", x[0])
        trailing = trailing_text(config, words)
        talk, predict, decode = bound(speech.talker), speech.mtp.bind_predict(), bound(speech.code2wav)
        for frame in range(self.options.max_frames):
            if session.generation != generation:
                self.finish = "cancelled"
                return
            with self.clock("talker"):
                hidden = talk(x, session.talker)[:, -1]
                logits = speech.talker.codec_head(hidden)
                code = choose(logits, self.options.speech, self.key(frame, 0), seen, suppress)
            if int(code) == speech.talker.config.codec_eos_token_id:
                self.finish = "stop"
                return
            session.note("talker_logits", logits)
            seen[0, code] = True
            with self.clock("mtp"):
                first_part = speech.talker.model.codec_embedding(code)
                residual, rest = predict(hidden, first_part, self._draw(frame), session.mtp)
                codes = torch.cat([code[:, None], residual], 1)
            with self.clock("code2wav"):
                wave = decode(codes[:, None], session.code2wav)[0]
            session.note("codes", codes)
            session.note("waveform", wave)
            yield self.add(codes[0], wave)
            if frame + 1 < self.options.max_frames:
                text = session.model.thinker.embed(torch.tensor([next(trailing)], device=device))
                x = (first_part + rest + speech.talker.text_projection(text))[:, None]
        self.finish = "length"

    def open(self, first: int) -> Tensor:
        """The Talker's input [1, T, W] that opens the answer whose first word is `first`; Code2Wav begins anew."""
        session, talker = self.session, self.session.model.speaking().talker
        session.code2wav.reset()
        self.seen = torch.zeros(1, talker.config.text.vocab_size, dtype=torch.bool, device=session.model.device)
        assert self.speaker is not None
        rows = opening_rows(session.model.config, talker.config, session.newline, self.speaker, first)
        cloned = None if self.cloned is None else self.cloned.to(session.model.device)
        return session.model.embed_rows(rows, voices=cloned)

    def add(self, codes: Tensor, wave: Tensor) -> Samples:
        """One more frame: codes [Q] and its sound [1920], which is returned as samples."""
        self.codes.append(codes.cpu())
        self.sound.append(wave.float().cpu().numpy())
        return self.sound[-1]

    def key(self, frame: int, codebook: int) -> NoiseKey:
        """Of the draw of a code."""
        return NoiseKey(self.options.seed, self.session.turn, frame, codebook)

    def _draw(self, frame: int) -> Callable[[Tensor, int], Tensor]:
        return lambda logits, codebook: choose(logits, self.options.residual, self.key(frame, codebook))


def reply_of(model: Boxes, thought: Thought, speech: Utterance, clock: Phases) -> Reply:
    """A whole answer."""
    quantizers = model.config.code2wav.num_quantizers if model.config.code2wav else 0
    codes = torch.stack(speech.codes) if speech.codes else torch.zeros(0, quantizers, dtype=torch.long)
    audio = np.concatenate(speech.sound) if speech.sound else np.zeros(0, np.float32)
    finishes = [thought.finish, speech.finish]
    finish = next((f for f in ("cancelled", "length") if f in finishes), "stop")
    return Reply(
        thought.text or model.tokenizer.decode(thought.ids),
        thought.ids,
        codes,
        audio,
        speech.sample_rate,
        finish,
        parse_tool_calls(thought.text),
        clock.summary(),
        clock.spans,
        speech.words,
    )


def _options(options: Options | None, changes: dict[str, Any]) -> Options:
    unknown = [name for name in changes if name not in Options.__annotations__]
    if unknown:
        raise InputError(f"there is no option {unknown[0]!r}; there are {', '.join(Options.__annotations__)}")
    return replace(options or Options(), **changes)


def token_stream(words: Iterable[str], model: Boxes) -> Iterator[int]:
    """Ids of text that arrives in pieces: those of the whole text. The last word waits, since it may go on.

    Raises:
        InputError: neither text nor pieces of text, at once or when the piece comes.
    """
    if not isinstance(words, Iterable):
        raise InputError(f"speak needs text or pieces of text, not {type(words).__name__}")
    return _tokens(words, model)


def _tokens(words: Iterable[str], model: Boxes) -> Iterator[int]:
    held = ""
    for piece in [words] if isinstance(words, str) else words:
        if not isinstance(piece, str):
            raise InputError(f"speak needs text or pieces of text, not {type(piece).__name__}")
        held += piece
        if cut := max((end.start() for end in TOKEN_ENDS.finditer(held)), default=0):
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

    beside: Path | None = None  # the folder it was loaded from

    @cached_property
    def speaker_encoder(self) -> SpeakerEncoder:
        """What voices are cloned with, in float32; a file beside the checkpoint, which the release has not.

        Raises:
            InputError: there is none.
        """
        if self.beside is None or not (self.beside / SPEAKER_FILE).is_file():
            voices = ", ".join(self.voices)
            raise InputError(f"this checkpoint has no {SPEAKER_FILE}, so it cannot clone a voice; it has {voices}")
        return load_speaker(self.beside / SPEAKER_FILE).float()

    @property
    def hears_turns(self) -> bool:
        """Whether it can tell a pause from the end of a turn."""
        return self.beside is not None and (self.beside / TURN_FILE).is_file()

    @cached_property
    def turn_head(self) -> TurnEnd:
        """What tells a pause from the end of a turn; a file beside the checkpoint, which the release has not.

        Raises:
            InputError: there is none.
        """
        if self.beside is None or not self.hears_turns:
            raise InputError(f"this checkpoint has no {TURN_FILE}, so it cannot tell whether a turn has ended")
        return load_turn(self.beside / TURN_FILE).to(self.device)

    @torch.inference_mode()
    def turn_end(self, recent: Tensor) -> float:
        """How likely a turn has ended, from 0 to 1, by AuT's last embeddings [n, U], as `Session.recent` gives them.

        It is 0 where nothing was heard.

        Raises:
            InputError: this checkpoint has no head for it.
        """
        return float(self.turn_head(recent[None]).sigmoid()) if len(recent) else 0.0

    @torch.inference_mode()
    def clone(self, samples: Any, rate: int) -> Tensor:
        """The voice [W] of a recording [N] of one to thirty seconds, to be given as `voice`; three seconds are enough.

        Raises:
            AudioError: the recording is too short or too long, or is no sound.
            InputError: this checkpoint has no speaker encoder.
        """
        encoder, heard, (shortest, longest) = self.speaker_encoder, check_samples(samples, rate), REFERENCE
        if not shortest <= (seconds := len(heard) / rate) <= longest:
            raise AudioError(f"the voice's recording is {seconds:.1f} s long; give {shortest} to {longest} seconds")
        front = encoder.config.mel
        wave = Resampler(rate, front.sample_rate)(torch.from_numpy(heard)[None], final=True)
        return encoder(LogMel(front)(wave, final=True))[0]

    def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        window: int | None = None,
        record: dict[str, list[Tensor]] | None = None,
        retention: float | None = None,
    ) -> Session:
        """A new conversation; with `retention` it forgets its oldest turns rather than come to an end."""
        return Session(self, system, tools, window, record, retention)

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
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise InputError('messages must be a list of messages of the form {"role": …, "content": …}')
        messages = list(messages)
        system = None
        if messages and tools and messages[0].get("role") in ("system", "developer"):
            system = "".join(text_of(part) for part in parts_of(messages.pop(0)))
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


def load(
    name_or_path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Omni:
    """A checkpoint in the released form, from a folder or a Hub id such as Qwen/Qwen3-Omni-30B-A3B-Instruct.

    `dtype` is that of the files when None (bfloat16 as released); `progress` is told bytes read and bytes in all.

    Raises:
        ConfigError, WeightsError: the checkpoint is incomplete, damaged, or of another kind of model.
    """
    folder = find_checkpoint(name_or_path)
    model = load_checkpoint(Omni, folder, device, dtype, progress)
    model.beside = folder
    return model
