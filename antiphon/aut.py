"""AuT: log-mel -> audio embeddings, 13 tokens a second, in attention windows of 1, 2, 4 or 8 seconds.

A second of mel is convolved on its own (three stride-2 convolutions: 100 frames -> 13 tokens), positions restart in
every second, and attention runs inside a window and nowhere else. A closed window is final; an open one waits.
The encoder is served; the text decoder below only training uses, and it is dropped afterwards.

Shapes: B clips (or R rows), T mel frames, F mel bins, N windows, S tokens of a window, W width, Q text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.audio import QUIETEST, normalize
from antiphon.caches import KVCache, open_span
from antiphon.config import AudioConfig
from antiphon.layers import Attention, RMSNorm, attend, span_rotary
from antiphon.streaming import State, by_row, in_step, keep, take

LOG_FLOOR = math.log10(QUIETEST)  # raw log-mel of silence
CONVOLVED_AT_ONCE = 64  # chunks: bounds the memory of a 40-minute clip


class WideAttention(nn.Module):
    """Multi-head attention with biases and no positions: AuT's own, and its text decoder's view of the audio."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of x [B, S, W]."""
        return self._split(self.k_proj(x)), self._split(self.v_proj(x))

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x [B, T, W] over `memory` where mask [B, 1, 1, S] allows -> [B, T, W]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        return self.out_proj(attend(q, *memory, mask).view_as(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer, attending in both directions inside its window."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.self_attn = WideAttention(config.d_model, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[N, S, W] -> [N, S, W]."""
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, self.self_attn.memory(y), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


@dataclass
class AuTState(State):
    """Mel frames of the open window, and how loud each row has been."""

    held: Tensor = by_row(0)  # [R, window frames, F] raw log-mel that waits for its window to close
    count: Tensor = by_row(0)  # [R] frames held
    windows: Tensor = by_row(0)  # [R] windows closed
    loudness: Tensor = by_row(0)  # [R] peak so far above the floor of the logarithm
    window: int = 0  # seconds (chunks) per window


@dataclass(frozen=True)
class Windows:
    """Windows that have closed, ready to be heard."""

    x: Tensor  # [B, n, frames, F] log-mel above its floor, scaled
    valid: Tensor  # [B, n] frames that are sound
    alone: Tensor  # [B, n] a clip shorter than a chunk, which is convolved as it is; other tails are padded to a chunk


class AuT(nn.Module):
    """The audio encoder that is served."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = c = config
        channels = c.downsample_hidden_size
        for i in range(c.conv_layers):
            self.add_module(f"conv2d{i + 1}", nn.Conv2d(channels if i else 1, channels, 3, stride=2, padding=1))
        self.conv_out = nn.Linear(channels * c.conv_bins, c.d_model, bias=False)
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.encoder_layers))
        self.ln_post = nn.LayerNorm(c.d_model)
        self.proj1 = nn.Linear(c.d_model, c.d_model)
        self.proj2 = nn.Linear(c.d_model, c.output_dim)

    def init_state(self, rows: int, device: torch.device, dtype: torch.dtype, window: int | None = None) -> AuTState:
        """Nothing heard yet; `window` in seconds, as released when None."""
        c, window = self.config, window or self.config.window_chunks

        def count() -> Tensor:
            return torch.zeros(rows, dtype=torch.long)

        held = torch.zeros(rows, window * c.chunk_frames, c.num_mel_bins, device=device, dtype=dtype)
        return AuTState(held, count(), count(), torch.zeros(rows, device=device, dtype=dtype), window)

    def forward(
        self,
        mel: Tensor,
        state: AuTState | None = None,
        final: bool = False,
        *,
        window: int | None = None,
        frames: Tensor | None = None,
        peak: Tensor | None = None,
    ) -> Tensor:
        """Audio embeddings [B, tokens, output_dim] of raw log-mel [B, T, F], of every window that has closed.

        `window` (seconds) and `frames` [B] (true lengths in a padded batch) go with whole clips. `peak` [B] is the
        loudest log-mel value the floor refers to: the whole file's gives the released front end; by default it is
        the peak so far, window by window, which is the same whenever no later window is louder.
        """
        return self.project(self.encode(mel, state, final, window=window, frames=frames, peak=peak))

    def project(self, x: Tensor) -> Tensor:
        """Encoder states [B, tokens, W] -> the Thinker's space [B, tokens, output_dim]."""
        return self.proj2(F.gelu(self.proj1(x)))

    def encode(
        self,
        mel: Tensor,
        state: AuTState | None = None,
        final: bool = False,
        *,
        window: int | None = None,
        frames: Tensor | None = None,
        peak: Tensor | None = None,
    ) -> Tensor:
        """Encoder states [B, tokens, W], as `forward` before the projection (what the text decoder reads)."""
        windows = self.close(mel, state, final, window=window, frames=frames, peak=peak)
        if windows is None:
            return self.conv_out.weight.new_zeros(mel.shape[0], 0, self.config.d_model)
        return self.states(windows)

    def close(
        self,
        mel: Tensor,
        state: AuTState | None = None,
        final: bool = False,
        *,
        window: int | None = None,
        frames: Tensor | None = None,
        peak: Tensor | None = None,
    ) -> Windows | None:
        """The windows that raw log-mel [B, T, F] closes, as `forward` hears them; None where there are none."""
        if state is None:
            state, final = self.init_state(mel.shape[0], mel.device, mel.dtype, window), True
        x = take(state.held, state.count, mel)
        size = state.held.shape[1]
        ready = x.shape[1] if final else x.shape[1] // size * size
        keep(state.held, state.count, x[:, ready:])
        if not ready:
            return None

        rows, count = x.shape[0], -(-ready // size)
        x = F.pad(x[:, :ready], (0, 0, 0, count * size - ready), value=LOG_FLOOR).unflatten(1, (count, size))
        length = torch.full((rows,), ready) if frames is None else frames.cpu()
        valid = (length[:, None] - torch.arange(count) * size).clamp(0, size)
        alone = torch.zeros_like(valid, dtype=torch.bool)
        alone[:, 0] = (valid[:, 0] < self.config.chunk_frames) & (in_step(state.windows) == 0)
        if frames is not None:  # what lies beyond a clip is not heard, so it is not the loudest either
            x = x.masked_fill(
                (torch.arange(size) >= valid[..., None])[..., None].to(x.device, non_blocking=True), LOG_FLOOR
            )
        x = normalize(x, self._peaks(x, state) if peak is None else peak[:, None, None, None])
        state.windows += count
        return Windows(x, valid, alone)

    def states(self, windows: Windows) -> Tensor:
        """Encoder states [B, tokens, W] of windows; of a batch, as many tokens as the longest clip has."""
        x, valid, alone = windows.x.flatten(0, 1), windows.valid.flatten(), windows.alone.flatten()
        y = self._windows(x, valid, alone).unflatten(0, windows.valid.shape)
        return y.flatten(1, 2)[:, : self.config.tokens(int(windows.valid.sum(1).max()))]

    def _peaks(self, x: Tensor, state: AuTState) -> Tensor:
        """Peak so far [B, windows, 1, 1] at the end of each window of x [B, windows, size, F]."""
        loudest = torch.cat([state.loudness[:, None], x.amax((2, 3)) - LOG_FLOOR], 1).cummax(1).values[:, 1:]
        state.loudness.copy_(loudest[:, -1])
        return loudest[..., None, None] + LOG_FLOOR

    def _windows(self, x: Tensor, valid: Tensor, alone: Tensor) -> Tensor:
        """Windows [N, frames, F] of which `valid` [N] frames are sound -> states [N, S, W], S the longest's tokens."""
        c = self.config
        chunks = x.unflatten(1, (-1, c.chunk_frames)).flatten(0, 1)
        per_window = chunks.shape[0] // x.shape[0]
        sound = (valid[:, None] - torch.arange(per_window) * c.chunk_frames).clamp(0, c.chunk_frames).flatten()
        edge = torch.where(alone.repeat_interleave(per_window), sound, c.chunk_frames)
        used = sound.nonzero().flatten()
        tokens = self.conv_out.weight.new_zeros(chunks.shape[0], c.chunk_tokens, c.d_model)
        for part in used.split(CONVOLVED_AT_ONCE):
            silence = (torch.arange(c.chunk_frames) >= sound[part, None])[..., None].to(x.device, non_blocking=True)
            place = part.to(x.device, non_blocking=True)
            piece = chunks[place].masked_fill(silence, 0)
            inside = int(edge[part].min()) < c.chunk_frames  # of some chunk: usually there is nothing to cut off
            own = edge[part].to(x.device, non_blocking=True) if inside else None
            tokens[place] = self._convolve(piece.to(tokens.dtype), own).to(tokens.dtype)
        lengths = torch.tensor([c.tokens(int(v)) for v in valid])
        longest = int(lengths.max())
        mask = None
        if int(lengths.min()) < longest:  # an empty window may look at its first token, so that no row is all masked
            mask = (torch.arange(longest) < lengths.clamp(min=1)[:, None])[:, None, None].to(
                x.device, non_blocking=True
            )
        return self._attend(tokens.unflatten(0, (-1, per_window)).flatten(1, 2)[:, :longest], mask)

    def hear(self, x: Tensor, valid: Tensor, alone: Tensor) -> Tensor:
        """Windows [N, frames, F] of which `valid` [N] frames are sound -> embeddings [N, S, output_dim].

        As `forward` hears them, but nothing hangs on numbers that only the device knows, so that it can be recorded:
        every window has all its tokens, and those after the sound are nobody's.
        """
        c, device = self.config, x.device
        chunks = x.unflatten(1, (-1, c.chunk_frames)).flatten(0, 1)
        per_window = chunks.shape[0] // x.shape[0]
        starts, frame = (torch.arange(n, device=device) for n in (per_window, c.chunk_frames))
        sound = (valid[:, None] - starts * c.chunk_frames).clamp(0, c.chunk_frames).flatten()
        edge = torch.where(alone.repeat_interleave(per_window), sound, c.chunk_frames)
        chunks = chunks.masked_fill((frame >= sound[:, None])[..., None], 0).to(self.conv_out.weight.dtype)
        tokens = self._convolve(chunks, edge).masked_fill(sound[:, None, None] == 0, 0)
        tokens = tokens.unflatten(0, (-1, per_window)).flatten(1, 2)
        rest = valid % c.chunk_frames
        for _ in range(c.conv_layers):
            rest = (rest + 1) // 2
        lengths = valid // c.chunk_frames * c.chunk_tokens + rest
        mask = torch.arange(tokens.shape[1], device=device) < lengths.clamp(min=1)[:, None]
        return self.project(self._attend(tokens, mask[:, None, None]))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Convolved windows [N, S, W] -> states; a window looks where its mask [N, 1, 1, S] allows."""
        for layer in self.layers:
            x = layer(x, mask)
        return self.ln_post(x)

    def _convolve(self, x: Tensor, edge: Tensor | None) -> Tensor:
        """Chunks [n, frames, F] -> tokens [n, chunk tokens, W]; nothing is heard past `edge` [n] frames."""
        x = x.transpose(1, 2)[:, None]
        for i in range(self.config.conv_layers):
            x = F.gelu(self.get_submodule(f"conv2d{i + 1}")(x))
            if edge is not None:
                edge = (edge + 1) // 2
                x = x * (torch.arange(x.shape[-1], device=x.device) < edge[:, None])[:, None, None]
        x = self.conv_out(x.permute(0, 3, 1, 2).flatten(2))
        return x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions [length, width]: sines in the first half, cosines in the second, periods 1 to 10000."""
    half = width // 2
    scale = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=device, dtype=torch.float32))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * scale
    return torch.cat([angles.sin(), angles.cos()], 1)


# ------------------------------------------------------------------------------------ training only


@dataclass(frozen=True)
class TextDecoderConfig:
    """The decoder that AuT is trained with; the papers give only its depth (8 layers)."""

    vocab_size: int
    layers: int
    heads: int
    ffn_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


class TextDecoderLayer(nn.Module):
    """Causal self-attention over the text, cross-attention to the audio, feed-forward."""

    def __init__(self, config: TextDecoderConfig, width: int) -> None:
        super().__init__()
        self.self_attn_norm = RMSNorm(width, config.norm_eps)
        self.self_attn = Attention(width, config.heads, config.heads, width // config.heads)
        self.cross_attn_norm = RMSNorm(width, config.norm_eps)
        self.cross_attn = WideAttention(width, config.heads)
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.fc1 = nn.Linear(width, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, width)


class TextDecoder(nn.Module):
    """AuT's other half in training: text so far and encoder states -> logits of the next text token."""

    def __init__(self, config: TextDecoderConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(TextDecoderLayer(config, width) for _ in range(config.layers))
        self.norm = RMSNorm(width, config.norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def init_state(self, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `rows` transcripts of at most `capacity` tokens."""
        c = self.config
        return KVCache.empty(c.layers, rows, c.heads, self.width // c.heads, capacity, device, dtype)

    def memory(self, audio: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of encoder states [B, S, W] for each layer; computed once per clip."""
        return [layer.cross_attn.memory(audio) for layer in self._layers()]

    def forward(
        self,
        ids: Tensor,
        memory: list[tuple[Tensor, Tensor]],
        state: KVCache | None = None,
        final: bool = False,
        *,
        heard: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, Q, V] after each of ids [B, Q]; `heard` [B, S] is False where a padded batch has no audio."""
        x = self.embed_tokens(ids)
        span, head_dim = open_span(state, x), self.width // self.config.heads
        turn = span_rotary(span, ids.shape[0], None, head_dim, self.config.rope_theta, x.dtype)
        mask = None if heard is None else heard[:, None, None]
        for i, layer in enumerate(self._layers()):
            x = x + layer.self_attn(layer.self_attn_norm(x).flatten(0, 1), turn, span, i).view_as(x)
            x = x + layer.cross_attn(layer.cross_attn_norm(x), memory[i], mask)
            x = x + layer.fc2(F.gelu(layer.fc1(layer.mlp_norm(x))))
        span.close()
        return self.lm_head(self.norm(x))

    def _layers(self) -> list[TextDecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, TextDecoderLayer)]
