"""The one training loop: every stage of every recipe runs through `train`, in one process or in many.

A stage brings modules, batches and losses; the loop brings AdamW, the learning rate, clipping, averaging, validation,
samples, and a state on disk. A step takes the batches of its numbers, which its processes share out, and minimizes the
means of the loss over all of them. Everything random is a function of the seed and a batch's number, so a run that was
killed goes on from its last state to the same weights, bit for bit, on as many machines of the same kind.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from antiphon.errors import ConfigError
from antiphon.train import ranks, shards
from antiphon.train.checkpoints import BEST, STATE, Checkpoints, check_fit, write_file
from antiphon.train.lora import adapt, merged
from antiphon.train.recipe import Optimization, Recipe

__all__ = ["BEST", "LOG", "STATE", "Figures", "Loss", "Run", "Size", "Stage", "sum_of", "train"]

AHEAD = 4  # steps whose batches are prepared, at least, while the current one is used
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's memory of a parameter
COLUMNS = (  # what a bar shows
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
STOPPED = 128 + signal.SIGTERM  # exit status
PACE = "{steps/s:.3g} steps and {sound/s:.4g} s of sound a second, {padding:.1%} padding"
LOG = "log.jsonl"  # one line of figures per step that had any
Figures = dict[str, float]


Made = TypeVar("Made")


@dataclass
class Loss:
    """What a player minimizes in one step, and the figures to show."""

    total: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)  # whose sum `total` is; see `Stage.counts`

    @classmethod
    def of(cls, parts: dict[str, Tensor], figures: Mapping[str, Tensor]) -> Loss:
        """The sum of means, each over what `Stage.counts` says of it."""
        return cls(sum_of(parts), {name: value.detach() for name, value in figures.items()}, parts)


@dataclass(frozen=True)
class Size:
    """How much is in a batch."""

    seconds: float = 0.0  # of sound that is heard or said
    filled: int = 0  # of what the stage's sequences are made of: frames, tokens
    places: int = 0  # for these, padding with them

    @classmethod
    def of_clips(cls, mel: Tensor, frames: Tensor, rate: int) -> Size:
        """Of log-mels [B, T, F] of so many frames [B] each."""
        return cls(float(frames.sum()) / rate, int(frames.sum()), mel.shape[0] * mel.shape[1])

    def __add__(self, other: Size) -> Size:
        return Size(self.seconds + other.seconds, self.filled + other.filled, self.places + other.places)


class Pace:
    """How fast steps are taken; validating, showing and saving are not in it."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.size = 0, 0.0, Size()

    def add(self, seconds: float, sizes: Sequence[Size]) -> None:
        """A step that this process has taken."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.size = reduce(add, sizes, self.size)

    def figures(self) -> Figures:
        """Steps and seconds of sound a second, of all processes, and the share of places that are padding."""
        sound, filled, places = ranks.summed([self.size.seconds, self.size.filled, self.size.places])
        return {
            "steps/s": self.steps / self.seconds,
            "sound/s": sound / self.seconds,
            "padding": 1 - filled / places if places else 0.0,
        }


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Their sum."""
    return reduce(add, parts.values())


class Stage(Protocol):
    """One kind of training: what is trained, on what, and how well it does."""

    modules: nn.ModuleDict  # all that is saved

    def players(self) -> dict[str, list[str]]:
        """Who takes a turn in each step, and the modules each one optimizes; one player unless adversaries train."""
        ...

    def batch(self, number: int) -> Any:
        """The data of a batch, prepared in a background thread: a function of the recipe's seed and `number` alone.

        Step s takes those from s * `accumulate` on, `accumulate` of them.
        """
        ...

    def counts(self, batch: Any) -> dict[str, float]:
        """How many tokens, clips or frames of a batch each part of its loss is a mean over.

        The means of a step are over all its batches, in whichever process; parts without a count weigh the same in
        each of them.
        """
        ...

    def size(self, batch: Any) -> Size:
        """How much is in a batch."""
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


def seeded(seed: int, number: int) -> None:
    """Make everything random in a batch's loss a function of its number."""
    torch.manual_seed((seed * 1_000_003 + number) * 1_000_003 & (1 << 62) - 1)


def learning_rate(plan: Optimization, step: int) -> float:
    """Linear warm-up, then half a cosine down to `final_lr`."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.final_lr + (plan.lr - plan.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def prepared(batch: Callable[[int], Any], start: int, stop: int, loaders: int = 1) -> Iterator[tuple[int, Any]]:
    """Steps and their batches, prepared in the background a little before they are needed, some at a time."""
    pool, ahead = ThreadPoolExecutor(loaders), max(AHEAD, 2 * loaders)
    try:
        waiting = [(step, pool.submit(batch, step)) for step in range(start, min(start + ahead, stop))]
        for step in range(start, stop):
            _, future = waiting.pop(0)
            if step + ahead < stop:
                waiting.append((step + ahead, pool.submit(batch, step + ahead)))
            yield step, future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # who is told to stop does not wait for what nobody will take


class Losses(nn.Module):
    """A stage's losses as the forward of one module, for whose time all weights that are used in it are here."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.trained, self.stage = stage.modules, stage
        self.names = [n for n, p in stage.modules.named_parameters() if p.requires_grad]
        self.players = {
            player: {n for n in self.names if any(n == m or n.startswith(f"{m}.") for m in modules)}
            for player, modules in stage.players().items()
        }

    def forward(self, player: str, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parts of a player's loss, and figures; gradients are for the player's own weights."""
        weights, own = dict(self.trained.named_parameters()), self.players[player]
        for name in self.names:
            weights[name].requires_grad_(name in own)
        loss = self.stage.loss(player, batch, step)
        parts = dict(loss.parts) or {"total": loss.total}
        if ranks.many() and loss.total.grad_fn is not None:  # all add up gradients of the same weights, used or not
            here = [weights[n] for n in self.names if n in own and not isinstance(weights[n], DTensor)]
            parts["unused"] = torch.stack([p.flatten()[:0].sum() for p in here]).sum() if here else 0 * loss.total
        return parts, loss.figures


class Run:
    """The state of a training: a stage's weights, their averages and AdamW's moments, in memory and on disk.

    Where several processes train, each holds a part of every tensor.
    """

    def __init__(self, stage: Stage, recipe: Recipe, folder: Path) -> None:
        self.stage, self.recipe, self.folder = stage, recipe, folder
        self.step, self.best = 0, math.inf
        adapt(stage.modules, recipe)
        self.losses = Losses(stage)
        for player, names in self.losses.players.items():
            if not names:
                raise ConfigError(f"{recipe.name}: there is nothing left for {player!r} to train; freeze less")
        plan = recipe.optimization
        if plan.accumulate % ranks.world():
            raise ConfigError(
                f"{recipe.name}: {ranks.world()} processes cannot share out {plan.accumulate} batches a step; set "
                f"optimization.accumulate to a multiple of {ranks.world()}, or start another number"
            )
        self.device = next(stage.modules.parameters()).device
        if recipe.devices.recompute:
            shards.recompute(stage.modules)
        shards.share_out(self.losses, self.device)
        parameters = dict(stage.modules.named_parameters())
        self.weights = {n: parameters[n] for n in self.losses.names}
        self.players = {
            player: {n: p for n, p in self.weights.items() if n in names}
            for player, names in self.losses.players.items()
        }
        self.frozen = [m for m in stage.modules.modules() if _is_frozen(m)]
        self.optimizers = {p: _adamw(weights, plan) for p, weights in self.players.items()}
        self.average = {n: p.detach().clone() for n, p in self.weights.items()} if plan.average else {}
        self.checkpoints = Checkpoints(folder, recipe.devices)

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
        self.checkpoints.save(self.tensors(), about)

    def restore(self) -> None:
        """Go on where the state on disk stands, if there is one.

        Raises:
            ConfigError: it was written by another recipe.
            WeightsError: it was written for a model of other sizes.
        """
        found = self.checkpoints.newest()
        if found is None:
            return
        if found.about["recipe"] != self.recipe.fingerprint:
            raise ConfigError(f"{self.folder} holds a run of another recipe; give --runs another folder or remove it")
        shapes = found.shapes
        model = {n.removeprefix("model."): shape for n, shape in shapes.items() if n.startswith("model.")}
        check_fit(self.stage.modules, model, "model.", found.path)
        self.step, self.best = found.about["step"], found.about["best"]
        for player, weights in self.players.items():
            memory = self.optimizers[player].state
            for n, p in weights.items():
                if f"adamw.{n}.step" in shapes:
                    moments = (torch.zeros_like(p.detach()) for _ in MOMENTS[1:])
                    memory[p] = dict(zip(MOMENTS, (torch.zeros((), device=p.device), *moments), strict=True))
        with torch.no_grad():
            found.read(self.tensors())

    def advance(self, *batches: Any) -> dict[str, Tensor]:
        """One step of every player over `batches` and those of the other processes; the figures of the last to show."""
        plan, figures, count = self.recipe.optimization, dict[str, Tensor](), len(batches) * ranks.world()
        shares = self._shares(batches)
        for i, batch in enumerate(batches):
            seeded(self.recipe.seed, self.step * count + i * ranks.world() + ranks.rank())
            for player in self.players:
                parts, shown = self.losses(player, batch, self.step)
                sum_of({n: part * shares[i].get(n, 1 / count) for n, part in parts.items()}).backward()
                figures |= shown
        for player, weights in self.players.items():
            norm = nn.utils.clip_grad_norm_(weights.values(), plan.clip)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
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
            fresh = [shards.local(self.weights[n]) for n in self.average]
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(map(shards.local, self.average.values())),
                fresh,
                1 - min(plan.average, (1 + self.step) / (10 + self.step)),
            )
        self.step += 1
        return figures

    def _shares(self, batches: tuple[Any, ...]) -> list[dict[str, float]]:
        """By which each part of each batch's loss is multiplied, so that its sum is the mean over the whole step."""
        each = [self.stage.counts(batch) for batch in batches]
        names = list(each[0])
        totals = dict(zip(names, ranks.summed([sum(own[n] for own in each) for n in names]), strict=True))
        return [{n: own[n] / totals[n] if totals[n] else 0.0 for n in names} for own in each]

    def learn(self) -> None:
        """Training mode; frozen modules stay as they are used, so that their statistics do not move either."""
        self.stage.modules.train()
        for module in self.frozen:
            module.eval()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, in evaluation mode."""
        kept = {n: shards.local(self.weights[n]).clone() for n in self.average}
        for n, average in self.average.items():
            shards.local(self.weights[n]).copy_(shards.local(average))
        self.stage.modules.eval()
        try:
            yield
        finally:
            self.learn()
            for n, weight in kept.items():
                shards.local(self.weights[n]).copy_(weight)

    def alone(self, work: Callable[[], Made]) -> Made:
        """What rank 0 makes with all weights at hand, told to the others, which wait."""
        with torch.no_grad(), shards.gathered(self.losses):
            with torch.inference_mode():
                made = [work()] if ranks.rank() == 0 else []
            return ranks.told(made)[0]

    def judge(self) -> Figures:
        """Validate; keep the weights if they are the best so far."""
        with self.averaged():
            figures = self.alone(self.stage.validate)
            score = next(iter(figures.values()), math.inf)
            if score <= self.best:
                self.best = score
                about = {"step": self.step, "recipe": self.recipe.fingerprint, "figures": figures}
                weights = shards.whole(self.stage.modules.state_dict())
                if ranks.rank() == 0:
                    write_file(self.folder / BEST, merged(weights, self.recipe.lora.scale), {"run": json.dumps(about)})
        return figures

    def show(self, folder: Path, board: Any) -> None:
        """Samples for a person to judge by."""
        with self.averaged():
            self.alone(lambda: self.stage.sample(folder, board))


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


@contextlib.contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM, as what schedules jobs sends it a while before it kills them; ends the process afterwards.

    What comes too late for the last step would be forgotten otherwise, and the next recipe of a course begin.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():
        sys.exit(STOPPED)


def train(stage: Stage, recipe: Recipe, folder: Path, *, quiet: bool = False) -> Run:
    """Train `stage` to the end of `recipe`, from the state in `folder` if there is one.

    SIGTERM ends the process after the step it is in, with the state on disk.
    """
    torch.set_num_threads(recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    run, plan = Run(stage, recipe, folder), recipe.optimization
    run.restore()
    board = _board(folder, run.step)
    gc.collect()
    gc.freeze()  # a corpus is millions of objects: looking through them for garbage took longer than the steps
    columns = (*COLUMNS, TextColumn("{task.fields[figures]}"))
    with Progress(*columns, disable=quiet or ranks.rank() > 0) as progress, asked_to_stop() as asked:
        bar = progress.add_task(recipe.name, total=plan.steps, completed=run.step, figures="")
        run.learn()
        batches_of = _several(stage.batch, plan.accumulate)
        pace, whole, shown, clock = Pace(), Pace(), dict[str, float](), time.monotonic()
        for step, batches in prepared(batches_of, run.step, plan.steps, recipe.devices.loaders):
            figures = run.advance(*batches)
            for one in (pace, whole):
                one.add(time.monotonic() - clock, [stage.size(batch) for batch in batches])
            last, news = run.step == plan.steps, dict[str, float]()
            if run.step % plan.log_every == 0 or last:
                news = ranks.mean({k: float(v) for k, v in figures.items()}) | {"lr": learning_rate(plan, step)}
                news, pace = news | pace.figures(), Pace()
            if run.step % plan.validate_every == 0 or last:
                news |= {f"val/{k}": v for k, v in run.judge().items()}
            if news and ranks.rank() == 0:
                _log(board, folder / LOG, run.step, news)
                shown |= news
            if run.step % plan.sample_every == 0 or last:
                run.show(folder / "samples" / f"{run.step:06d}", board)
            stop = bool(ranks.summed([float(asked.is_set())])[0])
            if run.step % plan.save_every == 0 or last or stop:
                run.save()
            run.checkpoints.settle(wait=last or stop)
            if stop:  # one of the processes was asked: all end
                sys.exit(STOPPED)
            progress.update(bar, completed=run.step, figures=_brief(shown))
            clock = time.monotonic()
        if whole.steps and (told := whole.figures()) and not progress.disable:
            progress.print(recipe.name, PACE.format(**told), sep=": ")
    gc.unfreeze()
    board.close()
    return run


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer and the log as they are at `step`; only rank 0 has any."""
    from torch.utils.tensorboard.writer import SummaryWriter

    if ranks.rank() > 0:
        return contextlib.ExitStack()  # has nothing to write, and can be closed
    _forget_after(step, folder / LOG)
    return SummaryWriter(str(folder / "board"), purge_step=step + 1)


def _several(batch: Callable[[int], Any], count: int) -> Callable[[int], list[Any]]:
    """This process's batches of a step, whose gradients are added up: no two steps share one, and no two processes."""
    return lambda step: [batch(step * count + i) for i in range(ranks.rank(), count, ranks.world())]


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
