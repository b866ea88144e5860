"""Norms, gates and attention as kernels give what the plain statements give: on CUDA, else in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from antiphon.caches import Pages  # noqa: E402
from antiphon.kernels import attention, norms  # noqa: E402
from antiphon.layers import RMSNorm, attend, rotary, rotate, unit_rms  # noqa: E402
from antiphon.layers import gated as plain_gated  # noqa: E402

# the interpreter multiplies no matrices of bfloat16
TOLERANCE: dict[torch.dtype, Any] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [48, 256, 1000])
def test_a_norm_is_the_norm(width, dtype):
    norm = RMSNorm(width, 1e-6).to(DEVICE, dtype)
    norm.weight.copy_(1 + 0.1 * numbers(width, seed=1))
    x = 3 * numbers(2, 5, width, dtype=dtype)
    assert_close(norms.rms_norm(x, norm.weight, 1e-6), norm(x), **TOLERANCE[dtype])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inner", [40, 1500])
def test_a_gate_is_the_gate(inner, dtype):
    x = 2 * numbers(3, 2 * inner, dtype=dtype)
    assert_close(norms.gated(x), plain_gated(x), **TOLERANCE[dtype])


def by_hand(qkv: Tensor, weight: Tensor | None, turn: tuple[Tensor, Tensor], pages: Pages, h: int) -> Tensor:
    """Steps one after another, with plain statements."""
    k, v = pages.k[0], pages.v[0]
    steps, (_, kept, _, dim) = len(qkv), k.shape
    parts, q, out = qkv.view(steps, -1, dim), list[Tensor](), list[Tensor]()
    for n in range(steps):
        qk = parts[n, : h + kept]
        if weight is not None:
            unit = unit_rms(weight[0], 1e-6)
            qk = unit(qk) * torch.cat([weight[0].expand(h, -1), weight[1].expand(kept, -1)])
        cos, sin = (part[n % len(part)] for part in turn)
        qk = rotate(qk.float(), cos, sin).to(qkv.dtype)
        q.append(qk[:h])
        k[pages.block[n], :, pages.slot[n]], v[pages.block[n], :, pages.slot[n]] = qk[h:], parts[n, h + kept :]
    for n in range(steps):
        seen = int(pages.place[n]) + 1
        keys, values = (pool[pages.table[n]].transpose(0, 1).flatten(1, 2)[None, :, :seen] for pool in (k, v))
        out.append(attend(q[n][None, None], keys, values, None))
    return torch.cat(out)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kept", "dim", "slots"), [(8, 1, 16, 64), (4, 2, 32, 128), (3, 3, 16, 8)])
@pytest.mark.parametrize(("normed", "few"), [(True, 128), (False, 0)])
def test_steps_after_pasts_of_any_length_attend_as_by_hand(heads, kept, dim, slots, normed, few, dtype, monkeypatch):
    """Two sequences with several steps each and one with one, in blocks that lie anywhere; some are at a border."""
    monkeypatch.setattr(attention, "FEW", few)
    width = 1 if slots < 16 else 4
    starts, counts = ([0, slots - 3, slots // 2] if width == 1 else [0, 2 * slots - 1, 3 * slots]), [2, 3, 1]
    place = torch.cat([torch.arange(a, a + c) for a, c in zip(starts, counts, strict=True)]).to(DEVICE)
    blocks = 1 + torch.randperm(3 * width, generator=torch.Generator().manual_seed(3)).view(3, width).to(DEVICE)
    table = blocks.repeat_interleave(torch.tensor(counts).to(DEVICE), 0)
    where = (table.gather(1, place[:, None] // slots)[:, 0], place % slots, table, place)
    qkv, turn = numbers(6, (heads + 2 * kept) * dim, dtype=dtype), rotary(place, dim, 1e4, dtype)
    pool = numbers(2, 1, 1 + 3 * width, kept, slots, dim, seed=1, dtype=dtype)
    weight = 1 + 0.1 * numbers(2, dim, seed=2) if normed else None
    weight = None if weight is None else weight.to(dtype)
    ours, theirs = pool.clone(), pool.clone()
    found = attention.attend(
        qkv, None if weight is None else (weight, 1e-6), turn, Pages._make([*ours, *where]), 0, heads
    )
    expected = by_hand(qkv, weight, turn, Pages._make([*theirs, *where]), heads)
    assert_close(found, expected, **TOLERANCE[dtype])
    assert_close(ours, theirs, **TOLERANCE[dtype])
    assert expected.float().std() > 0.1


@torch.inference_mode()
def test_what_a_step_gives_does_not_depend_on_the_others_nor_on_how_long_they_have_been_there():
    pool, qkv = numbers(2, 1, 9, 1, 64, 16), numbers(2, 3 * 16)
    table, place = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6]], device=DEVICE), torch.tensor([70, 200], device=DEVICE)
    turn = rotary(place, 16, 1e4, torch.float32)
    where = (table.gather(1, place[:, None] // 64)[:, 0], place % 64, table, place)
    pages = Pages._make([*pool.clone(), *where])
    alone = Pages._make([*pool.clone(), where[0][:1], where[1][:1], table[:1, :2], place[:1]])
    both = attention.attend(qkv, None, turn, pages, 0, 1)
    one = attention.attend(qkv[:1], None, (turn[0][:1], turn[1][:1]), alone, 0, 1)
    assert torch.equal(both[:1], one)
