"""Mixture-of-experts blocks of a decoding step on a GPU: routing, the experts' two products, their sum.

A step of few tokens reads far more weights than it computes with them (the release's Thinker, one token: 75 MB a
layer), so a kernel is as good as its reading. Each is many small programs, several times the multiprocessors, each
with tens of kilobytes asked for before it waits, along the contiguous dimension. Who computes what is found on the
device, in the list of all pairs of token and expert, with neither a sort nor a host that waits, so a CUDA graph can
hold it; call every size once before it is recorded, since kernels are compiled at their first call.

- Up to `FEW_PAIRS` pairs, two pairs rarely share an expert. Each has its own programs and products are sums along the
  inputs: there is nothing for tensor cores, whose smallest tile is 16 rows. The second kernel also sums the k experts.
- Beyond, a program has a tile of one expert's outputs and takes the expert's pairs 16 at a time through tensor cores,
  with a pipelined loop over the inputs. Results per pair are summed in a third kernel, in the order of `chosen`.

Nothing is added atomically: a token's result is the same bits beside any other tokens, as long as the way is the same.

Shapes: N tokens, W width, E experts, I inner size, k experts per token, P = N * k pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_PAIRS = 16
MOST_PAIRS = 1024  # each program reads the whole list, twice
ROWS = 16  # the fewest that tl.dot takes


def fits(x: Tensor, chosen: Tensor) -> bool:
    """Whether `experts` takes tokens of this type and so many pairs."""
    return x.dtype in (torch.bfloat16, torch.float32) and 0 < chosen.numel() <= MOST_PAIRS


def route(scores: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Scores [N, E] -> the best experts' probabilities [N, k] in float32, over their sum if `normalize`, and indices.

    Indices are int32; of equal probabilities the first is taken, as an expert of the range even if scores are NaN.
    """
    tokens, count = scores.shape
    weight = torch.empty(tokens, top_k, dtype=torch.float32, device=scores.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=scores.device)
    sizes = {"BLOCK_E": triton.next_power_of_2(count), "BLOCK_K": triton.next_power_of_2(top_k)}
    _route[(tokens,)](scores.contiguous(), weight, chosen, count, top_k, normalize, **sizes, num_warps=1)
    return weight, chosen


def experts(
    x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor | None = None
) -> Tensor:
    """x [N, W] through the experts chosen [N, k], mixed by weight [N, k] -> [N, W], added to `residual` if given.

    gate_up [E, 2 * I, W], the gate first, and down [E, W, I] are contiguous and, like the residual, of x's type. Sums
    are in float32; what lies between the two products is rounded to x's type. Where it `fits`; there is no way back.
    """
    x, chosen, weight = x.contiguous(), chosen.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    way = _by_pair if chosen.numel() <= FEW_PAIRS else _by_expert
    return way(x, chosen, weight, gate_up, down, residual)


def _by_pair(
    x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor | None
) -> Tensor:
    (tokens, top_k), (_, width, inner) = chosen.shape, down.shape
    hidden, y = x.new_empty(tokens * top_k, inner), torch.empty_like(x)
    # one step over the inputs of the release, so that no tile waits for the one before it
    rows, most = 4, 4096 // x.element_size()
    grid = (triton.cdiv(inner, rows), tokens * top_k)
    block = min(triton.next_power_of_2(width), most)
    _gated_of_pair[grid](x, chosen, gate_up, hidden, top_k, width, inner, BLOCK_I=rows, BLOCK_K=block, num_warps=4)
    rows, most = 2, 2048 // x.element_size()
    grid = (triton.cdiv(width, rows), tokens)
    sizes = {"SLOTS": triton.next_power_of_2(top_k), "BLOCK_W": rows}
    block = min(triton.next_power_of_2(inner), most)
    _mixed_of_token[grid](
        hidden, chosen, weight, down, residual, y, top_k, width, inner, **sizes, BLOCK_K=block, num_warps=8
    )
    return y


def _by_expert(
    x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor | None
) -> Tensor:
    (top_k, pairs), (count, width, inner) = (chosen.shape[1], chosen.numel()), down.shape
    hidden, y = x.new_empty(pairs, inner), torch.empty_like(x)
    parts = torch.empty(pairs, width, dtype=torch.float32, device=x.device)
    # with fewer pairs than experts a program asks whether its pair is the first of its expert: fewer come for nothing
    listed = {"BY_PAIR": pairs < count, "LISTED": 256, "ROWS": ROWS}
    launch = {**listed, "BLOCK_K": 256 // x.element_size(), "num_warps": 4, "num_stages": 4}
    grid = (triton.cdiv(inner, 32), min(pairs, count))
    _gated_of_expert[grid](x, chosen, gate_up, hidden, pairs, top_k, width, inner, BLOCK_I=32, **launch)
    grid = (triton.cdiv(width, 64), min(pairs, count))
    _parts_of_expert[grid](hidden, chosen, weight, down, parts, pairs, width, inner, BLOCK_W=64, **launch)
    grid = (triton.cdiv(width, 512), len(chosen))
    _sum_of_parts[grid](parts, residual, y, top_k, width, BLOCK_W=512, num_warps=4)
    return y


@triton.jit
def _route(
    scores: tl.tensor,  # [N, E]
    weight: tl.tensor,  # [N, k]
    chosen: tl.tensor,  # [N, k]
    COUNT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    expert, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    score = tl.load(scores + token * COUNT + expert, mask=expert < COUNT, other=-float("inf")).to(tl.float32)
    odds = tl.exp(score - tl.max(score, 0))
    total = tl.sum(odds, 0)
    odds = tl.where(expert < COUNT, odds / total, -1.0)
    best = tl.zeros([BLOCK_K], tl.float32)
    where = tl.zeros([BLOCK_K], tl.int32)
    for rank in tl.static_range(TOP_K):
        most = tl.max(odds, 0)
        first = tl.minimum(tl.min(tl.where(odds == most, expert, BLOCK_E), 0), COUNT - 1)
        best = tl.where(slot == rank, most, best)
        where = tl.where(slot == rank, first, where)
        odds = tl.where(expert == first, -1.0, odds)
    best = tl.where(total == total, best, total)  # tl.max passes NaN over
    if NORMALIZE:
        best = best / tl.sum(best, 0)
    tl.store(weight + token * TOP_K + slot, best, mask=slot < TOP_K)
    tl.store(chosen + token * TOP_K + slot, where, mask=slot < TOP_K)


@triton.jit
def _read(pointers: tl.tensor, inside: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """What the pointers point to, zero where that is not inside; WHOLE spares the question."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    return x * tl.sigmoid(x)


@triton.jit
def _gated_of_pair(
    x: tl.tensor,  # [N, W]
    chosen: tl.tensor,  # [P]
    gate_up: tl.tensor,  # [E, 2 * I, W]
    hidden: tl.tensor,  # [P, I]
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    gate_rows = gate_up + expert * (2 * INNER * WIDTH) + i[:, None] * WIDTH
    gate = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
    WHOLE: tl.constexpr = INNER % BLOCK_I == 0 and WIDTH % BLOCK_K == 0
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (i < INNER)[:, None] & (k < WIDTH)[None, :]
        row = _read(x + pair // TOP_K * WIDTH + k, k < WIDTH, WIDTH % BLOCK_K == 0)
        gate_tile = _read(gate_rows + k[None, :], inside, WHOLE)
        up_tile = _read(gate_rows + INNER * WIDTH + k[None, :], inside, WHOLE)
        wide = row.to(tl.float32)[None, :]
        gate += wide * gate_tile.to(tl.float32)
        up += wide * up_tile.to(tl.float32)
    y = _silu(tl.sum(gate, 1)) * tl.sum(up, 1)
    tl.store(hidden + pair * INNER + i, y.to(hidden.dtype.element_ty), mask=i < INNER)


@triton.jit
def _mixed_of_token(
    hidden: tl.tensor,  # [P, I]
    chosen: tl.tensor,  # [P]
    weight: tl.tensor,  # [P]
    down: tl.tensor,  # [E, W, I]
    residual: tl.tensor | None,  # [N, W]
    y: tl.tensor,  # [N, W]
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    token = tl.program_id(1)
    # the k experts' rows of this tile are rows of one tile, so that all of it is asked for at once
    row = tl.arange(0, SLOTS * BLOCK_W)
    slot, w = row // BLOCK_W, tl.program_id(0) * BLOCK_W + row % BLOCK_W
    pair = token * TOP_K + slot
    live = (slot < TOP_K) & (w < WIDTH)
    expert = tl.load(chosen + pair, mask=slot < TOP_K, other=0).to(tl.int64)
    share = tl.load(weight + pair, mask=slot < TOP_K, other=0.0).to(tl.float32)
    down_rows = down + (expert * (WIDTH * INNER))[:, None] + (w * INNER)[:, None]
    products = tl.zeros([SLOTS * BLOCK_W, BLOCK_K], tl.float32)
    WHOLE: tl.constexpr = SLOTS == TOP_K and WIDTH % BLOCK_W == 0 and INNER % BLOCK_K == 0
    for start in tl.static_range(0, INNER, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = live[:, None] & (k < INNER)[None, :]
        down_tile = _read(down_rows + k[None, :], inside, WHOLE)
        hidden_tile = _read(hidden + (pair * INNER)[:, None] + k[None, :], inside, WHOLE)
        products += hidden_tile.to(tl.float32) * down_tile.to(tl.float32)
    total = tl.sum(tl.reshape(tl.sum(products, 1) * share, [SLOTS, BLOCK_W]), 0)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    if residual is not None:
        total += tl.load(residual + token * WIDTH + w, mask=w < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + token * WIDTH + w, total.to(y.dtype.element_ty), mask=w < WIDTH)


@triton.jit
def _task(
    chosen: tl.tensor, pairs: tl.tensor, BY_PAIR: tl.constexpr, LISTED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The expert of this program, and how many pairs it has.

    BY_PAIR, it has none where another program came for an earlier pair of the same expert.
    """
    asking = tl.program_id(1)
    expert = tl.load(chosen + asking).to(tl.int32) if BY_PAIR else asking
    count = 0
    earlier = 0
    for start in range(0, pairs, LISTED):
        place = start + tl.arange(0, LISTED)
        own = (tl.load(chosen + place, mask=place < pairs, other=-1).to(tl.int32) == expert).to(tl.int32)
        count += tl.sum(own, 0)
        if BY_PAIR:
            earlier += tl.sum(tl.where(place < asking, own, 0), 0)
    return expert, tl.where(earlier > 0, 0, count)


@triton.jit
def _pairs_of(
    chosen: tl.tensor, pairs: tl.tensor, expert: tl.tensor, wanted: tl.tensor, LISTED: tl.constexpr
) -> tl.tensor:
    """Which pairs are those wanted among the expert's own; the first of all where it has no more: it may be read."""
    found = wanted * 0
    before = 0
    for start in range(0, pairs, LISTED):
        place = start + tl.arange(0, LISTED)
        own = (tl.load(chosen + place, mask=place < pairs, other=-1).to(tl.int32) == expert).to(tl.int32)
        rank = tl.where(own > 0, before + tl.cumsum(own, 0) - 1, -1)
        found += tl.sum(tl.where(rank[None, :] == wanted[:, None], place[None, :], 0), 1)
        before += tl.sum(own, 0)
    return found


@triton.jit
def _gated_of_expert(
    x: tl.tensor,  # [N, W]
    chosen: tl.tensor,  # [P]
    gate_up: tl.tensor,  # [E, 2 * I, W]
    hidden: tl.tensor,  # [P, I]
    pairs: tl.tensor,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BY_PAIR: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    expert, count = _task(chosen, pairs, BY_PAIR, LISTED)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    gate_columns = gate_up + expert.to(tl.int64) * (2 * INNER * WIDTH) + i[None, :] * WIDTH
    WHOLE: tl.constexpr = INNER % BLOCK_I == 0 and WIDTH % BLOCK_K == 0
    for first in range(0, count, ROWS):
        wanted = first + tl.arange(0, ROWS)
        pair = _pairs_of(chosen, pairs, expert, wanted, LISTED)
        rows = x + (pair // TOP_K * WIDTH)[:, None]
        gate = tl.zeros([ROWS, BLOCK_I], tl.float32)
        up = tl.zeros([ROWS, BLOCK_I], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (k < WIDTH)[:, None] & (i < INNER)[None, :]
            x_tile = _read(rows + k[None, :], (k < WIDTH)[None, :], WIDTH % BLOCK_K == 0)
            gate_tile = _read(gate_columns + k[:, None], inside, WHOLE)
            up_tile = _read(gate_columns + INNER * WIDTH + k[:, None], inside, WHOLE)
            gate = tl.dot(x_tile, gate_tile, gate, input_precision="ieee")
            up = tl.dot(x_tile, up_tile, up, input_precision="ieee")
        y = (_silu(gate) * up).to(hidden.dtype.element_ty)
        live = (wanted < count)[:, None] & (i < INNER)[None, :]
        tl.store(hidden + (pair * INNER)[:, None] + i[None, :], y, mask=live)


@triton.jit
def _parts_of_expert(
    hidden: tl.tensor,  # [P, I]
    chosen: tl.tensor,  # [P]
    weight: tl.tensor,  # [P]
    down: tl.tensor,  # [E, W, I]
    parts: tl.tensor,  # [P, W]
    pairs: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BY_PAIR: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    expert, count = _task(chosen, pairs, BY_PAIR, LISTED)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    down_columns = down + expert.to(tl.int64) * (WIDTH * INNER) + w[None, :] * INNER
    WHOLE: tl.constexpr = WIDTH % BLOCK_W == 0 and INNER % BLOCK_K == 0
    for first in range(0, count, ROWS):
        wanted = first + tl.arange(0, ROWS)
        pair = _pairs_of(chosen, pairs, expert, wanted, LISTED)
        share = tl.load(weight + pair).to(tl.float32)
        rows = hidden + (pair * INNER)[:, None]
        part = tl.zeros([ROWS, BLOCK_W], tl.float32)
        for start in range(0, INNER, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (k < INNER)[:, None] & (w < WIDTH)[None, :]
            hidden_tile = _read(rows + k[None, :], (k < INNER)[None, :], INNER % BLOCK_K == 0)
            down_tile = _read(down_columns + k[:, None], inside, WHOLE)
            part = tl.dot(hidden_tile, down_tile, part, input_precision="ieee")
        live = (wanted < count)[:, None] & (w < WIDTH)[None, :]
        tl.store(parts + (pair * WIDTH)[:, None] + w[None, :], part * share[:, None], mask=live)


@triton.jit
def _sum_of_parts(
    parts: tl.tensor,  # [P, W]
    residual: tl.tensor | None,  # [N, W]
    y: tl.tensor,  # [N, W]
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    token = tl.program_id(1)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_W], tl.float32)
    for slot in tl.static_range(TOP_K):
        total += tl.load(parts + (token * TOP_K + slot) * WIDTH + w, mask=w < WIDTH, other=0.0)
    if residual is not None:
        total += tl.load(residual + token * WIDTH + w, mask=w < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + token * WIDTH + w, total.to(y.dtype.element_ty), mask=w < WIDTH)
