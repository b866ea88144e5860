"""The end of a turn, judged from what AuT heard: has somebody who is silent said what they had to say?

Silence alone does not tell: people pause in the middle of a sentence. What was said before the pause does, and how. So
a small head reads AuT's last embeddings, those of the silence among them. The release has nothing like it; it lives in
a file beside the checkpoint.

    AuT's last 26 embeddings (2 s) ──attention over time, the last one beside it──> probability

Shapes: B clips, S embeddings, U their width, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon.files import load_described, save_described

TURN_FILE = "turn.safetensors"  # beside a checkpoint
SIZES = "turn_config"  # in the file's metadata


@dataclass(frozen=True)
class TurnConfig:
    """Sizes of the head."""

    width: int  # of AuT's embeddings
    rows: int = 26  # that it looks back: 2 s
    hidden: int = 64


class TurnEnd(nn.Module):
    """AuT's embeddings -> how likely it is that the turn has ended with them."""

    def __init__(self, config: TurnConfig) -> None:
        super().__init__()
        self.config = c = config
        self.norm = nn.LayerNorm(c.width)
        self.near = nn.Linear(3 * c.width, c.hidden)  # an embedding and the two before it: what a word ends with
        self.place = nn.Parameter(torch.zeros(c.rows, c.hidden))  # how far back it stands
        self.score = nn.Linear(c.hidden, 1)
        self.mix = nn.Linear(2 * c.hidden, c.hidden)
        self.decide = nn.Linear(c.hidden, 1)

    def forward(self, heard: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [B] after embeddings [B, S, U], of which the first `rows` [B] are sound in a padded batch."""
        count = self.config.rows
        rows = torch.full((len(heard),), heard.shape[1]) if rows is None else rows.cpu()
        back = rows[:, None] - count + torch.arange(count)  # [B, rows] places of the last embeddings
        index = back.clamp(min=0).to(heard.device)[..., None].expand(-1, -1, heard.shape[2])
        there = (back >= 0).to(heard.device)
        last = self.norm(heard.gather(1, index).float()) * there[..., None]
        before = [F.pad(last, (0, 0, shift, 0))[:, :count] for shift in (1, 2)]
        x = F.gelu(self.near(torch.cat([last, *before], -1)) + self.place)
        share = self.score(x).masked_fill(~there[..., None], -torch.inf).softmax(1)
        return self.decide(F.gelu(self.mix(torch.cat([(x * share).sum(1), x[:, -1]], -1))))[:, 0]


def save_turn(head: TurnEnd, path: Path) -> None:
    """Write a head as one safetensors file that describes itself."""
    save_described(head, head.config, path, SIZES)


def load_turn(path: Path) -> TurnEnd:
    """The head in a file of `save_turn`, in float32.

    Raises:
        WeightsError: not such a file, or a tensor that does not fit its sizes.
    """
    return load_described(path, SIZES, lambda sizes: TurnEnd(TurnConfig(**sizes))).float()
