"""Talker: the speech language model. One position per 80 ms frame; its head predicts codebook 0.

`talker_prompt` and the three functions it is made of are the only place that lays out the Talker's input, for
training and for generation alike. Every position is the sum of two channels: a text channel (a text
token, or for audio what the Thinker's accept layer made of it) and a codec channel (a control id, or the codes of
the frame before, summed over the codebooks).

Shapes: B batch, T positions, W the Talker's width, U the Thinker's width, V codec vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.binding import Bound, Part, bound
from antiphon.caches import KVCache
from antiphon.config import TALKER_SPECIALS, DecoderConfig, OmniConfig, TalkerConfig
from antiphon.layers import Decoder

NO_CODE = -1  # nothing on the codec channel
CLONED = -2  # in the speaker slot: a voice that is a vector of its own, not a row of the embedding
PLAIN = 3  # the assistant turn opens with three tokens of plain text: <|im_start|>, assistant, newline


@dataclass(frozen=True)
class Rows:
    """A stretch of the Talker's input: ids on the text channel and on the codec channel, equally long."""

    text: list[int]
    codec: list[int]

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.text + other.text, self.codec + other.codec)


def user_rows(ids: list[int]) -> Rows:
    """User turns as the Thinker read them, role and all; audio ids stand for the accept layer's states."""
    return Rows(list(ids), [NO_CODE] * len(ids))


def opening_rows(config: OmniConfig, talker: TalkerConfig, newline: int, speaker: int, first: int) -> Rows:
    """The nine positions that open an answer in voice `speaker` whose first text token is `first`."""
    control = [talker.codec_nothink_id, talker.codec_think_bos_id, talker.codec_think_eos_id, speaker]
    text = [config.im_start_token_id, config.assistant_token_id, newline]
    text += [config.tts_pad_token_id] * len(control) + [config.tts_bos_token_id, first]
    return Rows(text, [NO_CODE] * PLAIN + control + [talker.codec_pad_id, talker.codec_bos_id])


def trailing_text(config: OmniConfig, rest: Iterable[int]) -> Iterator[int]:
    """Text channel of the frames: the tokens after the first, one a frame, the end, then padding for ever.

    Lazy: a frame whose token is not known yet waits for it. Padding before the end is never laid out.
    """
    return chain(rest, [config.tts_eos_token_id], repeat(config.tts_pad_token_id))


def talker_prompt(
    config: OmniConfig, user_ids: list[int], newline: int, speaker: int, text: Iterable[int], frames: int = 0
) -> Rows:
    """The whole input: user turns, the opening, and `frames` positions whose codec channel is the frame before.

    The position that opens with codec_bos predicts frame 0; frame t's codes go into position 9 + t, which predicts
    frame t + 1 (codec ids there are NO_CODE: the caller adds the summed codes).
    """
    if config.talker is None:
        raise ValueError("this configuration has no Talker")
    words = iter(text)
    rows = user_rows(user_ids) + opening_rows(config, config.talker, newline, speaker, next(words))
    return rows + Rows(list(islice(trailing_text(config, words), frames)), [NO_CODE] * frames)


class ResizeMLP(nn.Module):
    """From the Thinker's width to the Talker's."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(width, inner)
        self.linear_fc2 = nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        """[.., U] -> [.., W]."""
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class TalkerModel(Decoder):
    """The decoder with the embeddings of codebook 0 and of the control ids."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.codec_embedding = nn.Embedding(config.vocab_size, config.hidden_size)


class Talker(Part):
    """Causal model over frames."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.text.hidden_size
        self.model = TalkerModel(config.text)
        self.text_projection = ResizeMLP(config.thinker_hidden_size, config.resize_dim, width)
        self.hidden_projection = ResizeMLP(config.thinker_hidden_size, config.resize_dim, width)
        self.codec_head = nn.Linear(width, config.text.vocab_size, bias=False)

    def init_state(self, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `rows` conversations of at most `capacity` positions."""
        return self.model.init_state(rows, capacity, device, dtype)

    def forward(
        self, x: Tensor, state: KVCache | None = None, final: bool = False, *, positions: Tensor | None = None
    ) -> Tensor:
        """Summed channels [B, T, W] -> normed states [B, T, W], for `codec_head` and for MTP."""
        return self.model(x, state, positions)[0]

    def bind(self) -> Bound:
        """As `forward`, given x, a state and positions."""
        model = bound(self.model)
        return lambda x, state=None, positions=None: model(x, state, positions)[0]

    def suppressed(self, device: torch.device) -> Tensor:
        """Mask [V] of ids that are never drawn: the control ids, except the one that ends speech."""
        ids = torch.arange(self.config.text.vocab_size, device=device)
        return (ids >= self.config.text.vocab_size - TALKER_SPECIALS) & (ids != self.config.codec_eos_token_id)
