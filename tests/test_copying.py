"""A fresh Thinker finds what followed the same token before, past blanks as well."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from antiphon.binding import bound
from antiphon.config import DecoderConfig
from antiphon.config_json import parse_config
from antiphon.layers import run_layers
from antiphon.mtp import MTP
from antiphon.talker import Talker
from antiphon.thinker import Thinker
from antiphon.train.copying import begin_copying, begin_following
from antiphon.train.stages.speech import begin_speech
from antiphon.train.stages.thinker import begin_thinker
from tests.models import IDS, config_json

BLANK = 7


def sizes(**changes: Any) -> DecoderConfig:
    """About those of tiny's Thinker."""
    own = {"vocab_size": 3200, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    own |= {"num_hidden_layers": 3, "mlp_only_layers": (0, 1, 2), "intermediate_size": 384, "rope_theta": 1e6}
    return replace(parse_config(config_json(IDS)).text, **{**own, **changes})


def found(thinker: Thinker, blanks: int) -> float:
    """How often, in twelve tokens said again, the next scores highest of them, the one just said left out.

    Up to so many blanks stand after each when they are said first.
    """
    generator, hits = torch.Generator().manual_seed(1), []
    for _ in range(20):
        tokens = (torch.randperm(3000, generator=generator)[:12] + 100).tolist()
        heard = [i for t in tokens for i in [t, *[BLANK] * int(torch.randint(blanks + 1, (), generator=generator))]]
        scores = thinker.logits(thinker(thinker.embed(torch.tensor([heard + tokens])))[0])[0]
        for i, token in enumerate(tokens[:-1]):
            others = [t for t in tokens if t != token]
            hits.append(others[int(scores[len(heard) + i, others].argmax())] == tokens[i + 1])
    return sum(hits) / len(hits)


@pytest.mark.parametrize("blanks", [0, 1, 3])
@torch.inference_mode()
def test_a_fresh_thinker_finds_what_comes_next(blanks):
    torch.manual_seed(2)
    thinker = Thinker(sizes(), None)
    begin_thinker(thinker, BLANK)
    assert found(thinker, blanks) > 0.6  # by chance it is one in eleven
    thinker.get_parameter("model.layers.1.self_attn.q_norm.weight").fill_(0)  # now it looks for nothing
    assert found(thinker, blanks) < 0.35


@torch.inference_mode()
def test_what_is_too_small_to_copy_begins_as_usual():
    for changes in ({"num_hidden_layers": 1}, {"hidden_size": 128}):
        thinker = Thinker(sizes(**changes), None)
        assert not begin_copying(thinker, BLANK)
        begin_thinker(thinker, BLANK)
        assert thinker(thinker.embed(torch.tensor([[1, 2, 3]])))[0].isfinite().all()


def talker(**changes: Any) -> tuple[Talker, MTP]:
    """About tiny's."""
    config = parse_config(config_json(IDS)).talker
    assert config is not None
    text = sizes(num_hidden_layers=6, mlp_only_layers=tuple(range(6)), **changes)
    mtp = replace(config.mtp, hidden_size=text.hidden_size)
    return Talker(replace(config, text=text, thinker_hidden_size=256, mtp=mtp)), MTP(mtp, config.num_code_groups)


@torch.inference_mode()
def test_a_fresh_talker_finds_what_follows_the_token_said_last():
    """Whoever writes a token along the second rows reads the one that follows it in the text, two layers further."""
    torch.manual_seed(3)
    box, mtp = talker()
    begin_speech(nn.ModuleList([box, mtp]))
    table = torch.randn(3200, 256)
    found = begin_following(box, mtp, table)
    assert found is not None
    seen, said = found
    text = box.text_projection(table)
    hits = []
    for _ in range(20):
        tokens = torch.randperm(3000)[:12]
        x = box.text_projection(table[tokens]).repeat(2, 1)
        x[12:] = text.mean(0) + text[tokens] @ seen.T @ said  # in no particular place, and no text of their own
        after = run_layers(map(bound, box.model.layers[:2]), x[None], None, 64, 1e6)[0][0]
        scores = (after[12:] - x[12:]) @ said.T @ seen @ (text[tokens] - text.mean(0)).T
        hits += [int(row[[j for j in range(12) if j != i]].argmax()) == i for i, row in enumerate(scores[:-1])]
    assert sum(hits) / len(hits) > 0.6
    assert begin_following(*talker(hidden_size=128), table[:, :128]) is None
