"""The README's parity table: `antiphon verify` on the six random checkpoints.

python -m tests.parity_table
"""

import sys
import tempfile
from pathlib import Path

from antiphon.evaluate.parity import verify
from antiphon.evaluate.stages import COMPARED
from tests.shapes import SHAPES, write_shape


def main() -> int:
    """Print a row per checkpoint: the largest difference of each stage; 1 if any disagrees."""
    print(f"| checkpoint | {' | '.join(COMPARED)} |\n|---{'|---' * len(COMPARED)}|", flush=True)
    agrees = True
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            rows, _, _ = verify(write_shape(name, Path(folder)))
        agrees = agrees and all(row.agrees for row in rows)
        cells = {row.stage: "=" if row.difference == 0 else f"{row.difference:.0e}" for row in rows}
        cells |= {row.stage: f"**{row.difference:.0e}** {row.note}" for row in rows if not row.agrees}
        print(f"| {name} | {' | '.join(cells.get(stage, 'missing') for stage in COMPARED)} |", flush=True)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
