"""Fresh weights with which a decoder can copy from the first step: induction heads, laid into its first layers.

What follows "A" in an answer is mostly what followed "A" in the question, and what is written down was heard just so.
Gradient descent finds the heads that this takes late: until they are all there, none is of use, and a small world is
learnt by heart instead. Begun like this, tiny's Thinker copies lists of any words after 200 steps of training
(docs/decisions.md); begun as usual, not after 450.

    layer 0   head i looks i + 1 places back and writes down who was there; a blank is nobody     A at B
    layer 1   a head looks for where the present token was written down, and takes what is there  A finds B

All of these are matrices as any others: training changes them from the first step on.

Shapes: V vocabulary, W width, D head size, F frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antiphon.config import DecoderConfig
from antiphon.layers import Attention, Decoder
from antiphon.mtp import MTP
from antiphon.talker import Talker
from antiphon.thinker import Thinker

SHARP = 2.0  # weights of the norms of queries and keys: with 1, no score is above sqrt(D), and no head can be sharp
NEAR = (0.2, 1.1)  # radians a step of the frequencies that tell one place from the next
LOUD = 3.0  # text beside the sum of a frame's codes
FADING = 0.6  # of what is written down, from each place to the one before: the nearest counts most


@torch.no_grad()
def begin_copying(thinker: Thinker, blank: int) -> bool:
    """Lay induction heads into layers 0 and 1; `blank` is the id that stands for nothing said.

    Draws from torch's generator. Returns whether it was done: it takes two layers and a width of three heads.
    """
    table, config = thinker.model.embed_tokens.weight, thinker.config
    size, width = config.head_dim, config.hidden_size
    looks, *finds = attentions(thinker.model)
    if not finds or width < 3 * size:
        return False
    basis = torch.linalg.qr(torch.randn(width, 2 * size + 2))[0].T.to(table.device)  # orthonormal rows [2 D + 2, W]
    seen, rest = basis[:size], basis[size:]
    written, constant, silent = rest[:size], rest[size], rest[size + 1]
    length = table.norm(dim=1).mean()
    table -= table @ rest.T @ rest  # room for who came before, and for what all have in common
    table[blank] = length * silent
    if not config.tie_word_embeddings:  # a token's score is the likeness to its embedding: what is found can be said
        thinker.lm_head.weight.copy_(table * width**-0.5)
    table += length * constant  # along it tokens differ by their places only
    near = near_places(config).to(constant)
    aside = torch.cat([1 - near, 1 - near])  # where a key is seen by none of those who look
    _look_back(looks, config, constant, seen, written)
    _lay(finds[0], 0, seen, written + torch.outer(aside, silent), seen, seen)
    return True


@torch.no_grad()
def begin_following(talker: Talker, mtp: MTP, table: Tensor) -> tuple[Tensor, Tensor] | None:
    """Lay the same heads into the Talker: who knows what was said last finds what comes next in the text.

    Returns two sets of orthonormal rows [D, W]: along the first a position's own text token is seen, along the second
    layers say which token of the text was said last (training teaches them, `stages.speech`), and there every layer
    but the first and the upper ones adds the token that follows it. None where the Talker is too small: it takes three
    layers and a width of more than three heads. `table` [V, U] are the Thinker's embeddings.
    """
    config = talker.config.text
    size, width = config.head_dim, config.hidden_size
    looks, *finds = attentions(talker.model)
    if len(finds) < 2 or width <= 3 * size:
        return None
    basis = torch.linalg.qr(torch.randn(width, 3 * size + 1))[0].T.to(table.device)
    seen, written, said, constant = basis[:size], basis[size : 2 * size], basis[2 * size : -1], basis[-1]
    text, heard = talker.text_projection, talker.hidden_projection
    for projection in (text, heard):
        weight = projection.linear_fc2.weight.mul_(LOUD)
        others = torch.cat([written, said, constant[None]])
        weight -= others.T @ (others @ weight)
    text.linear_fc2.bias -= text(table).mean(0)
    length = text(table).norm(dim=1).mean()
    for projection in (text, heard):
        projection.linear_fc2.bias += length * constant
    others = torch.cat([seen, written, constant[None]])
    for codes in (talker.model.codec_embedding, *mtp.model.codec_embedding):
        weight = codes.get_parameter("weight")
        weight -= weight @ others.T @ others
    _look_back(looks, config, constant, seen, written)
    for attention in finds[: len(finds) // 2 + 1]:
        _lay(attention, 0, said, written, seen, said)
    return seen, said


def attentions(decoder: Decoder) -> list[Attention]:
    """The attention of each layer."""
    return [m for layer in decoder.layers for m in layer.children() if isinstance(m, Attention)]


def near_places(config: DecoderConfig) -> Tensor:
    """Frequencies [F] of rotary positions that tell one place from the next, as ones among zeros."""
    frequency = frequencies(config)
    return ((frequency > NEAR[0]) & (frequency < NEAR[1])).float()


def frequencies(config: DecoderConfig) -> Tensor:
    """Radians a step [F]."""
    return config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)


def turned(weights: Tensor, angles: Tensor) -> Tensor:
    """Pairs of `weights` [F], each turned by its angle [F] as rotary positions turn them: [D = 2 F]."""
    return torch.cat([weights * angles.cos(), weights * angles.sin()])


def _look_back(attention: Attention, config: DecoderConfig, constant: Tensor, seen: Tensor, written: Tensor) -> None:
    """The first head looks one place back, the next two, …; what is `seen` there is `written` here."""
    near, frequency = near_places(config).to(constant), frequencies(config).to(constant)
    key = torch.outer(turned(near, 0 * frequency), constant)
    for head in range(attention.heads):
        back = turned(near, -(head + 1) * frequency)
        _lay(attention, head, torch.outer(back, constant), key, seen, FADING**head * written)


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
