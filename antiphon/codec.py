"""The codec's encoder and quantizer: wav -> 16 codes for every 80 ms, in Mimi's shape.

Strided causal convolutions bring 24 kHz to 25 steps a second, a causal transformer with a sliding window looks back
ten seconds, a last convolution halves the rate, and two residual quantizers code the result side by side: one
semantic codebook beside the acoustic ones. Code2Wav is the way back. Speaking never runs this file; it
makes the codes that the Talker is trained on, and it is trained itself.

Shapes: R rows, N samples, T frames (inside the convolutions: steps), W width, Q codebooks, K codes, D code width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from antiphon.caches import Span, WindowCache
from antiphon.config import CodecConfig
from antiphon.convolutions import CausalConv1d, Tails, conv_tails, roll, run_convolutions, tails_of
from antiphon.errors import InputError
from antiphon.layers import Attention, LayerScale, run_layers, widened
from antiphon.streaming import by_row, keep, take

DECAY = 0.99  # of a codebook's running averages, per training step
DEAD_SHARE = 0.1  # a code used less than this share of the average is dead
NEW_SHARE = 0.2  # a drawn code starts as if used this share: it follows its data at once, or dies again soon
MIN_USAGE = 1e-5  # Mimi's floor under the usage that a code's sum is divided by

# ---------------------------------------------------------------------------------------------- encoder


class ResidualBlock(nn.Module):
    """A dilated convolution through a narrower width, added to its input."""

    def __init__(self, dim: int, inner: int, kernel: int, dilation: int) -> None:
        super().__init__()
        narrow, widen = CausalConv1d(dim, inner, kernel, dilation=dilation), CausalConv1d(inner, dim, 1)
        self.block = nn.ModuleList([nn.ELU(), narrow, nn.ELU(), widen])

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[R, C, T] -> [R, C, T]."""
        return x + run_convolutions(self.block, x, tails, nn.ELU)


class SEANet(nn.Module):
    """The convolutions from samples to steps; each ratio doubles the channels."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        c, dim = config, config.num_filters
        layers: list[nn.Module] = [CausalConv1d(c.audio_channels, dim, c.kernel_size)]
        for ratio in reversed(c.upsampling_ratios):  # the config lists them as the decoder runs them
            for i in range(c.num_residual_layers):
                dilation = c.dilation_growth_rate**i
                layers.append(ResidualBlock(dim, dim // c.compress, c.residual_kernel_size, dilation))
            layers += [nn.ELU(), CausalConv1d(dim, 2 * dim, 2 * ratio, stride=ratio)]
            dim *= 2
        layers += [nn.ELU(), CausalConv1d(dim, c.hidden_size, c.last_kernel_size)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[R, 1, N] -> [R, W, T]."""
        return run_convolutions(self.layers, x, tails, nn.ELU)


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer whose branches start small."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        c, width = config, config.hidden_size
        self.self_attn = Attention(width, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        fc1 = nn.Linear(width, c.intermediate_size, bias=False)
        fc2 = nn.Linear(c.intermediate_size, width, bias=False)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.input_layernorm = nn.LayerNorm(width, c.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(width, c.norm_eps)
        self.self_attn_layer_scale = LayerScale(width, c.layer_scale_initial_scale)
        self.mlp_layer_scale = LayerScale(width, c.layer_scale_initial_scale)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], span: Span, layer: int) -> Tensor:
        """[N, W] -> [N, W], N = R * T."""
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), turn, span, layer))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """Causal transformer that sees the last `sliding_window` steps."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, cache: WindowCache | None) -> Tensor:
        """[R, T, W] -> [R, T, W]."""
        c = self.config
        return run_layers(self.layers, x, cache, c.head_dim, c.rope_theta, window=c.sliding_window)[0]


@dataclass
class CodecEncoderState(WindowCache):
    """What the encoder remembers between pieces; a fixed size, however long the recording."""

    held: Tensor = by_row(0)  # [R, samples] of the frame that is not complete
    waiting: Tensor = by_row(0)  # [R] samples held
    tails: list[Tensor] = by_row(0)  # [R, C, context] of each convolution before the transformer, in running order
    before: Tensor = by_row(0)  # [R, W, stride] the last steps that the downsampler has seen


class Downsample(nn.Module):
    """From steps to frames; repeats the first and the last step where the other convolutions put zeros."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 2 * stride, stride=stride, bias=False)
        self.stride = stride

    def forward(self, x: Tensor, state: CodecEncoderState | None) -> Tensor:
        """[R, W, T] -> [R, W, ceil(T / stride)]."""
        steps = x.shape[-1]
        first = x[..., :1].expand(-1, -1, self.stride)
        x = F.pad(x, (0, -steps % self.stride), mode="replicate")
        if state is None:
            return self.conv(torch.cat([first, x], -1))
        fresh = state.length == steps  # the transformer has just counted these: nothing came before
        state.before.copy_(torch.where(fresh[:, None, None], first, state.before))
        return self.conv(roll(state.before, x))


class CodecEncoder(nn.Module):
    """Waveform -> one latent per frame."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SEANet(config)
        self.encoder_transformer = Transformer(config)
        self.downsample = Downsample(config.hidden_size, config.latent_stride)

    def init_state(self, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> CodecEncoderState:
        """Silence before the first piece; nothing grows, so `capacity` is not used."""
        c = self.config
        heads = (c.num_key_value_heads, c.head_dim, c.sliding_window)
        cache = WindowCache.empty(c.num_hidden_layers, rows, *heads, device, dtype)
        held = torch.zeros(rows, c.frame_samples - 1, device=device, dtype=dtype)
        waiting = torch.zeros(rows, dtype=torch.long, device=device)
        tails = conv_tails(self.encoder, rows, device, dtype)
        before = torch.zeros(rows, c.hidden_size, c.latent_stride, device=device, dtype=dtype)
        return CodecEncoderState(cache.k, cache.v, cache.length, held, waiting, tails, before)

    def forward(self, wave: Tensor, state: CodecEncoderState | None = None, final: bool = False) -> Tensor:
        """Latents [R, T, W] of wave [R, N], mono samples at `sampling_rate` in pieces of any length.

        A frame is given as soon as its `frame_samples` are there; the incomplete last one comes with `final`, after
        which the rows must be reset. Attention over a whole recording at once takes memory by the square of its
        length: give a long one in pieces.

        Raises:
            CapacityError: the rows do not wait for the same number of samples.
        """
        if state is not None:
            wave = self._complete(wave, state, final)
        if not wave.shape[1]:
            return wave.new_zeros(wave.shape[0], 0, self.config.hidden_size)
        x = self.encoder(wave[:, None], tails_of(None if state is None else state.tails))
        x = self.encoder_transformer(x.transpose(1, 2), state)
        return self.downsample(x.transpose(1, 2), state).transpose(1, 2)

    def _complete(self, wave: Tensor, state: CodecEncoderState, final: bool) -> Tensor:
        """The samples that can be encoded now; the rest waits."""
        wave = take(state.held, state.waiting, wave)
        ready = wave.shape[1] - (0 if final else wave.shape[1] % self.config.frame_samples)
        keep(state.held, state.waiting, wave[:, ready:])
        return wave[:, :ready]


# -------------------------------------------------------------------------------------------- quantizer


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of latents in training."""

    latents: Tensor  # [R, T, W] quantized; the gradient passes as if they were not
    semantic: Tensor  # [R, T, W] the share of the first (semantic) codebooks alone, to be taught what is said
    codes: Tensor  # [R, T, Q] int64
    commit_loss: Tensor  # [Q] mean squared distance to the chosen codes; pulls the encoder towards them
    usage: Tensor  # [Q] share of each codebook that this batch used


class Codebook(nn.Module):
    """Code vectors as running averages of what was assigned to them: `embed_sum` over `cluster_usage`."""

    embed_sum: Tensor  # [K, D]
    cluster_usage: Tensor  # [K]
    initialized: Tensor  # [1] 0 until the codes have been drawn from data; all of them are zero so far

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("initialized", torch.zeros(1))

    @property
    def vectors(self) -> Tensor:
        """Code vectors [K, D], in float32 at least."""
        return widened(self.embed_sum) / widened(self.cluster_usage).clamp(min=MIN_USAGE)[:, None]

    def forward(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Nearest codes [N] of x [N, D] and their vectors [N, D]; with a generator the codebook learns from x."""
        seen = x if generator is None else _everywhere(x)
        if generator is not None and not self.initialized:
            average = self.cluster_usage.new_tensor(len(seen) / len(self.cluster_usage))
            self._draw(torch.ones_like(self.cluster_usage, dtype=torch.bool), average, seen, generator)
            self.initialized.fill_(1)
        vectors = self.vectors
        # as a matrix product this would round differently with the number of rows, and dead codes are exact ties
        codes = torch.cdist(x, vectors, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
        if generator is not None:
            self._learn(seen, _everywhere(codes), generator)
        return codes, vectors[codes]

    def _learn(self, x: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """One step of the running averages; dead codes move to vectors of this batch."""
        counts = torch.bincount(codes, minlength=len(self.cluster_usage))
        sums = torch.zeros_like(self.embed_sum).index_add_(0, codes, x.to(self.embed_sum.dtype))
        self.cluster_usage.lerp_(counts.to(self.cluster_usage.dtype), 1 - DECAY)
        self.embed_sum.lerp_(sums, 1 - DECAY)
        average = self.cluster_usage.mean()
        self._draw(self.cluster_usage < DEAD_SHARE * average, average, x, generator)

    def _draw(self, chosen: Tensor, average: Tensor, x: Tensor, generator: torch.Generator) -> None:
        """Put the `chosen` [K] codes at vectors drawn from x [N, D]; `average` is the usage of a code."""
        # all are drawn, needed or not: neither the random numbers nor the host then wait for what is dead
        order = torch.randperm(len(x), generator=generator, device=generator.device)
        drawn = x[order[torch.arange(len(chosen), device=order.device) % len(x)].to(x.device)]
        usage = NEW_SHARE * average
        self.embed_sum.copy_(torch.where(chosen[:, None], drawn * usage, self.embed_sum))
        self.cluster_usage.copy_(torch.where(chosen, usage, self.cluster_usage))


def _everywhere(x: Tensor) -> Tensor:
    """The rows of x in all processes that train together, as many in each: codebooks stay the same in all of them."""
    if not distributed.is_available() or not distributed.is_initialized():
        return x
    each = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(each, x.contiguous())
    return torch.cat(each)


class ResidualQuantizer(nn.Module):
    """Codebooks in a row, each coding what the ones before it left over."""

    def __init__(self, config: CodecConfig, num_quantizers: int) -> None:
        super().__init__()
        width, dim = config.hidden_size, config.vector_quantization_hidden_dimension
        self.input_proj = None if width == dim else nn.Conv1d(width, dim, 1, bias=False)
        self.output_proj = None if width == dim else nn.Conv1d(dim, width, 1, bias=False)
        books = (Codebook(config.codebook_size, dim) for _ in range(num_quantizers))
        self.layers = nn.ModuleList(nn.ModuleDict({"codebook": book}) for book in books)

    def encode(self, latents: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Latents [R, T, W] -> codes [R, T, Q] int64 of the first `num_quantizers` codebooks."""
        x = _pointwise(self.input_proj, latents)
        return torch.stack([codes for _, codes, _ in self._stages(x, num_quantizers)], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [R, T, Q], of all codebooks or the first few -> latents [R, T, W]."""
        books = self._codebooks()
        total = torch.stack([books[i].vectors[codes[..., i]] for i in range(codes.shape[-1])]).sum(0)
        return _pointwise(self.output_proj, total.to(books[0].embed_sum.dtype))

    def tables(self) -> Tensor:
        """What each code of each codebook adds to the latents [Q, K, W]."""
        return _pointwise(self.output_proj, torch.stack([book.vectors for book in self._codebooks()]))

    def project(self, latents: Tensor) -> Tensor:
        """Latents [R, T, W] as codebooks without end would give them [R, T, W]."""
        return _pointwise(self.output_proj, _pointwise(self.input_proj, latents))

    def forward(
        self, latents: Tensor, generator: torch.Generator | None = None, num_quantizers: int | None = None
    ) -> Quantized:
        """Quantize latents [R, T, W] for training; with `num_quantizers` the codebooks after these are left out.

        In training mode the codebooks learn from the batch and `generator` draws the vectors that start or revive
        codes. In eval mode nothing changes.

        Raises:
            InputError: training mode without a generator.
        """
        if self.training and generator is None:
            raise InputError("codebooks draw from the batch while they train; pass a torch.Generator, or call eval()")
        x = _pointwise(self.input_proj, latents)
        stages = list(self._stages(x, num_quantizers, generator if self.training else None))
        residuals, codes, quantized = (torch.stack(parts) for parts in zip(*stages, strict=True))
        y = x + (quantized.sum(0) - x).detach()
        y = _pointwise(self.output_proj, y).to(latents.dtype)
        books = self._codebooks()[: len(stages)]
        used = [len(c.unique()) / len(book.cluster_usage) for c, book in zip(codes, books, strict=True)]
        distance = (residuals - quantized).square().mean((1, 2, 3))
        return Quantized(y, y, codes.movedim(0, -1), distance, distance.new_tensor(used))

    def _stages(
        self, x: Tensor, num_quantizers: int | None, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each codebook: what is left of x [R, T, D], its codes [R, T], their vectors [R, T, D]."""
        residual, drawn = widened(x), False
        for book in self._codebooks()[:num_quantizers]:
            # one codebook a batch starts: those drawn from a batch leave nothing of it for the next to be drawn from
            learner = None if drawn and not book.initialized else generator
            drawn = drawn or not book.initialized
            codes, vectors = book(residual.detach().flatten(0, 1), learner)
            quantized = vectors.view_as(residual)
            yield residual, codes.view(residual.shape[:-1]), quantized
            residual = residual - quantized

    def _codebooks(self) -> list[Codebook]:
        return [module for module in self.modules() if isinstance(module, Codebook)]


def _pointwise(conv: nn.Conv1d | None, x: Tensor) -> Tensor:
    """A convolution of kernel 1 on x [R, T, D], stored as one because Mimi's is; also over no frames at all."""
    return x if conv is None else F.linear(x.to(conv.weight.dtype), conv.weight.squeeze(-1))


class SplitQuantizer(nn.Module):
    """A semantic quantizer beside an acoustic one, on the same latents; what they give is summed."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.total, self.semantic = config.num_quantizers, config.num_semantic_quantizers
        self.semantic_residual_vector_quantizer = ResidualQuantizer(config, self.semantic)
        self.acoustic_residual_vector_quantizer = ResidualQuantizer(config, self.total - self.semantic)

    def encode(self, latents: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Latents [R, T, W] -> codes [R, T, Q] int64, semantic ones first; Q is `num_quantizers` or all.

        Raises:
            InputError: more codebooks than there are, or fewer than the semantic ones.
        """
        acoustic = self._acoustic(num_quantizers)
        codes = self.semantic_residual_vector_quantizer.encode(latents)
        if not acoustic:
            return codes
        return torch.cat([codes, self.acoustic_residual_vector_quantizer.encode(latents, acoustic)], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [R, T, Q], of all codebooks or the first few -> latents [R, T, W].

        Raises:
            InputError: more codebooks than there are, or fewer than the semantic ones.
        """
        semantic, acoustic = codes.split([self.semantic, self._acoustic(codes.shape[-1])], -1)
        x = self.semantic_residual_vector_quantizer.decode(semantic)
        return x + self.acoustic_residual_vector_quantizer.decode(acoustic) if acoustic.shape[-1] else x

    def tables(self) -> Tensor:
        """What each code of each codebook adds to the latents [Q, K, W], semantic ones first."""
        parts = (self.semantic_residual_vector_quantizer, self.acoustic_residual_vector_quantizer)
        return torch.cat([part.tables() for part in parts])

    def project(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [R, T, W] as codebooks without end would give them, and the semantic share of that.

        Training begins with these, so that codebooks are drawn from an encoder that already says something.
        """
        semantic = self.semantic_residual_vector_quantizer.project(latents)
        return semantic + self.acoustic_residual_vector_quantizer.project(latents), semantic

    def forward(
        self, latents: Tensor, generator: torch.Generator | None = None, num_quantizers: int | None = None
    ) -> Quantized:
        """As `ResidualQuantizer.forward`; quantizer dropout is a `num_quantizers` that the caller draws per batch."""
        acoustic = self._acoustic(num_quantizers)
        a = self.semantic_residual_vector_quantizer(latents, generator)
        if not acoustic:
            return a
        b = self.acoustic_residual_vector_quantizer(latents, generator, acoustic)
        codes, commit_loss = torch.cat([a.codes, b.codes], -1), torch.cat([a.commit_loss, b.commit_loss])
        return Quantized(a.latents + b.latents, a.latents, codes, commit_loss, torch.cat([a.usage, b.usage]))

    def _acoustic(self, num_quantizers: int | None) -> int:
        count = self.total if num_quantizers is None else num_quantizers
        if not self.semantic <= count <= self.total:
            raise InputError(f"{count} codebooks were asked for; this codec has {self.semantic} to {self.total}")
        return count - self.semantic


class Codec(nn.Module):
    """Waveform -> codes: the encoder and its quantizer."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.encoder = CodecEncoder(config)
        self.quantizer = SplitQuantizer(config)

    def init_state(self, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> CodecEncoderState:
        """The encoder's state; quantizing remembers nothing."""
        return self.encoder.init_state(rows, capacity, device, dtype)

    @torch.no_grad()
    def forward(
        self,
        wave: Tensor,
        state: CodecEncoderState | None = None,
        final: bool = False,
        *,
        num_quantizers: int | None = None,
    ) -> Tensor:
        """Codes [R, T, Q] int64 of wave [R, N], in pieces as `CodecEncoder.forward` takes them."""
        return self.quantizer.encode(self.encoder(wave, state, final), num_quantizers)

    def encode(self, wave: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Codes [R, T, Q] of whole recordings [R, N], of the first `num_quantizers` codebooks or all."""
        return self(wave, num_quantizers=num_quantizers)
