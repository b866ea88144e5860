"""The end of a turn: what the head reads is what AuT would give had the clip ended, and training teaches it to tell."""

import numpy as np
import pytest
import torch

from antiphon.audio import LogMel, Resampler
from antiphon.conversation import RECENT
from antiphon.engine import Engine
from antiphon.errors import InputError, WeightsError
from antiphon.generate import Session
from antiphon.train.stages.turn import breaking_point
from antiphon.turn import TurnConfig, TurnEnd, load_turn, save_turn
from tests.models import CPU, in_pieces, omni, sound

RATE = 16000


def whole(seconds: float, window: int) -> torch.Tensor:
    """AuT's last embeddings of a clip that has ended, by the peak so far."""
    model, wave = omni(), torch.from_numpy(sound(seconds))[None]
    mel = LogMel(model.config.audio.mel)(Resampler(RATE, RATE)(wave, final=True), final=True)
    state = model.aut.init_state(1, CPU, torch.float32, window)
    return model.aut(mel, state, final=True)[0, -RECENT:].detach()


@pytest.mark.parametrize(("seconds", "window"), [(0.4, 2), (1.7, 1), (3.3, 2)])
def test_the_embeddings_are_those_of_a_clip_that_ends_here(seconds, window):
    session = Session(omni(), window=window)
    for piece in in_pieces(sound(seconds), RATE):
        session.append_audio(piece, RATE)
    before = session.ids.copy(), session.nbytes
    for _ in range(2):  # asking changes nothing
        torch.testing.assert_close(session.recent(), whole(seconds, window), atol=1e-5, rtol=1e-5)
    assert (session.ids, session.nbytes) == before
    with Engine(omni()) as engine:
        call = engine.open(window=window)
        for piece in in_pieces(sound(seconds), RATE, seed=1):
            call.append_audio(piece, RATE)
        torch.testing.assert_close(call.recent().result(), session.recent(), atol=1e-5, rtol=1e-5)


def test_there_is_nothing_to_judge_before_there_is_sound(tmp_path):
    session = Session(omni())
    assert len(session.recent()) == 0
    session.append_audio(sound(0.01), RATE)
    assert len(session.recent()) == 0
    assert omni().turn_end(session.recent()) == 0.0


def test_what_was_heard_last_is_saved_with_a_session(tmp_path):
    session = Session(omni(), window=1)
    session.append_audio(sound(1.6), RATE)
    session.save(tmp_path / "session")
    again = Session.load(omni(), tmp_path / "session")
    assert torch.equal(again.recent(), session.recent())


def test_padding_says_nothing_and_a_head_comes_back_as_it_was_written(tmp_path):
    torch.manual_seed(0)
    head = TurnEnd(TurnConfig(12, rows=6, hidden=8)).eval()
    torch.nn.init.normal_(head.place)
    heard = torch.randn(3, 9, 12)
    rows = torch.tensor([2, 9, 6])
    together = head(heard, rows)
    for i, n in enumerate(rows.tolist()):
        torch.testing.assert_close(together[i : i + 1], head(heard[i : i + 1, :n]))
    assert torch.equal(head(heard[1:2, 3:]), head(heard[1:2])), "what is further back than it looks"
    save_turn(head, tmp_path / "turn.safetensors")
    assert torch.equal(load_turn(tmp_path / "turn.safetensors")(heard, rows), together)
    (tmp_path / "turn.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError):
        load_turn(tmp_path / "turn.safetensors")


def test_a_checkpoint_without_a_head_says_so():
    with pytest.raises(InputError, match=r"has no turn\.safetensors"):
        omni().turn_end(torch.zeros(3, 4))


def test_a_clip_is_broken_off_where_it_is_quiet():
    rate, loud = 1000, np.ones(1000, np.float32)
    for quiet in (300, 500, 700):
        clip = loud.copy()
        clip[quiet - 20 : quiet + 20] = 0.001
        found = [breaking_point(clip, rate, np.random.default_rng(seed)) for seed in range(40)]
        assert sum(abs(place - quiet) <= 20 for place in found) > 8
        assert all(0 < place <= 920 + 130 for place in found)
