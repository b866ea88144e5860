"""Recipes: one YAML file per training run, read into frozen dataclasses; a wrong key is an error that names it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from antiphon.errors import ConfigError


@dataclass(frozen=True)
class Optimization:
    """How the weights move, and how often they are looked at."""

    steps: int
    lr: float
    warmup: int = 200
    final_lr: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0  # largest norm of the gradient
    accumulate: int = 1  # batches whose gradients make one step; several processes share them out
    average: float = 0.0  # decay of the averaged weights that are validated and kept; 0 keeps the last
    dtype: str = "auto"  # of products: auto is bfloat16 where the hardware has it; float64 is that of weights too
    log_every: int = 20
    validate_every: int = 500
    sample_every: int = 1000
    save_every: int = 200

    def __post_init__(self) -> None:
        if (
            min(self.steps, self.accumulate, self.log_every, self.validate_every, self.sample_every, self.save_every)
            < 1
        ):
            raise ConfigError("optimization: steps, accumulate and the *_every intervals must be 1 or more")
        if self.dtype not in ("auto", "float32", "bfloat16", "float64"):
            raise ConfigError(f"optimization.dtype is {self.dtype!r}; expected auto, float32, bfloat16 or float64")
        if not self.lr > 0 or not 0 <= self.average < 1:
            raise ConfigError("optimization: lr must be above 0, average from 0 to below 1")

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """Type of the matrix products."""
        if self.dtype == "float64":
            return torch.float64
        short = self.dtype == "bfloat16" or (self.dtype == "auto" and fast_bfloat16(device))
        return torch.bfloat16 if short else torch.float32

    @property
    def still_dtype(self) -> torch.dtype:
        """Type of the weights of whole boxes that stand still beside what is trained.

        As the release has its own where the recipe asks for bfloat16 by name: as float32 a Thinker of 30 B fills a GPU.
        """
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which losses are computed."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.product_dtype(device) == torch.bfloat16)


@functools.cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are clearly faster than float32 ones: on GPUs, and on the CPUs where they are.

    What a CPU says it has does not tell: AVX-512's dot products gave one kind half of float32's rate, and another more
    than twice it. The better of several rounds is far enough from the bound for every run to decide alike.
    """
    if device.type != "cpu":
        return True
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(5):
        for dtype in seconds:
            x, weight = torch.zeros(512, 512, dtype=dtype), torch.zeros(512, 512, dtype=dtype)
            begun = time.perf_counter()
            F.linear(x, weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - begun)
    return seconds[torch.bfloat16] < seconds[torch.float32] / 1.4


@dataclass(frozen=True)
class Devices:
    """How a run uses its devices, and which states it keeps; the weights it comes to are the same."""

    loaders: int = 1  # batches that are read at a time, in threads of each process
    recompute: bool = False  # activations of the large layers on the way back, instead of keeping them
    keep_last: int = 2  # checkpoints of several processes; one process keeps the last state alone
    keep_every: int = 0  # steps: those of its multiples are kept for good

    def __post_init__(self) -> None:
        if min(self.loaders, self.keep_last) < 1 or self.keep_every < 0:
            raise ConfigError("devices: loaders and keep_last must be 1 or more, keep_every 0 or more")


@dataclass(frozen=True)
class Lora:
    """Thin matrices that are trained in the place of the weights to which their products are added."""

    rank: int = 0  # of the products; 0 trains the weights themselves
    scale: float = 2.0  # of the products
    modules: tuple[str, ...] = ()  # that stand still but for these, such as thinker.model.layers
    linears: tuple[str, ...] = ("qkv_proj", "o_proj")  # the maps in them that get any

    def __post_init__(self) -> None:
        if self.rank < 0 or bool(self.rank) != bool(self.modules):
            raise ConfigError("lora: rank must be 1 or more, and modules must name what it is for")


@dataclass(frozen=True)
class Source:
    """One line of a mix: lhotse cuts, their share of the seconds, and what is asked of them."""

    cuts: str
    weight: float = 1.0
    task: str = "transcribe"
    languages: tuple[str, ...] = ()  # only the cuts in these; all by default


BUCKETS = (12, 1)


@dataclass(frozen=True)
class Data:
    """What a stage is trained on and validated on."""

    mix: tuple[Source, ...]
    validation: tuple[Source, ...] = ()
    batch_seconds: float = 60.0
    max_seconds: float = 30.0
    buckets: tuple[int, int] = BUCKETS  # of lengths, and of texts in each, that share a batch: more means less padding
    readers: int = 0  # processes that read all sounds before the first step, to stay in memory; 0: each as it is needed

    def __post_init__(self) -> None:
        if min(self.buckets) < 1:
            raise ConfigError(f"data.buckets is {list(self.buckets)}; expected two numbers of 1 or more")


NO_OPTIMIZATION = Optimization(1, 1.0)  # of a tokenizer, which has no weights


WITHOUT_WEIGHTS = ("tokenizer", "label", "echo", "pairs", "export")  # stages that train none


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str
    stage: str
    data: Data
    optimization: Optimization = NO_OPTIMIZATION
    model: str = "model.json"  # config.json of the whole model, beside the recipe
    options: dict[str, Any] = field(default_factory=dict)  # what only this stage knows
    init: dict[str, str] = field(default_factory=dict)  # module -> run it starts from
    freeze: tuple[str, ...] = ()  # modules that do not move
    lora: Lora = Lora()  # modules that move in few dimensions
    seed: int = 0
    threads: int = 1
    devices: Devices = Devices()

    def __post_init__(self) -> None:
        if self.optimization is NO_OPTIMIZATION and self.stage not in WITHOUT_WEIGHTS:
            raise ConfigError(f"{self.name}.optimization is missing; a stage with weights needs steps and lr")

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes the weights."""
        without = {"devices"} if self.lora.rank else {"devices", "lora"}
        changing = {name: value for name, value in dataclasses.asdict(self).items() if name not in without}
        if self.data.buckets == BUCKETS:  # runs from before there was a choice go on
            del changing["data"]["buckets"]
        text = json.dumps(changing, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file; its name is the file's.

    Raises:
        ConfigError: not there, not YAML, or a key that is unknown, missing or of the wrong kind.
    """
    return read_fields(Recipe, {"name": path.stem, **read_yaml_table(path)}, path.name)


def read_yaml_table(path: Path) -> dict[str, Any]:
    """The table in a YAML file.

    Raises:
        ConfigError: not there, not YAML, or no table.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"there is no recipe {path}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path} is not YAML: {error.problem} in line {line}") from None
    except (UnicodeError, yaml.YAMLError):  # bytes or characters that no text has
        raise ConfigError(f"{path} is not YAML; expected text in UTF-8") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a recipe; expected a table of settings")
    return value


def read_fields(kind: Any, value: Any, where: str) -> Any:
    """`value` as the dataclass `kind`, its fields checked one by one.

    Raises:
        ConfigError: a key that is unknown, missing or of the wrong kind.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where} should be a table of {', '.join(f.name for f in dataclasses.fields(kind))}")
    hints, known = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in known:
            raise ConfigError(f"{where} has no setting {name!r}; it has {', '.join(known)}")
    for name, f in known.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name} is missing")
    return kind(**{name: _typed(hints[name], part, f"{where}.{name}") for name, part in value.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return read_fields(hint, value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} should be a list")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} should have {len(kinds)} values")
        return tuple(_typed(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and inner[1] is not Any and isinstance(value, dict):
        return {_typed(str, k, f"a name in {where}"): _typed(inner[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{where} is {value!r}; expected a number") from None
    wanted = origin or hint
    if wanted is not Any and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        raise ConfigError(f"{where} is {value!r}; expected {wanted.__name__}")
    return value
