"""Code2Wav: 16 codes a frame -> 80 ms of sound, from left context only.

Codes are embedded and averaged, pass a small causal transformer with a sliding window, are upsampled twice and then
run through a convolutional decoder with SnakeBeta activations. Everything is causal and transposed
convolutions are cropped on the right only, so frame n gives exactly its samples and needs no frame after it.

Shapes: R rows, T frames, Q codebooks, C channels, W width; inside the convolutions tensors are [R, C, time].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.binding import Bound, Part, bound
from antiphon.caches import Span, WindowCache
from antiphon.config import Code2WavConfig
from antiphon.convolutions import CausalConv1d, CausalTransposedConv1d, Tails, bind_convolutions, conv_tails, tails_of
from antiphon.kernels import usable
from antiphon.layers import Attention, LayerScale, RMSNorm, SwiGLU, Turn, run_layers
from antiphon.streaming import by_row

DILATIONS = (1, 3, 9)


class SnakeBeta(Part):
    """x + sin²(αx) / β per channel, both stored as logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def bind(self) -> Bound:
        """As `forward`."""
        alpha, scale = self.alpha.exp()[:, None], 1 / (self.beta.exp()[:, None] + 1e-9)
        if usable(alpha):
            from antiphon.kernels.snake import snake

            return lambda x: snake(x, alpha, scale)

        def run(x: Tensor) -> Tensor:
            wave = (x * alpha).sin()
            return torch.addcmul(x, wave * scale, wave)

        return run

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, T] -> [R, C, T]."""
        return self.bind()(x)


class WindowLayer(Part):
    """Transformer layer whose branches start small."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        width, scale = config.hidden_size, config.layer_scale_initial_scale
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.self_attn = Attention(width, *heads, bias=config.attention_bias)
        self.mlp = SwiGLU(width, config.intermediate_size)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.self_attn_layer_scale = LayerScale(width, scale)
        self.mlp_layer_scale = LayerScale(width, scale)

    def bind(self) -> Bound:
        """As `forward`."""
        before, after = bound(self.input_layernorm), bound(self.post_attention_layernorm)
        attention, mlp = bound(self.self_attn), bound(self.mlp)
        attention_scale, mlp_scale = self.self_attn_layer_scale.scale, self.mlp_layer_scale.scale

        def run(x: Tensor, turn: Turn, span: Span, layer: int) -> Tensor:
            x = torch.addcmul(x, attention_scale, attention(before(x), turn, span, layer))
            return torch.addcmul(x, mlp_scale, mlp(after(x)))

        return run

    def forward(self, x: Tensor, turn: Turn, span: Span, layer: int) -> Tensor:
        """[N, W] -> [N, W], N = R * T."""
        return self.bind()(x, turn, span, layer)


class WindowTransformer(Part):
    """Causal transformer that sees the last `sliding_window` frames."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(WindowLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def bind(self) -> Bound:
        """As `forward`."""
        layers, norm, c = [bound(layer) for layer in self.layers], bound(self.norm), self.config
        return lambda x, cache: norm(run_layers(layers, x, cache, c.head_dim, c.rope_theta, window=c.sliding_window)[0])

    def forward(self, x: Tensor, cache: WindowCache | None) -> Tensor:
        """[R, T, W] -> [R, T, W]."""
        return self.bind()(x, cache)


class ConvNeXtBlock(Part):
    """Depthwise causal convolution, then a feed-forward block on each step."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = CausalConv1d(dim, dim, 7, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def bind(self) -> Bound:
        """As `forward`."""
        depthwise, norm, gamma = bound(self.dwconv), self.norm, self.gamma
        widen, narrow = self.pwconv1, self.pwconv2

        def run(x: Tensor, tails: Tails) -> Tensor:
            y = norm(depthwise(x, tails).transpose(1, 2))
            return torch.addcmul(x.transpose(1, 2), gamma, narrow(F.gelu(widen(y)))).transpose(1, 2)

        return run

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[R, C, T] -> [R, C, T]."""
        return self.bind()(x, tails)


class ResidualUnit(Part):
    """Dilated convolution between two activations, added to its input."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(dim)
        self.conv1 = CausalConv1d(dim, dim, 7, dilation=dilation)
        self.act2 = SnakeBeta(dim)
        self.conv2 = CausalConv1d(dim, dim, 1)

    def bind(self) -> Bound:
        """As `forward`."""
        act1, conv1, act2, conv2 = (bound(part) for part in (self.act1, self.conv1, self.act2, self.conv2))
        return lambda x, tails: x + conv2(act2(conv1(act1(x), tails)), tails)

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[R, C, T] -> [R, C, T]."""
        return self.bind()(x, tails)


class DecoderBlock(Part):
    """Upsampling by `rate`, then three residual units; channels halve."""

    def __init__(self, inputs: int, outputs: int, rate: int) -> None:
        super().__init__()
        units = [ResidualUnit(outputs, dilation) for dilation in DILATIONS]
        up = CausalTransposedConv1d(inputs, outputs, 2 * rate, rate)
        self.block = nn.ModuleList([SnakeBeta(inputs), up, *units])

    def bind(self) -> Bound:
        """As `forward`."""
        return bind_convolutions(self.block, SnakeBeta)

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[R, C, T] -> [R, C / 2, T * rate]."""
        return self.bind()(x, tails)


@dataclass
class Code2WavState(WindowCache):
    """The transformer's window and the tail of every convolution: a fixed size, however long the answer."""

    tails: list[Tensor] = by_row(0)  # [R, C, context] each, in running order


class Code2Wav(Part):
    """The decoder from codes to waveform."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.config = c = config
        self.code_embedding = nn.Embedding(c.codebook_size * c.num_quantizers, c.hidden_size)
        self.pre_transformer = WindowTransformer(c)
        self.upsample = nn.ModuleList(
            nn.ModuleList([CausalTransposedConv1d(c.hidden_size, c.hidden_size, r, r), ConvNeXtBlock(c.hidden_size)])
            for r in c.upsampling_ratios
        )
        widths = [c.decoder_dim // 2**i for i in range(len(c.upsample_rates) + 1)]
        blocks = [DecoderBlock(widths[i], widths[i + 1], rate) for i, rate in enumerate(c.upsample_rates)]
        first, last = CausalConv1d(c.hidden_size, c.decoder_dim, 7), CausalConv1d(widths[-1], 1, 7)
        self.decoder = nn.ModuleList([first, *blocks, SnakeBeta(widths[-1]), last])

    def init_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> Code2WavState:
        """Silence before the first frame."""
        c = self.config
        heads = (c.num_key_value_heads, c.head_dim, c.sliding_window)
        cache = WindowCache.empty(c.num_hidden_layers, rows, *heads, device, dtype)
        return Code2WavState(cache.k, cache.v, cache.length, conv_tails(self, rows, device, dtype))

    def bind(self) -> Bound:
        """As `forward`."""
        table, transformer, c = self.code_embedding.weight, bound(self.pre_transformer), self.config
        offsets = torch.arange(c.num_quantizers, device=table.device) * c.codebook_size
        stages = [
            bind_convolutions(s, SnakeBeta) for s in (*self.upsample, self.decoder) if isinstance(s, nn.ModuleList)
        ]

        def run(codes: Tensor, state: Code2WavState | None = None, final: bool = False) -> Tensor:
            x = F.embedding(codes + offsets, table).mean(2)
            x = transformer(x, state).transpose(1, 2)
            tails = tails_of(None if state is None else state.tails)
            for stage in stages:
                x = stage(x, tails)
            return x[:, 0].clamp(-1, 1)

        return run

    def forward(self, codes: Tensor, state: Code2WavState | None = None, final: bool = False) -> Tensor:
        """Codes [R, T, Q] -> waveform [R, T * frame samples] in [-1, 1]."""
        return self.bind()(codes, state, final)
