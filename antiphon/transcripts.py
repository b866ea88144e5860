"""What is said in recordings of any length, in pieces with times, and the files that hold such transcripts.

A long recording is cut at its quietest places into pieces of at most `longest` seconds, and each is heard on its own.
The model names no times: those of a piece are where it was cut out.

Shapes: N samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from antiphon.audio import Samples
from antiphon.conversation import UNSPACED
from antiphon.errors import InputError
from antiphon.generate import Done, Event, Omni, TextDelta

LONGEST = 30.0  # seconds of a piece, unless the checkpoint's config.json says what it was trained on
PAUSE = 0.2  # seconds whose loudness decides where to cut
FASTEST, LEAST_TOKENS = 25, 16  # text tokens that a second of speech can be, and some for none: a loop ends there
ROUND = 60  # characters that a transcript which goes round in circles repeats, at most
LOOP = re.compile(rf"(.{{1,{ROUND}}}?)\1{{6,}}$", re.DOTALL)  # the same over and over: nobody says that, but models do
PROMPTS = {"zh": "请将这段中文语音转换为纯文本。", "": "Transcribe the audio into text."}  # the release's own
HEARD = tuple(
    ["ar", "de", "en", "es", "fr", "id", "it", "ja", "ko", "ms", "nl", "pt", "ru", "th", "tr", "ur", "vi", "yue", "zh"]
)  # as the release does
SPOKEN = ("de", "en", "es", "fr", "it", "ja", "ko", "pt", "ru", "zh")


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording, in seconds, and what is said in it."""

    start: float
    stop: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording of `seconds`."""

    pieces: list[Piece]
    seconds: float
    finish: str = "stop"  # length: the limit of text tokens was reached in a piece; loop: it went round in circles

    @property
    def text(self) -> str:
        """All of it; pieces of languages without spaces follow each other without one."""
        text = ""
        for piece in self.pieces:
            ends = text[-1:], piece.text[:1]
            text += (" " if all(ends) and not all(map(UNSPACED.match, ends)) else "") + piece.text
        return text


def transcribe(
    model: Omni,
    samples: Samples,
    rate: int,
    *,
    language: str = "",
    window: int | None = None,
    longest: float | None = None,
    max_text_tokens: int = 1024,
    progress: Callable[[float, float], None] = lambda done, of: None,
) -> Transcript:
    """Write down what is said in samples [N]; `progress` is told the seconds that are done, and all.

    No piece is longer than `longest` seconds, or than what the checkpoint was trained on.

    Raises:
        AudioError: samples that are no sound. InputError: a language or window that there is not.
    """
    check_language(language, HEARD)
    pieces, finish = [], "stop"
    for start, stop in cut_at_pauses(samples, rate, longest or longest_piece(model)):
        session = model.session(window=window)
        session.append_clip(samples[start:stop], rate)
        session.append_text(PROMPTS.get(language, PROMPTS[""]))
        most = min(max_text_tokens, most_tokens((stop - start) / rate))
        text, ended = written(session.respond(audio=False, max_text_tokens=most))
        pieces.append(Piece(start / rate, stop / rate, text))
        finish = ended if ended != "stop" else finish
        progress(stop / rate, len(samples) / rate)
    return Transcript(pieces, len(samples) / rate, finish)


def written(events: Iterator[Event]) -> tuple[str, str]:
    """Text of an answer that writes something down, and how it ended: "loop" where it began to go round in circles."""
    text = ""
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
            if (once := uncoiled(text)) is not None:
                if isinstance(events, Generator):
                    events.close()
                return once.strip(), "loop"
        elif isinstance(event, Done):
            return event.reply.text.strip(), event.reply.finish
    return text.strip(), "stop"


def uncoiled(text: str) -> str | None:
    """The text with what it ends in over and over said once; None where it does not go round in circles."""
    circle = LOOP.search(text)
    return None if circle is None else text[: circle.start() + len(circle[1])]


def certain(text: str) -> str:
    """The text but for an end that repeats what stands before it: a circle may be beginning."""
    back = text[::-1]
    alike = ((a == b for a, b in zip(back, back[period:], strict=False)) for period in range(1, ROUND + 1))
    return text[: len(text) - max(sum(takewhile(bool, same)) for same in alike)]


def most_tokens(seconds: float) -> int:
    """Text tokens that so long a recording can be written down in at most."""
    return LEAST_TOKENS + round(FASTEST * seconds)


def longest_piece(model: Omni) -> float:
    """Seconds of the longest recording that is heard at once: what config.json says of training, where it does."""
    return model.config.raw.get("longest_clip", LONGEST)


def check_language(language: str, known: Sequence[str]) -> None:
    """Raise InputError for a language that is not known; none is fine."""
    if language and language not in known:
        raise InputError(f"there is no language {language!r}; there are {', '.join(sorted(known))}")


def cut_at_pauses(samples: Samples, rate: int, longest: float) -> list[tuple[int, int]]:
    """Where to cut samples [N], so that no piece is longer than `longest` seconds and pieces end where it is quiet."""
    if len(samples) <= longest * rate:
        return [(0, len(samples))]
    step, cuts = max(1, round(PAUSE * rate / 4)), [0]
    loudness = np.square(samples[: len(samples) // step * step].reshape(-1, step)).mean(1)
    quiet = np.convolve(loudness, np.ones(4), "same")  # of PAUSE around each step
    while (len(samples) - cuts[-1]) / rate > longest:
        first, last = (round((cuts[-1] + share * longest * rate) / step) for share in (0.5, 1))
        place = first + int(np.argmin(quiet[first:last])) if last > first else last
        cuts.append(min(max(place * step, cuts[-1] + step), cuts[-1] + round(longest * rate)))
    return list(zip(cuts, [*cuts[1:], len(samples)], strict=True))


# ----------------------------------------------------------------------------------------------- files


def as_text(transcript: Transcript) -> str:
    """The text alone."""
    return transcript.text + "\n"


def as_json(transcript: Transcript) -> str:
    """Text, seconds and pieces."""
    pieces = [vars(piece) for piece in transcript.pieces]
    about = {"text": transcript.text, "seconds": transcript.seconds, "finish": transcript.finish}
    return json.dumps({**about, "pieces": pieces, "times": "where pieces were cut"}, ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript) -> str:
    """SubRip subtitles, one a piece."""
    lines = [
        f"{i}\n{clock(piece.start, ',')} --> {clock(piece.stop, ',')}\n{piece.text}\n"
        for i, piece in enumerate(transcript.pieces, 1)
    ]
    return "\n".join(lines)


def as_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles, one a piece."""
    lines = [f"{clock(p.start, '.')} --> {clock(p.stop, '.')}\n{p.text}\n" for p in transcript.pieces]
    return "\n".join(["WEBVTT\n\nNOTE times are where pieces were cut\n", *lines])


def clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds."""
    ms = round(1000 * seconds)
    return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
SUBTITLES = ("srt", "vtt")  # forms that players take to be timed by the word
