"""The command line: one function per command, thin over the public API. `-` is standard input or output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from antiphon.audio import Samples, read_audio
from antiphon.bench.commands import bench
from antiphon.config import OmniConfig
from antiphon.config_json import read_config
from antiphon.errors import AntiphonError, AudioError, InputError
from antiphon.evaluate.commands import evaluate, trace, verify_command
from antiphon.files import check_target
from antiphon.generate import Omni, Options
from antiphon.memory import hold_memory
from antiphon.report import write_report
from antiphon.scale.commands import label, plan, serve
from antiphon.terminal import (
    DeviceOption,
    Dtype,
    DtypeOption,
    FrameLimit,
    JsonOption,
    Model,
    ModelOption,
    SeedOption,
    TextLimit,
    VoiceOption,
    WindowOption,
    check_sound,
    escaped,
    load_model,
    play,
    report_line,
    say,
)
from antiphon.train import commands
from antiphon.transcripts import FORMATS, HEARD, SPOKEN, SUBTITLES, check_language, longest_piece, transcribe
from antiphon.weights import find_checkpoint, outline, released_names

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The audio side of Qwen3-Omni: it listens, understands and answers aloud.",
)


def main() -> NoReturn:
    """Run a command; an error is one sentence on standard error and exit status 1."""
    hold_memory()
    try:
        app()
    except AntiphonError as error:
        say.print(f"[bold red]error:[/] {escaped(str(error))}", soft_wrap=True)
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


LanguageOption = Annotated[str, typer.Option(help="Language code; zh is asked for in Chinese, as the release was.")]
CloneOption = Annotated[str | None, typer.Option(help="Recording of the voice to speak with instead, 3 s or more.")]


@app.command()
def talk(
    audio: Annotated[
        str | None, typer.Argument(help="Spoken question; - is standard input, nothing the microphone.")
    ] = None,
    model: ModelOption = "tiny",
    output: Annotated[str | None, typer.Option("--output", "-o", help="WAV file of the answer; - streams it.")] = None,
    voice: VoiceOption = None,
    clone: CloneOption = None,
    prompt: Annotated[str, typer.Option(help="Text to add after the audio.")] = "",
    system: Annotated[str | None, typer.Option(help="Text of a system turn.")] = None,
    heard: Annotated[bool, typer.Option(help="Show first what was heard.")] = True,
    report: Annotated[str | None, typer.Option(help="HTML page that shows how the answer came to be.")] = None,
    max_text_tokens: TextLimit = 1024,
    max_frames: FrameLimit = 4096,
    seed: SeedOption = 0,
    window: WindowOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer a spoken question aloud: what was heard, the text as it is formed, the sound to a file."""
    if output not in (None, "-"):
        check_target(output)
    if report is not None:
        check_target(report)
    samples, rate = record() if audio is None else read_audio(audio)
    omni = load_model(model, device, dtype)
    speaker = speaker_of(omni, voice, clone)
    session = omni.session(system, window=window)
    if heard:
        said = transcribe(omni, samples, rate, window=window)
        say.print(f"[bold]heard[/]   {escaped(said.text)}", soft_wrap=True)
    session.append_audio(samples, rate)
    if prompt:
        session.append_text(prompt)
    say.print("[bold]answer[/]  ", end="")
    speaks = omni.speech is not None
    options = Options(speaker, speaks, seed, max_text_tokens=max_text_tokens, max_frames=max_frames)
    reply = play(session.respond(options), output)
    report_line(reply, voice_name(omni, voice, clone))
    if report is not None:
        write_report(report, session, samples, rate, reply, f"{audio or 'microphone'} · {model}")
    check_sound(reply, output)
    if len(reply.audio) and output is None:
        say.print("its sound was not kept: -o reply.wav writes it to a file, -o - to standard output")


@app.command()
def ask(
    audio: Annotated[str, typer.Argument(help="Sound file; - is standard input.")],
    question: Annotated[str, typer.Argument(help="What to say about it.")],
    model: ModelOption = "tiny",
    system: Annotated[str | None, typer.Option(help="Text of a system turn.")] = None,
    max_text_tokens: TextLimit = 1024,
    window: WindowOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer a written question about a sound, in text."""
    if not question.strip():
        raise InputError("there is no question; give some text")
    samples, rate = read_audio(audio)
    omni = load_model(model, device, dtype)
    session = omni.session(system, window=window)
    session.append_clip(samples, rate)
    session.append_text(question)
    reply = play(session.respond(Options(audio=False, max_text_tokens=max_text_tokens)), None, shown=False)
    print(reply.text)


@app.command("transcribe")
def transcribe_command(
    audio: Annotated[list[str], typer.Argument(help="Sound files; - is standard input.")],
    model: ModelOption = "tiny",
    language: LanguageOption = "",
    form: Annotated[str, typer.Option("--format", help="txt, json, srt or vtt; times are where pieces were cut.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder: a file for each recording instead of standard output.")
    ] = None,
    max_text_tokens: TextLimit = 1024,
    window: WindowOption = None,
    as_json: JsonOption = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Write down what is said in sound files, one after another."""
    form = form or ("json" if as_json else "txt")
    if form not in FORMATS:
        raise InputError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")
    check_language(language, HEARD)
    if out is not None and not out.is_dir():
        raise InputError(f"{out} is no folder; make it first")
    omni = load_model(model, device, dtype)
    if form in SUBTITLES:
        say.print(f"times are of whole pieces of up to {longest_piece(omni):g} s, not of words")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} s"),
        TimeRemainingColumn(),
    )
    failed = False
    with Progress(*columns, console=say, transient=True) as progress:
        for number, source in enumerate(audio, 1):
            bar = progress.add_task(f"{number} of {len(audio)}", total=None)
            try:
                transcript = transcribe(
                    omni,
                    *read_audio(source),
                    language=language,
                    window=window,
                    max_text_tokens=max_text_tokens,
                    progress=lambda done, of, bar=bar: progress.update(bar, completed=done, total=of),
                )
            except AntiphonError as error:  # the other files are still worth writing down
                say.print(f"[bold red]error:[/] {escaped(str(error))}", soft_wrap=True)
                failed = True
                continue
            finally:
                progress.remove_task(bar)
            text = FORMATS[form](transcript)
            if form == "json":
                text = json.dumps({"file": source, **json.loads(text)}, ensure_ascii=False) + "\n"
            if out is not None:
                target = out / f"{Path(source).stem}.{form}"
                target.write_text(text, encoding="utf-8")
                print(target, flush=True)
            else:
                print(f"{source}\t{text}" if form == "txt" and len(audio) > 1 else text, end="", flush=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="Text to say; - is standard input, said as it arrives.")],
    model: ModelOption = "tiny",
    output: Annotated[
        str, typer.Option("--output", "-o", help="WAV file; - streams to standard output.")
    ] = "speech.wav",
    voice: VoiceOption = None,
    clone: CloneOption = None,
    language: Annotated[str, typer.Option(help="Language code of the text, refused if it is not spoken.")] = "",
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
    check_language(language, SPOKEN)
    omni = load_model(model, device, dtype)
    words = iter(sys.stdin.readline, "") if text == "-" else [text]
    reply = play(omni.speak(words, voice=speaker_of(omni, voice, clone), seed=seed, max_frames=max_frames), output)
    if not reply.text_ids:
        raise InputError("there was nothing to say on standard input; give some text")
    report_line(reply, voice_name(omni, voice, clone))
    check_sound(reply, output)


app.command()(trace)
app.command("verify")(verify_command)
app.command()(evaluate)
app.command()(bench)
app.command()(plan)
app.command()(serve)
app.command()(label)
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


def speaker_of(model: Omni, voice: str | None, clone: str | None) -> str | torch.Tensor | None:
    """A voice by name, or of a recording."""
    if clone is None:
        return voice
    if voice is not None:
        raise InputError("give --voice or --clone, not both")
    return model.clone(*read_audio(clone))


def voice_name(model: Omni, voice: str | None, clone: str | None) -> str:
    """What the voice that `speaker_of` chose is called."""
    return f"cloned from {clone}" if clone is not None else voice or next(iter(model.voices), "")


def record(rate: int = 16000) -> tuple[Samples, int]:
    """Samples [N] from the microphone, until Enter is pressed or standard input ends.

    Raises:
        AudioError: it was over before anything was heard.
        InputError: there is no microphone, or no library to reach it.
    """
    try:
        import sounddevice
    except (ImportError, OSError):
        raise InputError("recording needs pip install 'antiphon[mic]'; or give a sound file") from None
    heard: list[Samples] = []
    try:
        with sounddevice.InputStream(
            rate, channels=1, dtype="float32", callback=lambda data, *_: heard.append(data[:, 0].copy())
        ):
            say.print("listening; press Enter when the question is over")
            sys.stdin.readline()
    except sounddevice.PortAudioError as error:
        raise InputError(f"there is no microphone here ({error}); give a sound file") from None
    if not heard:
        raise AudioError("nothing was recorded; give a sound file")
    return np.concatenate(heard), rate
