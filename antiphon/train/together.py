"""A course on several cores: recipes that do not need each other are trained at the same time, a process for each.

A recipe needs the runs its `init` names, the tokenizer, and the manifests that recipes before it write. Whatever is
killed goes on where it was, as ever, and what runs at the same time changes no weight.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.progress import Progress, TaskID

from antiphon.errors import AntiphonError, InputError
from antiphon.train.keep import put_back
from antiphon.train.loop import COLUMNS, LOG
from antiphon.train.recipe import Recipe
from antiphon.train.run import Course, say, train_recipe
from antiphon.train.stages.common import TOKENIZER

LOOK = 0.5  # seconds between two looks at those that train
Train = Callable[..., Path]  # as `train_recipe`


def needs(recipe: Recipe, earlier: list[Recipe]) -> set[str]:
    """Names of the recipes, of those that come `earlier` in a course, without whose runs this one cannot begin."""
    read = {source.cuts for source in (*recipe.data.mix, *recipe.data.validation)}
    wanted = {TOKENIZER, *(name for source in recipe.init.values() for name in source.split("+"))}
    return {r.name for r in earlier if r.name in wanted or r.options.get("out") in read}


def train_together(
    course: Course, cuts: Path, runs: Path, device: torch.device, most: int, train: Train = train_recipe
) -> list[Path]:
    """Train a course, at most `most` recipes at a time, the first in order first; returns the runs' folders.

    Raises:
        InputError: a recipe failed; what it said is on standard error, and the others are stopped where they are.
    """
    cuts, runs = cuts / course.name, runs / course.name
    put_back(course.folder, runs)
    waiting = {r.name: needs(r, course.recipes[:i]) for i, r in enumerate(course.recipes)}
    recipes, ready = {r.name: r for r in course.recipes}, set[str]()
    training: dict[str, tuple[BaseProcess, TaskID]] = {}
    with Progress(*COLUMNS, console=say) as progress:
        try:
            while waiting or training:
                for name in [n for n, needed in waiting.items() if needed <= ready][: most - len(training)]:
                    del waiting[name]
                    arguments = (train, recipes[name], course.folder, cuts, runs, device)
                    process = multiprocessing.get_context("spawn").Process(target=_train, args=arguments, daemon=True)
                    process.start()
                    training[name] = process, progress.add_task(name, total=recipes[name].optimization.steps)
                time.sleep(LOOK)
                for name, (process, bar) in list(training.items()):
                    if process.exitcode:
                        raise InputError(f"{name} failed; mend it and give the same command again to go on")
                    if process.exitcode == 0:
                        del training[name]
                        ready.add(name)
                        progress.remove_task(bar)
                        say.print(f"{name} is trained")
                    else:
                        progress.update(bar, completed=last_step(runs / name / LOG))
        finally:
            for process, _ in training.values():
                process.terminate()
                process.join()
    return [runs / r.name for r in course.recipes]


def last_step(log: Path) -> int:
    """The step of the last whole line of a run's log, 0 where there is none."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _train(train: Train, recipe: Recipe, *place: object) -> None:
    """One recipe in a process of its own, which does not outlive the one that began it, killed as it may be."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        train(recipe, *place, quiet=True)
    except AntiphonError as error:
        say.print(f"[bold red]error[/] {error}")
        sys.exit(1)
