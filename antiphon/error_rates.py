"""Error rates: how texts are normalized before they are compared, and what is counted.

Normalization keeps combining marks (Thai, Urdu, Arabic vowels), which common normalizers strip: NFKC, case folded,
punctuation and symbols gone. Languages written without spaces between words are counted in characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

BY_CHARACTER = frozenset({"zh", "yue", "ja", "th", "ko"})


def normalize_text(text: str) -> str:
    """`text` as it is compared: NFKC, case folded, punctuation (P*) and symbols (S*) as spaces, single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(c)[0] in "PSZ" else c for c in folded)
    return " ".join(kept.split())


def units(text: str, language: str | None) -> list[str]:
    """What an error rate counts: the characters without spaces, or the words."""
    text = normalize_text(text)
    return list(text.replace(" ", "")) if language in BY_CHARACTER else text.split()


@dataclass
class ErrorRate:
    """Edits over units, summed over texts."""

    edits: int = 0
    length: int = 0

    def add(self, reference: str, heard: str, language: str | None) -> None:
        """Count one pair."""
        wanted = units(reference, language)
        self.edits += Levenshtein.distance(wanted, units(heard, language))
        self.length += len(wanted)

    @property
    def rate(self) -> float:
        """Edits per unit; 0 where there was nothing to say."""
        return self.edits / self.length if self.length else 0.0


def error_rates(pairs: Iterable[tuple[str, str, str | None]]) -> dict[str, float]:
    """Rate by language of (reference, heard, language)."""
    rates: dict[str, ErrorRate] = {}
    for reference, heard, language in pairs:
        rates.setdefault(language or "none", ErrorRate()).add(reference, heard, language)
    return {language: rate.rate for language, rate in sorted(rates.items())}
