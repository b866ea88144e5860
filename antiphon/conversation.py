"""A conversation as a value: what was said to the boxes and what they remember of it.

It listens (resampler, log-mel, AuT), lets the Thinker read and the Talker read along, and can be cut back to what was
heard, copied, saved and resumed. Answering is in generate.py.

Shapes: n audio tokens, U the Thinker's width, N samples.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar
from unicodedata import category

import torch
from torch import Tensor

from antiphon.audio import MAX_SECONDS, Resampler, Samples, check_samples
from antiphon.aut import Windows
from antiphon.chat import TurnWriter, assistant_text, system_text, tool_results_text
from antiphon.errors import AudioError, InputError
from antiphon.files import read_metadata, read_safetensors, write_safetensors
from antiphon.messages import parts_of, read_part, text_of, tool_call
from antiphon.metrics import Phases
from antiphon.model import Boxes
from antiphon.talker import user_rows

TURN_ROOM = 0.1  # of the model's positions, that a turn and its answer should find free
PREFILL = 512  # positions the Thinker reads at once: bounds the memory of a long prompt
WINDOWS = (1, 2, 4, 8)  # seconds AuT may attend over
# scripts without spaces: Thai and Lao, Burmese, Khmer, kana, Han
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
RECENT = 26  # embeddings of AuT's that are kept: 2 s, for who judges whether a turn has ended
TOKENS_PER_SECOND = 4.5  # of speech, where an answer was cut off before its own rate was known


Made = TypeVar("Made")
Steps: TypeAlias = Generator[Windows | None, Tensor, Made]  # work that others can come between; see `whole`


@dataclass
class Answer:
    """What the last answer was, for `truncate`: the cache position it began at and the text frames had taken in."""

    start: int  # positions in the Thinker's cache before its first token
    text_ids: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # per frame, text tokens handed to the Talker by then
    spoken_to_the_end: bool = False


@dataclass(frozen=True)
class Chunk:
    """A stretch of what was said to the model, as the Thinker reads it at once."""

    x: Tensor  # [T, U] its input
    ids: list[int]  # of its T positions
    mine: list[int]  # which of them are the user's: the Talker reads these along


class Ear:
    """A clip that is being heard: resampler, log-mel and AuT, each with its state."""

    def __init__(self, model: Boxes, rate: int, window: int) -> None:
        self.model, self.rate, self.samples = model, rate, 0
        self.resampler = Resampler(rate, model.config.audio.mel.sample_rate).to(model.device)
        signal = (model.device, torch.promote_types(model.dtype, torch.float32))
        self.wave = self.resampler.init_state(1, *signal)
        self.mel = model.log_mel.init_state(1, *signal)
        self.aut = model.aut.init_state(1, *signal, window=window)
        self.recent = torch.zeros(RECENT, model.config.audio.output_dim, device=model.device)  # [RECENT, U] AuT's last
        self.rows = 0  # embeddings in all

    def hear(self, samples: Tensor, final: bool = False) -> Windows | None:
        """The windows that `samples` [N] close, for AuT.

        Raises:
            AudioError: longer than the limit, or on `final` too short to be a sound; nothing is changed then.
        """
        heard = self.samples + samples.shape[0]
        if heard > MAX_SECONDS * self.rate:
            raise AudioError(f"the clip is longer than the limit of {MAX_SECONDS:g} seconds; commit it in parts")
        mel = self.model.config.audio.mel
        shortest = mel.n_fft // 2 / mel.sample_rate
        if final and not self._reaches(heard):
            raise AudioError(
                f"the clip is {1000 * heard / self.rate:.1f} ms long; it needs more than {1000 * shortest:g} ms"
            )
        self.samples = heard
        wave = self.resampler(samples[None].to(self.wave.tail), self.wave, final)
        return self.model.aut.close(self.model.log_mel(wave, self.mel, final), self.aut, final)

    def keep(self, rows: Tensor) -> None:
        """What AuT made of it last, of which the latest is kept."""
        self.recent = torch.cat([self.recent, rows.to(self.recent)])[-RECENT:].clone()
        self.rows += len(rows)

    @property
    def is_sound(self) -> bool:
        """Whether what was heard is long enough to be one."""
        return self._reaches(self.samples)

    def _reaches(self, samples: int) -> bool:
        mel = self.model.config.audio.mel
        return int(samples * mel.sample_rate / self.rate + 0.5) > mel.n_fft // 2  # half up, as the resampler does

    def copy(self) -> Ear:
        """An independent copy."""
        new = copy.copy(self)
        new.wave, new.mel, new.aut = self.wave.copy(), self.mel.copy(), self.aut.copy()
        return new

    def states(self) -> dict[str, Any]:
        """Its states by name."""
        return {"ear.wave": self.wave, "ear.mel": self.mel, "ear.aut": self.aut}


class Conversation:
    """One conversation.

    Args:
        model: the boxes.
        system: text of the system turn, if any.
        tools: functions the assistant may call, in OpenAI's form.
        window: seconds AuT attends over, as released (8) when None.
        record: collects every stage by name, for `trace` and `verify`.
        retention: when a user's turn begins and there is little room left, forget the oldest turns until this share of
            the model's positions is in use; None forgets nothing, and a conversation that is full raises CapacityError.
    """

    slice = MAX_SECONDS  # of a whole clip, that are heard at once; less lets others come between

    def __init__(
        self,
        model: Boxes,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        window: int | None = None,
        record: dict[str, list[Tensor]] | None = None,
        retention: float | None = None,
    ) -> None:
        if retention is not None and not 0 < retention <= 1 - TURN_ROOM:
            raise InputError(f"retention is {retention}; expected a share above 0 and at most {1 - TURN_ROOM:g}")
        if window is not None and window not in WINDOWS:
            raise InputError(f"window is {window}; expected one of {', '.join(map(str, WINDOWS))} seconds")
        self.model, self.record, self.retention = model, record, retention
        self.window = window or model.config.audio.window_chunks
        self.generation = 0  # bumped by every answer and by cancel: work of an older one is void
        self.turn = 0
        self.clock = Phases()  # of this turn; it hears before it is to answer
        self.ids: list[int] = []  # everything the Thinker has read or said
        self._users: list[bool] = []  # which of them are the user's, up to the last prompt
        self._rows: list[Tensor] = []  # [n, U] what was heard, in order, if it may have to be read again
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
        self._answering = False  # half an answer is in the caches: nothing else may touch them
        self._ids: list[int] = []  # not yet fed, with what belongs to them
        self._user: list[bool] = []
        self._audio: list[Tensor] = []
        text = system_text(system, tools)
        if text is not None:
            self._add(self.writer.turn("system", text))

    # ------------------------------------------------------------------------------------- listening

    @property
    def newline(self) -> int:
        """Id of the line end after a role and after a turn."""
        return self.model.tokenizer.encode("\n")[0]

    def append_text(self, text: str) -> None:
        """Add text to the user's turn.

        Raises:
            InputError: no text, or not Unicode; nothing is changed then.
        """
        self._at_once(self.text_steps(text))

    def text_steps(self, text: str) -> Steps[None]:
        """`append_text`, to be gone through."""
        self._settled()
        if not isinstance(text, str):
            raise InputError(f"text must be a string, not {type(text).__name__}")
        self._begin_turn(self._positions(text))
        yield from self._end_clip()
        self.writer.text(text)

    def append_audio(self, samples: Any, rate: int = 16000) -> None:
        """Add sound [N] as it arrives, in pieces of any length; windows that close are read by the Thinker at once.

        Raises:
            AudioError: samples that are no sound, or another rate than the clip began with; nothing is changed then.
        """
        self._at_once(self.audio_steps(samples, rate))

    def audio_steps(self, samples: Any, rate: int) -> Steps[None]:
        """`append_audio`, to be gone through: a step is at most `slice` seconds of sound."""
        self._settled()
        x, size = torch.from_numpy(check_samples(samples, rate)), round(self.slice * rate)
        if self.ear is not None and self.ear.rate != rate:
            raise AudioError(
                f"the clip began at {self.ear.rate} Hz and goes on at {rate} Hz; keep one rate or commit first"
            )
        self._begin_turn()
        if self.ear is None:
            self._add(self.writer.open_audio())
            self.ear = Ear(self.model, rate, self.window)
        for start in range(0, len(x), size):
            yield from self._listen(self.ear, x[start : start + size])
        self._prefill()

    def append_clip(self, samples: Any, rate: int) -> None:
        """Add a whole clip [N]: as `append_audio`, but the floor of its log-mel refers to the whole clip's peak.

        Raises:
            AudioError: samples that are no sound.
        """
        self._at_once(self.clip_steps(samples, rate))

    def clip_steps(self, samples: Any, rate: int) -> Steps[None]:
        """`append_clip`, to be gone through: a step is at most `slice` seconds of sound."""
        self._settled()
        yield from self._add_clip((yield from self._encode(check_samples(samples, rate), rate)))

    def _add_clip(self, features: Tensor) -> Steps[None]:
        self._begin_turn()
        yield from self._end_clip()
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
        self._at_once(self.message_steps(message))

    def message_steps(self, message: Mapping[str, Any]) -> Steps[None]:
        """`append_message`, to be gone through: a step is at most `slice` seconds of sound."""
        self._settled()
        if not isinstance(message, Mapping):
            raise InputError('a message must have the form {"role": …, "content": …}')
        role = message.get("role")
        if role == "user":
            read = [read_part(part) for part in parts_of(message)]
            parts = list[str | Tensor]()
            for part in read:
                parts.append(part if isinstance(part, str) else (yield from self._encode(*part)))
            self._begin_turn(sum(self._positions(part) for part in parts if isinstance(part, str)))
            for part in parts:
                yield from self.text_steps(part) if isinstance(part, str) else self._add_clip(part)
            yield from self.commit_steps()
        elif role in ("system", "developer", "assistant", "tool"):
            text = "".join(text_of(part) for part in parts_of(message, optional=role == "assistant"))
            if role == "assistant":
                calls = message.get("tool_calls") or []
                text = assistant_text(text, [tool_call(c) for c in (calls if isinstance(calls, list) else [calls])])
            yield from self.commit_steps()
            if role == "tool":  # the Thinker reads results as the user's words
                yield from self.text_steps(tool_results_text([text]))
                yield from self.commit_steps()
            else:
                self._add(self.writer.turn("assistant" if role == "assistant" else "system", text))
        else:
            raise InputError(f"a message has role {role!r}; expected system, user, assistant or tool")

    def commit(self) -> None:
        """End the user's turn; what was heard of an open window is read now.

        Raises:
            AudioError: the clip is too short to be a sound; append more.
        """
        self._at_once(self.commit_steps())

    def commit_steps(self) -> Steps[None]:
        """`commit`, to be gone through."""
        self._settled()
        if self._open:
            yield from self._end_clip()
            self._add(self.writer.close())
            self._open = False
        self._prefill()

    def _settled(self) -> None:
        """Raise InputError in the middle of an answer."""
        if self._answering:
            raise InputError("an answer is still being given; take its events to the end, or close them, first")

    def _positions(self, text: str) -> int:
        """That a text takes; refuses what is not Unicode."""
        return len(self.model.tokenizer.encode(text))

    def _begin_turn(self, needed: int = 0) -> None:
        if not self._open:
            if self.lacks_room(needed):
                self.forget(needed)
            self._add(self.writer.open("user"), user=True)
            self._open = True

    def _end_clip(self) -> Steps[None]:
        if self.ear is not None:
            yield from self._listen(self.ear, torch.zeros(0), True)
            self.ear = None
            self._add(self.writer.close_audio())

    def _listen(self, ear: Ear, samples: Tensor, final: bool = False) -> Steps[None]:
        """Hear more of a clip; the time that log-mel and AuT take is noted."""
        with self.clock("aut"):
            windows = self._grad_free(ear.hear, samples, final)
        if windows is not None:
            rows = yield windows
            ear.keep(rows)
            self._add_audio(rows)

    def recent(self) -> Tensor:
        """AuT's last embeddings [n, U] of the clip that is being heard, as if it ended here; it goes on as before."""
        return self._at_once(self.recent_steps())

    def recent_steps(self) -> Steps[Tensor]:
        """`recent`, to be gone through."""
        if self.ear is None or not self.ear.is_sound:
            return torch.zeros(0, self.model.config.audio.output_dim, device=self.model.device)
        ear = self.ear.copy()
        windows = self._grad_free(ear.hear, torch.zeros(0), True)
        if windows is not None:
            ear.keep((yield windows))
        return ear.recent[RECENT - min(ear.rows, RECENT) :]

    def _at_once(self, steps: Steps[Made]) -> Made:
        """What steps make, gone through at once."""
        return whole(steps, self._heard_alone)

    def _heard_alone(self, windows: Windows) -> Tensor:
        """Audio embeddings [n, U] of windows."""
        with self.clock("aut"):
            return self._grad_free(lambda: self.model.aut.project(self.model.aut.states(windows)))[0]

    def _encode(self, samples: Samples, rate: int) -> Steps[Tensor]:
        """Audio embeddings [n, U] of a whole clip [N], `slice` seconds of it at a time."""
        model, front = self.model, self.model.config.audio.mel
        dtype = torch.promote_types(model.dtype, torch.float32)
        wave = torch.from_numpy(samples)[None].to(model.device, dtype)
        resampler = Resampler(rate, front.sample_rate).to(model.device)
        tail, held = resampler.init_state(1, model.device, dtype), model.log_mel.init_state(1, model.device, dtype)

        def measure(x: Tensor, last: bool) -> Tensor:
            return model.log_mel(resampler(x, tail, last), held, last)

        mels = []
        for piece, last in _pieces(wave, self.slice * rate):
            with self.clock("aut"):
                mels.append(self._grad_free(measure, piece, last))
            yield
        mel = torch.cat(mels, 1)
        self.note("mel", mel[0])
        peak = mel.amax((1, 2))
        seconds = self.window * max(1, int(self.slice / self.window))  # whole windows
        chunk = model.config.audio.chunk_frames
        state, features = model.aut.init_state(1, model.device, dtype, self.window), []
        for piece, last in _pieces(mel, seconds * chunk):
            windows = self._grad_free(lambda x, end: model.aut.close(x, state, end, peak=peak), piece, last)
            if windows is not None:
                features.append((yield windows))
        return torch.cat(features)

    # -------------------------------------------------------------------------------------- reading

    def _add(self, ids: list[int], user: bool | None = None) -> None:
        self._ids += ids
        self._user += [self._open if user is None else user] * len(ids)

    def _add_audio(self, features: Tensor) -> None:
        if len(features):
            self.note("audio_features", features)
            self._audio.append(features)
            self._add([self.model.config.audio_token_id] * len(features))

    def _prefill(self) -> None:
        self._grad_free(self._read)

    def _read(self) -> None:
        """The Thinker reads what is pending, and the Talker what of it is the user's."""
        for chunk in self.lay_out():
            hidden, accept = self.model.thinker(chunk.x[None], self.thinker)
            self.hidden = hidden[:, -1].clone()  # not a view, which would keep all positions in memory
            self.note("thinker_hidden", accept[0])
            if chunk.mine and self.model.speech is not None:
                y = self.follow(chunk, accept[0, chunk.mine])
                self.note("talker_inputs", y[0])
                self.model.speech.talker(y, self.talker)
                self.user_length += len(chunk.mine)

    def lay_out(self, size: int = PREFILL) -> list[Chunk]:
        """What is pending, for the Thinker to read in this order, `size` positions at once; it counts as read.

        Raises:
            CapacityError: it does not fit; nothing is changed then.
        """
        ids, user, audio = self._ids, self._user, self._audio
        if not ids:
            return []
        self.thinker.reserve(self.thinker.filled + len(ids))
        if self.model.speech is not None:
            self.talker.check(sum(self._users) + sum(user))  # no more: it may be reading in another thread
        self._ids, self._user, self._audio = [], [], []
        place = torch.tensor(ids, device=self.model.device)
        x = self.model.embed_prompt(
            place, torch.cat(audio) if audio else None, torch.tensor(user, device=self.model.device)
        )
        self._users += [False] * (len(self.ids) - len(self._users)) + user  # what it said itself is not the user's
        self._rows += audio if self.retention is not None else []
        self.ids += ids
        self.note("prompt_ids", place)
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        return [Chunk(x[part], ids[part], [i for i, mine in enumerate(user[part]) if mine]) for part in parts]

    def follow(self, chunk: Chunk, accept: Tensor) -> Tensor:
        """The Talker's input [1, n, W] of what is the user's in a chunk, whose states are `accept` [n, U]."""
        return self.model.embed_rows(user_rows([chunk.ids[i] for i in chunk.mine]), accept)

    def lacks_room(self, needed: int = 0) -> bool:
        """Whether the oldest turns are to be forgotten before another begins, whose text takes `needed` positions."""
        used = len(self.ids) + len(self._ids) + needed
        return self.retention is not None and not self._open and used > (1 - TURN_ROOM) * self.thinker.capacity

    def forget(self, needed: int = 0) -> int:
        """Forget the oldest turns until `retention` is kept, or less where `needed` positions would find no room.

        Returns how many positions were forgotten. System turns stay, and so do whole turns of the latest. What stays is
        read again as if it were all that had been said: that is rare, and exact.

        Raises:
            InputError: the conversation has no retention.
        """
        if self.retention is None:
            raise InputError("this conversation forgets nothing; give it a retention")
        keep = int(min(self.retention * self.thinker.capacity, (1 - TURN_ROOM) * self.thinker.capacity - needed))
        self._users += [False] * (len(self.ids) - len(self._users))
        ids, users, heard = self.ids + self._ids, self._users + self._user, [*self._rows, *self._audio]
        opening, audio = self.model.config.im_start_token_id, self.model.config.audio_token_id
        starts = [i for i, (token, user) in enumerate(zip(ids, users, strict=True)) if user and token == opening]
        system = starts[0] if starts else len(ids)
        first = next((i for i in starts if system + len(ids) - i <= keep), len(ids))
        gone = sum(user and token == audio for token, user in zip(ids[:first], users[:first], strict=True))
        self.thinker.truncate(0)
        if self.model.speech is not None:
            self.talker.truncate(0)
        self.ids, self._users, self._rows, self.user_length, self.answer = [], [], [], 0, None
        self._ids, self._user = ids[:system] + ids[first:], users[:system] + users[first:]
        self._audio = [torch.cat(heard)[gone:]] if heard else []
        self._prefill()
        return first - system

    # ------------------------------------------------------------------------------------ being cut off

    def cancel(self) -> None:
        """Stop the answer that is being given (barge-in): its iterator ends with finish = "cancelled"."""
        self.generation += 1

    def truncate(self, ms: float) -> str:
        """Cut the last answer to what was heard after `ms` of its sound, rounded down to a word; returns that text.

        Raises:
            InputError: there is no answer, or `ms` is negative or beyond its sound.
        """
        self._settled()
        said, history = self.answer, len(self.ids) + len(self._ids)
        # after its closing mark and line end nothing may follow: a cut would take it along
        last = said is not None and history == said.start + len(said.text_ids) + 2
        if self.answer is None or self.model.config.code2wav is None or not last:
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
        self._users = self._users[: len(self.ids)]
        unread = self.answer.text_ids[len(self.ids) - self.answer.start : heard]
        self._add([*unread, self.model.config.im_end_token_id, self.newline], user=False)
        self.answer.text_ids = self.answer.text_ids[:heard]
        self.answer.frames = self.answer.frames[: int(ms // frame_ms)]
        return self.model.tokenizer.decode(self.answer.text_ids)

    def _heard(self, frames: int) -> int:
        """Text tokens spoken within `frames`: the Talker takes text faster than it speaks, so time is shared evenly."""
        assert self.answer is not None
        assert self.model.config.code2wav is not None
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

    # ------------------------------------------------------------------------------------- as a value

    def copy(self) -> Self:
        """A fork: both go on independently."""
        self._settled()
        new = copy.copy(self)
        for name in ("thinker", "talker", "mtp", "code2wav"):
            if hasattr(self, name):
                setattr(new, name, getattr(self, name).copy())
        for name in ("ids", "_users", "_rows", "_ids", "_user", "_audio"):
            setattr(new, name, list(getattr(self, name)))
        new.ear = self.ear and self.ear.copy()
        new.answer, new.writer = copy.deepcopy(self.answer), copy.copy(self.writer)
        new.clock = copy.deepcopy(self.clock)
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
        self._settled()
        tensors = {f"{n}.{k}": t for n, state in self._states().items() for k, t in state.tensors().items()}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        if self._rows:
            tensors["heard"] = torch.cat(self._rows)
        if self._audio:
            tensors["pending_audio"] = torch.cat(self._audio)
        if self.ear:
            tensors["recent"] = self.ear.recent
        facts = {name: getattr(self, name) for name in _SAVED}
        facts["answer"] = self.answer and asdict(self.answer)
        facts["writer"] = self.writer.pending
        facts["ear"] = self.ear and {name: getattr(self.ear, name) for name in ("rate", "samples", "rows")}
        write_safetensors(Path(path), tensors, {"session": json.dumps(facts)})

    @classmethod
    def load(cls, model: Boxes, path: str | Path) -> Self:
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
            session.ear.samples, session.ear.rows = facts["ear"]["samples"], facts["ear"]["rows"]
            session.ear.recent = tensors["recent"].to(model.device)
        for name, state in session._states().items():
            state.load({k.removeprefix(name + "."): t for k, t in tensors.items() if k.startswith(name + ".")})
        session.hidden = tensors["hidden"].to(model.device) if "hidden" in tensors else None
        session._rows = [tensors["heard"].to(model.device)] if "heard" in tensors else []
        session._audio = [tensors["pending_audio"].to(model.device)] if "pending_audio" in tensors else []
        return session

    # ---------------------------------------------------------------------------------------- helpers

    def note(self, name: str, value: Tensor) -> None:
        """Keep a stage's value when the conversation is recorded."""
        if self.record is not None:
            self.record.setdefault(name, []).append(value.detach().cpu())

    @staticmethod
    @torch.inference_mode()
    def _grad_free(function: Any, *args: Any) -> Any:
        return function(*args)


def _pieces(x: Tensor, size: float) -> Iterator[tuple[Tensor, bool]]:
    """x [1, T, …] in pieces of `size` steps, and whether one is the last."""
    count = x.shape[1]
    size = int(min(size, count))
    for start in range(0, count, size):
        yield x[:, start : start + size], start + size >= count


_SAVED = ("window", "retention", "generation", "turn", "ids", "user_length", "_open", "_users", "_ids", "_user")


def whole(steps: Steps[Made], hear: Callable[[Windows], Tensor]) -> Made:
    """What steps make, gone through at once; `hear` gives AuT's embeddings [n, U] of windows that they ask for."""
    try:
        asked = next(steps)
        while True:
            asked = next(steps) if asked is None else steps.send(hear(asked))
    except StopIteration as end:
        return end.value


def _word_ends(text: str, longer: str) -> bool:
    """Whether a word ends where `text` ends and `longer` goes on; characters of unspaced scripts stand alone."""
    after = longer[len(text) :][:1]
    if not after or not longer.startswith(text) or category(after).startswith("M"):
        return False  # inside a character, or before a mark that belongs to it
    pair = text[-1:] + after
    return UNSPACED.search(pair) is not None or any(category(char)[0] not in "LMN" for char in pair)
