"""Recorded steps give what the boxes give, after pasts of any length; blocks of a pool are a cache like any other."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import antiphon.engine.lanes
from antiphon.binding import bound
from antiphon.engine import Engine
from antiphon.engine.blocks import BlockCache, BlockPool
from antiphon.engine.capture import OneStep
from antiphon.errors import BusyError, CapacityError
from antiphon.generate import Session, collect
from antiphon.streaming import CACHE_BLOCK, JoinedCaches, KVCache
from tests.models import CPU, assert_same, omni
from tests.test_engine import alone, options, same, say

LENGTHS = (3, 1, CACHE_BLOCK - 1, CACHE_BLOCK, 0)  # of pasts: within a block, at its end, none


def thinker():
    return omni().thinker


def cache(capacity: int = 1024) -> KVCache:
    return thinker().init_state(1, capacity, CPU, torch.float32)


def steps(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def one_step(pool: BlockPool | None) -> OneStep:
    decode = bound(thinker().model)
    return OneStep(lambda caches, places, x: decode(x[None], caches, places)[0].unbind(), cache(), pool)


@torch.inference_mode()
@pytest.mark.parametrize("pooled", [False, True])
def test_a_recorded_step_follows_pasts_of_any_length(pooled):
    """Rows of different lengths, in a batch that is padded, again and again with one recording."""
    pool = BlockPool.like(cache(), 32) if pooled else None
    step, caches, whole = one_step(pool), list[KVCache](), list[Tensor]()
    for row, length in enumerate(LENGTHS):
        own = cache() if pool is None else pool.hold(cache())
        if length:
            thinker()(steps(length, row)[None], own)
        caches.append(own)
        whole.append(steps(length, row))
    for again in range(3):
        x = steps(len(LENGTHS), 100 + again)
        (found,) = step(caches, x)
        for row in range(len(LENGTHS)):
            whole[row] = torch.cat([whole[row], x[row : row + 1]])
            assert caches[row].filled == int(caches[row].length) == len(whole[row])
            assert_same(found[row], thinker()(whole[row][None])[0][0, -1])
    assert len(step.records) == 1


@torch.inference_mode()
def test_a_recorded_row_is_the_same_bit_for_bit_in_any_company_of_its_bucket():
    def run(others: list[int]) -> Tensor:
        caches = [cache() for _ in range(1 + len(others))]
        for own, length in zip(caches, [7, *others], strict=True):
            thinker()(steps(length, length)[None], own)
        return step(caches, torch.cat([steps(1), steps(len(others), 9)]))[0][0]

    step = one_step(None)
    assert torch.equal(run([1, 2, 3, 4, 5]), run([300, 20, 7, 8]))


@torch.inference_mode()
def test_blocks_of_a_pool_are_a_cache_like_any_other():
    """Read, cut, copied, saved and resumed: what is read afterwards is what an ordinary cache gives."""
    pool = BlockPool.like(cache(), 16)
    plain, held = cache(), pool.hold(cache())
    for seed, length in enumerate((5, 300, 40)):
        x = steps(length, seed)[None]
        assert_same(thinker()(x, held)[0], thinker()(x, plain)[0])
    with pytest.raises(CapacityError, match="its cache holds 1024"):
        held.reserve(1025)
    for own in (held, plain):
        own.truncate(200)
    fork, saved = held.copy(), cache()
    saved.load(held.tensors())
    thinker()(steps(100, 7)[None], held)  # which the fork does not hear of
    x = steps(90, 8)[None]
    expected = thinker()(x, plain)[0]
    for own in (fork, saved, pool.hold(saved.copy())):
        if own.filled == 200:
            assert_same(thinker()(x, own)[0], expected)
    joined, other = JoinedCaches([pool.hold(cache()), held], [3, 4], 8), JoinedCaches([cache(), cache()], [3, 4], 8)
    assert_same(thinker()(steps(8)[None], joined)[0][0, :3], thinker()(steps(8)[None], other)[0][0, :3])


@torch.inference_mode()
def test_blocks_go_back_to_the_pool_and_none_is_left_when_all_are_taken():
    pool = BlockPool.like(cache(), 3)
    held = pool.hold(cache())
    thinker()(steps(2 * CACHE_BLOCK + 1)[None], held)
    assert not pool.free
    with pytest.raises(CapacityError, match="memory for conversations is used up"):
        pool.hold(cache()).reserve(1)
    held.truncate(CACHE_BLOCK)
    assert len(pool.free) == 2
    pool.k.fill_(torch.nan)  # what others left behind is not seen
    pool.v.fill_(torch.nan)
    assert thinker()(steps(3)[None], pool.hold(cache()))[0].isfinite().all()
    del held
    gc.collect()
    assert len(pool.free) == 3


def test_an_engine_whose_caches_are_blocks_gives_what_the_readable_loop_gives(monkeypatch, tmp_path):
    """As on CUDA, but for the graphs: two turns of four, with a cut, a save and a fork between them."""
    monkeypatch.setattr(antiphon.engine.lanes, "pool_for", lambda cache: BlockPool.like(cache, 60))
    engine = Engine(omni())
    calls = [engine.open("You are brief." if seed == 2 else None, window=1) for seed in range(4)]
    answers = [ask(call, seed) for seed, call in enumerate(calls)]
    engine.run()
    assert all(isinstance(call.session.talker, BlockCache) for call in calls)
    for seed, events in enumerate(answers):
        if seed != 2:
            same(alone(seed)[0], events.reply())
    calls[0].truncate(240)
    saved, forked = calls[1].save(tmp_path / "call.safetensors"), calls[3].copy()
    engine.run()
    saved.result()
    calls = [calls[0], engine.load(tmp_path / "call.safetensors"), engine.adopt(forked.result())]
    again = [ask(call, seed + 1) for call, seed in zip(calls, (0, 1, 3), strict=True)]
    engine.run()
    for seed, events in zip((1, 3), again[1:], strict=True):
        same(alone(seed, 2)[1], events.reply())
    session = Session(omni(), window=1)
    ask(session, 0)
    session.truncate(240)
    same(ask(session, 1), again[0].reply())


def ask(conversation: Any, seed: int) -> Any:
    """A question, and the answer: its events, or the reply of a readable session."""
    say(conversation, seed)
    events = conversation.respond(**options(seed))
    return collect(events) if isinstance(conversation, Session) else events


def test_who_does_not_fit_into_the_pool_is_refused_at_the_door(monkeypatch):
    monkeypatch.setattr(antiphon.engine.lanes, "pool_for", lambda cache: BlockPool.like(cache, 5))
    engine = Engine(omni())
    call = engine.open()
    call.append_text("word " * 300)
    call.commit()
    engine.run()
    with pytest.raises(BusyError, match="1 conversations are being held"):
        engine.open()
    call.close()
    engine.run()
    del call
    gc.collect()
    engine.open()
