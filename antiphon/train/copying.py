"""Fresh weights with which a decoder can copy from the first step: an induction head, laid into two layers.

What follows "A" in an answer is mostly what followed "A" in the question. Gradient descent finds the two heads that
this takes late: until both are there, neither is of use, and a small world is learnt by heart instead. In `tiny`, lists
of words of any kind were copied after 150 steps when begun like this, and not after 600 when not (docs/training.md).

    layer 0   each token looks at the one before it and writes down who that was                  A at B
    layer 1   each token looks for where itself was written down, and takes what stands there     A finds B

All of it are matrices as any others: training may change them from the first step on.

Shapes: V vocabulary, W width, D head size, F frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antiphon.layers import Attention
from antiphon.thinker import Thinker

SHARP = 2.0  # weights of the norms of queries and keys: with 1, no score is above sqrt(D), and no head can be sharp
NEAR = (0.15, 0.75)  # radians a step of the frequencies that tell near from far: none comes round within a word or two


@torch.no_grad()
def begin_copying(thinker: Thinker) -> bool:
    """Lay an induction head into the first heads of layers 0 and 1; draws from torch's generator.

    Returns whether it was done: it takes two layers, a width of three heads, and a rotary frequency that is `NEAR`.
    """
    table, config = thinker.model.embed_tokens.weight, thinker.config
    size, width = config.head_dim, config.hidden_size
    before = step_back(size, config.rope_theta)
    if len(thinker.model.layers) < 2 or width < 3 * size or before is None:
        return False
    basis = torch.linalg.qr(torch.randn(width, 2 * size + 1))[0].T  # orthonormal rows [2 D + 1, W]
    seen, written, constant = basis[:size], basis[size : 2 * size], basis[-1]
    length = table.norm(dim=1).mean()
    table -= table @ basis[size:].T @ basis[size:]  # room for who came before, and for what all have in common
    if not config.tie_word_embeddings:  # a token's score is the likeness to its embedding: what is found can be said
        thinker.lm_head.weight.copy_(table * width**-0.5)
    table += length * constant  # along it tokens differ by their places only
    looks, finds = (m for layer in thinker.model.layers[:2] for m in layer.children() if isinstance(m, Attention))
    place, place_before = before
    _lay(looks, torch.outer(place, constant), torch.outer(place_before, constant), seen, written)
    _lay(finds, seen, written, seen, seen)
    return True


def step_back(size: int, theta: float) -> tuple[Tensor, Tensor] | None:
    """A query and a key [D] whose product, both turned to their places, is largest where the key is a step before.

    None where no frequency is `NEAR`.
    """
    frequency = theta ** -(torch.arange(0, size, 2) / size)
    near = ((frequency > NEAR[0]) & (frequency < NEAR[1])).float()
    if not near.any():
        return None
    return torch.cat([near, torch.zeros(size // 2)]), torch.cat([near * frequency.cos(), near * frequency.sin()])


def _lay(attention: Attention, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Matrices [D, W] of the first head; `out` says along what its values are written."""
    size, heads, keys = attention.head_dim, attention.heads, attention.kv_heads
    rows = attention.qkv_proj.weight
    for matrix, first in ((query, 0), (key, heads), (value, heads + keys)):
        rows[first * size : (first + 1) * size] = matrix
    attention.o_proj.weight[:, :size] = out.T
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.weight.fill_(SHARP)
