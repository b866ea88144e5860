"""`antiphon bench`."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from antiphon.audio import Samples, read_audio
from antiphon.engine.bench import Load, run, trace_of
from antiphon.engine.engine import LIVE_WINDOW
from antiphon.engine.pictures import latency, moment
from antiphon.errors import InputError
from antiphon.files import write_text
from antiphon.terminal import (
    DeviceOption,
    Dtype,
    DtypeOption,
    FrameLimit,
    JsonOption,
    Model,
    WindowOption,
    load_model,
    say,
)

TONE = 3.0  # seconds of a question where none is given


def bench(
    model: Model = "tiny",
    question: Annotated[
        list[Path] | None, typer.Option(help="Spoken question; may be repeated. A tone by default.")
    ] = None,
    conversations: Annotated[
        list[int] | None, typer.Option("--conversations", "-c", help="At once; may be repeated. 1, 2, 4, 8 by default.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Questions of each conversation.")] = 2,
    uploaded: Annotated[
        bool, typer.Option(help="Upload whole questions, as others measure, instead of in real time.")
    ] = False,
    max_frames: FrameLimit = 50,
    window: WindowOption = LIVE_WINDOW,
    timeline: Annotated[Path | None, typer.Option(help="Write what ran when, as a Chrome trace.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw what ran around the end of the first question.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over load.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
    as_json: JsonOption = False,
) -> None:
    """Measure the engine under load: questions spoken in real time by many at once, answers played as they come."""
    asked = [read_audio(path) for path in question or ()] or [(tone(), 16000)]
    many = conversations or [1, 2, 4, 8]
    if min(many) < 1:
        raise InputError(f"there are no {min(many)} conversations; give 1 or more with -c")
    torch.set_num_threads(1)  # each lane is a thread, and small products gain nothing from more
    omni = load_model(model, device, dtype)
    if omni.speech is None:
        raise InputError("this checkpoint has no Talker and cannot speak; bench measures spoken answers")
    loads = [Load(c, turns, uploaded, max_frames, window) for c in many]
    columns = (TextColumn("conversations held"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=say, transient=True) as progress:
        runs = list(progress.track(run(omni, asked, loads), total=len(loads)))
    figures = [one.figures for one in runs]
    if timeline is not None:
        write_text(timeline, json.dumps(trace_of([work for one in runs for work in one.work])))
    if picture is not None:
        moment(runs[0].work, runs[0].answers[0], picture)
    if plot is not None:
        latency(figures, plot)
    about = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__, "loads": figures}
    if out is not None:
        write_text(out, json.dumps(about, indent=1))
    if as_json:
        print(json.dumps(about))
    else:
        Console().print(table(figures))


def tone() -> Samples:
    """A rising tone [N] at 16 kHz."""
    t = np.arange(round(TONE * 16000)) / 16000
    return (0.3 * np.sin(2 * np.pi * (200 + 100 * t) * t)).astype(np.float32)


def table(figures: list[dict[str, Any]]) -> Table:
    """A line a load; latencies are p50 / p95 in ms."""
    lines = Table(
        "at once", "first text", "first packet", "first sound", "RTF", "late packets, buffer 0/80/160 ms", "gap", "busy"
    )
    for one in figures:
        times = [f"{one[f'{n}_ms']['p50']:.0f} / {one[f'{n}_ms']['p95']:.0f}" for n in ("text", "code", "sound")]
        late = " / ".join(map(str, one["late"].values())) + f" of {one['packets']}"
        rtf = "-" if one["rtf"] is None else f"{one['rtf']:.2f}"
        gap, busy = f"{one['longest_gap_ms']:.0f} ms", f"{100 * one['busy']:.0f} %"
        lines.add_row(str(one["conversations"]), *times, rtf, late, gap, busy)
    return lines
