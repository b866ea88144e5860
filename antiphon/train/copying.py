"""Fresh weights with which a decoder can copy from the first step: induction heads, laid into two layers.

What follows "A" in an answer is mostly what followed "A" in the question, and what is written down was heard just so.
Gradient descent finds the heads that this takes late: until they are all there, none is of use, and a small world is
learnt by heart instead. Begun like this, tiny's Thinker copies lists of any words after 150 steps of training
(docs/training.md); begun as usual, not after 450.

    layer 0   head i looks i + 1 places back and writes down who was there; a blank is nobody     A at B
    layer 1   a head looks for where the present token was written down, and takes what is there  A finds B

All of these are matrices as any others: training changes them from the first step on.

Shapes: V vocabulary, W width, D head size, F frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antiphon.layers import Attention
from antiphon.thinker import Thinker

SHARP = 2.0  # weights of the norms of queries and keys: with 1, no score is above sqrt(D), and no head can be sharp
NEAR = (0.2, 1.1)  # radians a step of the frequencies that tell one place from the next
FADING = 0.6  # of what is written down, from each place to the one before: the nearest counts most


@torch.no_grad()
def begin_copying(thinker: Thinker, blank: int) -> bool:
    """Lay induction heads into layers 0 and 1; `blank` is the id that stands for nothing said.

    Draws from torch's generator. Returns whether it was done: it takes two layers and a width of three heads.
    """
    table, config = thinker.model.embed_tokens.weight, thinker.config
    size, width = config.head_dim, config.hidden_size
    frequency = config.rope_theta ** -(torch.arange(0, size, 2) / size)
    near = ((frequency > NEAR[0]) & (frequency < NEAR[1])).float()
    if len(thinker.model.layers) < 2 or width < 3 * size:
        return False
    basis = torch.linalg.qr(torch.randn(width, 2 * size + 2))[0].T  # orthonormal rows [2 D + 2, W]
    seen, rest = basis[:size], basis[size:]
    written, constant, silent = rest[:size], rest[size], rest[size + 1]
    length = table.norm(dim=1).mean()
    table -= table @ rest.T @ rest  # room for who came before, and for what all have in common
    table[blank] = length * silent
    if not config.tie_word_embeddings:  # a token's score is the likeness to its embedding: what is found can be said
        thinker.lm_head.weight.copy_(table * width**-0.5)
    table += length * constant  # along it tokens differ by their places only
    aside = torch.cat([1 - near, 1 - near])  # where a key is seen by none of those who look
    looks, finds = (m for layer in thinker.model.layers[:2] for m in layer.children() if isinstance(m, Attention))
    here = turned(near, 0 * frequency)
    for head in range(looks.heads):  # the first looks one place back, the next two, …
        back = turned(near, -(head + 1) * frequency)
        _lay(looks, head, torch.outer(back, constant), torch.outer(here, constant), seen, FADING**head * written)
    _lay(finds, 0, seen, written + torch.outer(aside, silent), seen, seen)
    return True


def turned(weights: Tensor, angles: Tensor) -> Tensor:
    """Pairs of `weights` [F], each turned by its angle [F] as rotary positions turn them: [D = 2 F]."""
    return torch.cat([weights * angles.cos(), weights * angles.sin()])


def _lay(attention: Attention, head: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Matrices [D, W] of one head and of the key head it shares; `out` says along what its values are written."""
    size, heads, keys = attention.head_dim, attention.heads, attention.kv_heads
    rows, shared = attention.qkv_proj.weight, head * keys // heads
    for matrix, place in ((query, head), (key, heads + shared), (value, heads + keys + shared)):
        rows[place * size : (place + 1) * size] = matrix
    attention.o_proj.weight[:, head * size : (head + 1) * size] = out.T
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.weight.fill_(SHARP)
