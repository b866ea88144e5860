"""Fixtures that several files share: the random checkpoints of `shapes.py`, each written and loaded once a run."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: tests download nothing
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on a CPU, slowly

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from antiphon.evaluate.parity import Difference
from antiphon.evaluate.reference import load_reference
from antiphon.generate import Omni, load
from tests.shapes import write_shape

LARGEST: dict[str, float] = {}  # per stage, over every comparison with transformers of this run


class Pair(NamedTuple):
    """One checkpoint in both implementations; who changes a weight changes it back."""

    ours: Omni
    theirs: Any


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the random checkpoint of a shape; do not write to it."""
    return cache(lambda shape: write_shape(shape, tmp_path_factory.mktemp(shape)))


@pytest.fixture(scope="session")
def pair(checkpoint: Callable[[str], Path]) -> Callable[[str], Pair]:
    """A shape's checkpoint, loaded by Antiphon and by transformers."""
    return cache(lambda shape: Pair(load(checkpoint(shape)), load_reference(checkpoint(shape), torch.float32)))


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Call a function in another process, one for all tests: what it gives there it has to give here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="session")
def note() -> Callable[[list[Difference]], None]:
    """Keep the largest differences for the summary at the end."""

    def keep(rows: list[Difference]) -> None:
        for row in rows:
            LARGEST[row.stage] = max(LARGEST.get(row.stage, 0.0), row.largest or row.difference)

    return keep


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "soak" not in item.name)  # ten minutes of real time: the others run beside it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LARGEST:
        terminalreporter.write_sep("-", "largest difference from transformers, over the largest value")
        for stage, difference in LARGEST.items():
            terminalreporter.write_line(f"{stage:16} {difference:.1e}" if difference else f"{stage:16} identical")
