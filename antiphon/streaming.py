"""The state contract: one code path for a whole sequence and for its pieces.

Every box is a function `box(x, state=None, final=False)`. `None` is the whole sequence at once; with a state the
same statements run on a piece and the state moves on. This file holds the State base class and the buffer of samples
that wait for more; the states of attention are in `caches`, those of convolutions in `convolutions`.

The law, tested for every box over random cuts: `box(x) == cat(box(piece, state) …, last piece final)`.

Shapes: R rows (one conversation each), T time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from antiphon.errors import CapacityError, WeightsError


def by_row(dim: int) -> Any:
    """Declare a State field of tensors whose dimension `dim` is the row."""
    return field(metadata={"row": dim})


@dataclass
class State:
    """What a box remembers between pieces: tensors with one row per conversation, changed in place.

    Fields declared with `by_row` hold a tensor or a list of tensors; other fields are sizes shared by all rows.
    All zeros is the fresh state of every box, so `reset` only has to clear.
    """

    def _tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        for f in fields(self):
            if "row" not in f.metadata:
                continue
            value = getattr(self, f.name)
            items = (
                [(f.name, value)] if isinstance(value, Tensor) else [(f"{f.name}.{i}", t) for i, t in enumerate(value)]
            )
            for name, tensor in items:
                yield name, f.metadata["row"], tensor

    @property
    def rows(self) -> int:
        """Conversations this state holds."""
        _, dim, tensor = next(self._tensors())
        return tensor.shape[dim]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for _, _, t in self._tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as `save_file` wants it."""
        return {name: tensor for name, _, tensor in self._tensors()}

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget `rows` (all by default). Zeros, not only lengths: a stale NaN would outlive a mask."""
        for _, dim, tensor in self._tensors():
            if rows is None:
                tensor.zero_()
            else:
                tensor.index_fill_(dim, torch.tensor(list(rows), device=tensor.device), 0)

    def copy(self) -> Self:
        """An independent copy (a fork of the conversation)."""
        return self._map(lambda tensor, dim: tensor.clone())

    def view(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop`, sharing memory: stepping the view steps those rows of this state."""
        return self._map(lambda tensor, dim: tensor.narrow(dim, start, stop - start))

    def over(self, tensors: Iterable[Tensor]) -> Self:
        """This state with other tensors in the place of its own, in the order of `tensors()`."""
        given = iter(tensors)
        return self._map(lambda tensor, dim: next(given))

    def pick(self, rows: Tensor) -> Self:
        """A copy of some rows, by number."""
        return self._map(lambda tensor, dim: tensor.index_select(dim, rows))

    def put(self, rows: Tensor, state: Self) -> None:
        """Take over what became of rows that were picked."""
        for (_, dim, mine), (_, _, theirs) in zip(self._tensors(), state._tensors(), strict=True):
            mine.index_copy_(dim, rows, theirs)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved tensors, in place.

        Raises:
            WeightsError: a tensor is missing or has another shape.
        """
        for name, _, tensor in self._tensors():
            if name not in tensors or tensors[name].shape != tensor.shape:
                found = "nothing" if name not in tensors else list(tensors[name].shape)
                raise WeightsError(f"saved state: {name} should have shape {list(tensor.shape)}, found {found}")
            tensor.copy_(tensors[name])

    def _map(self, change: Any) -> Self:
        new = copy.copy(self)
        for f in fields(self):
            if "row" in f.metadata:
                value, dim = getattr(self, f.name), f.metadata["row"]
                done = change(value, dim) if isinstance(value, Tensor) else [change(t, dim) for t in value]
                setattr(new, f.name, done)
        return new


# ---------------------------------------------------------------------------------------------- waiting


def in_step(count: Tensor) -> int:
    """The count that all rows share.

    Raises:
        CapacityError: rows of one call are at different places; step them one `view` at a time.
    """
    first = int(count[0])
    if count.numel() > 1 and not bool((count == first).all()):
        raise CapacityError("these rows are at different places in their streams; step them one state.view at a time")
    return first


def take(held: Tensor, count: Tensor, x: Tensor) -> Tensor:
    """What waited (the first `count` of held [R, N, …]) followed by x [R, T, …]."""
    waiting = in_step(count)
    return torch.cat([held[:, :waiting], x], 1) if waiting else x


def keep(held: Tensor, count: Tensor, rest: Tensor) -> None:
    """Let rest [R, n, …] wait for the next piece."""
    held[:, : rest.shape[1]] = rest
    count.fill_(rest.shape[1])
