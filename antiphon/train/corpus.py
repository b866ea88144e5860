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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from antiphon.audio import Samples, write_audio
from antiphon.errors import ConfigError
from antiphon.train import espeak, music, noises
from antiphon.train.augment import Augment, augment
from antiphon.train.data import resample
from antiphon.train.recipe import read_fields, read_yaml_table
from antiphon.train.world import LANGUAGES, Sentence, check_split, sentences, vocabulary

SHARD = 200  # clips in a wav file
GAP = 0.05  # seconds of silence between them


@dataclass(frozen=True)
class Set:
    """One manifest of a corpus."""

    kind: str  # speech, music, sound, over (speech over an everyday sound)
    count: int  # clips, of each language where there are languages
    split: str = "train"  # of the world's sentences; timbres and sounds are "train" or "held-out" with the voices
    languages: tuple[str, ...] = ()
    voices: str = "train"  # train, held-out, flite
    augment: float = 0.0  # share of clips that are augmented
    rate: int = 16000
    seed: int = 0  # added to the corpus's own, where two sets must not be alike


@dataclass(frozen=True)
class Corpus:
    """A corpus recipe: sets by name."""

    sets: dict[str, Any]
    seed: int = 0

    def read(self) -> dict[str, Set]:
        """The sets, checked."""
        return {name: read_fields(Set, value, f"sets.{name}") for name, value in self.sets.items()}


@dataclass(frozen=True)
class Clip:
    """A sound and what is known of it."""

    samples: Samples  # at espeak.RATE
    text: str
    language: str | None = None
    speaker: str | None = None
    custom: dict[str, Any] = field(default_factory=dict)


def read_corpus(path: Path) -> dict[str, Set]:
    """Sets of a corpus recipe, each with its seed.

    Raises:
        ConfigError: a set that cannot be made; the sentence says why.
    """
    corpus = read_fields(Corpus, read_yaml_table(path), path.name)
    sets = {}
    for name, value in corpus.read().items():
        if value.kind not in KINDS:
            raise ConfigError(f"sets.{name}.kind is {value.kind!r}; expected one of {', '.join(KINDS)}")
        if unknown := set(value.languages) - set(LANGUAGES):
            raise ConfigError(
                f"sets.{name}: no language {', '.join(sorted(unknown))}; there are {', '.join(LANGUAGES)}"
            )
        if value.kind in ("speech", "over") and not value.languages:
            raise ConfigError(f"sets.{name}.languages is missing; name at least one")
        sets[name] = replace(value, seed=corpus.seed + value.seed)
    return sets


def make_corpus(path: Path, out: Path, jobs: int, progress: Callable[[int, int], None]) -> dict[str, Path]:
    """Make every set of the recipe at `path` in `out`; `progress(done, all)` counts shards.

    Returns the manifests by name.
    """
    sets = read_corpus(path)
    out.mkdir(parents=True, exist_ok=True)
    work = [(out, name, s, shard) for name, s in sets.items() for shard in range(shards_of(s))]
    with ProcessPoolExecutor(jobs) as pool:
        for done, future in enumerate(as_completed([pool.submit(make_shard, *task) for task in work]), 1):
            future.result()
            progress(done, len(work))
    for name, s in sets.items():
        _join(out, name, shards_of(s))
    words = {code: vocabulary(code) for code in sorted({c for s in sets.values() for c in s.languages})}
    _whole(out / "world.json", json.dumps({"words": words}, ensure_ascii=False, indent=0).encode())
    return {name: out / f"{name}.jsonl.gz" for name in sets}


def size_of(s: Set) -> int:
    """Clips of a set."""
    return s.count * max(1, len(s.languages))


def shards_of(s: Set) -> int:
    """Wav files of a set."""
    return -(-size_of(s) // SHARD)


def make_shard(out: Path, name: str, s: Set, shard: int) -> None:
    """Write one wav file and the lines of its cuts, unless both are there from the same recipe."""
    folder = out / name
    folder.mkdir(exist_ok=True)
    lines = folder / f"{shard:04d}.jsonl"
    mark = json.dumps(asdict(s), sort_keys=True)
    if lines.exists() and lines.open(encoding="utf-8").readline().strip() == mark:
        return
    clips = [make_clip(name, s, i) for i in range(shard * SHARD, min((shard + 1) * SHARD, size_of(s)))]
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


def _cut(name: str, clip: Clip, start: float, duration: float, recording: dict[str, Any]) -> str:
    """A lhotse MonoCut as a line of its manifest."""
    about = {"label_source": "synthetic", "teacher": None, "score": None, **clip.custom}
    place = {"start": 0.0, "duration": duration, "channel": 0, "recording_id": recording["id"]}
    said = {"text": clip.text, "language": clip.language, "speaker": clip.speaker, "custom": about}
    cut = {"id": name, "start": start, "duration": duration, "channel": 0, "type": "MonoCut"}
    cut |= {"supervisions": [{"id": name, **place, **said}], "recording": recording}
    return json.dumps(cut, ensure_ascii=False)


def _join(out: Path, name: str, count: int) -> None:
    """The manifest of a set from the lines of its shards."""
    lines: list[bytes] = []
    for shard in range(count):
        lines += (out / name / f"{shard:04d}.jsonl").read_bytes().splitlines()[1:]
    _whole(out / f"{name}.jsonl.gz", gzip.compress(b"\n".join(lines) + b"\n", mtime=0))


def _whole(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


# ------------------------------------------------------------------------------------------------- clips


def make_clip(name: str, s: Set, index: int) -> Clip:
    """Clip `index` of a set."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([s.seed, key, index])))
    clip = KINDS[s.kind](s, index, rng)
    if rng.random() < s.augment:
        samples = augment(clip.samples, espeak.RATE, rng, Augment())
        return replace(clip, samples=samples, custom={**clip.custom, "augmented": True})
    return clip


def speech(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A sentence of the world in a voice of the set."""
    language = s.languages[index % len(s.languages)]
    sentence = _said(language, s.split, s.count, s.seed)[index // len(s.languages)]
    custom = {"template": sentence.template, "split": sentence.split}
    if s.voices == "flite":
        voice = espeak.FLITE_VOICES[int(rng.integers(len(espeak.FLITE_VOICES)))]
        return Clip(espeak.flite_say(sentence.spoken, voice), sentence.text, language, f"flite-{voice}", custom)
    variants = espeak.HELD_OUT_VARIANTS if s.voices == "held-out" else espeak.TRAIN_VARIANTS
    voice = espeak.draw_voice(rng, variants)
    speaker = f"{voice.variant or 'plain'}-{voice.pitch}"
    return Clip(espeak.say(sentence.spoken, LANGUAGES[language].espeak, voice), sentence.text, language, speaker, custom)


@lru_cache(maxsize=64)
def _said(language: str, split: str, count: int, seed: int) -> list[Sentence]:
    return sentences(language, check_split(split), count, seed)


def over(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A sentence over an everyday sound; the sentence is what counts."""
    clip = speech(s, index, rng)
    kind = noises.KINDS[int(rng.integers(len(noises.KINDS)))]
    noise = noises.render(kind, len(clip.samples) / espeak.RATE, rng, timbres(s))
    samples = noises.mix(clip.samples, noise, float(rng.uniform(5, 20)))
    return replace(clip, samples=samples, custom={**clip.custom, "sound": kind})


def tune(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """A melody with chords, described."""
    samples, labels = music.compose(rng, timbres(s))
    return Clip(samples, describe_music(labels), custom=asdict(labels))


def sound(s: Set, index: int, rng: np.random.Generator) -> Clip:
    """An everyday sound, named."""
    kind = noises.KINDS[index % len(noises.KINDS)]
    samples = noises.render(kind, float(rng.uniform(1.5, 4.0)), rng, timbres(s))
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


KINDS = {"speech": speech, "over": over, "music": tune, "sound": sound}
