"""`antiphon bench`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from antiphon.audio import Samples, read_audio
from antiphon.bench.against import compare
from antiphon.bench.costs import costs_of, turns_of
from antiphon.bench.derailed import derailed
from antiphon.bench.figures import TITLES, Run, cells, heading, kept, line, run, trace_of
from antiphon.bench.floor import floor
from antiphon.bench.load import Load, Question, voiced_samples
from antiphon.bench.pictures import latency, moment
from antiphon.bench.turns import nth_over_second
from antiphon.engine import Engine
from antiphon.engine.engine import threads
from antiphon.engine.lanes import POSITIONS
from antiphon.engine.thinking import LIVE_WINDOW
from antiphon.errors import InputError
from antiphon.evaluate.reference import load_reference
from antiphon.evaluate.stages import Case, ensure_tokenizer
from antiphon.files import write_text
from antiphon.generate import Omni
from antiphon.random_model import random_model
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
from antiphon.weights import find_checkpoint

TONE = 5.0  # seconds of the question that is asked by default
AT_ONCE = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 32, 64)}
MOST = 64  # conversations that are tried when it is measured how many are kept in time, if no load has more
TOGETHER = 8  # answers at once beside transformers


class Rival(StrEnum):
    """What the same checkpoint can be run through beside the engine."""

    transformers = "transformers"


@dataclass
class Account:
    """What was found: told line by line, and written as it comes, since a long run may be cut off."""

    out: Path | None = None
    quiet: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """A line for who watches."""
        if not self.quiet:
            print(text, flush=True)

    def keep(self, **facts: Any) -> None:
        """Something more."""
        self.found.update(facts)
        if self.out is not None:
            write_text(self.out, json.dumps(self.found, indent=1))

    def take(self, runs: Iterable[Run], ear: Omni | None = None) -> None:
        """Every load, a line of the table each; what `ear` reads back is in it."""
        for one in runs:
            if ear is not None:
                one.figures.update(derailed(ear, one.answers))
            if not self.runs:
                titles = [*TITLES, *(["derailed"] if ear else [])]
                self.tell("times are p50 / p95 / p99 in ms\n\n" + heading(titles))
            more = [f"{one.figures['derailed']} of {one.figures['read_back']}"] if ear else []
            self.tell(line([*cells(one.figures), *more]))
            self.runs.append(one)
            self.keep(loads=[one.figures for one in self.runs])
        if best := kept([one.figures for one in self.runs]):
            self.tell(f"\nall conversations were in time with {best} at once")


def bench(
    model: Model = "tiny",
    url: Annotated[
        str | None,
        typer.Option(
            help="Drive a server, which calls the model MODEL, instead: ws://host:port by OpenAI's Realtime,"
            " http://host:port by streaming chat. Its key is taken from OPENAI_API_KEY; its limit of tokens is"
            " --max-frames."
        ),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Random weights in the shape of release (the full 34.7 B, bfloat16 on a GPU), tiny, or a folder with a"
            " config.json, instead of MODEL. Nothing is downloaded.",
        ),
    ] = None,
    question: Annotated[
        list[Path] | None, typer.Option(help="Spoken question; may be repeated. A tone by default.")
    ] = None,
    conversations: Annotated[
        list[int] | None,
        typer.Option(
            "--conversations",
            "-c",
            help="Closed loop: at once, each asking again when it has been answered; may be repeated. By default, if"
            " nothing else is asked for, 1, 2, 4, 8 and on a GPU on to 64.",
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Open loop: conversations of one question that come in a second, independently; may be repeated."
            " Those beyond --capacity are refused."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long they come in the open loop.")] = 30.0,
    turns: Annotated[int, typer.Option(min=1, help="Questions of each conversation in the closed loop.")] = 2,
    uploaded: Annotated[
        bool,
        typer.Option(
            help="As others measure: whole questions at once and answers as fast as they come, instead of in real time."
        ),
    ] = False,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Conversations that the engine lets in; measured by default.")
    ] = None,
    read_back: Annotated[
        bool, typer.Option(help="Have the model hear its answers: how many lose their text or run away.")
    ] = False,
    against: Annotated[
        Rival | None, typer.Option(help="Run the same checkpoint through transformers too, taking turns.")
    ] = None,
    nth_turn: Annotated[
        int | None,
        typer.Option(min=3, help="Time this turn of a long conversation beside turn 2 of a fresh one, taking turns."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of --against and --nth-turn.")] = 5,
    max_frames: FrameLimit = 50,
    max_text_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer in text tokens; 1024, and with --random half as many as frames."),
    ] = None,
    window: WindowOption = LIVE_WINDOW,
    timeline: Annotated[Path | None, typer.Option(help="Write what ran when, as a Chrome trace.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw what ran around the end of the first question.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over load.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
    as_json: JsonOption = False,
) -> None:
    """Measure the engine under load: questions spoken in real time by many at once, answers played as they come.

    Beside it: the floor, how many the machine keeps in time, transformers, and a long conversation over a fresh one.
    With --url, any server that speaks OpenAI's protocols under the same load.
    """
    if random is not None and against is not None:
        raise InputError("transformers needs a checkpoint on disk; give a MODEL instead of --random")
    if url is not None and any((random, capacity, read_back, against, nth_turn, timeline, picture)):
        raise InputError("over --url only what clients see can be measured; give it -c, --rate, --plot and --out")
    tokens = max_text_tokens or (1024 if random is None else max(2, max_frames // 2))
    base = Load(1, 0.0, seconds, turns, uploaded, max_frames, tokens, verbatim=random is not None, window=window)
    loads = _loads(base, conversations or (() if rate or against or nth_turn else _at_once(device)), rate or ())
    if not loads and (timeline or picture or plot):
        raise InputError("there is no load to draw; give -c or --rate")
    questions = [read_audio(path) for path in question or ()] or [(tone(), 16000)]
    account = Account(out, as_json)
    if url is not None:
        _over_the_wire(account, url, model, questions, loads)
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # each lane is a thread, and small products gain nothing from more
        omni = _model(model, random, device, dtype)
        omni.session(window=window)  # what cannot be is refused before anything is measured
        _about(account, random or model, omni)
        with _engine(account, omni, loads, capacity) as engine:
            account.take(run(engine, questions, loads), omni if read_back else None)
            _keep_costs(account, omni, questions, window or LIVE_WINDOW)
            engine.capacity = None
            if nth_turn is not None:
                account.keep(turns=nth_over_second(engine, questions[0], nth_turn, base, rounds))
                account.tell(_turns_told(account.found["turns"]))
            if against is not None:
                _against(account, engine, model, questions[0], base, rounds, threads)
    if timeline is not None:
        write_text(timeline, json.dumps(trace_of([work for one in account.runs for work in one.work])))
    if picture is not None:
        moment(account.runs[0].work, account.runs[0].answers[0], picture)
    if plot is not None:
        latency(account.found["loads"], plot)
    if as_json:
        print(json.dumps(account.found))


def tone() -> Samples:
    """A rising tone [N] at 16 kHz."""
    t = np.arange(round(TONE * 16000)) / 16000
    return (0.3 * np.sin(2 * np.pi * (200 + 100 * t) * t)).astype(np.float32)


def _at_once(device: str) -> Sequence[int]:
    return AT_ONCE["cuda" if device.startswith("cuda") else "cpu"]


def _loads(base: Load, conversations: Sequence[int], rates: Sequence[float]) -> list[Load]:
    """Closed loops, then open ones.

    Raises:
        InputError: a load of nobody.
    """
    if (least := min((*conversations, *rates), default=1)) <= 0:
        raise InputError(f"a load of {least:g} is none; give -c and --rate a number above zero")
    loads = [replace(base, conversations=count) for count in conversations]
    return loads + [replace(base, conversations=None, rate=rate, turns=1) for rate in rates]


def _model(model: str, random: str | None, device: str, dtype: Dtype) -> Omni:
    """The checkpoint, or random weights.

    Raises:
        InputError: it cannot speak.
    """
    if random is None:
        omni = load_model(model, device, dtype)
    else:
        usual = torch.bfloat16 if device.startswith("cuda") else torch.float32
        with say.status("drawing random weights"):
            omni = random_model(random, device, dtype.torch or usual)
    if omni.speech is None:
        raise InputError("this checkpoint has no Talker and cannot speak; bench measures spoken answers")
    ensure_tokenizer(omni)
    return omni


def _about(account: Account, name: str, model: Omni) -> None:
    """What is measured, and the least that it can take."""
    machine = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _cores()
    account.keep(machine=machine, torch=torch.__version__, dtype=str(model.dtype).removeprefix("torch."))
    account.tell(", ".join([name, *account.found.values()]) + "\n")
    account.keep(floor=floor(model))
    account.tell(_floor_told(account.found["floor"]))


def _cores() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}"


def _over_the_wire(
    account: Account, url: str, model: str, questions: Sequence[Question], loads: Sequence[Load]
) -> None:
    """A server under the loads, and its own clock beside ours where it shows one."""
    try:
        from antiphon.bench import wire
    except ImportError as error:
        raise InputError(f"--url needs pip install 'antiphon[serve]' ({error.name} is missing)") from None
    server = wire.Server(url, model)
    account.keep(server=url, model=model, client=_cores())
    account.tell(f"{model} at {url}, asked from {_cores()}\n")
    account.take(wire.run(server, questions, loads))
    for one in (taken.figures for taken in account.runs):
        if one["own_ms"] is not None:
            account.tell(
                f"\n{cells(one)[0]}: the first packet comes after {one['wire_ms']:.0f} ms over the wire and "
                f"{one['own_ms']:.0f} ms by the server's own clock (means of the same turns)"
            )


@contextmanager
def _engine(account: Account, model: Omni, loads: Sequence[Load], capacity: int | None) -> Iterator[Engine]:
    """A running engine, warm for the loads, whose capacity is given or measured."""
    given = capacity is not None
    engine, most = Engine(model, capacity), max((load.conversations or 0 for load in loads), default=0)
    with say.status("measuring how many conversations are kept in time" if capacity is None else "warming up"):
        if capacity is None:
            capacity = engine.measure(max(most, MOST))
        engine.warm(max(most, capacity))
    account.keep(capacity=capacity)
    account.tell(f"kept in time, {'as given' if given else 'as measured'}: {capacity} conversations\n")
    with engine:
        yield engine


def _keep_costs(account: Account, model: Omni, questions: Sequence[Question], window: int) -> None:
    """What every kind of batch cost, and how much was said: `antiphon plan` reckons with it."""
    work = [one for taken in account.runs for one in taken.work]
    answers = [one for taken in account.runs for one in taken.answers]
    if not any(one.reply for one in answers):
        return
    voiced = float(np.mean([voiced_samples(samples) / rate for samples, rate in questions]))
    turns = turns_of(answers, work, voiced, window, float(model.config.audio.tokens(model.config.audio.mel.frame_rate)))
    account.keep(
        costs={name: asdict(cost) for name, cost in costs_of(work).items()},
        turns=asdict(replace(turns, room=POSITIONS[model.device.type], threads=threads())),
    )


def _floor_told(least: dict[str, Any]) -> str:
    def cost(name: str) -> str:
        one = least[name]
        return (
            f"{one['bytes'] / 1e6:.1f} MB of weights, {one['operations'] / 1e9:.3f} GFLOP, {least[f'{name}_ms']:.2f} ms"
        )

    speed = f"{least['bytes_a_second'] / 1e9:.1f} GB/s and {least['operations_a_second'] / 1e9:.0f} GFLOP/s"
    return f"floor, one conversation, at {speed}: a frame {cost('frame')}; a token {cost('token')}\n"


def _turns_told(found: dict[str, Any]) -> str:
    return (
        f"\nturn {found['turn']} ({found['positions']} positions before it) has its first packet after "
        f"{found['nth_ms']:.0f} ms, turn 2 ({found['positions_second']}) after {found['second_ms']:.0f} ms: "
        f"{found['ratio']:.2f} times"
    )


def _against(
    account: Account, engine: Engine, name: str, question: Question, load: Load, rounds: int, threads: int
) -> None:
    """The table of transformers, the readable loop and the engine."""
    model = engine.model
    with say.status("the same checkpoint in transformers, the readable loop and the engine"):
        other = load_reference(find_checkpoint(name), model.dtype, str(model.device))
        case = Case([[question, "What did you hear?"]], None, model.voices[0])
        case = replace(case, max_text_tokens=max(2, load.max_frames // 2), max_frames=load.max_frames)
        rows = compare(engine, other, case, rounds, (1, TOGETHER), threads)
    account.keep(against=rows)
    account.tell("\n" + heading(["", "frames/s", "over transformers", "first sound", "sooner"]))
    for row in rows:
        rates = [f"{row['frames_per_second']:.1f}", f"{row['over_transformers']:.1f} times"]
        account.tell(line([row["name"], *rates, f"{row['first_sound_ms']:.0f} ms", f"{row['sooner']:.1f} times"]))
    if not all(row["says_the_same"] for row in rows):
        account.tell("\nthey do not all say the same; antiphon verify shows where they part")
