"""Conversations as the Thinker reads them in training: ids, clips and which ids it should learn to say.

A cut either carries `messages` (OpenAI's form; an audio part names the supervision that holds its sound), or it is one
clip, and its task makes the messages: a question to the clip and the answer that its supervision gives.

    cut ── task ──> messages ── TurnWriter, as in inference ──> ids, clips, said

With the task "heard" nothing is listened to: in the place of a clip stands what an encoder would give that hears
perfectly, its text token by token with blanks between, some of them twice. So the Thinker learns to listen before there
is an encoder.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from antiphon.audio import Samples
from antiphon.chat import TurnWriter, tool_results_text
from antiphon.errors import InputError
from antiphon.tokenizer import Tokenizer
from antiphon.train.data import Example, Mel, load_samples, resample
from antiphon.train.dialog import KINDS, written_question
from antiphon.train.world import LANGUAGES
from antiphon.transcripts import PROMPTS

Message = Mapping[str, Any]
WHICH_LANGUAGE = "Which language is this?"
DESCRIBE = "What do you hear?"
ABOUT = (*KINDS["music"], *KINDS["sound"])  # tasks: what is asked in writing about a clip
HEARD = "heard-"  # before the name of a task: the same, of what is heard perfectly
BLANKS = 12  # at most, after each token of what is heard, in the slowest speech: a second of it gives 13 rows
TWICE = 0.3  # of the tokens are in two rows


@dataclass
class Talk:
    """A conversation laid out: the Thinker's input and what is learnt from it."""

    ids: list[int]
    said: list[bool]  # per id: the assistant's own, to be learnt
    clips: list[Mel]  # raw log-mel [T, F] of each, in the order of their audio ids
    places: list[int]  # of each clip's first id
    user: list[bool]  # per id: of a user's turn, so part of the Talker's prompt
    sound: list[bool]  # per id: a place for a row of the encoder's
    texts: list[list[int]]  # ids of what is said in each clip, or of what AuT writes for music and sounds
    replies: list[Reply]

    def before(self, start: int) -> Talk:
        """The conversation up to its id `start`, which begins an answer."""
        heard = [i for i, place in enumerate(self.places) if place < start]
        clips = [self.clips[i] for i in heard]
        places, texts = self.places[: len(clips)], self.texts[: len(clips)]
        return Talk(
            self.ids[:start], self.said[:start], clips, places, self.user[:start], self.sound[:start], texts, []
        )


@dataclass(frozen=True)
class Reply:
    """An answer that is also there as sound."""

    start: int  # where its ids begin, and
    stop: int  # end
    supervision: int
    voice: str


def messages_of(example: Example) -> list[Message]:
    """The messages of a cut, by its task: its own ("talk", "heard", "text": sound as text), or a question.

    Raises:
        InputError: a task that is none, or one that the cut has nothing for.
    """
    messages = (example.cut.custom or {}).get("messages")
    if example.task in ("talk", "text") or (example.task == "heard" and messages):
        if not messages:
            raise InputError(f"cut {example.cut.id} carries no messages; its task cannot be {example.task}")
        said: list[str] = [str(s.text) for s in example.cut.supervisions]
        return [_as_text(m, said) for m in messages] if example.task == "text" else messages
    task = example.task.removeprefix(HEARD)
    if task not in QUESTIONS:
        raise InputError(f"there is no task {example.task!r}; expected one of talk, text, {', '.join(QUESTIONS)}")
    question, answer = QUESTIONS[task](example)
    asked = [{"type": "audio", "supervision": 0}, {"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _about(kind: str) -> Callable[[Example], tuple[str, str]]:
    """What is asked in writing about a clip of music or of a sound, by what its labels say."""

    def ask(example: Example) -> tuple[str, str]:
        labels = example.cut.supervisions[0].custom or {}
        if kind not in labels:
            raise InputError(f"cut {example.cut.id} does not say its {kind}; its task cannot be {kind}")
        return written_question(kind, labels, example.cut.id)

    return ask


QUESTIONS: dict[str, Callable[[Example], tuple[str, str]]] = {
    "transcribe": lambda e: (PROMPTS.get(e.language or "", PROMPTS[""]), e.text),
    "heard": lambda e: (PROMPTS.get(e.language or "", PROMPTS[""]), e.text),
    "language": lambda e: (WHICH_LANGUAGE, LANGUAGES[e.language or "en"].name),
    "describe": lambda e: (DESCRIBE, e.text),
    **{kind: _about(kind) for kind in ABOUT},
}


def _as_text(message: Message, said: Sequence[str]) -> Message:
    """The message with its sound as text."""
    if message["role"] != "user":
        return message
    return {"role": "user", "content": " ".join(said[int(part["supervision"])] for part in message["content"])}


def lay_out(
    example: Example, tokenizer: Tokenizer, hear: Callable[[Samples], Mel], tokens: Callable[[int], int], rate: int
) -> Talk:
    """An example as ids and clips: `hear` gives the log-mel of one at `rate`, `tokens` how many audio tokens its frames
    become.
    """
    talk, writer = Talk([], [], [], [], [], [], [], []), TurnWriter(tokenizer)
    sound = None

    def add(ids: list[int], said: bool = False, user: bool = False, audio: bool = False) -> None:
        talk.ids += ids
        talk.said += [said] * len(ids)
        talk.user += [user] * len(ids)
        talk.sound += [audio] * len(ids)

    for message in messages_of(example):
        role, content = message["role"], message["content"]
        if role == "assistant":
            add(writer.open_reply())
            start = len(talk.ids)
            add(tokenizer.encode(content), said=True)
            if "supervision" in message:
                talk.replies.append(Reply(start, len(talk.ids), message["supervision"], message["voice"]))
            add([tokenizer.config.im_end_token_id], said=True)
            add(tokenizer.encode("\n"))
            continue
        user = role != "system"
        add(writer.open("user" if user else "system"), user=user)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                writer.text(tool_results_text([part["text"]]) if role == "tool" else part["text"])
                continue
            spoken = example.cut.supervisions[part["supervision"]]
            text = tokenizer.encode(spoken.text)
            add(writer.open_audio(), user=user)
            if example.task == "heard" or example.task.startswith(HEARD):
                add(with_blanks(text, tokenizer.config.audio_token_id, spoken.id), user=user)
            else:
                sound = load_samples(example.cut, example.cut.sampling_rate) if sound is None else sound
                talk.places.append(len(talk.ids))
                talk.texts.append(text)
                talk.clips.append(hear(cut_out(example, sound, int(part["supervision"]), rate)))
                add([tokenizer.config.audio_token_id] * tokens(len(talk.clips[-1])), user=user, audio=True)
            add(writer.close_audio(), user=user)
        add(writer.close(), user=user)
    return talk


def with_blanks(ids: Sequence[int], blank: int, name: str) -> list[int]:
    """Ids as an encoder spells them: some twice, and blanks, more in slow speech; the same for the same name."""
    draw = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    most = 1 + int(BLANKS * draw.random() ** 2)  # blanks after an id; most speech is quick
    spaced = [blank] * int(draw.integers(most + 1))
    for i, following in zip(ids, [*ids[1:], blank], strict=False):
        spaced += [i] * (1 + (draw.random() < TWICE))
        spaced += [blank] * max(int(draw.integers(most + 1)), i == following)
    return spaced


def cut_out(example: Example, sound: Samples, supervision: int, rate: int) -> Samples:
    """The samples of one supervision at `rate`, resampled on its own as in inference; `sound` is the whole cut's."""
    part, own = example.cut.supervisions[supervision], example.cut.sampling_rate
    return resample(sound[round(part.start * own) : round(part.end * own)], own, rate)
