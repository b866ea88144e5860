"""The engine that a server holds: weights read once, warmed, and as many conversations as the machine keeps in time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from antiphon.engine import Engine
from antiphon.generate import Omni
from antiphon.terminal import Dtype, load_model, say

if TYPE_CHECKING:
    from antiphon.serve.settings import Settings

Prepare = Callable[["Settings", int], Engine]  # the engine for so many conversations, warm; 0 measures them
Load = Callable[[], Prepare]  # reads the weights, in the process that needs them
MOST = 16  # conversations that are tried when nobody says how many


def loaded(model: str, device: str, dtype: Dtype, window: int | None = None) -> Prepare:
    """The weights, in a function that makes an engine of them.

    Raises:
        InputError: a window that the checkpoint has not.
    """
    torch.set_num_threads(1)  # each lane is a thread, and small products gain nothing from more
    omni = load_model(model, device, dtype)
    omni.session(window=window)  # what cannot be is refused before anybody is let in
    return partial(prepared, omni)


def prepared(model: Omni, settings: Settings, conversations: int) -> Engine:
    """An engine that has been warmed and started; 0 conversations: as many as the machine keeps in time."""
    engine = Engine(model, conversations or None)
    if conversations:
        engine.warm(conversations)
    else:
        engine.measure(MOST)
    say.print(f"{settings.worker or settings.name} holds {engine.capacity} conversations at once")
    return engine.start()
