"""Pseudo-labels: an earlier AuT writes the transcripts of recordings that have none, and keeps those it is sure of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track

from antiphon.errors import ConfigError, InputError
from antiphon.train.data import Example, Kept, batches, listened, read_examples, write_manifest
from antiphon.train.recipe import read_fields
from antiphon.train.stages.aut import AuTStage, write
from antiphon.train.stages.common import Setting
from antiphon.train.text import read_transcript


@dataclass(frozen=True)
class LabelOptions:
    """What only labelling knows."""

    out: str  # manifest that is written, beside those that are read
    decoder: dict[str, Any] = field(default_factory=dict)  # sizes of the teacher's text decoder
    keep: float = -0.1  # mean log-probability of a transcript's tokens, from which on it is kept
    window: int = 8


def label(setting: Setting, *, quiet: bool = False) -> tuple[int, int]:
    """Write the manifest of what the teacher is sure of; returns how many cuts were kept, of how many.

    The teacher is the run that the recipe's `init` names. A supervision becomes {label_source: pseudo, teacher, score};
    what it said before is gone.

    Raises:
        ConfigError: no teacher is named. InputError: it is sure of nothing.
    """
    recipe = setting.recipe
    options = read_fields(LabelOptions, dict(recipe.options), f"{recipe.name}.options")
    if "aut" not in recipe.init or "decoder" not in recipe.init:
        raise ConfigError(f"{recipe.name}: init names no aut and decoder; labels need a teacher")
    teacher = AuTStage(setting.teaching({"decoder": options.decoder}))
    teacher.modules.eval()
    examples = [e for s in recipe.data.mix for e in read_examples(s, setting.cuts)]
    lines = [json.dumps(cut, ensure_ascii=False) for cut in labelled(teacher, examples, options, recipe, quiet=quiet)]
    if not lines:
        raise InputError(f"{recipe.name}: no transcript reaches {options.keep}; train the teacher longer or lower keep")
    write_manifest(setting.cuts / options.out, lines)
    return len(lines), len(examples)


def labelled(
    teacher: AuTStage, examples: list[Example], options: LabelOptions, recipe: Any, *, quiet: bool
) -> Iterator[dict[str, Any]]:
    """Cuts with the teacher's transcripts, as lines of a manifest, in the order of the examples."""
    found: dict[str, dict[str, Any]] = {}
    groups, clips = (
        list(batches(examples, recipe.data.batch_seconds)),
        Kept(teacher.read, examples, recipe.data.readers),
    )
    with torch.inference_mode():
        for part in track(groups, recipe.name, disable=quiet):
            mel, frames = listened([clips(example)[0] for example in part])
            states, heard = teacher.encode(mel, frames, options.window)
            ids, scores = write(teacher.decoder, states, heard, teacher.tokenizer)
            for example, line, score in zip(part, ids, scores.tolist(), strict=True):
                text, language = read_transcript(teacher.tokenizer.decode(line))
                if score >= options.keep and text:
                    about = {"label_source": "pseudo", "teacher": recipe.init["aut"], "score": round(score, 4)}
                    found[example.cut.id] = told(example.cut, text, language, about)
    return iter(found[e.cut.id] for e in examples if e.cut.id in found)


def told(cut: Any, text: str, language: str | None, about: dict[str, Any]) -> dict[str, Any]:
    """A cut whose only supervision says `text`."""
    new = deepcopy(cut)
    new.supervisions = new.supervisions[:1]
    first = new.supervisions[0]
    first.text, first.language, first.duration, first.custom = text, language, cut.duration, about
    return new.to_dict()
