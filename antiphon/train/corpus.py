"""`antiphon corpus`: the synthetic world as lhotse cuts, a function of (recipe, seed).

A recipe names sets; each becomes one manifest, NAME.jsonl.gz, beside a folder of wav shards in which its clips stand
one after another. A shard is made by one process from (recipe, seed, set, shard) alone, so the number of processes
changes nothing, and what is finished is not made again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antiphon.audio import Samples, write_audio
from antiphon.errors import ConfigError
from antiphon.train import dialog, espeak, music, noises
from antiphon.train.augment import Augment, augment
from antiphon.train.data import PACE, resample
from antiphon.train.dialog import DIALOG_LANGUAGES, dialog_at, dialog_vocabulary, find_dialogs
from antiphon.train.dialog import KINDS as KINDS_OF_DIALOG
from antiphon.train.recipe import read_fields, read_yaml_table
from antiphon.train.world import (
    LANGUAGES,
    MIXED,
    SHARE,
    Sentence,
    check_split,
    find_sentences,
    number_words,
    say,
    sentence_at,
    share_of,
    vocabulary,
)

SHARD = 200  # clips in a wav file
GAP = 0.05  # seconds of silence between them
SILENT = "silent"  # the voice of text alone
PRESETS = "presets"  # the voices of a set
DIGITS = (2, 6)  # how many are said, from the first to below the second
LISTED = (4, 33)  # words in a list, likewise
VARIANTS = {
    "train": espeak.TRAIN_VARIANTS,
    "many": espeak.TRAIN_VARIANTS + espeak.MORE_VARIANTS,
    "held-out": espeak.HELD_OUT_VARIANTS,
}
SHIFT = Augment(1.0, *(0.0,) * 6, speed_factor=(0.85, 1.18))


@dataclass(frozen=True)
class Set:
    """One manifest of a corpus."""

    kind: str  # speech, music, sound, over (speech over an everyday sound), dialog, asked (its question), digits, words
    count: int  # clips, of each language where there are languages
    split: str = "train"  # of the world's sentences; timbres and sounds are "train" or "held-out" with the voices
    languages: tuple[str, ...] = ()
    dialogs: tuple[str, ...] = ()  # kinds of dialog; all by default
    voices: str = "train"  # train, many, held-out, flite, or presets: the product's own
    shifted: float = 0.0  # share of clips that are slower or faster, with pitch and formants: voices there are not
    augment: float = 0.0  # share of clips that are augmented
    rate: int = 16000
    silent: bool = False  # text alone: cuts without a recording, as long as it would take to say them
    seed: int = 0  # added to the corpus's own, where two sets must not be alike


@dataclass(frozen=True)
class Corpus:
    """A corpus recipe: sets by name."""

    sets: dict[str, Any]
    seed: int = 0


@dataclass(frozen=True)
class Clip:
    """A sound and what is known of it: one supervision, or `parts` that stand in it one after another."""

    samples: Samples  # at espeak.RATE
    text: str
    language: str | None = None
    speaker: str | None = None
    custom: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Clip, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / espeak.RATE


def read_corpus(path: Path) -> dict[str, Set]:
    """Sets of a corpus recipe.

    Raises:
        ConfigError: a set that cannot be made; the sentence says why.
    """
    return read_sets(read_yaml_table(path), path.name)


def read_sets(table: dict[str, Any], where: str) -> dict[str, Set]:
    """The sets in a table {seed: …, sets: {name: …}}, each with its own seed."""
    corpus = read_fields(Corpus, table, where)
    return {name: _checked(value, f"{where}: sets.{name}", corpus.seed) for name, value in corpus.sets.items()}


def _checked(value: Any, where: str, seed: int) -> Set:
    s = read_fields(Set, value, where)
    if s.kind not in KINDS:
        raise ConfigError(f"{where}.kind is {s.kind!r}; expected one of {', '.join(KINDS)}")
    if unknown := set(s.languages) - set(LANGUAGES):
        raise ConfigError(f"{where}: no language {', '.join(sorted(unknown))}; there are {', '.join(LANGUAGES)}")
    if s.voices not in (known := (*VARIANTS, PRESETS, espeak.FLITE)):
        raise ConfigError(f"{where}.voices is {s.voices!r}; expected one of {', '.join(known)}")
    if s.voices == PRESETS and s.kind != "speech":
        raise ConfigError(f"{where}.voices is {PRESETS!r}, in which only sentences are spoken; expected kind speech")
    if s.split == MIXED and s.kind not in ("speech", "over"):
        raise ConfigError(f"{where}.split is {MIXED!r}, which only sentences can be; expected kind speech or over")
    if s.kind in ("speech", "over", "digits", "words") and not s.languages:
        raise ConfigError(f"{where}.languages is missing; name at least one")
    return replace(s, seed=seed + s.seed)


def make_corpus(sets: dict[str, Set], out: Path, jobs: int, progress: Callable[[int, int], None]) -> dict[str, Path]:
    """Make every set in `out`; `progress(done, all)` counts shards.

    Returns the manifests by name. Sets that were made before, and the words of their languages, stay.
    """
    if not sets:
        return {}
    out.mkdir(parents=True, exist_ok=True)
    world = out / "world.json"
    words = json.loads(world.read_text(encoding="utf-8"))["words"] if world.exists() else {}
    words |= {code: vocabulary(code) for code in {c for s in sets.values() for c in s.languages}}
    _whole(world, json.dumps({"words": words}, ensure_ascii=False, indent=0, sort_keys=True).encode())
    left = {name: shards_of(s) for name, s in sets.items()}
    lacking = [s for name, s in sets.items() if not all(is_made(out, name, s, i) for i in range(left[name]))]
    texts = sorted({text for s in lacking for text in texts_of(s)} - FOUND.keys(), key=lambda text: -text[-2])
    with ProcessPoolExecutor(jobs) as pool:  # once, not in every process that says some of them
        FOUND.update(zip(texts, pool.map(find, texts), strict=True))
    with ProcessPoolExecutor(jobs, initializer=_begin, initargs=(FOUND,)) as pool:
        order = sorted(sets, key=lambda name: sets[name].silent)  # what is made quickly comes last, so that none waits
        made = {pool.submit(make_shard, out, name, sets[name], i): name for name in order for i in range(left[name])}
        joined: list[Future[None]] = []
        for done, future in enumerate(as_completed(made), 1):
            future.result()
            name = made[future]
            left[name] -= 1
            if not left[name]:
                joined.append(pool.submit(_join, out, name, shards_of(sets[name])))
            progress(done, len(made))
        for future in joined:
            future.result()
    return {name: out / f"{name}.jsonl.gz" for name in sets}


def size_of(s: Set) -> int:
    """Clips of a set."""
    return s.count * max(1, len(s.languages))


def shards_of(s: Set) -> int:
    """Wav files of a set."""
    return -(-size_of(s) // SHARD)


def recipe_of(s: Set) -> str:
    """What a set is made of, as a line of JSON; fields left at their defaults are not in it."""
    return json.dumps({f.name: value for f in fields(s) if (value := getattr(s, f.name)) != f.default}, sort_keys=True)


def made_from(folder: Path) -> Set:
    """The set that the shards in a folder were made from, as they say themselves."""
    with (folder / "0000.jsonl").open(encoding="utf-8") as lines:
        return read_fields(Set, json.loads(lines.readline()), str(folder))


def is_made(out: Path, name: str, s: Set, shard: int) -> bool:
    """Whether a wav file and the lines of its cuts are there from the same recipe."""
    lines = out / name / f"{shard:04d}.jsonl"
    return lines.exists() and lines.open(encoding="utf-8").readline().strip() == recipe_of(s)


def make_shard(out: Path, name: str, s: Set, shard: int) -> None:
    """Write one wav file and the lines of its cuts, unless both are there from the same recipe."""
    if is_made(out, name, s, shard):
        return
    folder = out / name
    folder.mkdir(exist_ok=True)
    lines = folder / f"{shard:04d}.jsonl"
    mark = recipe_of(s)
    clips = [make_clip(name, s, i) for i in range(shard * SHARD, min((shard + 1) * SHARD, size_of(s)))]
    if s.silent:
        cuts = [_cut(f"{name}-{shard * SHARD + i:06d}", clip, 0.0, clip.seconds) for i, clip in enumerate(clips)]
        _whole(lines, "".join(f"{line}\n" for line in (mark, *cuts)).encode())
        return
    sounds = [resample(clip.samples, espeak.RATE, s.rate) for clip in clips]
    gap = np.zeros(round(GAP * s.rate), np.float32)
    wav = f"{shard:04d}.wav"
    write_audio(folder / f"part-{wav}", np.concatenate([x for sound in sounds for x in (sound, gap)]), s.rate)
    os.replace(folder / f"part-{wav}", folder / wav)
    starts = np.cumsum([0, *(len(sound) + len(gap) for sound in sounds)]).tolist()
    recording = {
        "id": f"{name}-{shard:04d}",
        "sources": [{"type": "file", "channels": [0], "source": f"{name}/{wav}"}],
        "sampling_rate": s.rate,
        "num_samples": starts[-1],
        "duration": starts[-1] / s.rate,
        "channel_ids": [0],
    }
    cuts = [
        _cut(f"{name}-{shard * SHARD + i:06d}", clip, starts[i] / s.rate, len(sounds[i]) / s.rate, recording)
        for i, clip in enumerate(clips)
    ]
    _whole(lines, "".join(f"{line}\n" for line in (mark, *cuts)).encode())


def _cut(name: str, clip: Clip, start: float, duration: float, recording: dict[str, Any] | None = None) -> str:
    """A lhotse MonoCut as a line of its manifest."""
    cut: dict[str, Any] = {"id": name, "start": start, "duration": duration, "channel": 0, "type": "MonoCut"}
    cut["supervisions"] = []
    at = 0.0
    for i, part in enumerate(clip.parts or (clip,)):
        about = {"label_source": "synthetic", "teacher": None, "score": None, **part.custom}
        seconds = part.seconds if clip.parts else duration
        place = {
            "id": f"{name}-{i}",
            "recording_id": recording["id"] if recording else name,
            "start": at,
            "duration": seconds,
            "channel": 0,
        }
        said = {"text": part.text, "language": part.language, "speaker": part.speaker, "custom": about}
        cut["supervisions"].append({**place, **said})
        at += seconds
    if clip.parts:
        cut["custom"] = clip.custom
    return json.dumps({**cut, "recording": recording} if recording else cut, ensure_ascii=False)


def _join(out: Path, name: str, count: int) -> None:
    """The manifest of a set from the lines of its shards."""
    lines: list[bytes] = []
    for shard in range(count):
        lines += (out / name / f"{shard:04d}.jsonl").read_bytes().splitlines()[1:]
    _whole(out / f"{name}.jsonl.gz", gzip.compress(b"\n".join(lines) + b"\n", 6, mtime=0))


def _whole(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


# ------------------------------------------------------------------------------------------------- texts

Texts = tuple[Any, ...]  # the function that finds them, and its arguments
FOUND: dict[Texts, list[int]] = {}  # by which draws


def texts_of(s: Set) -> Iterator[Texts]:
    """All that a set says."""
    if s.kind in ("speech", "over"):
        yield from (sentences_of(s, language) for language in s.languages)
    elif s.kind in ("dialog", "asked"):
        languages = s.languages or DIALOG_LANGUAGES
        yield from (dialogs_of(s, language, kind) for language in languages for kind in kinds_of(s))


def sentences_of(s: Set, language: str) -> Texts:
    """The sentences of a set in a language."""
    return find_sentences, language, check_split(s.split), s.count, s.seed


def dialogs_of(s: Set, language: str, kind: str) -> Texts:
    """The dialogs of a set in a language, of a kind."""
    return find_dialogs, language, kind, check_split(s.split), -(-s.count // len(kinds_of(s))), s.seed


def kinds_of(s: Set) -> tuple[str, ...]:
    """The kinds of dialogs in a set."""
    return s.dialogs or tuple(KINDS_OF_DIALOG)


def find(texts: Texts) -> list[int]:
    """The draws of texts, one after another: this has to be done for all at once."""
    function, *arguments = texts
    return function(*arguments)


def found(texts: Texts) -> list[int]:
    """The same, unless they are known."""
    if texts not in FOUND:
        FOUND[texts] = find(texts)
    return FOUND[texts]


def _begin(texts: dict[Texts, list[int]]) -> None:
    """In every process, which has one core."""
    FOUND.update(texts)
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------- clips


def make_clip(name: str, s: Set, index: int) -> Clip:
    """Clip `index` of a set."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([s.seed, key, index])))
    clip = KINDS[s.kind](s, index, rng)
    return clip if clip.parts else augmented(clip, s, rng)


def augmented(clip: Clip, s: Set, rng: np.random.Generator) -> Clip:
    """The clip; in a share of cases as another throat would say it, and as a room, a line or a network left it."""
    if s.shifted and rng.random() < s.shifted:
        clip = replace(clip, samples=augment(clip.samples, espeak.RATE, rng, SHIFT))
    if rng.random() >= s.augment:
        return clip
    samples = augment(clip.samples, espeak.RATE, rng)
    return replace(clip, samples=samples, custom={**clip.custom, "augmented": True})


def speech(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A sentence of the world in a voice of the set."""
    language = s.languages[index % len(s.languages)]
    at = found(sentences_of(s, language))[index // len(s.languages)]
    sentence = sentence_at(language, check_split(s.split), s.seed, at)
    if s.voices == PRESETS:
        name = preset(rng)
        return spoken(sentence, espeak.PRESETS[name], name)
    return spoken(sentence, draw_voice(s, rng))


def preset(rng: np.random.Generator) -> str:
    """The name of one of the product's voices."""
    return list(espeak.PRESETS)[int(rng.integers(len(espeak.PRESETS)))]


def draw_voice(s: Set, rng: np.random.Generator) -> espeak.Voice | str:
    """A voice of the set: espeak-ng's, the name of one of flite's, or none."""
    if s.silent:
        return SILENT
    if s.voices == espeak.FLITE:
        return espeak.FLITE_VOICES[int(rng.integers(len(espeak.FLITE_VOICES)))]
    return espeak.draw_voice(rng, VARIANTS[s.voices])


def spoken(sentence: Sentence, voice: espeak.Voice | str, speaker: str | None = None) -> Clip:
    """A sentence in a voice."""
    custom = {"template": sentence.template, "split": sentence.split}
    if voice == SILENT:
        samples, name = unsaid(sentence.spoken), SILENT
    elif isinstance(voice, str):
        samples, name = espeak.flite_say(sentence.spoken, voice), f"flite-{voice}"
    else:
        samples = espeak.say(sentence.spoken, LANGUAGES[sentence.language].espeak, voice)
        name = f"{voice.variant or 'plain'}-{voice.pitch}"
    return Clip(samples, sentence.text, sentence.language, speaker or name, custom)


def silence(samples: int) -> Samples:
    """What takes time and no room: [N] zeros."""
    return np.broadcast_to(np.float32(0), samples)


def unsaid(text: str) -> Samples:
    """Silence for as long as it would take to say a text."""
    return silence(round(PACE * len(text) * espeak.RATE))


def in_turn(s: Set, parts: Sequence[Clip], custom: dict[str, Any]) -> Clip:
    """Parts of a dialog, one after another."""
    sounds = [part.samples for part in parts]
    samples = silence(sum(map(len, sounds))) if s.silent else np.concatenate(sounds)
    return Clip(samples, "", custom["language"], None, custom, tuple(parts))


def over(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A sentence over an everyday sound; the sentence is what counts."""
    clip = speech(s, index, rng)
    kind = noises.KINDS[int(rng.integers(len(noises.KINDS)))]
    noise = noises.render(kind, len(clip.samples) / espeak.RATE, rng, timbres(s))
    samples = noises.mix(clip.samples, noise, float(rng.uniform(5, 20)))
    return replace(clip, samples=samples, custom={**clip.custom, "sound": kind})


def digits(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A few digits, and the same digits said back: the smallest world there is."""
    language, user = s.languages[index % len(s.languages)], draw_voice(s, rng)
    share = SHARE[check_split(s.split)]
    while True:  # until the digits are of the split
        words = [number_words(int(n), language) for n in rng.integers(0, 10, int(rng.integers(*DIGITS)))]
        said = say(" ".join(words), language, f"{language}.digits", check_split(s.split))
        if share_of(said.text) == share:
            break
    name = preset(rng)
    parts = (augmented(spoken(said, user), s, rng), spoken(said, espeak.PRESETS[name], name))
    messages = [
        {"role": "user", "content": [{"type": "audio", "supervision": 0}]},
        {"role": "assistant", "content": said.text, "supervision": 1, "voice": name},
    ]
    return in_turn(s, parts, {"messages": messages, "language": language})


def words(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """Words of several languages in any order, to be said again; text alone.

    None of them can be guessed, so this is what copying is learnt from: sentences of so small a world teach to guess.
    """
    language = s.languages[index % len(s.languages)]
    pools = [_listed(code) for code in s.languages]
    drawn = [pools[int(rng.integers(len(pools)))] for _ in range(int(rng.integers(*LISTED)))]
    listed = " ".join(pool[int(rng.integers(len(pool)))] for pool in drawn)
    asked = f"{dialog.load_phrases(language).questions['repeat.1']} {listed}"
    parts = tuple(Clip(unsaid(text), text, language, SILENT) for text in (asked, listed))
    messages = [
        {"role": "user", "content": [{"type": "audio", "supervision": 0}]},
        {"role": "assistant", "content": listed},
    ]
    return in_turn(s, parts, {"messages": messages, "language": language, "kind": "words"})


@cache
def _listed(language: str) -> list[str]:
    return dialog_vocabulary(language)


def tune(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A melody with chords, described."""
    samples, labels = music.compose(rng, timbres(s))
    return Clip(samples, describe_music(labels), custom=asdict(labels))


def sound(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """An everyday sound, named."""
    kind = noises.KINDS[index % len(noises.KINDS)]
    samples = noises.render(kind, float(rng.uniform(1.5, 4.0)), rng, timbres(s))
    return Clip(samples, describe_sound(kind), custom={"sound": kind})


def conversation(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A dialog: what the user says and plays, then what is replied, all in one clip, and the messages they make up.

    A message's audio part names the supervision that holds it, and so does the assistant's message that is spoken.
    """
    languages = s.languages or DIALOG_LANGUAGES
    kinds = kinds_of(s)
    language, rest = languages[index % len(languages)], index // len(languages)
    kind = kinds[rest % len(kinds)]
    at = found(dialogs_of(s, language, kind))[rest // len(kinds)]
    talk = dialog_at(language, kind, check_split(s.split), s.seed, at)
    user, name = draw_voice(s, rng), preset(rng)
    messages: list[dict[str, Any]] = [{"role": "system", "content": talk.system}] if talk.system else []
    parts: list[Clip] = []
    for turn in talk.turns:
        messages += [{"role": "tool", "content": result} for result in turn.results]
        asked = [played(turn.clip, s, rng)] if turn.clip else []
        asked += [augmented(spoken(turn.question, user), s, rng)] if turn.question else []
        if asked:
            content = [{"type": "audio", "supervision": len(parts) + i} for i in range(len(asked))]
            messages.append({"role": "user", "content": content})
            parts += asked
        reply: dict[str, Any] = {"role": "assistant", "content": turn.answer}
        if turn.reply:
            reply |= {"supervision": len(parts), "voice": name}
            parts.append(spoken(turn.reply, SILENT if s.silent else espeak.PRESETS[name], name))
        messages.append(reply)
    custom = {"messages": messages, "kind": talk.kind, "template": talk.template, "split": talk.split}
    return in_turn(s, parts, {**custom, "language": language})


def asked(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """The first question of a dialog alone, to be written down."""
    languages, kinds = s.languages or DIALOG_LANGUAGES, kinds_of(s)
    language, rest = languages[index % len(languages)], index // len(languages)
    kind = kinds[rest % len(kinds)]
    at = found(dialogs_of(s, language, kind))[rest // len(kinds)]
    talk = dialog_at(language, kind, check_split(s.split), s.seed, at)
    question = next(turn.question for turn in talk.turns if turn.question)
    return spoken(question, draw_voice(s, rng))


def played(clip: dialog.Clip, s: Set, rng: np.random.Generator) -> Clip:
    """What is played before a question."""
    if clip.sentence is not None:
        return spoken(clip.sentence, draw_voice(s, rng))
    rng = np.random.Generator(np.random.Philox(clip.take))  # the take is part of what the splits keep apart
    if clip.kind == "music":
        wanted: dict[str, Any] = dict(clip.labels)
        samples, labels = music.compose(rng, timbres(s), **wanted)
        return Clip(samples, describe_music(labels), custom=asdict(labels))
    kind = str(clip.labels["sound"])
    samples = noises.render(kind, float(rng.uniform(1.5, 3.0)), rng, timbres(s))
    return Clip(samples, describe_sound(kind), custom={"sound": kind})


def timbres(s: Set) -> Any:
    """Which instruments and sounds a set uses: those of the tests with the voices of the tests."""
    return "held-out" if s.voices == "held-out" else "train"


def describe_music(labels: music.Music) -> str:
    """What AuT writes for a melody."""
    what = f"{labels.instrument}, {labels.mode}, {labels.notes} notes, {labels.direction}"
    return f"{what}, {labels.tempo} beats per minute"


def describe_sound(kind: str) -> str:
    """What AuT writes for an everyday sound."""
    return f"sound of {kind}"


KINDS = {
    "speech": speech,
    "over": over,
    "music": tune,
    "sound": sound,
    "dialog": conversation,
    "asked": asked,
    "digits": digits,
    "words": words,
}
