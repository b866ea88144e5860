"""Codes of a corpus: what the Talker is trained to say, made once by a trained codec and kept beside the run.

Shapes: N samples, T frames, Q codebooks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from antiphon.audio import Samples
from antiphon.codec import Codec
from antiphon.files import read_safetensors, write_safetensors
from antiphon.train.data import Example, load_samples
from antiphon.train.talks import cut_out

Spoken = tuple[Example, int]  # a cut and which of its supervisions is spoken


def key_of(spoken: Spoken) -> str:
    """Name of the codes of one supervision."""
    return spoken[0].cut.supervisions[spoken[1]].id


def encode(codec: Codec, spoken: Sequence[Spoken], cache: Path, mark: str, *, quiet: bool = False) -> dict[str, Tensor]:
    """Codes [T, Q] of what is spoken, by supervision id; `mark` names the codec, and another one's codes are not used.

    Raises:
        AudioError: a cut that cannot be read.
    """
    names = hashlib.sha256("\n".join([mark, *map(key_of, spoken)]).encode()).hexdigest()[:16]
    path = cache / f"codes-{names}.safetensors"
    if path.exists():
        return {name: codes.long() for name, codes in read_safetensors(path).items()}
    codes = {}
    with torch.no_grad():
        for one in track(spoken, "codes of the corpus", disable=quiet):
            codes[key_of(one)] = codec.encode(torch.from_numpy(sound_of(one, codec.config.sampling_rate))[None])[0]
    cache.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: c.contiguous() for name, c in codes.items()})
    return codes


def sound_of(spoken: Spoken, rate: int) -> Samples:
    """Samples [N] of one supervision."""
    example, supervision = spoken
    return cut_out(example, load_samples(example.cut, example.cut.sampling_rate), supervision, rate)
