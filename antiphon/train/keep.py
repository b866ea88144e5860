"""Weights of finished runs beside their recipes, in half precision: later stages can be trained without the earlier.

    python -m antiphon.train.keep recipes/tiny runs/tiny hearing:aut codec:codec,head

writes recipes/tiny/trained/NAME.safetensors, and `antiphon train` puts them where the runs would be, unless these have
been trained there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from antiphon.files import read_metadata, read_safetensors, write_safetensors, write_text
from antiphon.train.loop import BEST
from antiphon.train.stages.common import TOKENIZER

KEPT = "trained"  # folder beside recipes
LAST = "config.json"  # of a tokenizer's files to be written: where it is, all are
LARGEST = 6e4  # a float16 holds 65504


def keep(recipes: Path, runs: Path, names: list[str]) -> list[Path]:
    """Write the best weights of runs, and the tokenizer they were trained with, beside the recipes.

    A name is that of a run, or RUN:MODULE,MODULE for some of its modules alone.
    """
    kept, written = recipes / KEPT, list[Path]()
    copy_tokenizer(runs / TOKENIZER, kept / TOKENIZER)
    for run, _, modules in (name.partition(":") for name in names):
        best, chosen = runs / run / BEST, tuple(f"{m}." if m else "" for m in modules.split(","))
        tensors = {n: halved(t) for n, t in read_safetensors(best).items() if n.startswith(chosen)}
        written.append(kept / f"{run}.safetensors")
        write_safetensors(written[-1], tensors, {"run": read_metadata(best, "run")})
    return written


def halved(tensor: Tensor) -> Tensor:
    """Matrices in float16, whose eleven bits are more than bfloat16's eight; statistics and what is larger as it is."""
    small = tensor.dtype == torch.float32 and tensor.dim() > 1 and float(tensor.abs().max()) < LARGEST
    return tensor.half() if small else tensor


def put_back(recipes: Path, runs: Path) -> None:
    """Put what is kept beside the recipes where their runs would be, unless there are runs."""
    kept = recipes / KEPT
    if (kept / TOKENIZER).is_dir() and not (runs / TOKENIZER / LAST).exists():
        copy_tokenizer(kept / TOKENIZER, runs / TOKENIZER)
    for path in sorted(kept.glob("*.safetensors")):
        best = runs / path.stem / BEST
        if not best.exists():
            best.parent.mkdir(parents=True, exist_ok=True)
            tensors = {n: t.float() if t.dtype == torch.float16 else t for n, t in read_safetensors(path).items()}
            write_safetensors(best, tensors, {"run": read_metadata(path, "run")})


def copy_tokenizer(run: Path, folder: Path) -> None:
    """Copy the files of a tokenizer's run; what a kill leaves undone is done by the next call."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(run.iterdir(), key=lambda path: path.name == LAST):
        write_text(folder / path.name, path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for written in keep(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]):
        print(f"{written} {written.stat().st_size / 1e6:.1f} MB")
