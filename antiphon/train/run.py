"""`antiphon train`: recipes to runs, one recipe or a folder of them in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from antiphon.errors import ConfigError
from antiphon.train.data import Example, read_cuts
from antiphon.train.loop import Stage, train
from antiphon.train.recipe import Recipe, read_recipe, read_yaml_table
from antiphon.train.stages.aut import AuTStage
from antiphon.train.stages.common import Setting
from antiphon.train.text import fill_ids, train_tokenizer, transcript, write_config

STAGES: dict[str, Callable[[Setting], Stage]] = {"aut": AuTStage}
ORDER = "order.yaml"  # in a folder of recipes: which, one after another


def recipes_in(path: Path) -> list[Path]:
    """The recipe at `path`, or those of a folder in the order that its order.yaml gives.

    Raises:
        ConfigError: neither is there.
    """
    if path.is_file():
        return [path]
    if not (path / ORDER).is_file():
        raise ConfigError(f"there is no recipe {path}; give a .yaml file, or a folder with {ORDER}")
    return [path / f"{name}.yaml" for name in read_yaml_table(path / ORDER)["train"]]


def train_recipe(path: Path, cuts: Path, runs: Path, device: torch.device, *, quiet: bool = False) -> Path:
    """Train one recipe to its end, going on from where an earlier call was stopped; returns the run's folder."""
    recipe = read_recipe(path)
    folder = runs / recipe.name
    if recipe.stage == "tokenizer":
        make_tokenizer(recipe, path.parent, cuts, folder)
        return folder
    if recipe.stage not in STAGES:
        known = ", ".join(("tokenizer", *STAGES))
        raise ConfigError(f"{path.name}: stage is {recipe.stage!r}; expected one of {known}")
    torch.set_num_threads(recipe.threads)
    train(STAGES[recipe.stage](Setting(recipe, cuts, runs, device)), recipe, folder, quiet=quiet)
    return folder


def make_tokenizer(recipe: Recipe, recipes: Path, cuts: Path, folder: Path) -> None:
    """The tokenizer of a recipe's cuts, and config.json with its ids."""
    texts = []
    for source in recipe.data.mix:
        examples = [Example(cut, source.task) for cut in read_cuts(source.cuts, cuts)]
        texts += [transcript(e.text, e.language) for e in examples] * max(1, round(source.weight))
    config = json.loads((recipes / recipe.model).read_text(encoding="utf-8"))
    size = config["thinker_config"]["text_config"]["vocab_size"]
    write_config(fill_ids(config, train_tokenizer(texts, size, folder)), folder)
