"""The command line: one function per command, thin over the public API. `-` is standard input or output."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from antiphon.audio import pcm16, read_audio, write_audio
from antiphon.config import OmniConfig
from antiphon.config_json import read_config
from antiphon.errors import AntiphonError, InputError
from antiphon.evaluate.parity import Difference, verify
from antiphon.evaluate.stages import Case, default_case, ensure_tokenizer
from antiphon.evaluate.stages import trace as trace_stages
from antiphon.files import check_target, write_safetensors
from antiphon.generate import AudioDelta, Done, Event, Omni, Options, Reply, TextDelta, load
from antiphon.train import commands
from antiphon.weights import find_checkpoint, outline, released_names

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The audio side of Qwen3-Omni: it listens, understands and answers aloud.",
)
say = Console(stderr=True, highlight=False)  # results go to standard output, everything else here
TRANSCRIBE = {"zh": "请将这段中文语音转换为纯文本。", "": "Transcribe the audio into text."}  # the release's prompts


class Dtype(StrEnum):
    """Types the weights can be held in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"

    @property
    def torch(self) -> torch.dtype | None:
        """The torch type, None for the one on disk."""
        return None if self is Dtype.auto else getattr(torch, self.value)


Model = Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.", metavar="MODEL")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder or Hub id.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights; auto is the one on disk.")]
VoiceOption = Annotated[str | None, typer.Option(help="Voice; the checkpoint's first by default.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampled speech.")]
WindowOption = Annotated[int | None, typer.Option(help="Seconds the encoder attends over: 1, 2, 4 or 8 (as released).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TextLimit = Annotated[int, typer.Option("--max-text-tokens", min=1, help="Longest answer in text tokens.")]
FrameLimit = Annotated[int, typer.Option("--max-frames", min=1, help="Longest speech in frames of 80 ms.")]


def main() -> NoReturn:
    """Run a command; an error is one sentence on standard error and exit status 1."""
    try:
        app()
    except AntiphonError as error:
        say.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.exit(141)
    sys.exit(0)


@app.command()
def info(model: Model, as_json: JsonOption = False) -> None:
    """Boxes, parameters, rates, voices and memory of a checkpoint, or of a folder with nothing but a config.json."""
    facts = describe(read_config(find_checkpoint(model)))
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    table = Table("box", "parameters", "tensors", "what it is", title=f"antiphon info {model}", min_width=96)
    for column in table.columns[1:3]:
        column.justify = "right"
    for name, box in facts["boxes"].items():
        table.add_row(name, f"{box['parameters']:,}", f"{box['tensors']:,}", box["what"])
    table.add_section()
    table.add_row("all", f"{facts['parameters']:,}", f"{facts['tensors']:,}", "on disk, the vision tower left out")
    out = Console(highlight=False)
    out.print(table)
    for name, value in (facts["rates"] | facts["memory"]).items():
        out.print(f"{name.replace('_', ' '):42} {value:,}")
    out.print(f"{'voices':42} {', '.join(facts['voices']) or 'none: this checkpoint answers in text'}")


def describe(config: OmniConfig) -> dict[str, Any]:
    """What `antiphon info --json` prints."""
    model = outline(Omni, config)
    names = released_names(model)
    audio, wave, text, talker = config.audio, config.code2wav, config.text, config.talker
    what = {
        "thinker.audio_tower.": f"AuT: {audio.encoder_layers} layers, windows of {audio.window_chunks} s",
        "talker.code_predictor.": talker and f"MTP: {talker.mtp.num_hidden_layers} layers",
        "talker.": talker and f"Talker: {talker.text.num_hidden_layers} layers, {_experts(talker.text)}",
        "code2wav.": wave and f"Code2Wav: rates {_times(wave)}",
        "thinker.": f"Thinker: {text.num_hidden_layers} layers, {_experts(text)}, vocabulary {text.vocab_size:,}",
    }
    boxes: dict[str, Any] = {}
    for name, shape in names.items():
        prefix = next(p for p in what if name.startswith(p))
        box = boxes.setdefault(prefix.rstrip("."), {"parameters": 0, "tensors": 0, "what": what[prefix]})
        box["parameters"] += torch.Size(shape).numel()
        box["tensors"] += 1
    total = sum(box["parameters"] for box in boxes.values())
    kv = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    memory = {"bytes_bfloat16": 2 * total, "bytes_float32": 4 * total, "thinker_cache_bytes_per_token_bfloat16": kv}
    rates: dict[str, Any] = {
        "input_sample_rate": audio.mel.sample_rate,
        "audio_tokens_per_second": audio.chunk_tokens * audio.mel.frame_rate / audio.chunk_frames,
    }
    if wave is not None and talker is not None:
        rates |= {
            "output_sample_rate": wave.sample_rate,
            "frames_per_second": wave.frame_rate,
            "samples_per_frame": wave.frame_samples,
            "codebooks": wave.num_quantizers,
            "codebook_size": wave.codebook_size,
            "accept_hidden_layer": talker.accept_hidden_layer,
        }
        heads = talker.text.num_key_value_heads * talker.text.head_dim
        memory["talker_cache_bytes_per_position_bfloat16"] = 2 * 2 * talker.text.num_hidden_layers * heads
    return {
        "parameters": total,
        "tensors": len(names),
        "boxes": boxes,
        "rates": rates,
        "voices": model.voices,
        "memory": memory,
    }


def _experts(c: Any) -> str:
    return f"top {c.num_experts_per_tok} of {c.num_experts} experts" if c.num_experts else "dense"


def _times(c: Any) -> str:
    return " x ".join(map(str, (*c.upsampling_ratios, *c.upsample_rates)))


@app.command()
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
    omni = _load(model, device, dtype)
    if ensure_tokenizer(omni):
        say.print("this checkpoint has no tokenizer: bytes stand in for its tokens")
    case = Case([[sound, prompt]], system, voice, max_text_tokens, max_frames, repetition_penalty, window)
    stages = trace_stages(omni, case)
    write_safetensors(out, stages)
    for name, tensor in stages.items():
        say.print(f"{name:16} {list(tensor.shape)!s:16} {str(tensor.dtype).removeprefix('torch.')}")


@app.command("verify")
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
        table = Table("stage", "shape", "difference", "tolerance", "largest", "", title=title)
        for row in rows:
            bound = f"{row.tolerance:.0e}" if row.tolerance else "identical"
            verdict, single = "ok" if row.agrees else "[red]DIFFERS[/]", f"{row.largest:.1e}" if row.largest else ""
            table.add_row(row.stage, str(list(row.shape)), _found(row), bound, single, verdict)
        Console(highlight=False).print(table)
    if not agrees:
        first = next(row.stage for row in rows if not row.agrees)
        say.print(f"[bold red]disagreement[/], first in {first}")
        raise typer.Exit(1)


def _found(row: Difference) -> str:
    """What was found in one stage."""
    if row.parted:
        return f"{row.difference:.1e} ({row.parted} of {row.choices} chosen otherwise)"
    return row.note or ("identical" if row.difference == 0 else f"{row.difference:.1e}")


@app.command()
def talk(
    audio: Annotated[str, typer.Argument(help="Spoken question; - is standard input.")],
    model: ModelOption,
    output: Annotated[str | None, typer.Option("--output", "-o", help="WAV file of the answer; - streams it.")] = None,
    voice: VoiceOption = None,
    prompt: Annotated[str, typer.Option(help="Text to add after the audio.")] = "",
    system: Annotated[str | None, typer.Option(help="Text of a system turn.")] = None,
    max_text_tokens: TextLimit = 1024,
    max_frames: FrameLimit = 4096,
    seed: SeedOption = 0,
    window: WindowOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer a spoken question aloud: the text as it is formed, the sound to a file."""
    if output not in (None, "-"):
        check_target(output)
    sound = read_audio(audio)
    omni = _load(model, device, dtype)
    session = omni.session(system, window=window)
    session.append_clip(*sound)
    if prompt:
        session.append_text(prompt)
    speaks = omni.speech is not None
    options = Options(voice, speaks, seed, max_text_tokens=max_text_tokens, max_frames=max_frames)
    reply = _play(session.respond(options), output)
    _report(reply)
    if len(reply.audio) and output is None:
        say.print("its sound was not kept: -o reply.wav writes it to a file, -o - to standard output")


@app.command()
def transcribe(
    audio: Annotated[list[str], typer.Argument(help="Sound files; - is standard input.")],
    model: ModelOption,
    language: Annotated[str, typer.Option(help="zh asks in Chinese, as the release was evaluated.")] = "",
    max_text_tokens: TextLimit = 1024,
    window: WindowOption = None,
    as_json: JsonOption = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Write down what is said in sound files, one after another."""
    if language not in TRANSCRIBE:
        raise InputError(f"there is no prompt for {language!r}: give zh for Chinese, and nothing for other languages")
    omni = _load(model, device, dtype)
    failed = False
    for source in audio:
        try:
            samples, rate = read_audio(source)
            session = omni.session(window=window)
            session.append_clip(samples, rate)
            session.append_text(TRANSCRIBE[language])
            reply = next(
                e.reply for e in session.respond(audio=False, max_text_tokens=max_text_tokens) if isinstance(e, Done)
            )
        except AntiphonError as error:  # the other files are still worth writing down
            say.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
            failed = True
            continue
        if as_json:
            line = {"file": source, "text": reply.text, "seconds": len(samples) / rate, "finish": reply.finish}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(reply.text if len(audio) == 1 else f"{source}\t{reply.text}", flush=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="Text to say; - is standard input, said as it arrives.")],
    model: ModelOption,
    output: Annotated[
        str, typer.Option("--output", "-o", help="WAV file; - streams to standard output.")
    ] = "speech.wav",
    voice: VoiceOption = None,
    max_frames: FrameLimit = 4096,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Say a text aloud."""
    if output != "-":
        check_target(output)
    if not text.strip():
        raise InputError("there is nothing to say; give some text")
    omni = _load(model, device, dtype)
    words = iter(sys.stdin.readline, "") if text == "-" else [text]
    reply = _play(omni.speak(words, voice=voice, seed=seed, max_frames=max_frames), output)
    if not reply.text_ids:
        raise InputError("there was nothing to say on standard input; give some text")
    _report(reply)


for command in (commands.corpus, commands.prepare, commands.train):
    app.command()(command)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """The audio side of Qwen3-Omni: it listens, understands and answers aloud."""
    if show:
        from importlib.metadata import version as installed

        print(installed("antiphon"))
        raise typer.Exit


# ---------------------------------------------------------------------------------------------- helpers


def _load(model: str, device: str, dtype: Dtype) -> Omni:
    columns = (TextColumn("reading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=say, transient=True) as progress:
        task = progress.add_task("weights", total=None)

        def step(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return load(model, device, dtype.torch, progress=step)


def _play(events: Iterator[Event], output: str | None) -> Reply:
    """Print text and write sound as they come; the reply they end with."""
    for event in _written(events, output):
        if isinstance(event, TextDelta):
            say.print(event.text, end="", markup=False, soft_wrap=True)
        elif isinstance(event, Done):
            say.print()
            return event.reply
    raise InputError("the answer ended early")


def _written(events: Iterator[Event], output: str | None) -> Iterator[Event]:
    """`events`, their sound written on the way: streamed to standard output, or to a file at the end."""
    with _standard_output(output == "-") as stream:
        for event in events:
            if stream is not None and isinstance(event, AudioDelta):
                if event.frame == 0:
                    stream.write(_endless_wav_header(event.sample_rate))
                stream.write(pcm16(event.samples))
                stream.flush()
            if output not in (None, "-") and isinstance(event, Done) and len(event.reply.audio):
                write_audio(output, event.reply.audio, event.reply.sample_rate)
            yield event


@contextmanager
def _standard_output(wanted: bool) -> Iterator[BinaryIO | None]:
    yield sys.stdout.buffer if wanted else None


def _endless_wav_header(rate: int) -> bytes:
    """Header of a 16-bit mono WAV whose length is not known yet, as players of streams accept it."""
    forever = 0xFFFFFFFF
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", forever, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", forever
    )


def _report(reply: Reply) -> None:
    t, seconds = reply.timings, len(reply.audio) / reply.sample_rate if reply.sample_rate else 0.0
    parts = [f"{len(reply.text_ids)} text tokens"]
    if seconds:
        parts += [f"{seconds:.2f} s of speech", f"first sound after {1000 * t['first_audio']:.0f} ms"]
        parts += [f"RTF {t['total'] / seconds:.2f}"]
    parts += [
        f"{name} {1000 * t[name]:.0f} ms" for name in ("prefill", "thinker", "talker", "mtp", "code2wav") if name in t
    ]
    if reply.finish != "stop":
        parts.append("cut off at the limit" if reply.finish == "length" else reply.finish)
    say.print(" · ".join(parts), soft_wrap=True)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def _transformers_version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("transformers")
    except PackageNotFoundError:
        return "(not installed)"
