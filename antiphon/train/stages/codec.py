"""The codec from scratch: first what makes codes, then Code2Wav, which makes sound of them.

`CodecStage` trains encoder and quantizer, heard through Code2Wav's transformer and a cheap inverse-STFT head that is
dropped afterwards. `Code2WavStage` takes the codes as they are and trains Code2Wav on them, begun from that transformer
and from the codebooks. Both learn from spectral distances, and from an adversary too once a decoder is worth judging. A
trained AuT, where the recipe has one, teaches the first codebook what is said.

Shapes: R rows, N samples, T frames of codes, W width, Q codebooks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.audio import Samples, write_audio
from antiphon.aut import AuT, TextDecoder, TextDecoderConfig
from antiphon.code2wav import Code2Wav, ConvNeXtBlock, SnakeBeta
from antiphon.codec import Codec
from antiphon.config import Code2WavConfig, CodecConfig
from antiphon.config_json import parse_codec_config, read_json
from antiphon.convolutions import run_convolutions, tails_of
from antiphon.error_rates import error_rates
from antiphon.errors import ConfigError
from antiphon.thinker import Thinker
from antiphon.train.adversary import Adversary, feature_loss, fooling_loss, judging_loss
from antiphon.train.checkpoints import load_weights
from antiphon.train.data import Example, Kept, load_samples, read_examples
from antiphon.train.listener import Listener
from antiphon.train.loop import Figures, Loss, Size
from antiphon.train.losses import FLOOR, SpectralDistance, Spectrum
from antiphon.train.recipe import read_fields
from antiphon.train.stages.common import TOKENIZER, Setting

CODEC_SIZES = "codec.json"  # sizes of encoder and quantizer, beside the config.json of the whole model
JUDGES = "adversary"
BRANCH = 0.3  # of the weights that close a residual branch: it begins smaller than what it is added to
LOUDNESS = 0.08  # rms of speech; the first convolution brings it to about one, the last one back
CLOSING = ("conv2.conv", "block.3.conv")  # of residual branches, in Code2Wav and in the encoder
DARK, BRIGHT = 100, 20  # decibels below full scale, the ends of a picture's colours
BEYOND = 8  # a crop may begin this part of its length before its clip does, and end as late


@dataclass(frozen=True)
class Judging:
    """The adversary, and the weights of what it adds to a decoder's loss."""

    start: float = 1.0  # share of the steps that go without it
    periods: tuple[int, ...] = (2, 3, 5)
    sizes: tuple[int, ...] = (512, 1024, 2048)  # of spectra, in samples
    width: int = 8
    frames: int = 12  # of each crop are judged
    fool: float = 0.1
    features: float = 0.3


@dataclass(frozen=True)
class SoundOptions:
    """What only these stages know; weights are those of the parts of the loss."""

    frames: int = 25  # of codes in a crop
    spectra: tuple[int, ...] = (256, 512, 1024, 2048)
    mel: float = 1.0
    stft: float = 1.0
    convergence: float = 1.0
    commit: float = 0.25
    outline: float = 1.0
    semantic: float = 1.0
    taught: float = 1.0
    quantize: float = 0.2  # share of the steps before codes are used
    few: float = 0.0  # share of the steps after that in which only the first codebooks are heard, see `heard_codebooks`
    judging: Judging = field(default_factory=Judging)
    validated: int = 80  # clips
    decoder: dict[str, Any] = field(default_factory=dict)  # sizes of AuT's text decoder, to read sound back with


@dataclass
class Made:
    """What a stage makes of sound: the sound again, further losses, and figures."""

    wave: Tensor  # [R, N]
    loss: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)


class SoundStage(ABC):
    """What both stages share: crops of clips, distances, the adversary, figures, sound and pictures."""

    def __init__(self, setting: Setting, modules: dict[str, nn.Module], trained: list[str]) -> None:
        recipe = setting.recipe
        self.setting, self.plan, self.device, self.trained = setting, recipe.optimization, setting.device, trained
        self.options = o = read_fields(SoundOptions, dict(recipe.options), f"{recipe.name}.options")
        self.config = read_codec_config(setting)
        self.judged_from = round(o.judging.start * self.plan.steps)
        if self.judged_from < self.plan.steps:
            modules[JUDGES] = Adversary(o.judging.periods, o.judging.sizes, o.judging.width)
        listening = listening_modules(setting, o.decoder)
        self.modules = setting.prepare(nn.ModuleDict(modules | listening))
        for name in listening:  # not trained here: their own run keeps them
            self.modules.pop(name)
        self.listener = Listener(**listening, sample_rate=self.config.sampling_rate) if listening else None
        self.distance = SpectralDistance(self.config.sampling_rate, o.spectra).to(self.device)
        self.mix = setting.mix(replace(recipe.data, batch_seconds=0))
        self.kept = Kept(self.read, self.mix.examples, recipe.data.readers)
        self.heard: tuple[Tensor, Tensor] | None = None  # recorded and made: from one player of a step to the other

    @abstractmethod
    def make(self, wave: Tensor, step: int) -> Made:
        """Wave [R, N] through the codec, as it trains."""

    @abstractmethod
    def encode(self, wave: Tensor) -> Tensor:
        """Codes [R, T, Q] of wave [R, N]."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Wave [R, N] of codes [R, T, Q]."""

    def players(self) -> dict[str, list[str]]:
        """The stage's own modules, then the adversary, which judges what they made in the same step."""
        return {"codec": self.trained} | ({JUDGES: [JUDGES]} if JUDGES in self.modules else {})

    def batch(self, number: int) -> Tensor:
        """Crops [R, N]: `batch_seconds` of sound, each from a clip of its own."""
        samples = self.options.frames * self.config.frame_samples
        rows = max(1, round(self.setting.recipe.data.batch_seconds * self.config.sampling_rate / samples))
        places = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.setting.recipe.seed, number, 1 << 21]))
        )
        clips = [self.kept(self.mix.draw(number * rows + row)[0]) for row in range(rows)]
        return torch.from_numpy(np.stack([crop(clip, samples, places.random()) for clip in clips]))

    def read(self, example: Example) -> Samples:
        """Samples [N] of a clip."""
        return load_samples(example.cut, self.config.sampling_rate)

    def counts(self, batch: Tensor) -> dict[str, float]:
        """None: all crops are of one length, and every batch has as many."""
        return {}

    def size(self, batch: Tensor) -> Size:
        """Samples, none of them padding."""
        return Size(batch.numel() / self.config.sampling_rate, batch.numel(), batch.numel())

    def loss(self, player: str, batch: Tensor, step: int) -> Loss:
        """Distances, what the stage adds, and the adversary's part; for the adversary, its own."""
        if player == JUDGES:
            return self._judge()
        wave, o = batch.to(self.device), self.options
        with self.plan.autocast(self.device):
            made = self.make(wave, step)
        d = self.distance(made.wave.float(), wave)
        total = o.mel * d.mel + o.stft * d.stft + o.convergence * d.convergence + made.loss
        figures = {"mel": d.mel, "stft": d.stft, "convergence": d.convergence, **made.figures}
        if step >= self.judged_from:
            fool, features = self._fool(made.wave.float(), wave)
            total = total + o.judging.fool * fool + o.judging.features * features
            figures |= {"fool": fool, "features": features}
        return Loss(total, {k: v.detach() for k, v in figures.items()})

    def _fool(self, made: Tensor, wave: Tensor) -> tuple[Tensor, Tensor]:
        """What the adversary says of a part of each crop: scores to raise, features to match."""
        frames = min(self.options.judging.frames, self.options.frames)
        size, start = self.config.frame_samples, int(torch.randint(self.options.frames - frames + 1, ()))
        part = slice(start * size, (start + frames) * size)
        self.heard = wave[:, part], made[:, part].detach()
        adversary = self.modules[JUDGES]
        with torch.no_grad():
            real = adversary(wave[:, part])
        verdicts = adversary(made[:, part])
        return fooling_loss(verdicts), feature_loss(real, verdicts)

    def _judge(self) -> Loss:
        """The adversary's loss on what has just been made; it sits out the steps before it is used."""
        if self.heard is None:
            return Loss(torch.zeros((), device=self.device, requires_grad=True))
        (wave, made), self.heard = self.heard, None
        loss = judging_loss(self.modules[JUDGES](wave), self.modules[JUDGES](made))
        return Loss(loss, {"judging": loss.detach()})

    def validate(self) -> Figures:
        """Mean distance of whole clips in ln mel, the others, the share of each codebook that is used."""
        examples = self._examples(self.options.validated)
        again = [self._again(example) for example in examples]
        distances = [self.distance(made, wave) for wave, made, _ in again]
        parts = torch.stack([torch.stack([d.mel, d.stft, d.convergence]) for d in distances]).mean(0).tolist()
        codes = torch.cat([codes[0] for _, _, codes in again])
        used = [len(c.unique()) / self.config.codebook_size for c in codes.T]
        figures = dict(zip(("mel", "stft", "convergence"), parts, strict=True)) | {"used": float(np.mean(used))}
        return figures | {f"used.{i}": share for i, share in enumerate(used)} | self._read_back(examples, again)

    def _read_back(self, examples: list[Example], again: list[tuple[Tensor, Tensor, Tensor]]) -> Figures:
        """Error rate of AuT on the clips as they were and as they came back, over all languages."""
        if self.listener is None or self.listener.decoder is None:
            return {}
        figures = {}
        for kind, sounds in (("wanted", [w for w, _, _ in again]), ("made", [m for _, m, _ in again])):
            read = [self.listener.read(sound[0], self.setting.tokenizer) for sound in sounds]
            rates = error_rates((e.text, text, e.language) for e, text in zip(examples, read, strict=True))
            figures[f"error.{kind}"] = sum(rates.values()) / len(rates)
        return figures

    def sample(self, folder: Path, board: Any) -> None:
        """A few clips as they were and as they came back: sound and pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, example in enumerate(self._examples(4)):
            rate, (wave, made, _) = self.config.sampling_rate, self._again(example)
            for kind, sound in (("wanted", wave), ("made", made)):
                write_audio(folder / f"{number}-{kind}.wav", sound[0].cpu().numpy(), rate)
            board.add_audio(f"{number}", made[0], sample_rate=rate)
            colours = picture(folder / f"{number}.png", wave[0], made[0], rate)
            board.add_image(f"{number}, wanted above made", colours)

    def _examples(self, count: int) -> list[Example]:
        """The first `count` clips of each validation manifest."""
        sources = self.setting.recipe.data.validation
        return [e for s in sources for e in read_examples(s, self.setting.cuts)[:count]]

    def _again(self, example: Example) -> tuple[Tensor, Tensor, Tensor]:
        """A clip as it was [1, N], as it comes back [1, N], and its codes [1, T, Q]."""
        wave = torch.from_numpy(load_samples(example.cut, self.config.sampling_rate))[None].to(self.device)
        codes = self.encode(wave)
        return wave, self.decode(codes)[:, : wave.shape[1]].float(), codes


# ------------------------------------------------------------------------------------------------ stages


class CodecStage(SoundStage):
    """Encoder and quantizer, heard through a cheap head."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(setting.recipe.seed)
        config, decoder = read_codec_config(setting), code2wav_config(setting)
        self.codec, self.code2wav, self.head = Codec(config), Code2Wav(decoder), SpectrumHead(decoder)
        self.outline = Outline(config)
        modules: dict[str, nn.Module] = {"codec": self.codec, "code2wav": self.code2wav}
        modules |= {"head": self.head, "outline": self.outline}
        trained = ["codec", "code2wav.pre_transformer", "code2wav.upsample", "head", "outline"]
        if "aut" in setting.recipe.init:
            modules["semantic"] = Pupil(config.hidden_size, setting.config.audio.d_model)
            trained.append("semantic")
        begin(self.codec)
        begin(self.code2wav)
        super().__init__(setting, modules, trained)
        wave = self.batch(0).to(self.device)
        if "codec" not in setting.recipe.init:
            settle(self.codec, wave)
        for name, part in (("head", self.head), ("outline", self.outline)):
            if name not in setting.recipe.init:
                part.expect(wave)
        self.quantized_from = round(self.options.quantize * self.plan.steps)

    def make(self, wave: Tensor, step: int) -> Made:
        """Through the quantizer, or past it while it is off."""
        latents, figures = self.codec.encoder(wave), {}
        if step < self.quantized_from:
            x, semantic = self.codec.quantizer.project(latents)
            loss = x.new_zeros(())
        else:
            generator = torch.Generator().manual_seed(self.setting.recipe.seed * 1_000_003 + step)
            q = self.codec.quantizer(latents, generator, self.heard_codebooks(generator))
            x, semantic, commit = q.latents, q.semantic, q.commit_loss.mean()
            loss, figures = self.options.commit * commit, {"commit": commit, "used": q.usage.mean()}
        figures["outline"] = self.outline(x, wave)
        loss = loss + self.options.outline * figures["outline"]
        if self.listener is not None:
            figures["semantic"] = self._taught(semantic, wave, self.listener)
            loss = loss + self.options.semantic * figures["semantic"]
        return Made(self.sound(x), loss, figures)

    def heard_codebooks(self, generator: torch.Generator) -> int | None:
        """How many codebooks are heard in a step: all, or in a share `few` of the steps the first, most often one.

        Without it the first codebook was taught what is said and then not listened to: the sound was the same with its
        codes in any order, and what is said stood in the second and the third. A Talker's linear head predicts the
        first alone.
        """
        share, place = torch.rand(2, generator=generator).tolist()
        return 1 + int(place**2 * (self.config.num_quantizers - 1)) if share < self.options.few else None

    def _taught(self, semantic: Tensor, wave: Tensor, teacher: Listener) -> Tensor:
        """How far the semantic codebook is from what AuT makes of the same moments.

        1 - cosine, and where there is a Thinker to spell for, how far what they spell is from what AuT's states do.
        """
        wanted = teacher.states_at(wave, self.config.frame_rate, semantic.shape[1]).float()
        known = self.modules["semantic"](semantic).float()
        apart = 1 - F.cosine_similarity(known, wanted, dim=-1).mean()
        if teacher.table is None:
            return apart
        spelled, said = teacher.spell(known), teacher.spell(wanted)
        return apart + F.kl_div(spelled, said, reduction="none", log_target=True).sum(-1).mean()

    def sound(self, latents: Tensor) -> Tensor:
        """Wave [R, N] of quantized latents [R, T, W]."""
        return self.head(upsampled(self.code2wav, latents))

    def encode(self, wave: Tensor) -> Tensor:
        """Codes, also while the quantizer is off: nothing is good before codes carry it."""
        return self.codec.encode(wave)

    def decode(self, codes: Tensor) -> Tensor:
        """Through the head."""
        return self.sound(self.codec.quantizer.decode(codes))


class Code2WavStage(SoundStage):
    """Code2Wav on the codes of a trained codec.

    The `head` that the codec was heard through, with what came before it there, gives one wave for the codes, to the
    sample: it teaches phases as well, which no spectral distance tells and a recording's codes do not hold.
    """

    def __init__(self, setting: Setting) -> None:
        recipe, decoder = setting.recipe, code2wav_config(setting)
        if "codec" not in recipe.init:
            raise ConfigError(f"{recipe.name}: init names no codec; give the run whose codes Code2Wav is to speak")
        torch.manual_seed(recipe.seed)
        self.codec, self.code2wav = Codec(read_codec_config(setting)), Code2Wav(decoder)
        self.head = SpectrumHead(decoder) if "head" in recipe.init else None
        begin(self.code2wav)
        modules: dict[str, nn.Module] = {"codec": self.codec, "code2wav": self.code2wav}
        super().__init__(setting, modules | ({"head": self.head} if self.head else {}), ["code2wav"])
        self.codec.requires_grad_(False)
        if self.head is not None:
            self.modules.pop("head").requires_grad_(False)
            self.steps = deepcopy(self.code2wav).requires_grad_(False)  # what the head reads stays as it was there
            for part in ("pre_transformer", "upsample"):
                load_weights(self.steps.get_submodule(part), setting.run_of(recipe.init["head"]), f"code2wav.{part}")
        if not {"code2wav", "code2wav.code_embedding"} & set(recipe.init):
            embed_codebooks(self.code2wav, self.codec)

    def make(self, wave: Tensor, step: int) -> Made:
        """Codes to sound."""
        codes = self.encode(wave)
        made = self.code2wav(codes)
        if self.head is None:
            return Made(made, wave.new_zeros(()))
        with torch.no_grad():
            wanted = self.head(upsampled(self.steps, self.codec.quantizer.decode(codes)))
        taught = (made - wanted).float().square().sum().sqrt() / (wanted.float().norm() + FLOOR)
        return Made(made, self.options.taught * taught, {"taught": taught})

    def encode(self, wave: Tensor) -> Tensor:
        """The codes that the Talker is trained on."""
        return self.codec.encode(wave)

    def decode(self, codes: Tensor) -> Tensor:
        """As in conversation."""
        return self.code2wav(codes)


# ----------------------------------------------------------------------------------------------- modules


class SpectrumHead(nn.Module):
    """Features of Code2Wav's last upsampling -> wave by inverse STFT: quick to train, and as causal as Code2Wav."""

    window: Tensor

    def __init__(self, config: Code2WavConfig, hops: int = 2, overlap: int = 4) -> None:
        super().__init__()
        step = config.frame_samples // math.prod(config.upsampling_ratios)
        self.hops, self.overlap, self.hop = hops, overlap, step // hops
        self.size = self.hop * overlap
        self.out = nn.Linear(config.hidden_size, hops * 2 * (self.size // 2 + 1))
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)

    @torch.no_grad()
    def expect(self, wave: Tensor) -> None:
        """Begin at the mean spectrum of wave [R, N]: else all weights grow in one direction, down to it."""
        windows = wave.unfold(1, self.size, self.hop) * self.window
        floor, doubled = FLOOR * self.window.sum(), self.window.square().sum() / self.hop
        mean = ((torch.fft.rfft(windows).abs() + floor) / doubled).log().mean((0, 1))
        self.out.bias.view(self.hops, 2, -1)[:, 0] = mean

    def forward(self, x: Tensor) -> Tensor:
        """[R, steps, W] -> wave [R, N]; a window begins where its hop does, so nothing is heard ahead of its step."""
        log_magnitude, phase = self.out(x).float().unflatten(-1, (self.hops, 2, -1)).flatten(1, 2).unbind(2)
        windows = torch.fft.irfft(torch.polar(log_magnitude.exp(), phase), n=self.size) * self.window
        parts = windows.unflatten(-1, (self.overlap, self.hop)).unbind(2)  # each [R, hops, hop samples]
        shifted = [F.pad(part, (0, 0, i, 0))[:, : part.shape[1]] for i, part in enumerate(parts)]
        return torch.stack(shifted).sum(0).flatten(1)


class Pupil(nn.Sequential):
    """Semantic latents -> AuT's states: each from those around it, as what is said takes more codes than one."""

    def __init__(self, width: int, out: int, around: int = 5) -> None:
        super().__init__(nn.Conv1d(width, width, around, padding=around // 2), nn.GELU(), nn.Conv1d(width, out, 1))

    def forward(self, input: Tensor) -> Tensor:
        """[R, T, W] -> [R, T, AuT's width]."""
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class Outline(nn.Module):
    """A linear map from latents to log-mel: what codes should say at least, and the shortest way to teach it."""

    def __init__(self, config: CodecConfig, steps: int = 4) -> None:
        super().__init__()
        self.spectrum, self.steps = Spectrum(config.sampling_rate, config.frame_samples * 4 // steps), steps
        self.map = nn.Linear(config.hidden_size, steps * len(self.spectrum.filters))

    @torch.no_grad()
    def expect(self, wave: Tensor) -> None:
        """Begin at the mean of wave [R, N]."""
        self.map.bias.copy_(self.wanted(wave).mean((0, 1)))

    def wanted(self, wave: Tensor) -> Tensor:
        """Log-mel [R, T, steps * F] of the steps of each frame of wave [R, N]."""
        mel = self.spectrum.log_mel(self.spectrum(wave)).transpose(1, 2)
        return mel[:, : mel.shape[1] // self.steps * self.steps].unflatten(1, (-1, self.steps)).flatten(2)

    def forward(self, latents: Tensor, wave: Tensor) -> Tensor:
        """Mean distance of what latents [R, T, W] say from the log-mel of wave [R, N]."""
        return (self.map(latents).float() - self.wanted(wave)).abs().mean()


def upsampled(code2wav: Code2Wav, latents: Tensor) -> Tensor:
    """What Code2Wav makes of latents [R, T, W] before its decoder: steps [R, T * upsampling, W]."""
    x, tails = code2wav.pre_transformer(latents, None).transpose(1, 2), tails_of(None)
    for layers in code2wav.upsample:
        assert isinstance(layers, nn.ModuleList)
        x = run_convolutions(layers, x, tails, SnakeBeta)
    return x.transpose(1, 2)


def settle(codec: Codec, wave: Tensor) -> None:
    """Scale and shift the encoder's convolutions: on wave [R, N] their outputs have mean 0 and deviation 1."""

    @torch.no_grad()
    def level(conv: nn.Module, _: Any, y: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv1d)
        assert conv.bias is not None
        mean, deviation = y.mean((0, 2)), y.std((0, 2)).clamp(min=1e-6)
        conv.weight.div_(deviation[:, None, None])
        conv.bias.sub_(mean).div_(deviation)
        return (y - mean[:, None]) / deviation[:, None]

    hooks = [m.register_forward_hook(level) for m in codec.encoder.encoder.modules() if isinstance(m, nn.Conv1d)]
    with torch.enable_grad():  # as in training: without gradients convolutions are bound as products, and not called
        codec.encoder.encoder(wave[:, None], tails_of(None))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def begin(box: Codec | Code2Wav) -> None:
    """Fresh weights: of standard deviation 1/sqrt(fan-in), branches that start small, no biases."""
    gains = {"encoder.encoder.layers.0.conv": 1 / LOUDNESS}
    if isinstance(box, Code2Wav):
        gains = {f"decoder.{len(box.decoder) - 1}.conv": LOUDNESS}
    for name, module in box.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
            fan = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose1d):  # each output meets a part of the kernel of every input
                fan = module.in_channels * module.kernel_size[0] / module.stride[0]
            gain = BRANCH if name.endswith(CLOSING) else gains.get(name, 1.0)
            nn.init.normal_(module.weight, std=gain * fan**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ConvNeXtBlock):
            module.gamma.fill_(BRANCH)


@torch.no_grad()
def embed_codebooks(code2wav: Code2Wav, codec: Codec) -> None:
    """Code2Wav's embedding such that the mean over the codebooks is what the quantizer makes of the codes."""
    tables = codec.quantizer.tables()
    code2wav.code_embedding.weight.copy_(len(tables) * tables.flatten(0, 1))


def listening_modules(setting: Setting, decoder: dict[str, Any]) -> dict[str, Any]:
    """AuT, its text decoder of sizes `decoder`, the Thinker it spells for: each if the recipe begins it from a run."""
    init, c = setting.recipe.init, setting.config
    if "aut" not in init:
        return {}
    parts: dict[str, Any] = {"aut": AuT(c.audio)}
    if "thinker" in init:
        parts["thinker"] = Thinker(c.text, c.talker.accept_hidden_layer if c.talker else None)
    if "decoder" in init:
        sizes = {"vocab_size": c.text.vocab_size, **decoder}
        config = read_fields(TextDecoderConfig, sizes, f"{setting.recipe.name}.options.decoder")
        parts["decoder"] = TextDecoder(config, c.audio.d_model)
    return parts


# --------------------------------------------------------------------------------------- sizes and sound


def read_codec_config(setting: Setting) -> CodecConfig:
    """Sizes of the encoder and the quantizer."""
    return parse_codec_config(read_json(setting.run_of(TOKENIZER) / CODEC_SIZES))


def code2wav_config(setting: Setting) -> Code2WavConfig:
    """Sizes of Code2Wav.

    Raises:
        ConfigError: there are none, or they do not go with the codec's.
    """
    codec, code2wav = read_codec_config(setting), setting.config.code2wav
    if code2wav is None:
        raise ConfigError(f"{setting.recipe.name}: config.json has no code2wav_config; add it to the recipe's model")
    for ours, theirs in (
        ("hidden_size", "hidden_size"),
        ("codebook_size", "codebook_size"),
        ("num_quantizers", "num_quantizers"),
        ("frame_samples", "frame_samples"),
        ("sampling_rate", "sample_rate"),
    ):
        if (a := getattr(codec, ours)) != (b := getattr(code2wav, theirs)):
            raise ConfigError(f"{CODEC_SIZES}: {ours} is {a}, but code2wav_config has {b}; they must agree")
    return code2wav


def crop(samples: Samples, size: int, place: float) -> Samples:
    """`size` samples of a clip [N], from `place` (0 to 1) between its beginning and its end; silence around it."""
    beyond = size // BEYOND
    around = np.pad(samples, (beyond, max(beyond, size - len(samples) - beyond)))
    start = int(place * (len(around) - size + 1))
    return around[start : start + size]


def picture(path: Path, wanted: Tensor, made: Tensor, sample_rate: int) -> Tensor:
    """Spectrograms of two waves [N], the first above the second, as a PNG file and as colours [3, height, width]."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    spectrum = Spectrum(sample_rate, 1024).to(wanted.device)
    decibels = [20 * (spectrum(wave[None])[0].flip(0) + FLOOR).log10() for wave in (wanted, made)]
    shade = ((torch.cat(decibels) + DARK) / (DARK - BRIGHT)).clamp(0, 1)
    colours = colormaps["magma"](shade.cpu().numpy())
    imsave(path, colours)
    return torch.from_numpy(colours[..., :3]).permute(2, 0, 1)
