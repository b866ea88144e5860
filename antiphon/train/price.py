"""What a recipe takes on so many devices, before anything is allocated: memory by kind, and time at a given rate.

The stage's modules are laid out on the meta device, which has shapes and no memory, and one batch as long as the recipe
allows goes through them and back: matrix products are counted as they are called, and what is kept for the way back by
its bytes. Attention is counted as kernels do it that never write its scores. Of routed experts a token pays for those
it visits. Talking between devices, reading and validating are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from antiphon.aut import AuT, TextDecoder, TextDecoderConfig
from antiphon.config import OmniConfig
from antiphon.config_json import parse_config, read_json
from antiphon.errors import ConfigError
from antiphon.layers import DecoderLayer, SparseMLP, SwiGLU
from antiphon.model import Speech
from antiphon.speaker import SpeakerConfig, SpeakerEncoder
from antiphon.thinker import Thinker
from antiphon.train import shards
from antiphon.train.data import READ
from antiphon.train.lora import adapt
from antiphon.train.recipe import Recipe, read_fields
from antiphon.train.run import Course
from antiphon.train.stages.speech import listens
from antiphon.train.text import CONFIG_IDS, fill_ids
from antiphon.turn import TurnConfig, TurnEnd

META = torch.device("meta")
KEPT = 4  # bytes of a number of a weight, its gradient, each of its two moments, its average


@dataclass(frozen=True)
class Laid:
    """A stage on the meta device."""

    modules: nn.ModuleDict  # shared out over the devices
    heard: list[nn.Module]  # whole on each, as are
    before: list[nn.Module]  # what is trained, as it was
    trained: list[str]
    loss: Callable[[], Tensor]  # of a batch


@dataclass(frozen=True)
class Price:
    """Bytes of one device, and the floating-point operations of a step on all of them."""

    parameters: int
    trained: int
    memory: dict[str, float]
    operations: float


def price(recipe: Recipe, folder: Path, devices: int) -> Price:
    """What a recipe takes; `folder` is that of the files it names.

    Raises:
        ConfigError: its stage is not one of the large ones.
    """
    if recipe.stage not in LAYOUTS:
        raise ConfigError(f"{recipe.name}: only {', '.join(LAYOUTS)} can be reckoned, not {recipe.stage}")
    ids = {token: i for i, token in enumerate(t for tokens in CONFIG_IDS.values() for t in tokens.values())}
    config = parse_config(fill_ids(read_json(folder / recipe.model), ids))
    with META:
        laid = LAYOUTS[recipe.stage](recipe, config)
    for name in recipe.freeze:
        laid.modules.get_submodule(name).requires_grad_(False)
    with META:
        adapt(laid.modules, recipe)
    weights = {n: p for n, p in laid.modules.named_parameters() if p.requires_grad}
    trained = sum(p.numel() for n, p in weights.items() if n.startswith(tuple(laid.trained)))
    whole = sum(p.numel() for p in laid.modules.parameters())
    moments = trained * (2 + (recipe.optimization.average > 0))
    memory = {"weights": KEPT * whole / devices, "gradients": KEPT * trained / devices}
    memory["moments and averages"] = KEPT * moments / devices
    memory["gathered"] = _gathered(laid.modules) if devices > 1 else 0.0
    short = 4 if recipe.optimization.dtype == "float32" else 2
    still = recipe.optimization.still_dtype.itemsize
    frozen = ((still, laid.heard), (KEPT, laid.before))
    memory["frozen beside it"] = float(sum(n * p.numel() for n, boxes in frozen for b in boxes for p in b.parameters()))
    memory["activations"], operations = _measured(laid, recipe, short)
    return Price(whole, trained, memory, operations * recipe.optimization.accumulate)


def _gathered(modules: nn.ModuleDict) -> float:
    """Bytes of what is whole on a device during a loss: all but the layers, and two of these, with gradients."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in shards.stacked(modules)]
    rest = sum(p.numel() for p in modules.parameters()) - sum(layers)
    return 2 * KEPT * (rest + 2 * max(layers, default=0))


# ------------------------------------------------------------------------------------------ what is counted


class Fused(TorchFunctionMode):
    """Attention that keeps what goes into it and what comes out, as fused kernels do; counts its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = 0.0, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of everything else, what it is."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        self.forward += 4.0 * q.numel() * k.shape[-2]
        self.backward += 10.0 * q.numel() * k.shape[-2] if q.requires_grad else 0.0
        return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _measured(laid: Laid, recipe: Recipe, short: int) -> tuple[float, float]:
    """Bytes kept for the way back, and operations there and back, of one batch."""
    for box in (laid.modules, *laid.heard, *laid.before):
        _routed_as_dense(box)
        box.to(torch.bfloat16 if short == 2 else torch.float32)
    kept, forward, both = _there_and_back(laid)
    if not recipe.devices.recompute:
        return kept, both
    layers, entering = shards.stacked(laid.modules), list[int]()

    def passing(x: Tensor, *_: Any) -> Tensor:
        entering.append(x.numel() * short)
        return x

    for layer in layers:
        layer.forward = passing
    outside, forward_outside, _ = _there_and_back(laid)
    one = (kept - outside) / max(1, len(layers))  # layer is there in full at a time
    return outside + one + sum(entering), both + forward - forward_outside


def _there_and_back(laid: Laid) -> tuple[float, float, float]:
    """Bytes kept, operations there, and operations there and back."""
    own = {p.untyped_storage()._cdata for p in laid.modules.parameters()}
    seen, alive = dict[int, int](), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with FlopCounterMode(display=False) as counter, Fused() as fused:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = laid.loss()
        forward = counter.get_total_flops() + fused.forward
        if loss.requires_grad:  # else nothing moves outside the layers
            loss.backward()
    return float(sum(seen.values())), forward, counter.get_total_flops() + fused.forward + fused.backward


def _routed_as_dense(modules: nn.Module) -> None:
    """Experts as one block as wide as those that a token visits: routing needs numbers, and there are none."""
    for layer in modules.modules():
        if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, SparseMLP):
            width, inner = layer.mlp.experts.gate_up_proj.shape[2], layer.mlp.experts.down_proj.shape[2]
            shared = layer.mlp.shared_expert.down_proj.in_features if layer.mlp.shared_expert else 0
            moves = layer.mlp.gate.weight.requires_grad
            with META:
                layer.mlp = SwiGLU(width, layer.mlp.top_k * inner + shared).requires_grad_(moves)


# ------------------------------------------------------------------------------------------ the large stages


def _clips(recipe: Recipe, config: OmniConfig) -> tuple[Tensor, Tensor, int]:
    """Log-mel [B, T, F] of a batch, frames [B] of each clip, and text tokens of each."""
    seconds = min(recipe.data.max_seconds, recipe.data.batch_seconds)
    count, frames = max(1, int(recipe.data.batch_seconds / seconds)), int(seconds * config.audio.mel.frame_rate)
    text = max(1, int(READ * config.audio.tokens(frames)))
    return torch.empty(count, frames, config.audio.num_mel_bins, device=META), torch.full((count,), frames), text


def _aut(recipe: Recipe, config: OmniConfig) -> Laid:
    sizes = {"vocab_size": config.text.vocab_size, **dict(recipe.options.get("decoder") or {})}
    aut, width = AuT(config.audio), config.audio.d_model
    decoder = TextDecoder(read_fields(TextDecoderConfig, sizes, f"{recipe.name}.options.decoder"), width)
    ctc = nn.Linear(width, config.text.vocab_size + 1)

    def loss() -> Tensor:
        mel, frames, text = _clips(recipe, config)
        states = aut.encode(mel, window=config.audio.window_chunks, frames=frames)
        ids = _ids(len(mel), text)
        scores = decoder(ids, decoder.memory(states))
        return _nats(scores) + _nats(ctc(states))

    parts = [f"aut.{name}" for name, _ in aut.named_children() if not name.startswith("proj")]
    return Laid(nn.ModuleDict({"aut": aut, "decoder": decoder, "ctc": ctc}), [], [], [*parts, "decoder", "ctc"], loss)


def _thinker(recipe: Recipe, config: OmniConfig) -> Laid:
    aut, thinker = AuT(config.audio), Thinker(config.text)

    def loss() -> Tensor:
        mel, frames, text = _clips(recipe, config)
        heard = aut(mel, window=config.audio.window_chunks, frames=frames)
        x = torch.cat([heard, thinker.embed(_ids(len(mel), text))], 1)
        return _nats(thinker.logits(thinker(x)[0][:, -text:]))

    return Laid(nn.ModuleDict({"thinker": thinker, "aut": aut}), [], [], ["thinker", "aut"], loss)


def _speech(recipe: Recipe, config: OmniConfig) -> Laid:
    if config.talker is None or config.code2wav is None:
        raise ConfigError(f"{recipe.name}: the configuration has no Talker; give talker_config and code2wav_config")
    speech, aut, thinker = Speech(config.talker, config.code2wav), AuT(config.audio), Thinker(config.text)
    sizes = {"width": config.talker.text.hidden_size, **recipe.options.get("speaker", {})}
    speaker, hears = SpeakerEncoder(read_fields(SpeakerConfig, sizes, "speaker")), listens(recipe.data)
    if not hears:
        thinker.model.layers = nn.ModuleList()
    share = recipe.options.get("mtp_share", 0.25)
    books, rate = config.talker.num_code_groups, config.code2wav.sample_rate / config.code2wav.frame_samples

    def loss() -> Tensor:
        mel, frames, text = _clips(recipe, config)
        if hears:
            with torch.no_grad():
                thinker(aut(mel, window=config.audio.window_chunks, frames=frames))
        spoken = int(mel.shape[1] / config.audio.mel.frame_rate * rate)
        words = speech.talker.text_projection(thinker.embed(_ids(len(mel), text)))
        fed = speech.frame_embedding(_ids(len(mel), spoken, books))
        states = speech.talker(torch.cat([words, fed], 1))[:, -spoken:].flatten(0, 1)
        some = states[: max(1, round(len(states) * share))]
        codes = _ids(len(some), books - 1)
        return _nats(speech.talker.codec_head(states)) + _nats(speech.mtp.logits(some, some, codes))

    modules = nn.ModuleDict({"talker": speech.talker, "mtp": speech.mtp, "speaker": speaker})
    return Laid(modules, [thinker.requires_grad_(False), aut.requires_grad_(False)], [], list(modules), loss)


def _preference(recipe: Recipe, config: OmniConfig) -> Laid:
    laid = _speech(recipe, config)
    before = [deepcopy(laid.modules[name]).requires_grad_(False) for name in ("talker", "mtp")]
    laid.modules["speaker"].requires_grad_(False)

    def loss() -> Tensor:
        with torch.no_grad():
            laid.loss()
        return laid.loss()

    return Laid(laid.modules, laid.heard, before, ["talker", "mtp"], loss)


def _turn(recipe: Recipe, config: OmniConfig) -> Laid:
    sizes = {"width": config.audio.output_dim, **recipe.options.get("head", {})}
    aut, turn = AuT(config.audio).requires_grad_(False), TurnEnd(read_fields(TurnConfig, sizes, "head"))

    def loss() -> Tensor:
        mel, frames, _ = _clips(recipe, config)
        with torch.no_grad():
            heard = aut(mel, window=config.audio.window_chunks, frames=frames)
        return turn(heard, torch.full((len(mel),), heard.shape[1])).sum()

    return Laid(nn.ModuleDict({"turn": turn, "aut": aut}), [], [], ["turn"], loss)


def _ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long, device=META)


def _nats(scores: Tensor) -> Tensor:
    """Cross-entropy of scores [.., V] with something."""
    flat = scores.float().flatten(0, -2)
    return F.cross_entropy(flat, _ids(len(flat)))


LAYOUTS: dict[str, Callable[[Recipe, OmniConfig], Laid]] = {
    "aut": _aut,
    "thinker": _thinker,
    "speech": _speech,
    "preference": _preference,
    "turn": _turn,
}


def show(course: Course, devices: int, tflops: float) -> None:
    """A table of what the recipes of a course take on each of some devices that do `tflops` TFLOP/s each."""
    table = Table(title=f"{devices} device{'s' * (devices > 1)} of {tflops:g} TFLOP/s, GB on each")
    found = [(r, price(r, course.folder, devices)) for r in course.recipes if r.stage in LAYOUTS]
    if not found:
        raise ConfigError(f"{course.name} has no recipe that can be reckoned; those of {', '.join(LAYOUTS)} can")
    for name in ("recipe", "parameters", "trained", *found[0][1].memory, "in all", "TFLOP a step", "s a step", "hours"):
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for recipe, cost in found:
        seconds = cost.operations / (devices * tflops * 1e12)
        sizes = [*cost.memory.values(), sum(cost.memory.values())]
        table.add_row(
            recipe.name,
            f"{cost.parameters / 1e6:,.1f} M",
            f"{cost.trained / 1e6:,.1f} M",
            *(f"{size / 1e9:,.2f}" for size in sizes),
            f"{cost.operations / 1e12:,.3g}",
            f"{seconds:.3g}",
            f"{seconds * recipe.optimization.steps / 3600:,.3g}",
        )
    Console(highlight=False, width=180).print(table)
