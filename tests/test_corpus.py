"""The synthetic corpus: the same whatever made it, in pieces that go on, in splits that do not leak."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from antiphon.errors import ConfigError
from antiphon.train import commands, corpus, espeak, music, noises
from antiphon.train.corpus import Clip, make_clip, make_corpus, read_corpus, read_sets, size_of
from antiphon.train.data import Example, load_samples, read_cuts
from antiphon.train.dialog import KINDS
from antiphon.train.recipe import read_recipe
from antiphon.train.run import CORPUS, ORDER, read_course
from antiphon.train.talks import messages_of
from antiphon.train.world import LANGUAGES, share_of

RECIPES = Path(__file__).parent.parent / "recipes" / "tiny"
SHIFTED = {"kind": "speech", "count": 6, "languages": ["en"], "voices": "many"}
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


def test_a_corpus_is_made_where_its_course_is_trained(tmp_path, monkeypatch):
    made: list[tuple[str, set[str]]] = []
    monkeypatch.setattr(commands, "make_sets_of", lambda sets, out, jobs: made.append((str(out), set(sets))) or {})
    (tmp_path / "mine").mkdir()
    corpus = "seed: 0\nsets: {rain: {kind: sound, count: 2}}\n"
    (tmp_path / "mine/corpus.yaml").write_text(corpus)
    (tmp_path / "mine/order.yaml").write_text("train: []\n")
    table = f"corpus:\n  {corpus.replace(chr(10), chr(10) + '  ')}\nruns: []\n"
    (tmp_path / "mine/alone.yaml").write_text(table)
    (tmp_path / "mine/bare.yaml").write_text("runs: []\n")
    monkeypatch.chdir(tmp_path / "mine")
    for recipe in ("corpus.yaml", tmp_path / "mine", "alone.yaml"):
        commands.corpus(Path(recipe))
    commands.corpus(Path("corpus.yaml"), Path("elsewhere"))
    assert made == [(f"cuts/{name}", {"rain"}) for name in ("mine", "mine", "alone")] + [("elsewhere", {"rain"})]
    for course in (read_course(tmp_path / "mine"), read_course(Path("alone.yaml"))):
        assert (f"cuts/{course.name}", set(course.corpus)) in made, "where train looks"
    with pytest.raises(ConfigError, match=r"^bare.yaml makes no corpus; give a recipe of one, such as "):
        commands.corpus(Path("bare.yaml"))


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


def test_shifted_clips_are_longer_or_shorter_and_say_the_same():
    plain, shifted = (read_sets({"sets": {"a": {**SHIFTED, "shifted": share}}}, "test")["a"] for share in (0.0, 1.0))
    pairs = [(make_clip("a", plain, i), make_clip("a", shifted, i)) for i in range(6)]
    assert [one.text for one, _ in pairs] == [other.text for _, other in pairs]
    factors = [other.seconds / one.seconds for one, other in pairs]
    assert all(1 / 1.2 < factor < 1 / 0.84 for factor in factors)
    assert max(factors) - min(factors) > 0.05


def test_the_words_of_the_world_are_listed(made):
    words = json.loads((made["speech"].parent / "world.json").read_text(encoding="utf-8"))["words"]
    assert set(words) == {"de", "en", "zh"}
    assert all(20 < len(known) <= 400 for known in words.values())


def is_tested(name: str) -> bool:
    return name.startswith("test-")


def is_trained(name: str) -> bool:
    return not name.startswith(("test-", "valid"))


def split_by(clip: Clip) -> list[str]:
    """The texts of a clip by whose hashes it belongs to a split; none of those of labels and of words in any order."""
    kind = clip.custom.get("kind")
    if kind is None:
        return [clip.text] if clip.language else []
    users = [m["content"] for m in clip.custom["messages"] if m["role"] == "user"]
    asked = [clip.parts[part["supervision"]].text for content in users for part in content]
    if kind in ("music", "sound", "words"):
        return []
    return {"language": asked[:1], "repeat": [clip.parts[-1].text]}.get(kind, list(accumulate(asked)))


@pytest.fixture(scope="module")
def met() -> dict[str, dict[str, set[str]]]:
    """What some clips of each of tiny's sets are made of, as the engines are asked for it; they give a short hum."""
    found = dict[str, dict[str, set[str]]]()
    kinds = ("text", "share", "template", "engine", "variant", "timbre", "noise")

    def asked(hum: float = 0.1, **what: str) -> np.ndarray:
        for kind, value in what.items():
            now[kind].add(value)
        return np.full(round(hum * espeak.RATE), 0.1, np.float32)

    def play(notes: list[music.Note], instrument: str, timbres: music.Timbres, rng: np.random.Generator) -> np.ndarray:
        return asked(timbre=f"{timbres} {instrument}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(espeak, "say", lambda text, language, voice: asked(engine="espeak", variant=voice.variant))
        patch.setattr(espeak, "flite_say", lambda text, voice: asked(engine="flite", variant=f"flite {voice}"))
        patch.setattr(espeak, "festival_say", lambda lines: [asked(engine="festival") for _ in lines])
        patch.setattr(music, "render", play)
        patch.setattr(noises, "render", lambda kind, s, rng, timbres: asked(s, noise=f"{timbres} {kind}"))
        for name, s in read_corpus(RECIPES / "corpus.yaml").items():
            now = found[name] = {kind: set() for kind in kinds}
            count = len(s.dialogs or KINDS) if s.kind in ("dialog", "asked") else 3 if s.languages else 24
            small = replace(s, count=count, augment=0.0)
            for clip in (make_clip(name, small, i) for i in range(size_of(small))):
                now["template"] |= {
                    part.custom["template"] for part in (*clip.parts, clip) if "template" in part.custom
                }
                if texts := split_by(clip):
                    shares = {share_of(text) for text in texts}
                    now["text"].add("\n".join(texts))
                    now["share"].add(next(share for share in ("test", "valid", "train") if share in shares))
    return found


def all_of(met: dict[str, dict[str, set[str]]], kind: str, of: Callable[[str], bool]) -> set[str]:
    return set().union(*(own[kind] for name, own in met.items() if of(name)))


def test_no_sentence_of_a_test_is_trained(met):
    for name, own in met.items():
        share = "test" if is_tested(name) else "train" if is_trained(name) else "valid"
        assert own["share"] <= {share}, name
    tested, trained = all_of(met, "text", is_tested), all_of(met, "text", is_trained)
    assert min(len(tested), len(trained)) > 200
    assert not tested & trained
    assert not all_of(met, "text", lambda name: name.startswith("valid")) & trained


def test_no_voice_template_engine_or_timbre_of_a_test_is_trained(met):
    for kind, name, least in (
        ("variant", "test-voice", 4),
        ("variant", "test-engine", 1),
        ("engine", "test-engine", 1),
        ("template", "test-template", len(LANGUAGES)),
        ("timbre", "test-music", 8),
        ("noise", "test-sound", 10),
    ):
        trained = all_of(met, kind, is_trained)
        assert len(met[name][kind]) >= least, f"{name} has {met[name][kind]}"
        assert trained
        assert not met[name][kind] & trained, f"{kind} of {name}"


def test_no_recipe_of_tiny_trains_on_a_test():
    courses = [RECIPES / "digits.yaml", RECIPES / "labels.yaml"]
    alone = [path for path in RECIPES.glob("*.yaml") if path.name not in (ORDER, CORPUS) and path not in courses]
    recipes = [*map(read_recipe, alone), *(recipe for course in courses for recipe in read_course(course).recipes)]
    assert {recipe.name for recipe in recipes} > {"tokenizer", "aut", "codec", "thinker", "speech"}
    for recipe in recipes:
        mixed = {source.cuts for source in recipe.data.mix}
        looked_at = {source.cuts for source in recipe.data.validation}
        assert mixed, recipe.name
        assert not {name for name in mixed if "test" in name or "valid" in name}, recipe.name
        assert not {name for name in looked_at if "test" in name} | looked_at & mixed, recipe.name


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
        (
            {"kind": "speech", "count": 1, "languages": ["en"], "voices": "few"},
            "voices is 'few'; expected one of train",
        ),
        ({"kind": "dialog", "count": 1, "split": "mixed"}, "split is 'mixed', which only sentences can be"),
        (
            {"kind": "digits", "count": 1, "languages": ["en"], "voices": "presets"},
            "'presets', in which only sentences",
        ),
    ],
)
def test_a_wrong_set_is_one_sentence(value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_sets({"sets": {"a": value}}, "test")
