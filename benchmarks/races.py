"""Two races that say what the design claims: MTP against a flat Talker, Code2Wav against a diffusion vocoder.

    python -m benchmarks.races [--shape tiny] [--seconds 2] [--rounds 5] [--device cpu] [--dtype float32]

`--shape` is tiny, release or a folder with a config.json; weights are random, and nothing is downloaded.

1. The Talker predicts codebook 0 and MTP the others. Its rival is a Talker that predicts all codebooks itself, one by
   one: a step of all its layers for each, and as many positions in its cache. Equal size means equal parameters: the
   rival has the Talker's width, an embedding and a head for each codebook, and as many layers as bring it nearest.
2. Code2Wav makes sound of codes at once, frame by frame. Its rival is Qwen2.5-Omni's token2wav, as transformers
   builds it: a flow-matching DiT makes a mel in ten points of time (36 guided evaluations), BigVGAN makes sound of it.
   With the release both are as published; for other shapes the rival's depth stays and its widths are those published
   times one number, in steps of a 64th, that brings it nearest to Code2Wav in parameters.

All run eagerly and take turns on the same seconds of audio. Compute is operations of matrix products, convolutions and
attention as PyTorch counts them, and time; a ratio is the median over rounds. The delay from right context is looked
for: a code is changed, and what comes before it and changes too is what had to wait for it. For token2wav that is done
for one evaluation of the DiT, which sees its own block and one layer the next, and for BigVGAN; every further
evaluation looks as far ahead again, which a server that decodes in pieces has to cut off.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from antiphon.bench.floor import operations
from antiphon.binding import bound
from antiphon.code2wav import Code2Wav
from antiphon.config import OmniConfig, TalkerConfig
from antiphon.layers import Decoder
from antiphon.model import Speech
from antiphon.random_model import randomize, shape_of

PAST = 100  # positions that are in the Talker's cache before the first frame: a question and its opening
STRIDE = 7  # steps between those that are changed to find what looks ahead; no divisor of the rival's blocks
RATE = 24000  # of token2wav's sound


class FlatTalker(nn.Module):
    """A Talker that predicts every codebook itself: one step of all its layers a code."""

    def __init__(self, config: TalkerConfig, layers: int) -> None:
        super().__init__()
        text = replace(config.text, num_hidden_layers=layers)
        self.model = Decoder(text)
        books, width = range(config.num_code_groups), text.hidden_size
        self.embeddings = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in books)
        self.heads = nn.ModuleList(nn.Linear(width, config.codebook_size, bias=False) for _ in books)

    @classmethod
    def as_large_as(cls, size: int, config: TalkerConfig) -> FlatTalker:
        """The one whose parameters are nearest to `size`, on the meta device."""
        with torch.device("meta"):
            one, two = (parameters(cls(config, layers)) for layers in (1, 2))
            return cls(config, max(1, 1 + round((size - one) / (two - one))))


@dataclass(frozen=True)
class Racer:
    """Something that makes a second of audio, or the codes of one."""

    name: str
    parameters: int
    run: Callable[[], object]  # of all the seconds that are raced over


@dataclass(frozen=True)
class Result:
    """What a racer needs for a second of audio."""

    racer: Racer
    flops: float
    seconds: list[float]  # one a round


def parameters(*modules: nn.Module) -> int:
    """How many numbers modules hold."""
    return sum(p.numel() for module in modules for p in module.parameters())


def made(module: nn.Module, device: str, dtype: torch.dtype) -> Any:
    """A module of the meta device with random weights."""
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    randomize(module)
    return module


def race(racers: Sequence[Racer], audio: float, rounds: int) -> list[Result]:
    """Let racers take turns; each has run before its first round counts."""
    flops = [operations(racer.run) / audio for racer in racers]
    times: list[list[float]] = [[] for _ in racers]
    for _ in range(rounds):
        for racer, own in zip(racers, times, strict=True):
            start = time.perf_counter()
            racer.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append((time.perf_counter() - start) / audio)
    return [Result(*parts) for parts in zip(racers, flops, times, strict=True)]


# --------------------------------------------------------------------------- MTP against a flat Talker


def talkers(config: OmniConfig, frames: int, device: str, dtype: torch.dtype) -> list[Racer]:
    """The Talker with MTP, and a flat one of equal size, each to make so many frames of codes."""
    assert config.talker is not None
    assert config.code2wav is not None
    with torch.device("meta"):
        speech = Speech(config.talker, config.code2wav)
    speech = made(speech, device, dtype)
    talker, mtp = speech.talker, speech.mtp
    size = parameters(talker.model, talker.codec_head, mtp)
    flat = made(FlatTalker.as_large_as(size, config.talker), device, dtype)
    width, books, place = config.talker.text.hidden_size, config.talker.num_code_groups, (torch.device(device), dtype)
    prompt = torch.zeros(1, PAST, width, device=device, dtype=dtype)
    word = torch.zeros(1, width, device=device, dtype=dtype)
    talk, predict, step = bound(talker), mtp.bind_predict(), bound(flat.model)
    codebook = config.talker.codebook_size
    cache, scratch = talker.init_state(1, PAST + frames, *place), mtp.init_state(1, *place)
    longer = flat.model.init_state(1, PAST + frames * books, *place)
    read, read_flat = talk(prompt, cache)[:, -1], step(prompt, longer)[0][:, -1]

    def with_mtp() -> None:
        cache.truncate(PAST)
        hidden = read
        for _ in range(frames):
            code = talker.codec_head(hidden)[:, :codebook].argmax(-1)
            first = talker.model.codec_embedding(code)
            _, rest = predict(hidden, first, lambda logits, book: logits.argmax(-1), scratch)
            hidden = talk((first + rest + word)[:, None], cache)[:, -1]

    def one_by_one() -> None:
        longer.truncate(PAST)
        hidden = read_flat
        for _ in range(frames):
            for head, table in zip(flat.heads, flat.embeddings, strict=True):
                hidden = step((table(head(hidden).argmax(-1)) + word)[:, None], longer)[0][:, -1]

    layers = len(flat.model.layers)
    return [
        Racer("Talker and MTP", size, with_mtp),
        Racer(f"flat Talker, {layers} layers", parameters(flat), one_by_one),
    ]


# ------------------------------------------------------------------------ Code2Wav against token2wav


class Token2Wav:
    """Qwen2.5-Omni's decoder with random weights: as published, or its widths brought nearest to so many parameters.

    Tokens [1, T] are its codes, each of `hop` samples.
    """

    def __init__(self, size: int | None, device: str) -> None:
        from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel as Released
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.manual_seed(0)
        with torch.device(device):
            self.model: Any = Released(_config(size)).eval()  # it has to be float32
            self.dit, self.vocoder = self.model.code2wav_dit_model, self.model.code2wav_bigvgan_model
            self.config: Any = self.model.config.dit_config
            self.voice = torch.zeros(1, self.config.enc_emb_dim)
            self.reference = torch.zeros(1, 100, self.config.mel_dim)
        self.hop = self.config.repeats * math.prod(self.model.config.bigvgan_config.upsample_rates)

    def wave(self, tokens: Tensor) -> Tensor:
        """Samples [N], as `generate` makes them."""
        torch.manual_seed(0)  # the noise that it begins with
        return self.model(tokens, self.voice, self.reference)

    def once(self, tokens: Tensor) -> Tensor:
        """What one evaluation of the DiT gives [T * repeats, F]."""
        noise = torch.zeros(1, tokens.shape[1] * self.config.repeats, self.config.mel_dim, device=tokens.device)
        voice, time = self.voice[:, None].expand(-1, noise.shape[1], -1), torch.tensor(0.5, device=tokens.device)
        return self.dit(noise, self.reference, voice, tokens, time, apply_cfg=False)[0]

    def right_context(self, tokens: Tensor) -> float:
        """Seconds that one evaluation of the DiT and BigVGAN look ahead, together."""
        mel = self.once(tokens)[None]
        frame = self.hop // self.config.repeats
        ahead = right_context(self.once, tokens, self.config.repeats) * frame
        return (ahead + right_context(lambda x: self.vocoder(x.mT), mel, frame)) / RATE


def _config(size: int | None) -> Any:
    """Of token2wav: as published, or the one whose parameters are nearest to `size`."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniToken2WavConfig as Config
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel as Released

    def wide(n: int) -> Any:
        """Its widths times n / 64; those of BigVGAN are halved six times."""
        dit: dict[str, Any] = {"num_attention_heads": n, "head_dim": 16, "hidden_size": 16 * n, "emb_dim": 8 * n}
        dit["enc_channels"] = [4 * n] * 4 + [12 * n]
        return Config(dit_config=dit, bigvgan_config={"upsample_initial_channel": 64 * max(1, round(24 * n / 64))})

    def apart(config: Any) -> int:
        with torch.device("meta"):
            return abs(parameters(Released(config)) - (size or 0))

    return Config() if size is None else min(map(wide, (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)), key=apart)


def decoders(
    config: OmniConfig, frames: int, device: str, dtype: torch.dtype, published: bool
) -> tuple[list[Racer], list[float]]:
    """Code2Wav, frame by frame and at once, and token2wav; and the seconds of right context that each waits for."""
    wave = config.code2wav
    assert wave is not None
    with torch.device("meta"):
        ours = Code2Wav(wave)
    ours = made(ours, device, dtype)
    theirs = Token2Wav(None if published else parameters(ours), device)
    drawn = torch.Generator().manual_seed(0)
    codes = torch.randint(wave.codebook_size, (1, frames, wave.num_quantizers), generator=drawn).to(device)
    count = frames * wave.frame_samples // theirs.hop
    tokens = torch.randint(theirs.config.num_embeds - 1, (1, count), generator=drawn).to(device)
    decode = bound(ours)

    def streamed(codes: Tensor) -> Tensor:
        state = ours.init_state(1, torch.device(device), dtype)
        return torch.cat([decode(codes[:, i : i + 1], state) for i in range(codes.shape[1])], 1)[0]

    racers = [
        Racer("Code2Wav, frame by frame", parameters(ours), lambda: streamed(codes)),
        Racer("Code2Wav, all at once", parameters(ours), lambda: ours(codes)),
        Racer(f"token2wav, {theirs.config.hidden_size} wide", parameters(theirs.model), lambda: theirs.wave(tokens)),
    ]
    own = right_context(streamed, codes, wave.frame_samples) / wave.sample_rate
    return racers, [own, own, theirs.right_context(tokens)]


def right_context(decode: Callable[[Tensor], Tensor], x: Tensor, hop: int) -> int:
    """How far before a step of x [1, T, …] what `decode` makes of it changes too, the most over T.

    `decode` makes `hop` of its own steps [T * hop, …] of each: what is given of them has to wait for the step.
    """
    before, most = decode(x), 0
    for place in range(STRIDE, x.shape[1], STRIDE):
        other = x.clone()
        other[:, place] = x[:, place - 1]
        changed = (decode(other) != before).flatten(1 if before.dim() > 1 else 0)
        first = (changed.any(1) if changed.dim() > 1 else changed).nonzero()
        most = max(most, place * hop - int(first.min())) if len(first) else most
    return most


# ---------------------------------------------------------------------------------------------- tables


def lines(results: Sequence[Result], delays: Sequence[float] | None = None) -> list[str]:
    """A table of a race; ratios are over the first racer."""
    extra = "" if delays is None else " waits for |"
    table = [f"| | parameters | GFLOP a second of audio | ms a second of audio | times the first |{extra}"]
    table.append("|---|---|---|---|---|" + ("" if delays is None else "---|"))
    for i, one in enumerate(results):
        ms = 1000 * statistics.median(one.seconds)
        ratio = statistics.median(a / b for a, b in zip(one.seconds, results[0].seconds, strict=True))
        flops = one.flops / results[0].flops
        wait = "" if delays is None else f" {1000 * delays[i]:.0f} ms |"
        table.append(
            f"| {one.racer.name} | {one.racer.parameters / 1e6:.1f} M | {one.flops / 1e9:.2f} | {ms:.1f} "
            f"| {ratio:.1f} in time, {flops:.1f} in operations |{wait}"
        )
    return table


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args(arguments)
    _, config = shape_of(given.shape)
    assert config.code2wav is not None, "this shape cannot speak"
    frames = max(1, round(given.seconds * config.code2wav.frame_rate))
    audio, place = frames / config.code2wav.frame_rate, (given.device, getattr(torch, given.dtype))
    machine = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.processor()
    print(f"{machine or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {given.dtype}, eager;")
    print(f"shape {given.shape}, random weights, {audio:.2f} s of audio, median of {given.rounds} rounds in turn\n")
    print(f"MTP and a Talker that predicts every codebook itself, {PAST} positions before, equal in parameters:\n")
    print("\n".join(lines(race(talkers(config, frames, *place), audio, given.rounds))) + "\n", flush=True)
    published = given.shape == "release"
    how = "as published" if published else "its widths brought to as many parameters, its depth as published"
    print(f"Code2Wav and the DiT with BigVGAN of Qwen2.5-Omni (float32, {how}):\n")
    racers, delays = decoders(config, frames, *place, published)
    print("\n".join(lines(race(racers, audio, given.rounds), delays)))


if __name__ == "__main__":
    main()
