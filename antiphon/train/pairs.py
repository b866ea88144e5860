"""Pairs to prefer from: what a Talker says of the same sentence, judged by who hears it.

Each sentence is said several times, with other draws, in the voice of its recording, and read back by AuT. Where the
best is clearly nearer to the text than the worst, both become a cut with the recording behind them, for the stage
`preference`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import MonoCut, Recording, SupervisionSegment
from rich.progress import track
from torch import nn

from antiphon.audio import LogMel, Samples, write_audio
from antiphon.aut import TextDecoder, TextDecoderConfig
from antiphon.error_rates import error_rates
from antiphon.errors import ConfigError, InputError
from antiphon.files import write_text
from antiphon.generate import Omni, collect
from antiphon.speaker import SpeakerConfig, SpeakerEncoder
from antiphon.train.codes import sound_of
from antiphon.train.data import Example, read_examples, write_manifest
from antiphon.train.listener import Listener
from antiphon.train.recipe import read_fields
from antiphon.train.stages.common import Setting

LONGEST = 2  # times as long as its recording a rendition may be


@dataclass(frozen=True)
class PairsOptions:
    """What only this stage knows."""

    out: str  # manifest that is written, beside those that are read; the sound lies in a folder of its name
    speaker: dict[str, Any]  # sizes of the speaker encoder
    decoder: dict[str, Any] = field(default_factory=dict)  # sizes of AuT's text decoder
    takes: int = 4  # renditions of each sentence
    apart: float = 0.2  # least difference of the error rates of the best and the worst


Say = Callable[[Example, int], Samples]  # a rendition, given a seed
Judge = Callable[[Samples, Example], float]  # error rate of a rendition


def pairs(setting: Setting, *, quiet: bool = False) -> tuple[int, int]:
    """Write the manifest of the pairs that the recipe's cuts give; returns how many pairs there are, of how many cuts.

    Cuts that were judged before are not judged again: a run that was stopped goes on.

    Raises:
        ConfigError: a box is missing that speaks or hears. InputError: no sentence gives a pair.
    """
    recipe = setting.recipe
    options = read_fields(PairsOptions, dict(recipe.options), f"{recipe.name}.options")
    say, judge, rate = _speaker_and_judge(setting, options)
    examples = [e for source in recipe.data.mix for e in read_examples(source, setting.cuts)]
    out, lines = setting.cuts / options.out, list[str]()
    folder = out.with_name(out.name.split(".")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(track(examples, recipe.name, disable=quiet)):
        judged = folder / f"{example.cut.id}.json"
        if not judged.exists():
            takes = [say(example, recipe.seed + number * options.takes + i) for i in range(options.takes)]
            found = _pair(example, takes, judge, folder, rate, options.apart)
            write_text(judged, json.dumps(found, ensure_ascii=False))
        if (line := judged.read_text(encoding="utf-8")) != "null":
            lines.append(line)
    if not lines:
        raise InputError(f"{recipe.name}: no two renditions are {options.apart} apart; lower apart or give more takes")
    write_manifest(out, lines)
    return len(lines), len(examples)


def _speaker_and_judge(setting: Setting, options: PairsOptions) -> tuple[Say, Judge, int]:
    """What says the text of an example, what tells how far a rendition is from the text, and the rate of both."""
    recipe, config = setting.recipe, setting.config
    if config.talker is None or config.code2wav is None:
        raise ConfigError(f"{recipe.name}: the configuration has no Talker; give talker_config and code2wav_config")
    boxes = Omni(config, setting.tokenizer)
    speech, width = boxes.speaking(), config.talker.text.hidden_size
    speaker = SpeakerEncoder(read_fields(SpeakerConfig, {"width": width, **options.speaker}, "speaker"))
    sizes = {"vocab_size": config.text.vocab_size, **options.decoder}
    decoder = TextDecoder(read_fields(TextDecoderConfig, sizes, f"{recipe.name}.options.decoder"), config.audio.d_model)
    parts = {"thinker": boxes.thinker, "talker": speech.talker, "mtp": speech.mtp, "code2wav": speech.code2wav}
    parts |= {"speaker": speaker, "aut": boxes.aut, "decoder": decoder}
    if missing := sorted(set(parts) - set(recipe.init)):
        raise ConfigError(f"{recipe.name}: init names no {', '.join(missing)}; pairs are said and read back")
    setting.prepare(nn.ModuleDict(parts)).eval()
    front, rate = LogMel(speaker.config.mel).to(setting.device), config.code2wav.sample_rate
    frame_rate = config.code2wav.frame_rate
    listener = Listener(boxes.aut, rate, decoder)

    def say(example: Example, seed: int) -> Samples:
        recorded = torch.from_numpy(sound_of((example, 0), speaker.config.sample_rate).copy()).to(setting.device)
        with torch.inference_mode():
            voice = speaker(front(recorded[None], final=True))[0]
        frames = round(example.cut.supervisions[0].duration * frame_rate)
        text = example.cut.supervisions[0].text
        return collect(boxes.speak(text, voice=voice, seed=seed, max_frames=LONGEST * frames + 1)).audio

    def judge(samples: Samples, example: Example) -> float:
        heard = listener.read(torch.from_numpy(samples).to(setting.device), setting.tokenizer)
        return next(iter(error_rates([(example.cut.supervisions[0].text, heard, example.language)]).values()))

    return say, judge, rate


def _pair(
    example: Example, takes: list[Samples], judge: Judge, folder: Path, rate: int, apart: float
) -> dict[str, Any] | None:
    """A line of the manifest, its sound in `folder`; none where the takes are too much alike."""
    takes = [take for take in takes if len(take)]
    errors = [judge(take, example) for take in takes]
    if not takes or max(errors) - min(errors) < apart:
        return None
    best, worst = int(np.argmin(errors)), int(np.argmax(errors))
    file, first = folder / f"{example.cut.id}.wav", example.cut.supervisions[0]
    parts = [takes[best], takes[worst], sound_of((example, 0), rate)]
    write_audio(file, np.concatenate(parts), rate)
    recording = Recording.from_file(file, recording_id=f"{example.cut.id}-pair")
    recording.sources[0].source = f"{folder.name}/{file.name}"
    supervisions, start = list[SupervisionSegment](), 0
    for part, kind, error in zip(parts, ("better", "worse", "voice"), (errors[best], errors[worst], None), strict=True):
        custom = {} if error is None else {"error": round(error, 4)}
        supervisions.append(
            SupervisionSegment(
                *(f"{recording.id}-{kind}", recording.id, start / rate, len(part) / rate),
                **{"text": first.text, "language": first.language, "speaker": first.speaker, "custom": custom},
            )
        )
        start += len(part)
    return MonoCut(recording.id, 0, recording.duration, 0, supervisions, recording=recording).to_dict()
