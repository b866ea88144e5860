"""Recordings as the model's own codec gives them back, for ears that have to understand what the model says.

    cuts ── codec ──> codes ── Code2Wav ──> wav of its own, with the same supervision

What is said is heard through the codec by everyone who listens, the model itself among them. Trained on recordings
alone, an encoder takes the codec's traces for something else.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from antiphon.audio import write_audio
from antiphon.code2wav import Code2Wav
from antiphon.codec import Codec
from antiphon.errors import ConfigError
from antiphon.train.data import batches, load_samples, pad, read_examples, write_manifest
from antiphon.train.recipe import read_fields
from antiphon.train.stages.codec import read_codec_config
from antiphon.train.stages.common import Setting


@dataclass(frozen=True)
class EchoOptions:
    """What only this stage knows."""

    out: str  # manifest that is written, beside those that are read; the sound lies in a folder of its name


def echo(setting: Setting, *, quiet: bool = False) -> int:
    """Write the manifest and the sound of the recipe's cuts, coded and decoded; returns how many there are.

    Files that are there are kept: a run that was stopped goes on.

    Raises:
        ConfigError: `init` names no codec or no Code2Wav. AudioError: a cut that cannot be read.
    """
    recipe = setting.recipe
    options = read_fields(EchoOptions, dict(recipe.options), f"{recipe.name}.options")
    if setting.config.code2wav is None or not {"codec", "code2wav"} <= {name.split(".")[0] for name in recipe.init}:
        raise ConfigError(f"{recipe.name}: init names no codec and code2wav; what is heard again goes through both")
    codec, code2wav = Codec(read_codec_config(setting)), Code2Wav(setting.config.code2wav)
    setting.prepare(nn.ModuleDict({"codec": codec, "code2wav": code2wav})).eval()
    examples = [e for source in recipe.data.mix for e in read_examples(source, setting.cuts)]
    out, rate, size = setting.cuts / options.out, codec.config.sampling_rate, codec.config.frame_samples
    folder = out.with_name(out.name.split(".")[0])
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        for part in track(list(batches(examples, recipe.data.batch_seconds)), recipe.name, disable=quiet):
            part = [e for e in part if not file_of(folder, e.cut).exists()]
            if not part:
                continue
            waves, lengths = pad([torch.from_numpy(load_samples(e.cut, rate)) for e in part])
            waves = F.pad(waves, (0, -waves.shape[1] % size)).to(setting.device)
            made = code2wav(codec.encode(waves)).float().cpu().numpy()
            for example, samples, length in zip(part, made, lengths.tolist(), strict=True):
                write_audio(file_of(folder, example.cut), samples[:length], rate)
    lines = [json.dumps(heard_again(e.cut, file_of(folder, e.cut), rate), ensure_ascii=False) for e in examples]
    write_manifest(out, lines)
    return len(lines)


def file_of(folder: Path, cut: Any) -> Path:
    """Where the sound of a cut lies."""
    return folder / f"{cut.id}.wav"


def heard_again(cut: Any, file: Path, rate: int) -> dict[str, Any]:
    """The cut with the sound of a file of its own, as a line of a manifest beside the file's folder."""
    new = deepcopy(cut).to_dict()
    samples = round(cut.duration * rate)
    recording = {
        "id": f"{cut.id}-coded",
        "sources": [{"type": "file", "channels": [0], "source": f"{file.parent.name}/{file.name}"}],
        "sampling_rate": rate,
        "num_samples": samples,
        "duration": samples / rate,
        "channel_ids": [0],
    }
    for supervision in new["supervisions"]:
        supervision["recording_id"] = recording["id"]
    return {**new, "id": recording["id"], "start": 0.0, "recording": recording}
