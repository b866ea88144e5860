"""Which answers derail: they are read back by the model's own AuT and Thinker, and held against what was to be said.

An answer derails if it loses its text (too much of it is not heard) or runs away (it lasts far longer than its text).
Of an answer that was cut off at the limit, what had not been said by then is not missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from antiphon.bench.load import Answered
from antiphon.conversation import TOKENS_PER_SECOND, UNSPACED
from antiphon.generate import Omni, Reply
from antiphon.train.commands import needs_extra
from antiphon.transcripts import transcribe

LOST = 0.5  # of the words (characters, where there are no spaces) that are not heard: the text is lost
RUNAWAY = 2.5  # times as long as its text usually lasts
PAUSE = 1.0  # seconds that any answer may last beside


@dataclass(frozen=True)
class ReadBack:
    """One answer as it was to be said and as it is heard."""

    said: str
    heard: str
    missing: float  # share of what was said
    runaway: bool

    @property
    def derails(self) -> bool:
        """Whether it is another thing than it was to be."""
        return self.runaway or self.missing > LOST


def read_back(model: Omni, reply: Reply) -> ReadBack:
    """What is heard of an answer.

    Raises:
        InputError: the extra is missing that texts are compared with.
    """
    said = model.tokenizer.decode(reply.spoken_ids)
    heard = transcribe(model, reply.audio, reply.sample_rate).text if len(reply.audio) else ""
    seconds = len(reply.audio) / reply.sample_rate
    runaway = seconds > RUNAWAY * len(reply.spoken_ids) / TOKENS_PER_SECOND + PAUSE
    return ReadBack(said, heard, missing(said, heard, cut_off=reply.finish != "stop"), runaway)


def missing(said: str, heard: str, cut_off: bool = False) -> float:
    """The share of what was said that is not heard; what is cut off at the end does not count, if anything is heard."""
    with needs_extra("reading answers back"):
        from rapidfuzz.distance import Levenshtein

        from antiphon.error_rates import units
    language = "zh" if UNSPACED.search(said) else None  # any that is counted in characters
    wanted = units(said, language)
    edits = list(Levenshtein.opcodes(wanted, units(heard, language)))
    if cut_off and len(edits) > 1 and edits[-1].tag == "delete":
        wanted = wanted[: edits.pop().src_start]
    lost = sum(edit.src_end - edit.src_start for edit in edits if edit.tag in ("delete", "replace"))
    return lost / len(wanted) if wanted else 0.0


def derailed(model: Omni, answers: Iterable[Answered]) -> dict[str, Any]:
    """How many of the answers derail, and why."""
    read = [read_back(model, answer.reply) for answer in answers if answer.reply is not None]
    return {
        "read_back": len(read),
        "derailed": sum(one.derails for one in read),
        "lost": sum(one.missing > LOST for one in read),
        "runaway": sum(one.runaway for one in read),
        "missing": sum(one.missing for one in read) / max(len(read), 1),
    }
