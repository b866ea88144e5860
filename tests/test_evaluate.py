"""`antiphon evaluate`: what is asked of a model, and how its answers are counted."""

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet

from antiphon import cli
from antiphon.evaluate import voice
from antiphon.evaluate.tags import statistics
from antiphon.evaluate.trial import Trial, asked, percent
from antiphon.evaluate.world import rates_of, tempo_in
from antiphon.generate import collect
from antiphon.train import commands, espeak
from antiphon.train.corpus import Set
from antiphon.train.data import Example, read_cuts
from antiphon.train.stages.thinker import read_talk
from antiphon.train.talks import messages_of
from antiphon.weights import save_checkpoint
from tests.models import VOCAB, omni
from tests.test_train_speech import MESSAGES, SAYINGS, cut
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts")
    talk = cut(folder, "talk", [1.2, 0.72, 0.8, 0.64], SAYINGS, {"messages": MESSAGES}, "ethan")
    CutSet.from_cuts([talk]).to_jsonl(folder / "talk.jsonl.gz")
    alone = [cut(folder, f"say{i}", [0.6 + i / 10], [t], None, "chelsie") for i, t in enumerate(SAYINGS)]
    CutSet.from_cuts(alone).to_jsonl(folder / "say.jsonl.gz")
    return folder


def trial(cuts, limit=2):
    return Trial(omni(), cuts, limit, lambda items, what: items)


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


def test_the_answer_of_a_session_is_of_its_messages(cuts):
    example = Example(read_cuts(cuts / "talk.jsonl.gz")[0], "talk")
    *before, _ = messages_of(example)
    long, short = (
        collect(asked(omni(), example, m).respond(audio=False, max_text_tokens=6)) for m in (before, before[:2])
    )
    assert long.text_ids != short.text_ids


@pytest.mark.parametrize("clones", [True, False])
def test_cloning_tells_a_voice_that_was_taken_from_one_that_was_not(clones, monkeypatch, cuts):
    """With a cloner that is the speech engine itself, and with one that has a single voice."""

    def fingerprint(samples, rate):
        x = statistics(samples, rate)
        return x / np.linalg.norm(x)

    model: Any = SimpleNamespace(clone=lambda samples, rate: next(taken))
    taken = iter(range(len(voice.UNHEARD)))
    monkeypatch.setattr(voice, "voice_print", fingerprint)
    monkeypatch.setattr(
        voice, "said", lambda model, text, i: voice.rendered(voice.UNHEARD[i if clones else 0], "en", i, 2.0)
    )
    nearest, alike = voice.cloning(Trial(model, cuts, 1, lambda items, what: items))
    share = float(nearest.seen.rstrip(" %")) / 100
    near, ceiling, floor = (float(x) for x in re.findall(r"\d\.\d+", alike.seen))
    assert (share > 0.6) == clones
    assert floor < ceiling
    assert (near > (floor + ceiling) / 2) == clones


def test_a_rendering_is_as_long_as_asked():
    short, rate = voice.rendered(voice.UNHEARD[0], "ja", 3, 0.0)
    long, _ = voice.rendered(voice.UNHEARD[0], "ja", 3, 6.0)
    assert len(short) < 6 * rate <= len(long)
    assert np.array_equal(long[: len(short)], short)
    assert len(set(voice.UNHEARD)) == 20
    assert not {v.variant for v in voice.UNHEARD} & set(espeak.TRAIN_VARIANTS)
