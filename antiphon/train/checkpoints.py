"""A run's state on disk, whole or not at all.

One process writes one file. Processes that torchrun started each write their part into a folder, in the background
while training goes on (torch.distributed.checkpoint); the folder counts once it has its name. Either is read by any
number of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from antiphon.errors import WeightsError
from antiphon.files import read_header, read_metadata, read_safetensors, write_safetensors, write_text
from antiphon.train import ranks, shards
from antiphon.train.recipe import Devices

STATE = "last.safetensors"  # weights, their averages, AdamW's moments: all that a run needs to go on
FOLDER = "checkpoints"  # the same in parts, a folder for each step that was kept
ABOUT = "run.json"  # in such a folder: step, best figure, recipe
BEST = "best.safetensors"  # weights of the best validation; what later stages and the export read
PART = ".part"  # ends the names of what is not whole


@dataclass(frozen=True)
class Checkpoint:
    """A state on disk."""

    path: Path
    about: dict[str, Any]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Its tensors."""
        if self.path.is_file():
            return {name: list(entry.shape) for name, entry in read_header(self.path).items()}
        stored = FileSystemReader(self.path).read_metadata().state_dict_metadata
        return {n: list(t.size) for n, t in stored.items() if isinstance(t, TensorStorageMetadata)}

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors in place, each process its part of them."""
        if self.path.is_dir():
            load(tensors, storage_reader=FileSystemReader(self.path))
            return
        found = read_safetensors(self.path)
        for name, tensor in tensors.items():
            shards.put(tensor, found[name])


class Checkpoints:
    """The states of one run."""

    def __init__(self, folder: Path, devices: Devices) -> None:
        self.folder, self.devices = folder, devices
        self.group: Any = distributed.new_group(backend="gloo") if ranks.many() else None  # apart from what steps say
        self.writing: tuple[Path, Future[Any]] | None = None
        self.size = 0  # bytes of this process's part

    def newest(self) -> Checkpoint | None:
        """The last whole state, as rank 0 sees it."""
        found = list[Checkpoint]()
        if ranks.rank() == 0:
            if (self.folder / STATE).exists():
                found.append(Checkpoint(self.folder / STATE, json.loads(read_metadata(self.folder / STATE, "run"))))
            found += [Checkpoint(p, json.loads((p / ABOUT).read_text(encoding="utf-8"))) for p in self.published()]
        return ranks.told(max(found, key=lambda c: c.about["step"], default=None))

    def published(self) -> list[Path]:
        """Folders that are whole, in order."""
        return sorted(p for p in (self.folder / FOLDER).glob("*") if p.suffix != PART)

    def save(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write a state; of several processes each begins to write its part, and `settle` sees to the rest.

        Raises:
            WeightsError: it, or the one before, cannot be written.
        """
        if not ranks.many():
            write_file(self.folder / STATE, tensors, {"run": json.dumps(about)})
            return
        self.settle()
        part = self.folder / FOLDER / f"{about['step']:08d}{PART}"
        if ranks.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_text(part / ABOUT, json.dumps(about))
        ranks.told(None)
        self.size = sum(shards.local(t).nbytes for t in tensors.values())
        future = async_save(tensors, storage_writer=FileSystemWriter(part), process_group=self.group)
        assert isinstance(future, Future)
        self.writing = part, future

    def settle(self, *, wait: bool = True) -> None:
        """See to the state that is being written: rank 0 gives it its name once all parts are there.

        Raises:
            WeightsError: it cannot be written; the one before stays.
        """
        if self.writing is None or not (wait or self.writing[1].done()):
            return
        (part, future), self.writing = self.writing, None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            shutil.rmtree(part, ignore_errors=True)
            why = reason(error, part.parent, self.size)
            last = f"step {int(self.published()[-1].name)}" if self.published() else "none"
            raise WeightsError(
                f"{part.with_suffix('')} cannot be written ({why}); make room and start again: the last "
                f"whole checkpoint is {last}"
            ) from None
        if ranks.rank() == 0:
            shutil.rmtree(part.with_suffix(""), ignore_errors=True)  # of a run that went on from before it
            os.replace(part, part.with_suffix(""))
            flush(part.parent)
            self._forget()

    def _forget(self) -> None:
        """Remove what is neither among the last nor to be kept for good."""
        for path in self.published()[: -self.devices.keep_last]:
            if not self.devices.keep_every or int(path.name) % self.devices.keep_every:
                shutil.rmtree(path)


def reason(error: BaseException, folder: Path, size: int) -> str:
    """Why `size` bytes could not be written, as the operating system says it: torch's writer does not keep that."""
    probe = folder / f"room-{ranks.rank()}{PART}"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as refused:
        return refused.strerror or str(refused)
    finally:
        probe.unlink(missing_ok=True)
    return str(error).splitlines()[-1]


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One file that takes its name when it is whole: a kill leaves the one before."""
    write_safetensors(path, tensors, metadata)
    flush(path.parent)


def flush(folder: Path) -> None:
    """Names in a folder as they are now, also after the power fails."""
    with contextlib.suppress(OSError):  # some file systems have no directories to flush
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load_weights(module: nn.Module, run: Path, name: str) -> None:
    """Fill `module` from the best weights of an earlier run, where it was called `name`.

    Raises:
        WeightsError: the run has no finished weights, or they do not fit.
    """
    path = run / BEST
    if not path.exists():
        raise WeightsError(f"{run} has no {BEST} yet; train that stage first")
    fill(module, read_safetensors(path), f"{name}.", path)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """Fill `module` from those of the tensors whose names begin with `prefix`.

    Raises:
        WeightsError: they do not fit; the sentence names the file, `path`.
    """
    tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    check_fit(module, {n: list(t.shape) for n, t in tensors.items()}, prefix, path)
    module.load_state_dict(tensors)


def check_fit(module: nn.Module, found: dict[str, list[int]], prefix: str, path: Path) -> None:
    """See that tensors of these shapes are those of `module`.

    Raises:
        WeightsError: they are not; the sentence names the file, `path`.
    """
    wanted = {n: list(t.shape) for n, t in module.state_dict().items()}
    for n in sorted(wanted | found):
        if wanted.get(n) != found.get(n):
            here, there = wanted.get(n, "nowhere"), found.get(n, "missing")
            raise WeightsError(f"{path} does not fit this recipe: {prefix}{n} is {there} in it and {here} in the model")
