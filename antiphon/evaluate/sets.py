"""The sets that the field evaluates on: how each is laid out, what of it is taken, and how it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from antiphon.errors import InputError
from antiphon.evaluate import asked_sets, spoken_sets
from antiphon.evaluate.items import Item, Parts
from antiphon.train.prepare import AISHELL_TEXT


@dataclass(frozen=True)
class FieldSet:
    """One set of the field: data, and a reader of its layout."""

    title: str
    read: Callable[[Path], Parts]
    expected: str  # what a folder must hold, for whoever gave another
    protocol: str  # what is taken and how it counts
    parts: tuple[str, ...] = ()  # those that are measured unless others are asked for; none is all
    whole: str = ""  # what its mean over the parts is called, where the field reports one
    complete: int = 0  # of how many parts that mean is
    of_items: bool = False  # whether all items count alike in it, and not all parts


SETS: dict[str, FieldSet] = {
    "librispeech": FieldSet(
        "LibriSpeech",
        partial(spoken_sets.prepared, "librispeech", "en"),
        "LibriSpeech/test-clean/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside the .flac files",
        "test-clean and test-other, in words; resampled by speaker",
        parts=("test-clean", "test-other"),
    ),
    "aishell": FieldSet(
        "AISHELL-1",
        partial(spoken_sets.prepared, "aishell", "zh"),
        f"data_aishell/{AISHELL_TEXT} and data_aishell/wav/test/S0764/*.wav (unpacked)",
        "the test part, in characters; resampled by speaker",
        parts=("test",),
    ),
    "aishell2": FieldSet(
        "AISHELL-2",
        spoken_sets.aishell2,
        "AISHELL-DEV-TEST-SET/iOS/test/wav.scp, trans.txt and wav/ (and Android, Mic)",
        "the test parts of the three devices, in characters; resampled by speaker",
        parts=("iOS test", "Android test", "Mic test"),
    ),
    "wenetspeech": FieldSet(
        "WenetSpeech",
        spoken_sets.wenetspeech,
        "WenetSpeech.json and audio/test_net/…/*.opus",
        "TEST_NET and TEST_MEETING, in characters; resampled by recording",
        parts=("TEST_NET", "TEST_MEETING"),
    ),
    "common-voice": FieldSet(
        "Common Voice",
        spoken_sets.common_voice,
        "cv-corpus-15.0-2023-09-08/en/test.tsv and en/clips/*.mp3",
        "test.tsv of each language (published figures are of version 15); resampled by speaker",
    ),
    "fleurs": FieldSet(
        "FLEURS",
        spoken_sets.fleurs,
        "en_us/test.tsv and en_us/audio/test/*.wav (audio/test.tar.gz unpacked), with or without data/ above",
        "test.tsv of the 19 languages that are heard, against its normalized transcription; resampled by sentence",
        whole="mean of languages",
        complete=19,
    ),
    "seed-tts": FieldSet(
        "Seed-TTS eval",
        spoken_sets.seed_tts,
        "seedtts_testset/zh/meta.lst, en/meta.lst, zh/hardcase.lst and their recordings",
        "the voice of each recording says another text; mean of the utterances' error rates, as in the official "
        "scripts, which listen with Paraformer-zh and Whisper-large-v3; resampled by recording",
    ),
    "minimax": FieldSet(
        "MiniMax multilingual",
        spoken_sets.minimax,
        "text/english.txt and speaker/english/english_female/*.mp3",
        "two voices of each language say a hundred sentences; the ten languages that are spoken; resampled by sentence",
    ),
    "cv3": FieldSet(
        "CV3-Eval, cross-lingual",
        spoken_sets.cv3,
        "data/cross_lingual_zeroshot/to_en/text, prompt_text, prompt_wav.scp and waveform/",
        "voices of one language speak another (a part is FROM-TO); the hard lists are left out; resampled by sentence",
    ),
    "gtzan": FieldSet(
        "GTZAN",
        asked_sets.gtzan,
        "genres_original/blues/*.wav (or genres/) and test_filtered.txt of the fault-filtered split (coreyker/dnn-mgr)",
        "the fault-filtered test split, one of ten genres; the prompt behind the published figures is not known",
    ),
    "mtg-jamendo": FieldSet(
        "MTG-Jamendo",
        asked_sets.jamendo,
        "data/splits/split-0/autotagging_genre-test.tsv and the sound in audio/ or audio-low/",
        "test tables of split 0, micro-F1 of the tags named, the middle 30 seconds of each track; resampled by artist; "
        "the prompt behind the published figures is not known",
    ),
    "magnatagatune": FieldSet(
        "MagnaTagATune",
        asked_sets.magnatagatune,
        "annotations_final.csv and the sound in 0/ … f/ (or mp3/)",
        "clips of d, e and f that have one of the 50 commonest tags, micro-F1 of these tags; resampled by track; the "
        "prompt behind the published figures is not known",
    ),
    "muchomusic": FieldSet(
        "MuchoMusic",
        asked_sets.muchomusic,
        "RUL-MuchoMusic.json and audio/ID.mp3, or data/muchomusic.csv, data/sdd and data/musiccaps",
        "RUL: each question four times, leaving out another distractor, mean over all; resampled by question",
    ),
    "voicebench": FieldSet(
        "VoiceBench",
        asked_sets.voicebench,
        "alpacaeval_full/test-*.parquet, commoneval/, wildvoice/, sd-qa/, mmsu/, openbookqa/, bbh/, ifeval/, advbench/",
        "choices by the letter that is named (an answer without one is wrong, where the official script guesses), "
        "refusals by words of refusal; AlpacaEval, CommonEval, WildVoice and SD-QA (usa) are graded only with --judge; "
        "IFEval by rules, of each request the share of instructions that are kept and whether all are, strictly and "
        "leniently, averaged; resampled by request",
        whole="overall",
        complete=9,
    ),
    "mmau": FieldSet(
        "MMAU",
        asked_sets.mmau,
        "mmau-test-mini.json and test-mini-audios/*.wav",
        "test-mini: right if all words of the answer and no word of another option are said, as in the official "
        "script; the published figure is of v05.15.25",
        whole="all",
        complete=3,
        of_items=True,
    ),
}


def find_set(name: str) -> FieldSet:
    """A set by its name.

    Raises:
        InputError: there is none.
    """
    if name not in SETS:
        raise InputError(f"there is no set {name!r}; there are {', '.join(SETS)}")
    return SETS[name]


def items_of(name: str, root: Path, parts: Sequence[str] = (), limit: int | None = None) -> dict[str, list[Item]]:
    """`limit` items from all over each part of a set in a folder; of these parts, or of those it is measured on.

    Raises:
        InputError: no such set or part, or a folder with another layout.
    """
    chosen = find_set(name)
    found = chosen.read(root) if root.is_dir() else {}
    wanted = parts or [part for part in chosen.parts if part in found] or ([] if chosen.parts else list(found))
    if missing := [part for part in wanted if part not in found]:
        there = f"there are {', '.join(found)}" if found else f"expected {chosen.expected}"
        raise InputError(f"{root} has no part {missing[0]!r} of {chosen.title}; {there}")
    taken = {part: _spread(list(found[part]), limit) for part in wanted}
    if not any(taken.values()):
        raise InputError(f"there is nothing of {chosen.title} in {root}; expected {chosen.expected}")
    return taken


def _spread(items: list[Item], limit: int | None) -> list[Item]:
    """So many at even distances: the first ones are often of one speaker, or of one genre."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]
