"""Batches of lhotse cuts, mixed by weight: a pure function of (seed, step, rank, world size).

Nothing is remembered between steps, so a run goes on at step n by asking for batch n. Cuts of similar length share a
batch; within every batch the sources keep their shares of the seconds. Where several processes train one model, their
batches of a step are of one length and keep the shares together.

Shapes: B clips, N samples, T mel frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antiphon.audio import Resampler, Samples, check_samples
from antiphon.errors import InputError
from antiphon.train.recipe import Data, Source

PACE = 0.07  # seconds that it takes to say a character, about
BUCKETS = 12  # lengths that share a batch; more means less padding and less variety in a batch


@dataclass(frozen=True)
class Example:
    """One cut and what is asked of it."""

    cut: Any  # lhotse MonoCut
    task: str

    @property
    def text(self) -> str:
        """What its supervisions say."""
        return " ".join(s.text for s in self.cut.supervisions if s.text)

    @property
    def seconds(self) -> float:
        """How long it is, with what is only read, such as the declaration of tools, as if it were said."""
        messages = (self.cut.custom or {}).get("messages", ())
        read = [m["content"] for m in messages if m["role"] != "user" and "supervision" not in m]
        return self.cut.duration + PACE * sum(map(len, read))

    @property
    def language(self) -> str | None:
        """Language code of the first supervision."""
        return next((s.language for s in self.cut.supervisions), None)

    def custom(self, name: str) -> Any:
        """A field that the producer of the cuts added to the supervision, None where there is none."""
        return next((s.custom[name] for s in self.cut.supervisions if s.custom and name in s.custom), None)


def read_cuts(path: str | Path, root: Path | None = None) -> list[Any]:
    """All cuts of a manifest (.jsonl or .jsonl.gz); relative audio paths are relative to the manifest's folder.

    `root` is the folder of a course's cuts. What is not in it may be in the folder above, which all courses share.

    Raises:
        InputError: there is no such manifest, or there is nothing in it.
    """
    from lhotse import CutSet

    places = [Path(path)] if root is None else [root / path, root.parent / path]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        tried = " or ".join(dict.fromkeys(map(str, places)))
        raise InputError(f"there is no manifest {tried}; make it with antiphon corpus or antiphon prepare")
    cuts = list(CutSet.from_jsonl_lazy(place))
    if not cuts:
        raise InputError(f"{place} holds no cuts")
    return [_at(cut, place.parent) for cut in cuts]


def _at(cut: Any, folder: Path) -> Any:
    """The cut with its audio found from the manifest's folder."""
    for source in cut.recording.sources if cut.has_recording else ():
        if source.type == "file" and not Path(source.source).is_absolute():
            source.source = str(folder / source.source)
    return cut


def load_samples(cut: Any, rate: int) -> Samples:
    """Mono samples [N] of a cut at `rate`; channels are averaged.

    Raises:
        AudioError: what was read is not finite, or empty.
    """
    return resample(
        check_samples(cut.load_audio().mean(0), cut.sampling_rate, name=f"cut {cut.id}"), cut.sampling_rate, rate
    )


def resample(samples: Samples, source: int, target: int) -> Samples:
    """Samples [N] at another rate, through the resampler that runs in streams."""
    if source == target:
        return samples
    with torch.inference_mode():
        return _resampler(source, target)(torch.from_numpy(samples)[None], final=True)[0].numpy()


@lru_cache
def _resampler(source: int, target: int) -> Resampler:
    return Resampler(source, target)


class Mix:
    """Batches drawn from several sources; source s has a share `weight` of the seconds.

    With `batch_seconds` 0 a batch is one example, as likely as its sound is long: for crops, which are of one length.
    """

    def __init__(
        self, data: Data, sources: Sequence[Source], root: Path, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.data, self.seed, self.rank, self.world = data, seed, rank, world
        names = {s.cuts for s in sources}  # each is read once, however many tasks it has
        cuts = {name: read_cuts(name, root) for name in names}
        pools = [[e for c in cuts[s.cuts] if (e := Example(c, s.task)).seconds <= data.max_seconds] for s in sources]
        for source, pool in zip(sources, pools, strict=True):
            if not pool:
                raise InputError(f"{source.cuts} has no cut of at most {data.max_seconds} s; raise data.max_seconds")
        length = (lambda e: e.seconds) if data.batch_seconds else (lambda e: e.cut.duration)
        lengths = [np.array([length(e) for e in pool]) for pool in pools]
        self.edges = _edges(lengths, [s.weight for s in sources])
        places = [np.searchsorted(self.edges, own) for own in lengths]
        buckets = range(len(self.edges))
        self.cells = [  # [source][bucket] -> examples
            [[pool[i] for i in (place == b).nonzero()[0]] for b in buckets]
            for pool, place in zip(pools, places, strict=True)
        ]
        seconds = np.array([[own[p == b].sum() for b in buckets] for own, p in zip(lengths, places, strict=True)])
        examples = np.array([[len(cell) for cell in row] for row in self.cells])
        weights = np.array([s.weight for s in sources])[:, None] / seconds.sum(1, keepdims=True)
        self.rates = weights * (examples if data.batch_seconds else seconds)  # [source, bucket]: share of the examples
        self.sizes = np.maximum(1, (data.batch_seconds / self.edges).astype(int))  # examples per batch of a bucket

    def draw(self, step: int) -> list[Example]:
        """This rank's examples of one step: at most `batch_seconds` when padded to the longest, one at least."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step, self.world - 1])))
        bucket = int(_pick(self.rates.sum(0) / self.sizes, random.random()))
        count = self.sizes[bucket]
        begin = random.random() + self.rank / self.world  # between the places of the other ranks, which draw alike
        places = (np.arange(count) + begin) / count % 1  # evenly spread: each batch keeps the shares, and all together
        picks = random.random((self.world, count))[self.rank]
        cells = [self.cells[source][bucket] for source in _pick(self.rates[:, bucket], places)]
        return [cell[int(p * len(cell))] for cell, p in zip(cells, picks, strict=True)]


def _pick(shares: np.ndarray, places: np.ndarray | float) -> np.ndarray:
    """Indices into `shares` at places of their sum, from 0 to below 1."""
    total = shares.cumsum()
    return np.searchsorted(total, places * total[-1], side="right").clip(0, len(shares) - 1)


def _edges(lengths: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Upper lengths of the buckets, in seconds: equal shares of what is drawn, the longest example last."""
    durations = np.concatenate(lengths)
    share = np.concatenate([np.full(len(own), w / len(own)) for own, w in zip(lengths, weights, strict=True)])
    order = durations.argsort(kind="stable")
    places = share[order].cumsum() / share.sum()
    inner = [durations[order][np.searchsorted(places, i / BUCKETS)] for i in range(1, BUCKETS)]
    return np.unique([*inner, durations.max()])


def batches(examples: Sequence[Example], seconds: float) -> Iterator[list[Example]]:
    """All examples once, by length, at most `seconds` padded: for validation and labelling."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda e: (e.cut.duration, e.cut.id)):
        if batch and example.cut.duration * (len(batch) + 1) > seconds:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def pad(tensors: Sequence[Tensor], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Tensors [n, …] of several lengths as one [B, longest, …], and their lengths [B]."""
    lengths = torch.tensor([len(t) for t in tensors])
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value), lengths


def listened(examples: Sequence[Example], log_mel: Callable[..., Tensor], rate: int) -> tuple[Tensor, Tensor]:
    """Raw log-mel [B, T, F] of the examples, each computed on its own as in inference, and its frames [B]."""
    mels = [log_mel(torch.from_numpy(load_samples(e.cut, rate))[None], final=True)[0] for e in examples]
    return pad(mels)
