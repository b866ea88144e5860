"""The promises of the training loop, kept by a stage of a few weights and by AuT on a few clips of tones."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antiphon import files
from antiphon.errors import ConfigError, InputError, WeightsError
from antiphon.files import read_metadata, read_safetensors, write_safetensors
from antiphon.train.data import Example, Kept, Mix, read_examples
from antiphon.train.keep import keep, put_back
from antiphon.train.loop import BEST, LOG, STATE, Figures, Loss, Run, Size, learning_rate, prepared, train
from antiphon.train.recipe import BUCKETS, Data, Optimization, Recipe, Source, read_recipe
from antiphon.train.text import fill_ids, train_tokenizer, transcript, write_config

ROOT = Path(__file__).parent.parent
EVERY: dict[str, Any] = {"log_every": 4, "validate_every": 10, "sample_every": 30, "save_every": 7}
PLAN = Optimization(steps=60, lr=1e-2, warmup=5, average=0.9, dtype="float32", **EVERY)
TINY = Recipe("tiny", "tiny", Data(()), PLAN, seed=11)
Tell = Callable[[int], None]  # is told each step before it is taken


def silent(step: int) -> None: ...


# --------------------------------------------------------------------------------------------- a stage of few weights


class TinyStage:
    """A maker with dropout learns a map, a judge tells what it made from the truth; behind a frozen module."""

    def __init__(self, recipe: Recipe, tell: Tell = silent, *, width: int = 16) -> None:
        torch.manual_seed(recipe.seed)
        self.tell, self.spoiled, self.missing = tell, frozenset[int](), math.inf
        maker = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 6))
        judge = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(), nn.Linear(16, 1))
        frozen = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).requires_grad_(False)
        self.modules = nn.ModuleDict({"maker": maker, "judge": judge, "frozen": frozen})
        self.turn = torch.linalg.qr(torch.randn(6, 6)).Q
        self.validated = list[dict[str, Tensor]]()  # weights at each validation

    def players(self) -> dict[str, list[str]]:
        return {"maker": ["maker"], "judge": ["judge"]}

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        if self.missing <= number < 10**6:
            raise InputError("the disk is gone")
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(7919 * number + 3))
        return x, torch.tanh(2 * x @ self.turn)

    def counts(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        return {}

    def size(self, batch: tuple[Tensor, Tensor]) -> Size:
        return Size(2.0, 12, 16)

    def loss(self, player: str, batch: tuple[Tensor, Tensor], step: int) -> Loss:
        x, wanted = batch
        if player == "judge":
            total = (
                F.softplus(-self.modules["judge"](wanted)).mean() + F.softplus(self.modules["judge"](self.made)).mean()
            )
            return Loss(total, {"judged": total.detach()})
        self.tell(step)
        made = self.modules["maker"](self.modules["frozen"](x))
        self.made = made.detach()
        total = F.mse_loss(made, wanted) + 0.1 * F.softplus(-self.modules["judge"](made)).mean()
        total = total * (math.nan if step in self.spoiled else 1)
        return Loss(total, {"loss": total.detach()})

    def validate(self) -> Figures:
        assert not self.modules.training
        self.validated.append({n: p.clone() for n, p in self.modules.named_parameters()})
        x, wanted = self.batch(10**6)
        made = self.modules["maker"](self.modules["frozen"](x))
        return {"error": F.mse_loss(made, wanted).item()}

    def sample(self, folder: Path, board: Any) -> None:
        assert not self.modules.training
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "made.txt").write_text("made")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log, without what differs from machine to machine."""
    found = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("steps/s", "sound/s", "padding")} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny stage's run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    train(TinyStage(TINY), TINY, folder, quiet=True)
    return folder


# ------------------------------------------------------------------------------------------------------- AuT on tones


def write_tones(folder: Path) -> None:
    """A corpus of twelve clips at 22.05 kHz, a tokenizer of 320 ids and the config.json of a micro model."""
    import soundfile

    from antiphon.train.prepare import prepare

    words, sounds = ("low", "middle", "high", "higher"), folder / "tones"
    sounds.mkdir(parents=True)
    for i in range(12):
        said, t = [(i * 5 + k * k) % 4 for k in range(1 + i % 3)], np.arange(8820) / 22050
        wave = [0.3 * np.sin(2 * np.pi * 300 * 1.7**pitch * t) * np.hanning(len(t)) for pitch in said]
        soundfile.write(sounds / f"{i:02d}.wav", np.concatenate(wave), 22050)
        (sounds / f"{i:02d}.txt").write_text(" ".join(words[pitch] for pitch in said))
    prepare("folder", sounds, folder / "cuts", language="en")
    config = json.loads((ROOT / "recipes/tiny/model.json").read_text())
    thinker: dict[str, Any] = config["thinker_config"]
    thinker["audio_config"] |= {
        **{"num_mel_bins": 32, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2},
        **{"encoder_ffn_dim": 48, "downsample_hidden_size": 4, "output_dim": 24},
    }
    thinker["text_config"] |= {
        **{"num_hidden_layers": 1, "hidden_size": 24, "vocab_size": 320, "mlp_only_layers": [0]},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 24},
    }
    texts = [transcript(path.read_text(), "en") for path in sorted(sounds.glob("*.txt"))]
    ids = train_tokenizer(texts, 320, folder / "runs/tokenizer")
    config = {"model_type": config["model_type"], "enable_audio_output": False, "thinker_config": thinker}
    write_config(fill_ids(config, ids), folder / "runs/tokenizer")


def aut_recipe() -> Recipe:
    source = (Source("tones.jsonl.gz"),)
    options = {"decoder": {"layers": 1, "heads": 2, "ffn_dim": 48}, "windows": [1, 2], "validated": 4}
    plan = replace(PLAN, steps=24, validate_every=8, sample_every=16, save_every=5)
    return Recipe("aut", "aut", Data(source, source, batch_seconds=3.0), plan, options=options, seed=5)


def aut_stage(folder: Path, recipe: Recipe, tell: Tell = silent) -> Any:
    """The real stage, with the corpus in `folder`."""
    from antiphon.train.stages.aut import AuTStage
    from antiphon.train.stages.common import Setting

    stage = AuTStage(Setting(recipe, folder / "cuts", folder / "runs", torch.device("cpu")))
    loss = stage.loss

    def told(player: str, batch: Any, step: int) -> Loss:
        tell(step)
        return loss(player, batch, step)

    stage.loss = told
    return stage


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of tones, and in runs/aut what AuT makes of it when it is not killed."""
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder)
    recipe = aut_recipe()
    train(aut_stage(folder, recipe), recipe, folder / "runs/aut", quiet=True)
    return folder


# ------------------------------------------------------------------------------------------------------------- kill -9


def die_at(where: str) -> None:
    """Make this process die by SIGKILL in the n-th tensor it writes (`tensor 9`), or before it gives the n-th file its
    name (`name 2`)."""
    kind, count = where.split()
    left = int(count)

    def dying(real: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    if kind == "tensor":
        files._bytes = dying(files._bytes)
    else:
        os.replace = dying(os.replace)


def child(stage: str, folder: Path, where: str, pipe: Any) -> None:
    """Train in this process."""
    if where:
        die_at(where)
    if stage == "tiny":
        train(TinyStage(TINY, pipe.send), TINY, folder, quiet=True)
    else:
        train(aut_stage(folder.parent.parent, aut_recipe(), pipe.send), aut_recipe(), folder, quiet=True)


def run_process(stage: str, folder: Path, where: str = "", step: float = math.inf) -> int | None:
    """Train in a process of its own, from the state in `folder`, and send it SIGKILL when it comes to `step`.

    Returns:
        Its exit status; -9 if it was killed.
    """
    processes = multiprocessing.get_context("forkserver")  # one clean process imports everything, once
    processes.set_forkserver_preload(
        [__name__, "antiphon.train.stages.aut", "torch.utils.tensorboard", "torch._dynamo", "lhotse"]
    )
    listen, speak = processes.Pipe(duplex=False)
    process = processes.Process(target=child, args=(stage, folder, where, speak))
    process.start()
    speak.close()
    try:
        while True:
            if listen.recv() >= step:
                process.kill()
    except EOFError:
        process.join()
    return process.exitcode


def assert_same_run(killed: Path, whole: Path) -> None:
    """Weights, averages, moments and the best weights, byte for byte, and the figures of every step."""
    state = read_safetensors(whole / STATE)
    assert {name.split(".")[0] for name in state} == {"model", "average", "adamw"}
    for file in (STATE, BEST):
        found, expected = read_safetensors(killed / file), read_safetensors(whole / file)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].numpy().tobytes() == expected[name].numpy().tobytes(), f"{file}: {name} differs"
        assert read_metadata(killed / file, "run") == read_metadata(whole / file, "run")
    assert lines(killed) == lines(whole)


@pytest.mark.long
def test_a_run_killed_while_it_writes_and_at_random_steps_ends_with_the_same_weights(whole, tmp_path):
    tensors, at = len(read_safetensors(whole / STATE)), sorted(random.SystemRandom().sample(range(16, 55), 4))
    print(f"killed at steps {at}")
    assert run_process("tiny", tmp_path, f"tensor {tensors + 9}") == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("*.part")] == [f"{BEST}.part"]
    assert run_process("tiny", tmp_path, "name 3") == -signal.SIGKILL  # after log and best
    assert (tmp_path / f"{STATE}.part").exists()
    assert state_of(tmp_path)["step"] == 7
    for step in at:
        assert run_process("tiny", tmp_path, step=step) == -signal.SIGKILL
    assert state_of(tmp_path)["step"] in range(14, 57, 7)
    assert run_process("tiny", tmp_path) == 0
    assert_same_run(tmp_path, whole)


def test_aut_killed_and_started_again_ends_with_the_same_weights(tones):
    folder, at = tones / "runs/killed", random.SystemRandom().randrange(6, 22)
    print(f"killed at step {at}")
    assert run_process("aut", folder, step=at) == -signal.SIGKILL
    assert run_process("aut", folder, "name 2") == -signal.SIGKILL
    assert run_process("aut", folder) == 0
    assert_same_run(folder, tones / "runs/aut")


def cut_off(at: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Work that ends, as by a kill, where it would give its file number `at` the name."""
    real, before = os.replace, iter(range(1, at))

    def replace(*names: Any) -> None:
        if next(before, None) is None:
            raise KeyboardInterrupt
        real(*names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            work(*arguments)


def test_a_tokenizer_is_written_whole_or_the_one_before_stays(tmp_path):
    words = [f"{a}{b}" for a in ("north", "south", "high", "low") for b in ("wind", "land", "er", "est")]
    train_tokenizer(words, 320, tmp_path)
    write_config({"model_type": "first"}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    cut_off(1, train_tokenizer, [word[::-1] for word in words], 320, tmp_path)
    cut_off(1, write_config, {"model_type": "second"}, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    train_tokenizer([word[::-1] for word in words], 320, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() != before["tokenizer.json"]


def test_a_kept_tokenizer_that_a_kill_left_half_copied_is_copied_again(tmp_path):
    kept, runs = tmp_path / "recipes/trained/tokenizer", tmp_path / "runs"
    kept.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "codec.json"):
        (kept / name).write_text(f"{{}} {name}")
    for at in (1, 2, 3):
        cut_off(at, put_back, tmp_path / "recipes", runs)
        assert not (runs / "tokenizer/config.json").exists(), "without it no recipe takes the folder for a run"
    put_back(tmp_path / "recipes", runs)
    assert {path.name: path.read_text() for path in (runs / "tokenizer").iterdir()} == {
        path.name: path.read_text() for path in kept.iterdir()
    }
    (runs / "tokenizer/tokenizer.json").write_text("trained here")
    put_back(tmp_path / "recipes", runs)
    assert (runs / "tokenizer/tokenizer.json").read_text() == "trained here"


# ----------------------------------------------------------------------------------------------------- what is kept


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads(read_metadata(folder / STATE, "run"))


def stopped(folder: Path, at: int, recipe: Recipe = TINY) -> None:
    """A run that an error ends when it needs the batch of step `at`."""
    stage = TinyStage(recipe)
    stage.missing = at
    with pytest.raises(InputError, match=r"^the disk is gone$"):
        train(stage, recipe, folder, quiet=True)


def test_a_run_that_an_error_stopped_goes_on(whole, tmp_path):
    stopped(tmp_path, at=33)
    assert state_of(tmp_path)["step"] == 28
    assert lines(tmp_path)[-1]["step"] == 32
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 36, "los')  # as if it had been killed while it wrote
    train(TinyStage(TINY), TINY, tmp_path, quiet=True)
    assert_same_run(tmp_path, whole)


def test_the_log_has_one_line_per_step(whole):
    log = lines(whole)
    assert [line["step"] for line in log] == sorted({*range(4, 61, 4), *range(10, 61, 10)})
    assert all(("loss" in line) == (line["step"] % 4 == 0) for line in log)
    assert all(("val/error" in line) == (line["step"] % 10 == 0) for line in log)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stopped(tmp_path, at=33)
    train(TinyStage(TINY), TINY, tmp_path, quiet=True)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(4, 61, 4))
    assert [event.step for event in board.Scalars("val/error")] == list(range(10, 61, 10))


def test_what_a_run_leaves_behind(whole):
    assert {path.name for path in whole.iterdir()} == {STATE, BEST, LOG, "board", "samples"}
    assert [path.name for path in sorted((whole / "samples").iterdir())] == ["000030", "000060"]


def test_a_finished_run_is_left_alone(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "again")
    train(TinyStage(TINY), TINY, tmp_path / "again", quiet=True)
    assert (tmp_path / "again" / STATE).read_bytes() == (whole / STATE).read_bytes()
    assert lines(tmp_path / "again") == lines(whole)


def test_the_best_weights_are_kept_and_the_last(tmp_path):
    errors = {10: 5.0, 20: 3.0, 30: math.nan, 40: 4.0, 50: 3.5, 60: 6.0}

    class Judged(TinyStage):
        def validate(self) -> Figures:
            super().validate()
            return {"error": errors[10 * len(self.validated)]}

    stage = Judged(TINY)
    run = train(stage, TINY, tmp_path, quiet=True)
    assert run.best == state_of(tmp_path)["best"] == 3.0
    best = read_safetensors(tmp_path / BEST)
    assert json.loads(read_metadata(tmp_path / BEST, "run"))["step"] == 20
    assert json.loads(read_metadata(tmp_path / BEST, "run"))["figures"] == {"error": 3.0}
    assert all(torch.equal(best[n], weight) for n, weight in stage.validated[1].items())
    last = read_safetensors(tmp_path / STATE)
    for n, weight in stage.modules.named_parameters():
        assert torch.equal(last[f"model.{n}"], weight)
    assert not torch.equal(best["maker.0.weight"], last["model.maker.0.weight"])
    assert [line.get("val/error", "none") for line in lines(tmp_path) if line["step"] == 30] == [None]


def test_the_best_weights_are_known_after_a_stop(tmp_path):
    errors = iter([5.0, 3.0, 4.0, 4.0, 4.0, 3.5, 6.0])  # the third twice: the state is of step 28

    class Judged(TinyStage):
        def validate(self) -> Figures:
            return {"error": next(errors)}

    for missing in (33, math.inf):
        stage = Judged(TINY)
        stage.missing = missing
        with contextlib.suppress(InputError):
            train(stage, TINY, tmp_path, quiet=True)
    assert state_of(tmp_path) == {"step": 60, "best": 3.0, "recipe": TINY.fingerprint}
    assert json.loads(read_metadata(tmp_path / BEST, "run"))["step"] == 20


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 12},
        {"threads": 2},
        {"freeze": ("judge",)},
        {"init": {"maker": "other"}},
        {"options": {"width": 3}},
        {"data": Data((), max_seconds=9.0)},
        {"optimization": replace(PLAN, lr=2e-2)},
        {"optimization": replace(PLAN, steps=61)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_does_not_go_on(whole, change):
    before, recipe = (whole / STATE).read_bytes(), replace(TINY, **change)
    with pytest.raises(ConfigError, match=r"holds a run of another recipe; give --runs another folder or remove it$"):
        train(TinyStage(recipe), recipe, whole, quiet=True)
    assert (whole / STATE).read_bytes() == before


def test_a_model_of_other_sizes_does_not_go_on(whole):
    message = r"last.safetensors does not fit this recipe: model.maker.0.bias is \[16\] in it and \[17\] in the model$"
    with pytest.raises(WeightsError, match=message):
        train(TinyStage(TINY, width=17), TINY, whole, quiet=True)


# ---------------------------------------------------------------------------------------------- how weights move


def copied(stage: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in stage.modules.state_dict().items()}


def moved(before: dict[str, Tensor], stage: Any) -> set[str]:
    return {n for n, t in stage.modules.state_dict().items() if not torch.equal(t, before[n])}


def test_frozen_modules_do_not_move(tmp_path):
    stage = TinyStage(TINY)
    before = copied(stage)
    train(stage, TINY, tmp_path, quiet=True)
    assert moved(before, stage) == {n for n in before if not n.startswith("frozen.")}
    assert any("running_mean" in n for n in before)


def test_freeze_and_init_in_a_recipe(tones):
    """AuT from the weights of an earlier run, half of it frozen."""
    plan = replace(PLAN, steps=2, average=0.0)
    recipe = replace(
        aut_recipe(), name="more", seed=6, init={"aut": "aut"}, freeze=("aut.layers.0", "decoder"), optimization=plan
    )
    stage = aut_stage(tones, recipe)
    before, best = copied(stage), read_safetensors(tones / "runs/aut" / BEST)
    same = {n for n in before if torch.equal(before[n], best[n])}
    assert {n.split(".")[0] for n in same} >= {"aut"}
    assert all(n in same for n in before if n.startswith("aut."))
    assert not torch.equal(before["decoder.layers.0.fc1.weight"], best["decoder.layers.0.fc1.weight"])
    train(stage, recipe, tones / "runs/more", quiet=True)
    still = set(before) - moved(before, stage)
    assert still == {n for n in before if n.startswith(("aut.layers.0.", "decoder.", "aut.proj"))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"init": {"aut": "nothing"}}, ConfigError, r"^more needs the run 'nothing' in .*; train nothing first$"),
        ({"init": {"aut": "tokenizer"}}, WeightsError, r"tokenizer has no best.safetensors yet; train that stage"),
        ({"init": {"ear": "aut"}}, ConfigError, r"^more: there is no module 'ear'; this stage has aut, decoder, ctc$"),
        ({"freeze": ("aut.ear",)}, ConfigError, r"^more: there is no module 'aut.ear'; this stage has aut, decoder"),
        ({"freeze": ("aut", "decoder", "ctc")}, ConfigError, r"^more: there is nothing left for 'aut' to train"),
        (
            {"init": {"decoder": "aut"}, "options": {"decoder": {"layers": 1, "heads": 2, "ffn_dim": 40}}},
            WeightsError,
            r"aut.best.safetensors does not fit this recipe: decoder.layers.0.fc1.bias is \[48\] in it and \[40\] in",
        ),
        (
            {"init": {"decoder": "aut"}, "options": {"decoder": {"layers": 2, "heads": 2, "ffn_dim": 48}}},
            WeightsError,
            r"decoder.layers.1.[a-z.0-9_]+ is missing in it and \[\d+\] in the model$",
        ),
        (
            {"options": {"decoder": {"layers": 1, "heads": 2}}},
            ConfigError,
            r"^more.options.decoder.ffn_dim is missing$",
        ),
        ({"options": {"window": [1]}}, ConfigError, r"^more.options has no setting 'window'; it has decoder, windows"),
    ],
)
def test_init_and_freeze_that_cannot_be(tones, change, error, message):
    recipe = replace(aut_recipe(), name="more", **change)
    with pytest.raises(error, match=message) as raised:
        Run(aut_stage(tones, recipe), recipe, tones)
    assert "\n" not in str(raised.value)


def test_each_player_moves_its_own_weights(tmp_path):
    """The maker's loss runs through the judge, whose own loss says nothing here."""

    class Still(TinyStage):
        def loss(self, player: str, batch: tuple[Tensor, Tensor], step: int) -> Loss:
            found = super().loss(player, batch, step)
            return found if player == "maker" else Loss(0 * found.total)

    recipe = replace(TINY, optimization=replace(PLAN, steps=3, weight_decay=0.0))
    stage = Still(recipe)
    before = copied(stage)
    train(stage, recipe, tmp_path, quiet=True)
    assert moved(before, stage) == {n for n in before if n.startswith("maker.")}
    assert Run(stage, recipe, tmp_path).weights.keys() == {n for n in before if n.startswith(("maker.", "judge."))}


def test_only_matrices_decay():
    plan = replace(PLAN, weight_decay=0.5)
    groups = Run(TinyStage(TINY), replace(TINY, optimization=plan), Path()).optimizers["maker"].param_groups
    assert {(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]} == {(2, 0.5), (1, 0.0)}


def test_a_loss_that_is_no_number_moves_nothing(tmp_path):
    stage = TinyStage(TINY)
    stage.spoiled = frozenset({3})
    run = Run(stage, TINY, tmp_path)
    run.learn()
    for step in range(3):
        run.advance(stage.batch(step))
    before = {n: t.clone() for n, t in run.tensors().items()}
    figures = run.advance(stage.batch(3))
    changed = {n for n, t in run.tensors().items() if not torch.equal(t, before[n])}
    assert not figures["maker/norm"].isfinite()
    assert not [n for n in changed if n.startswith(("model.maker", "adamw.maker"))]
    assert any(n.startswith("model.judge") for n in changed)
    run.advance(stage.batch(4))
    assert moved({n[6:]: t for n, t in before.items() if n.startswith("model.")}, stage) >= {"maker.0.weight"}
    assert all(t.isfinite().all() for t in run.tensors().values())


def test_a_log_with_a_loss_that_is_no_number_is_still_json(tmp_path):
    stage = TinyStage(TINY)
    stage.spoiled = frozenset({7})
    train(stage, TINY, tmp_path, quiet=True)
    text = (tmp_path / LOG).read_text()
    assert "NaN" not in text
    assert [line["loss"] is None for line in lines(tmp_path) if line["step"] in (4, 8, 12)] == [False, True, False]
    assert lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"]


def test_learning_rate():
    plan = replace(PLAN, steps=100, lr=0.5, warmup=10, final_lr=0.1)
    rates = [learning_rate(plan, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == 0.5 == max(rates)
    assert rates[55] == pytest.approx(0.3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(plan, 100) == pytest.approx(0.1)
    assert learning_rate(replace(plan, warmup=0), 0) == 0.5


def test_the_learning_rate_of_a_step_is_the_one_used(whole):
    assert [line["lr"] for line in lines(whole) if "lr" in line] == [
        float(f"{learning_rate(PLAN, step - 1):.5g}") for step in range(4, 61, 4)
    ]
    stage = TinyStage(TINY)
    run = Run(stage, TINY, whole)
    before = {n: p.clone() for n, p in run.weights.items()}
    run.advance(stage.batch(0))
    bias = "maker.0.bias"  # not decayed: the first step of Adam is as long as the learning rate
    assert (run.weights[bias] - before[bias]).detach().abs() == pytest.approx(learning_rate(PLAN, 0), rel=1e-3)


def test_the_pace_of_steps_is_logged_and_told(tmp_path, capsys):
    """Two batches of two seconds to a step, which fill twelve of sixteen places each."""
    recipe = replace(TINY, optimization=replace(PLAN, accumulate=2))
    train(TinyStage(recipe), recipe, tmp_path)
    paces = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines() if "steps/s" in line]
    assert [line["step"] for line in paces] == list(range(4, 61, 4))
    assert {line["padding"] for line in paces} == {0.25}
    assert all(line["sound/s"] == pytest.approx(4 * line["steps/s"], rel=1e-3) for line in paces)
    assert "s of sound a second, 25.0% padding" in " ".join(capsys.readouterr().out.split())


def test_a_batch_of_clips_is_as_large_as_they_are_together(tones):
    stage = aut_stage(tones, aut_recipe())
    clips = [stage.read(example) for example in stage.mix.examples[::4]]
    frames, texts = [len(mel) for mel, _ in clips], [len(ids) + 1 for _, ids in clips]
    assert len(set(frames)) > 1
    size, sounds = stage.size(stage.collate(clips, 1)), [*map(stage.config.tokens, frames)]
    longest = max(sounds) + max(texts)
    assert size == Size(sum(frames) / 100, sum(sounds) + sum(texts), len(frames) * longest)


def test_averaged_weights_are_validated_and_kept(tmp_path):
    stage = TinyStage(TINY)
    run, averages = Run(stage, TINY, tmp_path), dict[str, Tensor]()
    run.learn()
    for step in range(40):
        decay = min(0.9, (1 + step) / (10 + step))
        averages = averages or {n: p.detach().clone() for n, p in run.weights.items()}
        run.advance(stage.batch(step))
        averages = {n: decay * average + (1 - decay) * run.weights[n].detach() for n, average in averages.items()}
    trained = copied(stage)
    figures = run.judge()
    assert not moved(trained, stage)
    assert stage.modules["maker"].training
    assert not stage.modules["frozen"].training
    best = read_safetensors(tmp_path / BEST)
    for n, average in averages.items():
        torch.testing.assert_close(stage.validated[0][n], average)
        assert torch.equal(best[n], stage.validated[0][n])
        assert not torch.equal(best[n], trained[n])
    stage.modules.load_state_dict(best)
    stage.modules.eval()
    assert stage.validate() == figures


def test_without_averages_the_trained_weights_are_kept(tmp_path):
    recipe = replace(TINY, optimization=replace(PLAN, average=0.0, steps=10))
    stage = TinyStage(recipe)
    train(stage, recipe, tmp_path, quiet=True)
    best = read_safetensors(tmp_path / BEST)
    assert all(torch.equal(best[n], t) for n, t in stage.modules.state_dict().items())
    assert not any(n.startswith("average.") for n in read_safetensors(tmp_path / STATE))


# ------------------------------------------------------------------------------------------------------------ the mix

SHARES = {"main": 0.8, "other": 0.1, "music": 0.1}


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of cuts without sound: short speech, and music of up to 35 s."""
    from lhotse import MonoCut

    from antiphon.train.prepare import write_cuts

    folder, rng = tmp_path_factory.mktemp("lengths"), np.random.default_rng(0)
    seconds = {
        "main": rng.gamma(6, 0.6, 600).clip(0.5, 20),
        "other": rng.gamma(6, 0.5, 300).clip(0.5, 20),
        "music": rng.uniform(3, 35, 100),
    }
    for name, durations in seconds.items():
        cuts = [MonoCut(f"{name}-{i}", 0.0, round(float(d), 3), 0) for i, d in enumerate(durations)]
        write_cuts(folder / f"{name}.jsonl.gz", cuts)
    return folder


def mix_of(folder: Path, *, seconds: float = 60.0, seed: int = 1, together: int = 1) -> Mix:
    sources = tuple(Source(f"{name}.jsonl.gz", weight) for name, weight in SHARES.items())
    return Mix(Data(sources, batch_seconds=seconds), sources, folder, seed, together)


def ids(mix: Mix, step: int) -> list[str]:
    return [e.cut.id for e in mix.draw(step)]


def source_of(example: Any) -> str:
    return example.cut.id.split("-")[0]


def test_augmented_clips_are_a_function_of_the_number_of_their_batch(tones):
    """As likely as asked, of the same text and length; without being asked for, batches are what they were."""
    recipe = aut_recipe()
    plain, other = (aut_stage(tones, replace(recipe, options=recipe.options | {"augment": a})) for a in (0.0, 0.5))
    again = aut_stage(tones, replace(recipe, options=recipe.options | {"augment": 0.5}))
    changed = list[bool]()
    for number in reversed(range(20)):
        one, augmented = plain.batch(number), other.batch(number)
        assert torch.equal(augmented.mel, again.batch(number).mel)
        assert torch.equal(augmented.wanted, one.wanted)
        assert (augmented.window, augmented.frames.tolist()) == (one.window, one.frames.tolist())
        changed += [not torch.equal(a, b) for a, b in zip(augmented.mel, one.mel, strict=True)]
    assert 0.3 < np.mean(changed) < 0.6, "of a half, some are let through as they are"


def test_several_loaders_prepare_what_one_does():
    """In order, however long each batch takes; and what fails, fails in its turn."""

    def batch(step: int) -> int:
        time.sleep(0.002 * (step % 3))
        return step * step if step < 25 else 1 // 0

    assert list(prepared(batch, 3, 20, loaders=5)) == list(prepared(batch, 3, 20)) == [(n, n * n) for n in range(3, 20)]
    steps = prepared(batch, 20, 40, loaders=5)
    assert [next(steps)[0] for _ in range(5)] == [*range(20, 25)]
    with pytest.raises(ZeroDivisionError):
        next(steps)


@pytest.mark.parametrize("seconds", [30.0, 60.0, 240.0])
def test_the_mix_keeps_its_shares_of_the_seconds(lengths, seconds):
    mix = mix_of(lengths, seconds=seconds)
    drawn, padded = dict.fromkeys(SHARES, 0.0), 0.0
    for step in range(4000):
        examples = mix.draw(step)
        for e in examples:
            drawn[source_of(e)] += e.cut.duration
        size = len(examples) * max(e.cut.duration for e in examples)
        assert len(examples) == 1 or size <= seconds
        padded += size
    total = sum(drawn.values())
    print(f"{seconds:g} s: { ({n: round(s / total, 4) for n, s in drawn.items()}) }, padding {1 - total / padded:.1%}")
    assert {n: s / total for n, s in drawn.items()} == pytest.approx(SHARES, abs=0.01)
    assert 0.02 < 1 - total / padded < 0.15


def test_buckets_of_the_released_recipes_leave_little_padding(tmp_path):
    """Half a second to half a minute of slow and fast speech: little of sound, of text, and of both together."""
    from lhotse import MonoCut, SupervisionSegment

    from antiphon.train.prepare import write_cuts

    rng, cuts = np.random.default_rng(0), []
    lengths, paces = rng.lognormal(1.6, 0.8, 6000).clip(0.5, 30).round(2), rng.normal(16, 4, 6000).clip(6, 30)
    for i, (seconds, pace) in enumerate(zip(lengths.tolist(), paces.tolist(), strict=True)):
        text = "a" * int(seconds * pace)
        cuts.append(MonoCut(f"{i}", 0.0, seconds, 0, [SupervisionSegment(f"{i}", "r", 0.0, seconds, text=text)]))
    write_cuts(tmp_path / "speech.jsonl.gz", cuts)
    data = read_recipe(ROOT / "recipes/release/aut.yaml").data
    data, padding = replace(data, mix=(Source("speech.jsonl.gz"),)), dict[tuple[int, int], list[float]]()
    for buckets in (BUCKETS, data.buckets):
        mix, sums = Mix(replace(data, buckets=buckets), data.mix, tmp_path, 0), np.zeros((2, 2))
        for number in range(500):
            sizes = np.array([(e.seconds, e.letters / 4) for e in mix.draw(number)])  # letters of a token, about
            assert len(sizes) * sizes[:, 0].max() <= data.batch_seconds
            sums += sizes.sum(0), len(sizes) * sizes.max(0)
        filled, places = sums * (13, 1)  # positions a second
        padding[buckets] = [*(1 - filled / places), 1 - filled.sum() / places.sum()]
        print(f"buckets {buckets}: padding of sound, text, both", *(f"{share:.1%}" for share in padding[buckets]))
    assert max(padding[data.buckets]) < 0.05 < min(padding[BUCKETS])


def test_every_batch_keeps_the_shares_of_its_lengths(lengths):
    mix, mixed = mix_of(lengths), 0
    for step in range(300):
        examples = mix.draw(step)
        bucket = int(np.searchsorted(mix.edges, max(e.cut.duration for e in examples)))
        expected = mix.rates[:, bucket] / mix.rates[:, bucket].sum() * len(examples)
        for name, count in zip(SHARES, expected, strict=True):
            assert abs(sum(source_of(e) == name for e in examples) - count) < 1
        mixed += len({source_of(e) for e in examples}) > 1
    assert mixed > 200


def test_the_batches_of_a_step_keep_the_shares_together(lengths):
    mix, same, whole = mix_of(lengths, together=3), 0, 0
    for step in range(200):
        drawn = [mix.draw(3 * step + part) for part in range(3)]
        assert len({len(examples) for examples in drawn}) == 1
        examples = [e for own in drawn for e in own]
        bucket = int(np.searchsorted(mix.edges, max(e.cut.duration for e in examples)))
        expected = mix.rates[:, bucket] / mix.rates[:, bucket].sum()
        for name, share in zip(SHARES, expected, strict=True):
            assert abs(sum(source_of(e) == name for e in examples) - share * len(examples)) < 1
            assert all(abs(sum(source_of(e) == name for e in own) - share * len(own)) < 1 for own in drawn)
        one, other = ({e.cut.id for e in own} for own in drawn[:2])
        same, whole = same + len(one & other), whole + len(drawn[0])
    assert 0 < same < 0.25 * whole, "about what chance gives, of some 80 examples of a length"


def test_the_mix_of_a_recipe_is_of_as_many_batches_as_make_a_step(lengths):
    from antiphon.train.stages.common import Setting

    data, plan = mix_of(lengths).data, replace(PLAN, accumulate=3)
    setting = Setting(replace(TINY, data=data, seed=1), lengths, lengths, torch.device("cpu"))
    assert ids(setting.mix(), 3) == ids(mix_of(lengths), 3)
    setting = replace(setting, recipe=replace(setting.recipe, optimization=plan))
    mix, crops = setting.mix(), setting.mix(replace(data, batch_seconds=0.0))
    for number in (10, 11):
        assert ids(mix, number) == ids(mix_of(lengths, together=3), number)
        assert ids(crops, number) == ids(mix_of(lengths, seconds=0.0, together=3), number)


@pytest.mark.parametrize("together", [1, 2])
def test_crops_are_drawn_in_the_shares_of_the_mix(lengths, together):
    mix = mix_of(lengths, seconds=0.0, together=together)
    drawn = [mix.draw(number) for number in range(together - 1, 6000 * together, together)]
    assert {len(examples) for examples in drawn} == {1}
    found = [source_of(examples[0]) for examples in drawn]
    assert {n: found.count(n) / len(found) for n in SHARES} == pytest.approx(SHARES, abs=0.015)


def test_the_mix_is_a_function_of_the_seed_and_the_number_of_a_batch(lengths):
    mixes = [mix_of(lengths, seed=2), mix_of(lengths, together=2), mix_of(lengths)]
    drawn = [[ids(mix, number) for number in range(30)] for mix in mixes]
    again = mix_of(lengths, together=2)
    assert [ids(again, number) for number in reversed(range(30))] == drawn[1][::-1]
    for one, other in combinations(drawn, 2):
        assert not [number for number in range(30) if one[number] == other[number]]
    assert all(len({tuple(batch) for batch in batches}) == 30 for batches in drawn)


def test_everything_is_drawn_but_what_is_too_long(lengths):
    mix = mix_of(lengths, seconds=240.0)
    seen = {e.cut.id: e.cut.duration for step in range(600) for e in mix.draw(step)}
    assert max(seen.values()) <= 30.0
    known = {e.cut.id for row in mix.cells for cell in row for e in cell}
    assert seen.keys() == known
    assert 900 < len(known) < 1000


def test_a_mix_that_cannot_be(lengths):
    short = replace(mix_of(lengths).data, max_seconds=0.4)
    with pytest.raises(InputError, match=r"^main.jsonl.gz has no cut of at most 0.4 s; raise data.max_seconds$"):
        Mix(short, short.mix, lengths, 0)
    with pytest.raises(InputError, match=r"^there is no manifest .*gone.jsonl; make it with antiphon corpus or"):
        Mix(short, (Source("gone.jsonl"),), lengths, 0)
    (lengths / "none.jsonl").write_text("")
    with pytest.raises(InputError, match=r"none.jsonl holds no cuts$"):
        Mix(short, (Source("none.jsonl"),), lengths, 0)


def test_a_source_may_be_of_some_languages(tmp_path):
    """The language of a conversation is its own, that of other cuts their first supervision's."""
    from lhotse import MonoCut, SupervisionSegment

    from antiphon.train.prepare import write_cuts

    said = [SupervisionSegment("s", "r", 0.0, 1.0, language="de")]
    cuts = [MonoCut("a", 0.0, 1.0, 0, said), MonoCut("b", 0.0, 1.0, 0, said, custom={"language": "zh"})]
    write_cuts(tmp_path / "all.jsonl.gz", cuts)
    found = {}
    for languages in ((), ("de",), ("zh", "fr")):
        source = Source("all.jsonl.gz", languages=languages)
        found[languages] = [e.cut.id for e in Mix(Data((source,)), (source,), tmp_path, 0).examples]
    assert found == {(): ["a", "b"], ("de",): ["a"], ("zh", "fr"): ["b"]}
    with pytest.raises(InputError, match=r"^all.jsonl.gz holds no cuts in fr; give its languages$"):
        read_examples(Source("all.jsonl.gz", languages=("fr",)), tmp_path)


@pytest.mark.parametrize("readers", [0, 2])
def test_what_is_kept_is_what_is_read(lengths, readers):
    """By several processes or by none; they read once, and nothing again."""
    examples, calls = mix_of(lengths).examples[:150], list[str]()

    def read(example: Example) -> np.ndarray:
        calls.append(example.cut.id)
        return np.array([example.cut.duration])

    kept = Kept(read, examples, readers)
    assert not calls
    assert [float(kept(e)[0]) for e in examples] == [e.cut.duration for e in examples]
    assert len(calls) == (0 if readers else len(examples))
    assert kept(Example(examples[0].cut, "language"))[0] == examples[0].cut.duration


# ------------------------------------------------------------------------------------------------------------ recipes

GOOD = """
stage: aut
data: {mix: [{cuts: a.jsonl.gz, weight: 4}, {cuts: b.jsonl.gz}], batch_seconds: 20}
optimization: {steps: 100, lr: 1e-3, warmup: 7}
init: {aut: earlier}
freeze: [decoder]
"""


def test_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    recipe = read_recipe(tmp_path / "mine.yaml")
    assert recipe.name == "mine"
    assert recipe.optimization == Optimization(steps=100, lr=0.001, warmup=7)
    assert recipe.data == Data((Source("a.jsonl.gz", 4.0), Source("b.jsonl.gz", 1.0)), batch_seconds=20.0)
    assert type(recipe.data.mix[0].weight) is float
    assert (recipe.init, recipe.freeze) == ({"aut": "earlier"}, ("decoder",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage: aut", "stages: aut", r"^mine.yaml has no setting 'stages'; it has name, stage, data, optimization, "),
        ("warmup: 7", "warm_up: 7", r"^mine.yaml.optimization has no setting 'warm_up'; it has steps, lr, warmup, "),
        (
            "weight: 4",
            "wait: 4",
            r"^mine.yaml.data.mix\[0\] has no setting 'wait'; it has cuts, weight, task, languages$",
        ),
        ("stage: aut", "", r"^mine.yaml.stage is missing$"),
        ("steps: 100, ", "", r"^mine.yaml.optimization.steps is missing$"),
        ("{cuts: b.jsonl.gz}", "{}", r"^mine.yaml.data.mix\[1\].cuts is missing$"),
        ("optimization:", "options:", r"^mine.optimization is missing; a stage with weights needs steps and lr$"),
        ("steps: 100", "steps: many", r"^mine.yaml.optimization.steps is 'many'; expected int$"),
        ("steps: 100", "steps: true", r"^mine.yaml.optimization.steps is True; expected int$"),
        ("steps: 100", "steps: 1.5", r"^mine.yaml.optimization.steps is 1.5; expected int$"),
        ("lr: 1e-3", "lr: fast", r"^mine.yaml.optimization.lr is 'fast'; expected a number$"),
        ("lr: 1e-3", "lr: [1]", r"^mine.yaml.optimization.lr is \[1\]; expected float$"),
        ("lr: 1e-3", "lr: true", r"^mine.yaml.optimization.lr is True; expected float$"),
        ("lr: 1e-3", "lr: 0", r"^optimization: lr must be above 0, average from 0 to below 1$"),
        ("lr: 1e-3", "lr: .nan", r"^optimization: lr must be above 0, average from 0 to below 1$"),
        ("lr: 1e-3", "lr: 1, average: 1", r"^optimization: lr must be above 0, average from 0 to below 1$"),
        ("steps: 100", "steps: 0", r"^optimization: steps, accumulate and the \*_every intervals must be 1 or more$"),
        (
            "warmup: 7",
            "dtype: float8",
            r"^optimization.dtype is 'float8'; expected auto, float32, bfloat16 or float64$",
        ),
        ("warmup: 7", "betas: [0.9]", r"^mine.yaml.optimization.betas should have 2 values$"),
        ("freeze: [decoder]", "freeze: decoder", r"^mine.yaml.freeze should be a list$"),
        ("freeze: [decoder]", "freeze: [1]", r"^mine.yaml.freeze\[0\] is 1; expected str$"),
        ("{aut: earlier}", "{aut: 5}", r"^mine.yaml.init.aut is 5; expected str$"),
        ("{aut: earlier}", "[aut]", r"^mine.yaml.init is \['aut'\]; expected dict$"),
        (
            "{cuts: b.jsonl.gz}",
            "b.jsonl.gz",
            r"^mine.yaml.data.mix\[1\] should be a table of cuts, weight, task, languages$",
        ),
        ("batch_seconds: 20", "buckets: [0, 1]", r"^data.buckets is \[0, 1\]; expected two numbers of 1 or more$"),
        (GOOD, "- stage\n- data", r"mine.yaml is not a recipe; expected a table of settings$"),
        (GOOD, "", r"mine.yaml is not a recipe; expected a table of settings$"),
        (GOOD, "stage: aut\ndata: [1, 2", r"mine.yaml is not YAML: expected ',' or '\]'.* in line 2$"),
        (GOOD, "stage: aut\n\tdata: 1", r"mine.yaml is not YAML: found character '\\t' .* in line 2$"),
        (GOOD, "stage: \x07", r"mine.yaml is not YAML; expected text in UTF-8$"),
    ],
)
def test_a_recipe_that_cannot_be(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        read_recipe(path)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"stage: \xff\xfe")
    with pytest.raises(ConfigError, match=r"mine.yaml is not YAML; expected text in UTF-8$"):
        read_recipe(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match=r"^there is no recipe .*gone.yaml$"):
        read_recipe(tmp_path / "gone.yaml")


def test_runs_from_before_there_was_a_choice_of_buckets_go_on():
    recipe = Recipe("tiny", "tiny", Data(()), Optimization(steps=60, lr=1e-2), seed=11)
    assert recipe.fingerprint == "a0e4dde1afaa9c62"
    assert replace(recipe, data=Data((), buckets=(24, 1))).fingerprint != recipe.fingerprint


def test_gradients_of_several_batches_make_one_step(tmp_path):
    parts, whole = TinyStage(TINY), TinyStage(TINY)
    (x, wanted), (more, also) = parts.batch(0), parts.batch(1)
    for stage, batches in (
        (parts, [(x, wanted), (more, also)]),
        (whole, [(torch.cat([x, more]), torch.cat([wanted, also]))]),
    ):
        stage.modules.eval()  # without dropout, which draws for each batch
        Run(stage, TINY, tmp_path).advance(*batches)
    for n, p in parts.modules.named_parameters():
        assert torch.allclose(p, whole.modules.get_parameter(n), atol=1e-5), n
    assert moved(copied(TinyStage(TINY)), parts)


def test_accumulated_steps_share_no_batch(tmp_path):
    drawn = list[int]()

    class Counted(TinyStage):
        def batch(self, number: int) -> tuple[Tensor, Tensor]:
            if number < 10**6:
                drawn.append(number)
            return super().batch(number)

    recipe = replace(TINY, optimization=replace(PLAN, steps=5, accumulate=3))
    train(Counted(recipe), recipe, tmp_path, quiet=True)
    assert sorted(drawn) == list(range(15))


def test_what_is_kept_beside_recipes_stands_in_for_runs(tmp_path):
    recipes, runs = tmp_path / "recipes", tmp_path / "runs"
    for folder in (recipes, runs / "tokenizer", runs / "one"):
        folder.mkdir(parents=True)
    (runs / "tokenizer" / "config.json").write_text("{}")
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "a.huge": torch.full((2, 2), 1e6)}
    tensors["c.d.bias"] = torch.randn(2)
    write_safetensors(runs / "one" / BEST, tensors | {"b.bias": torch.zeros(1)}, {"run": "first"})
    (path,) = keep(recipes, runs, ["one:a,c.d"])
    kept = read_safetensors(path)
    assert list(kept) == list(tensors)
    assert [t.dtype for t in kept.values()] == [torch.float16, *3 * [torch.float32]]
    put_back(recipes, tmp_path / "elsewhere")
    again = read_safetensors(tmp_path / "elsewhere" / "one" / BEST)
    assert all(t.dtype == torch.float32 and torch.allclose(t, tensors[n], rtol=1e-3) for n, t in again.items())
    assert (tmp_path / "elsewhere" / "tokenizer" / "config.json").read_text() == "{}"
    write_safetensors(runs / "one" / BEST, {"a.weight": torch.zeros(1)}, {"run": "second"})
    put_back(recipes, runs)  # what was trained here stays
    assert list(read_safetensors(runs / "one" / BEST)) == ["a.weight"]
