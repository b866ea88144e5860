"""Readers of sets that are written down (recognition) or spoken (cloned voices): a folder to items by part.

Each knows the layout in which a set is published, and nothing else; `sets.py` lists them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import soundfile

from antiphon.evaluate.items import Clip, Item, Parts, heard, inside, keyed, read_json, read_lines, read_table
from antiphon.train.prepare import KINDS, BadRow, Row
from antiphon.transcripts import SPOKEN

# ----------------------------------------------------------------------------------------------- recognition


def prepared(kind: str, language: str, root: Path) -> Parts:
    """The sets whose layout `antiphon prepare` reads: LibriSpeech and AISHELL-1."""

    def items(rows: Iterable[Row]) -> Iterator[Item]:
        for row in rows:
            try:
                recording, said = row.read()
            except (BadRow, OSError, soundfile.SoundFileError):
                yield Item(row.name, "recognise", "errors", None)
                continue
            clip = Clip(Path(str(recording.sources[0].source)))
            yield heard(said.id, clip, said.text or "", language, said.speaker or "")

    return {part: items(rows) for part, rows in KINDS[kind].rows(root.absolute()).items() if rows}


def aishell2(root: Path) -> Parts:
    """DEVICE/PART/wav.scp and trans.txt, sound by speaker below."""
    root = inside(root, "AISHELL-DEV-TEST-SET", "AISHELL2-DEV-TEST-SET")

    def items(folder: Path) -> Iterator[Item]:
        texts, sounds = keyed(folder / "trans.txt"), keyed(folder / "wav.scp")
        for name, text in texts.items():
            place = folder / sounds.get(name, "not listed")
            yield heard(name, Clip(place), text, "zh", place.parent.name)

    folders = sorted(path.parent for path in root.glob("*/*/trans.txt"))
    return {f"{folder.parent.name} {folder.name}": items(folder) for folder in folders}


def wenetspeech(root: Path) -> Parts:
    """WenetSpeech.json: long recordings and their segments, each in subsets."""
    if not (root / "WenetSpeech.json").is_file():
        return {}
    parts = defaultdict[str, list[Item]](list)
    for audio in read_json(root / "WenetSpeech.json")["audios"]:
        for segment in audio["segments"]:
            for part in {"DEV", "TEST_NET", "TEST_MEETING"}.intersection(segment["subsets"]):
                clip = Clip(root / audio["path"], segment["begin_time"], segment["end_time"])
                parts[part].append(heard(segment["sid"], clip, segment["text"], "zh", audio["aid"]))
    return dict(parts)


COMMON_VOICE = {"zh-CN": "zh", "zh-TW": "zh", "zh-HK": "yue", "yue": "yue"}  # elsewhere a name begins with its code


def common_voice(root: Path) -> Parts:
    """LANGUAGE/test.tsv with LANGUAGE/clips/*.mp3 beside it."""
    root = next(iter(sorted(root.glob("cv-corpus-*"))), root)

    def items(table: Path) -> Iterator[Item]:
        language = COMMON_VOICE.get(table.parent.name, table.parent.name[:2])
        for row in read_table(table):
            clip = Clip(table.parent / "clips" / row["path"])
            yield heard(row["path"], clip, row["sentence"], language, row["client_id"])

    tables = sorted(root.glob("*/test.tsv")) or sorted(root.glob("test.tsv"))
    return {table.parent.name: items(table) for table in tables}


FLEURS = {
    **{"ar": "ar_eg", "de": "de_de", "en": "en_us", "es": "es_419", "fr": "fr_fr", "id": "id_id", "it": "it_it"},
    **{"ja": "ja_jp", "ko": "ko_kr", "ms": "ms_my", "nl": "nl_nl", "pt": "pt_br", "ru": "ru_ru", "th": "th_th"},
    **{"tr": "tr_tr", "ur": "ur_pk", "vi": "vi_vn", "yue": "yue_hant_hk", "zh": "cmn_hans_cn"},
}  # the folders of the 19 languages that are heard
FLEURS_COLUMNS = ("id", "file", "raw", "transcription", "characters", "samples", "gender")  # the table has no heading


def fleurs(root: Path) -> Parts:
    """CODE/test.tsv and CODE/audio/test/*.wav (audio/test.tar.gz unpacked), with or without data/ above."""
    root = inside(root, "data")

    def items(language: str, folder: Path) -> Iterator[Item]:
        for row in read_table(folder / "test.tsv", columns=FLEURS_COLUMNS):
            clip = Clip(folder / "audio" / "test" / row["file"])
            yield heard(
                row["file"], clip, row["transcription"], language, row["id"]
            )  # up to three people read a sentence

    found = {language: root / folder for language, folder in FLEURS.items() if (root / folder / "test.tsv").is_file()}
    return {language: items(language, folder) for language, folder in found.items()}


# ---------------------------------------------------------------------------------------------- cloned voices


def cloned(name: str, voice: Path | None, text: str, language: str, group: str = "", scored: str = "errors") -> Item:
    """A text to say in the voice of a recording."""
    return Item(name, "clone", scored, Clip(voice) if voice else None, text, language, group)


def seed_tts(root: Path) -> Parts:
    """LANGUAGE/meta.lst and zh/hardcase.lst: name | text of the recording | recording | text to say | …"""
    root = inside(root, "seedtts_testset")
    lists = {"zh": root / "zh/meta.lst", "en": root / "en/meta.lst", "zh hard": root / "zh/hardcase.lst"}

    def items(path: Path) -> Iterator[Item]:
        for line in read_lines(path):
            name, _, voice, text, *_ = (field.strip() for field in line.split("|"))
            yield cloned(name, path.parent / voice, text, path.parent.name, voice, "mean errors")

    return {part: items(path) for part, path in lists.items() if path.is_file()}


MINIMAX = {
    **{"chinese": "zh", "english": "en", "german": "de", "italian": "it", "portuguese": "pt", "spanish": "es"},
    **{"japanese": "ja", "korean": "ko", "french": "fr", "russian": "ru"},
}  # the lists of the ten languages that are spoken, of its 24


def minimax(root: Path) -> Parts:
    """text/LANGUAGE.txt with lines SPEAKER|TEXT, and the speaker's recording in speaker/LANGUAGE/SPEAKER/."""

    def items(path: Path) -> Iterator[Item]:
        for number, line in enumerate(read_lines(path)):
            speaker, _, text = (field.strip() for field in line.partition("|"))
            folder = root / "speaker" / speaker.rpartition("_")[0] / speaker
            voice = next(iter(sorted([*folder.glob("*.mp3"), *folder.glob("*.wav")])), None)
            yield cloned(f"{path.stem}-{number:03}", voice, text, MINIMAX[path.stem])

    paths = {code: root / "text" / f"{name}.txt" for name, code in MINIMAX.items()}
    return {code: items(path) for code, path in paths.items() if path.is_file()}


SCRIPTS = {"ko": "[\uac00-\ud7a3]", "ja": "[\u3040-\u30ff]", "zh": "[\u4e00-\u9fff]"}  # the first that occurs decides


def cv3(root: Path) -> Parts:
    """data/cross_lingual_zeroshot/to_LANGUAGE/text, prompt_text and prompt_wav.scp, whose paths begin at the root.

    A part is a pair of languages; that of the recording is told by the script of its transcript.
    """
    parts = defaultdict[str, list[Item]](list)
    for language in (code for code in SPOKEN if code in ("zh", "en", "ja", "ko")):
        folder = root / "data" / "cross_lingual_zeroshot" / f"to_{language}"
        if not (folder / "text").is_file():
            continue
        voices, said = keyed(folder / "prompt_wav.scp"), keyed(folder / "prompt_text")
        for name, text in keyed(folder / "text").items():
            heard_in = next((code for code, own in SCRIPTS.items() if re.search(own, said.get(name, ""))), "en")
            voice = root / voices[name] if name in voices else None
            parts[f"{heard_in}-{language}"].append(cloned(name, voice, text, language))
    return dict(sorted(parts.items()))
