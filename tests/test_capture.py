"""Recorded steps give what the boxes give, after pasts of any length; blocks of a pool are a cache like any other."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import antiphon.caches
import antiphon.code2wav
import antiphon.engine.capture
import antiphon.engine.sounding
import antiphon.engine.speaking
import antiphon.engine.thinking
import antiphon.layers
from antiphon.binding import bound
from antiphon.caches import CACHE_BLOCK, FrameCache, KVCache
from antiphon.engine import Engine
from antiphon.engine.blocks import BlockCache, BlockPool
from antiphon.engine.capture import Steps
from antiphon.engine.speaking import Speaking
from antiphon.errors import BusyError, CapacityError
from antiphon.generate import Session, collect
from antiphon.layers import Attention, Experts, rotary, rotate
from antiphon.sampling import GREEDY
from tests.models import CPU, assert_same, omni
from tests.test_engine import alone, options, same, say

LENGTHS = (3, 1, CACHE_BLOCK - 1, CACHE_BLOCK, 0)  # of pasts: within a block, at its end, none


def thinker():
    return omni().thinker


def cache(capacity: int = 1024) -> KVCache:
    return thinker().init_state(1, capacity, CPU, torch.float32)


def steps(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def one_step(pool: BlockPool | None) -> Steps:
    decode = bound(thinker().model)
    return Steps(lambda caches, places, x: decode(x[None], caches, places)[0].unbind(), cache(), pool)


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


@torch.inference_mode()
def test_several_positions_of_each_cache_are_read_end_to_end():
    """With a pool by a recording, which serves other numbers of them too; without by the statements."""
    pool, whole = BlockPool.like(cache(), 16), [steps(length, length) for length in (240, 20, 3)]
    ways = [(one_step(own), [cache() if own is None else own.hold(cache()) for _ in whole]) for own in (pool, None)]
    for counts in ([240, 20, 3], [2, 7, 4], [9, 1, 3]):
        x = steps(sum(counts), 100 + counts[0])
        if counts[0] == 240:
            x = torch.cat(whole)
        else:
            whole = [torch.cat([past, part]) for past, part in zip(whole, x.split(counts), strict=True)]
        for step, caches in ways:
            found = step(caches, x, steps=counts)[0].split(counts)
            for row, past in enumerate(whole):
                assert caches[row].filled == int(caches[row].length) == len(past)
                assert_same(found[row][-1], thinker()(past[None])[0][0, -1])
    assert len(ways[0][0].records) == 2  # 13 positions are padded to 16 as others are


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


def in_pools(monkeypatch: Any, blocks: int) -> None:
    """Engines that are made from now on have pools, as on CUDA."""
    for lane in (antiphon.engine.speaking, antiphon.engine.thinking):
        monkeypatch.setattr(lane, "pool_for", lambda cache: BlockPool.like(cache, blocks))


def test_an_engine_whose_caches_are_blocks_gives_what_the_readable_loop_gives(monkeypatch, tmp_path):
    """As on CUDA, but for the graphs: two turns of three, with a cut, a save and a fork between them."""
    in_pools(monkeypatch, 60)
    engine = Engine(omni())
    calls, seeds = [engine.open(window=1) for _ in range(3)], (0, 5, 10)  # which draw in the same way
    answers = [ask(call, seed) for call, seed in zip(calls, seeds, strict=True)]
    engine.run()
    assert all(isinstance(call.session.talker, BlockCache) for call in calls)
    for seed, events in zip(seeds, answers, strict=True):
        same(alone(seed)[0], events.reply())
    calls[0].truncate(240)
    saved, forked = calls[1].save(tmp_path / "call.safetensors"), calls[2].copy()
    engine.run()
    saved.result()
    calls = [calls[0], engine.load(tmp_path / "call.safetensors"), engine.adopt(forked.result())]
    again = [ask(call, seed + 5) for call, seed in zip(calls, seeds, strict=True)]
    engine.run()
    for cut, seed, events in zip((True, False, False), seeds, again, strict=True):
        session = Session(omni(), window=1)
        ask(session, seed)
        if cut:
            session.truncate(240)
        same(ask(session, seed + 5), events.reply())


def ask(conversation: Any, seed: int) -> Any:
    """A question, and the answer: its events, or the reply of a readable session."""
    say(conversation, seed)
    events = conversation.respond(**options(seed))
    return collect(events) if isinstance(conversation, Session) else events


def test_a_frame_that_fails_in_one_way_is_undone_in_the_others(monkeypatch):
    """Two draw their codes in one way and are done when the third, which draws otherwise, raises."""
    engine, codes = Engine(omni()), Speaking.codes
    calls = [engine.open() for _ in range(3)]

    def failing(self: Speaking, way: Any, some: Any, hidden: Tensor) -> Any:
        if any(call is calls[2] and turn.frames == 3 for call, turn in some):
            raise RuntimeError("broken on purpose")
        return codes(self, way, some, hidden)

    monkeypatch.setattr(Speaking, "codes", failing)
    how = {"max_frames": 6, "max_text_tokens": 12, "verbatim": True}
    ways = [{"seed": 1}, {"seed": 2}, {"seed": 3, "residual": GREEDY}]
    for call in calls:
        call.append_text("hello")
    answers = [call.respond(**how, **way) for call, way in zip(calls, ways, strict=True)]
    engine.run()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        answers[2].reply()
    for events, way in zip(answers[:2], ways[:2], strict=True):
        session = Session(omni())
        session.append_text("hello")
        same(collect(session.respond(**how, **way)), events.reply())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_all_at_once_are_those_in_turn(dtype):
    """As on CUDA, where the host does not learn which of them are used; some are not."""
    experts = Experts(6, 16, 8).to(dtype)
    x, chosen = torch.randn(9, 16, dtype=dtype), torch.tensor([5, 0, 0, 3, 5, 5, 1, 0, 3])
    expected = experts._in_turn(x, chosen)
    assert_close(experts._grouped(x, chosen), expected)
    assert expected.abs().max() > 0.1


@torch.inference_mode()
def test_rotary_positions_of_a_bfloat16_model_are_rounded_once():
    """In bfloat16 throughout, MTP's would be heard."""
    attention, turn = Attention(16, 2, 1, 8).bfloat16(), rotary(torch.arange(3000, 3050), 8, 1e4, torch.bfloat16)
    x, cache = torch.randn(50, 16).bfloat16(), FrameCache.empty(1, 1, 1, 8, 50, CPU, torch.bfloat16)
    attention(x, turn, cache.span(50), 0)
    key = attention.qkv_proj(x)[:, 16:24, None].transpose(1, 2).float()
    wide = rotary(torch.arange(3000, 3050), 8, 1e4, torch.float32)
    assert torch.equal(cache.k[0, 0, 0], rotate(key, *wide)[:, 0].bfloat16())
    assert not torch.equal(cache.k[0, 0, 0], rotate(key.bfloat16(), *(part.bfloat16() for part in wide))[:, 0])


def test_who_does_not_fit_into_the_pool_is_refused_at_the_door(monkeypatch):
    in_pools(monkeypatch, 5)
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


@pytest.mark.long
def test_an_engine_on_kernels_gives_what_the_readable_loop_gives(monkeypatch):
    """As on CUDA, but for the graphs: blocks of a pool, recorded ears, and every kernel in Triton's interpreter."""
    pytest.importorskip("triton")
    shape = {f"{part}.head_dim": 16 for part in ("thinker_config.text_config", "talker_config.text_config")}
    model = omni({**shape, "talker_config.code_predictor_config.head_dim": 16})
    how, expected = {"max_frames": 3, "max_text_tokens": 4, "verbatim": True}, list[Any]()
    for seed in (0, 1):
        session = Session(model, window=1)
        say(session, seed)
        expected.append(collect(session.respond(seed=seed, **how)))
    from antiphon.kernels import attention

    used, real = list[int](), attention.attend
    monkeypatch.setattr(attention, "attend", lambda *given: used.append(given[4]) or real(*given))
    for user in (antiphon.layers, antiphon.engine.speaking, antiphon.code2wav):
        monkeypatch.setattr(user, "usable", lambda like: not torch.is_grad_enabled())
    in_pools(monkeypatch, 20)
    for user in (antiphon.engine.capture, antiphon.engine.thinking, antiphon.engine.speaking, antiphon.engine.sounding):
        monkeypatch.setattr(user, "capture", lambda step, state, *_: partial(step, state))
    monkeypatch.setattr(antiphon.caches, "in_blocks", lambda positions: True)
    engine = Engine(model)
    calls = [engine.open(window=1) for _ in range(2)]
    for seed, call in enumerate(calls):
        say(call, seed)
    answers = [call.respond(seed=seed, **how) for seed, call in enumerate(calls)]
    engine.run()
    for events, reply in zip(answers, expected, strict=True):
        same(reply, events.reply())
    assert len(used) > 3 * (2 + 4), "of two layers of the Talker, and of MTP's one, which takes a step for each code"
