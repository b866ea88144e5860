"""`antiphon trace`, `verify` and `evaluate`: every stage of an answer, the same by transformers, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from rich.table import Table

from antiphon.audio import read_audio
from antiphon.errors import InputError
from antiphon.evaluate.parity import Difference, verify
from antiphon.evaluate.stages import Case, default_case, ensure_tokenizer
from antiphon.evaluate.stages import trace as trace_stages
from antiphon.files import check_target, write_safetensors
from antiphon.generate import Omni
from antiphon.terminal import (
    DeviceOption,
    Dtype,
    DtypeOption,
    FrameLimit,
    JsonOption,
    Model,
    TextLimit,
    VoiceOption,
    WindowOption,
    escaped,
    load_model,
    say,
)
from antiphon.train.commands import COLUMNS, make_sets_of, needs_extra
from antiphon.weights import find_checkpoint

if TYPE_CHECKING:  # what they import comes with the extra
    from antiphon.evaluate.asking import Asked
    from antiphon.evaluate.items import Item
    from antiphon.evaluate.scoring import Judges
    from antiphon.evaluate.trial import Row


def trace(
    model: Model,
    audio: Annotated[str, typer.Option(help="Sound file; - is standard input.")],
    prompt: Annotated[str, typer.Option(help="Text after the audio.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    voice: VoiceOption = None,
    max_text_tokens: TextLimit = 64,
    max_frames: FrameLimit = 64,
    system: Annotated[str | None, typer.Option(help="Text of a system turn.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Of codebook 0, greedy or not.")] = 1.05,
    window: WindowOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Write every stage of one greedy answer to a safetensors file: the audio, then the text, in one user turn."""
    check_target(out)
    sound = read_audio(audio)
    omni = load_model(model, device, dtype)
    if ensure_tokenizer(omni):
        say.print("this checkpoint has no tokenizer: bytes stand in for its tokens")
    case = Case([[sound, prompt]], system, voice, max_text_tokens, max_frames, repetition_penalty, window)
    stages = trace_stages(omni, case)
    write_safetensors(out, stages)
    for name, tensor in stages.items():
        say.print(f"{name:16} {list(tensor.shape)!s:16} {str(tensor.dtype).removeprefix('torch.')}")


def verify_command(
    model: Model,
    audio: Annotated[str | None, typer.Option(help="Sound file instead of a made-up clip.")] = None,
    prompt: Annotated[str, typer.Option(help="Text after --audio.")] = "What did you hear?",
    voice: VoiceOption = None,
    max_text_tokens: TextLimit = 12,
    max_frames: FrameLimit = 12,
    golden: Annotated[Path | None, typer.Option(help="Compare with this file instead of transformers.")] = None,
    write_golden: Annotated[Path | None, typer.Option(help="Keep what transformers computed in this file.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
    as_json: JsonOption = False,
) -> None:
    """Compare every stage with the installed transformers, or with a golden file; exit 1 if one differs.

    Antiphon is fed the ids, codes and experts that the other chose. Where it would have chosen another, the lead of its
    candidate's score over the other's is compared, so that rounding at a tie is no difference.
    """
    if write_golden is not None:
        check_target(write_golden)
    folder = find_checkpoint(model)
    case = default_case() if audio is None else Case([[read_audio(audio), prompt]])
    case = replace(case, voice=voice, max_text_tokens=max_text_tokens, max_frames=max_frames)
    with say.status("computing every stage twice: transformers, then Antiphon"):
        rows, _, used = verify(folder, case, dtype=dtype.torch, device=device, golden=golden, write_golden=write_golden)
    agrees, type_name = all(row.agrees for row in rows), str(used).removeprefix("torch.")
    if as_json:
        stages = [{**vars(row), "agrees": row.agrees} for row in rows]
        print(json.dumps({"agrees": agrees, "dtype": type_name, "stages": stages}, indent=2))
    else:
        against = f"golden file {golden}" if golden else f"transformers {_transformers_version()}"
        title = f"{model}: Antiphon against {against}, along its ids, codes and experts, in {type_name}"
        table = Table("stage", "shape", "difference", "tolerance", "", title=title)
        for row in rows:
            bound, verdict = (
                f"{row.tolerance:.0e}" if row.tolerance else "identical",
                "ok" if row.agrees else "[red]DIFFERS[/]",
            )
            table.add_row(row.stage, str(list(row.shape)), _found(row), bound, verdict)
        Console(highlight=False).print(table)
    if not agrees:
        first = next(row.stage for row in rows if not row.agrees)
        say.print(f"[bold red]disagreement[/], first in {first}")
        raise typer.Exit(1)


DOWNLOAD = "Also judge speech by models that are downloaded: Whisper as the ear, WavLM, UTMOS."
JUDGE = "OpenAI-compatible address (…/v1) of a chat model that grades open answers; the key is OPENAI_API_KEY."
BASELINES = ("music", "sound")  # training sets that what is built on librosa learns its classes from


def evaluate(
    model: Annotated[str, typer.Argument(help="tiny, a checkpoint's folder or a Hub id.", metavar="MODEL")] = "tiny",
    data: Annotated[Path | None, typer.Option(help="lhotse cuts to transcribe, instead of tiny's tables.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="One table; may be given several times.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Clips of each language, or part of a set; all by default.")
    ] = None,
    name: Annotated[str | None, typer.Option("--set", help="A set of the field, such as librispeech or mmau.")] = None,
    at: Annotated[Path | None, typer.Option(help="Folder of that set, laid out as it is published.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="One part of that set; may be given several times.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, answers and report.html of sets.")] = Path(
        "results"
    ),
    voice: VoiceOption = None,
    download: Annotated[bool, typer.Option("--download", help=DOWNLOAD)] = False,
    judge: Annotated[str | None, typer.Option(help=JUDGE)] = None,
    judge_model: Annotated[str, typer.Option(help="Model that grades at --judge.")] = "gpt-4o-mini",
    note: Annotated[
        str, typer.Option(help="What the report should say of a set, such as that it is not the real one.")
    ] = "",
    cuts: Annotated[Path, typer.Option(help="Folder of tiny's test sets; what is missing is made.")] = Path(
        "cuts/tiny"
    ),
    recipe: Annotated[Path, typer.Option(help="Recipe that the test sets are made from.")] = Path(
        "recipes/tiny/corpus.yaml"
    ),
    window: WindowOption = None,
    as_json: JsonOption = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """How well a model hears, answers, speaks and clones: tiny's tables, anyone's lhotse cuts, or a set of the field.

    `--set NAME --at FOLDER` measures a set as it is published (docs/evaluation.md has names and layouts): a table with
    95 % intervals, one line of OUT/results.jsonl, and OUT/report.html beside published figures.

    Error rates are edits over what was said, in characters for zh, yue, ja, th and ko (spaces left out) and in words
    for other languages, after NFKC and case folding, with punctuation and symbols as spaces; combining marks stay.
    """
    if name is None and at is None:
        rows = table_rows(partial(load_model, model, device, dtype), data, only, limit, cuts, recipe, window, as_json)
        if as_json:
            print(json.dumps([vars(row) for row in rows], ensure_ascii=False, indent=2))
        return
    if name is None or at is None:
        raise InputError("a set of the field needs both --set NAME and --at FOLDER")
    if data is not None or only:
        raise InputError("give --set, --data or --only, not several of them")
    with needs_extra("evaluating", "eval"):
        from antiphon.evaluate import downloaded, scoring
        from antiphon.evaluate.asking import Asked
        from antiphon.evaluate.sets import items_of
    items = items_of(name, at, part or (), limit)
    asked = Asked(load_model(model, device, dtype), window, voice)
    judges = scoring.offline(asked)
    judges = downloaded.with_downloads(judges) if download else judges
    judges = downloaded.with_grader(judges, judge, judge_model) if judge else judges
    print_set(evaluate_set(asked, judges, model, name, items, out, note), out, as_json)


def table_rows(
    load: Callable[[], Omni],
    data: Path | None,
    only: list[str] | None,
    limit: int | None,
    cuts: Path,
    recipe: Path,
    window: int | None,
    quiet: bool,
) -> list[Row]:
    """Rows of tiny's tables, or of error rates on anyone's cuts, printed as they come unless that is to be `quiet`."""
    with needs_extra():
        from antiphon.evaluate import voice, world
        from antiphon.evaluate.trial import Trial
    tables = (world.listening, world.windows, world.languages, world.scenes, world.answers, voice.speaking)
    named = {f.__name__: f for f in (*tables, voice.cloning, world.size, world.speed)}
    if unknown := sorted(set(only or ()) - set(named)):
        raise InputError(f"there is no table {unknown[0]!r}; there are {', '.join(named)}")
    omni = load()
    if data is None:
        make_sets(recipe, cuts)
    rows: list[Row] = []
    with Progress(*COLUMNS, TimeRemainingColumn(), console=say, transient=True) as progress:
        trial = Trial(omni, cuts, limit, partial(_tracked, progress))
        if data is not None:
            found = world.rates_of(replace(trial, cuts=data.parent), data.name, window)
        else:
            found = (row for name, table in named.items() if not only or name in only for row in table(trial))
        if not quiet:
            print("| | seen | target |\n|---|---|---|", flush=True)
        for row in found:
            rows.append(row)
            if not quiet:
                print(f"| {row.what} | {row.seen} | {row.target} |", flush=True)
    return rows


def evaluate_set(
    asked: Asked, judges: Judges, model: str, name: str, items: dict[str, list[Item]], out: Path, note: str
) -> dict[str, Any]:
    """Measure one set of the field and write the report anew; its line of results.jsonl."""
    from antiphon.evaluate.page import write_page
    from antiphon.evaluate.runs import run_set

    with Progress(*COLUMNS, TimeRemainingColumn(), console=say, transient=True) as progress:
        track = partial(_tracked, progress)
        line = run_set(asked, judges, model, name, items, out, track, note)
    write_page(out)
    return line


def _tracked(progress: Progress, items: Sequence[Any], what: str) -> Iterable[Any]:
    return progress.track(items, description=what)


def print_set(line: dict[str, Any], out: Path, as_json: bool) -> None:
    """A run's table, and where the rest is."""
    from antiphon.evaluate.runs import REPORT, interval, published, shown

    if as_json:
        print(json.dumps(line, ensure_ascii=False, indent=2))
    else:
        print("| part | metric | seen | 95 % interval | items | published |\n|---|---|---|---|---|---|")
        for row in line["rows"]:
            metric, others = row["metric"], published().get((line["data"]["set"], row["part"], row["metric"]), [])
            seen = shown(metric, row["value"]), interval(metric, row["low"], row["high"]), str(row["items"])
            known = ", ".join(f"{other.model} {shown(metric, other.value)}" for other in others[:3])
            what = f"{metric}, {row['unit']}" if row["unit"] else metric
            print(f"| {' | '.join([row['part'], what, *seen, known])} |")
    if left_out := line["data"]["left_out"]:
        first = ", ".join(line["data"]["left_out_first"])
        say.print(f"{left_out} items were left out: {escaped(first)}{' …' if left_out > 3 else ''}", soft_wrap=True)
    for note in line["judges"]["notes"]:
        say.print(escaped(note), soft_wrap=True)
    say.print(f"{out / REPORT} has all runs beside published figures")


def make_sets(recipe: Path, cuts: Path) -> None:
    """Make what is not there yet of a corpus's test sets, and of the training sets that baselines learn from."""
    from antiphon.train.corpus import read_corpus

    needed = {name: s for name, s in read_corpus(recipe).items() if name.startswith("test-") or name in BASELINES}
    make_sets_of({name: s for name, s in needed.items() if not (cuts / f"{name}.jsonl.gz").exists()}, cuts)


def _found(row: Difference) -> str:
    """What was found in one stage."""
    if row.parted:
        return f"{row.difference:.1e} ({row.parted} of {row.choices} chosen otherwise)"
    if row.note or row.difference == 0:
        return row.note or "identical"
    return f"{row.difference:.1e}" + (f", largest {row.largest:.1e}" if row.largest else "")


def _transformers_version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("transformers")
    except PackageNotFoundError:
        return "(not installed)"
