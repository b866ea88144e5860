"""Conversations as the Thinker reads them in training: ids, clips and which ids it should learn to say.

A cut either carries `messages` (OpenAI's form; an audio part names the supervision that holds its sound), or it is one
clip, and its task makes the messages: a question to the clip and the answer that its supervision gives.

    cut ── task ──> messages ── TurnWriter, as in inference ──> ids, clips, said
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from antiphon.audio import Samples
from antiphon.chat import TurnWriter, tool_results_text
from antiphon.errors import InputError
from antiphon.tokenizer import Tokenizer
from antiphon.train.data import Example, load_samples, resample
from antiphon.train.world import LANGUAGES
from antiphon.transcripts import PROMPTS

Message = Mapping[str, Any]
WHICH_LANGUAGE = "Which language is this?"
DESCRIBE = "What do you hear?"


@dataclass
class Talk:
    """A conversation laid out: the Thinker's input and what is learnt from it."""

    ids: list[int]
    said: list[bool]  # per id: the assistant's own, to be learnt
    clips: list[Samples]  # at the front end's rate, in the order of their audio ids
    places: list[int]  # of each clip's first id
    user: list[bool]  # per id: of a user's turn, so part of the Talker's prompt
    replies: list[Reply]

    def before(self, start: int) -> Talk:
        """The conversation up to its id `start`, which begins an answer."""
        heard = [i for i, place in enumerate(self.places) if place < start]
        clips = [self.clips[i] for i in heard]
        return Talk(self.ids[:start], self.said[:start], clips, self.places[: len(clips)], self.user[:start], [])


@dataclass(frozen=True)
class Reply:
    """An answer that is also there as sound."""

    start: int  # where its ids begin, and
    stop: int  # end
    supervision: int
    voice: str


def messages_of(example: Example) -> list[Message]:
    """The messages of a cut, by its task: its own ("talk", or "text" with all sound as text), or a question to a clip.

    Raises:
        InputError: a task that is none, or one that the cut has nothing for.
    """
    if example.task in ("talk", "text"):
        messages = (example.cut.custom or {}).get("messages")
        if not messages:
            raise InputError(f"cut {example.cut.id} carries no messages; its task cannot be {example.task}")
        said: list[str] = [str(s.text) for s in example.cut.supervisions]
        return [_as_text(m, said) for m in messages] if example.task == "text" else messages
    if example.task not in QUESTIONS:
        raise InputError(f"there is no task {example.task!r}; expected one of talk, text, {', '.join(QUESTIONS)}")
    question, answer = QUESTIONS[example.task](example)
    asked = [{"type": "audio", "supervision": 0}, {"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


QUESTIONS: dict[str, Callable[[Example], tuple[str, str]]] = {
    "transcribe": lambda e: (PROMPTS.get(e.language or "", PROMPTS[""]), e.text),
    "language": lambda e: (WHICH_LANGUAGE, LANGUAGES[e.language or "en"].name),
    "describe": lambda e: (DESCRIBE, e.text),
}


def _as_text(message: Message, said: Sequence[str]) -> Message:
    """The message with its sound as text."""
    if message["role"] != "user":
        return message
    return {"role": "user", "content": " ".join(said[int(part["supervision"])] for part in message["content"])}


def lay_out(example: Example, tokenizer: Tokenizer, tokens: Callable[[int], int], rate: int) -> Talk:
    """An example as ids and clips; `tokens(samples)` says how many audio tokens a clip at `rate` becomes."""
    talk, writer = Talk([], [], [], [], [], []), TurnWriter(tokenizer)
    sound = None

    def add(ids: list[int], said: bool = False, user: bool = False) -> None:
        talk.ids += ids
        talk.said += [said] * len(ids)
        talk.user += [user] * len(ids)

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
            sound = load_samples(example.cut, example.cut.sampling_rate) if sound is None else sound
            talk.places.append(len(talk.ids))
            talk.clips.append(cut_out(example, sound, int(part["supervision"]), rate))
            add(writer.audio(tokens(len(talk.clips[-1]))), user=user)
        add(writer.close(), user=user)
    return talk


def cut_out(example: Example, sound: Samples, supervision: int, rate: int) -> Samples:
    """The samples of one supervision at `rate`, resampled on its own as in inference; `sound` is the whole cut's."""
    part, own = example.cut.supervisions[supervision], example.cut.sampling_rate
    return resample(sound[round(part.start * own) : round(part.end * own)], own, rate)
