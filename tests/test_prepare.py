"""antiphon prepare: small trees of the real layouts, read back as training reads them, beside lhotse's own reading."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tokenizers

from antiphon.errors import InputError
from antiphon.train import commands
from antiphon.train.data import Mix, load_samples, read_cuts
from antiphon.train.prepare import KINDS, prepare
from antiphon.train.recipe import Data, Source

TINY = Path(__file__).parent.parent / "recipes/tiny"
LIBRISPEECH = {  # chapter -> lines of its transcript
    "dev-clean/84/121123": ["84-121123-0000 GO DO YOU HEAR", "84-121123-0001 BUT IN LESS THAN FIVE MINUTES"],
    "dev-clean/84/121550": ["84-121550-0000 BUT WITH FULL RAVISHMENT"],
    "dev-clean/174/50561": ["174-50561-0000 FORGOTTEN TOO THE NAME OF GILLIAN"],
    "train-clean-100/19/198": ["19-198-0000 NORTHANGER ABBEY", "19-198-0001 THIS LITTLE WORK WAS FINISHED"],
}
AISHELL = {
    "BAC009S0002W0122": ("train", "而 对 楼市 成交 抑制 作用 最 大 的 限 购"),
    "BAC009S0002W0123": ("train", "也 成为 地方 政府 的 眼中 钉"),
    "BAC009S0724W0121": ("dev", "广州市 房地产 中介 协会 分析"),
    "BAC009S0764W0121": ("test", "甚至 出现 ｂ 交易 几乎 停滞 的 情况"),
}


def tone(seconds, rate=16000, seed=0):
    """Two tones in a little noise, so that any part of it differs from any other."""
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * (200 + 37 * seed) * t) * np.cos(2 * np.pi * 3 * t) + 0.02 * rng.standard_normal(len(t))
    return x.astype(np.float32)


def write_sound(path, seconds=1.0, rate=16000, seed=0, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.stack([tone(seconds, rate, seed + c) for c in range(channels)], 1)
    soundfile.write(path, x, rate)
    return soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1)


def write_librispeech(folder):
    sounds = {}
    for chapter, lines in LIBRISPEECH.items():
        place = folder / "LibriSpeech" / chapter
        for i, name in enumerate(line.split()[0] for line in lines):
            sounds[name] = write_sound(place / f"{name}.flac", 0.5 + 0.3 * i, seed=len(sounds))
        speaker, number = place.parts[-2:]
        (place / f"{speaker}-{number}.trans.txt").write_text("".join(f"{line}\n" for line in lines))
    return sounds


def write_aishell(folder):
    root, sounds = folder / "data_aishell", {}
    for name, (part, _) in AISHELL.items():
        sounds[name] = write_sound(root / "wav" / part / name[6:11] / f"{name}.wav", 0.6, seed=len(sounds))
    (root / "transcript").mkdir()
    lines = "".join(f"{name} {text}\n" for name, (_, text) in AISHELL.items())
    (root / "transcript" / "aishell_transcript_v0.8.txt").write_text(lines, encoding="utf-8")
    return sounds


def write_kaldi(folder):
    """Two recordings, the first of three segments, the second a command; returns the samples of each utterance."""
    a, b = (write_sound(folder / "sound" / f"{name}.wav", 2.0, 8000, seed) for seed, name in enumerate("ab"))
    lines = {
        "wav.scp": [f"rec-a {folder}/sound/a.wav", f"rec-b cat {folder}/sound/b.wav |"],
        "text": ["spk1-1 guten Morgen", "spk1-2 gute Nacht", "spk1-3 bis bald", "spk2-1 auf Wiedersehen"],
        "utt2spk": ["spk1-1 spk1", "spk1-2 spk1", "spk1-3 spk1", "spk2-1 spk2"],
        "segments": ["spk1-1 rec-a 0.25 1.0", "spk1-2 rec-a 1.0 -1", "spk1-3 rec-a 0.5 9.5", "spk2-1 rec-b 0 1.5"],
    }
    write_tables(folder, lines)
    return {"spk1-1": a[2000:8000], "spk1-2": a[8000:], "spk1-3": a[4000:], "spk2-1": b[:12000]}


def write_tables(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        (folder / name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def prepared(kind, source, out, **options):
    """Cuts by part as training reads them, and what was told."""
    told = []
    manifests = prepare(kind, source, out, tell=told.append, **options)
    assert sorted(manifests.values()) == sorted(out.iterdir()), "nothing but the manifests is left behind"
    return {part: read_cuts(path) for part, path in manifests.items()}, told


def assert_sounds(cuts, sounds, rate=16000):
    """Every cut gives the samples of its utterance."""
    assert {c.id for c in cuts} == sounds.keys()
    for cut in cuts:
        assert np.abs(sounds[cut.id]).max() > 0.1
        np.testing.assert_array_equal(load_samples(cut, rate), sounds[cut.id])


def said(cuts):
    return [(c.id, c.supervisions[0].text, c.supervisions[0].language, c.supervisions[0].speaker) for c in cuts]


def as_known(manifests):
    """What lhotse's recipe says of each utterance."""
    recordings = {r.id: r for r in manifests["recordings"]}
    return {
        s.id: (s.text, s.speaker, s.start, s.duration, recordings[s.recording_id].num_samples)
        for s in manifests["supervisions"]
    }


def as_prepared(cuts):
    return {
        c.id: (c.supervisions[0].text, c.supervisions[0].speaker, c.start, c.duration, c.recording.num_samples)
        for c in cuts
    }


# ----------------------------------------------------------------------------------------------- librispeech


def test_librispeech(tmp_path):
    from lhotse.recipes.librispeech import prepare_librispeech

    sounds = write_librispeech(tmp_path / "in")
    parts, told = prepared("librispeech", tmp_path / "in", tmp_path / "out")
    assert not told
    assert said(parts["train-clean-100"]) == [
        ("19-198-0000", "northanger abbey", "en", "19"),
        ("19-198-0001", "this little work was finished", "en", "19"),
    ]
    assert_sounds([c for cuts in parts.values() for c in cuts], sounds)
    theirs = prepare_librispeech(tmp_path / "in/LibriSpeech", normalize_text="lower")
    assert {p: as_known(m) for p, m in theirs.items()} == {p: as_prepared(cuts) for p, cuts in parts.items()}


def test_what_a_supervision_says_of_its_source(tmp_path):
    write_librispeech(tmp_path / "in")
    out = prepare("librispeech", tmp_path / "in/LibriSpeech", tmp_path / "out")
    lines = [json.loads(line) for line in gzip.decompress(out["dev-clean"].read_bytes()).splitlines()]
    assert len(lines) == 4
    assert all(
        x["supervisions"][0]["custom"] == {"label_source": "human", "teacher": None, "score": None} for x in lines
    )


def test_a_mix_is_drawn_from_what_was_prepared(tmp_path):
    """The name of a part is what a recipe's mix says."""
    write_librispeech(tmp_path / "libri")
    write_aishell(tmp_path / "ai")
    prepare("librispeech", tmp_path / "libri", tmp_path / "cuts/libri")
    prepare("aishell", tmp_path / "ai", tmp_path / "cuts/ai")
    sources = (Source("libri/dev-clean.jsonl.gz"), Source("ai/train.jsonl.gz"))
    mix = Mix(Data(sources, batch_seconds=3.0), sources, tmp_path / "cuts", seed=3)
    drawn = [example for step in range(40) for example in mix.draw(step)]
    assert {e.language for e in drawn} == {"en", "zh"}
    assert {e.custom("label_source") for e in drawn} == {"human"}
    assert all(load_samples(e.cut, 16000).std() > 0.05 for e in drawn[:6])


def write_recipe(folder):
    """A recipe of a tokenizer of the first part of LIBRISPEECH, and the model it is for."""
    folder.mkdir()
    model = json.loads((TINY / "model.json").read_text())
    model["thinker_config"]["text_config"]["vocab_size"] = 310
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "tokenizer.yaml").write_text("stage: tokenizer\ndata: {mix: [{cuts: dev-clean.jsonl.gz}]}\n")
    return folder / "tokenizer.yaml"


def test_what_is_prepared_is_found_by_a_recipe(tmp_path, monkeypatch, capsys):
    """The two commands as they are, without telling either where the cuts are."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "mine")
    missing = "there is no manifest cuts/mine/dev-clean.jsonl.gz or cuts/dev-clean.jsonl.gz; make it with antiphon"
    with pytest.raises(InputError, match=f"^{missing} corpus or antiphon prepare$"):
        commands.train(recipe)
    write_librispeech(tmp_path / "in")
    commands.prepare("librispeech", tmp_path / "in")
    commands.train(recipe)
    folder = tmp_path / "runs/mine/tokenizer"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (folder / "config.json").is_file()
    cuts = read_cuts("cuts/dev-clean.jsonl.gz")
    counts = [len(tokenizer.encode(c.supervisions[0].text, add_special_tokens=False).ids) for c in cuts]
    mean = sum(counts) / sum(c.duration for c in cuts)
    most = max(n / c.duration for n, c in zip(counts, cuts, strict=True))
    assert f"tokens per second of speech, and of the clip with most: en {mean:.1f} ({most:.1f})" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_cuts_of_a_course_come_before_those_of_all(tmp_path):
    write_librispeech(tmp_path / "in")
    write_aishell(tmp_path / "ai")
    prepare("librispeech", tmp_path / "in", tmp_path / "cuts")
    (made,) = read_cuts("train-clean-100.jsonl.gz", tmp_path / "cuts/mine")[:1]
    assert load_samples(made, 16000).std() > 0.05
    prepare("aishell", tmp_path / "ai", tmp_path / "cuts/mine")
    (tmp_path / "cuts/mine/train.jsonl.gz").rename(tmp_path / "cuts/mine/train-clean-100.jsonl.gz")
    assert [c.id for c in read_cuts("train-clean-100.jsonl.gz", tmp_path / "cuts/mine")] == list(AISHELL)[:2]


def test_bad_rows_are_named_and_left_out(tmp_path):
    write_librispeech(tmp_path)
    chapter = tmp_path / "LibriSpeech/dev-clean/84/121123"
    with (chapter / "84-121123.trans.txt").open("a") as file:
        file.write("84-121123-0002\n84-121123-0003 NOWHERE\n84-121123-0004 NOT SOUND\n84-121123-0005 CUT SHORT\n")
        file.write("84-121123-0006 EMPTY\n84-121123-0000 SAID AGAIN\n")
    write_sound(chapter / "84-121123-0002.flac")
    (chapter / "84-121123-0004.flac").write_bytes(b"this is no sound")
    write_sound(chapter / "84-121123-0005.flac", 3.0)
    whole = (chapter / "84-121123-0005.flac").read_bytes()
    (chapter / "84-121123-0005.flac").write_bytes(whole[: len(whole) // 2])  # a download that was interrupted
    (chapter / "84-121123-0006.flac").write_bytes(b"")
    parts, told = prepared("librispeech", tmp_path, tmp_path / "out")
    assert len(parts["dev-clean"]) == 4
    assert told == [
        "dev-clean: 6 of 10 rows are left out: 84-121123-0002 (no text), 84-121123-0003 (no audio), 84-121123-0004 "
        "(cannot be read), 84-121123-0005 (cannot be read), 84-121123-0006 (cannot be read) and 1 more"
    ]


def test_the_same_bytes_every_time(tmp_path, monkeypatch):
    write_librispeech(tmp_path / "in")
    first = prepare("librispeech", tmp_path / "in", tmp_path / "one")
    monkeypatch.setattr(time, "time", lambda: 2e9)  # which gzip writes down
    second = prepare("librispeech", tmp_path / "in", tmp_path / "two")
    assert [p.read_bytes() for p in first.values()] == [p.read_bytes() for p in second.values()]
    assert [c.id for c in read_cuts(first["dev-clean"])] == [
        *("174-50561-0000", "84-121123-0000", "84-121123-0001", "84-121550-0000")
    ]


def test_a_manifest_is_replaced_whole_or_not_at_all(tmp_path):
    write_librispeech(tmp_path / "in")
    manifest = prepare("librispeech", tmp_path / "in", tmp_path / "out")["dev-clean"]
    before = manifest.read_bytes()
    for flac in (tmp_path / "in/LibriSpeech/dev-clean").rglob("*.flac"):
        flac.write_bytes(b"gone")
    with pytest.raises(InputError, match=r"^none of 4 rows can be used: 174-50561-0000 \(cannot be read\), "):
        prepare("librispeech", tmp_path / "in", tmp_path / "out")

    def stopped(part, done, total):
        if done == 2:
            raise KeyboardInterrupt

    write_librispeech(tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        prepare("librispeech", tmp_path / "in", tmp_path / "out", progress=stopped)
    assert manifest.read_bytes() == before
    assert not list((tmp_path / "out").glob("*.part"))


def test_progress_counts_every_row(tmp_path):
    write_librispeech(tmp_path)
    seen = []
    prepare("librispeech", tmp_path, tmp_path / "out", progress=lambda *state: seen.append(state))
    assert seen == [("dev-clean", i, 4) for i in (1, 2, 3, 4)] + [("train-clean-100", i, 2) for i in (1, 2)]


# --------------------------------------------------------------------------------------------------- aishell


def test_aishell(tmp_path):
    from lhotse.recipes.aishell import prepare_aishell

    sounds = write_aishell(tmp_path / "in")
    parts, told = prepared("aishell", tmp_path / "in", tmp_path / "out")
    assert not told
    assert list(parts) == ["train", "dev", "test"]
    assert said(parts["train"])[1] == ("BAC009S0002W0123", "也成为地方政府的眼中钉", "zh", "S0002")
    assert parts["test"][0].supervisions[0].text == "甚至出现B交易几乎停滞的情况"
    assert_sounds([c for cuts in parts.values() for c in cuts], sounds)
    theirs = prepare_aishell(tmp_path / "in")
    assert {p: as_known(m) for p, m in theirs.items()} == {p: as_prepared(cuts) for p, cuts in parts.items()}


def test_aishell_in_part(tmp_path):
    """Of the speakers that are unpacked, what is missing is named; of the others nothing is said."""
    write_aishell(tmp_path)
    root = tmp_path / "data_aishell"
    (root / "wav/train/S0002/BAC009S0002W0122.wav").unlink()
    write_sound(root / "wav/train/S0002/BAC009S0002W0999.wav")
    (root / "wav/dev/S0724/BAC009S0724W0121.wav").unlink()
    (root / "wav/dev/S0724").rmdir()
    parts, told = prepared("aishell", root, tmp_path / "out")
    assert {part: [c.id for c in cuts] for part, cuts in parts.items()} == {
        "train": ["BAC009S0002W0123"],
        "test": ["BAC009S0764W0121"],
    }
    assert told == [
        "train: 2 of 3 rows are left out: BAC009S0002W0122 (no audio), BAC009S0002W0999 (no text)",
    ]


# ----------------------------------------------------------------------------------------------------- kaldi


def test_kaldi_with_segments(tmp_path):
    sounds = write_kaldi(tmp_path / "train")
    parts, told = prepared("kaldi", tmp_path / "train", tmp_path / "out", language="German")
    assert not told
    assert said(parts["train"])[0] == ("spk1-1", "guten Morgen", "de", "spk1")
    assert [(c.start, c.duration) for c in parts["train"]] == [(0.25, 0.75), (1.0, 1.0), (0.5, 1.5), (0.0, 1.5)]
    assert_sounds(parts["train"], sounds, rate=8000)


def test_kaldi_without_segments(tmp_path, monkeypatch):
    """Utterances are whole files; relative paths are those of the working folder, as in Kaldi, or of the directory."""
    from lhotse.kaldi import load_kaldi_data_dir

    folder, names = tmp_path / "data/dev", ("u1", "u2")
    sounds = {name: write_sound(folder / f"{name}.wav", 0.7, seed=i) for i, name in enumerate(names)}
    (folder / "u1.wav").rename(tmp_path / "elsewhere.wav")
    tables = {
        "wav.scp": ["u1 elsewhere.wav", f"u2 {folder}/u2.wav"],
        "text": ["u1 one", "u2 二"],
        "utt2spk": ["u1 s1", "u2 s2"],
        "utt2lang": ["u1 English", "u2 zh"],
    }
    write_tables(folder, tables)
    monkeypatch.chdir(tmp_path)
    theirs = load_kaldi_data_dir(folder, 16000)
    (folder / "wav.scp").write_text("u1 elsewhere.wav\nu2 u2.wav\n")
    parts, told = prepared("kaldi", tmp_path / "data", tmp_path / "out", language="ar")  # for rows that do not say
    assert not told
    assert said(parts["dev"]) == [("u1", "one", "en", "s1"), ("u2", "二", "zh", "s2")]
    assert as_prepared(parts["dev"]) == as_known({"recordings": theirs[0], "supervisions": theirs[1]})
    monkeypatch.chdir("/")
    assert_sounds(parts["dev"], sounds)


def test_kaldi_bad_rows(tmp_path):
    write_kaldi(tmp_path / "train")
    for name, line in {
        "segments": "spk3-1 rec-c 0 1\nspk3-2 rec-a 3 4\nspk3-3 rec-a soon later\nspk3-4 rec-a 0 1\n",
        "text": "spk3-1 eins\nspk3-2 zwei\nspk3-3 drei\nspk3-4\nspk3-5 fünf\n",
        "wav.scp": "rec-c cat nothing-there.wav |\n",
    }.items():
        with (tmp_path / "train" / name).open("a", encoding="utf-8") as file:
            file.write(line)
    parts, told = prepared("kaldi", tmp_path / "train", tmp_path / "out", language="de")
    assert len(parts["train"]) == 4
    assert told == [
        "train: 5 of 9 rows are left out: spk3-1 (cannot be read), spk3-2 (no sound at its times), spk3-3 (unreadable "
        "segment), spk3-4 (no text), spk3-5 (no segment)"
    ]


# ---------------------------------------------------------------------------------------------------- folder


def test_a_folder_with_texts_beside(tmp_path):
    source = tmp_path / "mine"
    sounds = {
        "a": write_sound(source / "a.wav", 0.5),
        "deep/b.c": write_sound(source / "deep/b.c.flac", 0.5, 44100, seed=1),
        "stereo": write_sound(source / "stereo.WAV", 0.5, seed=2, channels=2),
    }
    for name in (*sounds, "alone"):
        (source / f"{name}.txt").write_text(f"  ŝi {name}\n jes ", encoding="utf-8")
    write_sound(source / "silent.ogg")
    (source / "notes.md").write_text("not a row")
    parts, told = prepared("folder", source, tmp_path / "out", language="id")
    assert told == ["mine: 2 of 5 rows are left out: alone (no audio), silent (no text)"]
    assert said(parts["mine"]) == [(name, f"ŝi {name} jes", "id", None) for name in sorted(sounds)]
    high = [c for c in parts["mine"] if c.sampling_rate == 44100]
    assert [len(load_samples(c, 16000)) for c in high] == [8000]
    assert_sounds(high, {"deep/b.c": sounds.pop("deep/b.c")}, 44100)
    assert_sounds([c for c in parts["mine"] if c not in high], sounds)


@pytest.mark.parametrize(
    ("ending", "reason"), [("flac", "cannot be read"), ("mp3", "cut short"), ("opus", "cannot be read")]
)
def test_files_that_are_not_whole(tmp_path, ending, reason):
    """Their headers promise what training would not find."""
    for name in ("whole", "half"):
        path = tmp_path / "in" / f"{name}.{ending}"
        path.parent.mkdir(exist_ok=True)
        options: dict[str, Any] = {"format": "OGG", "subtype": "OPUS"} if ending == "opus" else {}
        soundfile.write(path, tone(2.0, 48000), 48000, **options)
        path.with_suffix(".txt").write_text("one two")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    parts, told = prepared("folder", tmp_path / "in", tmp_path / "out", language="en")
    assert told == [f"in: 1 of 2 rows are left out: half ({reason})"]
    assert load_samples(parts["in"][0], 16000).std() > 0.05


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_folder_with_a_table(tmp_path, ending):
    source = tmp_path / "mine"
    rows = [
        {"file": "clips/1.wav", "text": "ja, nein", "language": "de", "speaker": "anna"},
        {"file": "clips/2.wav", "text": "bella ciao", "language": "Italian", "speaker": ""},
        {"file": "clips/3.wav", "text": "klokka fem", "language": "no", "speaker": ""},
        {"file": "clips/4.wav", "text": "nie wieder", "language": "", "speaker": "anna"},
        {"file": "clips/5.wav", "text": "", "language": "de", "speaker": ""},
        {"file": "", "text": "lost", "language": "de", "speaker": ""},
    ]
    sounds = {f"clips/{i}": write_sound(source / f"clips/{i}.wav", 0.5, seed=i) for i in range(1, 6)}
    if ending == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        mark = "," if ending == "csv" else "\t"
        lines = [mark.join(f'"{v}"' for v in row) for row in (rows[0].keys(), *(row.values() for row in rows))]
    (source / f"metadata.{ending}").write_text("\n".join(lines), encoding="utf-8-sig")
    parts, told = prepared("folder", source, tmp_path / "out")
    assert said(parts["mine"]) == [
        ("clips/1", "ja, nein", "de", "anna"),
        ("clips/2", "bella ciao", "it", None),
    ]
    assert_sounds(parts["mine"], {name: sounds[name] for name in ("clips/1", "clips/2")})
    assert told == [
        "mine: 4 of 6 rows are left out: clips/3 (unknown language 'no'), clips/4 (no language; give --language), "
        "clips/5 (no text), a row without a file (no audio)"
    ]


def test_what_is_not_speech_has_no_language(tmp_path):
    write_sound(tmp_path / "in/rain.wav")
    (tmp_path / "in/rain.txt").write_text("Rain falls.")
    parts, _ = prepared("folder", tmp_path / "in", tmp_path / "out", language="none")
    assert said(parts["in"]) == [("rain", "Rain falls.", None, None)]


# ----------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("kind", list(KINDS))
def test_nothing_there(tmp_path, kind):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(InputError, match=r"^there is nothing to prepare in .*; expected ") as error:
        prepare(kind, tmp_path, tmp_path / "out")
    assert KINDS[kind].expected in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"^there is no folder .*nowhere; expected "):
        prepare(kind, tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"kind": "musan"}, "^there is no kind of corpus 'musan'; expected librispeech, aishell, kaldi, folder$"),
        ({}, {"language": "xx"}, "^there is no language 'xx'; expected ar, de, .* or none$"),
        ({"metadata.csv": b"path,text\na.wav,yes"}, {}, "has columns path, text; expected file and text"),
        ({"metadata.jsonl": b'{"file": "a.wav", "text": "yes"}\n[1]'}, {}, "^line 2 of .*jsonl is not an object"),
        ({"metadata.jsonl": b"", "metadata.csv": b""}, {}, "has metadata.csv and metadata.jsonl; keep one"),
        ({"metadata.csv": "file,text\na.wav,sí".encode("latin-1")}, {}, "are not UTF-8; convert them$"),
        ({"wav.scp": b"u1 a.wav", "text": "u1 sí".encode("latin-1")}, {"kind": "kaldi"}, "are not UTF-8; convert"),
        ({"a.wav": b"", "a.txt": b"yes"}, {}, r"^none of 1 rows can be used: a \(cannot be read\)$"),
    ],
)
def test_bad_requests(tmp_path, files, options, message):
    source = tmp_path / "in"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        prepare(**({"kind": "folder", "source": source, "out": tmp_path / "out"} | options))
    assert "\n" not in str(error.value)
