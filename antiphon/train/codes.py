"""Codes of a corpus: what the Talker is trained to say, made once by a trained codec and kept among the runs.

Shapes: N samples, T frames, Q codebooks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from antiphon.audio import Samples
from antiphon.codec import Codec
from antiphon.files import read_safetensors, write_safetensors
from antiphon.train.data import Example, load_samples, pad
from antiphon.train.talks import cut_out

KEPT_EVERY = 4000  # clips: what a kill costs
TOGETHER = 64  # clips
Spoken = tuple[Example, int]  # a cut and which of its supervisions is spoken
SoundOf = Callable[[Spoken, int], Samples]  # `sound_of`, or what remembers it


def key_of(spoken: Spoken) -> str:
    """Name of the codes of one supervision: what it is called and where its sound lies."""
    cut, part = spoken[0].cut, spoken[0].cut.supervisions[spoken[1]]
    return f"{part.id} {cut.start + part.start:.4f} {part.duration:.4f}"


def encode(
    codec: Codec, spoken: Sequence[Spoken], cache: Path, *, sound: SoundOf | None = None, quiet: bool = False
) -> dict[str, Tensor]:
    """Codes [T, Q] of what is spoken, by `key_of`; those that this codec made before are read from the folder `cache`.

    Raises:
        AudioError: a cut that cannot be read.
    """
    rate, size = codec.config.sampling_rate, codec.config.frame_samples
    device = next(codec.parameters()).device

    def make(some: Sequence[Spoken]) -> list[Tensor]:
        waves, lengths = pad([torch.from_numpy((sound or sound_of)(one, rate)) for one in some])
        frames = -(-lengths // size)  # silence fills the last
        codes = codec.encode(F.pad(waves, (0, int(frames.max()) * size - waves.shape[1])).to(device))
        return [row[:count] for row, count in zip(codes.cpu(), frames.tolist(), strict=True)]

    return keep(cache / f"codes-{fingerprint(codec)}.safetensors", spoken, make, "codes of the corpus", quiet)


def keep(
    path: Path, spoken: Sequence[Spoken], make: Callable[[Sequence[Spoken]], list[Tensor]], what: str, quiet: bool
) -> dict[str, Tensor]:
    """What `make` gives for some of what is spoken, int64 of any shape, by `key_of`; the file `path` remembers it."""
    known = read_safetensors(path) if path.exists() else {}
    missing = list({key: one for one in spoken if (key := key_of(one)) not in known}.items())
    missing.sort(key=lambda item: item[1][0].cut.supervisions[item[1][1]].duration)  # of one length together
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for start in track(range(0, len(missing), TOGETHER), what, disable=quiet or not missing):
            some = missing[start : start + TOGETHER]
            for (key, _), made in zip(some, make([one for _, one in some]), strict=True):
                known[key] = made.to(torch.int16).contiguous()
            done = start + len(some)
            if done // KEPT_EVERY > start // KEPT_EVERY or done == len(missing):
                write_safetensors(path, known)
    return {key: known[key].long() for key in map(key_of, spoken)}


def fingerprint(*boxes: nn.Module) -> str:
    """Changes with every weight."""
    whole = hashlib.sha256()
    for name, tensor in sorted(item for box in boxes for item in box.state_dict().items()):
        whole.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def sound_of(spoken: Spoken, rate: int) -> Samples:
    """Samples [N] of one supervision."""
    example, supervision = spoken
    return cut_out(example, load_samples(example.cut, example.cut.sampling_rate), supervision, rate)
