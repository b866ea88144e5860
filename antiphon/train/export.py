"""Export: finished runs as one checkpoint in the released form, with what the release has not beside it.

Each box is a file of its own, and a recipe writes those that its `init` names: a checkpoint grows box by box. The
released form has no names for the codec's encoder, the speaker encoder and the head that hears the end of a turn: they
are files of their own. A preset
voice is the mean of the vectors that the speaker encoder makes of its recordings, as a row of the Talker's embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from antiphon.audio import LogMel
from antiphon.codec import Codec
from antiphon.errors import ConfigError
from antiphon.model import Boxes
from antiphon.speaker import SPEAKER_FILE, SpeakerConfig, SpeakerEncoder, save_speaker
from antiphon.train.codes import Spoken, sound_of
from antiphon.train.data import read_examples
from antiphon.train.recipe import read_fields
from antiphon.train.stages.codec import read_codec_config
from antiphon.train.stages.common import TOKENIZER, Setting
from antiphon.train.stages.speech import spoken_in, voice_of
from antiphon.turn import TURN_FILE, TurnConfig, TurnEnd, save_turn
from antiphon.weights import save_boxes, save_codec


@dataclass(frozen=True)
class ExportOptions:
    """What an export is made with."""

    speaker: dict[str, Any] = field(default_factory=dict)  # sizes of the speaker encoder
    turn: dict[str, Any] = field(default_factory=dict)  # sizes of the head that hears the end of a turn
    dtype: str = "bfloat16"
    takes: int = 24  # recordings that a preset voice is the mean of
    into: str = ""  # folder of the checkpoint, the run's own by default
    temperature: float = 1.0  # by which the scores of Talker and MTP are divided, before who draws has a temperature

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"options.temperature is {self.temperature}; expected a number above 0")


def export(setting: Setting, run: Path) -> Path:
    """Write the boxes that the recipe's `init` names, each from its run; returns the checkpoint's folder.

    Raises:
        ConfigError: nothing to write, a talker without its speaker encoder, or a preset voice without a recording.
    """
    recipe = setting.recipe
    options = read_fields(ExportOptions, dict(recipe.options), f"{recipe.name}.options")
    boxes = Boxes(setting.config, setting.tokenizer)
    parts: dict[str, nn.Module] = {"aut": boxes.aut, "thinker": boxes.thinker}
    sizes = {"width": setting.config.audio.output_dim, **options.turn}
    parts["turn"] = TurnEnd(read_fields(TurnConfig, sizes, "turn"))
    if boxes.speech is not None:
        parts |= {"talker": boxes.speech.talker, "mtp": boxes.speech.mtp, "code2wav": boxes.speech.code2wav}
        width = boxes.speech.talker.config.text.hidden_size
        parts["speaker"] = SpeakerEncoder(read_fields(SpeakerConfig, {"width": width, **options.speaker}, "speaker"))
        parts["codec"] = Codec(read_codec_config(setting))
    chosen = {name: part.eval() for name, part in parts.items() if name in recipe.init}
    if not chosen:
        raise ConfigError(f"{recipe.name}: init names nothing to write; there are {', '.join(parts)}")
    if ("talker" in chosen) != ("speaker" in chosen):
        raise ConfigError(f"{recipe.name}: init names talker or speaker alone; the voices are rows of one by the other")
    setting.prepare(nn.ModuleDict(chosen))
    if boxes.speech is not None:
        cool([boxes.speech.talker.codec_head, boxes.speech.mtp.lm_head], options.temperature)
    folder = Path(options.into) if options.into else run
    folder.mkdir(parents=True, exist_ok=True)
    dtype: torch.dtype = getattr(torch, options.dtype)
    if boxes.speech is not None and isinstance(speaker := chosen.get("speaker"), SpeakerEncoder):
        store_voices(boxes.speech.talker.model.codec_embedding, speaker, setting, options.takes)
        save_speaker(speaker.to(dtype), folder / SPEAKER_FILE)
    if isinstance(turn := chosen.get("turn"), TurnEnd):
        save_turn(turn.to(dtype), folder / TURN_FILE)
    if isinstance(codec := chosen.get("codec"), Codec):
        save_codec(codec.to(dtype), folder)
    save_boxes(boxes.to(dtype), chosen, folder, companions=setting.run_of(TOKENIZER))
    return folder


@torch.no_grad()
def cool(heads: Iterable[nn.Module], temperature: float) -> None:
    """Divide scores by a temperature where they are made: all who draw as the release does draw so much cooler.

    Its temperatures suit a model of its size; a small one that draws as freely says words that are none.
    """
    for weight in chain.from_iterable(head.parameters() for head in heads):
        weight /= temperature


@torch.no_grad()
def store_voices(table: nn.Embedding, speaker: SpeakerEncoder, setting: Setting, takes: int) -> None:
    """Put each preset voice's vector in its row of the Talker's embedding."""
    assert setting.config.talker is not None
    examples = [e for source in setting.recipe.data.mix for e in read_examples(source, setting.cuts)]
    spoken = [one for example in examples for one in spoken_in(example)]
    for voice, row in setting.config.talker.speaker_id.items():
        recordings = [one for one in spoken if voice_of(one) == voice][:takes]
        if not recordings:
            raise ConfigError(f"{setting.recipe.name}: no recording of the voice {voice!r} in data.mix")
        table.weight[row] = torch.stack([voice_vector(one, speaker) for one in recordings]).mean(0)


def voice_vector(spoken: Spoken, speaker: SpeakerEncoder) -> Tensor:
    """The vector [W] of one recording."""
    front = speaker.config.mel
    sound = torch.from_numpy(sound_of(spoken, front.sample_rate).copy())
    return speaker(LogMel(front)(sound[None], final=True))[0]
