"""LoRA: products of two thin matrices are trained in the place of the weights that they are added to.

What a run keeps as its best weights has them added in, under the weights' own names: later stages and the export read
it as any other. They stand apart only in the state that the run itself goes on from.

Shapes: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.errors import ConfigError
from antiphon.train.recipe import Recipe

BASE, DOWN, UP = ".base.", ".down", ".up"  # in the names of an adapted map's tensors


class Adapted(nn.Module):
    """A linear map that stands still, and the product that is added to its weights; at first nothing."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        down = base.weight.new_empty(rank, base.in_features)
        self.down = nn.Parameter(nn.init.normal_(down, std=base.in_features**-0.5))  # [R, I]
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # [O, R]

    @property
    def weight(self) -> Tensor:
        """Of the map that stands still: boxes ask for its type."""
        return self.base.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, I] -> [N, O], added to `residual` where the map can do that."""
        y = self.base(x) if residual is None else self.base(x, residual)
        return y + self.scale * F.linear(F.linear(x, self.down), self.up)


def adapt(modules: nn.ModuleDict, recipe: Recipe) -> None:
    """Freeze the modules that `recipe.lora` names, and give their linear maps something to be trained.

    Raises:
        ConfigError: it names no module of this stage, or there are no such maps in one.
    """
    lora = recipe.lora
    if not lora.rank:
        return
    torch.manual_seed(recipe.seed)  # the same in every process
    for name in lora.modules:
        try:
            module = modules.get_submodule(name)
        except AttributeError:
            raise ConfigError(f"{recipe.name}: lora names {name!r}; this stage has {', '.join(modules)}") from None
        places = [
            (parent, last, part)
            for parent in module.requires_grad_(False).modules()
            for last, part in parent.named_children()
            if last in lora.linears and isinstance(part, nn.Linear)
        ]
        if not places:
            raise ConfigError(f"{recipe.name}: there is no linear {' or '.join(lora.linears)} in {name}")
        for parent, last, part in places:
            setattr(parent, last, Adapted(part, lora.rank, lora.scale))


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors of a module with adapted maps as they are without: products added to the weights."""
    made = {n.replace(BASE, "."): t for n, t in tensors.items() if not n.endswith((DOWN, UP))}
    for name, up in tensors.items():
        if name.endswith(UP):
            own = name.removesuffix(UP)
            base, down = tensors[f"{own}{BASE}weight"], tensors[own + DOWN]
            wide = torch.promote_types(base.dtype, torch.float32)
            made[f"{own}.weight"] = (base.to(wide) + scale * (up.to(wide) @ down.to(wide))).to(base.dtype)
    return made
