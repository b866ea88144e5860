"""LoRA: only the thin matrices move, and what a run leaves behind has them in the weights, under the weights' names."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from antiphon.errors import ConfigError
from antiphon.files import read_safetensors
from antiphon.train.loop import BEST, STATE, Run, train
from antiphon.train.lora import adapt, merged
from antiphon.train.recipe import Lora
from tests.models import omni
from tests.test_train_loop import TINY, TinyStage, assert_same_run, copied, moved, stopped
from tests.test_train_ranks import apart, one_of_one

LORA = Lora(rank=3, scale=2.0, modules=("maker",), linears=("0", "3"))
ADAPTED = replace(TINY, lora=LORA)
THIN = {f"maker.{i}.{kind}" for i in (0, 3) for kind in ("down", "up")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapted run that was never stopped."""
    folder = tmp_path_factory.mktemp("lora")
    train(TinyStage(ADAPTED), ADAPTED, folder, quiet=True)
    return folder


def test_only_the_thin_matrices_move_and_the_run_goes_on_from_a_stop(whole, tmp_path):
    stage = TinyStage(ADAPTED)
    before = copied(stage)
    run = Run(stage, ADAPTED, tmp_path)
    assert run.weights.keys() > THIN
    assert {n for n in run.weights if not n.startswith("judge.")} == THIN
    state = read_safetensors(whole / STATE)
    assert all(torch.equal(state[f"model.maker.{i}.base.weight"], before[f"maker.{i}.weight"]) for i in (0, 3))
    assert all(state[f"model.{name}"].any() for name in THIN)
    stopped(tmp_path, at=33, recipe=ADAPTED)
    train(TinyStage(ADAPTED), ADAPTED, tmp_path, quiet=True)
    assert_same_run(tmp_path, whole)


def test_the_best_weights_are_those_of_a_stage_without_them(whole):
    best, plain = read_safetensors(whole / BEST), TinyStage(TINY)
    before = copied(plain)
    plain.modules.load_state_dict(best)
    changed = {n for n in moved(before, plain) if n.startswith("maker.")}
    assert changed == {"maker.0.weight", "maker.3.weight"}
    assert all(torch.linalg.matrix_rank(best[n] - before[n], rtol=1e-4) == 3 for n in changed)
    plain.modules.eval()
    adapted = TinyStage(ADAPTED)
    run = Run(adapted, ADAPTED, whole)
    run.restore()
    with run.averaged():
        x, _ = adapted.batch(3)
        torch.testing.assert_close(adapted.modules["maker"](x), plain.modules["maker"](x))


def test_they_are_shared_out_like_other_weights(whole, tmp_path):
    with one_of_one():
        train(TinyStage(ADAPTED), ADAPTED, tmp_path, quiet=True)
    assert apart(read_safetensors(tmp_path / BEST), read_safetensors(whole / BEST)) < 1e-6


def test_thinker_and_talker_say_the_same_with_them_in_the_weights():
    """In every map that is adapted, with a residual and without, after steps that moved all of them."""
    model, again = deepcopy(omni(seed=4)), deepcopy(omni(seed=4))
    speech = model.speaking()
    boxes = torch.nn.ModuleDict({"thinker": model.thinker, "talker": speech.talker})
    lora = Lora(2, 0.7, ("thinker.model.layers", "talker.model.layers"), ("qkv_proj", "o_proj", "gate_up_proj"))
    x, y = (torch.randn(2, 5, box.config.text.hidden_size) for box in (model, speech.talker))
    with torch.no_grad():
        plain = model.thinker(x)[0], speech.talker(y)
    adapt(boxes, replace(TINY, lora=lora))
    with torch.no_grad():
        for before, now in zip(plain, (model.thinker(x)[0], speech.talker(y)), strict=True):
            assert torch.equal(before, now), "at first nothing is added"
        moving = {
            n: p.normal_() for n, p in boxes.named_parameters() if p.requires_grad and n.endswith((".down", ".up"))
        }
        adapted = model.thinker(x)[0], speech.talker(y)
    assert not any(p.requires_grad for n, p in boxes.named_parameters() if ".layers." in n and n not in moving)
    torch.stack([z.square().sum() for z in (model.thinker(x)[0], speech.talker(y))]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in moving.values())
    for box, name in ((again.thinker, "thinker"), (again.speaking().talker, "talker")):
        tensors = {n.removeprefix(f"{name}."): t for n, t in boxes.state_dict().items() if n.startswith(f"{name}.")}
        box.load_state_dict(merged(tensors, lora.scale))
    with torch.no_grad():
        for before, found, wanted in zip(
            plain, (again.thinker(x)[0], again.speaking().talker(y)), adapted, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert (wanted - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules": ("ear",)}, r"^tiny: lora names 'ear'; this stage has maker, judge, frozen$"),
        ({"linears": ("q_proj",)}, r"^tiny: there is no linear q_proj in maker$"),
        ({"modules": ()}, r"^lora: rank must be 1 or more, and modules must name what it is for$"),
        ({"rank": 0}, r"^lora: rank must be 1 or more, and modules must name what it is for$"),
    ],
)
def test_what_cannot_be_adapted_is_named(lora, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Run(TinyStage(TINY), replace(TINY, lora=replace(LORA, **lora)), tmp_path)


def test_a_recipe_without_them_is_the_recipe_that_it_was():
    assert TINY.fingerprint != ADAPTED.fingerprint
    other = replace(TINY, lora=Lora(scale=3.0))  # says nothing without a rank
    assert other.fingerprint == TINY.fingerprint
