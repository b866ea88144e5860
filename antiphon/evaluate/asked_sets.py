"""Readers of sets that are answered: tags and genres of music, questions about sound, spoken requests.

Each knows the layout in which a set is published, and nothing else; `sets.py` lists them.
"""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from antiphon.evaluate.items import Clip, Item, Parts, inside, parquet_rows, read_json, read_lines, read_table

LETTERS = "ABCDEFGHIJ"
EXCERPT = 30.0  # seconds out of the middle of a whole track
TOP = 50  # tags of MagnaTagATune that are told apart
WHICH_TAGS = "Which of these tags describe the music? Answer with those that do, separated by commas: {}"
BY_LETTER = "{}\nOptions: {}\nAnswer with the letter of the right option."
BY_WORDS = "{}\nChoose the right option and answer with its words alone:\n{}"


def by_letter(name: str, clip: Clip | None, question: str, right: str, wrong: Sequence[str], group: str = "") -> Item:
    """A question whose options are in an order that its name decides."""
    options = [right, *wrong]
    order = np.random.default_rng([*name.encode()]).permutation(len(options))
    choices = [options[i] for i in order]
    lettered = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    asked = BY_LETTER.format(question, lettered)
    return Item(name, "choose", "letter", clip, right, group=group, question=asked, choices=tuple(choices))


# ----------------------------------------------------------------------------------------------------- music


def gtzan(root: Path) -> Parts:
    """genres_original/GENRE/GENRE.NNNNN.wav (or genres/), and the fault-filtered test split in test_filtered.txt."""
    folder, split = inside(root, "genres_original", "genres"), root / "test_filtered.txt"
    if not split.is_file():
        return {}
    genres = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    question = BY_WORDS.format("Which genre is this music?", "\n".join(genres))

    def items() -> Iterator[Item]:
        for line in map(str.strip, read_lines(split)):
            place = folder / line
            clip = Clip(place if place.is_file() else place.with_suffix(".au"))  # as it was first published
            yield Item(line, "choose", "one tag", clip, Path(line).parent.name, question=question, choices=genres)

    return {"test": items()}


JAMENDO = {"genre": "genre", "mood/theme": "moodtheme", "instrument": "instrument", "top50": "top50tags"}


def jamendo(root: Path) -> Parts:
    """The dataset's repository with data/splits/split-0/*.tsv, and its sound in audio/ or (smaller) audio-low/."""
    splits = root / "data" / "splits" / "split-0"

    def items(kind: str) -> Iterator[Item]:
        halves = ("train", "validation", "test")
        tables = {half: list(jamendo_rows(splits / f"autotagging_{kind}-{half}.tsv")) for half in halves}
        known = sorted({tag for rows in tables.values() for *_, tags in rows for tag in tags})
        for place, artist, seconds, tags in tables["test"]:
            low = root / "audio-low" / place.replace(".mp3", ".low.mp3")
            start = max(0.0, (seconds - EXCERPT) / 2)
            clip = Clip(low if low.is_file() else root / "audio" / place, start, start + EXCERPT)
            yield tagged(place, clip, tags, known, artist)

    found = {part: kind for part, kind in JAMENDO.items() if (splits / f"autotagging_{kind}-test.tsv").is_file()}
    return {part: items(kind) for part, kind in found.items()}


def jamendo_rows(path: Path) -> Iterator[tuple[str, str, float, frozenset[str]]]:
    """File, artist, seconds and tags; a tag's category stands before three dashes. Tags are as many columns."""
    for line in read_lines(path)[1:]:
        _, artist, _, place, seconds, *tags = line.split("\t")
        yield place, artist, float(seconds), frozenset(tag.rpartition("---")[2].strip() for tag in tags)


def magnatagatune(root: Path) -> Parts:
    """annotations_final.csv and its sound below 0/ … f/; d, e and f are for testing. The 50 commonest tags count,
    and clips that have one of them."""
    table = root / "annotations_final.csv"
    if not table.is_file():
        return {}

    def items() -> Iterator[Item]:
        rows = list(read_table(table, quoted=True))
        counts = Counter(tag for row in rows for tag, value in row.items() if value == "1" and tag != "clip_id")
        known = sorted(tag for tag, _ in counts.most_common(TOP))
        for row in rows:
            place = row["mp3_path"]
            tags = frozenset(tag for tag in known if row[tag] == "1")
            if place[0] in "def" and tags:  # the usual split has no clips without one of the 50
                track = re.sub(r"-\d+-\d+\.mp3$", "", place)  # clips of one track are not independent
                yield tagged(place, Clip(inside(root, "mp3") / place), tags, known, track)

    return {"test": items()}


def tagged(name: str, clip: Clip, tags: frozenset[str], known: Sequence[str], group: str) -> Item:
    """Music whose tags are to be named, of those that the set knows."""
    question = WHICH_TAGS.format(", ".join(known))
    return Item(name, "tag", "tags", clip, group=group, question=question, choices=tuple(known), tags=tags)


def muchomusic(root: Path) -> Parts:
    """RUL-MuchoMusic.json with ID.mp3 in audio/, or the first edition: data/muchomusic.csv with data/sdd, …"""
    parts: Parts = {}
    if (root / "RUL-MuchoMusic.json").is_file():
        parts["RUL"] = listening(root)
    if (root / "data" / "muchomusic.csv").is_file():
        parts["MuChoMusic"] = first_edition(root / "data")
    return parts


def listening(root: Path) -> Iterator[Item]:
    """Every question four times, each time without another one of its four distractors."""
    for name, about in read_json(root / "RUL-MuchoMusic.json").items():
        clip = Clip(root / "audio" / f"{name}.mp3")
        for out in range(len(about["distractors"])):
            wrong = [other for i, other in enumerate(about["distractors"]) if i != out]
            yield by_letter(f"{name}-{out}", clip, about["question"], about["correct_answer"], wrong, name)


def first_edition(data: Path) -> Iterator[Item]:
    """Questions of the CSV; where their music is, two further tables say."""
    places = {
        row["track_id"]: data / "sdd" / "audio" / row["path"].replace(".mp3", ".2min.mp3")
        for row in _rows_if_there(data / "sdd" / "song_describer.csv")
    } | {
        row["ytid"]: data
        / "musiccaps"
        / "audio"
        / f"[{row['ytid']}]-[{_whole(row['start_s'])}-{_whole(row['end_s'])}].wav"
        for row in _rows_if_there(data / "musiccaps" / "musiccaps-public.csv")
    }
    for number, row in enumerate(read_table(data / "muchomusic.csv", ",", quoted=True)):
        music = row["dataset_identifier"].removesuffix(".json")
        music = music if row["dataset"] == "sdd" else music.rpartition("_")[0]
        clip = Clip(places[music]) if music in places else None
        wrong = [row[f"distractor_{i}_answer"] for i in (1, 2, 3)]
        yield by_letter(str(number), clip, row["question"], row["correct_answer"], wrong, music)


def _rows_if_there(path: Path) -> Iterator[dict[str, str]]:
    return read_table(path, ",", quoted=True) if path.is_file() else iter(())


def _whole(seconds: str) -> int:
    return int(float(seconds))


# ---------------------------------------------------------------------------------------- sound and requests


def mmau(root: Path) -> Parts:
    """mmau-test-mini.json and the sounds in test-mini-audios/ (answers of the larger test are not published)."""
    path = root / "mmau-test-mini.json"
    rows = read_json(path) if path.is_file() else []
    parts: dict[str, list[Item]] = {task: [] for task in ("sound", "music", "speech")}
    for row in rows:
        choices = literal_eval(row["choices"]) if isinstance(row["choices"], str) else row["choices"]
        asked = BY_WORDS.format(row["question"], "\n".join(choices))
        clip = Clip(root / row["audio_id"])
        item = Item(row["id"], "choose", "words", clip, row["answer"], question=asked, choices=tuple(choices))
        parts[row["task"]].append(item)
    return {part: items for part, items in parts.items() if items}


VOICEBENCH = {  # how each part counts, and the folder it is in
    "AlpacaEval": ("rating", "alpacaeval_full"),
    "CommonEval": ("rating", "commoneval"),
    "WildVoice": ("rating", "wildvoice"),
    "SD-QA": ("correct", "sd-qa"),
    "MMSU": ("letter", "mmsu"),
    "OBQA": ("letter", "openbookqa"),
    "BBH": ("letter", "bbh"),
    "IFEval": ("instructions", "ifeval"),
    "AdvBench": ("refusal", "advbench"),
}
SHARDS = {"sd-qa": "usa-*.parquet"}  # one of eleven accents, as in the leaderboard


def voicebench(root: Path) -> Parts:
    """PART/SPLIT-NNNNN-of-NNNNN.parquet, as on the Hub. Requests are spoken; nothing is asked in writing."""
    root = inside(root, "data")

    def items(scored: str, paths: list[Path]) -> Iterator[Item]:
        for path in paths:
            for number, (row, sound) in enumerate(parquet_rows(path)):
                name = str(row.get("id") or row.get("key") or f"{path.stem}-{number}")
                yield requested(name, scored, Clip(sound), row)

    found = {part: sorted((root / name).glob(SHARDS.get(name, "*.parquet"))) for part, (_, name) in VOICEBENCH.items()}
    return {part: items(VOICEBENCH[part][0], paths) for part, paths in found.items() if paths}


def requested(name: str, scored: str, clip: Clip, row: dict[str, Any]) -> Item:
    """A spoken request: to choose a letter, to say yes or no, to keep instructions, or to answer at length."""
    right, choices = str(row.get("reference") or ""), tuple(LETTERS[:4]) if scored == "letter" else ()
    if right.lower() in ("yes", "no"):
        scored, choices = "verdict", ("yes", "no")
    elif scored == "letter":
        right = right.strip("()").upper()
    elif scored == "instructions":
        stated = zip(row["instruction_id_list"], row["kwargs"], strict=True)
        right = json.dumps(
            [{"id": kind} | {k: v for k, v in (about or {}).items() if v is not None} for kind, about in stated]
        )
    return Item(name, "chat", scored, clip, right, "en", choices=choices, said=row["prompt"])
