"""Kernels and views that PyTorch dispatches for one frame, box by box: what a small step costs, and no clock in it.

    python -m benchmarks.dispatches [--shapes odd laptop release]

Greedy, one row, float32, on a CPU, after a first frame. A frame takes one step of the Talker, MTP and Code2Wav, and of
the Thinker where the text goes on. Counts are the same on every machine with the same PyTorch.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from antiphon.bench.floor import steps
from antiphon.generate import Omni, load
from benchmarks.vs_transformers import SHAPES
from tests.shapes import write_shape


class Dispatches(TorchDispatchMode):
    """Counts what is dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def count(model: Omni) -> dict[str, int]:
    """Dispatches of a step by box."""
    counts: dict[str, int] = {}
    for name, step in steps(model).items():
        step()  # what is made once is made now
        with Dispatches() as dispatches:
            step()
        counts[name] = dispatches.names.total()
    return counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    print(f"torch {torch.__version__}\n\n| checkpoint | Thinker | Talker | MTP | Code2Wav | a frame |")
    print("|---|---|---|---|---|---|")
    for shape in parser.parse_args().shapes:
        base, changes = SHAPES[shape]
        with tempfile.TemporaryDirectory() as folder:
            counts = count(load(write_shape(base, Path(folder), **changes)))
        print(f"| {shape} | {' | '.join(str(n) for n in counts.values())} | {sum(counts.values())} |", flush=True)


if __name__ == "__main__":
    main()
