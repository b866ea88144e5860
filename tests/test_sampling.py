import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from antiphon.errors import InputError
from antiphon.sampling import (
    GREEDY,
    MTP,
    TALKER,
    THINKER,
    THINKER_CODEBOOK,
    NoiseKey,
    Sampling,
    choose,
    filtered,
    gumbel,
    uniform,
)

NO_IDS: Any = None  # the processors take ids and most do not look at them
MASK = (1 << 64) - 1
PINNED_UNIFORM = [0.47141042966848035, 0.7247520786262142]
PINNED_DRAWS = [2836, 545, 2263, 2972, 409, 327, 218, 245, 1827, 1554, 2127, 1718]


def random_logits(rows: int, size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draws(logits: Tensor, sampling: Sampling, n: int, **masks: Tensor) -> Tensor:
    """Ids of `n` draws from one row of logits, one frame each."""
    key = NoiseKey(1, 2, torch.arange(n), 0)
    return choose(logits.expand(n, -1), sampling, key, **masks)


# ---------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 50, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.8, 0.3, 1e-9])
def test_the_support_is_that_of_transformers(top_k, top_p):
    logits = random_logits(64, 100)
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(NO_IDS, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(NO_IDS, expected)
    assert torch.equal(filtered(logits, Sampling(1.0, top_k, top_p)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampling", [TALKER, MTP, Sampling(0.7, 20, 0.9, 1.3), Sampling(1.5, 0, 0.6, 0.8)])
def test_the_whole_chain_has_the_order_of_transformers(sampling, dtype):
    logits = random_logits(300, 80, seed=1).to(dtype)
    history = torch.randint(80, (300, 12), generator=torch.Generator().manual_seed(2))
    banned = [3, 17, 41]
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    chain += [SuppressTokensLogitsProcessor(banned), TemperatureLogitsWarper(sampling.temperature)]
    chain += [TopKLogitsWarper(sampling.top_k or 80), TopPLogitsWarper(sampling.top_p)]
    key = NoiseKey(5, 6, torch.arange(300), 7)
    expected = (chain(history, logits.clone()) + gumbel(key, 80, "cpu")).argmax(-1)  # pyright: ignore[reportArgumentType]
    seen = torch.zeros(300, 80, dtype=torch.bool).scatter(1, history, True)
    suppress = torch.zeros(80, dtype=torch.bool).index_fill(0, torch.tensor(banned), True)
    assert torch.equal(choose(logits, sampling, key, seen, suppress), expected)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 4), (1.0, 4)):
        assert filtered(logits, Sampling(1.0, 0, top_p)).isfinite().sum() == kept  # the last two are equal


def test_equal_scores_stay_or_go_together():
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert filtered(tied, Sampling(1.0, 1)).isfinite().tolist() == [[False, True, True, False]]
    assert filtered(tied, Sampling(1.0, 0, 0.1)).isfinite().tolist() == [[False, True, True, False]]


def test_greedy_takes_the_best_id_after_penalty_and_suppression():
    logits = torch.tensor([[5.0, 4.9, -1.0], [-1.0, -1.01, -9.0]])
    penalised = Sampling(0.0, repetition_penalty=1.1)
    seen = torch.tensor([[True, False, False], [True, False, False]])
    assert choose(logits, GREEDY).tolist() == [0, 0]
    assert choose(logits, penalised).tolist() == [0, 0]
    assert choose(logits, penalised, seen=seen).tolist() == [1, 1]
    assert choose(logits, GREEDY, suppress=torch.tensor([True, True, False])).tolist() == [2, 2]


def test_suppressed_ids_are_never_drawn():
    suppress = torch.tensor([True, False, False, True])
    ids = draws(torch.tensor([[9.0, 0.0, 0.0, 9.0]]), Sampling(1.0), 500, suppress=suppress)
    assert set(ids.tolist()) == {1, 2}


def test_half_precision_is_computed_in_single_and_double_stays_double():
    # 1 + 2^-30 exists in float64 only: cast down, the first of two equal ids would win
    assert choose(torch.tensor([[1.0, 1.0 + 2.0**-30]], dtype=torch.float64), GREEDY).item() == 1
    # in bfloat16 all these penalised scores would be equal
    logits = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    assert choose(logits, Sampling(0.0, repetition_penalty=1.001), seen=torch.tensor([[False, True]])).item() == 1
    huge = torch.tensor([[-60000.0, -50000.0]], dtype=torch.float16)  # twice that overflows
    assert choose(huge, Sampling(0.0, repetition_penalty=2.0), seen=torch.tensor([[True, True]])).item() == 1


def test_a_draw_without_a_key_is_a_programming_error():
    with pytest.raises(ValueError, match="NoiseKey"):
        choose(torch.zeros(1, 3), TALKER)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-40},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_settings_without_a_meaning_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        replace(Sampling(1.0), **change)


def test_the_released_settings():
    assert (TALKER.temperature, TALKER.top_k, TALKER.top_p, TALKER.repetition_penalty) == (0.9, 50, 1.0, 1.05)
    assert (MTP.temperature, MTP.top_k, MTP.top_p, MTP.repetition_penalty) == (1.0, 50, 0.8, 1.0)
    assert THINKER.greedy
    assert GREEDY.greedy
    assert not TALKER.greedy


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_still_draw(temperature):
    ids = draws(random_logits(1, 20).float(), Sampling(temperature, 0, 0.9), 400)
    assert (len(set(ids.tolist())) == 1) == (temperature < 1)


# ---------------------------------------------------------------------------------------------- the draw


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 8), Sampling(1.3, 0, 0.9)])
def test_ids_are_drawn_as_often_as_their_probability_says(sampling):
    n, logits = 40000, random_logits(1, 16, seed=3, scale=1.0)
    p = filtered(logits / sampling.temperature, sampling).softmax(-1)[0]
    counts = draws(logits, sampling, n).bincount(minlength=16)
    assert counts[p == 0].sum() == 0
    kept = p > 0
    chi2 = ((counts[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_a_row_draws_the_same_in_any_batch():
    logits = random_logits(32, 200, seed=4).float()
    key = NoiseKey(torch.arange(32) * 7, torch.arange(32) % 3, torch.arange(32) ** 2, 5)
    together = choose(logits, MTP, key)
    for i in range(32):
        alone = NoiseKey(7 * i, i % 3, i**2, 5)
        assert choose(logits[i : i + 1], MTP, alone).item() == together[i]
        assert torch.equal(gumbel(alone, 200, "cpu")[0], gumbel(key, 200, "cpu")[i])


def test_a_draw_leaves_torchs_generators_alone():
    before = torch.get_rng_state()
    draws(random_logits(1, 8), TALKER, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("part", ["seed", "turn", "frame", "codebook"])
def test_every_part_of_the_key_changes_the_noise(part):
    key = NoiseKey(3, 3, 3, 3)
    assert not torch.equal(gumbel(key, 8, "cpu"), gumbel(key._replace(**{part: 4}), 8, "cpu"))


def test_parts_of_the_key_are_not_interchangeable():
    keys = [
        NoiseKey(1, 2, 3, 4),
        NoiseKey(2, 1, 3, 4),
        NoiseKey(1, 3, 2, 4),
        NoiseKey(1, 2, 4, 3),
        NoiseKey(4, 3, 2, 1),
    ]
    assert len({gumbel(key, 4, "cpu").sum().item() for key in keys}) == len(keys)


# ---------------------------------------------------------------------------------------------- noise


def splitmix(key: tuple[int, ...], i: int) -> float:
    """The definition, in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    state = 0
    for part in (*key, i):
        state = mix((state + (part + 1) * 0x9E3779B97F4A7C15) & MASK)
    return ((state >> 12) + 0.5) / 2**52


@pytest.mark.parametrize(
    "key", [(0, 0, 0, 0), (1, 2, 3, 4), (-5, 0, 7, THINKER_CODEBOOK), (2**63 - 1, 9, 10**6, 15), (2**64 + 3, 1, 1, 1)]
)
def test_the_noise_is_splitmix64_of_the_key(key):
    expected = [splitmix(key, i) for i in range(40)]
    assert uniform(NoiseKey(*key), 40, "cpu")[0].tolist() == expected


def test_the_noise_of_a_release_is_the_noise_of_the_next():
    # a saved session, resumed by another version, has to go on as it would have
    assert uniform(NoiseKey(0, 0, 0, 0), 2, "cpu")[0].tolist() == PINNED_UNIFORM
    logits = (37 * torch.arange(3072) % 1009 / 100).unsqueeze(0)
    assert draws(logits, TALKER, 12).tolist() == PINNED_DRAWS


def test_no_noise_is_infinite():
    u = uniform(NoiseKey(0, 0, torch.arange(64), 0), 3072, "cpu")
    assert u.min() > 0
    assert u.max() < 1
    assert gumbel(NoiseKey(0, 0, torch.arange(64), 0), 3072, "cpu").isfinite().all()
    # the largest and the smallest of 52 bits
    for u in ((2**52 - 0.5) / 2**52, 0.5 / 2**52):
        assert math.isfinite(-math.log(-math.log(u)))


def test_noise_has_the_precision_that_devices_agree_on():
    noise = gumbel(NoiseKey(1, 2, 3, 4), 3072, "cpu")
    assert noise.dtype == torch.float64
    assert torch.equal(noise, noise.float().double())


def test_numbers_are_uniform():
    u = uniform(NoiseKey(11, 0, torch.arange(100), 0), 1000, "cpu").flatten()
    counts = (u * 100).long().bincount(minlength=100)
    chi2 = ((counts - 1000.0) ** 2 / 1000).sum()
    assert 99 - 4 * math.sqrt(198) < chi2 < 99 + 4 * math.sqrt(198)


def test_neighbours_are_independent():
    # grid [seed, turn, frame, codebook, id]: along no axis and no diagonal does a number tell its neighbour
    rows = torch.cartesian_prod(torch.arange(6), torch.arange(6), torch.arange(6))
    seed, turn, frame = rows.unbind(1)
    u = torch.stack([uniform(NoiseKey(seed, turn, frame, codebook), 256, "cpu") for codebook in range(6)], 1)
    z = (u.view(6, 6, 6, 6, 256) - 0.5) * math.sqrt(12)
    for axes in [(0,), (1,), (2,), (3,), (4,), (0, 1), (2, 3), (1, 2), (3, 4), (0, 1, 2, 3, 4)]:
        first, second = z, z
        for axis in axes:
            size = z.shape[axis]
            first, second = first.narrow(axis, 0, size - 1), second.narrow(axis, 1, size - 1)
        assert (first * second).mean().abs() < 4 / math.sqrt(first.numel()), axes
