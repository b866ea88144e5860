"""Steps of fixed shapes, recorded once and replayed: no Python between their kernels.

On CUDA a step is a graph, on a CPU a traced function; both record the very statements of the boxes. Rows are padded to
a few sizes (`BUCKETS`), for each of which there is one recording.
"""

from __future__ import annotations

import bisect
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from antiphon.caches import CACHE_BLOCK, JoinedCaches, KVCache, Past
from antiphon.engine.blocks import BlockCache, BlockPool, BlockSpan
from antiphon.streaming import State

Step: TypeAlias = Callable[..., tuple[Tensor, ...]]

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows of a matrix product

# a lane that begins a graph waits for the device, which must not be recording for the other
RECORDING = threading.Lock()

WIDTHS = (1, 2, 4)  # blocks of the longest of several conversations; a wider table is recorded when it comes


def bucket(rows: int) -> int:
    """Rows that a batch of `rows` is padded to: a row gives the same bits in any company of one bucket."""
    place = bisect.bisect_left(BUCKETS, rows)
    return BUCKETS[place] if place < len(BUCKETS) else -(-rows // BUCKETS[-1]) * BUCKETS[-1]


def padded_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [n, …] with zeros to the bucket of its rows, and their number."""
    rows = bucket(len(x))
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))), rows


def capture(step: Step, state: State, examples: Sequence[Tensor], memory: Any = None) -> Step:
    """`step(state, *inputs)` as a function of inputs of the shapes of `examples`, on whose device it runs.

    The state is changed in place, by the recording too; what a call gives is valid until the next one with the same
    `graph_memory`.
    """
    step(state, *examples)  # what is made on first use (tables, constants) is no part of the recording
    return _graph(step, state, examples, memory) if examples[0].is_cuda else _trace(step, state, examples)


def _trace(step: Step, state: State, examples: Sequence[Tensor]) -> Step:
    kept, count = list(state.tensors().values()), len(examples)

    def whole(*given: Tensor) -> tuple[Tensor, ...]:
        return step(state.over(given[count:]), *given[:count])  # what is no input counts as constant

    with Tape() as tape:
        made = whole(*examples, *kept)
    kept += tape.changing([*examples, *kept])
    given = (*examples, *kept)
    traced = _traced(lambda *inputs: tape.replay(given, inputs, made), given)
    return lambda *inputs: traced(*inputs, *kept)


def _traced(step: Step, examples: Sequence[Tensor]) -> Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers stay what they were, as they are meant to
        traced: Any = torch.jit.trace(step, tuple(examples), check_trace=False)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # optimizing finds nothing to do here, and takes the first runs a second for it
        with torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
            return traced(*inputs)

    return run


class Tape(TorchDispatchMode):
    """The kernels that run while it is active.

    What is traced from their replay is a sixth faster than what is traced from the statements: in those every size
    would be an operation, and an operation that is made of others would be taken apart anew in every run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        with self:
            made = func.decompose(*args, **(kwargs or {}))
        if made is NotImplemented:  # a kernel
            made = func(*args, **(kwargs or {}))
            self.runs.append((func, args, kwargs or {}, made))
        return made

    def changing(self, given: Sequence[Tensor]) -> list[Tensor]:
        """What the kernels change or see change beside `given`: scratch space, which is no constant."""
        known, others, changed = {id(x) for x in given}, dict[int, Tensor](), set[int]()
        for func, args, kwargs, made in self.runs:
            used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            others.update((id(x), x) for x in used if id(x) not in known)
            known.update(map(id, tree_leaves(made)))
            if func._schema.is_mutable:
                changed.add(used[0].untyped_storage().data_ptr())
        return [x for x in others.values() if x.untyped_storage().data_ptr() in changed]

    def replay(self, given: Sequence[Tensor], inputs: Sequence[Tensor], made: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What `made` would have been with `inputs` in the place of `given`."""
        now = {id(old): new for old, new in zip(given, inputs, strict=True)}
        for func, args, kwargs, old in self.runs:
            args, kwargs = tree_map_only(Tensor, lambda x: now.get(id(x), x), (args, kwargs))
            new = func(*args, **kwargs)
            pairs = [(old, new)] if isinstance(old, Tensor) else zip(old, new, strict=True)
            now.update((id(before), after) for before, after in pairs)
        return tuple(now[id(x)] for x in made)


def _graph(step: Step, state: State, examples: Sequence[Tensor], memory: Any) -> Step:
    with RECORDING:
        return _recorded(step, state, examples, memory)


def _recorded(step: Step, state: State, examples: Sequence[Tensor], memory: Any) -> Step:
    inputs = [example.clone() for example in examples]
    device = inputs[0].device
    torch.cuda.current_stream(device).synchronize()
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries choose their kernels and take their workspaces
            step(state, *inputs)
    side.synchronize()
    # the other lanes go on in their threads while this one records
    with torch.cuda.graph(graph, memory, side, capture_error_mode="thread_local"):
        outputs = step(state, *inputs)

    def replay(*given: Tensor, kept: object = (step, state)) -> tuple[Tensor, ...]:  # whose tensors the graph reads
        for own, value in zip(inputs, given, strict=True):
            own.copy_(value)
        graph.replay()
        return outputs

    return replay


def graph_memory(device: torch.device) -> Any:
    """What the graphs of one thread may share: they run one after another, and nobody keeps what they give."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Steps:
    """The next positions of each of several conversations, after caches of any length.

    `run(caches, positions, *inputs [N, …])` is what is recorded, inputs and outputs with a row for each position;
    positions are [1, N], or None where the caches know them. `nobody` is an empty cache for rows that are there to fill
    a bucket; with a pool, the caches are all blocks of it.
    """

    def __init__(self, run: Step, nobody: KVCache, pool: BlockPool | None = None, memory: Any = None) -> None:
        self.run, self.nobody, self.pool, self.memory = run, nobody, pool, memory
        self.records = dict[tuple[int, int], Step]()

    def __call__(
        self, caches: Sequence[KVCache], *inputs: Tensor, steps: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs for inputs [N, …]: `steps` positions of each cache, which they lengthen, end to end.

        By default one of each. With a pool, outputs are valid until the next call of whoever shares its memory.
        """
        count, padded = len(inputs[0]), [padded_rows(x)[0] for x in inputs]
        if steps is not None and self.pool is None:  # of so many shapes that nothing is worth a recording
            outputs = self.run(JoinedCaches(caches, steps, len(padded[0])), None, *padded)
        else:
            steps = [1] * len(caches) if steps is None else steps
            outputs = (
                self._alone(caches, padded) if self.pool is None else self._pooled(self.pool, caches, steps, padded)
            )
            for cache, own in zip(caches, steps, strict=True):
                cache.advance(own)
        return tuple(output[:count] for output in outputs)

    def warm(self, count: int, *inputs: Tensor) -> None:
        """Record for so many positions; with a pool, for tables as wide as those of most conversations."""
        if self.pool is None:
            self([self.nobody.copy() for _ in range(count)], *inputs)
            return
        for slots in (width * CACHE_BLOCK for width in WIDTHS):
            if count <= slots <= self.nobody.capacity:
                cache = self.pool.hold(self.nobody)
                cache.advance(slots - count)
                self([cache], *inputs, steps=[count])

    def _alone(self, caches: Sequence[KVCache], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """With caches that have memory of their own: each past is an input, of any length."""
        rows, count = len(inputs[0]), len(inputs)
        every = [*caches, *[self.nobody] * (rows - len(caches))]
        places = torch.tensor([[cache.filled for cache in every]])
        given = [places, *inputs, *[part for cache in every for part in cache.past()]]

        def step(places: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            pasts = [Past(k, v) for k, v in zip(rest[count::2], rest[count + 1 :: 2], strict=True)]
            return self.run(JoinedCaches(pasts, [1] * len(pasts), len(pasts)), places, *rest[:count])

        if (rows, 0) not in self.records:
            step(*given)
            self.records[rows, 0] = _traced(step, given)
        return self.records[rows, 0](*given)

    def _pooled(
        self, pool: BlockPool, caches: Sequence[KVCache], steps: Sequence[int], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """With blocks of a pool, which a table finds for each position: one recording for every width of it."""
        held = [cache for cache in caches if isinstance(cache, BlockCache)]
        table, place = pool.places(held, steps, len(inputs[0]))

        def step(pool: BlockPool, table: Tensor, place: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self.run(BlockSpan(pool, table, place), None, *inputs)

        shape = (len(place), table.shape[1])
        if shape not in self.records:
            self.records[shape] = capture(step, pool, [table, place, *inputs], self.memory)
        return self.records[shape](table, place, *inputs)
