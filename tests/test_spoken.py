import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.spoken import LINK_TEXT, Spoken, spoken
from antiphon.tokenizer import Tokenizer, byte_tokenizer
from tests.tiny_tokenizer import tiny_tokenizer

PLAIN = [
    *("2 * 3", "2*3*4", "x**2", "2 ** 3", "snake_case", "_x", "a_b__c", "C#", "#1", "5 - 3", "-5", "well-known", "a|b"),
    *("f(x)", "see [1]", "[sic]", "a[0] (1)", "1 | 2", "3 < 4 > 1", "1 + 1", "Price*", "____", "$5 (net)", "~~"),
    *("hello", "Привет", "你好，世界。", "こんにちは", "안녕", "مرحبا", "🙂", "👍🏽", "é", "12 345", ": :", "1. one"),
]
MARKED = {
    "a **bold** and *soft* and __strong__ word": "a bold and soft and strong word",
    "***both*** **one *two* three**": "both one two three",
    "这是**重点**内容，*强调*。": "这是重点内容，强调。",
    "**Note**that **2*3**": "Notethat 2*3",
    "**x\ny**": "x\ny",
    "*open\n\n5* hotel": "open\n\n5* hotel",
    "call `f` and ``g`*h*`` *so*": "call f and g*h* so",
    "literally `a*b* _x_ [1](2)` *so*": "literally a*b* _x_ [1](2) so",
    "# Title\n\n### Part\ntext # 1": "Title\n\nPart\ntext # 1",
    "#tag\n####### x": "#tag\n####### x",
    "- one\n* two\n+ three\n  - **four**\n> five\n1. six": "one\ntwo\nthree\n  four\nfive\n1. six",
    "-5\n--x\n--\n---\n***\ny": "-5\n--x\n--\n\n\ny",
    "a\n```python\n**code** ``\n# x\n```\nb": "a\nb",
    "a\n````\n```\n````\nb": "a\nb",
    "a\n```\nnever closed **x**\n": "a\n",
    "```inline``` b": "inline b",
    "see [the *docs*](https://x.y/a_(b)_c) now": "see the docs now",
    "[a](b)[c] [d](e": "a[c] d",
    "[d](e\nf": "d\nf",
    "| a | b |\n|---|:-:|\n| Tom|5 - 3 |\n\nx | y": "a b \n \nTom 5 - 3 \n\nx | y",
    "|a|b|\n|c|d|": "a b\nc d",
    "<think>\n**why**\n</think>\n\n- so it is": "so it is",
    "a<think>b</think># Title": "aTitle",
    "or **`": "or ",
    "open [bracket": "open [bracket",
    "shut [bracket]": "shut [bracket]",
    "a *": "a *",
    'on it <tool_call>\n{"name": "**"}\n</tool_call>\n<tool_call>x</tool_call> done': "on it done",
    "cut <tool_call> off </think>": "cut ",
    "tail **</think> end": "tail **end",
    "<think>a<tool_call>b</think>c": "c",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def by_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` cut as finely as it goes; tags stay whole."""
    ids = []
    for token in tokenizer.encode(text):
        piece = tokenizer.piece(token)
        whole = piece[:1] == b"<" and len(piece) > 2
        ids += [token] if whole else [i for b in piece for i in tokenizer.encode_bytes(bytes([b]))]
    return ids


@pytest.mark.parametrize(("text", "said"), MARKED.items())
def test_marks_are_not_said(tokenizer, text, said):
    for ids in (tokenizer.encode(text), by_bytes(tokenizer, text)):
        assert tokenizer.decode(spoken(ids, tokenizer)) == said


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(PLAIN), st.sampled_from([" ", " ", "\nand ", "\n\nThen "])), max_size=8))
def test_plain_text_passes_id_for_id(tokenizer, chunks):
    text = "So " + "".join(chunk + gap for chunk, gap in chunks)
    for ids in (tokenizer.encode(text), by_bytes(tokenizer, text)):
        assert list(spoken(ids, tokenizer)) == ids


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="*_`[#-+>|<")))
def test_text_without_marks_is_never_delayed(tokenizer, text):
    speech = Spoken(tokenizer)
    for token in tokenizer.encode(text):
        assert speech.push(token) == [token]
    assert speech.flush() == []


@settings(max_examples=150)
@given(st.lists(st.integers(0, 767), max_size=20))
def test_any_ids_are_survived(tokenizer, ids):
    # control tokens and broken UTF-8 too, as untrained models make them
    said = list(spoken(ids, tokenizer))
    if not set("*_`[#-+>|") & set(tokenizer.decode(ids)) and not any(i >= 762 for i in ids):
        assert said == ids


SOUP = st.lists(st.sampled_from([*"*_`[]()#-+>|: \nax2é我", "**", "```", "\n\n", "](", "- ", "| ", "---"]), max_size=25)


@settings(max_examples=200)
@given(SOUP)
def test_what_is_said_does_not_hang_on_how_the_text_is_cut_into_tokens(tokenizer, soup):
    text = "".join(soup)
    said = tokenizer.decode(spoken(tokenizer.encode(text), tokenizer))
    assert tokenizer.decode(spoken(by_bytes(tokenizer, text), tokenizer)) == said
    assert [c for c in said if c.isalnum()] == [c for c in text if c.isalnum()] or "```" in text or "](" in text


@settings(max_examples=100)
@given(SOUP, st.integers(0, 25))
def test_a_fork_says_the_same(tokenizer, soup, at):
    ids = tokenizer.encode("".join(soup))
    speech = Spoken(tokenizer)
    said = [i for token in ids[:at] for i in speech.push(token)]
    fork = copy.copy(speech)
    rest = [i for token in ids[at:] for i in speech.push(token)] + speech.flush()
    assert [i for token in ids[at:] for i in fork.push(token)] + fork.flush() == rest
    assert said + rest == list(spoken(ids, tokenizer))


def test_words_after_a_mark_are_spelled_as_without_it(tokenizer):
    # the Talker knows " bold", not " " and "bold"
    marked, bare = tokenizer.encode("or **bold** or"), tokenizer.encode("or bold or")
    assert [tokenizer.decode([i]) for i in marked] == ["or", " **", "bold", "**", " or"]
    assert list(spoken(marked, tokenizer)) == bare
    assert [tokenizer.decode([i]) for i in bare] == ["or", " bold", " or"]


def test_ids_are_asked_for_one_at_a_time(tokenizer):
    asked = 0

    def thinking():
        nonlocal asked
        for token in tokenizer.encode("one two **three** four"):
            asked += 1
            yield token

    speech = spoken(thinking(), tokenizer)
    for n in (1, 2):
        next(speech)
        assert asked <= n + 1
    assert tokenizer.decode(speech).endswith("three four")


def test_a_mark_waits_for_one_character(tokenizer):
    speech = Spoken(tokenizer)
    star, space, word = (tokenizer.encode(text)[0] for text in ("*", " ", "a"))
    assert speech.push(word) == [word]
    assert speech.push(star) == []
    assert speech.push(space) == [star, space]
    assert speech.push(star) == []
    assert speech.push(word) == tokenizer.encode("a")


def test_brackets_wait_for_the_length_of_a_link_at_most(tokenizer):
    speech = Spoken(tokenizer)
    bracket, word = (tokenizer.encode(text)[0] for text in ("[", "a"))
    said = [speech.push(token) for token in [bracket] + [word] * (LINK_TEXT + 1)]
    assert said[:-1] == [[]] * (LINK_TEXT + 1)
    assert [i for ids in said for i in ids] == [bracket] + [word] * (LINK_TEXT + 1)
    assert speech.push(word) == [word]


def test_a_tokenizer_without_tags_has_no_spans(tokenizer):
    plain = byte_tokenizer(tokenizer.config)
    ids = plain.encode("<think>a</think>")
    assert list(spoken(ids, plain)) == ids
