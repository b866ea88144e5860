"""`antiphon serve`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from antiphon.engine import Engine
from antiphon.errors import InputError
from antiphon.generate import Omni
from antiphon.terminal import DeviceOption, Dtype, DtypeOption, Model, load_model, say

if TYPE_CHECKING:
    from antiphon.serve.settings import Settings

MOST = 16  # conversations that are tried when nobody says how many


def serve(
    model: Model = "tiny",
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line; or set ANTIPHON_API_KEYS.")] = None,
    name: Annotated[str, typer.Option(help="What clients call the model; its last part by default.")] = "",
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name that clients may call it by; may be repeated.")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Web pages elsewhere that may speak to it: https://host; may be repeated.")
    ] = None,
    conversations: Annotated[
        int, typer.Option(min=0, help="At once; more are refused. 0 measures what the machine keeps in time.")
    ] = 0,
    sessions: Annotated[int, typer.Option(min=1, help="Realtime sessions of one key at once.")] = 8,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with an engine and as many conversations; SIGHUP renews them.")
    ] = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Serve OpenAI's chat, transcription, speech and Realtime endpoints, and the page."""
    try:
        from antiphon.serve.run import run
        from antiphon.serve.settings import Settings, read_keys
    except ImportError as error:
        raise InputError(f"serving needs pip install 'antiphon[serve]' ({error.name} is missing)") from None
    settings = Settings(
        name=name or Path(model).name,
        aliases=tuple(alias or ()),
        host=host,
        keys=read_keys(keys),
        origins=tuple(origin or ()),
        sessions=sessions,
    )
    if workers == 1:
        prepare = loaded(model, device, dtype)
        run(settings, port, lambda: prepare(settings, conversations))
        return
    if not hasattr(socket, "send_fds"):
        raise InputError("--workers needs Linux or macOS; leave it at 1 here")
    from antiphon.serve.workers import run_workers

    run_workers(settings, port, partial(loaded, model, device, dtype), workers, conversations)


def loaded(model: str, device: str, dtype: Dtype) -> Callable[[Settings, int], Engine]:
    """The weights, in a function that makes an engine of them."""
    torch.set_num_threads(1)  # each lane is a thread, and small products gain nothing from more
    return partial(prepared, load_model(model, device, dtype))


def prepared(model: Omni, settings: Settings, conversations: int) -> Engine:
    """An engine that has been warmed and started; 0 conversations: as many as the machine keeps in time."""
    engine = Engine(model, conversations or None)
    if conversations:
        engine.warm(conversations)
    else:
        engine.measure(MOST)
    say.print(f"{settings.worker or settings.name} holds {engine.capacity} conversations at once")
    return engine.start()
