"""The README's parity table: `antiphon verify` on the six random checkpoints.

python -m tests.parity_table
"""

import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

from antiphon.evaluate.parity import Difference, verify
from antiphon.evaluate.stages import COMPARED
from tests.shapes import SHAPES, write_shape


def main() -> int:
    """Print a row per checkpoint and type: the difference of each stage; 1 if any disagrees."""
    print(f"| checkpoint | {' | '.join(COMPARED)} |\n|---{'|---' * len(COMPARED)}|", flush=True)
    agrees = True
    for name, dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            rows, _, _ = verify(write_shape(name, Path(folder)), dtype=dtype)
        agrees = agrees and all(row.agrees for row in rows)
        cells = " | ".join(map(cell, rows))
        print(f"| {name}, {str(dtype).removeprefix('torch.')} | {cells} |", flush=True)
    return 0 if agrees else 1


def cell(row: Difference) -> str:
    """What was found in one stage."""
    found = row.note or ("=" if row.difference == 0 and not row.parted else f"{row.difference:.0e}")
    found += f" ({row.parted})" if row.parted else ""
    return found if row.agrees else f"**{found}**"


if __name__ == "__main__":
    sys.exit(main())
