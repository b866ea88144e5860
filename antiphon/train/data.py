"""Batches of lhotse cuts, mixed by weight: a pure function of the seed and the batch's number.

Nothing is remembered between steps, so a run goes on at step n by asking for the batches of step n. Cuts of similar
length share a batch; within every batch the sources keep their shares of the seconds. Where several batches make one
step, one after another or in several processes, they are of one length and keep the shares together.

Shapes: B clips, N samples, T mel frames, F mel bins.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import fsspec
import fsspec.core
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from antiphon.audio import LogMel, Resampler, Samples, check_samples
from antiphon.config import MelConfig
from antiphon.errors import InputError
from antiphon.train.recipe import Data, Source

Item = TypeVar("Item")
Read = TypeVar("Read")
Mel = NDArray[np.float32] | NDArray[np.float16]  # raw log-mel [T, F]
PACE = 0.07  # seconds that it takes to say a character, about
READ = 0.4  # of the rows that sound takes, its text takes: five tokens a second instead of thirteen
PIECE = 1 << 18  # bytes that are read at once of a file in a store


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
        """How long it is, with what is only read, such as the declaration of tools, as sound of as many rows."""
        messages = (self.cut.custom or {}).get("messages", ())
        read = [m["content"] for m in messages if m["role"] != "user" and "supervision" not in m]
        own = self.cut.duration * (READ if self.task == "text" else 1.0)
        return own + READ * PACE * sum(map(len, read))

    @property
    def letters(self) -> int:
        """Bytes of what its supervisions say: tokens have about as many in every script."""
        return len(self.text.encode())

    @property
    def language(self) -> str | None:
        """Language code of a conversation, or of the first supervision."""
        first = next((s.language for s in self.cut.supervisions), None)
        return (self.cut.custom or {}).get("language", first)

    def custom(self, name: str) -> Any:
        """A field that the producer of the cuts added to the supervision, None where there is none."""
        return next((s.custom[name] for s in self.cut.supervisions if s.custom and name in s.custom), None)


def read_cuts(path: str | Path, root: Path | None = None) -> list[Any]:
    """All cuts of a manifest (.jsonl or .jsonl.gz); relative audio paths are relative to the manifest's folder.

    `root` is the folder of a course's cuts. What is not in it may be in the folder above, which all courses share. A
    URL that fsspec reaches is a manifest in that store.

    Raises:
        InputError: there is no such manifest, it cannot be read, or there are no cuts in it.
    """
    places = [path] if root is None or "://" in str(path) else [root / path, root.parent / path]
    tried = list(dict.fromkeys(map(str, places)))
    place = next((place for place in tried if exists(place)), None)
    if place is None:
        raise InputError(f"there is no manifest {' or '.join(tried)}; make it with antiphon corpus or antiphon prepare")
    cuts = read_manifest(place)
    if not cuts:
        raise InputError(f"{place} holds no cuts")
    return cuts


def read_manifest(place: str) -> list[Any]:
    """The cuts of a manifest on disk or in a store, with audio found from its folder; a recording is a cut of its own.

    Raises:
        InputError: it cannot be read.
    """
    from lhotse import Recording
    from lhotse.cut.data import DataCut
    from lhotse.serialization import deserialize_item

    store, path = store_of(place)
    found = list[Any]()
    try:
        with store.open(path, "rb", compression="infer") as file:
            for line in filter(bytes.strip, file):
                item = deserialize_item(json.loads(line))
                cut = item.to_cut() if isinstance(item, Recording) else item
                if not isinstance(cut, DataCut):
                    raise TypeError(f"a {type(cut).__name__} is no cut of a recording")
                found.append(_at(cut, place))
    except (OSError, EOFError, zlib.error, LookupError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{place} cannot be read from line {len(found) + 1} on ({error}); expected lhotse cuts, each a line of JSON"
        ) from None
    return found


def store_of(place: str) -> tuple[Any, str]:
    """The file system of fsspec that a path or URL is in, and the path there.

    Raises:
        InputError: it cannot be reached.
    """
    try:
        return fsspec.core.url_to_fs(place if "://" in place else str(Path(place).absolute()))
    except (ValueError, ImportError) as error:
        raise InputError(f"{place} cannot be reached: {error}") from None


def exists(place: str) -> bool:
    """Whether there is such a file, on disk or in a store."""
    store, path = store_of(place)
    return store.exists(path)


def read_examples(source: Source, root: Path) -> list[Example]:
    """The examples of one line of a mix.

    Raises:
        InputError: there is no such manifest, or nothing in it that is in its languages.
    """
    return examples_of(source, read_cuts(source.cuts, root))


def examples_of(source: Source, cuts: Sequence[Any]) -> list[Example]:
    """The examples that the cuts of a source give."""
    examples = [Example(cut, source.task) for cut in cuts]
    some = [e for e in examples if not source.languages or e.language in source.languages]
    if not some:
        raise InputError(f"{source.cuts} holds no cuts in {', '.join(source.languages)}; give its languages")
    return some


def write_manifest(path: Path, lines: Sequence[str]) -> None:
    """Write a manifest (.jsonl.gz) of cuts, one a line, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    os.replace(part, path)


def _at(cut: Any, place: str) -> Any:
    """A cut with its audio found from the folder of its manifest."""
    for source in cut.recording.sources if cut.has_recording else ():
        if source.type == "file" and "://" not in source.source and not Path(source.source).is_absolute():
            source.source = f"{place.rpartition('/')[0] or '.'}/{source.source}"
    return cut


def read_sound(cut: Any) -> Samples:
    """Mono samples [N] of a cut at its own rate; channels are averaged. Of a file in a store only that part is read."""
    with ExitStack() as files:
        near = [files.enter_context(_opened(source)) for source in cut.recording.sources]
        return replace(cut, recording=replace(cut.recording, sources=near)).load_audio().mean(0)


@contextmanager
def _opened(source: Any) -> Iterator[Any]:
    """A source whose file in a store is read in pieces, as they are needed: lhotse takes an open file as well."""
    if source.type != "file" or "://" not in source.source:
        yield source
        return
    store, path = store_of(source.source)
    with store.open(path, "rb", block_size=PIECE) as file:
        yield replace(source, source=file)


def load_samples(cut: Any, rate: int) -> Samples:
    """Mono samples [N] of a cut at `rate`; channels are averaged.

    Raises:
        AudioError: what was read is not finite, or empty.
    """
    return resample(check_samples(read_sound(cut), cut.sampling_rate, name=f"cut {cut.id}"), cut.sampling_rate, rate)


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

    def __init__(self, data: Data, sources: Sequence[Source], root: Path, seed: int, together: int = 1) -> None:
        self.data, self.seed, self.together = data, seed, together  # batches of a step
        names = {s.cuts for s in sources}  # each is read once, however many tasks it has
        cuts = {name: read_cuts(name, root) for name in names}
        examples = [examples_of(s, cuts[s.cuts]) for s in sources]
        pools = [[e for e in some if e.seconds <= data.max_seconds] for some in examples]
        for source, pool in zip(sources, pools, strict=True):
            if not pool:
                raise InputError(f"{source.cuts} has no cut of at most {data.max_seconds} s; raise data.max_seconds")
        length = (lambda e: e.seconds) if data.batch_seconds else (lambda e: e.cut.duration)
        lengths = [np.array([length(e) for e in pool]) for pool in pools]
        self.edges, places = _buckets(lengths, pools, [s.weight for s in sources], data.buckets)
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

    @property
    def examples(self) -> list[Example]:
        """All that can be drawn."""
        return [example for row in self.cells for cell in row for example in cell]

    def draw(self, number: int) -> list[Example]:
        """The examples of one batch: at most `batch_seconds` when padded to the longest, one at least."""
        step, part = divmod(number, self.together)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step, self.together - 1])))
        bucket = int(_pick(self.rates.sum(0) / self.sizes, random.random()))
        count = self.sizes[bucket]
        begin = random.random() + part / self.together  # between the places of the step's other batches, drawn alike
        places = (np.arange(count) + begin) / count % 1  # evenly spread: each batch keeps the shares, and all together
        picks = random.random((self.together, count))[part]
        cells = [self.cells[source][bucket] for source in _pick(self.rates[:, bucket], places)]
        return [cell[int(p * len(cell))] for cell, p in zip(cells, picks, strict=True)]


class Kept(Generic[Read]):
    """What `read` makes of examples. With `readers` all of them are read at once, by so many processes, and it stays.

    A GPU takes steps faster than sounds are read and measured. What is kept may be of half precision (`numbers`).
    """

    def __init__(self, read: Callable[[Example], Read], examples: Sequence[Example], readers: int) -> None:
        self.read, self.examples = read, examples if readers else []  # while they are here, no other has their `id`
        made = read_together(read, self.examples, readers)
        self.made = {id(example): one for example, one in zip(self.examples, made, strict=True)}

    def __call__(self, example: Example) -> Read:
        """What was made of it, or is now."""
        return self.made[id(example)] if id(example) in self.made else self.read(example)


def read_together(read: Callable[[Item], Read], items: Sequence[Item], readers: int) -> list[Read]:
    """`read` of all items, in forked processes if there are to be any; then it may give arrays and no tensors."""
    global _reading
    if not items or not readers:
        return list(map(read, items))
    _reading = read, items
    with multiprocessing.get_context("fork").Pool(readers, torch.set_num_threads, (1,)) as pool:
        made = pool.imap(_read_one, range(len(items)), chunksize=64)
        return list(track(made, "reading sounds", total=len(items)))


_reading: tuple[Callable[[Any], Any], Sequence[Any]] = (lambda item: item, ())  # as forked processes find it


def _read_one(index: int) -> Any:
    read, items = _reading
    return read(items[index])


def numbers(data: Data) -> type:
    """Type of the log-mels that are kept in memory: at half precision they differ by less than a thousandth."""
    return np.float16 if data.readers else np.float32


def _pick(shares: np.ndarray, places: np.ndarray | float) -> np.ndarray:
    """Indices into `shares` at places of their sum, from 0 to below 1."""
    total = shares.cumsum()
    return np.searchsorted(total, places * total[-1], side="right").clip(0, len(shares) - 1)


def _buckets(
    lengths: list[np.ndarray], pools: list[list[Example]], weights: list[float], counts: tuple[int, int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The longest of each bucket in seconds, and in which bucket each example of each source is.

    By length, and within a length by how much there is to write.
    """
    seconds, longest = np.concatenate(lengths), list[float]()
    shares = np.concatenate([np.full(len(own), w / len(own)) for own, w in zip(lengths, weights, strict=True)])
    letters = np.array([e.letters for pool in pools for e in pool] if counts[1] > 1 else np.zeros(len(seconds)))
    edges = _edges(seconds, shares, counts[0])
    lines, places = np.searchsorted(edges, seconds), np.zeros(len(seconds), int)
    for i, edge in enumerate(edges):
        alike = lines == i
        inner = _edges(letters[alike], shares[alike], counts[1])
        places[alike] = len(longest) + np.searchsorted(inner, letters[alike])
        longest += [float(edge)] * len(inner)
    return np.array(longest), np.split(places, np.cumsum([len(own) for own in lengths])[:-1])


def _edges(values: np.ndarray, shares: np.ndarray, count: int) -> np.ndarray:
    """Upper bounds of at most `count` parts: equal shares of what is drawn, the largest value last."""
    order = values.argsort(kind="stable")
    places = shares[order].cumsum() / shares.sum()
    inner = [values[order][np.searchsorted(places, i / count)] for i in range(1, count)]
    return np.unique([*inner, values.max()])


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


def measured(samples: Samples, config: MelConfig) -> Mel:
    """Raw log-mel [T, F] of a clip [N], computed on its own as in inference."""
    with torch.inference_mode():
        return _front_end(config)(torch.from_numpy(np.ascontiguousarray(samples))[None], final=True)[0].numpy()


@lru_cache
def _front_end(config: MelConfig) -> LogMel:
    return LogMel(config)


def listened(mels: Sequence[Mel]) -> tuple[Tensor, Tensor]:
    """Raw log-mel [B, T, F] of clips, and their frames [B]."""
    return pad([torch.from_numpy(mel) for mel in mels])
