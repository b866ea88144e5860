"""The processes that train one model together, as torchrun starts them; without it there is one, rank 0 of 1.

What they tell each other here goes between their hosts (gloo) and waits for no device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from antiphon.errors import ConfigError

Told = TypeVar("Told")
WAIT = timedelta(hours=6)  # for rank 0, which validates and makes what all need; a process that dies is noticed at once


def many() -> bool:
    """Whether torchrun started this process, be it alone."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Which process this is."""
    return distributed.get_rank() if many() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if many() else 1


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the other processes; the device of this one: of `device`'s kind, or a GPU where there is one with "auto".

    Raises:
        ConfigError: torchrun did not start this process.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("several processes are started by torchrun: torchrun --nproc-per-node 2 -m antiphon.train …")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    own = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    store, place, count = next(rendezvous("env://", timeout=WAIT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # one for all attempts: in it are those that died, too
        store = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=WAIT, store=store, rank=place, world_size=count)
    yield own
    distributed.destroy_process_group()  # not after an error: the others may be in the middle of something


@contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 first, then all others at once: they find on disk what it has made."""
    if rank() > 0:
        told(None)
    yield
    if rank() == 0:
        told(None)


def told(value: Told) -> Told:
    """The value of rank 0."""
    if world() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


def summed(values: Sequence[float]) -> list[float]:
    """Sums over all processes."""
    if world() == 1 or not values:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.tolist()


def mean(figures: dict[str, float]) -> dict[str, float]:
    """The mean of each figure over the processes that have it."""
    if world() == 1:
        return figures
    each: list[dict[str, float]] = [{} for _ in range(world())]
    distributed.all_gather_object(each, figures)
    names = dict.fromkeys(name for own in each for name in own)
    having = {name: [own[name] for own in each if name in own] for name in names}
    return {name: sum(values) / len(values) for name, values in having.items()}
