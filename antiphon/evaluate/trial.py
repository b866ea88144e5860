"""What `antiphon evaluate` measures with: a model, its test sets, and the ways of the product to ask it.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.audio import Samples
from antiphon.generate import Omni, Session, collect
from antiphon.train.data import Example, load_samples, read_cuts
from antiphon.train.talks import cut_out
from antiphon.transcripts import HEARD, PROMPTS, most_tokens, transcribe, written

PIECE = 0.08  # seconds of sound that arrive at once in a stream
Track = Callable[[Sequence[Any], str], Iterable[Any]]  # goes over items and shows how far it is


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, what came out, and what it should be."""

    what: str
    seen: str
    target: str = ""


@dataclass(frozen=True)
class Trial:
    """A model, the test sets and how many clips of each language to take; None is all."""

    model: Omni
    cuts: Path
    limit: int | None
    track: Track

    def examples(self, name: str, languages: Sequence[str] = (), task: str = "transcribe") -> list[Example]:
        """Clips of a set of the corpus, in order."""
        return self.first_of(read_cuts(f"{name}.jsonl.gz", self.cuts), languages, task)

    def first_of(self, cuts: Sequence[Any], languages: Sequence[str] = (), task: str = "transcribe") -> list[Example]:
        """The first `limit` cuts of each language, in order; of those languages alone, if any are named."""
        taken: dict[str, int] = {}
        found = []
        for cut in cuts:
            example = Example(cut, task)
            language = (cut.custom or {}).get("language") or example.language or ""
            taken[language] = taken.get(language, 0) + 1
            within = self.limit is None or taken[language] <= self.limit
            if within and (not languages or language in languages):
                found.append(example)
        return found

    def hear(self, examples: Sequence[Example], what: str, **options: Any) -> list[tuple[str, str, str | None]]:
        """(said, heard, language) of each example."""
        return [(e.text, self.heard(*sound(e), e.language, **options), e.language) for e in self.track(examples, what)]

    def heard(
        self, samples: Samples, rate: int, language: str | None, window: int | None = None, streamed: bool = False
    ) -> str:
        """The transcript of samples [N]: of a whole clip, or of one that arrives in pieces of 80 ms.

        A language that the model has no name for is heard as if none were given.
        """
        known = language if language in HEARD else ""
        if not streamed:
            return transcribe(self.model, samples, rate, language=known, window=window).text
        session = self.model.session(window=window)
        for start in range(0, len(samples), round(PIECE * rate)):
            session.append_audio(samples[start : start + round(PIECE * rate)], rate)
        session.append_text(PROMPTS.get(known, PROMPTS[""]))
        return written(session.respond(audio=False, max_text_tokens=most_tokens(len(samples) / rate)))[0]

    def ask(self, example: Example, question: str) -> str:
        """The answer to a written question about a clip."""
        session = self.model.session()
        session.append_clip(*sound(example))
        session.append_text(question)
        return collect(session.respond(audio=False, max_text_tokens=64)).text


def sound(example: Example) -> tuple[Samples, int]:
    """Samples of an example at its own rate."""
    return load_samples(example.cut, example.cut.sampling_rate), example.cut.sampling_rate


def percent(share: float) -> str:
    """As a percentage."""
    return f"{100 * share:.1f} %"


def mean(rates: dict[str, float]) -> float:
    """Mean over languages."""
    return sum(rates.values()) / max(1, len(rates))


def by_language(rates: dict[str, float]) -> str:
    """All rates, in percent."""
    return " ".join(f"{language} {100 * rate:.1f}" for language, rate in rates.items())


def asked(model: Omni, example: Example, messages: Sequence[Any]) -> Session:
    """A session that was told the messages of a cut."""
    session, rate = model.session(), model.config.audio.mel.sample_rate
    whole = load_samples(example.cut, example.cut.sampling_rate)
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "audio", "audio": (cut_out(example, whole, int(part["supervision"]), rate), rate)}
                if part["type"] == "audio"
                else part
                for part in content
            ]
        session.append_message({"role": message["role"], "content": content})
    return session
