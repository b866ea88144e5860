"""What is bound computes what its module computes, with the weights of the moment; experts and norms by definition."""

import pytest
import torch
from torch import Tensor, nn

from antiphon import layers
from antiphon.binding import bound
from antiphon.layers import Experts, Linear, RMSNorm
from tests.models import CPU, assert_same
from tests.test_law import BOXES, Box, in_pieces, noise, part

BOUND = [BOXES[name] for name in ("thinker", "talker", "code2wav")]
every_bound = pytest.mark.parametrize("box", BOUND, ids=[box.name for box in BOUND])


def one_row(box: Box, dtype: torch.dtype) -> Tensor:
    return box.rows([3], box.longest, dtype)


@every_bound
@torch.no_grad()
def test_a_bound_box_step_by_step_is_the_box(box):
    """One row: on a CPU the host knows its place in the cache, unlike that of several rows."""
    dtype = torch.float64
    x, state = one_row(box, dtype), box.init(1, dtype)
    run, whole = bound(box.of(dtype)), box.run(one_row(box, dtype), [3], dtype)
    steps = [box.floats(run(piece, state)) for piece in x.split(1, dim=1)]
    for found, expected in zip(zip(*steps, strict=True), whole, strict=True):
        assert_same(torch.cat(found, 1), expected, dtype)


@pytest.mark.parametrize("box", [*BOUND, BOXES["mtp"]], ids=lambda box: box.name)
@torch.no_grad()
def test_one_row_in_pieces_is_the_whole(box):
    dtype = torch.float32
    x = one_row(box, dtype)
    whole = box.run(x, [3], dtype)
    for found, expected in zip(in_pieces(box, x, [2, 1, 1], [3], dtype), whole, strict=True):
        assert_same(found, expected, dtype)


@every_bound
@torch.no_grad()
def test_new_weights_are_heard_at_once(box):
    """Nothing that was computed from weights outlives a call: norms, factors of SnakeBeta, kernels laid out anew."""
    model, x = box.of(torch.float64), one_row(box, torch.float64)[:, :3]
    before = box.run(x, [3], torch.float64)[0]
    last = {name.rpartition(".")[0].rpartition(".")[2]: (name, p) for name, p in model.named_parameters()}
    for kind, (name, p) in last.items():
        if kind in ("q_norm", "k_norm", "qkv_proj", "o_proj", "act1", "input_layernorm", "conv", "down_proj"):
            saved = p.clone()
            p.mul_(0.5).add_(0.1)
            assert not torch.equal(box.run(x, [3], torch.float64)[0], before), name
            p.copy_(saved)
    assert torch.equal(box.run(x, [3], torch.float64)[0], before)


@torch.no_grad()
def test_another_module_in_the_place_of_a_part_is_called():
    box, x = BOXES["thinker"], one_row(BOXES["thinker"], torch.float64)
    layer = box.of(torch.float64).model.layers[1]  # the dense one
    before, plain = box.run(x, [3], torch.float64)[0], layer.mlp.gate_up_proj
    try:
        layer.mlp.gate_up_proj = nn.Sequential(plain)
        assert_same(box.run(x, [3], torch.float64)[0], before, torch.float64)
        layer.mlp.gate_up_proj = nn.Sequential(plain, nn.Tanh())
        assert not torch.equal(box.run(x, [3], torch.float64)[0], before)
    finally:
        layer.mlp.gate_up_proj = plain


@torch.no_grad()
def test_a_copied_frame_goes_its_own_way():
    """The places of a frame are cut out of the cache once; a copy has places of its own."""
    box: nn.Module = part("mtp", torch.float64)
    x = noise((1, 4, part("mtp", torch.float64).config.hidden_size), 5, torch.float64)
    state = part("mtp", torch.float64).init_state(1, CPU, torch.float64)
    whole = box(x, state)
    state.restart()
    box(x[:, :2], state)
    fork = state.copy()
    box(-x[:, 2:3], state)
    assert_same(torch.cat([box(x[:, i : i + 1], fork) for i in (2, 3)], 1), whole[:, 2:], torch.float64)


# ------------------------------------------------------------------------------------------------ by definition


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("most", [0, 1 << 30], ids=["in turn", "together"])
def test_experts_mix_what_each_chosen_one_gives(monkeypatch, most, scales):
    monkeypatch.setattr(layers, "COPIED_AT_MOST", most)
    experts = Experts(5, 6, 4).double()
    if scales:
        experts.gate_up_scale = nn.Parameter(1 + noise((5, 8), 1, torch.float64) ** 2)
        experts.down_scale = nn.Parameter(1 + noise((5, 6), 2, torch.float64) ** 2)
    x, weight = noise((7, 6), 3, torch.float64).requires_grad_(), noise((7, 2), 4, torch.float64)
    chosen = torch.tensor([[0, 4], [4, 0], [2, 0], [0, 2], [4, 2], [0, 4], [2, 4]])  # 1 and 3 are never asked

    def expert(e: int, row: Tensor) -> Tensor:
        up, down = experts.gate_up_proj[e], experts.down_proj[e]
        if experts.gate_up_scale is not None and experts.down_scale is not None:
            up, down = up * experts.gate_up_scale[e, :, None], down * experts.down_scale[e, :, None]
        gate, value = (up @ row).chunk(2)
        return down @ (gate * gate.sigmoid() * value)

    rows = [sum(weight[i, j] * expert(int(chosen[i, j]), x[i]) for j in range(2)) for i in range(7)]
    expected = torch.stack([row for row in rows if isinstance(row, Tensor)])
    found = experts(x, chosen, weight)
    assert_same(found, expected, torch.float64)
    wanted = (x, experts.gate_up_proj, experts.down_proj)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        assert_same(a, b, torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_adds_to_a_residual(bias):
    linear, x, residual = (
        Linear(5, 3, bias=bias).double(),
        noise((4, 5), 1, torch.float64),
        noise((4, 3), 2, torch.float64),
    )
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    assert_same(linear(x), plain, torch.float64)
    assert_same(linear(x, residual), residual + plain, torch.float64)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_the_norm_divides_by_the_root_mean_square(size):
    norm, x = RMSNorm(9, 1e-5).double(), size * noise((4, 9), 1, torch.float64)
    norm.weight.data += noise((9,), 2, torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert_same(norm(x), expected, torch.float64)
    assert not norm(torch.zeros(1, 9, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", ["thinker", "talker", "mtp", "code2wav"])
def test_gradients_reach_every_weight_and_are_right(name):
    box, model = BOXES[name], part(name, torch.float64)
    x = box.rows([3], 3, torch.float64)
    try:
        model.requires_grad_(True)
        if x.is_floating_point():
            assert torch.autograd.gradcheck(
                lambda x: box.run(x, [3], torch.float64)[0], x.requires_grad_(), fast_mode=True
            )
        box.run(x, [3], torch.float64)[0].square().sum().backward()
        unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert all(any(w in n for w in ("embed", "projection", "head")) for n in unused), unused
    finally:
        model.requires_grad_(False)
        model.zero_grad()
