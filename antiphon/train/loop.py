"""The one training loop: every stage of every recipe runs through `train`.

A stage brings modules, batches and losses; the loop brings AdamW, the learning rate, clipping, averaging, validation,
samples, and a state on disk. Everything random in a step is a function of (seed, step, rank), so a run that was
killed goes on from its last state to the same weights, bit for bit, on the same kind of machine.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from antiphon.errors import ConfigError, WeightsError
from antiphon.files import read_metadata, read_safetensors, write_safetensors
from antiphon.train.recipe import Optimization, Recipe

AHEAD = 4  # batches prepared while the current one is used
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's memory of a parameter
COLUMNS = (  # what a bar shows
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
STATE = "last.safetensors"  # weights, their averages, AdamW's moments: all that a run needs to go on
BEST = "best.safetensors"  # weights of the best validation; what later stages and the export read
LOG = "log.jsonl"  # one line of figures per step that had any
Figures = dict[str, float]


@dataclass
class Loss:
    """What a player minimizes in one step, and the figures to show."""

    total: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)


class Stage(Protocol):
    """One kind of training: what is trained, on what, and how well it does."""

    modules: nn.ModuleDict  # all that is saved

    def players(self) -> dict[str, list[str]]:
        """Who takes a turn in each step, and the modules each one optimizes; one player unless adversaries train."""
        ...

    def batch(self, step: int) -> Any:
        """The data of a step, prepared in a background thread: a function of the recipe's seed and `step` alone."""
        ...

    def loss(self, player: str, batch: Any, step: int) -> Loss:
        """The loss of one player; players take turns in the order of `players`, on the same batch."""
        ...

    def validate(self) -> Figures:
        """Figures on the validation split, the first of which decides what is best: lower is better."""
        ...

    def sample(self, folder: Path, board: Any) -> None:
        """Sound, text and pictures for a person to judge by."""
        ...


def seeded(seed: int, step: int, rank: int = 0) -> None:
    """Make everything random in a step a function of where it stands."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_000_003 + rank & (1 << 62) - 1)


def learning_rate(plan: Optimization, step: int) -> float:
    """Linear warm-up, then half a cosine down to `final_lr`."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.final_lr + (plan.lr - plan.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def prepared(batch: Callable[[int], Any], start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """Steps and their batches, each prepared in the background a little before it is needed."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [(step, pool.submit(batch, step)) for step in range(start, min(start + AHEAD, stop))]
        for step in range(start, stop):
            _, future = waiting.pop(0)
            if step + AHEAD < stop:
                waiting.append((step + AHEAD, pool.submit(batch, step + AHEAD)))
            yield step, future.result()


class Run:
    """The state of a training: a stage's weights, their averages and AdamW's moments, in memory and on disk."""

    def __init__(self, stage: Stage, recipe: Recipe, folder: Path) -> None:
        self.stage, self.recipe, self.folder = stage, recipe, folder
        self.step, self.best = 0, math.inf
        self.weights = {n: p for n, p in stage.modules.named_parameters() if p.requires_grad}
        self.players = {
            player: {n: p for n, p in self.weights.items() if any(n == m or n.startswith(f"{m}.") for m in modules)}
            for player, modules in stage.players().items()
        }
        for player, weights in self.players.items():
            if not weights:
                raise ConfigError(f"{recipe.name}: there is nothing left for {player!r} to train; freeze less")
        self.frozen = [m for m in stage.modules.modules() if _is_frozen(m)]
        plan = recipe.optimization
        self.optimizers = {p: _adamw(weights, plan) for p, weights in self.players.items()}
        self.average = {n: p.detach().clone() for n, p in self.weights.items()} if plan.average else {}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name."""
        state = {f"model.{n}": t for n, t in self.stage.modules.state_dict().items()}
        state |= {f"average.{n}": t for n, t in self.average.items()}
        for player, weights in self.players.items():
            memory = self.optimizers[player].state
            state |= {f"adamw.{n}.{m}": memory[p][m] for n, p in weights.items() for m in MOMENTS if p in memory}
        return state

    def save(self) -> None:
        """Write the state, whole or not at all."""
        about = {"step": self.step, "best": self.best, "recipe": self.recipe.fingerprint}
        _write(self.folder / STATE, self.tensors(), {"run": json.dumps(about)})

    def restore(self) -> None:
        """Go on where the state on disk stands, if there is one.

        Raises:
            ConfigError: it was written by another recipe.
            WeightsError: it was written for a model of other sizes.
        """
        path = self.folder / STATE
        if not path.exists():
            return
        about = json.loads(read_metadata(path, "run"))
        if about["recipe"] != self.recipe.fingerprint:
            raise ConfigError(f"{self.folder} holds a run of another recipe; give --runs another folder or remove it")
        tensors = read_safetensors(path)
        fill(self.stage.modules, tensors, "model.", path)
        self.step, self.best = about["step"], about["best"]
        for n, average in self.average.items():
            average.copy_(tensors[f"average.{n}"])
        for player, weights in self.players.items():
            memory = self.optimizers[player].state
            for n, p in weights.items():
                if f"adamw.{n}.step" in tensors:
                    memory[p] = {m: tensors[f"adamw.{n}.{m}"].to(p.device) for m in MOMENTS}

    def advance(self, *batches: Any) -> dict[str, Tensor]:
        """One step of every player over the mean of `batches`; returns the figures of the last to show."""
        plan, figures = self.recipe.optimization, {}
        for batch in batches:
            for player, weights in self.players.items():
                for n, p in self.weights.items():
                    p.requires_grad_(n in weights)
                loss = self.stage.loss(player, batch, self.step)
                (loss.total / len(batches)).backward()
                figures |= loss.figures
        for player, weights in self.players.items():
            norm = nn.utils.clip_grad_norm_(weights.values(), plan.clip)
            optimizer = self.optimizers[player]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, self.step)
            if bool(norm.isfinite()):  # a step that overflowed would be in every later weight
                optimizer.step()
            optimizer.zero_grad()
            figures[f"{player}/norm"] = norm
        for p in self.weights.values():
            p.requires_grad_(True)
        if self.average:
            fresh = [self.weights[n].detach() for n in self.average]
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(self.average.values()), fresh, 1 - min(plan.average, (1 + self.step) / (10 + self.step))
            )
        self.step += 1
        return figures

    def learn(self) -> None:
        """Training mode; frozen modules stay as they are used, so that their statistics do not move either."""
        self.stage.modules.train()
        for module in self.frozen:
            module.eval()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, in evaluation mode."""
        kept = {n: self.weights[n].detach().clone() for n in self.average}
        for n, average in self.average.items():
            self.weights[n].data.copy_(average)
        self.stage.modules.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.learn()
            for n, weight in kept.items():
                self.weights[n].data.copy_(weight)

    def judge(self) -> Figures:
        """Validate; keep the weights if they are the best so far."""
        with self.averaged():
            figures = self.stage.validate()
            score = next(iter(figures.values()), math.inf)
            if score <= self.best:
                self.best = score
                about = {"step": self.step, "recipe": self.recipe.fingerprint, "figures": figures}
                _write(self.folder / BEST, self.stage.modules.state_dict(), {"run": json.dumps(about)})
        return figures


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has weights and none of them moves."""
    moves = [p.requires_grad for p in module.parameters()]
    return bool(moves) and not any(moves)


def _adamw(weights: dict[str, nn.Parameter], plan: Optimization) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms, biases and scales alone."""
    matrices = [p for p in weights.values() if p.dim() > 1]
    others = [p for p in weights.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, fused=True)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One file that takes its name when it is whole: a kill leaves the one before."""
    write_safetensors(path, tensors, metadata)
    with contextlib.suppress(OSError):  # some file systems have no directories to flush
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load_weights(module: nn.Module, run: Path, name: str) -> None:
    """Fill `module` from the best weights of an earlier run, where it was called `name`.

    Raises:
        WeightsError: the run has no finished weights, or they do not fit.
    """
    path = run / BEST
    if not path.exists():
        raise WeightsError(f"{run} has no {BEST} yet; train that stage first")
    fill(module, read_safetensors(path), f"{name}.", path)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """Fill `module` from those of the tensors whose names begin with `prefix`.

    Raises:
        WeightsError: they do not fit; the sentence names the file, `path`.
    """
    tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    wanted = {n: list(t.shape) for n, t in module.state_dict().items()}
    found = {n: list(t.shape) for n, t in tensors.items()}
    for n in sorted(wanted | found):
        if wanted.get(n) != found.get(n):
            here, there = wanted.get(n, "nowhere"), found.get(n, "missing")
            raise WeightsError(f"{path} does not fit this recipe: {prefix}{n} is {there} in it and {here} in the model")
    module.load_state_dict(tensors)


def train(stage: Stage, recipe: Recipe, folder: Path, *, quiet: bool = False) -> Run:
    """Train `stage` to the end of `recipe`, from the state in `folder` if there is one."""
    from torch.utils.tensorboard.writer import SummaryWriter

    torch.set_num_threads(recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    run, plan = Run(stage, recipe, folder), recipe.optimization
    run.restore()
    _forget_after(run.step, folder / LOG)
    board = SummaryWriter(str(folder / "board"), purge_step=run.step + 1)
    gc.collect()
    gc.freeze()  # a corpus is millions of objects: looking through them for garbage took longer than the steps
    with Progress(*COLUMNS, TextColumn("{task.fields[figures]}"), disable=quiet) as progress:
        bar = progress.add_task(recipe.name, total=plan.steps, completed=run.step, figures="")
        run.learn()
        clock, shown = time.monotonic(), dict[str, float]()
        for step, batches in prepared(_several(stage.batch, plan.accumulate), run.step, plan.steps):
            seeded(recipe.seed, step)
            figures = run.advance(*batches)
            last, news = run.step == plan.steps, dict[str, float]()
            if run.step % plan.log_every == 0 or last:
                news = {k: float(v) for k, v in figures.items()} | {"lr": learning_rate(plan, step)}
                news["steps/s"] = plan.log_every / (time.monotonic() - clock)
                clock = time.monotonic()
            if run.step % plan.validate_every == 0 or last:
                news |= {f"val/{k}": v for k, v in run.judge().items()}
            if news:
                _log(board, folder / LOG, run.step, news)
                shown |= news
            if run.step % plan.sample_every == 0 or last:
                with run.averaged():
                    stage.sample(folder / "samples" / f"{run.step:06d}", board)
            if run.step % plan.save_every == 0 or last:
                run.save()
            progress.update(bar, completed=run.step, figures=_brief(shown))
    gc.unfreeze()
    board.close()
    return run


def _several(batch: Callable[[int], Any], count: int) -> Callable[[int], list[Any]]:
    """The batches of a step whose gradients are added up: no two steps share one."""
    return lambda step: [batch(step * count + i) for i in range(count)]


def _log(board: Any, path: Path, step: int, figures: Figures) -> None:
    for name, value in figures.items():
        board.add_scalar(name, value, step)
    line = {k: float(f"{v:.5g}") if math.isfinite(v) else None for k, v in figures.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **line}) + "\n")


def _forget_after(step: int, path: Path) -> None:
    """Take out of the log what a killed run did after the state it goes on from, half a line included."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


def _brief(figures: Figures) -> str:
    """The first few figures in one line."""
    return "  ".join(f"{k} {v:.3g}" for k, v in itertools.islice(figures.items(), 5))
