"""`antiphon corpus`, `prepare` and `train`: the commands that need the `train` extra."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from antiphon.errors import InputError

say = Console(stderr=True, highlight=False)
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
Runs = Annotated[Path, typer.Option(help="Folder of all runs; a recipe's own is named after it.")]
Cuts = Annotated[Path, typer.Option(help="Folder of manifests: a course's own are in a folder named after it.")]
CUTS = Path("cuts")


@contextmanager
def needs_extra(what: str = "training", extra: str = "train") -> Iterator[None]:
    """Say which extra is missing where an import fails, and what for."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{what} needs {error.name}; install it with pip install 'antiphon[{extra}]'") from None


def corpus(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe of the corpus, such as recipes/tiny/corpus.yaml, or a course.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for manifests and sound; cuts/COURSE by default.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes, by default one per core; the corpus is the same.")] = 0,
) -> None:
    """Make a synthetic corpus: lhotse cuts of speech, music, sounds and conversations. Goes on where it was stopped."""
    with needs_extra():
        from antiphon.train.run import read_world
    course, sets = read_world(recipe)
    for path in make_sets_of(sets, out or CUTS / course, jobs).values():
        say.print(str(path))


def prepare(
    kind: Annotated[str, typer.Argument(help="librispeech, aishell, kaldi or folder.")],
    source: Annotated[Path, typer.Argument(help="Folder of the corpus.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="Folder for the manifests; the sound stays where it is.")] = CUTS,
    language: Annotated[str | None, typer.Option(help="Of rows that do not say theirs; none: not speech.")] = None,
) -> None:
    """Make lhotse cuts of a corpus that is there, for recipes of any course to name."""
    with needs_extra():
        from antiphon.train.prepare import prepare as prepare_corpus
    with Progress(*COLUMNS, TimeRemainingColumn(), console=say) as progress:
        bars = dict[str, TaskID]()

        def move(part: str, done: int, total: int) -> None:
            if part not in bars:
                bars[part] = progress.add_task(part)
            progress.update(bars[part], completed=done, total=total)

        made = prepare_corpus(kind, source, out, language=language, progress=move, tell=say.print)
    for path in made.values():
        say.print(str(path))


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a folder of recipes with an order.yaml.")],
    cuts: Cuts = CUTS,
    runs: Runs = Path("runs"),
    device: Annotated[str, typer.Option(help="cpu, cuda, …; auto is the GPU where there is one.")] = "auto",
    jobs: Annotated[int, typer.Option(min=0, help="Processes that make the corpus, by default one per core.")] = 0,
    together: Annotated[int, typer.Option(min=1, help="Recipes at a time, where they do not need each other.")] = 1,
) -> None:
    """Train one recipe, or all of a folder in order. Goes on where it was stopped, to the same weights."""
    with needs_extra():
        from antiphon.train.run import read_course, train_course
        from antiphon.train.together import train_together
    course = read_course(recipe)
    if course.corpus:
        make_sets_of(course.corpus, cuts / course.name, jobs)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = (course, cuts, runs, torch.device(where))
    for folder in train_together(*place, together) if together > 1 else train_course(*place):
        say.print(str(folder))


def make_sets_of(sets: dict[str, Any], out: Path, jobs: int = 0) -> dict[str, Path]:
    """Make sets of a corpus, with a bar; a set whose speech engine is not installed is named and left out."""
    from antiphon.train.corpus import make_corpus
    from antiphon.train.espeak import FLITE, flite_is_installed

    if not flite_is_installed() and (skipped := [name for name, s in sets.items() if s.voices == FLITE]):
        say.print(f"{', '.join(skipped)} needs another speech engine and is left out; apt-get install flite for it")
        sets = {name: s for name, s in sets.items() if name not in skipped}

    with Progress(*COLUMNS, TimeRemainingColumn(), console=say) as progress:
        bar = progress.add_task("corpus")
        return make_corpus(
            sets, out, jobs or os.cpu_count() or 1, lambda done, of: progress.update(bar, completed=done, total=of)
        )
