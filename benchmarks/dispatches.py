"""Kernels and views that PyTorch dispatches for one frame, box by box: what a small step costs, and no clock in it.

    python -m benchmarks.dispatches [--shapes odd laptop release]

Greedy, one row, float32, on a CPU, after a first frame. A frame takes one step of the Talker, MTP and Code2Wav, and of
the Thinker where the text goes on. Counts are the same on every machine with the same PyTorch.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from antiphon.binding import bound
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


def steps(model: Omni) -> dict[str, Callable[[], object]]:
    """One step of each box that a frame takes."""
    speech, device, dtype = model.speaking(), model.device, model.dtype
    thought, said = model.thinker.init_state(1, 512, device, dtype), speech.talker.init_state(1, 512, device, dtype)
    frame, sound = speech.mtp.init_state(1, device, dtype), speech.code2wav.init_state(1, device, dtype)
    think, talk, decode = bound(model.thinker), bound(speech.talker), bound(speech.code2wav)
    predict = speech.mtp.bind_predict()
    word = torch.randn(1, 1, model.thinker.config.hidden_size, device=device, dtype=dtype)
    hidden = torch.randn(1, speech.talker.config.text.hidden_size, device=device, dtype=dtype)
    codes = torch.zeros(1, 1, speech.mtp.codebooks, device=device, dtype=torch.long)
    return {
        "Thinker": lambda: model.thinker.logits(think(word, thought)[0]),
        "Talker": lambda: speech.talker.codec_head(talk(hidden[:, None], said)),
        "MTP": lambda: predict(hidden, hidden, lambda logits, codebook: logits.argmax(-1), frame),
        "Code2Wav": lambda: decode(codes, sound),
    }


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
