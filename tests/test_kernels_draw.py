"""The kernels that draw ids and that bend Code2Wav's waves: on CUDA if it is there, else in Triton's interpreter."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from antiphon.code2wav import SnakeBeta  # noqa: E402
from antiphon.kernels.draw import LARGEST, draw  # noqa: E402
from antiphon.kernels.snake import snake  # noqa: E402
from antiphon.sampling import GREEDY, MTP, TALKER, NoiseKey, Sampling, choose  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter, where all is -inf
NOWHERE = float("-inf")
SAMPLINGS = {
    "talker": TALKER,
    "mtp": MTP,
    "greedy": GREEDY,
    "greedy and penalised": Sampling(0.0, repetition_penalty=1.3),
    "plain": Sampling(1.0),
    "hot": Sampling(1.7, 0, 0.9),
    "wide": Sampling(0.6, 400, 0.97, 1.2),
    "narrow": Sampling(0.8, 2, 0.5, 0.9),
    "one": Sampling(1.0, 1),
    "a little": Sampling(1.0, 0, 1e-9),
    "nearly all": Sampling(2.0, 0, 0.999999),
    "more than there are": Sampling(1.0, 5000, 0.7),
}


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(rows: int, size: int, seed: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Scores [B, V], keys [B, 3] and what was seen and is suppressed."""
    source = random(seed)
    scores = torch.randn(rows, size, generator=source) * spread
    keys = torch.randint(-(2**63), 2**63 - 1, (rows, 4), generator=source)[:, :3]  # columns of something wider
    keys[::2] = torch.randint(0, 500, (len(keys[::2]), 3), generator=source)
    seen = torch.rand(rows, size, generator=source) < 0.2
    return scores, keys, {"seen": seen, "suppress": torch.rand(size, generator=source) < 0.1}


def drawn(logits: torch.Tensor, sampling: Sampling, keys: torch.Tensor, codebook: int, **marks: Any) -> torch.Tensor:
    given = {name: mark.to(DEVICE) for name, mark in marks.items()}
    place = keys.to(DEVICE)
    return draw(logits.to(DEVICE), sampling, place[:, 0], place[:, 1], place[:, 2], codebook, **given).cpu()


def chosen(logits: torch.Tensor, sampling: Sampling, keys: torch.Tensor, codebook: int, **marks: Any) -> torch.Tensor:
    return choose(logits, sampling, NoiseKey(keys[:, 0], keys[:, 1], keys[:, 2], codebook), **marks)


def assert_same(logits: torch.Tensor, sampling: Sampling, keys: torch.Tensor, codebook: int = 3, **marks: Any) -> None:
    """That the kernel draws what `choose` draws, from these scores as they are."""
    ids = drawn(logits, sampling, keys, codebook, **marks)
    assert ids.dtype == torch.long
    assert ids.tolist() == chosen(logits, sampling, keys, codebook, **marks).tolist()


# ------------------------------------------------------------------------------------------------------ draw


EVERY_SAMPLING = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
EVERY_SIZE = pytest.mark.parametrize(
    "size", [333, pytest.param(2048, marks=pytest.mark.long), pytest.param(3072, marks=pytest.mark.long)]
)
EVERY_NUMBER = pytest.mark.parametrize("rows", [2, pytest.param(12, marks=pytest.mark.long)])


@EVERY_SAMPLING
@EVERY_SIZE
@EVERY_NUMBER
def test_the_ids_are_those_of_choose(sampling, size, rows):
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        scores, keys, marks = case(rows, size, size + i)
        assert_same(scores.to(dtype), sampling, keys, **marks)


def test_what_is_drawn_varies():
    scores, keys, _ = case(1, 2048, 1)
    ids = drawn(scores.expand(8, -1), MTP, torch.cat([keys[:, :2].expand(8, -1), torch.arange(8)[:, None]], 1), 1)
    assert len(ids.unique()) > 2


@pytest.mark.parametrize("codebook", [-1, 0, 1, 15, 16])
def test_every_codebook_has_noise_of_its_own(codebook):
    scores, keys, _ = case(2, 500, 2, spread=0.1)
    assert_same(scores.half(), Sampling(1.0), keys, codebook)
    assert drawn(scores, Sampling(1.0), keys, codebook).tolist() != drawn(scores, Sampling(1.0), keys, 7).tolist()


@pytest.mark.parametrize("sampling", [TALKER, MTP, Sampling(1.0, 0, 0.6), GREEDY, Sampling(0.9, 3)])
def test_ids_of_equal_score_stay_or_go_together(sampling):
    scores, keys, marks = case(2, 300, 3, spread=2.0)
    assert_same(scores.round(), sampling, keys, **marks)  # a dozen values, both zeros among them
    assert_same(torch.zeros_like(scores) * scores.sign(), sampling, keys)
    border = torch.full((2, 64), -4.0)
    border[:, 5:9] = torch.tensor([3.0, 2.0, 2.0, 2.0])
    assert_same(border, sampling, keys)


def test_both_zeros_are_one_score_at_the_border():
    scores = torch.tensor([[1.0, -0.0, 0.0, -0.0, -1.0, -2.0]]).expand(20, -1)
    keys = case(20, 1, 4)[1]
    assert_same(scores, Sampling(1.0, 2), keys)
    assert {1, 2, 3} < set(drawn(scores, Sampling(1.0, 2), keys, 3).tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("sampling", [MTP, GREEDY, Sampling(1.0)])
def test_ids_without_a_chance_are_not_drawn(sampling):
    scores, keys, _ = case(2, 200, 5)
    scores[:, 7:] = NOWHERE  # fewer than top_k are left
    scores[1, :6] = NOWHERE
    assert_same(scores, sampling, keys)
    assert drawn(scores, sampling, keys, 3)[1] == 6
    assert_same(torch.full((2, 200), NOWHERE), sampling, keys)
    assert_same(scores, sampling, keys, suppress=torch.arange(200) < 200)


@pytest.mark.parametrize("spread", [1e-6, 30.0, 1e30])
def test_scores_of_any_size(spread):
    scores, keys, marks = case(2, 257, 6, spread)
    for sampling in (MTP, Sampling(1.3, 20, 0.9, 1.1)):
        assert_same(scores, sampling, keys, **marks)
        assert_same(scores.abs() + spread, sampling, keys)


@pytest.mark.parametrize("size", [1, 2, 5, 64, 4096])
def test_sizes_from_one_to_the_largest(size):
    scores, keys, marks = case(2, size, 8)
    assert_same(scores, Sampling(0.9, 50, 0.9, 1.05), keys, **marks)


def test_rows_may_lie_apart():
    scores, keys, marks = case(6, 128, 9)
    assert_same(scores[::2], TALKER, keys[::2], seen=marks["seen"][::2])
    assert_same(scores[:0], TALKER, keys[:0])


def test_a_row_that_registers_do_not_hold_is_refused():
    with pytest.raises(ValueError, match="4097 ids"):
        drawn(torch.zeros(1, LARGEST + 1), MTP, torch.zeros(1, 3, dtype=torch.long), 0)


# ----------------------------------------------------------------------------------------------------- snake

SHAPES = [(1, 96, 1920), (2, 5, 77), (3, 300, 4), (1, 1, 1), (2, 7, 1025), (4, 3, 8)]


def activation(channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What SnakeBeta.bind computes of random parameters."""
    box = SnakeBeta(channels).to(dtype)
    alpha, beta = (torch.randn(channels, generator=random(channels + i)).to(dtype) * 0.5 for i in range(2))
    box.alpha.data, box.beta.data = alpha, beta
    return alpha.exp()[:, None], 1 / (beta.exp()[:, None] + 1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_snake_is_its_formula_rounded_once(shape, dtype):
    x = (torch.randn(shape, generator=random(sum(shape))) * 3).to(dtype)
    alpha, scale = activation(shape[1], dtype)
    y = snake(x.to(DEVICE), alpha.to(DEVICE), scale.to(DEVICE)).cpu()
    exact = x.double() + (x.double() * alpha.double()).sin() ** 2 * scale.double()
    assert y.dtype == dtype
    assert y.shape == x.shape
    # a last place of 1e-6 in float32; in bfloat16 half of one, but the interpreter cuts off where CUDA rounds
    place = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * (0.5 if DEVICE == "cuda" else 1)
    assert ((y.double() - exact).abs() <= place * exact.abs() + 1e-6).all()


def test_snake_is_what_code2wav_has():
    box = SnakeBeta(12)
    box.alpha.data, box.beta.data = (torch.randn(12, generator=random(i)) for i in range(2))
    x = torch.randn(2, 12, 50, generator=random(2))
    alpha, scale = box.alpha.exp()[:, None], 1 / (box.beta.exp()[:, None] + 1e-9)
    made = snake(*(given.detach().to(DEVICE) for given in (x, alpha, scale))).cpu()
    torch.testing.assert_close(made, box(x).detach(), atol=1e-5, rtol=1e-6)
