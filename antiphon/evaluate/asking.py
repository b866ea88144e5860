"""How a model is asked what a set asks: one function per task, all through sessions, greedily.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from antiphon.audio import Samples
from antiphon.errors import InputError
from antiphon.evaluate.items import Clip, Item
from antiphon.evaluate.voice import said
from antiphon.generate import REFERENCE, Omni
from antiphon.transcripts import HEARD, transcribe, written

Sound = tuple[Samples, int]
LONGEST_ANSWER = 512  # text tokens


@dataclass(frozen=True)
class Response:
    """What a model made of an item: a text, or a sound and the recording whose voice it should have."""

    text: str = ""
    sound: Sound | None = None
    like: Sound | None = None


@dataclass(frozen=True)
class Asked:
    """A model and how it is asked."""

    model: Omni
    window: int | None = None
    voice: str | None = None  # says the texts of sets for cloning, instead of the recordings' voices

    def check(self, items: list[Item]) -> None:
        """Refuse what the model cannot do before anything is computed.

        Raises:
            InputError: it has no such voice, cannot clone, or cannot speak.
        """
        if not any(item.task == "clone" for item in items):
            return
        self.model.speaking()
        if self.voice is None:
            try:
                _ = self.model.speaker_encoder
            except InputError as error:
                raise InputError(f"{error}; give one of them as --voice and only the words are measured") from None
        elif self.voice not in self.model.voices:
            raise InputError(f"there is no voice {self.voice!r}; there are {', '.join(self.model.voices)}")


def recognise(asked: Asked, item: Item) -> Response:
    """What is said in a clip, written down."""
    return Response(written_down(asked, clip_of(item).read(), item.language))


def written_down(asked: Asked, sound: Sound, language: str | None) -> str:
    """What the model hears in a sound; it is told the language where it knows it."""
    known = language if language in HEARD else ""
    return transcribe(asked.model, *sound, language=known or "", window=asked.window).text


def clone(asked: Asked, item: Item) -> Response:
    """A text in the voice of a recording, or in one of the model's own where one was asked for."""
    if asked.voice is not None:
        return speak(asked, item)
    samples, rate = clip_of(item).read()
    like = samples[: int(REFERENCE[1] * rate)], rate
    return Response(sound=said(asked.model, item.text, asked.model.clone(*like)), like=like)


def speak(asked: Asked, item: Item) -> Response:
    """A text in a voice of the model's own."""
    return Response(sound=said(asked.model, item.text, asked.voice or next(iter(asked.model.voices))))


def answer(asked: Asked, item: Item) -> Response:
    """The text of an answer to a clip, and to what is asked after it in writing, if anything is."""
    session = asked.model.session(window=asked.window)
    session.append_clip(*clip_of(item).read())
    if item.question:
        session.append_text(item.question)
    return Response(written(session.respond(audio=False, max_text_tokens=LONGEST_ANSWER))[0])


def clip_of(item: Item) -> Clip:
    """The sound of an item that has one."""
    if item.clip is None:
        raise InputError(f"{item.name} has no sound; it should have been left out")
    return item.clip


TASKS: dict[str, Callable[[Asked, Item], Response]] = {
    "recognise": recognise,
    "clone": clone,
    "speak": speak,
    "tag": answer,
    "choose": answer,
    "chat": answer,
}
