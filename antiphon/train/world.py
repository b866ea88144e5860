"""The closed world that tiny knows: sentences in 19 languages, as written and as spoken.

A language is one file in `languages/`: lists of words (most of them named from Unicode CLDR), sentence templates with
slots that the lists fill, which templates are held out, and how words are read where the speech engine cannot know.
Words are separated by spaces in these files, also in languages that are written without.

Splits are kept apart by construction: a hash of the text says whether a filling belongs to training, validation or
tests.

    train     templates of training, fillings of training
    valid     templates of training, fillings of validation
    sentence  templates of training, fillings of the tests
    template  templates that training never uses, fillings of the tests

and beside these, for training alone

    mixed     pieces of training's templates, in an order that no template has, fillings of training
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from babel import Locale
from babel.lists import format_list
from babel.numbers import get_currency_name
from babel.units import format_unit
from num2words import num2words

from antiphon.errors import InputError

T = TypeVar("T")
Split = Literal["train", "valid", "sentence", "template", "mixed"]
SPLITS: tuple[Split, ...] = ("train", "valid", "sentence", "template")
MIXED: Split = "mixed"
SHARES = 16  # of the fillings two belong to the tests and one to validation
TRIES = 200  # this often in a row nothing new: the templates are exhausted and texts may repeat
FOLDER = Path(__file__).parent
SHARE: dict[Split, str] = {"train": "train", "valid": "valid", "sentence": "test", "template": "test", "mixed": "train"}
PIECES, PIECE = 4, 4  # of a mixed line at most, and words of one
SLOT = re.compile(r"\{([a-z_]+)(\d?)\}")
WORD = re.compile(r"[^\s,:،、]+")


@dataclass(frozen=True)
class Language:
    """A language of the world: its code and names, its espeak-ng voice, and how it is written and scored."""

    code: str
    name: str  # in English
    endonym: str
    espeak: str
    characters: bool = False  # error rates count characters, not words
    spaces: bool = True  # words are written apart


LANGUAGES: dict[str, Language] = {
    language.code: language
    for language in (
        Language("ar", "Arabic", "العربية", "ar"),
        Language("de", "German", "Deutsch", "de"),
        Language("en", "English", "English", "en-us"),
        Language("es", "Spanish", "español", "es"),
        Language("fr", "French", "français", "fr"),
        Language("id", "Indonesian", "Indonesia", "id"),
        Language("it", "Italian", "italiano", "it"),
        Language("ja", "Japanese", "日本語", "ja", characters=True, spaces=False),
        Language("ko", "Korean", "한국어", "ko", characters=True),
        Language("ms", "Malay", "Melayu", "ms"),
        Language("nl", "Dutch", "Nederlands", "nl"),
        Language("pt", "Portuguese", "português", "pt-br"),
        Language("ru", "Russian", "русский", "ru"),
        Language("th", "Thai", "ไทย", "th", characters=True, spaces=False),
        Language("tr", "Turkish", "Türkçe", "tr"),
        Language("ur", "Urdu", "اردو", "ur"),
        Language("vi", "Vietnamese", "Tiếng Việt", "vi"),
        Language("yue", "Cantonese", "粵語", "yue", characters=True, spaces=False),
        Language("zh", "Chinese", "中文", "cmn", characters=True, spaces=False),
    )
}


@dataclass(frozen=True)
class Sentence:
    """What is said: `text` as it is written, `spoken` as the speech engine reads it, `words` in lower case."""

    text: str
    spoken: str
    language: str
    template: str  # such as "en.weekday.3"
    split: Split
    words: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """One language's file: `lists` of fillings, `templates` by id, and how words are read aloud."""

    lists: Mapping[str, Sequence[str]]
    templates: Mapping[str, str]
    held_out: frozenset[str]
    readings: Mapping[str, str]

    def templates_of(self, split: Split) -> list[str]:
        """Ids of the templates that `split` uses."""
        return [name for name in self.templates if (name in self.held_out) == (split == "template")]


def sentences(language: str, split: Split, count: int, seed: int) -> list[Sentence]:
    """`count` sentences, the same for the same arguments; none twice while there are others.

    Raises:
        InputError: no such language or split.
    """
    return [sentence_at(language, split, seed, at) for at in find_sentences(language, split, count, seed)]


def find_sentences(language: str, split: Split, count: int, seed: int) -> list[int]:
    """Which draws of a seed the sentences are: all that has to be known of the others to make one of them."""
    load_world(language)
    check_split(split)
    found: dict[str, int] = {}
    repeated: list[int] = []
    missed = 0
    for at in itertools.count():
        if len(found) + len(repeated) >= count:
            break
        text = write(_line_at(language, split, seed, at)[1].split(), language)
        if share_of(text) != SHARE[split]:
            continue
        missed = missed + 1 if text in found else 0
        if missed == 0:
            found[text] = at
        elif missed > TRIES:
            repeated.append(found[text])
    return [*found.values(), *repeated]


def sentence_at(language: str, split: Split, seed: int, at: int) -> Sentence:
    """The sentence of one draw."""
    name, line = _line_at(language, split, seed, at)
    return say(line, language, f"{language}.{name}", split)


def _line_at(language: str, split: Split, seed: int, at: int) -> tuple[str, str]:
    """The template of a draw, and the template filled."""
    world, draw = load_world(language), Draw(f"{language}/{split}/{seed}/{at}")
    if split == MIXED:
        return MIXED, mixed(world, draw)
    name = draw.choose(world.templates_of(split))
    return name, fill(world.templates[name], world.lists, draw)


def mixed(world: World, draw: Draw) -> str:
    """A line of pieces of sentences: who only knows its sentences by their beginnings does not get through it.

    A world of some thirty templates is soon known by heart, and then what has another form is heard as one of them.
    """
    pieces: list[str] = []
    left = 1 + draw.below(PIECES)
    while left > 0 or not words_of(" ".join(pieces)):  # a piece may be a dash
        left -= 1
        words = fill(world.templates[draw.choose(world.templates_of("train"))], world.lists, draw).split()
        start = draw.below(len(words))
        pieces += words[start : start + 1 + draw.below(PIECE)]
    return " ".join(pieces).rstrip(",،、: ")


def vocabulary(language: str, split: Split | None = None) -> list[str]:
    """Word types of a language, sorted, in lower case; of one split if it is given.

    Raises:
        InputError: no such language or split.
    """
    world = load_world(language)
    names = world.templates if split is None else world.templates_of(check_split(split))
    return sorted({word for name in names for word in template_words(world.templates[name], world.lists)})


def template_words(template: str, lists: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Every word that the template can give."""
    for token in template.split():
        slots = [lists[name] for name, _ in SLOT.findall(token)]
        for fillings in itertools.product(*slots):
            left = iter(fillings)
            yield from words_of(SLOT.sub(lambda _, left=left: next(left), token))


def check_split(split: str) -> Split:
    """`split`, if it is one.

    Raises:
        InputError: it is not.
    """
    for known in (*SPLITS, MIXED):
        if split == known:
            return known
    raise InputError(f"there is no split {split!r}; expected one of {', '.join((*SPLITS, MIXED))}")


# ------------------------------------------------------------------------------------------------ drawing


class Draw:
    """Choices that follow from one text: the digits of its hash in a mixed base."""

    def __init__(self, key: str) -> None:
        self.rest = int.from_bytes(hashlib.sha512(key.encode()).digest())

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        self.rest, number = divmod(self.rest, count)
        return number

    def choose(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.below(len(options))]


def share_of(text: str) -> str:
    """Who a text belongs to, train, valid or test, whatever template, seed or count it came from."""
    number = int.from_bytes(hashlib.sha256(text.casefold().encode()).digest()[:8]) % SHARES
    return {0: "test", 8: "test", 1: "valid"}.get(number, "train")


def in_tests(text: str) -> bool:
    """Whether a text belongs to the tests."""
    return share_of(text) == "test"


def fill(template: str, lists: Mapping[str, Sequence[str]], draw: Draw) -> str:
    """The template with its slots filled; {food} and {food2} are never the same."""
    used: dict[str, list[str]] = {}

    def choose(slot: re.Match[str]) -> str:
        earlier = used.setdefault(slot[1], [])
        choice = draw.choose([x for x in lists[slot[1]] if x not in earlier] if earlier else lists[slot[1]])
        earlier.append(choice)
        return choice

    return SLOT.sub(choose, template)


# ------------------------------------------------------------------------------------------------ writing


def say(line: str, language: str, template: str, split: Split) -> Sentence:
    """A sentence from a line with spaces between its words."""
    tokens = line.split()
    return Sentence(write(tokens, language), read(tokens, language), language, template, split, words_of(line))


def write(tokens: Sequence[str], language: str) -> str:
    """Words in the orthography of `language`: a capital first, no spaces where the script has none."""
    text = (" " if LANGUAGES[language].spaces else "").join(tokens)
    return text[:1].upper() + text[1:]


def read(tokens: Sequence[str], language: str) -> str:
    """Words as the speech engine reads them."""
    readings = load_world(language).readings
    if not readings:
        return write(tokens, language)
    return WORD.sub(lambda word: readings.get(word[0], word[0]), " ".join(tokens))


def words_of(line: str) -> tuple[str, ...]:
    """Words of a line in lower case, without punctuation."""
    return tuple(line.casefold().translate(_BLANKS).split())


class _Blanks(dict[int, str]):
    """For `str.translate`: punctuation and symbols as spaces."""

    def __missing__(self, code: int) -> str:
        self[code] = " " if unicodedata.category(chr(code))[0] in "PS" else chr(code)
        return self[code]


_BLANKS = _Blanks()


# ------------------------------------------------------------------------------------------------ the files


@cache
def load_world(language: str) -> World:
    """The world of a language.

    Raises:
        InputError: no such language.
    """
    if language not in LANGUAGES:
        raise InputError(f"tiny does not know the language {language!r}; it knows {', '.join(LANGUAGES)}")
    data = read_yaml("languages", language)
    return World(
        expand(data["lists"], language),
        data["templates"],
        frozenset(data["held_out"]),
        data.get("readings", {}),
    )


@cache
def read_yaml(folder: str, language: str) -> dict:
    """A data file of this package; every scalar is text, since yes, no and on are words here."""
    return yaml.load((FOLDER / folder / f"{language}.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)


def expand(data: Mapping[str, Sequence[str] | str], language: str) -> dict[str, Sequence[str]]:
    """Lists of fillings: those written out, and those named, such as "territories DE FR" or "numbers 0-100"."""
    lists: dict[str, Sequence[str]] = {}
    for name, entry in data.items():
        lists[name] = list(named(entry, language, lists)) if isinstance(entry, str) else entry
    return lists


def named(entry: str, language: str, lists: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The fillings that "KIND arguments" names; "KIND arguments of NUMBERS" counts them."""
    head, _, tail = entry.partition(" of ")
    kind, *arguments = head.split()
    locale = Locale.parse(language)
    if kind == "lists":
        return (enumerate_words(words, language) for n in (2, 3) for words in itertools.permutations(lists[tail], n))
    if kind in ("prices", "measures"):
        make = price if kind == "prices" else measure
        return (make(number, what, language) for what in arguments for number in numbers(tail))
    if kind in ("numbers", "ordinals", "years"):
        return (number_words(n, language, kind) for n in numbers(head.partition(" ")[2]))
    names: Mapping = {
        "weekdays": locale.days["format"]["wide"],
        "months": locale.months["format"]["wide"],
        "territories": locale.territories,
        "languages": locale.languages,
    }[kind]
    keys = arguments or (LANGUAGES if kind == "languages" else sorted(names))
    return (apart(names[key]) for key in keys)


def numbers(text: str) -> Iterator[int]:
    """Numbers of "1-5 10 20"."""
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def apart(text: str) -> str:
    """Hyphens and special spaces as spaces, so that word types stay few; Arabic script without its vowel marks."""
    return " ".join(re.sub(r"[\u064b-\u0652]", "", re.sub(r"[-‐‑–\u00a0\u202f]", " ", text)).split())


def enumerate_words(words: Sequence[str], language: str) -> str:
    """A list of words as CLDR joins them."""
    if LANGUAGES[language].spaces:
        return format_list(words, locale=language)
    return " ".join(format_list([f" {word} " for word in words], locale=language).replace("、", " 、 ").split())


def price(number: int, currency: str, language: str) -> str:
    """An amount of money, the name in the plural that the number asks for."""
    return f"{number_words(number, language)} {apart(get_currency_name(currency, number, language))}"


def measure(number: int, unit: str, language: str) -> str:
    """A number with a unit, such as length-kilometer."""
    shown = format_unit(number, unit, "long", locale=language)
    return apart(shown.replace(str(number), f" {number_words(number, language)} "))


@cache
def number_words(number: int, language: str, kind: str = "numbers") -> str:
    """A number in words: the language's own table, or num2words."""
    table = number_table(language)
    if not table:
        to = {"numbers": "cardinal", "ordinals": "ordinal", "years": "year"}[kind]
        said = apart(num2words(number, lang={"pt": "pt_BR"}.get(language, language), to=to))
        return said.replace(" و ", " و") if language == "ar" else said  # "and" is written to the next word
    units, tens = table["units"], table["tens"]
    if number < len(units):
        return units[number]
    ten, unit = divmod(number, 10)
    one = table.get("one_after_ten", units[1])
    return " ".join([tens[ten - 2], *([one if unit == 1 else units[unit]] if unit else [])])


@cache
def number_table(language: str) -> dict:
    """`units` from zero on and `tens` from twenty to a hundred, where num2words does not serve; else nothing."""
    return read_yaml("languages", language).get("numbers", {})
