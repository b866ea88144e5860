"""Dialogs: right answers, in ten languages, in splits that do not leak, with the tools and clips they speak of."""

import itertools
import re
from functools import cache
from typing import Any

import pytest

from antiphon.chat import ToolCall, parse_tool_calls
from antiphon.errors import InputError
from antiphon.train import music, noises
from antiphon.train.dialog import (
    DIALOG_LANGUAGES,
    KINDS,
    TOOLS,
    correct,
    dialog_vocabulary,
    dialogs,
    language_names,
    load_phrases,
)
from antiphon.train.world import (
    LANGUAGES,
    SHARE,
    SLOT,
    SPLITS,
    number_words,
    share_of,
    vocabulary,
    words_of,
    write,
)

SIZE = {"train": 120, "valid": 2, "sentence": 8, "template": 20}
TYPES = {"string": str, "integer": int, "boolean": bool}

every_language = pytest.mark.parametrize("language", DIALOG_LANGUAGES)


@cache
def sample(language: str, kind: str, split: Any = "train", seed: int = 0) -> list[Any]:
    return dialogs(language, kind, split, SIZE[split], seed)


def every(language: str, split: str) -> list[Any]:
    return [dialog for kind in KINDS for dialog in sample(language, kind, split)]


def asked(dialog):
    """Everything that is played and asked, the takes of a sound apart."""
    clips = [turn.clip for turn in dialog.turns if turn.clip]
    played = [clip.sentence.text if clip.sentence else (sorted(clip.labels.items()), clip.take) for clip in clips]
    return str((played, [turn.question.text for turn in dialog.turns if turn.question]))


def said(dialog):
    return [s for turn in dialog.turns for s in (turn.question, turn.reply) if s]


def pattern(line, slots):
    """A regular expression for what a template of `slots` gives, written as in a text."""
    parts = [re.escape(part) for part in re.split(r"\{[a-z]+\}", line)]
    named = [f"(?P<{name}>{slots[name]})" for name, _ in SLOT.findall(line)]
    both = (x for pair in itertools.zip_longest(parts, named, fillvalue="") for x in pair)
    return re.compile("".join(both).replace("\\ ", " *"), re.IGNORECASE)


def read(dialog, slots):
    """Fillings of the last question, back from its text."""
    phrases = load_phrases(dialog.language)
    line = phrases.questions[dialog.template.partition(".")[2]]
    match = pattern(line, slots).fullmatch(plain(dialog.turns[-1].question))
    assert match, dialog
    return match.groupdict()


def plain(question):
    """A question without what opens it."""
    for opener in load_phrases(question.language).lists["opener"]:
        text = question.text.removeprefix(write(opener.split(), question.language)).lstrip()
        if text != question.text:
            return text[:1].upper() + text[1:]
    return question.text


def one_of(names, language):
    """A regular expression for one of some names as they are written, the longest first."""
    return "|".join(map(re.escape, sorted((write(name.split(), language) for name in names), key=len, reverse=True)))


@cache
def values(language):
    return {"".join(words_of(number_words(n, language))): n for n in range(101)}


def value(text, language):
    return values(language)["".join(words_of(text))]


# ------------------------------------------------------------------------------------------------- drawing


@every_language
def test_dialogs_follow_from_their_arguments(language):
    for kind in KINDS:
        assert dialogs(language, kind, "train", 8, 0) == sample(language, kind)[:8]
        assert dialogs(language, kind, "train", 8, 1) != sample(language, kind)[:8]


@every_language
def test_train_and_tests_share_no_question(language):
    asks = {split: {asked(dialog) for dialog in every(language, split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert asks[one].isdisjoint(asks[other]), (one, other)


@every_language
def test_held_out_templates_are_never_trained(language):
    held = {f"{language}.{name}" for name in load_phrases(language).held_out}
    used = {split: {dialog.template for dialog in every(language, split)} for split in SPLITS}
    assert used["template"] == held
    assert used["train"].isdisjoint(held)
    assert (used["valid"] | used["sentence"]).isdisjoint(held)
    assert used["train"] == {f"{language}.{name}" for name in load_phrases(language).questions} - held
    assert held.isdisjoint(
        {turn.question.template for d in every(language, "train") for turn in d.turns if turn.question}
    )


@every_language
def test_sentences_within_dialogs_are_of_their_split(language):
    for split, kind in itertools.product(SPLITS, ("repeat", "language")):
        for dialog in sample(language, kind, split):
            (turn,) = dialog.turns
            sentence = turn.clip.sentence if turn.clip else turn.reply
            assert sentence.split == split
            assert share_of(sentence.text) == SHARE[split]


@every_language
def test_words_are_listed_and_all_of_the_tests_are_trained(language):
    known = set(dialog_vocabulary(language))
    assert set(vocabulary(language)) <= known
    assert len(known) <= 500
    assert dialog_vocabulary(language, "train") == sorted(known), "held-out templates have no words of their own"
    for split in SPLITS:
        sentences = [sentence for dialog in every(language, split) for sentence in said(dialog)]
        assert {word for sentence in sentences if sentence.language == language for word in sentence.words} <= known


# ------------------------------------------------------------------------------------------------- answers


@every_language
def test_sums_are_right(language):
    labels = load_phrases(language).labels["op"]
    number = one_of([number_words(n, language) for n in range(101)], language)
    slots = {"a": number, "b": number, "op": one_of(labels.values(), language)}
    for split in SPLITS:
        for dialog in sample(language, "arithmetic", split):
            found = read(dialog, slots)
            a, b = value(found["a"], language), value(found["b"], language)
            (op,) = (name for name, called in labels.items() if words_of(called) == words_of(found["op"]))
            result = number_words({"plus": a + b, "minus": a - b, "times": a * b}[op], language)
            answer = load_phrases(language).answers["arithmetic"]
            assert correct(dialog, 0, answer.replace("{result}", result))
            assert not correct(dialog, 0, answer.replace("{result}", number_words(99, language)))


@every_language
def test_the_larger_number_is_larger(language):
    labels = load_phrases(language).labels["size"]
    number = one_of([number_words(n, language) for n in range(101)], language)
    slots = {"a": number, "b": number, "size": one_of(labels.values(), language)}
    for dialog in sample(language, "compare"):
        found = read(dialog, slots)
        pair = [value(found[name], language) for name in "ab"]
        larger = words_of(found["size"]) == words_of(labels["larger"])
        right, wrong = (number_words(f(pair), language) for f in ((max, min) if larger else (min, max)))
        assert "".join(words_of(right)) in "".join(words_of(dialog.turns[0].answer))
        assert not correct(dialog, 0, dialog.turns[0].answer.replace(right, wrong) + wrong)


@pytest.mark.parametrize(
    ("language", "question", "answer"),
    [
        ("en", "Which day comes after Sunday", "It is Monday"),
        ("en", "Which month comes before January", "It is December"),
        ("de", "Welcher Tag kommt vor Montag", "Es ist Sonntag"),
        ("es", "Qué día viene después del martes", "Es el miércoles"),
        ("fr", "Quel mois vient avant juin", "Le mois est mai"),
        ("it", "Che giorno viene prima di giovedì", "È mercoledì"),
        ("pt", "Que dia vem depois da sexta feira", "É sábado"),
        ("ru", "Какой месяц идёт после января", "Это февраль"),
        ("ja", "金曜日の次の日は何曜日ですか", "土曜日です"),
        ("ko", "오월 다음 달은 무엇입니까", "답은 유월"),
        ("zh", "星期日的后一天是星期几", "是星期一"),
    ],
)
def test_the_calendar_goes_round(language, question, answer):
    every_one = [d for split in ("train", "valid", "sentence") for d in sample(language, "calendar", split)]
    (found,) = {d.turns[0].answer for d in every_one if plain(d.turns[0].question) == question}
    assert found == answer


@every_language
def test_translations_are_of_one_thing(language):
    phrases = load_phrases(language)
    keys = {name: key for key, name in phrases.labels["word"].items()}
    seen = 0
    for dialog in sample(language, "translate"):
        reply = dialog.turns[0].reply
        assert reply.language != language
        word = next((name for name in keys if f" {name} " in f" {' '.join(dialog.turns[0].question.words)} "), None)
        if word is not None and language == "en":
            there = load_phrases(reply.language).labels["word"][keys[word]]
            seen += reply.text.casefold() == write(there.split(), reply.language).casefold()
    assert {d.turns[0].reply.language for d in sample(language, "translate")} == {*DIALOG_LANGUAGES} - {language}
    assert seen > 20 or language != "en"


def test_the_words_of_translation_are_the_same_in_every_language():
    for label in ("word", "instrument", "mode", "direction", "sound", "room", "switch", "state", "sky"):
        keys = {language: set(load_phrases(language).labels[label]) for language in DIALOG_LANGUAGES}
        assert all(names == keys["en"] for names in keys.values()), label


@every_language
def test_what_is_repeated_was_asked(language):
    for dialog in sample(language, "repeat"):
        (turn,) = dialog.turns
        assert turn.question.text.endswith(turn.answer)
        assert turn.question.spoken.endswith(turn.reply.spoken)
        assert turn.question.words[-len(turn.reply.words) :] == turn.reply.words
        assert len(turn.question.words) > len(turn.reply.words)


def test_what_is_spelled_is_the_word():
    for language, question, answer in (
        ("en", "Spell water", "W, A, T, E, R"),
        ("ru", "Назови буквы слова сыр", "С, Ы, Р"),
        ("ja", "机の文字は", "つ、く、え"),
        ("zh", "牛奶怎么写", "牛、奶"),
        ("ko", "의자 글자는", "의, 자"),
    ):
        found = [d for s in ("train", "valid", "sentence") for d in sample(language, "spell", s)]
        assert {d.turns[0].answer for d in found if plain(d.turns[0].question) == question} == {answer}


@every_language
def test_the_language_that_was_heard_is_named(language):
    names = language_names(language)
    assert len(names) >= 18
    heard = set()
    for dialog in sample(language, "language"):
        (turn,) = dialog.turns
        code = turn.clip.sentence.language
        heard.add(code)
        assert code != language
        assert "".join(words_of(names[code])) in "".join(turn.reply.words)
    assert heard == {code for code in LANGUAGES if code in names and code != language}


@every_language
def test_music_is_described_by_its_labels(language):
    phrases = load_phrases(language)
    for dialog in sample(language, "music"):
        (turn,) = dialog.turns
        kind = dialog.template.split(".")[1]
        labels = dict(turn.clip.labels)
        assert music.NOTES[0] <= labels["notes"] <= music.most_notes(labels["tempo"])
        if kind == "notes":
            right = number_words(labels["notes"], language)
        elif kind == "tempo":
            right = "".join(number_words(int(digit), language) for digit in str(labels["tempo"]))
        else:
            right = phrases.labels[kind][labels[kind]]
        assert "".join(words_of(right)) in "".join(turn.reply.words)
    assert set(phrases.labels["instrument"]) == set(music.INSTRUMENTS)
    assert set(phrases.labels["mode"]) == set(music.MODES)
    assert set(phrases.labels["direction"]) == set(music.DIRECTIONS)


@every_language
def test_sounds_are_named(language):
    assert set(load_phrases(language).labels["sound"]) == set(noises.KINDS)
    answers = {d.turns[0].clip.labels["sound"]: d.turns[0].answer for d in sample(language, "sound")}
    assert set(answers) == set(noises.KINDS)
    assert len(set(answers.values())) == len(noises.KINDS)


@every_language
def test_a_follow_up_needs_the_turn_before(language):
    answers = {}
    for dialog in sample(language, "follow_up"):
        first, second = dialog.turns
        assert first.question.template.split(".")[1] in ("arithmetic", "day", "translate")
        answers.setdefault(second.question.text, set()).add(second.answer)
    assert sum(len(found) > 1 for found in answers.values()) > 5


@every_language
def test_a_sum_goes_on_from_its_result(language):
    labels = load_phrases(language).labels["op"]
    number = one_of([number_words(n, language) for n in range(101)], language)
    seen = 0
    for dialog in sample(language, "follow_up"):
        if dialog.template.split(".")[1] != "more":
            continue
        found = read(dialog, {"b": number, "op": one_of(labels.values(), language)})
        before, after = (_number_in(turn.answer, language) for turn in dialog.turns)
        step = value(found["b"], language)
        assert after - before == (step if words_of(found["op"]) == words_of(labels["plus"]) else -step)
        seen += 1
    assert seen > 10


def _number_in(answer, language):
    line = load_phrases(language).answers["more"]
    number = one_of([number_words(n, language) for n in range(101)], language)
    match = pattern(line, {"result": number}).fullmatch(answer)
    assert match, answer
    return value(match["result"], language)


@every_language
def test_what_is_not_of_the_world_is_not_answered(language):
    for split in SPLITS:
        (answer,) = {turn.answer for dialog in sample(language, "unknown", split) for turn in dialog.turns}
        assert len(words_of(answer)) >= 2
        assert all(dialog.system is None for dialog in sample(language, "unknown", split))


# --------------------------------------------------------------------------------------------------- tools


@every_language
def test_tools_are_called_as_they_are_declared(language):
    declared = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in TOOLS}
    called = set()
    for dialog in sample(language, "tools"):
        assert all(f'"name": "{name}"' in dialog.system for name in declared)
        if len(dialog.turns) == 1:
            assert dialog.template.split(".")[1] == "arithmetic"
            continue
        asks, tells = dialog.turns
        (call,) = asks.calls
        assert asks.answer.startswith(f'<tool_call>\n{{"name": "{call.name}", "arguments": {{')
        assert asks.answer.endswith("}\n</tool_call>")
        assert parse_tool_calls(asks.answer) == [call]
        assert call.arguments.keys() == declared[call.name].keys()
        for name, parameter in declared[call.name].items():
            assert type(call.arguments[name]) is TYPES[parameter["type"]]
        assert tells.results
        assert tells.question is None
        assert tells.reply.text
        called.add(call.name)
    assert called == set(declared)


def test_a_tool_is_called_with_what_was_asked():
    found = {plain(turn.question): turn.calls for d in sample("de", "tools") for turn in d.turns[:1] if turn.question}
    assert found["Stelle einen Timer auf achtzehn Minuten"] == (ToolCall("set_timer", {"minutes": 18}),)
    light = ToolCall("set_light", {"room": "kitchen", "on": True})
    assert found["Schalte das Licht in der Küche an"] == (light,)
    assert found["Wie ist das Wetter in Russland"] == (ToolCall("get_weather", {"country": "Russia"}),)


@every_language
def test_the_weather_that_a_tool_tells_is_said(language):
    labels = load_phrases(language).labels["sky"]
    for dialog in sample(language, "tools"):
        if dialog.template.split(".")[1] == "weather":
            sky, degrees = re.findall(r'"weather": "(\w+)", "degrees": (\d+)', dialog.turns[1].results[0])[0]
            said_words = "".join(dialog.turns[1].reply.words)
            assert "".join(words_of(labels[sky])) in said_words
            assert "".join(words_of(number_words(int(degrees), language))) in said_words


# ------------------------------------------------------------------------------------------------- the rest


@every_language
def test_answers_are_short_and_without_digits(language):
    for split in SPLITS:
        for dialog in every(language, split):
            for sentence in said(dialog):
                assert not any(c.isdigit() for c in sentence.text + sentence.spoken)
                assert "{" not in sentence.text
            for turn in dialog.turns:
                if turn.reply:
                    assert 1 <= len(turn.reply.words) <= 10


def test_japanese_is_read_in_kana():
    for split in SPLITS:
        for dialog in every("ja", split):
            for sentence in said(dialog):
                if sentence.language == "ja":
                    assert re.fullmatch(r"[ぁ-ゖァ-ヺー、 ]+", sentence.spoken), sentence


def test_letters_that_the_engine_misreads_have_names():
    spoken = {dialog.turns[0].reply.spoken for dialog in sample("pt", "spell")}
    assert "cê, A, R, R, O" in spoken


def test_what_counts_as_correct():
    dialog = next(d for d in sample("en", "arithmetic") if d.turns[0].answer == "That is eight")
    assert correct(dialog, 0, "that is eight.")
    assert not correct(dialog, 0, "That is nine")
    assert not correct(dialog, 0, "")
    tool = next(d for d in sample("en", "tools") if d.turns[0].calls)
    assert correct(tool, 0, tool.turns[0].answer)
    assert correct(tool, 0, tool.turns[0].answer.replace('": "', '":"'))
    assert not correct(tool, 0, tool.turns[1].answer)
    assert not correct(tool, 1, tool.turns[0].answer)


def test_what_does_not_exist_is_named():
    with pytest.raises(InputError, match="does not converse in 'th'; it does in de, en"):
        dialogs("th", "spell", "train", 1, 0)
    with pytest.raises(InputError, match="no kind of dialog 'chat'; expected one of arithmetic"):
        dialogs("en", "chat", "train", 1, 0)
