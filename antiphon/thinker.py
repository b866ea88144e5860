"""Thinker: the language model that listens and answers in text. Embeddings in, text out.

Without images and video the released TM-RoPE is ordinary 1-D rotary positions, which is what runs here;
`positions` is an explicit argument, so that other schemes can come later.

Shapes: B batch, T time, W width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from antiphon.binding import Bound, Part, bound
from antiphon.caches import KVCache
from antiphon.config import DecoderConfig
from antiphon.layers import Decoder


class ThinkerModel(Decoder):
    """The decoder with its token embeddings."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)


class Thinker(Part):
    """Causal language model over text and audio embeddings."""

    def __init__(self, config: DecoderConfig, accept_layer: int | None = None) -> None:
        super().__init__()
        self.config, self.accept_layer = config, accept_layer
        self.model = ThinkerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_state(self, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `rows` conversations of at most `capacity` positions."""
        return self.model.init_state(rows, capacity, device, dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [.., W] of ids [..]."""
        return self.model.embed_tokens(ids)

    def forward(
        self, x: Tensor, state: KVCache | None = None, final: bool = False, *, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, W] -> normed states [B, T, W] for `logits`, and the accept layer's for the Talker."""
        return self.model(x, state, positions, self.accept_layer)

    def bind(self) -> Bound:
        """As `forward`, given x, a state and positions."""
        model = bound(self.model)
        return lambda x, state=None, positions=None: model(x, state, positions, self.accept_layer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [.., V] of the next token."""
        return self.lm_head(hidden)
