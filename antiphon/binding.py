"""Modules that are read once and run many times.

nn.Module finds weights and parts slowly: for a single step that takes longer than the arithmetic. `bind` reads them
into a function, and `forward` calls that function, so both are the same statements. An answer is spoken with parts
that were bound when it began; nobody keeps them longer, so weights may change between answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

Bound: TypeAlias = Callable[..., Any]  # takes and gives what `forward` does


class Part(nn.Module):
    """A module that can be bound."""

    def bind(self) -> Bound:
        """As `forward`, with the weights of now; the module itself where there is nothing to gain."""
        return self


def bound(module: nn.Module) -> Bound:
    """`bind` of a part; another module, such as an adapter in the place of a part, as it is."""
    return module.bind() if isinstance(module, Part) else module
