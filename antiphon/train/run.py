"""`antiphon train`: recipes to runs, one recipe or a folder of them in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from antiphon.errors import ConfigError
from antiphon.files import write_text
from antiphon.train import ranks
from antiphon.train.corpus import Set, read_corpus, read_sets
from antiphon.train.data import read_examples
from antiphon.train.echo import echo
from antiphon.train.export import export
from antiphon.train.keep import put_back
from antiphon.train.label import label
from antiphon.train.loop import Stage, train
from antiphon.train.pairs import pairs
from antiphon.train.recipe import WITHOUT_WEIGHTS, Recipe, read_fields, read_recipe, read_yaml_table
from antiphon.train.stages.aut import AuTStage
from antiphon.train.stages.codec import CODEC_SIZES, Code2WavStage, CodecStage
from antiphon.train.stages.common import Setting
from antiphon.train.stages.preference import PreferenceStage
from antiphon.train.stages.speech import SpeechStage
from antiphon.train.stages.thinker import ThinkerStage
from antiphon.train.stages.turn import TurnStage
from antiphon.train.text import fill_ids, tokens_per_second, train_tokenizer, transcript, write_config

STAGES: dict[str, Callable[[Setting], Stage]] = {
    "aut": AuTStage,
    "codec": CodecStage,
    "code2wav": Code2WavStage,
    "thinker": ThinkerStage,
    "speech": SpeechStage,
    "preference": PreferenceStage,
    "turn": TurnStage,
}
say = Console(stderr=True, highlight=False)
ORDER = "order.yaml"  # in a folder of recipes: which, one after another
CORPUS = "corpus.yaml"  # in a folder of recipes: what they are trained on


@dataclass(frozen=True)
class Course:
    """Recipes that belong together: their runs stand in one folder, and so do the cuts they are trained on."""

    name: str
    folder: Path  # of the files that recipes name, such as model.json
    recipes: list[Recipe]
    corpus: dict[str, Set]  # sets that are made before training; none where the cuts are somebody's own


def read_course(path: Path) -> Course:
    """The recipes in a folder with an order.yaml, in a file that holds several `runs`, or one of a folder's.

    Raises:
        ConfigError: there is no such recipe, or it cannot be read.
    """
    if path.is_dir():
        if not (path / ORDER).is_file():
            raise ConfigError(f"{path} has no {ORDER}; give a recipe, or a folder whose {ORDER} lists its recipes")
        names = read_yaml_table(path / ORDER)["train"]
        recipes = [read_recipe(path / f"{name}.yaml") for name in names]
        return Course(path.resolve().name, path, recipes, _corpus_of(path))
    table = read_yaml_table(path)
    if "runs" not in table:
        return Course(path.resolve().parent.name, path.parent, [read_recipe(path)], _corpus_of(path.parent))
    shared = {name: value for name, value in table.items() if name not in ("runs", "corpus")}
    recipes = [read_fields(Recipe, {**shared, **run}, f"{path.name}: runs[{i}]") for i, run in enumerate(table["runs"])]
    corpus = read_sets(table["corpus"], path.name) if "corpus" in table else {}
    return Course(path.stem, path.parent, recipes, corpus)


def read_world(path: Path) -> tuple[str, dict[str, Set]]:
    """The sets of a corpus recipe, or of a course, and the name of the course that they are for.

    Raises:
        ConfigError: there is no such recipe, it cannot be read, or it makes no corpus.
    """
    if path.is_dir() or "runs" in read_yaml_table(path):
        course = read_course(path)
        if not course.corpus:
            raise ConfigError(f"{path} makes no corpus; give a recipe of one, such as recipes/tiny/{CORPUS}")
        return course.name, course.corpus
    return path.resolve().parent.name, read_corpus(path)


def _corpus_of(folder: Path) -> dict[str, Set]:
    return read_corpus(folder / CORPUS) if (folder / CORPUS).is_file() else {}


def train_course(course: Course, cuts: Path, runs: Path, device: torch.device, *, quiet: bool = False) -> list[Path]:
    """Train the recipes one after another, each from where an earlier call was stopped; returns the runs' folders."""
    cuts, runs = cuts / course.name, runs / course.name
    with ranks.first_alone():
        put_back(course.folder, runs)
    return [train_recipe(recipe, course.folder, cuts, runs, device, quiet=quiet) for recipe in course.recipes]


def train_recipe(
    recipe: Recipe, beside: Path, cuts: Path, runs: Path, device: torch.device, *, quiet: bool = False
) -> Path:
    """Train one recipe to its end; `beside` is the folder of the files it names."""
    folder, setting = runs / recipe.name, Setting(recipe, cuts, runs, device)
    if recipe.stage not in (*WITHOUT_WEIGHTS, *STAGES):
        known = ", ".join(("tokenizer", "label", "echo", "pairs", *STAGES, "export"))
        raise ConfigError(f"{recipe.name}: stage is {recipe.stage!r}; expected one of {known}")
    if recipe.stage in STAGES:
        torch.set_num_threads(recipe.threads)
        with ranks.first_alone():  # what a stage prepares, such as codes, is kept on disk
            stage = STAGES[recipe.stage](setting)
        train(stage, recipe, folder, quiet=quiet)
        return folder
    with ranks.first_alone():
        if ranks.rank() == 0:
            _make(setting, beside, folder, quiet)
    return folder


def _make(setting: Setting, beside: Path, folder: Path, quiet: bool) -> None:
    """What a stage without weights makes."""
    recipe = setting.recipe
    if recipe.stage == "tokenizer":
        make_tokenizer(recipe, beside, setting.cuts, folder)
    elif recipe.stage == "export":
        export(setting, folder)
    elif recipe.stage == "label":
        kept, found = label(setting, quiet=quiet)
        say.print(f"{recipe.name}: kept {kept:,} of {found:,} transcripts")
    elif recipe.stage == "pairs":
        made, found = pairs(setting, quiet=quiet)
        say.print(f"{recipe.name}: {made:,} pairs of {found:,} sentences")
    else:
        say.print(f"{recipe.name}: {echo(setting, quiet=quiet):,} recordings as the codec gives them back")


def make_tokenizer(recipe: Recipe, recipes: Path, cuts: Path, folder: Path) -> None:
    """The tokenizer of a recipe's cuts, and config.json with its ids; says how many tokens speech is."""
    texts, said = [], list[tuple[str, str, float]]()
    for source in recipe.data.mix:
        examples = read_examples(source, cuts)
        texts += [transcript(e.text, e.language) for e in examples] * max(1, round(source.weight))
        messages = [m for e in examples for m in (e.cut.custom or {}).get("messages", ())]
        texts += [m["content"] for m in messages if isinstance(m["content"], str)]
        heard = [s for e in examples if e.cut.has_recording for s in e.cut.supervisions]
        said += [(s.language, s.text, s.duration) for s in heard if s.language and s.text]
    config = json.loads((recipes / recipe.model).read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    size = config["thinker_config"]["text_config"]["vocab_size"]
    if (recipes / CODEC_SIZES).exists():  # the sizes of every stage are in this folder from now on
        write_text(folder / CODEC_SIZES, (recipes / CODEC_SIZES).read_text(encoding="utf-8"))
    write_config(fill_ids(config, train_tokenizer(texts, size, folder)), folder)
    rates = ", ".join(
        f"{code} {mean:.1f} ({most:.1f})" for code, (mean, most) in tokens_per_second(folder, said).items()
    )
    say.print(f"{recipe.name}: tokens per second of speech, and of the clip with most: {rates or 'there is no speech'}")
