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
import torch.nn.functional as F
from torch import Tensor

from antiphon.audio import LogMel, Resampler
from antiphon.aut import AuT
from antiphon.config import CodecConfig
from antiphon.thinker import Thinker
from antiphon.tokenizer import Tokenizer
from antiphon.train.codes import SoundOf, Spoken, fingerprint, keep, key_of, sound_of
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
    codec: CodecConfig,
    spoken: Sequence[Spoken],
    cache: Path,
    *,
    sound: SoundOf = sound_of,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """How many tokens [T] of its text an answer has said at each of its `codes`' frames, by `key_of`.

    What these boxes found before is read from the folder `cache`.

    Raises:
        AudioError: a cut that cannot be read.
    """
    config, table, frame = aut.config, thinker.model.embed_tokens.weight, 1 / codec.frame_rate
    resample = Resampler(codec.sampling_rate, config.mel.sample_rate).to(table.device)
    front = LogMel(config.mel).to(table.device)
    hop, blank = config.mel.hop / config.mel.sample_rate, tokenizer.config.audio_token_id

    def make(some: Sequence[Spoken]) -> list[Tensor]:
        waves, lengths = pad([torch.from_numpy(sound(one, codec.sampling_rate)) for one in some])
        mel = front(resample(waves.to(table.device), final=True), final=True)
        frames = (lengths * config.mel.frame_rate / codec.sampling_rate).long().clamp(max=mel.shape[1])
        heard = aut(mel, window=config.window_chunks, frames=frames)
        ids = [tokenizer.encode(text_of(one)) for one in some]
        texts, sizes = pad([torch.tensor(line) for line in ids])
        read = likeness(heard, table).float()
        told = torch.cat([torch.full((len(ids), 1), blank), texts], 1).to(table.device)
        scores = read.gather(2, told[:, None].expand(-1, read.shape[1], -1))
        rows = torch.tensor([config.tokens(int(n)) for n in frames])
        made = []
        for one, first, size in zip(some, first_rows(scores, texts, rows, sizes).numpy(), sizes.tolist(), strict=True):
            row = first[:size]
            second, place = row // config.chunk_tokens, row % config.chunk_tokens
            seconds = hop * (second * config.chunk_frames + place * 2**config.conv_layers)
            stops = np.arange(1, 1 + len(codes[key_of(one)])) * frame
            made.append(torch.from_numpy(np.searchsorted(seconds, stops - hop)))
        return made

    name = f"places-{fingerprint(aut, thinker.model.embed_tokens)}.safetensors"
    return keep(cache / name, spoken, make, "places in what is said", quiet)


def first_rows(scores: Tensor, ids: Tensor, rows: Tensor, sizes: Tensor) -> Tensor:
    """Rows [B, L] at which each token is first read, on the likeliest way through scores [B, S, 1 + L].

    The first score is the blank's. Of ids [B, L] count `sizes` [B], of the scores `rows` [B]. Where there are too few
    rows for a text, its tokens are spread evenly.
    """
    (clips, count), length, device = scores.shape[:2], ids.shape[1], scores.device
    states = 2 * length + 1  # a blank, a token, a blank, …; only a blank between different tokens may be left out
    token = torch.zeros(states, dtype=torch.long)
    token[1::2] = torch.arange(1, length + 1)
    leaps = torch.zeros(clips, states, dtype=torch.bool)
    leaps[:, 3::2] = ids[:, 1:] != ids[:, :-1]
    said, barred = scores[..., token.to(device)], torch.where(leaps, 0.0, -torch.inf).to(device)
    best = torch.full((clips, states), -torch.inf, device=device)
    best[:, :2] = said[:, 0, :2]
    came = torch.zeros(count, clips, states, dtype=torch.int8, device=device)
    for row in range(1, count):
        before = F.pad(best, (2, 0), value=-torch.inf)
        ways = torch.stack([best, before[:, 1:-1], before[:, :-2] + barred])
        most, way = ways.max(0)
        more = (row < rows).to(device)[:, None]  # after the last row nothing moves
        best, came[row] = torch.where(more, most + said[:, row], best), torch.where(more, way, 0)
    last = torch.stack([2 * sizes - 1, 2 * sizes], 1)
    ends = best.cpu().gather(1, last)
    state = last[torch.arange(clips), (ends[:, 1] >= ends[:, 0]).long()]
    way, came = torch.empty(clips, count, dtype=torch.long), came.cpu()
    for row in range(count - 1, -1, -1):
        way[:, row] = state
        state = state - came[row].gather(1, state[:, None])[:, 0]
    wanted = torch.arange(1, states, 2).expand(clips, -1).contiguous()
    evenly = torch.arange(length) * rows[:, None] // sizes[:, None]
    return torch.where(ends.max(1, keepdim=True).values.isfinite(), torch.searchsorted(way, wanted), evenly)
