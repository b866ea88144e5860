"""One model trained by several processes: the same weights as by one, whoever is killed, and whole states on disk.

The tests marked `scale` start real processes through torchrun (make scale); the others stay in this one.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, distributed
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from antiphon.errors import ConfigError, InputError, WeightsError
from antiphon.files import read_safetensors
from antiphon.train import ranks
from antiphon.train.checkpoints import FOLDER, Checkpoints
from antiphon.train.corpus import make_corpus
from antiphon.train.data import READ
from antiphon.train.loop import BEST, LOG, STATE, Run, asked_to_stop, sum_of, train
from antiphon.train.price import price
from antiphon.train.recipe import Devices, Recipe
from antiphon.train.run import STAGES, read_course
from antiphon.train.stages.aut import AuTStage
from antiphon.train.stages.common import Setting
from antiphon.train.stages.thinker import collate_talks, hear_talks
from antiphon.train.talks import Talk
from tests.models import CPU
from tests.test_train_loop import PLAN, TINY, TinyStage, aut_recipe, lines, state_of, write_tones

DIGITS = Path(__file__).parent.parent / "recipes/tiny/digits.yaml"
SAID = "said.txt"  # what processes wrote on standard error
RELEASE = DIGITS.parent.parent / "release"
TWO = replace(aut_recipe(), optimization=replace(aut_recipe().optimization, steps=20, accumulate=2, log_every=1))


# ---------------------------------------------------------------------------------------------- helpers


@contextmanager
def one_of_one() -> Iterator[None]:
    """This process as torchrun would start it alone: weights are shared out, among one."""
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / FOLDER).iterdir())


def state_in(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of the last state, read without torchrun."""
    return read_safetensors(folder / STATE) if (folder / STATE).exists() else state_in_parts(folder)


def state_in_parts(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of the last checkpoint."""
    reader = FileSystemReader(sorted(p for p in (folder / FOLDER).iterdir() if p.suffix != ".part")[-1])
    stored = reader.read_metadata().state_dict_metadata.items()
    state = {
        n: torch.empty(t.size, dtype=t.properties.dtype) for n, t in stored if isinstance(t, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two states, over the largest value of the tensor."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp(min=1e-12)) for n in one)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit."""
    assert one.keys() == other.keys()
    return [n for n in one if one[n].numpy().tobytes() != other[n].numpy().tobytes()]


def plain(value: Any) -> Any:
    """As YAML holds it."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a course `tones` of one recipe, its cuts, and the run of its tokenizer."""
    folder = tmp_path_factory.mktemp("ranks")
    write_tones(folder)
    for name in ("cuts", "runs"):
        (folder / name).rename(folder / f"{name}-of-it")
        (folder / name).mkdir()
        (folder / f"{name}-of-it").rename(folder / name / "course")
    (folder / "course").mkdir()
    (folder / "course/aut.yaml").write_text(yaml.safe_dump(plain(asdict(TWO))))
    return folder


def aut_of(folder: Path, recipe: Recipe) -> AuTStage:
    """The stage of a recipe of that course."""
    return AuTStage(Setting(recipe, folder / "cuts/course", folder / "runs/course", CPU))


def beside(folder: Path, name: str) -> Path:
    """Another folder of runs, which has the tokenizer."""
    runs = folder / name
    shutil.copytree(folder / "runs/course/tokenizer", runs / "course/tokenizer")
    return runs


def launch(folder: Path, recipe: Path, runs: Path, processes: int, restarts: int = 0, **more: Any) -> subprocess.Popen:
    """torchrun on a recipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "antiphon.train", str(recipe)]
    command += ["--cuts", str(folder / "cuts"), "--runs", str(runs), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (runs / SAID).open("w") as said:
        return subprocess.Popen(command, env=environment, stderr=said, **more)


def finish(process: subprocess.Popen, runs: Path) -> tuple[int, str]:
    """Exit status and what it said."""
    return process.wait(timeout=900), (runs / SAID).read_text()


def workers(process: subprocess.Popen) -> list[int]:
    """Processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    named = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, line in named.items() if b"antiphon.train" in line]


def wait_for(log: Path, step: int, process: subprocess.Popen) -> None:
    """Until the log says that a step has been taken."""
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.02)


# ---------------------------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny stage's run in one process without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    train(TinyStage(TINY), TINY, folder, quiet=True)
    return folder


def test_weights_that_are_shared_out_come_to_the_same(alone, tmp_path):
    with one_of_one():
        train(TinyStage(TINY), TINY, tmp_path, quiet=True)
    assert apart(state_in(alone), state_in(tmp_path)) < 1e-6
    best = read_safetensors(tmp_path / BEST)
    assert {n: t.shape for n, t in best.items()} == {n: t.shape for n, t in read_safetensors(alone / BEST).items()}
    assert apart(best, read_safetensors(alone / BEST)) < 1e-6
    assert steps_of(tmp_path) == ["00000056", "00000060"]


def test_a_state_is_read_by_one_process_and_by_those_of_torchrun(alone, tmp_path):
    """Begun by torchrun, gone on with in one process, ended by torchrun."""
    for missing in (20, 40, 100):
        stage = TinyStage(TINY)
        stage.missing = missing
        with one_of_one() if missing != 40 else nullcontext(), suppress(InputError):
            train(stage, TINY, tmp_path, quiet=True)
    assert [line["step"] for line in lines(tmp_path)] == [line["step"] for line in lines(alone)]
    assert steps_of(tmp_path)[-1] == "00000060"
    assert apart(state_in(alone), state_in_parts(tmp_path)) < 1e-6


def test_recomputed_activations_change_no_bit(tones):
    found = list[dict[str, Tensor]]()
    for devices in (Devices(), Devices(recompute=True)):
        stage = aut_of(tones, replace(TWO, devices=devices))
        run = Run(stage, replace(TWO, devices=devices), tones)
        run.learn()
        with saved_bytes() as saved:
            run.advance(stage.batch(0), stage.batch(1))
        found.append({**{n: p.detach().clone() for n, p in run.weights.items()}, "bytes": torch.tensor([saved[0]])})
    kept, again = (own.pop("bytes").item() for own in found)
    assert again < 0.9 * kept
    assert not same_bits(*found)
    assert replace(TWO, devices=Devices(recompute=True)).fingerprint == TWO.fingerprint


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """How much is kept for the way back while this is open."""
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        total[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def test_a_loss_is_the_mean_over_all_tokens_of_a_step_and_not_of_its_batches_means(tones):
    """Two batches of unequal length, and the same clips as one batch: the same gradient."""
    stage = aut_of(tones, TWO)
    assert stage.mix is not None
    clips = [stage.read(e) for e in sorted(stage.mix.examples, key=lambda e: len(e.text))]
    short, long = stage.collate(clips[:2], 1), stage.collate(clips[5:], 1)
    assert stage.counts(short)["attention"] < 0.3 * stage.counts(long)["attention"]
    found = list[dict[str, Tensor]]()
    for batches in ((short, long), (stage.collate(clips[:2] + clips[5:], 1),)):
        run = Run(stage, TWO, tones)
        shares = run._shares(batches)
        stage.modules.zero_grad()
        for batch, own in zip(batches, shares, strict=True):
            parts = stage.loss("aut", batch, 0).parts
            sum_of({n: part * own[n] for n, part in parts.items()}).backward()
        found.append({n: p.grad.clone() for n, p in run.weights.items() if p.grad is not None})
    one, other = (torch.cat([g.flatten() for g in own.values()]) for own in found)
    assert (one - other).abs().max() < 1e-5 * one.abs().max()
    assert shares == [{"attention": 1.0, "ctc": 1.0}]


def test_a_process_without_sound_hears_silence_and_keeps_none_of_it(tones):
    aut = aut_of(tones, TWO).aut
    batch = collate_talks([Talk([1, 2, 3], [False, True, True], [], [], [False] * 3, [False] * 3, [], [])], 1)
    assert hear_talks(aut, batch, CPU) is None
    with one_of_one():
        heard = hear_talks(aut, batch, CPU)
    assert heard is not None
    assert (len(heard), heard.shape[2]) == (0, aut.config.output_dim)
    heard.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in aut.layers.parameters())


# ------------------------------------------------------------------------------------- states on disk


def test_a_state_that_has_no_name_yet_is_not_read_and_old_ones_are_let_go(tmp_path):
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    with one_of_one():
        checkpoints = Checkpoints(tmp_path, Devices(keep_last=2, keep_every=20))
        for step in range(10, 70, 10):
            tensors["a"] += step
            checkpoints.save(tensors, {"step": step})
            tensors["b"] += 1  # while it is being written
        assert steps_of(tmp_path)[-1] == "00000060.part" or steps_of(tmp_path)[-1] == "00000060"
        checkpoints.settle()
        assert steps_of(tmp_path) == ["00000020", "00000040", "00000050", "00000060"]
        shutil.copytree(tmp_path / FOLDER / "00000060", tmp_path / FOLDER / "00000070.part")
        found = checkpoints.newest()
    assert found is not None
    assert found.about == {"step": 60}
    read = {name: torch.zeros_like(t) for name, t in tensors.items()}
    found.read(read)
    assert torch.equal(read["a"], tensors["a"])
    assert torch.equal(read["b"], torch.full((2, 3), 6.0)), "what was written is what stood at the time of `save`"


def test_a_full_disk_is_one_sentence_and_the_state_before_stays(tmp_path):
    """Files may not grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with one_of_one():
        checkpoints = Checkpoints(tmp_path, Devices())
        checkpoints.save({"a": torch.ones(10)}, {"step": 1})
        checkpoints.settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            checkpoints.save({"a": torch.ones(1_000_000)}, {"step": 2})
            with pytest.raises(WeightsError) as raised:
                checkpoints.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        why = os.strerror(errno.EFBIG)
        assert str(raised.value) == (
            f"{tmp_path / FOLDER / '00000002'} cannot be written ({why}); make room and start again: the last whole "
            "checkpoint is step 1"
        )
        assert steps_of(tmp_path) == ["00000001"]
        found = checkpoints.newest()
        assert found is not None
        read = {"a": torch.zeros(10)}
        found.read(read)
    assert torch.equal(read["a"], torch.ones(10))


@pytest.mark.parametrize("told_at", [17, 59])
def test_sigterm_ends_a_run_after_its_step_with_the_state_on_disk(alone, tmp_path, told_at):
    """Also in the last step: a course has other recipes after this one."""

    def tell(step: int) -> None:
        if step == told_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        train(TinyStage(TINY, tell), TINY, tmp_path, quiet=True)
    assert ended.value.code == 128 + signal.SIGTERM
    assert state_of(tmp_path)["step"] == told_at + 1
    train(TinyStage(TINY), TINY, tmp_path, quiet=True)
    assert [line["step"] for line in lines(tmp_path)] == [line["step"] for line in lines(alone)]
    assert not same_bits(state_in(alone), state_in(tmp_path))


def test_sigterm_that_comes_after_the_last_step_is_not_forgotten():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), asked_to_stop():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_processes_that_cannot_share_out_a_step_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    recipe = replace(TINY, optimization=replace(PLAN, accumulate=4))
    with pytest.raises(ConfigError, match=r"3 processes cannot share out 4 batches a step; set .* a multiple of 3, or"):
        Run(TinyStage(recipe), recipe, tmp_path)


# --------------------------------------------------------------------------------------- real processes


@pytest.mark.scale
def test_one_process_and_two_come_to_the_same_weights(tones):
    """20 steps of AuT from the same batches.

    In float64: in float32 another order of sums, in the norm of the gradient, becomes differences of 1e-5 in the
    weights, and Adam makes whole steps of what is nothing but rounding, the gradient of the keys' biases.
    """
    recipe = replace(TWO, name="exact", optimization=replace(TWO.optimization, dtype="float64"))
    (tones / "course/exact.yaml").write_text(yaml.safe_dump(plain(asdict(recipe))))
    runs = [beside(tones, name) for name in ("by-one", "by-two")]
    train(aut_of(tones, recipe), recipe, runs[0] / "course/exact", quiet=True)
    status, said = finish(launch(tones, tones / "course/exact.yaml", runs[1], 2), runs[1])
    assert status == 0, said
    one, two = (state_in(path / "course/exact") for path in runs)
    kept = [n for n in one if one[n].abs().max() > 1e-9]  # those biases and their moments are rounding and nothing else
    difference = apart({n: one[n] for n in kept}, {n: two[n] for n in kept})
    print(f"largest difference after 20 steps: {difference:.1e} of a tensor's largest value, {len(kept)} tensors")
    assert difference < 1e-6
    assert len(kept) > 0.9 * len(one)


@pytest.fixture(scope="module")
def undisturbed(tones: Path) -> Path:
    """The run of two processes that nobody stopped."""
    runs = beside(tones, "undisturbed")
    status, said = finish(launch(tones, tones / "course/aut.yaml", runs, 2), runs)
    assert status == 0, said
    return runs / "course/aut"


@pytest.mark.scale
def test_any_process_killed_at_a_random_step_and_all_started_again_end_with_the_same_bits(tones, undisturbed):
    killed = beside(tones, "killed")
    process, log = launch(tones, tones / "course/aut.yaml", killed, 2, restarts=2), killed / "course/aut" / LOG
    for step in sorted(random.SystemRandom().sample(range(2, 15), 2)):  # not so late that it might be over
        wait_for(log, step, process)
        victim = random.SystemRandom().choice(workers(process))
        print(f"killed process {victim} after step {step}")
        os.kill(victim, signal.SIGKILL)
        while victim in workers(process):
            time.sleep(0.02)
    status, said = finish(process, killed)
    assert status == 0, said
    assert not same_bits(*(state_in(path) for path in (undisturbed, killed / "course/aut")))
    assert not same_bits(*(read_safetensors(path / BEST) for path in (undisturbed, killed / "course/aut")))
    assert [line["step"] for line in lines(killed / "course/aut")] == list(range(1, 21))


@pytest.mark.scale
def test_sigterm_to_torchrun_ends_all_processes_with_the_state_on_disk(tones, undisturbed):
    """At a random step of a course's first recipe; the same command goes on."""
    (tones / "course/order.yaml").write_text("train: [aut, second]")
    (tones / "course/second.yaml").write_text((tones / "course/aut.yaml").read_text())
    stopped = beside(tones, "stopped")
    process, step = launch(tones, tones / "course", stopped, 2), random.SystemRandom().randrange(2, 12)
    wait_for(stopped / "course/aut" / LOG, step, process)
    print(f"stopped after step {step}")
    process.terminate()
    status, said = finish(process, stopped)
    assert status != 0
    assert "closing signal SIGTERM" in said
    assert "forcefully" not in said, said  # each ended by itself
    assert not (stopped / "course/second").exists()
    assert int(steps_of(stopped / "course/aut")[-1]) >= step
    status, said = finish(launch(tones, tones / "course/aut.yaml", stopped, 2), stopped)
    assert status == 0, said
    assert not same_bits(*(state_in(path) for path in (undisturbed, stopped / "course/aut")))
    assert [line["step"] for line in lines(stopped / "course/aut")] == list(range(1, 21))


@pytest.mark.scale
def test_a_full_disk_stops_all_processes_with_one_sentence(tones):
    runs = beside(tones, "full")
    (tones / "course/longer.yaml").write_text(
        (tones / "course/aut.yaml").read_text().replace("name: aut", "name: full")
    )
    largest = 60_000  # bytes: the log fits, a checkpoint does not
    limit = (largest, resource.RLIM_INFINITY)
    process = launch(
        tones,
        tones / "course/longer.yaml",
        runs,
        2,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    status, said = finish(process, runs)
    assert status != 0
    assert "cannot be written (File too large)" in " ".join(said.split())
    assert not list((runs / "course/full").glob(f"{FOLDER}/*[0-9]"))


FEW = {"steps": 2, "accumulate": 2, "warmup": 1, "validate_every": 2, "sample_every": 2, "save_every": 2}
RUNS = {"aut": "base", "thinker": "base", "codec": "codec"}  # in the place of the released checkpoints,
RUNS |= {"talker": "talker", "mtp": "talker"}


def small(recipe: Recipe) -> dict[str, Any]:
    """A recipe of the released size with digits to learn, tiny boxes and two steps; all else as it is."""
    table = plain(asdict(recipe)) | {"model": "digits.json", "threads": 1}
    table["init"] = {box: RUNS[box] if "/" in run else run for box, run in recipe.init.items()}
    table["options"] |= {"validated": 2}
    if "decoder" in recipe.options:
        table["options"]["decoder"] = {"layers": 1, "heads": 4, "ffn_dim": 96}
    if "speaker" in recipe.options:
        table["options"]["speaker"] = {"channels": 32, "attention": 16}
    for part, cuts in (("mix", "digits.jsonl.gz"), ("validation", "digits-valid.jsonl.gz")):
        for source in table["data"][part]:
            source["cuts"] = "pairs.jsonl.gz" if source["task"] == "prefer" else cuts
    table["data"]["batch_seconds"] = min(8.0, recipe.data.batch_seconds)
    table["optimization"] |= FEW
    return table


@pytest.mark.scale
def test_every_stage_and_every_recipe_of_the_released_size_runs_in_two_processes(tmp_path):
    digits, release = read_course(DIGITS), read_course(RELEASE)
    sets = {name: replace(s, count=24 if "valid" not in name else 2) for name, s in digits.corpus.items()}
    make_corpus(sets, tmp_path / "cuts/two", 1, lambda done, of: None)
    first = {r.name: small(r) for r in digits.recipes if r.name in ("codec", "code2wav", "thinker")}
    first["thinker"]["name"] = "base"
    ours = {r.name: small(r) for r in release.recipes}
    turn = replace(release.recipes[0], name="turn", stage="turn", options={}, init={"aut": "thinker"})
    tokenizer = {"name": "tokenizer", "stage": "tokenizer", "data": {"mix": [{"cuts": "digits.jsonl.gz"}]}}
    tokenizer |= {"model": "digits.json"}
    runs = [ours.pop("aut"), first["codec"], first["thinker"], first["code2wav"]]
    last = [ours.pop("talker-preference")]
    runs += [*ours.values(), small(turn)]
    said = {"decoder": "aut", "code2wav": "code2wav", "talker": "talker", "mtp": "talker", "speaker": "talker"}
    sizes = {name: ours["talker"]["options"][name] for name in ("speaker",)} | {
        "decoder": runs[0]["options"]["decoder"]
    }
    pairs = {
        "name": "pairs",
        "stage": "pairs",
        "init": RUNS | said,
        "data": {"mix": [{"cuts": "digits-valid.jsonl.gz"}]},
    }
    pairs |= {"model": "digits.json", "options": {"out": "pairs.jsonl.gz", "takes": 2, "apart": 0.0, **sizes}}
    pairs["init"].pop("codec")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"runs": [tokenizer, *runs, pairs, *last]}))
    runs += last
    for name in ("digits.json", "codec.json"):
        shutil.copy(DIGITS.parent / name, tmp_path)
    (tmp_path / "runs").mkdir()
    process = launch(tmp_path, tmp_path / "two.yaml", tmp_path / "runs", 2)
    status, said = finish(process, tmp_path / "runs")
    assert status == 0, said
    assert {run["stage"] for run in runs} == STAGES.keys()
    for run in runs:
        folder = tmp_path / "runs/two" / run["name"]
        assert steps_of(folder) == ["00000002"], run["name"]
        assert (folder / BEST).exists(), run["name"]
        assert all(t.isfinite().all() for t in state_in(folder).values()), run["name"]
        pace = json.loads((folder / LOG).read_text().splitlines()[-1])
        assert pace["sound/s"] > pace["steps/s"], run["name"]  # batches are of seconds
        assert 0 <= pace["padding"] < 0.5, run["name"]
    best = {name: read_safetensors(tmp_path / "runs/two" / name / BEST) for name in ("aut", "base", "adapter")}
    begun = {n: t for n, t in best["base"].items() if n.startswith("thinker.")}
    begun |= {n: t for n, t in best["aut"].items() if n.startswith("aut.")}
    moved = {n for n, t in best["adapter"].items() if not torch.equal(t, begun[n])}
    assert moved == {f"aut.{name}.{kind}" for name in ("proj1", "proj2") for kind in ("weight", "bias")}


# ------------------------------------------------------------------------------------------ what it takes


def test_what_is_reckoned_is_what_is_there(tones):
    """Parameters to the last one, and what is kept for the way back, of AuT on two clips of four seconds."""
    recipe = replace(TWO, model="config.json", data=replace(TWO.data, batch_seconds=8.0, max_seconds=4.0))
    stage, folder = aut_of(tones, recipe), tones / "runs/course/tokenizer"
    found = price(recipe, folder, 1)
    run = Run(stage, recipe, tones)
    assert found.parameters == sum(p.numel() for p in stage.modules.parameters())
    assert found.trained == sum(p.numel() for p in run.players["aut"].values())
    assert found.memory["weights"] == 4 * found.parameters
    assert found.memory["moments and averages"] == 3 * found.memory["gradients"] == 12 * found.trained
    tokens = stage.config.tokens(400)
    clip = np.random.default_rng(0).normal(size=(400, stage.config.num_mel_bins)).astype(np.float32)
    batch = stage.collate([(clip, [5] * (int(READ * tokens) - 1))] * 2, stage.config.window_chunks)
    run.learn()
    with unique_bytes(stage.modules) as kept:
        stage.loss("aut", batch, 0)
    print(f"kept {sum(kept.values()):,} bytes, reckoned {found.memory['activations']:,.0f}")
    assert found.memory["activations"] == pytest.approx(sum(kept.values()), rel=0.25)
    again = price(replace(recipe, devices=Devices(recompute=True)), folder, 4)
    assert again.memory["activations"] < 0.95 * found.memory["activations"]  # of this size, scores of text are most
    assert found.operations < again.operations < 1.4 * found.operations
    assert again.memory["weights"] == found.memory["weights"] / 4


@contextmanager
def unique_bytes(modules: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Storages that are kept for the way back while this is open, the weights left out, and their bytes."""
    own, seen, alive = {p.untyped_storage().data_ptr() for p in modules.parameters()}, dict[int, int](), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


@pytest.mark.scale
def test_recipes_at_the_released_size_have_a_price():
    found = {r.name: price(r, RELEASE, 64) for r in read_course(RELEASE).recipes}
    aut = found["aut"]
    assert 0.6e9 < aut.trained < 1.5e9
    assert found["thinker"].parameters > 30e9
    assert found["adapter"].trained < 10e6
    assert 3e9 < found["talker"].trained < 3.6e9
    assert all(0 < sum(cost.memory.values()) < 80e9 and cost.operations > 1e12 for cost in found.values())
    assert sum(found["talker"].memory.values()) < 24e9  # without anything to listen to
