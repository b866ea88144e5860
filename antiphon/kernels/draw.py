"""`antiphon.sampling.choose` as one kernel: a program per row, whose scores stay in registers from logits to id.

Nothing is sorted. Top-k and top-p both ask for the largest number t such that the scores of at least t have a given
weight together: that many ids, or that much probability. Such a t is bisected for among all float32 numbers, 32 steps
at most, each one sum over the row; scores that are equal lie on the same side of any t, so they stay or go together.

Shapes: B rows, V ids.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from antiphon.sampling import Sampling

LARGEST = 4096  # ids of a row that registers hold


def draw(
    logits: Tensor,
    sampling: Sampling,
    seed: Tensor,
    turn: Tensor,
    frame: Tensor,
    codebook: int,
    seen: Tensor | None = None,
    suppress: Tensor | None = None,
) -> Tensor:
    """One id per row [B], int64: `choose(logits, sampling, NoiseKey(seed, turn, frame, codebook), seen, suppress)`.

    It divides as IEEE has it, as torch does on a CPU; on CUDA torch multiplies by the inverse of the temperature.

    Args:
        logits: scores [B, V] of float32 or below, V up to `LARGEST`; rows may lie apart, the ids of a row may not.
        sampling: how to draw; what it holds is read at each launch, so that a new temperature compiles nothing.
        seed: with `turn` and `frame` int64 [B], of any stride; not read if greedy.
        turn: as `seed`.
        frame: as `seed`.
        codebook: of all rows.
        seen: True at the ids drawn before, bool [B, V].
        suppress: True at the ids never to be drawn, bool [V].
    """
    rows, size = logits.shape
    if size > LARGEST:
        raise ValueError(f"a row has {size} ids; expected up to {LARGEST}")
    seen = None if sampling.repetition_penalty == 1 else seen
    chosen, block = torch.empty(rows, dtype=torch.long, device=logits.device), triton.next_power_of_2(size)
    draw_kernel[(rows,)](
        chosen,
        logits,
        logits.stride(0),
        seen,
        0 if seen is None else seen.stride(0),
        suppress,
        seed,
        seed.stride(0),
        turn,
        turn.stride(0),
        frame,
        frame.stride(0),
        codebook,
        sampling.temperature,
        sampling.repetition_penalty,
        min(sampling.top_k, size),
        struct.unpack("<q", struct.pack("<d", sampling.top_p))[0],
        SIZE=size,
        BLOCK=block,
        GREEDY=sampling.greedy,
        BY_RANK=0 < sampling.top_k < size,
        BY_PROBABILITY=sampling.top_p < 1,
        num_warps=max(1, min(8, block // 256)),
    )
    return chosen


@triton.jit(do_not_specialize=["codebook", "top_k", "top_p_bits"])
def draw_kernel(
    chosen: tl.tensor,
    logits: tl.tensor,
    logits_stride: tl.tensor,
    seen: tl.tensor | None,
    seen_stride: tl.tensor,
    suppress: tl.tensor | None,
    seed: tl.tensor,
    seed_stride: tl.tensor,
    turn: tl.tensor,
    turn_stride: tl.tensor,
    frame: tl.tensor,
    frame_stride: tl.tensor,
    codebook: tl.tensor,
    temperature: tl.tensor,
    penalty: tl.tensor,
    top_k: tl.tensor,
    top_p_bits: tl.tensor,  # of the float64, since plain numbers reach a kernel as float32
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
    BY_RANK: tl.constexpr,
    BY_PROBABILITY: tl.constexpr,
) -> None:
    """The id of row `program_id(0)`; the `BLOCK - SIZE` ids that there are not have a score of -inf."""
    row, ids = tl.program_id(0), tl.arange(0, BLOCK)
    real = ids < SIZE
    scores = tl.load(logits + row * logits_stride + ids, mask=real, other=float("-inf")).to(tl.float32)
    if seen is not None:
        before = tl.load(seen + row * seen_stride + ids, mask=real, other=0) != 0
        scores = tl.where(before, tl.where(scores < 0, scores * penalty, tl.div_rn(scores, penalty)), scores)
    if suppress is not None:
        scores = tl.where(tl.load(suppress + ids, mask=real, other=0) != 0, float("-inf"), scores)
    if GREEDY:
        best = tl.argmax(scores, 0)
    else:
        scores = tl.div_rn(scores, temperature)
        keys, top = key_of(scores), tl.max(scores, 0)
        low, high = tl.full([], 0x007FFFFF, tl.uint32), key_of(top) + 1  # -inf, and what no score is
        if BY_RANK:
            low = border(keys, tl.full([BLOCK], 1, tl.int32), top_k, low, high)
        if BY_PROBABILITY:
            # float64, so that where the sum reaches top_p does not hang on the order of summation
            weights = tl.where(keys >= low, tl.exp(scores.to(tl.float64) - top.to(tl.float64)), 0.0)
            top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
            low = border(keys, weights, top_p * tl.sum(weights, 0), low, high)
        if BY_RANK or BY_PROBABILITY:
            scores = tl.where(keys >= low, scores, float("-inf"))
        state = absorb(tl.full([], 0, tl.uint64), tl.load(seed + row * seed_stride))
        state = absorb(state, tl.load(turn + row * turn_stride))
        state = absorb(state, tl.load(frame + row * frame_stride))
        best = tl.argmax(scores.to(tl.float64) + gumbel(absorb(absorb(state, codebook), ids)), 0)
    tl.store(chosen + row, best.to(tl.int64))


@triton.jit
def border(keys: tl.tensor, weights: tl.tensor, wanted: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The largest t from low to below high such that the ids with keys of at least t weigh `wanted` or more.

    Or a lower number that the same keys are at least. Those of at least low weigh enough, those of at least high less.

    For top-p `wanted` is top_p of the whole. An id stays if all that are better have less: t does, whose better ones do
    not weigh enough, and so does every id above; below t none does, for t is among its better ones.
    """
    weight = wanted + 1
    while (high - low > 1) & (weight != wanted):
        middle = low + (high - low) // 2
        weight = tl.sum(tl.where(keys >= middle, weights, 0), 0)
        low = tl.where(weight >= wanted, middle, low)
        high = tl.where(weight >= wanted, high, middle)
    return low


@triton.jit
def key_of(value: tl.tensor) -> tl.tensor:
    """The place of float32 numbers in the order of them all, uint32; both zeros have one."""
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def gumbel(bits: tl.tensor) -> tl.tensor:
    """As `antiphon.sampling.gumbel`, of 64 random bits, float64."""
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52
    return -tl.log(-tl.log(uniform)).to(tl.float32).to(tl.float64)


@triton.jit
def absorb(state: tl.tensor, part: tl.tensor) -> tl.tensor:
    """As `antiphon.sampling._absorb`; in uint64 sums and products wrap around and shifts are logical."""
    x = state + (part.to(tl.int64).to(tl.uint64, bitcast=True) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
