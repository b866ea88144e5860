"""`antiphon label`, `antiphon plan` and `antiphon serve`."""

from __future__ import annotations

import json
import socket
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TimeRemainingColumn

from antiphon.bench.costs import Cost, Turns
from antiphon.bench.figures import heading, line
from antiphon.errors import InputError
from antiphon.scale.plan import Capacity, Target, capacity, devices, predicted
from antiphon.serve.engines import loaded
from antiphon.terminal import DeviceOption, Dtype, DtypeOption, JsonOption, Model, say
from antiphon.train.commands import COLUMNS, needs_extra

LONGEST = 30.0  # seconds of a segment
BESIDE = ("first packet p50", "first packet p95", "RTF p50", "busy", "late at 80 ms")


# ------------------------------------------------------------------------------------------------ labelling


def label(
    sources: Annotated[
        list[str],
        typer.Argument(help="Folders, lhotse manifests, .tar or .parquet shards, sound files; URLs of fsspec."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the result; a rerun goes on there.")],
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="tiny, a checkpoint, label.yaml, http://…/v1#model or transformers:name; once or twice."),
    ] = None,
    longest: Annotated[float, typer.Option(help="Seconds of a segment; never more than a teacher hears.")] = LONGEST,
    agree: Annotated[float, typer.Option(help="How far two teachers have to agree, from 0 to 1.")] = 0.8,
    sure: Annotated[
        float, typer.Option(help="Mean log-probability of the tokens of a single teacher, at least.")
    ] = -0.1,
    language: Annotated[list[str] | None, typer.Option(help="Only these languages; may be repeated.")] = None,
    retry: Annotated[bool, typer.Option(help="Try again what is in quarantine.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes on Ray; 0 works in this one, without Ray.")] = 0,
    address: Annotated[str, typer.Option(help="Ray cluster, such as auto; by default Ray is begun here.")] = "",
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a worker; a fraction shares one.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Cores of a worker.")] = 1,
    runs: Annotated[Path, typer.Option(help="Folder of all runs, for teachers in training.")] = Path("runs"),
    device: DeviceOption = "cpu",
) -> None:
    """Write down recordings that have no text: lhotse cuts with pseudo-labels, what is left out and why, a report."""
    with needs_extra("labelling", "scale"):
        import pyarrow.parquet  # noqa: F401  # before anything is read

        from antiphon.scale import label as job_of
        from antiphon.scale.filters import Rules
        from antiphon.scale.gather import CUTS, QUARANTINE, gather
        from antiphon.scale.report import write_report
        from antiphon.scale.teachers import find_teacher
    specs = teacher or ["tiny"]
    if len(specs) > 2 or len(set(specs)) < len(specs):
        raise InputError(f"there are teachers {', '.join(specs)}; give one, or two that differ")
    if address and not workers:
        raise InputError(f"nobody would work on the cluster at {address}; give --workers")
    teachers = tuple(find_teacher(spec, device, str(runs)) for spec in specs)
    limit = min([longest, *(one.longest for one in teachers)])
    if limit < 1:
        raise InputError(f"segments of at most {limit:g} s are too short to say anything; give --longest of 1 or more")
    job = job_of.Job(out, teachers, limit, retry, threads)
    with Progress(*COLUMNS, TimeRemainingColumn(), console=say) as progress:
        bar = progress.add_task("blocks", total=None)
        keys = job_of.label(
            sources,
            job,
            job_of.Spread(workers, address, gpus),
            lambda done, of: progress.update(bar, completed=done, total=of),
        )
    figures = gather(job, Rules(agree, sure, tuple(language or ())), keys)
    write_report(job, figures)
    say.print(
        f"{len(figures.kept):,} of {len(figures.judged):,} segments are kept, {figures.hours(''):.2f} of "
        f"{figures.read:.2f} hours; {len(figures.quarantine):,} in quarantine",
        soft_wrap=True,
    )
    for name in (CUTS, QUARANTINE, "report.html"):
        print(out / name)


# ------------------------------------------------------------------------------------------------ planning


def plan(
    measured: Annotated[Path, typer.Argument(help="What antiphon bench --out wrote on one such machine.")],
    conversations: Annotated[
        list[int] | None, typer.Option("--conversations", "-n", help="At the same time, on average; may be repeated.")
    ] = None,
    first_ms: Annotated[
        float, typer.Option(min=1, help="Milliseconds until the first packet, for 95 of 100 answers.")
    ] = 500.0,
    late: Annotated[float, typer.Option(min=0, max=1, help="Share of packets that may be late by 80 ms.")] = 0.001,
    refused: Annotated[
        float, typer.Option(min=1e-9, max=1, help="Share of those who come that may be refused.")
    ] = 0.001,
    pause: Annotated[float, typer.Option(min=0, help="Seconds of silence before a question, on average.")] = 2.0,
    price: Annotated[float, typer.Option(min=0, help="Of a machine, an hour.")] = 0.0,
    check: Annotated[
        Path | None, typer.Option(help="Another bench of that machine, whose closed loops are predicted and compared.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Reckon from measured unit costs how many machines so many conversations need, and what gives out first."""
    bench = _read(measured)
    costs = {name: Cost(**cost) for name, cost in bench["costs"].items()}
    turns = Turns(**{**bench["turns"], **{name: tuple(bench["turns"][name]) for name in ("tokens", "frames")}})
    found: dict[str, Any] = {"machine": bench["machine"]}
    if check is not None:
        found["checked"] = _check(costs, turns, _read(check), as_json)
    else:
        target = Target(first_ms, late, refused)
        with say.status("simulating") as status:
            held = capacity(costs, turns, target, pause, lambda count: status.update(f"simulating {count} at once"))
        found |= {"each": held.conversations, "saturates": held.saturates, "lanes": held.figures["lanes"]}
        found["plans"] = [_machines(n, held, target, price) for n in conversations or (100, 10_000, 1_000_000)]
        if not as_json:
            _tell(found, held, price)
    if as_json:
        print(json.dumps(found))


def _read(path: Path) -> dict[str, Any]:
    """What a bench wrote.

    Raises:
        InputError: it cannot be read, or has no costs in it.
    """
    try:
        bench = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); give what antiphon bench --out wrote") from None
    if not isinstance(bench, dict) or not {"costs", "turns", "loads"} <= bench.keys():
        raise InputError(f"{path} has no costs in it; write it with antiphon bench MODEL -c 1 -c 8 --out FILE")
    return bench


def _machines(conversations: int, held: Capacity, target: Target, price: float) -> dict[str, Any]:
    count = devices(conversations, held.conversations, target.refused)
    return {
        "conversations": conversations,
        "machines": count,
        "used": conversations / (count * held.conversations),
        "price_a_minute": price * count / conversations / 60,
    }


def _tell(found: dict[str, Any], held: Capacity, price: float) -> None:
    figures = held.figures
    lanes = ", ".join(f"{name} {share:.0%}" for name, share in figures["lanes"].items())
    first = "p50 {p50:.0f} and p95 {p95:.0f} ms".format(**figures["code_ms"])
    print(f"{found['machine']}: {held.conversations} conversations each, first packet {first}; busy: {lanes}")
    print(f"what gives out first: {held.saturates}\n")
    print(heading(["conversations", "machines", "places used", *(["price a minute of one"] if price else [])]))
    for one in found["plans"]:
        cost = [f"{one['price_a_minute']:.6f}"] if price else []
        print(line([f"{one['conversations']:,}", f"{one['machines']:,}", f"{one['used']:.0%}", *cost]))


def _check(costs: dict[str, Cost], turns: Turns, bench: dict[str, Any], quiet: bool) -> list[dict[str, Any]]:
    """Closed loops as they were measured beside what they should have come to."""
    rows = []
    if not quiet:
        print(heading(["at once", *(f"{name}: predicted, measured" for name in BESIDE)]))
    for seen in bench["loads"]:
        if seen["conversations"] is None:
            continue
        guess = predicted(costs, turns, seen)
        pairs = {name: (_figure(guess, name), _figure(seen, name)) for name in BESIDE}
        rows.append({"conversations": seen["conversations"], **pairs})
        if not quiet:
            print(line([str(seen["conversations"]), *(f"{a:.3g}, {b:.3g}" for a, b in pairs.values())]))
    return rows


def _figure(figures: dict[str, Any], name: str) -> float:
    match name:
        case "first packet p50":
            return figures["code_ms"]["p50"]
        case "first packet p95":
            return figures["code_ms"]["p95"]
        case "RTF p50":
            return figures["rtf"]["p50"]
        case "busy":
            return sum(figures["lanes"].values()) if "lanes" in figures else figures["busy"]
        case _:
            return figures["late"]["80 ms"]


# ------------------------------------------------------------------------------------------------- serving


def serve(
    model: Model = "tiny",
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
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
    window: Annotated[
        int | None,
        typer.Option(help="Seconds the encoder attends over, everywhere; left out: 2 in Realtime, else as released."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with an engine and as many conversations; SIGHUP renews them.")
    ] = 1,
    ray: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Serve from a Ray cluster: its address, or local for this machine.")
    ] = "",
    replicas: Annotated[int, typer.Option(min=1, help="Engines on the cluster, at least.")] = 1,
    most_replicas: Annotated[int, typer.Option(min=0, help="And at most, as they are needed; 0: no more.")] = 0,
    cpus: Annotated[float, typer.Option(min=0, help="Cores of the cluster that each takes.")] = 2.0,
    gpus: Annotated[float, typer.Option(min=0, help="And GPUs.")] = 0.0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Serve OpenAI's chat, transcription, speech and Realtime endpoints, and the page."""
    try:
        from antiphon.serve.run import place_of, run
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
        window=window,
    )
    load = partial(loaded, model, device, dtype, window)
    if ray:
        _need_ray()
        from antiphon.scale.serving import Cluster, run_ray

        run_ray(settings, port, load, conversations, Cluster(ray, replicas, max(replicas, most_replicas), cpus, gpus))
    elif workers > 1:
        if not hasattr(socket, "send_fds"):
            raise InputError("--workers needs Linux or macOS; leave it at 1 here")
        from antiphon.serve.workers import run_workers

        run_workers(settings, place_of(settings, port), load, workers, conversations)
    else:
        place, prepare = place_of(settings, port), load()
        run(settings, place, lambda: prepare(settings, conversations))


def _need_ray() -> None:
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise InputError(f"--ray needs pip install 'antiphon[scale]' ({error.name} is missing)") from None
