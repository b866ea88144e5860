"""`antiphon trace`, `verify` and `evaluate`: every stage of an answer, the same by transformers, and how good it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

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
    load_model,
    say,
)
from antiphon.train.commands import COLUMNS, make_sets_of, needs_extra
from antiphon.weights import find_checkpoint


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


BASELINES = ("music", "sound")  # training sets that what is built on librosa learns its classes from


def evaluate(
    model: Annotated[str, typer.Argument(help="tiny, a checkpoint's folder or a Hub id.", metavar="MODEL")] = "tiny",
    data: Annotated[Path | None, typer.Option(help="lhotse cuts to transcribe, instead of tiny's tables.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="One table; may be given several times.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Clips of each language in a set; all by default.")] = None,
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
    """How well a model hears, answers, speaks and clones: tiny's tables, or error rates on anyone's lhotse cuts.

    Error rates are edits over what was said, in characters for zh, yue, ja, th and ko (spaces left out) and in words
    for other languages, after NFKC and case folding, with punctuation and symbols as spaces; combining marks stay.
    """
    with needs_extra():
        from antiphon.evaluate import voice, world
        from antiphon.evaluate.trial import Row, Trial
    tables = (world.listening, world.windows, world.languages, world.scenes, world.answers, voice.speaking)
    named = {f.__name__: f for f in (*tables, voice.cloning, world.size, world.speed)}
    if unknown := sorted(set(only or ()) - set(named)):
        raise InputError(f"there is no table {unknown[0]!r}; there are {', '.join(named)}")
    omni = load_model(model, device, dtype)
    if data is None:
        make_sets(recipe, cuts)
    rows: list[Row] = []
    with Progress(*COLUMNS, TimeRemainingColumn(), console=say, transient=True) as progress:
        trial = Trial(omni, cuts, limit, lambda items, what: progress.track(items, description=what))
        if data is not None:
            found = world.rates_of(replace(trial, cuts=data.parent), data.name, window)
        else:
            found = (row for name, table in named.items() if not only or name in only for row in table(trial))
        if not as_json:
            print("| | seen | target |\n|---|---|---|", flush=True)
        for row in found:
            rows.append(row)
            if not as_json:
                print(f"| {row.what} | {row.seen} | {row.target} |", flush=True)
    if as_json:
        print(json.dumps([vars(row) for row in rows], ensure_ascii=False, indent=2))


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
