"""From scores to ids: penalty, suppression, temperature, top-k, top-p and a draw without a random generator.

The noise of a draw is a pure function of (seed, turn, frame, codebook, id), so a conversation can be cut back, forked,
saved or moved to another batch row or machine, and it goes on exactly as it would have.

Shapes: B rows, V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from antiphon.errors import InputError

THINKER_CODEBOOK = -1  # the Thinker's draws share a noise key with the Talker's but for this codebook


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    Raises:
        InputError: a value that has no meaning.
    """

    temperature: float  # 0 is greedy: the best id, without noise
    top_k: int = 0  # ids that may be drawn, 0 for all
    top_p: float = 1.0  # probability that the ids which may be drawn have to reach together
    repetition_penalty: float = 1.0  # above 1 disfavours ids drawn before, greedy or not

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:  # below, float32 scores overflow
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or at least 1e-6")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; expected a number of ids, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected a probability above 0 and up to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; expected a number above 0")

    @property
    def greedy(self) -> bool:
        """Whether the best id is taken without a draw."""
        return self.temperature == 0


GREEDY = Sampling(0.0)
THINKER = GREEDY
TALKER = Sampling(0.9, 50, 1.0, 1.05)  # the release's generation defaults
MTP = Sampling(1.0, 50, 0.8)


class NoiseKey(NamedTuple):
    """What the noise of a draw depends on besides the id; a tensor [B] of int64 gives each row its own."""

    seed: int | Tensor
    turn: int | Tensor
    frame: int | Tensor
    codebook: int | Tensor


def choose(
    logits: Tensor,
    sampling: Sampling,
    noise: NoiseKey | Tensor | None = None,
    seen: Tensor | None = None,
    suppress: Tensor | None = None,
) -> Tensor:
    """One id per row [B], int64. A row gets the same id in any batch.

    The order is that of transformers' logits processors: penalty, suppression, temperature, top-k, top-p, draw.

    Args:
        logits: scores [B, V]; below float32 they are computed with in float32, above in their own type.
        sampling: how to draw.
        noise: names the draw, or is what `gumbel` gives for it; needed unless greedy.
        seen: True at the ids drawn before, bool [B, V].
        suppress: True at the ids never to be drawn, bool [V].
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if suppress is not None:
        scores = scores.masked_fill(suppress, -math.inf)
    if sampling.greedy:
        return scores.argmax(-1)
    if noise is None:
        raise ValueError("a draw that is not greedy needs a NoiseKey")
    scores = filtered(scores / sampling.temperature, sampling)
    noise = noise if isinstance(noise, Tensor) else gumbel(noise, scores.shape[-1], scores.device)
    return (scores + noise).argmax(-1)


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores [B, V] with -inf at the ids outside top-k and then top-p; ids of equal score stay or go together."""
    size = scores.shape[-1]
    if sampling.top_k == 0 and sampling.top_p == 1:
        return scores
    best = scores.topk(min(sampling.top_k or size, size)).values  # [B, K], best first
    scores = scores.masked_fill(scores < best[:, -1:], -math.inf)
    if sampling.top_p == 1:
        return scores
    # float64, so that where the sum reaches top_p does not hang on the order of summation
    probability = (best.double() - scores.double().logsumexp(-1, keepdim=True)).exp()
    better = F.pad(probability.cumsum(-1)[:, :-1], (1, 0))  # probability of all ids before this one; 0 at the best
    floor = best.masked_fill(better >= sampling.top_p, math.inf).amin(-1, keepdim=True)
    return scores.masked_fill(scores < floor, -math.inf)


# ---------------------------------------------------------------------------------------------- noise

Word: TypeAlias = int | Tensor  # 64 bits, signed; a key of plain numbers is mixed in Python, without kernels


def gumbel(noise: NoiseKey, size: int, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise [B, V = size], or [1, V] if no part of the key is a tensor; float64.

    `argmax(log p + gumbel)` is a draw from p. Of the logarithms only float32's precision is kept: their last bits
    differ between devices, the integers they are taken of do not.
    """
    return -(-uniform(noise, size, device).log()).log().float().double()


def uniform(noise: NoiseKey, size: int, device: torch.device | str) -> Tensor:
    """Numbers above 0 and below 1 [B or 1, V = size], float64; bit for bit the same on every device."""
    state: Word = 0
    for part in noise:
        state = _absorb(state, part.to(device).view(-1, 1) if isinstance(part, Tensor) else part)
    bits = _shifted(_absorb(state, torch.arange(size, device=device)[None]), 12)
    assert isinstance(bits, Tensor)
    return (bits.double() + 0.5) * 2.0**-52  # of 52 bits, so that adding a half is exact


def _wrap(x: Word) -> Word:
    # integer arithmetic wraps around at 64 bits in torch, not in Python
    return (x + (1 << 63)) % (1 << 64) - (1 << 63) if isinstance(x, int) else x


def _shifted(x: Word, by: int) -> Word:
    # without the mask, the sign would be dragged along
    return (x >> by) & ((1 << (64 - by)) - 1)


def _absorb(state: Word, part: Word) -> Word:
    """The output of splitmix64 `part` + 1 steps after `state`: every bit of both shows in all bits of the result."""
    x = _wrap(state + _wrap((part + 1) * _wrap(0x9E3779B97F4A7C15)))
    x = _wrap((x ^ _shifted(x, 30)) * _wrap(0xBF58476D1CE4E5B9))
    x = _wrap((x ^ _shifted(x, 27)) * _wrap(0x94D049BB133111EB))
    return x ^ _shifted(x, 31)
