"""`torchrun --nproc-per-node N -m antiphon.train RECIPE`: one model trained by several processes, each on its device.

`python -m antiphon.train RECIPE --plan` reckons what that takes, and needs no device.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from antiphon.errors import AntiphonError
from antiphon.train.commands import CUTS, Cuts, Runs, make_sets_of, needs_extra, say


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a folder of recipes with an order.yaml.")],
    cuts: Cuts = CUTS,
    runs: Runs = Path("runs"),
    device: Annotated[
        str, typer.Option(help="cpu or cuda; auto is a GPU for each process where there are any.")
    ] = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="Reckon memory and time, and train nothing.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="For --plan: how many devices.")] = 1,
    tflops: Annotated[float, typer.Option(min=1e-6, help="For --plan: what a device does, in TFLOP/s.")] = 400.0,
) -> None:
    """Train recipes on many devices. Goes on where it was stopped; SIGTERM saves first."""
    try:
        with needs_extra():
            from antiphon.train import ranks
            from antiphon.train.price import show
            from antiphon.train.run import read_course, train_course
        course = read_course(recipe)
        if plan:
            show(course, devices, tflops)
            return
        with ranks.joined(device) as own:
            with ranks.first_alone():
                if course.corpus and ranks.rank() == 0:
                    make_sets_of(course.corpus, cuts / course.name)
            folders = train_course(course, cuts, runs, own)
        for folder in folders if ranks.rank() == 0 else ():
            say.print(str(folder))
    except AntiphonError as error:
        say.print(f"[bold red]error[/] {error}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
