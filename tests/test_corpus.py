"""The synthetic corpus: the same whatever made it, in pieces that go on, in splits that do not leak."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from antiphon.errors import ConfigError
from antiphon.train import corpus, espeak
from antiphon.train.corpus import make_corpus, read_corpus, read_sets
from antiphon.train.data import Example, load_samples, read_cuts
from antiphon.train.talks import messages_of

RECIPES = Path(__file__).parent.parent / "recipes" / "tiny"
SETS = {
    "seed": 3,
    "sets": {
        "speech": {"kind": "speech", "count": 4, "languages": ["zh", "en"], "augment": 0.5},
        "other": {"kind": "speech", "count": 3, "languages": ["de"], "voices": "held-out", "split": "sentence"},
        "over": {"kind": "over", "count": 2, "languages": ["en"]},
        "music": {"kind": "music", "count": 3},
        "sound": {"kind": "sound", "count": 3},
        "dialog": {"kind": "dialog", "count": 12, "languages": ["en"], "rate": 24000, "augment": 0.3},
        "digits": {"kind": "digits", "count": 4, "languages": ["en"], "rate": 24000},
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SHARD", 5)
        return make_corpus(read_sets(SETS, "test"), tmp_path_factory.mktemp("corpus"), 1, lambda done, of: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_processes_change_nothing_and_what_is_lost_is_made_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 5)
    again = make_corpus(read_sets(SETS, "test"), tmp_path, 2, lambda done, of: None)
    one, two = contents(made["speech"].parent), contents(again["speech"].parent)
    assert one == two
    (tmp_path / "speech/0001.jsonl").unlink()
    (tmp_path / "speech/0001.wav").write_bytes(b"cut off")
    counted = list[tuple[int, int]]()
    make_corpus(read_sets(SETS, "test"), tmp_path, 1, lambda done, of: counted.append((done, of)))
    assert contents(tmp_path) == one
    assert counted[-1][0] == counted[-1][1] == len(list(tmp_path.glob("*/*.wav")))


def test_lists_of_words_cannot_be_guessed(tmp_path):
    """Each is said again as it was asked; words of all languages in any order, no two lists alike."""
    table = {"sets": {"words": {"kind": "words", "count": 40, "languages": ["de", "ja", "zh"], "silent": True}}}
    cuts = read_cuts(make_corpus(read_sets(table, "test"), tmp_path, 1, lambda done, of: None)["words"])
    lists = [messages_of(Example(cut, "text"))[-1]["content"] for cut in cuts]
    for cut, listed in zip(cuts, lists, strict=True):
        asked = messages_of(Example(cut, "text"))[0]["content"]
        assert asked.endswith(f" {listed}")
        assert len(asked) > len(listed) + 1
    assert len(set(lists)) == len(cuts) == 120
    pairs = {pair for listed in lists for pair in pairwise(listed.split())}
    assert len(pairs) > 0.95 * sum(len(listed.split()) - 1 for listed in lists)


def test_another_recipe_makes_other_shards(made, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 5)
    changed = {**SETS, "seed": 4}
    other = make_corpus(read_sets(changed, "test"), tmp_path, 1, lambda done, of: None)
    assert gzip.decompress(other["speech"].read_bytes()) != gzip.decompress(made["speech"].read_bytes())


def test_lhotse_reads_what_is_there(made):
    for name, path in made.items():
        cuts = read_cuts(path)
        assert len(cuts) == len(list(CutSet.from_jsonl_lazy(path)))
        for cut in cuts:
            samples = load_samples(cut, cut.sampling_rate)
            assert len(samples) == round(cut.duration * cut.sampling_rate)
            assert np.abs(samples).max() > 0.05, f"{name}: {cut.id} is silent"
            assert cut.supervisions[0].custom["label_source"] == "synthetic"
            assert cut.supervisions[-1].end == pytest.approx(cut.duration, abs=1e-3)


def test_clips_do_not_overlap_in_their_wav(made):
    for path in made.values():
        places: dict[str, list[tuple[float, float]]] = {}
        for cut in read_cuts(path):
            places.setdefault(cut.recording.id, []).append((cut.start, cut.end))
        for spans in places.values():
            assert all(a[1] < b[0] for a, b in pairwise(spans))


def test_a_dialog_is_messages_over_its_parts(made):
    for cut in read_cuts(made["dialog"]):
        example = Example(cut, "talk")
        used = list[int]()
        for message in messages_of(example):
            if message["role"] == "user":
                used += [part["supervision"] for part in message["content"]]
            elif message["role"] == "assistant" and "supervision" in message:
                said = cut.supervisions[message["supervision"]]
                assert said.text == message["content"]
                assert said.speaker == message["voice"] in espeak.PRESETS
                assert "augmented" not in said.custom
                used.append(message["supervision"])
        assert used == list(range(len(cut.supervisions)))
        text = messages_of(Example(cut, "text"))
        assert all(isinstance(m["content"], str) for m in text)
    kinds = {cut.custom["kind"] for cut in read_cuts(made["dialog"])}
    assert len(kinds) == 12


def test_digits_are_said_back(made):
    for cut in read_cuts(made["digits"]):
        asked, answered = cut.supervisions
        assert asked.text == answered.text
        assert answered.speaker in espeak.PRESETS


def test_held_out_voices_are_others(made):
    heard = {s.speaker.rpartition("-")[0] for cut in read_cuts(made["other"]) for s in cut.supervisions}
    assert heard <= set(espeak.HELD_OUT_VARIANTS)
    trained = {cut.supervisions[0].speaker.rpartition("-")[0] for cut in read_cuts(made["speech"])}
    assert not trained & set(espeak.HELD_OUT_VARIANTS)


def test_the_words_of_the_world_are_listed(made):
    words = json.loads((made["speech"].parent / "world.json").read_text(encoding="utf-8"))["words"]
    assert set(words) == {"de", "en", "zh"}
    assert all(20 < len(known) <= 400 for known in words.values())


def test_tiny_does_not_train_on_its_tests():
    """By the recipe: no set of the training uses a split, a voice or a timbre of the tests."""
    sets = read_corpus(RECIPES / "corpus.yaml")
    for name, s in sets.items():
        tested = name.startswith("test-")
        assert tested == (s.split in ("sentence", "template") or s.voices in ("held-out", "flite")), name
        assert name.startswith("valid") == (s.split == "valid" or (s.kind in ("music", "sound") and s.seed == 1)), name
    assert any(s.voices == "flite" for s in sets.values())
    assert {c for s in sets.values() if s.split == "sentence" for c in s.languages} == {
        *sets["others"].languages,
        "zh",
        "en",
    }


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"kind": "song", "count": 1}, "kind is 'song'; expected one of"),
        ({"kind": "speech", "count": 1}, "languages is missing"),
        ({"kind": "speech", "count": 1, "languages": ["xx"]}, "no language xx"),
        ({"kind": "speech", "count": "many", "languages": ["en"]}, "count is 'many'"),
        ({"kind": "speech", "count": 1, "languages": ["en"], "voice": "m1"}, "has no setting 'voice'"),
    ],
)
def test_a_wrong_set_is_one_sentence(value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_sets({"sets": {"a": value}}, "test")
