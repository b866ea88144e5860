"""The experts' kernels give what `layers.Experts` gives, in any company: on CUDA, else in the interpreter."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from triton.runtime import interpreter  # noqa: E402

from antiphon.kernels.experts import FEW_PAIRS, MOST_PAIRS, experts, fits, route  # noqa: E402
from antiphon.layers import Experts  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """The interpreter holds bfloat16 as its bits, and its tl.dot multiplies those as whole numbers."""
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )


class Layer(NamedTuple):
    """Tokens, their experts and all experts' weights; `x` [N, W], chosen and weight [N, k]."""

    x: Tensor
    chosen: Tensor
    weight: Tensor
    experts: Experts

    def run(self, rows: list[int] | None = None, residual: Tensor | None = None) -> Tensor:
        """Those rows alone, in that order."""
        at = slice(None) if rows is None else rows
        matrices = self.experts.gate_up_proj.detach(), self.experts.down_proj.detach()
        return experts(self.x[at], self.chosen[at], self.weight[at], *matrices, residual)

    @torch.no_grad()
    def expected(self) -> Tensor:
        """In float32 of the same numbers."""
        wide = Experts(self.experts.count, *self.experts.down_proj.shape[1:]).to(DEVICE)
        wide.load_state_dict(self.experts.state_dict())
        return wide(self.x.float(), self.chosen, self.weight)


def layer(tokens: int, count: int, top_k: int, width: int, inner: int, dtype: torch.dtype, *, seed: int = 0) -> Layer:
    random = torch.Generator().manual_seed(seed)
    box = Experts(count, width, inner)
    for matrix in box.parameters():
        matrix.data.copy_(torch.randn(matrix.shape, generator=random) * matrix.shape[-1] ** -0.5)
    x = torch.randn(tokens, width, generator=random).to(dtype)
    scores = torch.randn(tokens, count, generator=random)
    weight, chosen = scores.softmax(-1).topk(top_k)
    return Layer(x.to(DEVICE), chosen.int().to(DEVICE), weight.to(DEVICE), box.to(DEVICE, dtype))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.1
    assert found.shape == expected.shape
    error = (found.float() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[found.dtype]


# ---------------------------------------------------------------------------------------------------- routing


@every_dtype
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("count", "top_k"), [(2, 1), (2, 2), (8, 6), (128, 8), (200, 6)])
def test_routes_are_the_best_of_the_softmax(count, top_k, normalize, dtype):
    random = torch.Generator().manual_seed(count)
    # numbers apart even in bfloat16, so that there is one answer
    scores = torch.stack([torch.randperm(count, generator=random) for _ in range(3)]).to(DEVICE, dtype) / 16
    weight, chosen = route(scores, top_k, normalize)
    expected, places = scores.float().softmax(-1).topk(top_k)
    assert torch.equal(chosen.long(), places)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected / expected.sum(-1, keepdim=True) if normalize else expected)


def test_of_equal_scores_the_first_expert_is_taken():
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0], [3.0] * 6], device=DEVICE)
    weight, chosen = route(scores, 4, True)
    assert chosen.tolist() == [[1, 3, 5, 2], [0, 1, 2, 3]]
    assert torch.equal(weight[1], torch.full_like(weight[1], 0.25))


def test_experts_of_numbers_that_are_none_exist():
    scores = torch.zeros(2, 5, device=DEVICE)
    scores[0, 1] = torch.nan
    weight, chosen = route(scores, 3, True)
    assert ((chosen >= 0) & (chosen < 5)).all()
    assert weight[0].isnan().all()
    assert weight[1].isfinite().all()


# ------------------------------------------------------------------------------------------- against layers.py

SHAPES = [  # tokens, experts, k, width, inner; sizes around those of the tiles, even and odd
    (1, 2, 1, 64, 32),
    (1, 8, 8, 33, 21),
    (2, 128, 8, 64, 20),
    pytest.param((1, 3, 2, 2100, 6), marks=pytest.mark.long),
    pytest.param((1, 3, 2, 6, 1100), marks=pytest.mark.long),
    pytest.param((3, 128, 6, 72, 40), marks=pytest.mark.long),
    (5, 8, 6, 33, 21),
    pytest.param((5, 128, 8, 256, 16), marks=pytest.mark.long),
    (16, 2, 2, 130, 48),
    pytest.param((16, 8, 8, 64, 32), marks=pytest.mark.long),
    pytest.param((64, 8, 6, 48, 24), marks=pytest.mark.long),
    pytest.param((64, 2, 1, 31, 270), marks=pytest.mark.long),
]


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_kernels_are_the_experts(shape, dtype):
    tokens, count, top_k, width, inner = shape
    case = layer(tokens, count, top_k, width, inner, dtype)
    assert fits(case.x, case.chosen)
    found = case.run()
    assert found.dtype == dtype
    assert_close(found, case.expected())


@every_dtype
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_residual_is_added_and_indices_may_be_wide(tokens, dtype):
    case = layer(tokens, 8, 6, 40, 24, dtype)
    residual = torch.randn(40, tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).t()
    found = case._replace(chosen=case.chosen.long()).run(residual=residual)
    assert_close(found, case.expected() + residual.float())


@pytest.mark.parametrize("tokens", [1, 20])
def test_all_tokens_may_have_one_expert(tokens):
    case = layer(tokens, 4, 2, 40, 24, torch.float32)
    case = case._replace(chosen=torch.full_like(case.chosen, 3))  # twice for each token: 40 pairs in tiles of 16
    assert_close(case.run(), case.expected())


@pytest.mark.long
@pytest.mark.parametrize("count", [8, 48], ids=["programs of experts", "programs of pairs"])
def test_a_list_longer_than_what_is_read_at_once(count):
    case = layer(46, count, 6, 20, 20, torch.float32)
    if count == 48:  # 276 pairs, and yet a program for each
        case = layer(46, 300, 6, 20, 20, torch.float32)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("tokens", [2, pytest.param(7, marks=pytest.mark.long)])
def test_experts_that_nobody_chose_are_not_read(tokens):
    case = layer(tokens, 30, 3, 33, 21, torch.float32)
    used = torch.zeros(30, dtype=torch.bool, device=DEVICE)
    used[case.chosen.flatten().long()] = True
    assert not used.all()
    expected = case.run()
    for matrix in case.experts.parameters():
        matrix.data[~used] = torch.nan
    assert expected.isfinite().all()
    assert torch.equal(case.run(), expected)


# ---------------------------------------------------------------------------------------------------- company


@pytest.mark.long
@every_dtype
@pytest.mark.parametrize(
    ("tokens", "top_k", "batches"),
    [(2, 6, ([0], [1], [1, 0])), (24, 6, ([3, 0, 23], [*range(23, -1, -1)], [0] * 20, [17, 3, 5, 9, 0]))],
    ids=["few", "many"],
)
def test_company_changes_no_bit(tokens, top_k, batches, dtype):
    case = layer(tokens, 40, top_k, 150, 40, dtype)
    case.x[-1] = torch.nan if tokens > 2 else case.x[-1]  # not even the worst company
    alone = case.run()
    assert alone[:-1].isfinite().all()
    for rows in batches:
        assert (len(rows) * top_k > FEW_PAIRS) == (tokens * top_k > FEW_PAIRS)
        found, own = case.run(rows).nan_to_num(), alone[rows].nan_to_num()
        if DEVICE == "cpu":  # where numpy multiplies a row of a tile as its place in the tile has it
            assert_close(found, own.float())
        else:
            assert torch.equal(found, own)


def test_what_fits():
    chosen = torch.zeros(MOST_PAIRS // 8, 8, dtype=torch.int32)
    x = torch.zeros(len(chosen), 16)
    assert fits(x, chosen)
    assert fits(x.bfloat16(), chosen)
    assert not fits(x.double(), chosen)
    assert not fits(x, torch.zeros(MOST_PAIRS // 8 + 1, 8))
    assert not fits(x[:0], chosen[:0])
