"""MTP, multi-token prediction: the residual codebooks of one frame, one after another.

The sequence of a frame is [Talker state that gave code 0, E(code 0), E(code 1), …]; positions restart in every frame,
so nothing is remembered between frames. Training sees the same sequence at once.

Shapes: N frames, Q codebooks, W width, V codes per codebook.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from antiphon.binding import bound
from antiphon.caches import FrameCache
from antiphon.config import DecoderConfig
from antiphon.layers import Decoder, Linear


class MTPModel(Decoder):
    """The decoder with one embedding per codebook it feeds back: 1 … Q - 1."""

    def __init__(self, config: DecoderConfig, codebooks: int) -> None:
        super().__init__(config)
        self.codec_embedding = nn.ModuleList(
            nn.Embedding(config.vocab_size, config.hidden_size) for _ in range(codebooks - 1)
        )


class MTP(nn.Module):
    """Dense causal transformer over the codebooks of one frame, a head for each."""

    def __init__(self, config: DecoderConfig, codebooks: int) -> None:
        super().__init__()
        self.config, self.codebooks = config, codebooks
        self.model = MTPModel(config, codebooks)
        self.lm_head = nn.ModuleList(
            Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(codebooks - 1)
        )

    def init_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> FrameCache:
        """A cache for one frame of each row."""
        c = self.config
        heads = (c.num_key_value_heads, c.head_dim)
        return FrameCache.empty(c.num_hidden_layers, rows, *heads, self.codebooks, device, dtype)

    def forward(self, x: Tensor, state: FrameCache | None = None, final: bool = False) -> Tensor:
        """Embedded steps [N, T, W] -> normed states [N, T, W]; `lm_head[i]` reads the step of codebook i."""
        return self.model(x, state)[0]

    def embed(self, codes: Tensor) -> Tensor:
        """Embeddings [.., Q - 1, W] of codebooks 1 … Q - 1 of codes [.., Q - 1]."""
        tables = [table(codes[..., i]) for i, table in enumerate(self.model.codec_embedding)]
        return torch.stack(tables, -2)

    def logits(self, hidden: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced scores [N, Q - 1, V] of codebooks 1 … Q - 1.

        `hidden` [N, W] is the Talker's state that gave code 0, `first` [N, W] the Talker's embedding of code 0, and
        `codes` [N, Q - 1] the residual codes of the same frame. Nothing is shifted: step i scores codebook i.
        """
        fed = self.embed(codes)[:, :-1]
        states = self(torch.cat([hidden[:, None], first[:, None], fed], 1))[:, 1:]
        return torch.stack([head(states[:, i]) for i, head in enumerate(self.lm_head)], 1)

    def predict(
        self, hidden: Tensor, first: Tensor, choose: Callable[[Tensor, int], Tensor], state: FrameCache
    ) -> tuple[Tensor, Tensor]:
        """Residual codes [N, Q - 1] of one frame and the sum [N, W] of their embeddings.

        `choose(logits [N, V], codebook)` draws a code [N]; `state` is scratch space of `init_state`.
        """
        return self.bind_predict()(hidden, first, choose, state)

    def bind_predict(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`predict` with the weights of now."""
        step, heads = bound(self.model), [bound(head) for head in self.lm_head]
        tables = list(self.model.codec_embedding)

        def run(
            hidden: Tensor, first: Tensor, choose: Callable[[Tensor, int], Tensor], state: FrameCache
        ) -> tuple[Tensor, Tensor]:
            state.restart()
            states = step(torch.stack([hidden, first], 1), state)[0]
            codes, total = [], torch.zeros_like(first)
            for i, (head, table) in enumerate(zip(heads, tables, strict=True)):
                code = choose(head(states[:, -1]), i + 1)
                embedded = table(code)
                codes.append(code)
                total = total + embedded
                if i + 2 < self.codebooks:
                    states = step(embedded[:, None], state)[0]
            return torch.stack(codes, 1), total

        return run
