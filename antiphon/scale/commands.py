"""`antiphon label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TimeRemainingColumn

from antiphon.errors import InputError
from antiphon.terminal import DeviceOption, say
from antiphon.train.commands import COLUMNS, needs_extra

LONGEST = 30.0  # seconds


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
