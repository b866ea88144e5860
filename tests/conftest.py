"""Fixtures that several files share: the random checkpoints of `shapes.py`, each written and loaded once a run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: tests download nothing

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

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
def note() -> Callable[[list[Difference]], None]:
    """Keep the largest differences for the summary at the end."""

    def keep(rows: list[Difference]) -> None:
        for row in rows:
            LARGEST[row.stage] = max(LARGEST.get(row.stage, 0.0), row.largest or row.difference)

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LARGEST:
        terminalreporter.write_sep("-", "largest difference from transformers, over the largest value")
        for stage, difference in LARGEST.items():
            terminalreporter.write_line(f"{stage:16} {difference:.1e}" if difference else f"{stage:16} identical")
