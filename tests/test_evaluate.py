"""`antiphon evaluate`: what is asked of a model, and how its answers are counted."""

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lhotse import CutSet

from antiphon import cli
from antiphon.codec import Codec
from antiphon.config_json import parse_codec_config
from antiphon.error_rates import BY_CHARACTER
from antiphon.evaluate import voice as voice_table
from antiphon.evaluate.commands import make_sets
from antiphon.evaluate.trial import Trial, asked, percent
from antiphon.evaluate.world import is_answered, rates_of, tempo_in
from antiphon.generate import collect, load
from antiphon.train import commands, espeak
from antiphon.train.corpus import Set, make_corpus
from antiphon.train.data import Example, read_cuts
from antiphon.train.stages.thinker import read_talk
from antiphon.train.talks import messages_of
from antiphon.train.world import LANGUAGES, sentences
from antiphon.weights import save_checkpoint, save_codec
from tests.models import VOCAB, omni, script, sound, stop_speech_after
from tests.test_train_codec import CODEC
from tests.test_train_speech import MESSAGES, SAYINGS, cut
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts")
    talk = cut(folder, "talk", [1.2, 0.72, 0.8, 0.64], SAYINGS, {"messages": MESSAGES}, "ethan")
    CutSet.from_cuts([talk]).to_jsonl(folder / "talk.jsonl.gz")
    alone = [cut(folder, f"say{i}", [0.6 + i / 10], [t], None, "chelsie") for i, t in enumerate(SAYINGS)]
    CutSet.from_cuts(alone).to_jsonl(folder / "say.jsonl.gz")
    alone = [cut(folder, f"other{i}", [0.6], [t], None, "chelsie") for i, t in enumerate(SAYINGS)]
    for one in alone[1:]:
        one.supervisions[0].language = "sv"
    CutSet.from_cuts(alone).to_jsonl(folder / "other.jsonl.gz")
    return folder


def trial(cuts, limit: int | None = 2, model: Any = None):
    return Trial(model or omni(), cuts, limit, lambda items, what: items)


def test_a_session_is_asked_what_training_asks(cuts):
    """The ids that a session has read before it answers are those of the conversation in training, up to the answer."""
    model, example = omni(), Example(read_cuts(cuts / "talk.jsonl.gz")[0], "talk")
    *before, _ = messages_of(example)
    session = asked(model, example, before)
    session.commit()
    opened = [*session.ids, *session.writer.open_reply()]
    talk = read_talk(example, model.tokenizer, model.config)
    assert opened == talk.ids[: talk.replies[-1].start]
    assert len(talk.clips) == sum(not isinstance(m["content"], str) for m in before)


def test_rates_of_anyones_cuts(cuts):
    (row,) = rates_of(trial(cuts), "say.jsonl.gz")
    assert row.what == "say.jsonl.gz, en"
    assert row.seen.endswith("% of words")
    examples = trial(cuts).examples("say")
    assert [e.text for e in examples] == SAYINGS[:2]
    assert len(trial(cuts, 1).examples("say")) == 1
    assert not trial(cuts).examples("say", ("de",))


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (2, 3), (1, 2)])
def test_anyones_cuts_are_all_taken_and_in_any_language(cuts, monkeypatch, limit, count):
    """Unless there is a limit, which is of each language; one that the model does not know is heard without a name."""
    script(monkeypatch, omni(), "hello there")
    taken = []
    t = replace(trial(cuts, limit), track=lambda items, what: taken.append(len(items)) or items)
    known, unknown = rates_of(t, "other.jsonl.gz")
    assert (known.what, unknown.what) == ("other.jsonl.gz, en", "other.jsonl.gz, sv")
    assert known.seen == "100.0 % of words"
    assert taken == [count]


def test_a_clip_is_heard_in_pieces_as_long_as_those_of_training(cuts, monkeypatch):
    """As `antiphon transcribe` hears it."""
    short = omni({"longest_clip": 0.5})
    script(monkeypatch, short, "one", "two", "three")
    assert trial(cuts, model=short).heard(sound(0.9), 16000, "en") == "one two"
    assert trial(cuts).heard(sound(0.9), 16000, "en") == "three"


def test_a_streamed_clip_is_heard_as_the_whole_one(cuts):
    t = trial(cuts)
    whole, live = (t.hear(t.examples("say"), "", streamed=streamed) for streamed in (False, True))
    assert whole == live
    assert any(heard for _, heard, _ in whole)


def test_a_tempo_is_read_from_its_digits():
    assert tempo_in("the tempo was one two zero") == 120
    assert tempo_in("The tempo was nine six.") == 96
    assert tempo_in("that was a piano") == np.inf
    assert percent(0.1234) == "12.3 %"


def test_the_command(cuts, monkeypatch, capsys, tmp_path):
    model = omni()
    write_tokenizer(tmp_path, vocab_size=VOCAB)
    save_checkpoint(model, tmp_path)
    words = ["antiphon", "evaluate", str(tmp_path), "--data", str(cuts / "say.jsonl.gz"), "--limit", "2"]
    for form in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*words, *form])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        out = capsys.readouterr().out
        rows = json.loads(out) if form else out.splitlines()[2:]
        assert len(rows) == 1
        assert "say.jsonl.gz, en" in str(rows)
    monkeypatch.setattr(sys, "argv", ["antiphon", "evaluate", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    said = " ".join(capsys.readouterr().out.split())
    assert all(part in said for part in ("NFKC", "in words", *BY_CHARACTER))
    monkeypatch.setattr(sys, "argv", [*words, "--only", "taste"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert "there is no table 'taste'; there are listening, windows," in " ".join(capsys.readouterr().err.split())


def test_a_set_whose_engine_is_missing_is_named_and_left_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(espeak, "flite_is_installed", lambda: False)
    sets = {"engine": Set("speech", 1, voices="flite", languages=("en",)), "music": Set("music", 1)}
    assert list(commands.make_sets_of(sets, tmp_path, 1)) == ["music"]
    assert "engine needs another speech engine" in capsys.readouterr().err


CALL, REPLY = MESSAGES[4]["content"], MESSAGES[6]["content"]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ((CALL, REPLY), True),
        (('<tool_call>{"arguments": {}, "name":  "f"}', "Hello, there!"), True),
        (('<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', REPLY), False),
        ((REPLY, REPLY), False),
        ((CALL, CALL), False),
        ((CALL, "hello"), False),
    ],
)
def test_a_call_of_a_tool_counts_as_much_as_the_reply(cuts, monkeypatch, said, right):
    model, (example,) = omni(), trial(cuts).examples("talk", task="talk")
    script(monkeypatch, model, *said)
    assert is_answered(model, example) == right


def test_the_answer_of_a_session_is_of_its_messages(cuts):
    example = Example(read_cuts(cuts / "talk.jsonl.gz")[0], "talk")
    *before, _ = messages_of(example)
    long, short = (
        collect(asked(omni(), example, m).respond(audio=False, max_text_tokens=6)) for m in (before, before[:2])
    )
    assert long.text_ids != short.text_ids


@pytest.mark.long
def test_ceilings_are_of_the_same_sentence_in_the_same_voice(tmp_path, monkeypatch):
    """With a perfect speaker and a codec that loses everything: only what goes through the codec is not understood."""
    s = Set("speech", 2, "sentence", ("en", "ja"))
    make_corpus({"test-sentence": s}, tmp_path, 1, lambda done, of: None)
    t, coded, spoken = trial(tmp_path), [], []

    def again(model, codec, samples, rate):
        coded.append(samples)
        return np.zeros_like(samples), rate

    def said(model, text, voice):
        spoken.append((text, voice))
        return coded[-1], espeak.RATE

    monkeypatch.setattr(voice_table, "codec_of", lambda model: None)
    monkeypatch.setattr(voice_table, "again", again)
    monkeypatch.setattr(voice_table, "said", said)
    monkeypatch.setattr(Trial, "heard", lambda self, samples, rate, language: spoken[-1][0] if samples.any() else "")
    monkeypatch.setitem(sys.modules, "speechmos", None)
    rows = {row.what: row.seen for row in voice_table.speaking(t)}
    assert rows["speaking, read back"].startswith("0.0 %")
    assert rows["its ceiling, the codec alone"] == "100.0 % (en 100.0 ja 100.0)"
    assert rows["error added by the codec"] == "100.0 points"
    assert rows["nearest rendering is the sentence"] == "100.0 % (en 100.0 ja 100.0)"
    assert rows["nearest rendering, the codec alone"] == "0.0 % (en 0.0 ja 0.0)"
    assert rows["DNSMOS"] == "not measured: speechmos is not installed; pip install 'antiphon[eval]'"

    assert [name for _, name in spoken] == ["ethan", "chelsie"] * 2
    for language, samples, (text, name) in zip(("en", "en", "ja", "ja"), coded, spoken, strict=True):
        (reading,) = (one.spoken for one in sentences(language, "sentence", 2, 0) if one.text == text)
        assert np.array_equal(samples, espeak.say(reading, LANGUAGES[language].espeak, espeak.PRESETS[name]))


def face(voice: espeak.Voice) -> np.ndarray:
    """A voice print that tells variants well apart and pitches somewhat."""
    variants, pitches = espeak.HELD_OUT_VARIANTS, voice_table.PITCHES
    parts = [float(voice.variant == v) for v in variants] + [0.5 * (voice.pitch == p) for p in pitches]
    return np.array(parts) / np.linalg.norm(parts)


@pytest.mark.parametrize(
    ("cloned", "strict", "loose"),
    [
        (lambda i: i, "100.0 %", "100.0 %"),
        (lambda i: (i + 6) % 18, "0.0 %", "100.0 %"),  # the right variant, at another pitch
        (lambda i: 0, "5.0 %", "20.0 %"),
    ],
)
def test_a_clone_is_nearest_its_target_of_all_the_voices(cloned, strict, loose, monkeypatch, cuts):
    """Those of its own variant included; what is nearer than other variants alone is said beside it."""
    heard, taken = [], iter(range(len(voice_table.UNHEARD)))

    def rendered(voice, language, number, seconds=None):
        heard.append(seconds)
        return face(voice), 1

    model: Any = SimpleNamespace(clone=lambda samples, rate: next(taken))
    monkeypatch.setattr(voice_table, "unmeasured", lambda *packages: "")
    monkeypatch.setattr(voice_table, "rendered", rendered)
    monkeypatch.setattr(voice_table, "codec_of", lambda model: None)
    monkeypatch.setattr(voice_table, "again", lambda model, codec, samples, rate: (face(voice_table.UNHEARD[0]), 1))
    monkeypatch.setattr(voice_table, "voice_print", lambda samples, rate: samples)
    monkeypatch.setattr(voice_table, "said", lambda model, text, i: (face(voice_table.UNHEARD[cloned(i)]), 1))
    nearest, alike = voice_table.cloning(Trial(model, cuts, 1, lambda items, what: items))
    assert nearest.seen == f"{strict} ({loose} against other variants alone)"
    near, coded, ceiling, floor = (float(x) for x in re.findall(r"\d\.\d+", alike.seen))
    assert max(coded, floor) < ceiling == 1
    assert (near == ceiling) == (strict == "100.0 %")
    assert heard == [3.0] * 20 + [None] * 20, "references are of three seconds, renderings of one sentence"


def test_a_rendering_is_as_long_as_asked():
    short, rate = voice_table.rendered(voice_table.UNHEARD[0], "ja", 3)
    long, _ = voice_table.rendered(voice_table.UNHEARD[0], "ja", 3, 6.0)
    assert len(short) < 6 * rate == len(long)
    assert np.array_equal(long[: len(short)], short)
    assert len(set(voice_table.UNHEARD)) == 20
    assert not {v.variant for v in voice_table.UNHEARD} & set(espeak.TRAIN_VARIANTS)


# ------------------------------------------------------------------------------------- the whole table, at once

RECIPE = """
sets:
  music: {kind: music, count: 3}
  sound: {kind: sound, count: 3}
  zh-en: {kind: speech, count: 1, languages: [zh, en]}
  test-sentence: {kind: speech, count: 1, languages: [en, ja], split: sentence}
  test-voice: {kind: speech, count: 1, languages: [en], split: sentence, voices: held-out, seed: 1}
  test-template: {kind: speech, count: 1, languages: [en], split: template, seed: 2}
  test-music: {kind: music, count: 1, voices: held-out, seed: 5}
  test-sound: {kind: sound, count: 1, voices: held-out, seed: 6}
  test-dialog: {kind: dialog, count: 2, dialogs: [arithmetic, tools], languages: [en], split: sentence, rate: 24000}
"""


def test_the_whole_table_on_a_fresh_machine(checkpoint, monkeypatch, capsys, tmp_path):
    """Every table, of a random checkpoint that says the same to everything; sets are made, judges may be missing."""
    folder = shutil.copytree(checkpoint("base"), tmp_path / "model")
    torch.manual_seed(0)
    codec = Codec(parse_codec_config({**CODEC, "num_quantizers": 4, "codebook_size": 64}))
    for name, tensor in codec.named_buffers():
        if name.endswith("embed_sum"):
            tensor.normal_()
    save_codec(codec, folder)
    model = load(folder)
    script(monkeypatch, model, "English")
    stop_speech_after(monkeypatch, model, 4)
    for package in ("resemblyzer", "speechmos"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "corpus.yaml").write_text(RECIPE)
    words = ["antiphon", "evaluate", str(folder), "--recipe", str(tmp_path / "corpus.yaml"), "--json"]
    monkeypatch.setattr(sys, "argv", [*words, "--cuts", str(tmp_path / "cuts")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    rows = {row["what"]: row["seen"] for row in json.loads(capsys.readouterr().out)}
    made = {path.name for path in (tmp_path / "cuts").glob("*.jsonl.gz")}
    assert made == {f"{name}.jsonl.gz" for name in yaml.safe_load(RECIPE)["sets"]} - {"zh-en.jsonl.gz"}

    assert re.fullmatch(r"\d+\.\d % \(en 100\.0 ja \d+\.\d\)", rows["listening, new sentences, known voices"])
    assert rows["zh and en, new sentences"] == "not measured: the set was not made"
    for window in (1, 2, 4, 8):
        assert rows[f"window of {window} s"].endswith(" streamed, 100.0 % the same text")
    assert rows["language identified"] == "50.0 %"
    for kind in ("instrument", "mode", "tempo within 4 %", "sound"):
        assert re.fullmatch(r"0\.0 %, librosa (0|100)\.0 %", rows[kind])
    assert {rows[f"answers right, {what}"] for what in ("language en", "kind arithmetic", "kind tools")} == {"0.0 %"}
    assert re.match(r"\d+\.\d % \(en 100\.0 ja \d", rows["speaking, read back"])
    assert rows["error added by the codec"] == "0.0 points"  # it says the same to everything
    assert re.match(r"\d+\.\d % \(en ", rows["nearest rendering, the codec alone"])
    assert rows["DNSMOS"] == "not measured: speechmos is not installed; pip install 'antiphon[eval]'"
    assert rows["similarity to the target"].endswith("and then pip install --no-deps Resemblyzer")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert rows["size of everything shipped"] == f"{size / 1e6:.1f} MB"
    assert re.fullmatch(r"RTF \d+\.\d\d, first sound \d+ ms", rows[f"speed, {torch.get_num_threads()} threads"])


def test_words_of_the_world_are_added_and_never_lost(tmp_path):
    recipe = tmp_path / "corpus.yaml"
    for name, languages, known in (
        ("test-a", "[ja]", {"ja"}),
        ("test-b", "[de, en]", {"de", "en", "ja"}),
        ("test-b", "[fr]", {"de", "en", "ja"}),  # the set is there, so there is nothing to make
    ):
        recipe.write_text(f"sets: {{{name}: {{kind: speech, count: 1, split: sentence, languages: {languages}}}}}")
        make_sets(recipe, tmp_path / "cuts")
        assert set(json.loads((tmp_path / "cuts/world.json").read_text("utf-8"))["words"]) == known
