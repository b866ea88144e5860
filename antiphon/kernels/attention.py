"""Attention of single steps over keys and values that lie in blocks, in two or three kernels.

The first turns what the projection gave into normed and rotated queries and puts keys and values in their places; the
second attends. A program has one step of one key head, whose queries are the rows of a matrix product, so what a step
gives does not depend on the others. Where the steps are few, the blocks of a long past have a program each, and a third
kernel adds up what they found.

Shapes: N steps, H query heads, K key heads, D head size, B blocks of S slots, n blocks of the longest past.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from antiphon.caches import Pages

FEW = 128  # steps for which a program per block pays: more of them fill the device without
TILE = 64  # slots at a time
LOG2E = 1.4426950408889634


def takes(dim: int) -> bool:
    """Whether heads of this size are for these kernels."""
    return dim >= 16 and dim & (dim - 1) == 0


def attend(
    qkv: Tensor,
    norms: tuple[Tensor, float] | None,
    turn: tuple[Tensor, Tensor],
    pages: Pages,
    layer: int,
    heads: int,
) -> Tensor:
    """Steps [N, (H + 2 K) D], after the keys and values of `layer`, which get theirs -> [N, H * D].

    `norms` are weights [2, D] of queries and keys, and their epsilon; `turn` cosines and signed sines [N or T, 1, D]:
    T repeat themselves.
    """
    keys, values = pages.k[layer], pages.v[layer]
    steps, (_, kept, slots, dim), width = len(qkv), keys.shape, pages.table.shape[1]
    cos, sin = (part.reshape(-1, dim) for part in turn)
    q = qkv.new_empty(steps, heads, dim)
    weight, eps = norms or (cos, 0.0)
    _place[steps, heads + 2 * kept](
        *(qkv, weight, eps, cos, sin, len(cos), pages.block, pages.slot, q, keys, values),
        *(keys.stride(0), keys.stride(1), keys.stride(2), heads, kept, dim, dim // 2, norms is not None),
        num_warps=1,
    )
    out = torch.empty_like(q)
    group, tile = heads // kept, min(TILE, max(16, triton.next_power_of_2(slots)))
    rows, split = max(16, triton.next_power_of_2(group)), width > 1 and steps <= FEW
    found = q.new_empty(steps, kept, width if split else 0, rows, dim, dtype=torch.float32)
    known = q.new_empty(steps, kept, width if split else 0, 2, rows, dtype=torch.float32)
    _attend[steps, kept, width if split else 1](
        *(q, keys, values, pages.table, pages.place, out, found, known, dim**-0.5 * LOG2E, width),
        *(keys.stride(0), keys.stride(1), keys.stride(2), slots, group, rows, dim, tile, split),
        num_warps=4,
    )
    if split:
        _add_up[steps, kept](found, known, out, width, group, rows, dim, num_warps=4)
    return out.view(steps, heads * dim)


@triton.jit
def _place(
    qkv, weight, eps, cos, sin, turns, blocks, slots, q, keys, values,
    per_block, per_head, per_slot, heads, kept, DIM: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    step, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, HALF)
    own = qkv + (step * (heads + 2 * kept) + head) * DIM
    low, high = tl.load(own + half).to(tl.float32), tl.load(own + HALF + half).to(tl.float32)
    to = tl.load(blocks + step).to(tl.int64) * per_block + tl.load(slots + step).to(tl.int64) * per_slot
    if head < heads + kept:
        if NORMED:
            scale = 1 / tl.sqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / DIM + eps)
            which = weight + tl.where(head < heads, 0, DIM)
            low *= scale * tl.load(which + half).to(tl.float32)
            high *= scale * tl.load(which + HALF + half).to(tl.float32)
        at = (step % turns) * DIM + half
        turned = low * tl.load(cos + at) + high * tl.load(sin + at)
        high = high * tl.load(cos + at + HALF) + low * tl.load(sin + at + HALF)
        low = turned
        if head < heads:
            mine = q + (step * heads + head) * DIM
            tl.store(mine + half, low.to(q.dtype.element_ty))
            tl.store(mine + HALF + half, high.to(q.dtype.element_ty))
        else:
            mine = keys + to + (head - heads) * per_head
            tl.store(mine + half, low.to(keys.dtype.element_ty))
            tl.store(mine + HALF + half, high.to(keys.dtype.element_ty))
    else:
        mine = values + to + (head - heads - kept) * per_head
        tl.store(mine + half, low.to(values.dtype.element_ty))
        tl.store(mine + HALF + half, high.to(values.dtype.element_ty))


@triton.jit
def _attend(
    q, keys, values, table, places, out, found, known, scale, width,
    per_block, per_head, per_slot, slots, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    step, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, at, tile = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    kept = tl.num_programs(1)
    first, stop = 0, tl.load(places + step).to(tl.int32) + 1
    if SPLIT:
        first = piece * slots
        stop = tl.minimum(stop, first + slots)
    asks = (step * kept + head) * GROUP * DIM + row[:, None] * DIM + at[None, :]
    query = tl.load(q + asks, row[:, None] < GROUP, 0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(first, stop, TILE):
        block = start // slots
        base = tl.load(table + step * width + block).to(tl.int64) * per_block + head * per_head
        there = start + tile < stop
        place = (start - block * slots + tile).to(tl.int64) * per_slot
        key = tl.load(keys + base + place[None, :] + at[:, None], there[None, :], 0.0)
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(there[None, :], score, float("-inf"))
        now = tl.maximum(most, tl.max(score, 1))
        weight, before = tl.exp2(score - now[:, None]), tl.exp2(most - now)
        value = tl.load(values + base + place[:, None] + at[None, :], there[:, None], 0.0)
        mixed = mixed * before[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * before + tl.sum(weight, 1)
        most = now
    if SPLIT:
        part = (step * kept + head) * width + piece
        tl.store(found + part * ROWS * DIM + row[:, None] * DIM + at[None, :], mixed)
        tl.store(known + part * 2 * ROWS + row, most)
        tl.store(known + part * 2 * ROWS + ROWS + row, total)
    else:
        tl.store(out + asks, (mixed / total[:, None]).to(out.dtype.element_ty), row[:, None] < GROUP)


@triton.jit
def _add_up(
    found, known, out, width, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    row, at = tl.arange(0, ROWS), tl.arange(0, DIM)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    for piece in range(0, width):  # the first has something in every row, so `most` is finite from there on
        part = own * width + piece
        theirs = tl.load(known + part * 2 * ROWS + row)
        now = tl.maximum(most, theirs)
        before, after = tl.exp2(most - now), tl.exp2(theirs - now)
        total = total * before + tl.load(known + part * 2 * ROWS + ROWS + row) * after
        more = tl.load(found + part * ROWS * DIM + row[:, None] * DIM + at[None, :])
        mixed = mixed * before[:, None] + more * after[:, None]
        most = now
    mine = own * GROUP * DIM + row[:, None] * DIM + at[None, :]
    tl.store(out + mine, (mixed / total[:, None]).to(out.dtype.element_ty), row[:, None] < GROUP)
