"""Recipes at the same time: each begins when what it needs is there, and one that fails stops all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from antiphon.errors import InputError
from antiphon.train.recipe import Recipe, read_fields
from antiphon.train.run import Course, read_course
from antiphon.train.together import last_step, needs, train_together

PLAN = {"steps": 3, "lr": 1e-3}
CPU = torch.device("cpu")


def recipe(name: str, stage: str = "aut", cuts: str = "a.jsonl.gz", init: dict | None = None, **options: str) -> Recipe:
    data = {"mix": [{"cuts": cuts}], "validation": []}
    table = {"name": name, "stage": stage, "data": data, "optimization": PLAN, "init": init or {}, "options": options}
    return read_fields(Recipe, table, name)


RECIPES = [
    recipe("tokenizer", "tokenizer"),
    recipe("first"),
    recipe("second"),
    recipe("labels", "label", init={"aut": "first"}, out="b.jsonl.gz"),
    recipe("third", cuts="b.jsonl.gz"),
    recipe("last", init={"aut": "third", "thinker": "second"}),
]


def note(recipe: Recipe, beside: Path, cuts: Path, runs: Path, device: torch.device, *, quiet: bool) -> Path:
    """Stands for a training: it notes when it began and ended."""
    folder = runs / recipe.name
    folder.mkdir(parents=True)
    begun = time.time()
    time.sleep(1.0)
    if recipe.name == "labels" and (beside / "broken").exists():
        raise InputError("the labels are wrong; write better ones")
    (folder / "times").write_text(f"{begun} {time.time()}")
    return folder


def test_what_a_recipe_needs():
    found = {r.name: needs(r, RECIPES[:i]) for i, r in enumerate(RECIPES)}
    assert found["tokenizer"] == set()
    assert found["first"] == found["second"] == {"tokenizer"}
    assert found["labels"] == {"tokenizer", "first"}
    assert found["third"] == {"tokenizer", "labels"}
    assert found["last"] == {"tokenizer", "second", "third"}


def test_the_recipes_of_tiny_come_after_what_they_need():
    course = read_course(Path(__file__).parents[1] / "recipes/tiny")
    names = [r.name for r in course.recipes]
    for i, r in enumerate(course.recipes):
        needed = {name for source in r.init.values() if "/" not in source for name in source.split("+")}
        assert needed <= set(names[:i]), r.name


@pytest.mark.long
def test_each_begins_when_what_it_needs_is_trained(tmp_path):
    course = Course("course", tmp_path, RECIPES, {})
    folders = train_together(course, tmp_path / "cuts", tmp_path / "runs", CPU, 2, note)
    assert [f.name for f in folders] == [r.name for r in RECIPES]
    times = {f.name: tuple(map(float, (f / "times").read_text().split())) for f in folders}
    for i, r in enumerate(RECIPES):
        assert all(times[name][1] <= times[r.name][0] for name in needs(r, RECIPES[:i])), r.name
    together = [sum(a <= start < b for a, b in times.values()) for start, _ in times.values()]
    assert max(together) == 2


@pytest.mark.long
def test_one_that_fails_stops_all(tmp_path, capfd):
    (tmp_path / "broken").touch()
    course = Course("course", tmp_path, RECIPES, {})
    with pytest.raises(InputError, match="labels failed; mend it and give the same command again"):
        train_together(course, tmp_path / "cuts", tmp_path / "runs", CPU, 2, note)
    assert "write better ones" in capfd.readouterr().err
    assert not (tmp_path / "runs/course/third").exists()


def test_none_outlives_the_one_that_began_it(tmp_path):
    """Else the same command, given again after kill -9, would train beside what was left."""
    lines = (
        "from pathlib import Path",
        "from tests.test_together import *",
        "if __name__ == '__main__':",
        f"    place = Path({str(tmp_path)!r})",
        "    train_together(Course('course', place, RECIPES[:1], {}), place / 'cuts', place / 'runs', CPU, 2, note)",
    )
    (tmp_path / "main.py").write_text("\n".join(lines))
    root = Path(__file__).parents[1]
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], env={**os.environ, "PYTHONPATH": str(root)})
    folder = tmp_path / "runs/course/tokenizer"
    while not folder.exists():
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    time.sleep(2.0)
    assert not (folder / "times").exists()


def test_how_far_a_run_is(tmp_path):
    log = tmp_path / "log.jsonl"
    assert last_step(log) == 0
    log.write_text('{"step": 50, "loss": 1.0}\n{"step": 100, "loss"')
    assert last_step(log) == 50
