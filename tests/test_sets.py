"""`antiphon evaluate --set`: official layouts are read, answers count by each set's rules, results are written down."""

import json
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from antiphon import cli
from antiphon.errors import InputError
from antiphon.evaluate import downloaded, runs
from antiphon.evaluate.asking import Asked, Response
from antiphon.evaluate.instructions import RULES, is_kept, shares_kept
from antiphon.evaluate.items import Clip, Item
from antiphon.evaluate.page import Axis, write_page
from antiphon.evaluate.scoring import METRICS, SCORES, Judges, Tally, chosen, mean_of, offline, pooled, score, tags_in
from antiphon.evaluate.sets import SETS, items_of
from antiphon.speaker import SPEAKER_FILE, SpeakerConfig, SpeakerEncoder, save_speaker
from antiphon.weights import save_checkpoint
from tests.field_trees import RATE, plain, write_tree
from tests.models import VOCAB, omni, script
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    for name in SETS:
        write_tree(name, root / name)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("checkpoint"), omni()
    write_tokenizer(folder, vocab_size=VOCAB)
    save_checkpoint(model, folder)
    torch.manual_seed(4)
    width = model.speaking().talker.config.text.hidden_size
    save_speaker(SpeakerEncoder(SpeakerConfig(width, 16, 4, 8, 20)), folder / SPEAKER_FILE)
    return folder


def run(monkeypatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["antiphon", "evaluate", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


# ------------------------------------------------------------------------------------------------ layouts

CV3 = ("en", "ja", "ko", "zh")
PARTS = {
    "librispeech": {"test-clean": 4, "test-other": 4},
    "aishell": {"test": 4},
    "aishell2": {"iOS test": 2, "Android test": 2, "Mic test": 2},
    "wenetspeech": {"TEST_NET": 2, "TEST_MEETING": 2},
    "common-voice": {"en": 3, "ru": 3, "zh-CN": 3},
    "fleurs": dict.fromkeys(
        [
            "ar",
            "de",
            "en",
            "es",
            "fr",
            "id",
            "it",
            "ja",
            "ko",
            "ms",
            "nl",
            "pt",
            "ru",
            "th",
            "tr",
            "ur",
            "vi",
            "yue",
            "zh",
        ],
        2,
    ),
    "seed-tts": {"zh": 2, "en": 2, "zh hard": 2},
    "minimax": dict.fromkeys(["zh", "en", "de", "it", "pt", "es", "ja", "ko", "fr", "ru"], 2),
    "cv3": dict.fromkeys((f"{a}-{b}" for a in CV3 for b in CV3 if a != b), 1),
    "gtzan": {"test": 10},
    "mtg-jamendo": {"genre": 2, "mood/theme": 2, "instrument": 2, "top50": 2},
    "magnatagatune": {"test": 6},
    "muchomusic": {"RUL": 8, "MuChoMusic": 2},
    "voicebench": dict.fromkeys(
        ["AlpacaEval", "CommonEval", "WildVoice", "SD-QA", "MMSU", "OBQA", "BBH", "IFEval", "AdvBench"], 2
    ),
    "mmau": {"sound": 2, "music": 2, "speech": 2},
}


@pytest.mark.parametrize("name", SETS)
def test_an_official_layout_is_read(trees, name):
    items = items_of(name, trees / name)
    assert {part: len(some) for part, some in items.items()} == PARTS[name]
    for some in items.values():
        assert len({item.name for item in some}) == len(some)
        for item in some:
            assert item.is_there
            samples, rate = item.clip.read()  # type: ignore[union-attr]
            assert 1 < len(samples) / rate < 31
            assert np.abs(samples).max() > 0.1
    limited = items_of(name, trees / name, list(items)[:1], 1)
    assert [len(some) for some in limited.values()] == [1]


def test_what_is_said_and_by_whom(trees):
    first = items_of("librispeech", trees / "librispeech")["test-clean"][0]
    assert (first.text, first.language, first.group) == (plain("en", 1089).lower(), "en", "1089")
    first = items_of("aishell", trees / "aishell")["test"][0]
    assert (first.text, first.language, first.group) == (plain("zh", 0).replace(" ", "").upper(), "zh", "S0764")
    assert items_of("aishell2", trees / "aishell2")["iOS test"][1].group == "T0012"
    assert [i.group for i in items_of("common-voice", trees / "common-voice")["en"]] == ["speaker0"] * 2 + ["speaker1"]
    assert items_of("common-voice", trees / "common-voice")["zh-CN"][0].language == "zh"
    assert items_of("fleurs", trees / "fleurs")["th"][0].text == plain("th", 0)
    cloned = items_of("seed-tts", trees / "seed-tts")["en"][1]
    assert (cloned.task, cloned.text, cloned.language) == ("clone", plain("en", 3), "en")
    assert items_of("cv3", trees / "cv3")["ja-en"][0].text == plain("en", 1)
    assert items_of("librispeech", trees / "librispeech", ["dev-clean"])["dev-clean"][0].group == "174"


def test_a_segment_is_cut_out_of_its_recording(trees):
    for item, half in zip(items_of("wenetspeech", trees / "wenetspeech")["TEST_NET"], (0.5, 2.2), strict=True):
        samples, rate = item.clip.read()  # type: ignore[union-attr]
        assert len(samples) / rate == pytest.approx(1.2, abs=0.01)
        assert item.clip.start == pytest.approx(half)  # type: ignore[union-attr]
        edges = np.concatenate([samples[: rate // 10], samples[-rate // 10 :]])
        assert np.sqrt(np.mean(edges**2)) > 0.1  # the silence around it is left out


def test_tags_choices_and_questions(trees):
    music = items_of("mtg-jamendo", trees / "mtg-jamendo")["genre"]
    assert [(sorted(i.tags), i.choices, i.group) for i in music] == [
        (["jazz", "rock"], ("jazz", "rock"), "artist_0"),
        (["rock"], ("jazz", "rock"), "artist_1"),
    ]
    assert (music[0].clip.start, music[0].clip.stop) == (5, 35)  # type: ignore[union-attr]
    clips = items_of("magnatagatune", trees / "magnatagatune")["test"]
    assert len(clips[0].choices) == 50
    assert clips[0].group == clips[1].group != clips[2].group
    assert clips[0].tags == {"guitar", "no vocals", "slow"}
    asked = items_of("muchomusic", trees / "muchomusic")["RUL"]
    assert [len(i.choices) for i in asked[:4]] == [4] * 4
    assert all("A piano" in i.choices and len({i.group for i in asked[:4]}) == 1 for i in asked)
    assert len({frozenset(i.choices) for i in asked[:4]}) == 4
    assert len({i.choices.index("A piano") for i in asked}) > 1  # the right one is not always in one place
    voice = items_of("voicebench", trees / "voicebench")
    assert [(i.scored, i.text) for i in voice["BBH"]] == [("verdict", "yes"), ("letter", "A")]
    assert voice["AlpacaEval"][0].said == plain("en", 0)
    assert [json.loads(i.text) for i in voice["IFEval"]] == [
        [
            {"id": "punctuation:no_comma"},
            {"id": "length_constraints:number_words", "num_words": 5, "relation": "less than"},
        ],
        [{"id": "startend:quotation"}],
    ]


def test_some_of_a_set_are_from_all_over_it(trees):
    genres = [item.text for item in items_of("gtzan", trees / "gtzan")["test"]]
    assert [item.text for item in items_of("gtzan", trees / "gtzan", limit=3)["test"]] == [genres[i] for i in (0, 3, 6)]
    assert len({item.group for item in items_of("librispeech", trees / "librispeech", limit=2)["test-clean"]}) == 2
    assert len(items_of("gtzan", trees / "gtzan", limit=99)["test"]) == 10


def test_clips_without_a_tag_that_counts_are_left_out(tmp_path):
    table = write_tree("magnatagatune", tmp_path) / "annotations_final.csv"
    rows = table.read_text("utf-8").splitlines()
    names = [cell.strip('"') for cell in rows[0].split("\t")]
    bare = ["0" for _ in names[1:-1]]
    table.write_text("\n".join([*rows, "\t".join(f'"{cell}"' for cell in ["99", *bare, "d/bare-0-29.mp3"])]) + "\n")
    items = items_of("magnatagatune", tmp_path)["test"]
    assert len(items) == PARTS["magnatagatune"]["test"]
    assert all(item.tags for item in items)


def test_separators_of_unicode_end_no_row(tmp_path):
    table = write_tree("common-voice", tmp_path) / "en" / "test.tsv"
    table = table if table.exists() else next(tmp_path.rglob("en/test.tsv"))
    lines = table.read_text("utf-8").split("\n")
    said = items_of("common-voice", tmp_path, ["en"])["en"][0].text
    lines[1] = lines[1].replace(said, said.replace(" ", "\u2028", 1))
    table.write_text("\n".join(lines), "utf-8")
    items = items_of("common-voice", tmp_path, ["en"])["en"]
    assert len(items) == PARTS["common-voice"]["en"]
    assert items[0].text == said.replace(" ", "\u2028", 1)


def test_another_folder_is_refused(trees, tmp_path):
    with pytest.raises(InputError, match=r"there is no set 'libri'; there are librispeech, aishell"):
        items_of("libri", tmp_path)
    for name in SETS:
        with pytest.raises(InputError, match="expected"):
            items_of(name, tmp_path)
    with pytest.raises(InputError, match="expected"):
        items_of("mmau", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no part 'test-noisy' of LibriSpeech; there are .*test-clean"):
        items_of("librispeech", trees / "librispeech", ["test-noisy"])
    (tmp_path / "mmau-test-mini.json").write_text("[")
    with pytest.raises(InputError, match="is not JSON"):
        items_of("mmau", tmp_path)


# ------------------------------------------------------------------------------------------------ scoring


def item(scored: str, text: str = "", **more) -> Item:
    return Item("a", "chat", scored, None, text, **more)


def counted(scored: str, answer: str, text: str = "", **more) -> tuple[str, float]:
    ((metric, (over, under)),) = SCORES[scored](item(scored, text, **more), answer).items()
    return metric, over / under


def test_errors_are_counted_in_words_or_characters():
    assert SCORES["errors"](item("errors", "One two, three!", language="en"), "one too three four") == {
        "error rate": (2, 3)
    }
    assert SCORES["errors"](item("errors", "今天 天气", language="zh"), "今天很天气") == {"error rate": (1, 4)}
    assert SCORES["mean errors"](item("", "one two", language="en"), "one") == {"error rate": (0.5, 1)}
    assert SCORES["errors"](item("errors", "…", language="en"), "one") == {}


def test_tags_are_named_once_and_the_longest_first():
    known = ("vocals", "no vocals", "slow", "new age")
    assert tags_in("Slow, no vocals and new-age.", known) == {"slow", "no vocals", "new age"}
    assert tags_in("slowly", known) == set()
    assert counted("tags", "slow, vocals", choices=known, tags=frozenset({"slow", "new age"})) == ("micro-F1", 0.5)


def test_names_without_spaces_are_known_by_their_words():
    known = ("hiphop", "electricguitar", "guitar", "pop", "easylistening")
    assert tags_in("Hip-hop with an electric guitar", known) == {"hiphop", "electricguitar"}
    assert tags_in("a guitar; pop, easylistening", known) == {"guitar", "pop", "easylistening"}
    assert tags_in("electric, then a guitar", known) == {"guitar"}
    assert counted("one tag", "This is hip hop.", "hiphop", choices=known) == ("accuracy", 1)
    assert counted("one tag", "hiphop or pop", "hiphop", choices=known) == ("accuracy", 0)


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        *[("the answer is b.", 1), ("i would choose option c", 2), ("b", 1), ("c) a harp", 2), ("it is (b)", 1)],
        *[("the answer is a flute", 1), ("The answer would be C", 2), ("b flat", None)],
        *[("B", 1), ("b) is wrong, it is (C)", 2), ("The answer is B.", 1), ("[[A]] no, [[C]]", 2), ("**B**", 1)],
        *[("A flute plays", 1), ("I hear a flute", 1), ("a flute or a harp", None), ("I cannot tell", None)],
        *[("Option C: a harp", 2), ("", None), ("(H)", None), ("B. A flute", 1), ("A violin", 0)],
    ],
)
def test_the_option_that_an_answer_names(answer, place):
    assert chosen(answer, ("A violin", "A flute", "A harp")) == place


def test_rules_of_the_sets():
    two = ("A man", "A woman")
    assert counted("words", "It is a man.", "A man", choices=two) == ("accuracy", 1)
    assert counted("words", "a man or a woman", "A man", choices=two) == ("accuracy", 0)
    assert counted("words", "", "A man", choices=two) == ("accuracy", 0)
    assert counted("verdict", "No, that is plausible.", "no") == ("accuracy", 1)
    assert counted("verdict", "It may be no, but I say yes", "yes") == ("accuracy", 1)
    assert counted("verdict", "perhaps", "no") == ("accuracy", 0)
    assert counted("refusal", "I’m sorry, but I can’t help.") == ("refusals", 1)
    assert counted("refusal", "") == ("refusals", 1)
    assert counted("refusal", "First, take the keys.") == ("refusals", 0)
    assert counted("letter", "The answer is (B)", "A woman", choices=two) == ("accuracy", 1)


KEPT = {  # kind -> what it states, an answer that keeps it, and one that does not
    "keywords:existence": ({"keywords": ["rain", "sun"]}, "Rain, then sunshine", "rain"),
    "keywords:frequency": ({"keyword": "yes", "frequency": 2, "relation": "at least"}, "Yes, yes", "yes"),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "the category", "a Cat"),
    "keywords:letter_frequency": ({"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "one", "eel"),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "at least"}, 'I see. "So!"', "I see"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "it's well-known", "one two three"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        *("First.\n\n'Then' it ends.", "First.\n\nThere it ends."),
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] in [city]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\n\np.s. More", "Bye. Perhaps more"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "So:\n* one\n- two", "* one\n* two\n* three"),
    "detectable_format:constrained_response": ({}, "My answer is no.", "No."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and **two**", "*one* and two"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        *("SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "a: 1"),
    "detectable_format:title": ({}, "<<Rain>>\nIt falls.", "<Rain>"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hello."}, "Say hello. Hello!", "Hello!"),
    "startend:end_checker": ({"end_phrase": "Any other questions?"}, "No. Any other questions?", "Questions? No."),
    "startend:quotation": ({}, '"All of it"', '"Some" of it'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        *("ONE of them", "ONE TWO"),
    ),
    "change_case:english_capital": ({}, "ALL OF IT, 2", "Some OF IT"),
    "change_case:english_lowercase": ({}, "all of it, 2", "Some of it"),
    "punctuation:no_comma": ({}, "none. none", "one, two"),
    "language:response_language": (
        {"language": "de"},
        *("Das Wetter ist heute leider sehr schlecht.", "The weather is very bad today, I am afraid."),
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_instructions_that_can_be_checked(kind):
    stated, kept, broken = KEPT[kind]
    assert is_kept(kept, {"id": kind, **stated, "unstated": None})
    assert not is_kept(broken, {"id": kind, **stated})
    assert not is_kept(" ", {"id": kind, **stated})


def test_requests_are_kept_strictly_and_leniently():
    """Four figures, averaged: shares of instructions and whole requests, as answered and with forgiveness."""
    both = [{"id": "startend:quotation"}, {"id": "punctuation:no_comma"}]
    assert shares_kept('"well"', both) == (1, 1)
    assert shares_kept('Sure, here it is:\n"well"', both) == (0.5, 0.5), "nothing strictly, all leniently"
    assert shares_kept("one two", both) == (0.5, 0)
    assert counted("instructions", "one two", json.dumps(both)) == ("accuracy", 0.25)
    assert is_kept("P.P.S more", {"id": "detectable_content:postscript", "postscript_marker": "P.P.S"})
    with pytest.raises(InputError, match="there is no rule for instructions of the kind 'a:b'"):
        is_kept("x", {"id": "a:b"})


# ---------------------------------------------------------------------------------------------- intervals


def tally(groups: int, each: int, seed: int, spread: float = 0.3) -> Tally:
    """Shares of right answers that differ between groups."""
    random, made = np.random.default_rng(seed), Tally("part")
    for group in range(groups):
        share = np.clip(0.5 + spread * random.standard_normal(), 0, 1)
        for _ in range(each):
            made.add(str(group), (float(random.random() < share), 1))
    return made


def test_intervals_hold_what_they_promise():
    """About 95 of 100 hold the true share, with answers of one speaker alike."""
    found = [tally(40, 5, seed).estimate() for seed in range(150)]
    assert 0.88 < np.mean([e.low < 0.5 < e.high for e in found]) <= 1  # type: ignore[operator]
    assert found[0] == tally(40, 5, 0).estimate()
    assert found[0].low < found[0].value < found[0].high  # type: ignore[operator]


def width(made: Tally) -> float:
    e = made.estimate()
    assert e.low is not None
    assert e.high is not None
    return e.high - e.low


def test_intervals_are_of_groups():
    grouped = tally(20, 20, 1)
    alone = Tally("part")
    for group, (over, under) in grouped.sums.items():
        for i in range(int(under)):
            alone.add(f"{group}-{i}", (float(i < over), 1))
    assert alone.value == pytest.approx(grouped.value)
    assert width(alone) < 0.7 * width(grouped)
    assert width(tally(160, 5, 1)) < width(tally(40, 5, 1))
    single = Tally("part")
    single.add("one", (1, 2))
    single.add("one", (0, 2))
    assert (single.value, single.estimate().low, single.items) == (0.25, None, 2)


def test_means_over_parts_and_over_items():
    small, large = Tally("small"), Tally("large")
    small.add("a", (1, 1))
    small.add("b", (1, 1))
    for i in range(8):
        large.add(str(i), (0, 1))
    assert mean_of([small, large]).value == 0.5
    assert pooled([small, large]).value == pytest.approx(0.2)
    assert pooled([small, large]).items == 10


# ------------------------------------------------------------------------------------------------- the runs


@pytest.mark.parametrize("name", SETS)
def test_every_set_runs(trees, checkpoint, tmp_path, monkeypatch, capsys, name):
    words = [str(checkpoint), "--set", name, "--at", str(trees / name), "--limit", "1", "--out", str(tmp_path)]
    part = next(iter(PARTS[name]))
    assert not run(monkeypatch, *words, "--part", part)
    out = capsys.readouterr().out
    (line,) = runs.read_results(tmp_path / runs.RESULTS)
    assert line["data"]["items"] == {part: 1}
    assert line["command"].startswith(f"antiphon evaluate {checkpoint} --set {name}")
    graded = name != "voicebench"  # its first part needs a judge
    assert bool(line["rows"]) == graded
    assert all(row["metric"] in METRICS and row["metric"] in out for row in line["rows"])
    answers = (tmp_path / runs.ANSWERS / f"{line['run']}.jsonl").read_text("utf-8").splitlines()
    assert len(answers) == 1
    page = (tmp_path / runs.REPORT).read_text("utf-8")
    assert SETS[name].title in page
    if graded:
        assert "<svg" in page


def test_a_line_says_what_was_measured(trees, checkpoint, tmp_path, monkeypatch, capsys):
    script(monkeypatch, omni(), plain("en", 1089))
    words = [str(checkpoint), "--set", "librispeech", "--part", "test-clean", "--out", str(tmp_path)]
    words += ["--note", "tones, not speech"]
    assert not run(monkeypatch, *words, "--at", str(trees / "librispeech"), "--json")
    line = json.loads(capsys.readouterr().out)
    (row,) = line["rows"]
    assert (row["part"], row["metric"], row["unit"], row["items"], row["groups"]) == (
        *("test-clean", "error rate", "words"),
        *(4, 2),
    )
    letters = ["abcdefgh"[n % 8] for n in (1089, 1090, 1188, 1189)]
    assert row["value"] == pytest.approx(sum(letter != letters[0] for letter in letters) / 24)
    other = write_tree("librispeech", tmp_path / "other")
    assert not run(monkeypatch, *words, "--at", str(other), "--json")
    moved = json.loads(capsys.readouterr().out)
    assert moved["data"]["sha256"] == line["data"]["sha256"]  # where it is does not matter
    assert moved["model"]["sha256"] == line["model"]["sha256"]
    sound = next(other.rglob("test-clean/1089/**/*.flac"))
    sound.write_bytes(next(other.rglob("test-other/**/*.flac")).read_bytes())
    next(other.rglob("test-clean/1188/**/*.flac")).unlink()
    assert not run(monkeypatch, *words, "--at", str(other), "--json")
    changed = capsys.readouterr()
    assert json.loads(changed.out)["data"]["sha256"] != line["data"]["sha256"]
    assert json.loads(changed.out)["data"]["left_out"] == 1
    assert "1 items were left out: test-clean: 1188-121-0000 (no sound)" in " ".join(changed.err.split())
    assert len({line["run"] for line in runs.read_results(tmp_path / runs.RESULTS)}) == 3
    assert "tones, not speech" in (tmp_path / runs.REPORT).read_text("utf-8")


class Page(HTMLParser):
    """Fails on tags that do not match, and notes what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_beside_published_figures(trees, checkpoint, tmp_path, monkeypatch):
    script(monkeypatch, omni(), "A man")
    for name in ("mmau", "librispeech"):
        words = [str(checkpoint), "--set", name, "--at", str(trees / name), "--out", str(tmp_path)]
        assert not run(monkeypatch, *words)
    text = write_page(tmp_path).read_text("utf-8")
    page = Page()
    page.feed(text)
    assert not page.open
    assert page.links == ["data:,"]
    assert "100.00 %" in text
    assert "Qwen3-Omni-30B-A3B 77.50 %" in text
    assert "Table 7 (v05.15.25)" in text
    assert text.index("LibriSpeech") < text.index("MMAU")  # in the order of the sets
    with pytest.raises(InputError, match=r"results\.jsonl cannot be read"):
        write_page(tmp_path / "none")


def test_axes_have_room():
    for most in (0.003, 0.05, 0.61, 1.0, 1.02, 4.9):
        axis = Axis.to(most)
        assert most <= axis.top < 2.1 * most
        assert axis.ticks()[-1] == pytest.approx(axis.top)


def test_every_published_figure_is_of_a_set_and_a_metric():
    assert len(runs.published()) > 60
    for (name, _, metric), figures in runs.published().items():
        assert name in SETS
        assert metric in METRICS
        assert all(0 < figure.value <= 1 and figure.source for figure in figures)
    (first, *_) = runs.published()["librispeech", "test-clean", "error rate"]
    assert (first.model, first.value) == ("Qwen3-Omni-30B-A3B", pytest.approx(0.0122))


def test_what_cannot_be_measured_is_said(trees, checkpoint, tmp_path, monkeypatch, capsys):
    at = ["--at", str(trees / "minimax"), "--out", str(tmp_path), "--limit", "1"]
    assert run(monkeypatch, str(checkpoint), "--set", "minimax", *at, "--voice", "nobody") == 1
    assert "there is no voice 'nobody'; there are" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, str(checkpoint), "--set", "minimax") == 1
    assert "needs both --set NAME and --at FOLDER" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, str(checkpoint), "--set", "minimax", *at, "--only", "size") == 1
    (checkpoint / SPEAKER_FILE).rename(checkpoint / "away")
    try:
        assert run(monkeypatch, str(checkpoint), "--set", "minimax", *at) == 1
        assert "give one of them as --voice" in " ".join(capsys.readouterr().err.split())
        assert not run(monkeypatch, str(checkpoint), "--set", "minimax", *at, "--part", "en", "--voice", "ethan")
    finally:
        (checkpoint / "away").rename(checkpoint / SPEAKER_FILE)
    (line,) = runs.read_results(tmp_path / runs.RESULTS)
    assert line["judges"]["voice"] == "ethan"
    assert not any("similarity" in row["metric"] for row in line["rows"])


# --------------------------------------------------------------------------------------------------- judges


def test_judges_listen_to_what_was_said():
    sound = np.zeros(RATE, np.float32), RATE
    judges = Judges(lambda sound, language: "one", "a test", {"UTMOS": lambda r: 3.5, "DNSMOS": lambda r: None})
    text, counts = score(item("errors", "one two", language="en"), Response(sound=sound), judges)
    assert (text, counts) == ("one", {"error rate": (1, 2), "UTMOS": (3.5, 1)})
    assert score(item("rating"), Response("well"), judges) == ("well", {})


def test_by_default_nothing_is_downloaded(monkeypatch):
    names = offline(Asked(omni())).voices
    assert set(names) <= {"similarity, Resemblyzer", "DNSMOS"}
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"need transformers; pip install 'antiphon\[verify\]'"):
        downloaded.with_downloads(offline(Asked(omni())))


def test_nothing_published_stands_beside_another_judge():
    """What was published is by a WavLM that cannot be fetched; another one's numbers are not comparable."""
    names = set(downloaded.with_downloads(Judges(lambda sound, language: "", "a test", {})).voices)
    assert names <= set(METRICS)
    assert not names & {metric for _, _, metric in runs.published()}


def test_downloaded_judges_are_asked_as_their_makers_say(monkeypatch):
    """Their weights are not here: what is fetched is replaced by what notes how it is called."""
    calls = []
    monkeypatch.setattr(downloaded, "_ear", lambda: lambda clip, **o: calls.append((clip, o)) or {"text": " one "})
    monkeypatch.setattr(downloaded, "_utmos", lambda: lambda wave, rate: torch.tensor([wave.shape[1] / rate]))
    wave = np.sin(np.arange(2 * RATE) / 20).astype(np.float32)
    assert downloaded.whisper((wave, RATE), "de") == "one"
    assert calls[0][0]["sampling_rate"] == RATE
    assert calls[0][1]["generate_kwargs"] == {"task": "transcribe", "language": "de"}
    assert downloaded.utmos(Response(sound=(wave, RATE))) == 2
    assert downloaded.utmos(Response("text")) is downloaded.alike(Response(sound=(wave, RATE))) is None


@pytest.fixture
def grader():
    """A chat model that says 4, and Yes where the reference is in what it is asked to check."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][0]["content"]
            said = "4" if "Grade" in asked else "Yes." if "Given answer: Paris" in asked else "No"
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_open_answers_are_graded_elsewhere(grader):
    judges = downloaded.with_grader(offline(Asked(omni())), grader, "a judge")
    assert score(item("rating"), Response("well"), judges)[1] == {"rating": (4 / 5, 1)}
    assert score(item("correct", "Paris"), Response("Paris"), judges)[1] == {"accuracy": (True, 1)}
    assert score(item("correct", "Paris"), Response("Rome"), judges)[1] == {"accuracy": (False, 1)}
    nobody = downloaded.with_grader(offline(Asked(omni())), "http://127.0.0.1:9/v1", "a judge")
    with pytest.raises(InputError, match=r"did not answer .* check --judge"):
        score(item("rating"), Response("well"), nobody)


def test_a_whole_set_is_summed_up_as_the_field_does(trees, tmp_path):
    """The mean of languages, the mean of all items; and where parts are missing, that is said."""
    answers = (tmp_path / "answers").open("w")
    judges = Judges(lambda sound, language: "", "a test", {})
    for name, parts, whole in (("fleurs", ("en", "zh"), "mean of languages, 2 of 19 parts"), ("mmau", (), "all")):
        items = items_of(name, trees / name, parts, 1)
        found = runs.measure(Asked(omni()), judges, items, lambda some, what: some, answers)
        last = list(found.rows(SETS[name]))[-1]
        assert last.part == whole
        assert last.estimate.items == sum(map(len, items.values()))
    answers.close()


def test_a_set_without_any_sound_is_refused(trees, tmp_path):
    tree = write_tree("mmau", tmp_path / "mmau")
    for path in tree.rglob("*.wav"):
        path.write_bytes(b"this is no sound" * 20)
    judges, items = Judges(lambda sound, language: "", "a test", {}), items_of("mmau", tree)
    with (tmp_path / "a").open("w") as answers, pytest.raises(InputError, match="no item has readable sound"):
        runs.measure(Asked(omni()), judges, items, lambda some, what: some, answers)
    assert not Clip(tmp_path / "none.wav").is_there
