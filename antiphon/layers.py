"""Computations that several boxes share, each once: norms, rotary positions, attention, SwiGLU, experts.

Modules carry the names of the released checkpoint. Norms, rotary positions and routers compute in at least float32,
never less than their input (a float64 model stays float64): in bfloat16, MTP's would be heard.

Shapes: B batch, T time, W model width, H heads, K key/value heads, D head size, E experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.binding import Bound, Part, bound
from antiphon.caches import CACHE_BLOCK, Cache, JoinedSpan, KVCache, PlacedSpan, Span, open_span
from antiphon.config import DecoderConfig
from antiphon.kernels import usable

COPIED_AT_MOST = 1 << 17  # numbers in matrices of experts that are copied together rather than used in turn
COPIED_ON_CUDA = 1 << 27  # where the host would have to wait to learn whose turn it is, which no graph can


Turn: TypeAlias = tuple[Tensor, Tensor]  # cosines and signed sines, as `rotary` gives them


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNorm(Part):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def bind(self) -> Bound:
        """[…, dim] -> […, dim]."""
        weight, eps = self.weight, self.eps
        if usable(weight):
            from antiphon.kernels.norms import rms_norm

            return lambda x: rms_norm(x, weight, eps)
        unit = unit_rms(weight, eps)
        return lambda x: unit(x) * weight

    def forward(self, x: Tensor) -> Tensor:
        """[…, dim] -> […, dim]."""
        return self.bind()(x)


def unit_rms(like: Tensor, eps: float) -> Bound:
    """The division of x [.., D] by its root mean square, for x of the size and type of `like` [D].

    Three kernels; F.rms_norm is a dozen on a CPU, half the time of a step.
    """
    root, dtype = like.shape[-1] ** 0.5, torch.promote_types(like.dtype, torch.float32)
    zero, floor = constant(0.0, like.device, dtype), constant(root * eps**0.5, like.device, dtype)

    def unit(x: Tensor) -> Tensor:
        wide = widened(x)
        length = torch.hypot(torch.linalg.vector_norm(wide, 2, -1, True), floor)
        y = torch.addcdiv(zero, wide, length, value=root)
        return y if wide is x else y.to(x.dtype)

    return unit


@lru_cache
def constant(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same tensor [] for the same value."""
    with torch.inference_mode(False):
        return torch.tensor(value, device=device, dtype=dtype)


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[…, dim] -> […, dim], added to `residual` if there is one."""
        return self.scale * x if residual is None else torch.addcmul(residual, self.scale, x)


class Linear(nn.Linear, Part):
    """A linear map whose product may be added to a residual in the same kernel."""

    def bind(self) -> Bound:
        """As `forward`."""
        weight, bias, transposed = self.weight, self.bias, self.weight.t()

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            if residual is None:
                return F.linear(x, weight, bias)
            return torch.addmm(residual if bias is None else residual + bias, x, transposed)

        return run

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[…, inputs] -> […, outputs]; [N, inputs] -> [N, outputs] added to `residual` if there is one."""
        return self.bind()(input, residual)


class FusedLinear(Linear):
    """Several projections of the same input as one matrix product; on disk they are apart (`disk_tensors`)."""

    def __init__(self, inputs: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__(inputs, sum(parts.values()), bias=bias)
        self.parts = parts  # name on disk -> outputs, in order


@lru_cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    return theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Turn:
    """Cosines and signed sines [.., 1, D] of positions [..], of type `dtype` but float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None, None].float() * _frequencies(head_dim, theta, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied to x [.., H, D]: the halves of D are the pairs that turn."""
    return torch.addcmul(x * cos, x.index_select(-1, _swapped_halves(x.shape[-1], x.device)), sin)


@lru_cache
def _swapped_halves(dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(dim, device=device).roll(dim // 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q [B, T, H, D] over k, v [B, K, S, D] where mask [B, 1, T, S] allows -> [B * T, H * D].

    Query heads of one key head are further queries of it, so keys are not repeated in memory.
    """
    batch, steps, heads, dim, keys = map(int, (*q.shape, k.shape[1]))  # plain numbers in a recording too
    if steps == 1 and q.device.type == "cpu":  # all overhead: three kernels take a third of the fused one's time
        q = q.reshape(batch * keys, heads // keys, dim)
        nothing = constant(0.0, q.device, q.dtype)
        scores = torch.baddbmm(nothing, q, k.flatten(0, 1).transpose(1, 2), beta=0, alpha=dim**-0.5)
        if mask is not None:
            scores = torch.where(mask[:, 0], scores.view(batch, heads, -1), -torch.inf).view_as(scores)
        return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(batch, heads * dim)
    q = q.transpose(1, 2).reshape(batch, keys, -1, dim)
    if mask is not None and heads > keys:
        mask = mask.repeat(1, 1, heads // keys, 1)
    if q.requires_grad and q.device.type == "cpu":  # the kernel's way back is four times slower in bfloat16
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(widened(q), widened(k), widened(v), attn_mask=mask)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.reshape(batch, heads, steps, dim).transpose(1, 2).reshape(batch * steps, heads * dim)


def attend_over(span: Span | JoinedSpan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the span's steps, q, k and v [B, T, H, D], over them and their past in `layer` -> [B * T, H * D]."""
    if not isinstance(span, JoinedSpan):
        return attend(q, *span.store(layer, k, v), span.mask)
    parts = [
        attend(q[:, start:stop], *own.store(layer, k[:, start:stop], v[:, start:stop]), own.mask)
        for own, (start, stop) in zip(span.spans, span.places, strict=True)
    ]
    if span.padding:
        parts.append(q.new_zeros(span.padding, parts[0].shape[1]))
    return torch.cat(parts)


class Attention(Part):
    """Causal attention with rotary positions, grouped key heads and, where the box has them, per-head norms."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool = False, norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.kinds, self.turning = [heads, kv_heads], [heads + kv_heads, kv_heads]
        parts = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        self.qkv_proj = FusedLinear(width, parts, bias=bias)
        self.o_proj = Linear(heads * head_dim, width, bias=bias)
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)

    def bind(self) -> Bound:
        """As `forward`."""
        project, output, norm = bound(self.qkv_proj), bound(self.o_proj), self._bind_norms()
        heads, dim, kinds, turning = self.heads + 2 * self.kv_heads, self.head_dim, self.kinds, self.turning
        own, over_pages = self.qkv_proj.weight.dtype, self._bind_pages()

        def run(x: Tensor, turn: Turn, span: Span | JoinedSpan, layer: int, residual: Tensor | None = None) -> Tensor:
            if over_pages is not None and span.pages is not None:
                return output(over_pages(project(x), turn, span.pages, layer), residual)
            qk, v = project(x).view(-1, span.steps, heads, dim).split_with_sizes(turning, 2)  # [B, T, H + K or K, D]
            turned = rotate(widened(norm(qk)), *turn).to(torch.promote_types(own, v.dtype))
            q, k = turned.split_with_sizes(kinds, 2)
            return output(attend_over(span, layer, q, k, v), residual)

        return run

    def _bind_pages(self) -> Bound | None:
        """Attention as kernels over blocks, where there are such kernels for heads like these."""
        heads, norms = self.heads, None
        if not usable(self.qkv_proj.weight):
            return None
        from antiphon.kernels.attention import attend, takes

        if self.q_norm is not None and self.k_norm is not None:
            norms = torch.stack([self.q_norm.weight, self.k_norm.weight]), self.q_norm.eps
        if not takes(self.head_dim):
            return None
        return lambda qkv, turn, pages, layer: attend(qkv, norms, turn, pages, layer, heads)

    def _bind_norms(self) -> Bound:
        """The norms of queries and keys, both at once."""
        if self.q_norm is None or self.k_norm is None:
            return lambda qk: qk
        q, k = self.q_norm.weight, self.k_norm.weight
        unit, weight = unit_rms(q, self.q_norm.eps), torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])
        return lambda qk: unit(qk) * weight

    def forward(
        self, x: Tensor, turn: Turn, span: Span | JoinedSpan, layer: int, residual: Tensor | None = None
    ) -> Tensor:
        """x [N, W] -> [N, W], N = B * T steps of the span; `turn` is what `rotary` gave for them."""
        return self.bind()(x, turn, span, layer, residual)


class SwiGLU(Part):
    """Gated feed-forward block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(width, {"gate_proj": inner, "up_proj": inner})
        self.down_proj = Linear(inner, width, bias=False)

    def bind(self) -> Bound:
        """As `forward`."""
        gate_up, down = bound(self.gate_up_proj), bound(self.down_proj)
        return lambda x, residual=None: down(gated(gate_up(x)), residual)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, W] -> [N, W], added to `residual` if there is one."""
        return self.bind()(x, residual)


def gated(x: Tensor) -> Tensor:
    """The first half of the last dimension of x [N, 2 I] through SiLU, times the second half."""
    if usable(x):
        from antiphon.kernels.norms import gated as kernel

        return kernel(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Experts(nn.Module):
    """Feed-forward experts stacked into one tensor each (on disk they are one tensor per expert)."""

    gate_up_scale: Tensor | None
    down_scale: Tensor | None

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        # quantized weights bring a scale per expert and output; None is a weight that needs none
        self.register_parameter("gate_up_scale", None)
        self.register_parameter("down_scale", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights of standard deviation 1/sqrt(fan-in)."""
        nn.init.normal_(self.gate_up_proj, std=self.gate_up_proj.shape[-1] ** -0.5)
        nn.init.normal_(self.down_proj, std=self.down_proj.shape[-1] ** -0.5)

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, W] through the experts chosen [N, k], mixed by weight [N, k] -> [N, W], added to `residual` if any."""
        if usable(x) and self.gate_up_scale is None:
            from antiphon.kernels.experts import experts, fits

            if fits(x, chosen):
                return experts(x, chosen, weight, self.gate_up_proj, self.down_proj, residual)
        slots, (_, inner, width) = chosen.flatten().long(), self.gate_up_proj.shape
        x = x.repeat_interleave(chosen.shape[1], 0)
        if grouped(self.gate_up_proj, self.gate_up_scale):
            y = self._grouped(x, slots)
        else:
            most = COPIED_ON_CUDA if x.is_cuda else COPIED_AT_MOST
            y = (self._together if slots.numel() * inner * width <= most else self._in_turn)(x, slots)
        y = torch.bmm(weight[:, None].to(x.dtype), y.view(*chosen.shape, width)).squeeze(1)
        return y if residual is None else residual + y

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.gate_up_proj)

    def only(self, x: Tensor) -> Tensor:
        """x [N, W] through the first expert -> [N, W]."""
        up, down = (scaled(weight[0], scale, 0, x) for weight, scale in self._matrices())
        return F.linear(gated(F.linear(x, up)), down)

    def _together(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [n, W], each through its own of experts [n]: a copy of their matrices, one product per projection."""
        up, down = (scaled(w.index_select(0, experts), s, experts, x) for w, s in self._matrices())
        inner = gated(torch.bmm(up, x.unsqueeze(-1)).squeeze(-1))
        return torch.bmm(down, inner.unsqueeze(-1)).squeeze(-1)

    def _grouped(self, x: Tensor, experts: Tensor) -> Tensor:
        """As `_together`, one product over all experts; the host need not know which of them are used."""
        order = experts.argsort(stable=True)
        ends = torch.searchsorted(experts[order], torch.arange(self.count, device=x.device), right=True).int()
        up, down = (weight.transpose(1, 2) for weight, _ in self._matrices())
        y = F.grouped_mm(gated(F.grouped_mm(x[order], up, offs=ends)), down, offs=ends)
        return torch.empty_like(y).index_copy_(0, order, y)

    def _in_turn(self, x: Tensor, experts: Tensor) -> Tensor:
        """As `_together`, one expert after another, each on all of its rows; no copies."""
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts).tolist()
        used, sizes = [e for e, count in enumerate(counts) if count], [count for count in counts if count]

        def through(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
            rows = x.split_with_sizes(sizes)
            return torch.cat([F.linear(r, scaled(weight[e], scale, e, x)) for r, e in zip(rows, used, strict=True)])

        up, down = self._matrices()
        y = through(gated(through(x.index_select(0, order), *up)), *down)
        return y.index_select(0, order.argsort())

    def _matrices(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        return (self.gate_up_proj, self.gate_up_scale), (self.down_proj, self.down_scale)


def grouped(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether experts of this kind have a kernel that takes all of them at once."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and scale is None


def scaled(weight: Tensor, scale: Tensor | None, expert: int | Tensor, like: Tensor) -> Tensor:
    """Weight of one expert or several; a quantized one is multiplied out in the type of the activations."""
    return weight if scale is None else weight.to(like.dtype) * scale[expert].unsqueeze(-1)


class Router(nn.Module):
    """Scores tokens against experts."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights of standard deviation 1/sqrt(fan-in)."""
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, W] -> probabilities [N, E] in float32 or wider."""
        return widened(F.linear(x, self.weight)).softmax(-1)


class SparseMLP(Part):
    """Top-k experts and, in the Talker, one that every token visits behind a sigmoid gate."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config.num_experts, width)
        self.experts = Experts(config.num_experts, width, config.moe_intermediate_size)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = None if shared is None else SwiGLU(width, shared)
        self.shared_expert_gate = None if shared is None else Linear(width, 1, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, W] -> [N, W], added to `residual` if there is one."""
        if usable(x) and self.experts.count > 1 and isinstance(self.gate, Router):  # nobody stands in its place
            from antiphon.kernels.experts import route

            weight, chosen = route(F.linear(x, self.gate.weight), self.top_k, self.normalize)
            y, residual = self.experts(x, chosen, weight, residual), None
        else:
            y = self._by_hand(x)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            y = torch.addcmul(y, self.shared_expert_gate(x).sigmoid(), self.shared_expert(x))
        return y if residual is None else residual + y

    def _by_hand(self, x: Tensor) -> Tensor:
        """What the experts give."""
        scores = self.gate(x)
        if self.experts.count == 1:  # nothing to route: its weight is 1
            return self.experts.only(x)
        weight, chosen = scores.topk(self.top_k, -1)
        if self.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        return self.experts(x, chosen, weight)


class DecoderLayer(Part):
    """Pre-norm transformer layer: attention, then a dense or sparse feed-forward block."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(
            width,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            norm_eps=eps,
        )
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = SparseMLP(config) if config.sparse(index) else SwiGLU(width, config.intermediate_size or 0)

    def bind(self) -> Bound:
        """As `forward`."""
        before, after = bound(self.input_layernorm), bound(self.post_attention_layernorm)
        attention, mlp = bound(self.self_attn), bound(self.mlp)

        def run(x: Tensor, turn: Turn, span: Span | JoinedSpan, layer: int) -> Tensor:
            x = attention(before(x), turn, span, layer, x)
            return mlp(after(x), x)

        return run

    def forward(self, x: Tensor, turn: Turn, span: Span | JoinedSpan, layer: int) -> Tensor:
        """[N, W] -> [N, W]."""
        return self.bind()(x, turn, span, layer)


def run_layers(
    layers: Iterable[Bound],
    x: Tensor,
    cache: Cache | None,
    head_dim: int,
    theta: float,
    *,
    window: int | None = None,
    positions: Tensor | None = None,
    tap: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B, T, W] through causal `layers` after what `cache` holds; also what went into layer `tap`.

    `positions` [B, T] turn the keys; by default they follow the cache. `tap` counts as transformers' tuple of hidden
    states does: 0 is x itself, k the output of the k-th layer.
    """
    shape, span = x.shape, open_span(cache, x, window)
    turn = span_rotary(span, shape[0], positions, head_dim, theta, x.dtype)
    x = x.reshape(-1, shape[-1])  # one row per step: products of two dimensions cost half of three
    tapped = x
    for index, layer in enumerate(layers):
        x = layer(x, turn, span, index)
        if tap is not None and index + 1 == tap:
            tapped = x
    span.close()
    return x.view(shape), tapped.view(shape)


def span_rotary(
    span: Span | JoinedSpan, batch: int, positions: Tensor | None, head_dim: int, theta: float, dtype: torch.dtype
) -> Turn:
    """`rotary` [B or 1, T, 1, D] of the span's steps, or of `positions` [B, T], for a batch of sequences."""
    if positions is None and isinstance(span, PlacedSpan):
        stop = span.start + span.steps
        tables = _rotary_tables(-(-stop // CACHE_BLOCK) * CACHE_BLOCK, head_dim, theta, dtype, span.device)
        return tables[0][span.start : stop], tables[1][span.start : stop]
    if positions is None and isinstance(span, JoinedSpan):
        own = [span_rotary(part, 1, None, head_dim, theta, dtype) for part in span.spans]
        cos, sin = (torch.cat([turn.view(-1, 1, head_dim) for turn in turns]) for turns in zip(*own, strict=True))
        return F.pad(cos, (0, 0, 0, 0, 0, span.padding)), F.pad(sin, (0, 0, 0, 0, 0, span.padding))
    return rotary(span.positions if positions is None else positions, head_dim, theta, dtype)


@lru_cache(maxsize=16)
def _rotary_tables(
    size: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return rotary(torch.arange(size, device=device), head_dim, theta, dtype)


class Decoder(Part):
    """A stack of causal layers and its closing norm: the body of Thinker, Talker and MTP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def init_state(self, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `rows` conversations of at most `capacity` positions."""
        c = self.config
        return KVCache.empty(c.num_hidden_layers, rows, c.num_key_value_heads, c.head_dim, capacity, device, dtype)

    def forward(
        self,
        x: Tensor,
        state: Cache | None = None,
        positions: Tensor | None = None,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, W] -> normed states [B, T, W] and the states at layer `tap` (post-norm when it is the last)."""
        return self._run(self.layers, self.norm, x, state, positions, tap)

    def bind(self) -> Bound:
        """As `forward`."""
        return partial(self._run, [bound(layer) for layer in self.layers], bound(self.norm))

    def _run(
        self,
        layers: Iterable[Bound],
        norm: Bound,
        x: Tensor,
        state: Cache | None = None,
        positions: Tensor | None = None,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        x, tapped = run_layers(layers, x, state, c.head_dim, c.rope_theta, positions=positions, tap=tap)
        x = norm(x)
        return x, (x if tap == c.num_hidden_layers else tapped)


def disk_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and stored buffer by its name on disk, as a view: what is fused in memory is apart there."""
    seen: set[int] = set()
    for place, module in model.named_modules():
        stored = [b for b in module.named_buffers(recurse=False) if b[0] in module.state_dict()]
        for last, tensor in (*module.named_parameters(recurse=False), *stored):
            if id(tensor) not in seen:  # tied weights are on disk once
                seen.add(id(tensor))
                yield from _apart(f"{place}." if place else "", last, module, tensor.detach())


def _apart(stem: str, last: str, module: nn.Module, data: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and views of the tensor `last` of `module`, whose own name is `stem`, ending in a point."""
    if isinstance(module, Experts):  # one tensor per expert and projection
        for expert in range(data.shape[0]):
            parts = zip(("gate_proj", "up_proj"), data[expert].chunk(2), strict=True)
            for name, part in parts if last == "gate_up_proj" else [("down_proj", data[expert])]:
                yield f"{stem}{expert}.{name}.weight", part
    elif isinstance(module, FusedLinear):  # one tensor per projection
        above = stem.removesuffix(".").rpartition(".")[0]
        for name, part in zip(module.parts, data.split(list(module.parts.values())), strict=True):
            yield f"{above}.{name}.{last}", part
    else:
        yield stem + last, data
