"""How far an answer has been said at each of its frames: where the Talker is in its text, for it to learn.

The text runs ahead of the speech, a token a frame, so the Talker has to look back for the token that comes next, and
for that it has to know which it has said. Codes alone teach that late: sentences of a small corpus are learnt by heart
first. A forced alignment by an encoder that spells (`stages.thinker.spelling_losses`) says it.

Shapes: T frames, L tokens, S rows of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antiphon.audio import LogMel
from antiphon.aut import AuT
from antiphon.thinker import Thinker
from antiphon.tokenizer import Tokenizer
from antiphon.train.codes import Spoken, fingerprint, keep, key_of, sound_of
from antiphon.train.data import pad
from antiphon.train.losses import likeness


def text_of(spoken: Spoken) -> str:
    """What is said, as the assistant writes it."""
    example, place = spoken
    messages = (example.cut.custom or {}).get("messages", [])
    said = (str(m["content"]) for m in messages if m["role"] == "assistant" and m.get("supervision") == place)
    return next(said, str(example.cut.supervisions[place].text))


def places(
    aut: AuT,
    thinker: Thinker,
    tokenizer: Tokenizer,
    codes: Mapping[str, Tensor],
    frame: float,
    spoken: Sequence[Spoken],
    cache: Path,
    *,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """How many tokens [T] of its text an answer has said at each of its `codes`' frames of `frame` s, by `key_of`.

    What these boxes found before is read from the folder `cache`.

    Raises:
        AudioError: a cut that cannot be read.
    """
    config, front, table = aut.config, LogMel(aut.config.mel), thinker.model.embed_tokens.weight
    hop = front.config.hop / front.config.sample_rate

    def make(some: Sequence[Spoken]) -> list[Tensor]:
        sounds = [torch.from_numpy(sound_of(one, front.config.sample_rate).copy())[None] for one in some]
        mel, lengths = pad([front(sound, final=True)[0] for sound in sounds])
        heard = aut(mel.to(table.device), window=config.window_chunks, frames=lengths)
        made = []
        for one, rows, length in zip(some, heard, lengths.tolist(), strict=True):
            ids = tokenizer.encode(text_of(one))
            scores = likeness(rows[: config.tokens(length)], table[[*ids, tokenizer.config.audio_token_id]])
            row = first_rows(scores.float().cpu().numpy(), ids)
            seconds = hop * (
                row // config.chunk_tokens * config.chunk_frames + row % config.chunk_tokens * 2**config.conv_layers
            )
            stops = np.arange(1, 1 + len(codes[key_of(one)])) * frame
            made.append(torch.from_numpy(np.searchsorted(seconds, stops - hop)))
        return made

    name = f"places-{fingerprint(aut, thinker.model.embed_tokens)}.safetensors"
    return keep(cache / name, spoken, make, "places in what is said", quiet)


def first_rows(scores: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.int64]:
    """Rows [L] at which each token is first read, on the likeliest way through scores [S, L + 1], the blank's last.

    Where there are too few rows for the text, its tokens are spread evenly.
    """
    count, length = scores.shape[0], len(ids)
    states = 2 * length + 1  # a blank, a token, a blank, …; only a blank between different tokens may be left out
    token = np.full(states, length)
    token[1::2] = np.arange(length)
    leaps = np.zeros(states, bool)
    leaps[3::2] = [a != b for a, b in zip(ids[1:], ids, strict=False)]
    best = np.full(states, -np.inf)
    best[:2] = scores[0, token[:2]]
    came = np.zeros((count, states), np.int64)
    for row in range(1, count):
        ways = np.stack([best, np.r_[-np.inf, best[:-1]], np.where(leaps, np.r_[-np.inf, -np.inf, best[:-2]], -np.inf)])
        came[row] = ways.argmax(0)
        best = ways.max(0) + scores[row, token]
    state = states - 1 - int(best[-2] > best[-1])
    if not np.isfinite(best[state]):
        return np.arange(length) * count // length
    way = np.empty(count, np.int64)
    for row in range(count - 1, -1, -1):
        way[row] = state
        state -= came[row, state]
    return np.searchsorted(way, np.arange(1, states, 2))
