"""What every stage is given: its recipe, where things are, and the configuration of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from antiphon.codec import Codec
from antiphon.config import OmniConfig
from antiphon.config_json import read_config
from antiphon.errors import ConfigError
from antiphon.speaker import SPEAKER_FILE, SpeakerEncoder, load_speaker
from antiphon.tokenizer import Tokenizer
from antiphon.train.checkpoints import fill, load_weights
from antiphon.train.data import Mix
from antiphon.train.recipe import Data, Optimization, Recipe, Source
from antiphon.turn import TURN_FILE, TurnEnd, load_turn
from antiphon.weights import find_checkpoint, load_box, load_codec

TOKENIZER = "tokenizer"  # the run that every other stage takes its tokenizer and its config.json from


@dataclass(frozen=True)
class Setting:
    """A recipe in its place."""

    recipe: Recipe
    cuts: Path  # folder that manifests are named from
    runs: Path  # folder of all runs; `init` names them
    device: torch.device

    @cached_property
    def config(self) -> OmniConfig:
        """Configuration of the whole model."""
        return read_config(self.run_of(TOKENIZER))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of an earlier run."""
        return Tokenizer.from_folder(self.run_of(TOKENIZER), self.config)

    def run_of(self, name: str) -> Path:
        """Folder of an earlier run.

        Raises:
            ConfigError: it has not been trained.
        """
        folder = self.runs / name
        if not folder.is_dir():
            raise ConfigError(f"{self.recipe.name} needs the run {name!r} in {self.runs}; train {name} first")
        return folder

    def teaching(self, options: dict[str, Any]) -> Setting:
        """The same place for a stage that does not train: no data, its own options."""
        recipe = replace(self.recipe, data=Data(()), options=options, optimization=Optimization(1, 1.0))
        return replace(self, recipe=recipe)

    def beginning(self, parts: dict[str, str]) -> Setting:
        """The same place where of some boxes, by name, a part alone is begun."""
        init = {parts.get(name, name): source for name, source in self.recipe.init.items()}
        return replace(self, recipe=replace(self.recipe, init=init))

    def mix(self, data: Data | None = None) -> Mix:
        """The training data, or other `data`."""
        data = data or self.recipe.data
        return Mix(data, data.mix, self.cuts, self.recipe.seed, self.recipe.optimization.accumulate)

    def prepare(self, modules: nn.ModuleDict) -> nn.ModuleDict:
        """The modules on the device, begun from earlier runs and frozen as the recipe says.

        Raises:
            ConfigError: `init` or `freeze` name what this stage does not have.
        """
        for name, source in self.recipe.init.items():
            self._begin(self._module(modules, name), name, source)
        for name in self.recipe.freeze:
            self._module(modules, name).requires_grad_(False)
        return modules.to(self.device, torch.float64 if self.recipe.optimization.dtype == "float64" else None)

    def _begin(self, module: nn.Module, name: str, source: str) -> None:
        """Fill a module from an earlier run, or from a checkpoint: a folder or a Hub id, told by its slash.

        Of several, joined by "+", it gets the mean weights: of runs that went on from the same one.
        """
        if "+" in source:
            weights = []
            for one in source.split("+"):
                self._begin(module, name, one)
                weights.append({n: t.clone() for n, t in module.state_dict().items()})
            module.load_state_dict({n: torch.stack([w[n] for w in weights]).mean(0) for n in weights[0]})
        elif "/" not in source:
            load_weights(module, self.run_of(source), name)
        elif isinstance(module, Codec):  # this one and the next two are files of their own beside a checkpoint
            folder = find_checkpoint(source)
            fill(module, load_codec(folder, module.config.num_quantizers).state_dict(), "", folder)
        elif isinstance(module, SpeakerEncoder):
            folder = find_checkpoint(source)
            fill(module, load_speaker(folder / SPEAKER_FILE).state_dict(), "", folder)
        elif isinstance(module, TurnEnd):
            folder = find_checkpoint(source)
            fill(module, load_turn(folder / TURN_FILE).state_dict(), "", folder)
        else:
            load_box(module, name, source)

    def _module(self, modules: nn.ModuleDict, name: str) -> nn.Module:
        try:
            return modules.get_submodule(name)
        except AttributeError:
            known = ", ".join(modules)
            raise ConfigError(f"{self.recipe.name}: there is no module {name!r}; this stage has {known}") from None


def manifests(sources: Sequence[Source]) -> list[str]:
    """File names of sources, without folders and endings, for the names of figures."""
    return [Path(s.cuts).name.split(".")[0] for s in sources]
