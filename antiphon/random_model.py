"""Models with random weights: what is fast or slow about a shape can be measured with nothing downloaded.

Weights have a standard deviation of 1/sqrt(fan-in), biases are small, scales are not, and the last convolution is
scaled so that sound has an rms of 0.2: over all-zero or saturating values nothing would be chosen, and nothing heard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from antiphon.code2wav import Code2Wav, ConvNeXtBlock, SnakeBeta
from antiphon.config import OmniConfig
from antiphon.config_json import read_config
from antiphon.generate import Omni
from antiphon.layers import LayerScale, RMSNorm
from antiphon.tokenizer import byte_tokenizer
from antiphon.weights import build, find_checkpoint, find_tokenizer

RELEASE = Path(__file__).parent / "release"  # the config.json of Qwen3-Omni-30B-A3B-Instruct, without vision


def shape_of(name: str | Path) -> tuple[Path, OmniConfig]:
    """The folder and the configuration of a shape: `release`, `tiny`, or a folder with a config.json.

    Raises:
        ConfigError, WeightsError: no such folder, or no config.json of this kind of model in it.
    """
    folder = RELEASE if str(name) == "release" else find_checkpoint(name)
    return folder, read_config(folder)


def random_model(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Omni:
    """A model of a shape (see `shape_of`) with random weights, made where it is to run.

    Where the folder has no tokenizer, bytes stand in for tokens. Answers do not end by chance, but at their limits.

    Raises:
        ConfigError, WeightsError: no such shape. InputError: no such device or type, or not enough memory.
    """
    folder, config = shape_of(name)
    tokenizer = find_tokenizer(folder, config) or byte_tokenizer(config)
    model = build(Omni, config, tokenizer, device, dtype)
    randomize(model)
    model.thinker.lm_head.weight[config.im_end_token_id] = 0  # a score of 0 is never among the best
    if model.speech is not None and config.talker is not None:
        model.speech.talker.codec_head.weight[config.talker.codec_eos_token_id] = 0
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what was drawn in is free for caches
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of std 1/sqrt(fan-in), norms and scales near their neutral values, nothing zero."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64, device=like.device)
        return drawn.mul_(scale).to(like)

    for where, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, LayerScale) or (isinstance(module, ConvNeXtBlock) and name == "gamma"):
                p.copy_(0.3 + noise(p, 0.05))
            elif isinstance(module, RMSNorm | nn.LayerNorm) and name == "weight":
                sharp = where.endswith(("q_norm", "k_norm"))  # so that single positions count, not only their mean
                p.copy_((2 if sharp else 1) + noise(p, 0.1))
            elif isinstance(module, SnakeBeta) or p.ndim == 1:  # SnakeBeta keeps logarithms: alpha and beta about 1
                p.copy_(noise(p, 0.1))
            elif isinstance(module, nn.Embedding):
                p.copy_(noise(p, 0.1))  # small, so that what was said before counts
            elif isinstance(module, nn.ConvTranspose1d):
                p.copy_(noise(p, (p.shape[0] * p.shape[2] / module.stride[0]) ** -0.5))
            elif isinstance(module, nn.Conv2d):  # twice as large, so that AuT hears more than its own positions
                p.copy_(noise(p, 2 * (p.numel() / len(p)) ** -0.5))
            elif isinstance(module, nn.Conv1d):  # a branch is smaller than its trunk, or sin² would turn many times
                p.copy_(noise(p, (0.3 if where.endswith("conv2.conv") else 1) * (p.numel() / len(p)) ** -0.5))
            else:  # linear maps, routers and stacks of experts
                p.copy_(noise(p, p.shape[-1] ** -0.5))
    for module in model.modules():
        if isinstance(module, Code2Wav):
            _calm(module, generator)


def _calm(decoder: Code2Wav, generator: torch.Generator) -> None:
    """Scale the last convolution so that sound has no offset and an rms of 0.2."""
    last: Any = decoder.decoder[-1]
    last.conv.weight *= 1e-3  # far from the clamp while it is measured
    shape = (1, 64, decoder.config.num_quantizers)
    codes = torch.randint(0, decoder.config.codebook_size, shape, generator=generator, device=generator.device)
    wave = decoder(codes)
    scale = 0.2 / wave.std()
    last.conv.bias -= wave.mean()
    last.conv.weight *= scale
    last.conv.bias *= scale
