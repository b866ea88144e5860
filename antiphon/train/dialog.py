"""Conversations in ten languages, as asked and answered aloud: sums, calendars, words, clips and tools.

A language is one file in `dialogs/`, beside its words in `languages/`: questions by type, one way to answer each type,
and what the labels of music, sounds and tools are called. A type is a function that draws the facts of a question;
its templates and its answer are filled with them. Splits are as in the world: a hash of the clips and questions so far
says at every turn whether a dialog belongs to training; one about a sentence goes with the sentence, and what is asked
by a held-out template is always new.

    kind ── question type ── facts ──> question, answer
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from babel import Locale

from antiphon.chat import ToolCall, assistant_text, parse_tool_calls, system_text
from antiphon.errors import InputError
from antiphon.train.music import DIRECTIONS, INSTRUMENTS, MODES, NOTES, TEMPOS, most_notes
from antiphon.train.world import (
    LANGUAGES,
    SHARE,
    SLOT,
    TRIES,
    Draw,
    Sentence,
    Split,
    apart,
    check_split,
    expand,
    fill,
    load_world,
    number_words,
    numbers,
    read_yaml,
    say,
    sentences,
    share_of,
    template_words,
    vocabulary,
    words_of,
)
from antiphon.transcripts import SPOKEN

DIALOG_LANGUAGES = SPOKEN
KINDS: dict[str, tuple[str, ...]] = {  # question types of each kind; a follow-up's first turn is that of FIRST
    "arithmetic": ("arithmetic",),
    "calendar": ("day", "month"),
    "compare": ("compare",),
    "translate": ("translate",),
    "repeat": ("repeat",),
    "spell": ("spell",),
    "language": ("language",),
    "music": ("instrument", "mode", "direction", "notes", "tempo"),
    "sound": ("sound",),
    "follow_up": ("more", "then", "also"),
    "unknown": ("unknown", "timer", "light", "weather"),  # what tools would do, where there are none
    "tools": ("timer", "light", "weather", "arithmetic"),  # tools are there, and not always needed
}
ABOUT_SENTENCES = ("repeat", "language")  # of the split of the sentence in them
FIRST = {"more": "arithmetic", "then": "day", "also": "translate"}
COUNTED = "5-20 25-30 35-40 45-50 55-60"  # take the same plural in every language
LARGEST = {"plus": 12, "minus": 12, "times": 6}  # operands
ADDED = 5  # at most, in a follow-up
COMPARED = range(2, 51)
TAKES = 1000  # renderings of the same labels
SHORT = 8  # words of a sentence that is to be repeated, letters of a name that is to be spelled


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = (
    _tool("set_timer", "Set a timer.", minutes="integer"),
    _tool("set_light", "Switch the light in a room on or off.", room="string", on="boolean"),
    _tool("get_weather", "Get the weather in a country.", country="string"),
)


@dataclass(frozen=True)
class Clip:
    """A sound to be played before the question: a sentence to be spoken, or labels to make music or noise by."""

    kind: Literal["speech", "music", "sound"]
    sentence: Sentence | None = None
    labels: Mapping[str, str | int] = field(default_factory=dict)
    take: int = 0  # of the many renderings that the labels leave open


@dataclass(frozen=True)
class Turn:
    """The user's clip and question, or the results of tools; then what is replied, or which tools are called."""

    question: Sentence | None = None
    reply: Sentence | None = None
    clip: Clip | None = None
    calls: tuple[ToolCall, ...] = ()
    results: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """What the assistant writes."""
        return assistant_text(self.reply.text if self.reply else "", self.calls)


@dataclass(frozen=True)
class Dialog:
    """A conversation; `template` is that of its last question, `tools` are those the system prompt declares."""

    kind: str
    language: str
    template: str  # such as "de.arithmetic.1"
    split: Split
    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def system(self) -> str | None:
        """The system turn's text, None where there is none."""
        return system_text(None, self.tools)


@dataclass(frozen=True)
class Phrases:
    """One language's file. `labels` says what a label is called, `lists` holds the world's lists as well."""

    language: str
    lists: Mapping[str, Sequence[str]]
    labels: Mapping[str, Mapping[str, str]]
    questions: Mapping[str, str]  # by template, such as "arithmetic.1"
    answers: Mapping[str, str]  # by type
    held_out: frozenset[str]

    def templates(self, types: Iterable[str], split: Split) -> list[str]:
        """Ids of the questions of some types that `split` uses."""
        held_out = split == "template"
        return [q for q in self.questions if q.split(".")[0] in types and (q in self.held_out) == held_out]


@dataclass(frozen=True)
class Facts:
    """What was drawn for a question: fillings by slot, and what else its turn needs."""

    slots: Mapping[str, str]
    clip: Clip | None = None
    sentence: Sentence | None = None  # follows the question
    reply: Sentence | None = None  # instead of the type's answer
    value: Any = None  # what a follow-up goes on from
    call: ToolCall | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


def dialogs(language: str, kind: str, split: Split, count: int, seed: int) -> list[Dialog]:
    """`count` dialogs of a kind, the same for the same arguments; none twice while there are others.

    Raises:
        InputError: no such language, kind or split.
    """
    return [dialog_at(language, kind, split, seed, at) for at in find_dialogs(language, kind, split, count, seed)]


def find_dialogs(language: str, kind: str, split: Split, count: int, seed: int) -> list[int]:
    """Which draws of a seed the dialogs are: all that has to be known of the others to make one of them."""
    load_phrases(language)
    check_split(split)
    if kind not in KINDS:
        raise InputError(f"there is no kind of dialog {kind!r}; expected one of {', '.join(KINDS)}")
    found: dict[str, int] = {}
    repeated: list[int] = []
    missed = 0
    for at in itertools.count():
        if len(found) + len(repeated) >= count:
            break
        dialog = dialog_at(language, kind, split, seed, at)
        asked = list(itertools.accumulate(map(_asked, dialog.turns)))
        if split != "template" and kind not in ABOUT_SENTENCES and _share(asked) != SHARE[split]:
            continue
        whole = f"{asked[-1]} {dialog.turns[-1].results}"
        missed = missed + 1 if whole in found else 0
        if missed == 0:
            found[whole] = at
        elif missed > TRIES:
            repeated.append(at)
    return [*found.values(), *repeated]


def correct(dialog: Dialog, turn: int, answer: str) -> bool:
    """Whether `answer` is that of a turn: the same words, whatever their case and punctuation, or the same calls."""
    right = dialog.turns[turn]
    if right.calls:
        return tuple(parse_tool_calls(answer)) == right.calls
    return "".join(words_of(answer)) == "".join(words_of(right.answer))


def dialog_vocabulary(language: str, split: Split | None = None) -> list[str]:
    """Word types of a language's world and dialogs, sorted, spelled letters among them; of one split if it is given.

    Words that are given as a translation belong to the other language's.

    Raises:
        InputError: no such language or split.
    """
    phrases = load_phrases(language)
    fillings = _fillings(phrases)
    asked = phrases.questions if split is None else phrases.templates(set().union(*KINDS.values()), split)
    lines = (*phrases.lists["opener"], *(phrases.questions[name] for name in asked), *phrases.answers.values())
    return sorted({*vocabulary(language, split), *(word for line in lines for word in template_words(line, fillings))})


def _fillings(phrases: Phrases) -> dict[str, Sequence[str]]:
    """Everything that each slot of a question or an answer can hold."""
    labels = {name: list(called.values()) for name, called in phrases.labels.items()}
    counted = [number_words(n, phrases.language) for n in range(101)]
    names = [name for what in ("weekday", "month") for name in phrases.lists[what]]
    asked = [name for what in ("weekday", "month") for name in phrases.lists.get(f"asked_{what}", phrases.lists[what])]
    return {
        **phrases.lists,
        **labels,
        **dict.fromkeys(("a", "b", "result"), counted),
        **{name: [counted[n] for n in numbers(COUNTED)] for name in ("minutes", "degrees")},
        "notes": counted[NOTES[0] : NOTES[1] + 1],
        "tempo": counted[:10],
        "found": names,
        "given": asked,
        "relation": labels["weekday_relation"] + labels["month_relation"],
        "word": [*labels["word"], *names, *counted[1:13], *phrases.lists["spell"]],
        "letters": [letter for word in phrases.lists["spell"] for letter in _letters(word, phrases.language)],
    }


# ------------------------------------------------------------------------------------------------ drawing


def dialog_at(language: str, kind: str, split: Split, seed: int, at: int) -> Dialog:
    """The dialog of one draw."""
    phrases, draw = load_phrases(language), Draw(f"{language}/{kind}/{split}/{seed}/{at}")
    template = draw.choose(_templates(language, KINDS[kind], split))
    question_type = template.split(".")[0]
    before: Facts | None = None
    turns: list[Turn] = []
    if first := FIRST.get(question_type):
        before = ASKED[first](phrases, split, draw)
        turns += _turns(phrases, draw.choose(_templates(language, (first,), "train")), before, split, draw)
        facts = FOLLOWED[question_type](phrases, before.value, draw)
    else:
        facts = ASKED[question_type](phrases, split, draw)
    if kind == "unknown":
        facts = Facts(facts.slots, reply=_say(phrases.answers["unknown"], phrases, "unknown", split))
    turns += _turns(phrases, template, facts, split, draw)
    tools = TOOLS if kind == "tools" else ()
    return Dialog(kind, phrases.language, f"{phrases.language}.{template}", split, tuple(turns), tools)


@cache
def _templates(language: str, types: tuple[str, ...], split: Split) -> list[str]:
    return load_phrases(language).templates(types, split)


def _turns(phrases: Phrases, template: str, facts: Facts, split: Split, draw: Draw) -> list[Turn]:
    """The turn of a question; with a tool, the turn that calls it and the turn that says what came of it."""
    question_type = template.split(".")[0]
    opener = "{opener} " if question_type not in FOLLOWED and draw.below(2) else ""
    line = fill(opener + _put(phrases.questions[template], facts.slots), phrases.lists, draw)
    question = _say(line, phrases, template, split)
    if facts.sentence:
        question = _followed_by(question, facts.sentence)
    reply = facts.reply or _say(_put(phrases.answers[question_type], facts.slots), phrases, question_type, split)
    if facts.call is None:
        return [Turn(question, reply, facts.clip)]
    result = json.dumps(facts.result, ensure_ascii=False)
    return [Turn(question, calls=(facts.call,)), Turn(reply=reply, results=(result,))]


def _put(line: str, slots: Mapping[str, str]) -> str:
    return SLOT.sub(lambda slot: slots.get(slot[1], slot[0]), line)


def _say(line: str, phrases: Phrases, template: str, split: Split) -> Sentence:
    return say(line, phrases.language, f"{phrases.language}.{template}", split)


def _followed_by(question: Sentence, sentence: Sentence) -> Sentence:
    space = " " if LANGUAGES[question.language].spaces else ""
    return Sentence(
        f"{question.text}{space}{sentence.text}",
        f"{question.spoken} {sentence.spoken}",
        question.language,
        question.template,
        question.split,
        question.words + sentence.words,
    )


def _share(asked: Sequence[str]) -> str:
    """Who a dialog belongs to by what was asked up to each turn: what is for tests only may be no part of training."""
    shares = {share_of(text) for text in asked}
    return next(share for share in ("test", "valid", "train") if share in shares)


def _asked(turn: Turn) -> str:
    """What is new in a turn, for its split; results of tools are not asked."""
    if turn.question is None:
        return ""
    if turn.clip is None:
        return turn.question.text
    played = turn.clip.sentence.text if turn.clip.sentence else f"{json.dumps(dict(turn.clip.labels))} {turn.clip.take}"
    return f"{played} {turn.question.text}"


# ------------------------------------------------------------------------------------------ question types


def arithmetic(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """A sum, a difference that is not negative, or a product."""
    operation = draw.choose(list(LARGEST))
    a, b = sorted((1 + draw.below(LARGEST[operation]), 1 + draw.below(LARGEST[operation])), reverse=True)
    if operation != "minus" and draw.below(2):
        a, b = b, a
    return _sum(phrases, a, operation, b)


def more(phrases: Phrases, value: int, draw: Draw) -> Facts:
    """Something added to the result before, or taken from it."""
    room = {"plus": 100 - value, "minus": value}
    operation = draw.choose([name for name, left in room.items() if left])
    return _sum(phrases, value, operation, 1 + draw.below(min(room[operation], ADDED)))


def _sum(phrases: Phrases, a: int, operation: str, b: int) -> Facts:
    result = {"plus": a + b, "minus": a - b, "times": a * b}[operation]
    said = {key: number_words(n, phrases.language) for key, n in (("a", a), ("b", b), ("result", result))}
    return Facts({**said, "op": phrases.labels["op"][operation]}, value=result)


def day(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """The day before or after another."""
    return _beside(phrases, "weekday", draw.below(7), draw)


def month(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """The month before or after another."""
    return _beside(phrases, "month", draw.below(12), draw)


def then(phrases: Phrases, value: int, draw: Draw) -> Facts:
    """The day before or after the one that was answered."""
    return _beside(phrases, "weekday", value, draw)


def _beside(phrases: Phrases, what: str, index: int, draw: Draw) -> Facts:
    where, step = draw.choose([("after", 1), ("before", -1)])
    names = phrases.lists[what]
    asked = phrases.lists.get(f"asked_{what}", names)  # in the case that the question asks for
    found = (index + step) % len(names)
    slots = {"given": asked[index], "relation": phrases.labels[f"{what}_relation"][where], "found": names[found]}
    return Facts({**slots, "that": phrases.labels["that"][where]}, value=found)


def compare(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """The larger or the smaller of two numbers."""
    a = draw.choose(COMPARED)
    b = draw.choose([n for n in COMPARED if n != a])
    size, choose = draw.choose([("larger", max), ("smaller", min)])
    said = {key: number_words(n, phrases.language) for key, n in (("a", a), ("b", b), ("result", choose(a, b)))}
    return Facts({**said, "size": phrases.labels["size"][size]})


def translate(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """A word of the world in another of the ten languages."""
    group = draw.choose(("word", "word", "weekday", "month", "number"))
    key = draw.choose(sorted(_words(phrases, group)))
    return _translated(phrases, group, key, draw.choose(sorted(phrases.labels["into"])))


def also(phrases: Phrases, value: tuple[str, str, str], draw: Draw) -> Facts:
    """The word before in one more language."""
    group, key, target = value
    return _translated(phrases, group, key, draw.choose(sorted(set(phrases.labels["into"]) - {target})))


def _translated(phrases: Phrases, group: str, key: str, target: str) -> Facts:
    there = load_phrases(target)
    slots = {"word": _words(phrases, group)[key], "into": phrases.labels["into"][target]}
    return Facts(slots, reply=_say(_words(there, group)[key], there, "translate", "train"), value=(group, key, target))


def _words(phrases: Phrases, group: str) -> dict[str, str]:
    """Words that can be translated, by a key that is the same in every language."""
    if group == "word":
        return dict(phrases.labels["word"])
    if group == "number":
        return {str(n): number_words(n, phrases.language) for n in range(1, 13)}
    return {str(n): name for n, name in enumerate(phrases.lists[group])}


def repeat(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """A sentence of the world to be said again."""
    drawn = sentences(phrases.language, split, 4, draw.below(2**30))
    sentence = min(drawn, key=lambda s: max(len(s.words), SHORT))
    return Facts({}, sentence=sentence, reply=sentence)


def spell(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """A word letter by letter; in Japanese its kana, in Chinese and Korean its characters."""
    word = draw.choose(phrases.lists["spell"])
    between = ", " if LANGUAGES[phrases.language].spaces else " 、 "
    return Facts({"word": word, "letters": between.join(_letters(word, phrases.language))})


def _letters(word: str, language: str) -> str:
    return load_world(language).readings.get(word, word).upper()


def language(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """Which language a sentence was in."""
    names = {code: name for code, name in language_names(phrases.language).items() if code != phrases.language}
    code = draw.choose(list(names))
    (sentence,) = sentences(code, split, 1, draw.below(2**30))
    return Facts({"language": names[code]}, Clip("speech", sentence))


@cache
def language_names(language: str) -> dict[str, str]:
    """What the languages are called in one of them, as far as its world calls them so."""
    names = {code: apart(Locale.parse(language).languages[code]) for code in LANGUAGES}
    return {code: name for code, name in names.items() if name in load_world(language).lists["language"]}


def music(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """What there is to hear in a melody."""
    tempo = TEMPOS[0] + draw.below(TEMPOS[1] - TEMPOS[0] + 1)
    notes = NOTES[0] + draw.below(most_notes(tempo) - NOTES[0] + 1)
    labels = {kind: draw.choose(tuple(names)) for kind, names in _HEARD.items()} | {"notes": notes, "tempo": tempo}
    return Facts(said_of(labels, phrases), Clip("music", labels=labels, take=draw.below(TAKES)))


def said_of(labels: Mapping[str, Any], phrases: Phrases) -> dict[str, str]:
    """What the labels of music or of a sound are called, by slot; a tempo is said digit by digit."""
    said = {kind: phrases.labels[kind][labels[kind]] for kind in (*_HEARD, "sound") if kind in labels}
    if "notes" in labels:
        said["notes"] = number_words(labels["notes"], phrases.language)
    if "tempo" in labels:
        said["tempo"] = " ".join(number_words(int(digit), phrases.language) for digit in str(labels["tempo"]))
    return said


def written_question(kind: str, labels: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A question in writing about what a clip holds, and its answer; in which words and language its `name` decides.

    Every other one is in English. `kind` is that of what is asked: instrument, mode, direction, notes, tempo or sound.
    """
    draw = Draw(f"written/{kind}/{name}")
    phrases = load_phrases(draw.choose(DIALOG_LANGUAGES) if draw.below(2) else "en")
    template = draw.choose(phrases.templates((kind,), "train"))
    return phrases.questions[template], _put(phrases.answers[kind], said_of(labels, phrases))


_HEARD = {"instrument": INSTRUMENTS, "mode": MODES, "direction": DIRECTIONS}


def sound(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """What made a noise."""
    kind = draw.choose(list(phrases.labels["sound"]))
    labels = {"sound": kind}
    return Facts(said_of(labels, phrases), Clip("sound", labels=labels, take=draw.below(TAKES)))


def unknown(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """Something outside the world; the template's slots are filled from the world's lists."""
    return Facts({})


def timer(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """A timer that is set."""
    minutes = draw.choose(list(numbers(COUNTED)))
    said = number_words(minutes, phrases.language)
    return Facts({"minutes": said}, call=ToolCall("set_timer", {"minutes": minutes}), result={"ok": True})


def light(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """A light that is switched."""
    room = draw.choose(list(phrases.labels["room"]))
    state = draw.choose(["on", "off"])
    slots = {name: phrases.labels[name][key] for name, key in (("room", room), ("switch", state), ("state", state))}
    call = ToolCall("set_light", {"room": room, "on": state == "on"})
    return Facts(slots, call=call, result={"ok": True})


def weather(phrases: Phrases, split: Split, draw: Draw) -> Facts:
    """The weather somewhere, which a tool tells."""
    code = draw.choose(list(phrases.labels["where"]))
    sky = draw.choose(list(phrases.labels["sky"]))
    degrees = draw.choose([n for n in numbers(COUNTED) if n < 36])
    country = Locale.parse("en").territories[code]  # as tools name it, whatever was asked in
    slots = {"where": phrases.labels["where"][code], "sky": phrases.labels["sky"][sky]}
    return Facts(
        {**slots, "degrees": number_words(degrees, phrases.language)},
        call=ToolCall("get_weather", {"country": country}),
        result={"weather": sky, "degrees": degrees},
    )


ASKED: dict[str, Callable[[Phrases, Split, Draw], Facts]] = {
    **{f.__name__: f for f in (arithmetic, day, month, compare, translate, repeat, spell, language)},
    **{f.__name__: f for f in (sound, unknown, timer, light, weather)},
    **dict.fromkeys(KINDS["music"], music),
}
FOLLOWED: dict[str, Callable[[Phrases, Any, Draw], Facts]] = {"more": more, "then": then, "also": also}


@cache
def load_phrases(language: str) -> Phrases:
    """The phrases of a language.

    Raises:
        InputError: a language without dialogs.
    """
    if language not in DIALOG_LANGUAGES:
        raise InputError(f"tiny does not converse in {language!r}; it does in {', '.join(DIALOG_LANGUAGES)}")
    data = read_yaml("dialogs", language)
    lists = {**load_world(language).lists, **expand(data["lists"], language)}
    letters = {letter for word in lists["spell"] for letter in _letters(word, language)}
    names = [name for what in ("weekday", "month", "country", "name") for name in lists[what] if len(name) <= SHORT]
    lists["spell"] = sorted({*lists["spell"], *(name for name in names if set(_letters(name, language)) <= letters)})
    labels, questions, answers = data["labels"], data["questions"], data["answers"]
    return Phrases(language, lists, labels, questions, answers, frozenset(data["held_out"]))
